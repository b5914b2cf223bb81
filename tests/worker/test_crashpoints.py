"""Whom an order kills, and that nothing can be killed without one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.schema import ROOT
from worker import crashpoints

VISITS = "from worker.crashpoints import visit\nfor _ in range(3): visit('flush:locked'); print('passed', flush=True)"


def run(orders: Path | None) -> tuple[int, int]:
    """How a process ended that came to the point three times, and how often it passed."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | ({crashpoints.VARIABLE: str(orders)} if orders else {})
    ended = subprocess.run([sys.executable, "-c", VISITS], env=env, capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stdout.count("passed")


@pytest.mark.parametrize("visit", [1, 2, 3])
def test_an_order_kills_at_its_visit_and_is_gone(tmp_path: Path, visit: int) -> None:
    crashpoints.order(tmp_path, "flush:locked").write_text(str(visit))
    assert run(tmp_path) == (-signal.SIGKILL, visit - 1)
    assert run(tmp_path) == (0, 3)


def test_without_the_variable_an_order_is_no_order(tmp_path: Path) -> None:
    crashpoints.order(tmp_path, "flush:locked").write_text("1")
    assert run(None) == (0, 3)


@pytest.mark.parametrize(("point", "text"), [("flush:locked", "4"), ("flush:locked", ""), ("flush:begun", "1")])
def test_nothing_else_kills(tmp_path: Path, point: str, text: str) -> None:
    crashpoints.order(tmp_path, point).write_text(text)
    assert run(tmp_path) == (0, 3)
    assert run(tmp_path / "not there") == (0, 3)


def test_nothing_that_runs_chatkeep_sets_the_variable() -> None:
    for path in ("Dockerfile", "docker-compose.yml", ".env.example", "Makefile", "api/__main__.py", "api/supervisor.py"):
        assert crashpoints.VARIABLE not in (ROOT / path).read_text()
