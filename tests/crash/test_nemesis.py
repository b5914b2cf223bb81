"""A minute of the nemesis: one fault of each dangerous kind, on real processes. `make crash` runs it for longer."""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path

import pytest

from tests import schema
from tests.crash.nemesis import QUICK, Run

SEED = int(os.environ.get("CHATKEEP_SEED") or secrets.randbelow(1 << 32))


@pytest.mark.timeout(480)  # a slow machine takes longer to start things again; each wait has its own limit
def test_promise_survives_a_minute_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with schema.state_directory() as directory:
        report = asyncio.run(Run(Path(directory) / "run", SEED, lines.append, QUICK).go(0.0, QUICK))
    with capsys.disabled():
        print(f"\n{report.summary()}")
    assert not report.violations, "\n".join([f"repeat with CHATKEEP_SEED={SEED}", *lines, report.summary()])
    assert report.acknowledged > 0, "nothing was acknowledged: the minute proves nothing"
    assert sum(report.kills.values()) > 0, "nothing was killed: the minute proves nothing"
