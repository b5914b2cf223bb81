"""The supervisor by itself, with small programs for parts."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from api import supervisor
from api.supervisor import Board, Program, Supervisor
from tests import schema
from worker.errors import ConfigurationError
from worker.processes import Claim

pytestmark = pytest.mark.anyio

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    signal.pause()
print("ready", flush=True)
signal.pause()
"""
TALKER = """
import sys, time
for part in ("on", "e\\ntw", "o\\n\\n", "th\\xe9", "end"):
    sys.stdout.write(part)
    sys.stdout.flush()
    time.sleep(0.05)
"""
PATIENT = 'import signal; print("ready", flush=True); signal.pause()'


class Parts:
    """Makes parts that write down what they print."""

    def __init__(self, home: Path) -> None:
        self.claim = Claim(home)
        self.said: list[tuple[str, str]] = []

    def make(self, name: str, program: str, patience: float = 5.0) -> Program:
        argv = [sys.executable, "-X", self.claim.marker, "-c", program]
        return Program(
            name, argv, env=os.environ, directory=schema.ROOT, claim=self.claim, say=lambda *line: self.said.append(line), patience=patience
        )

    def alive(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["cmdline", "status"])
            if self.claim.marker in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE
        ]


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    made = Parts(tmp_path)
    made.claim.take()
    yield made
    made.claim.kill_processes()
    made.claim.release()


async def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


class Screen(Board):
    def __init__(self) -> None:
        super().__init__(gone=lambda: None)
        self.lines: list[tuple[str, str]] = []

    def say(self, name: str, line: str) -> None:
        self.lines.append((name, line))


class TestProgram:
    async def test_output_comes_in_whole_lines_however_it_is_written(self, parts: Parts) -> None:
        part = parts.make("talker", TALKER)
        await part.start()
        assert await part.exit_code(10) == 0
        await until(lambda: len(parts.said) == 3)
        assert parts.said == [("talker", "one"), ("talker", "two"), ("talker", "théend")]

    async def test_endless_line_is_cut(self, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervisor, "LINE_BYTES_MAX", 10)
        part = parts.make("talker", 'print("x" * 25, end="")')
        await part.start()
        await part.exit_code(10)
        await until(lambda: "".join(line for _, line in parts.said) == "x" * 25)
        assert all(len(line) < 20 for _, line in parts.said)

    async def test_one_that_ignores_sigterm_is_killed_with_its_children(self, parts: Parts) -> None:
        part = parts.make("stubborn", STUBBORN, patience=0.3)
        await part.start()
        await until(lambda: ("stubborn", "ready") in parts.said)
        assert len(parts.alive()) == 2
        await part.end()
        await until(lambda: parts.alive() == [])

    async def test_children_end_with_one_that_dies(self, parts: Parts) -> None:
        part = parts.make("stubborn", STUBBORN)
        await part.start()
        await until(lambda: ("stubborn", "ready") in parts.said)
        assert part.pid is not None
        psutil.Process(part.pid).kill()
        assert await part.ended() == "killed by SIGKILL"
        await until(lambda: parts.alive() == [])

    async def test_one_that_takes_too_long_is_given_up(self, parts: Parts) -> None:
        part = parts.make("slow", PATIENT)
        await part.start()
        with pytest.raises(ConfigurationError, match="slow did not end within 0 s"):
            await part.exit_code(0.2)
        assert parts.alive() == []

    async def test_missing_program_is_a_message(self, parts: Parts) -> None:
        nowhere = Program("x", ["/nowhere"], env={}, directory=Path("/nowhere"), claim=parts.claim, say=print, patience=1)
        with pytest.raises(ConfigurationError, match="x cannot be started"):
            await nowhere.start()


class TestSupervisor:
    async def test_dead_part_comes_back_after_growing_pauses(self, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervisor, "PAUSE_SECONDS_MIN", 0.1)
        monkeypatch.setattr(supervisor, "PAUSE_SECONDS_MAX", 0.3)
        screen = Screen()
        keeper = Supervisor(screen)
        await keeper.start(parts.make("fragile", "raise SystemExit(3)"))
        await until(lambda: len(screen.lines) >= 4)
        await keeper.end()
        pauses = [line.rsplit(" ", 2)[1] for _, line in screen.lines[:4]]
        assert pauses == ["0.1", "0.2", "0.3", "0.3"]
        assert "exit code 3" in screen.lines[0][1]

    async def test_ends_the_last_started_first_and_starts_nothing_again(self, parts: Parts) -> None:
        order: list[str] = []

        def noting(part: Program) -> Program:
            end: Callable[[], Awaitable[None]] = part.end

            async def note() -> None:
                order.append(part.name)
                await end()

            part.end = note  # type: ignore[method-assign]
            return part

        keeper = Supervisor(screen := Screen())
        for name in ("first", "second", "third"):
            await keeper.start(noting(parts.make(name, PATIENT)))
        await until(lambda: len(parts.said) == 3)
        await keeper.end()
        assert order == ["third", "second", "first"]
        assert parts.alive() == []
        assert screen.lines == []

    async def test_part_that_is_ended_by_hand_is_started_again(self, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervisor, "PAUSE_SECONDS_MIN", 0.1)
        keeper = Supervisor(Screen())
        await keeper.start(part := parts.make("worker", PATIENT))
        before = part.pid
        await part.end()
        await until(lambda: part.pid not in (None, before))
        await keeper.end()

    async def test_kill_ends_a_slow_end(self, parts: Parts) -> None:
        keeper = Supervisor(Screen())
        await keeper.start(parts.make("stubborn", STUBBORN, patience=60))
        await until(lambda: ("stubborn", "ready") in parts.said)
        ending = asyncio.create_task(keeper.end())
        await asyncio.sleep(0.1)
        keeper.kill()
        async with asyncio.timeout(10):
            await ending
        assert parts.alive() == []
