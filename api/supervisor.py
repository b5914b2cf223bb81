"""Keeps the processes of one installation alive: starts them in order, brings back what dies, ends them in reverse order.

A `Part` is a program of ours or an embedded server. Each part has a keeper: a task that waits for the part to end and starts it again
after a pause that grows with every early death. Ending is bounded: what does not go within its patience is killed, children included.

To restart a part for another reason than its death, call its `end()`: its keeper does the rest.
The order is the caller's: what is started first is ended last.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from worker.embedded import EmbeddedPostgres, EmbeddedValkey
from worker.errors import ConfigurationError
from worker.processes import KILLED_SECONDS, Claim, spawn

LOOK_SECONDS = 0.1
"""How often a part is looked at. `waitpid` in a thread would tell at once, and would hang on a process that is stuck in the kernel."""
PAUSE_SECONDS_MIN = 0.5
PAUSE_SECONDS_MAX = 30.0
STEADY_SECONDS = 60.0
"""Who lived that long starts again with the shortest pause."""
LINE_BYTES_MAX = 64 * 1024

_COLOURS: Final = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")
_NAME_WIDTH = 8

Say = Callable[[str, str], None]
"""Prints a line of the named part."""


class Board:
    """The terminal: every line behind the name it comes from, in that name's colour."""

    def __init__(self, gone: Callable[[], None]) -> None:
        self._console = _Console(gone)
        self._colours: dict[str, str] = {}

    def say(self, name: str, line: str) -> None:
        """Print one line of the named part."""
        colour = self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])
        self._console.print(Text.assemble((f"{name:<{_NAME_WIDTH}} | ", colour), line), soft_wrap=True)

    def show(self, text: str) -> None:
        """Print something of the supervisor's own; rich's markup works."""
        self._console.print(text, soft_wrap=True)


class _Console(Console):
    def __init__(self, gone: Callable[[], None]) -> None:
        super().__init__(highlight=False)
        self._gone = gone

    def on_broken_pipe(self) -> None:
        """Whoever read our output is gone, and with it the person: end in good order, and print nothing more."""
        self.quiet = True
        self._gone()


class Part(ABC):
    """One thing that runs. `start` may be called again after it ended."""

    name: str

    @abstractmethod
    async def start(self) -> None:
        """Start it; `ConfigurationError` says why it cannot be."""

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """Its process, while it runs."""

    @abstractmethod
    async def ended(self) -> str:
        """Wait until it has ended by itself or by another's hand; says how."""

    @abstractmethod
    async def end(self) -> None:
        """End it: politely, and by force when its patience is over."""

    @abstractmethod
    def kill(self) -> None:
        """End it now."""


class Program(Part):
    """One of our own processes, in a session of its own; what it prints goes to the board."""

    def __init__(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], directory: Path, claim: Claim, say: Say, patience: float
    ) -> None:
        self.name = name
        self._argv = argv
        self._env = env
        self._directory = directory
        self._claim = claim
        self._say = say
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self._group: int | None = None

    async def start(self) -> None:
        """Start it. If this process dies, the kernel kills it: whoever kills the supervisor may not leave half of an installation."""
        reader, writer = os.pipe()
        try:
            self._process = spawn(
                self._argv,
                claim=self._claim,
                output=writer,
                env=self._env,
                directory=self._directory,
            )
            self._group = self._process.pid
        except OSError as exc:
            os.close(reader)
            raise ConfigurationError(f"{self.name} cannot be started: {exc}") from exc
        finally:
            os.close(writer)
        _Lines(reader, lambda line: self._say(self.name, line))

    @property
    def pid(self) -> int | None:
        """Its process, while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def ended(self) -> str:
        """Wait until it has ended; its children end with it."""
        await _until(lambda: self.pid is None)
        self.kill()
        return _how(self._process.returncode if self._process else 0)

    async def exit_code(self, seconds: float) -> int:
        """Wait for a program that ends by itself; it is killed when it takes longer than `seconds`."""
        if not await _until(lambda: self.pid is None, seconds):
            await self.end()
            raise ConfigurationError(f"{self.name} did not end within {seconds:.0f} s.")
        return self._process.returncode if self._process else 0

    async def end(self) -> None:
        """SIGTERM, then SIGKILL for the whole session."""
        if self._process is not None and self.pid is not None:
            self._process.terminate()
            await _until(lambda: self.pid is None, self._patience)
        self.kill()
        await _until(lambda: self.pid is None, KILLED_SECONDS)

    def kill(self) -> None:
        """SIGKILL for the process and the children that share its group."""
        if self._group is not None:
            with contextlib.suppress(ProcessLookupError):  # nobody is left
                os.killpg(self._group, signal.SIGKILL)
            if self.pid is None:
                self._group = None  # the number may be given to somebody else now


class Server(Part):
    """An embedded server. Its calls wait for it, so they run in a thread, one at a time."""

    def __init__(self, server: EmbeddedPostgres | EmbeddedValkey, say: Say) -> None:
        self.name = server.name
        self._server = server
        self._say = say
        self._turn = asyncio.Lock()
        self._tail: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start it, on the port it had before."""
        await asyncio.shield(asyncio.create_task(self._start()))  # a thread cannot be cancelled: `end` waits for it
        if self._tail is None:
            self._tail = asyncio.create_task(_follow(self._server.log, lambda line: self._say(self.name, line)))

    @property
    def pid(self) -> int | None:
        """Its process, while it runs."""
        return self._server.pid if self._server.is_running else None

    async def ended(self) -> str:
        """Wait until it has ended."""
        await _until(lambda: not self._server.is_running and not self._turn.locked())
        return f"see {self._server.log}"

    async def end(self) -> None:
        """A fast shutdown with nothing lost; bounded by the embedded server itself."""
        async with self._turn:
            await asyncio.to_thread(self._server.stop)
        if self._tail is not None:
            self._tail.cancel()
            self._tail = None

    def kill(self) -> None:
        """SIGKILL; whoever waits in `start` or `end` cleans up behind it."""
        pid = self.pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    async def _start(self) -> None:
        async with self._turn:
            await asyncio.to_thread(self._server.start)


class Supervisor:
    """The parts, in the order in which they were started."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._parts: list[Part] = []
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self, *parts: Part) -> None:
        """Start these side by side and keep them running from now on."""
        self._parts.extend(parts)  # first, so that a start that is interrupted is ended too
        await asyncio.gather(*(part.start() for part in parts))
        self._keepers.extend(asyncio.create_task(self._keep(part)) for part in parts)

    async def failed(self) -> None:
        """Wait for ever, or raise what a keeper should never have raised."""
        await asyncio.gather(*self._keepers)

    async def end(self) -> None:
        """End all of them, the last one that was started first."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)  # `failed` has raised what was not a cancellation
        for part in reversed(self._parts):
            try:
                await part.end()
            except ConfigurationError as exc:  # the others have to end too
                self._board.say(part.name, exc.detail)

    def kill(self) -> None:
        """End all of them now; `end` still has to be waited for."""
        for part in reversed(self._parts):
            part.kill()

    async def _keep(self, part: Part) -> None:
        pause = PAUSE_SECONDS_MIN
        while True:
            started = time.monotonic()
            how = await part.ended()
            if time.monotonic() - started > STEADY_SECONDS:
                pause = PAUSE_SECONDS_MIN
            self._board.say(part.name, f"ended ({how}); it is started again in {pause:.1f} s")
            await asyncio.sleep(pause)
            pause = await self._start_again(part, min(2 * pause, PAUSE_SECONDS_MAX))

    async def _start_again(self, part: Part, pause: float) -> float:
        """Try until it works; returns the pause before its next death's start."""
        while True:
            try:
                await part.start()
            except (ConfigurationError, OSError) as exc:
                self._board.say(part.name, f"could not be started, next try in {pause:.1f} s: {exc}")
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSE_SECONDS_MAX)
            else:
                return pause


async def _until(condition: Callable[[], bool], seconds: float = math.inf) -> bool:
    """Wait until it is so; False if it is not so within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(LOOK_SECONDS)
    return True


class _Lines:
    """Reads a pipe and hands on whole lines; a longer one than `LINE_BYTES_MAX` in pieces."""

    def __init__(self, descriptor: int, hand_on: Callable[[str], None]) -> None:
        self._descriptor = descriptor
        self._hand_on = hand_on
        self._rest = b""
        os.set_blocking(descriptor, False)
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    def _read(self) -> None:
        data = os.read(self._descriptor, LINE_BYTES_MAX)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) >= LINE_BYTES_MAX:
            lines.append(self._rest)
            self._rest = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
        for line in lines:
            _hand_on_line(line, self._hand_on)


async def _follow(log: Path, hand_on: Callable[[str], None]) -> None:
    """Hand on what is added to a file from now on."""
    growth = _Growth(log)
    while True:
        for line in growth.lines():
            _hand_on_line(line, hand_on)
        await asyncio.sleep(LOOK_SECONDS * 2)


class _Growth:
    """What is new in a file since the last look; begins anew when a smaller file has taken its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size
        self._rest = b""

    def lines(self) -> list[bytes]:
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:  # put aside a moment ago, and the next one is not there yet
            return []
        if size == self._position:
            return []
        with self._path.open("rb") as file:
            file.seek(self._position if size > self._position else 0)
            data = file.read(LINE_BYTES_MAX)
            self._position = file.tell()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines


def _hand_on_line(line: bytes, hand_on: Callable[[str], None]) -> None:
    text = line.decode(errors="replace").rstrip()
    if text:
        hand_on(text)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
