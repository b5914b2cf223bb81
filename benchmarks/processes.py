"""The processes of a run: all in one directory, where their logs stay until the next run, and none that outlives whoever started it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from benchmarks.load import ROOT, Probe, request
from worker.embedded import make_private
from worker.processes import Claim, spawn
from worker.settings import Settings

READY_SECONDS = 90.0
STOP_SECONDS = 20.0


class Process:
    """One process of the stand; its output is in `<home>/<name>.log`."""

    def __init__(self, name: str, home: Path, claim: Claim, env: Mapping[str, str], argv: Sequence[str]) -> None:
        self.name = name
        self.log = home / f"{name}.log"
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = spawn(argv, claim=claim, output=output, env=env, directory=home)
        finally:
            os.close(output)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, seconds: float) -> int:
        return self._process.wait(seconds)

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """Ends it, by force if it takes too long."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_SECONDS)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits; if the process ends meanwhile, or it takes too long, the end of its log says why."""
        deadline = time.monotonic() + READY_SECONDS
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: {what} did not happen:\n{self.tail()}")
            time.sleep(0.05)


class Processes:
    """All of a run, ended together at the end of the `with` block."""

    def __init__(self, home: Path, jwt_secret: str) -> None:
        self.home = home
        self._jwt_secret = jwt_secret
        self._claim = Claim(home)
        self._running: dict[str, Process] = {}

    def __enter__(self) -> Self:
        make_private(self.home, passable=True)
        self._claim.take()
        for log in self.home.glob("*.log"):
            log.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_all()
        self._claim.release()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._running.values()]

    def run(self, name: str, own: Mapping[str, str], *module: str) -> Process:
        """Starts `python -m module…` with these variables; it ends with the others at the latest."""
        return self.run_program(name, self._environment(own), [sys.executable, "-X", self._claim.marker, "-m", *module])

    def run_program(self, name: str, env: Mapping[str, str], argv: Sequence[str]) -> Process:
        """Starts any program."""
        process = self._running[name] = Process(name, self.home, self._claim, env, argv)
        return process

    def serve(self, name: str, own: Mapping[str, str], app: str, port: int) -> Process:
        """Starts a uvicorn."""
        return self.run(name, own, "uvicorn", app, "--host", "127.0.0.1", "--port", str(port), "--no-access-log", "--log-level", "warning")

    def finish(self, name: str, own: Mapping[str, str], *module: str, seconds: float = READY_SECONDS) -> None:
        """Runs it to its end, which must be a good one."""
        process = self.run(name, own, *module)
        code = process.wait(seconds)
        self.stop(name)
        if code != 0:
            raise RuntimeError(f"{name} failed:\n{process.tail()}")

    def stop_all(self) -> None:
        for name in list(self._running):
            self.stop(name)

    def stop(self, name: str) -> None:
        self._running.pop(name).stop()

    def _environment(self, own: Mapping[str, str]) -> dict[str, str]:
        """Nothing of the user's settings, and no `.env` either (the processes run in a directory that has none)."""
        given = {name.upper() for name in Settings.model_fields}
        kept = {name: value for name, value in os.environ.items() if name.upper() not in given}
        return kept | {"PYTHONPATH": str(ROOT), "JWT_SECRET": self._jwt_secret, "LOG_LEVEL": "WARNING", **own}


def answers(port: int, path: str) -> bool:
    """Whether a server answers 200 here."""
    try:
        with Probe(port) as probe:
            return probe.send(request("GET", path))[0] == 200
    except OSError:
        return False
