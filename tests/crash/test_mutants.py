"""The planted bugs can still be planted. That each is found is what `make mutants` is for; it takes six minutes on a quiet machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash import mutants
from tests.crash.mutants import MUTANTS, Edit, Mutant, NoSuchPlace, plant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_bug_finds_its_place(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, tmp_path)
    for edit in mutant.edits:
        assert (tmp_path / edit.path).read_text() != (mutants.ROOT / edit.path).read_text()


@pytest.mark.parametrize("old", ["nothing like this is in there", "\n"])
def test_a_bug_without_its_place_is_an_error(tmp_path: Path, old: str) -> None:
    with pytest.raises(NoSuchPlace):
        plant(Mutant("lost", "", (Edit("worker/flush.py", old, "x"),)), tmp_path)


def test_a_slip_of_the_pen_is_no_bug(tmp_path: Path) -> None:
    with pytest.raises(SyntaxError):
        plant(Mutant("slip", "", (Edit("worker/flush.py", "def flush_shard(", "def flush_shard(("),)), tmp_path)
