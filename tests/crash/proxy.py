"""A TCP link that can be cut: in one direction or both, with or without a word, before or after what was asked for is done.

Every process of the nemesis reaches every store through one of these, so that a fault hits one link and no other. What a link does with
a piece of data is decided when it arrives, so a mode holds for old connections as for new ones.

| mode | what happens |
| --- | --- |
| pass | everything goes through |
| refuse | new connections are refused, old ones reset |
| reset | every connection is reset, new ones as soon as they are accepted |
| silent | nothing goes through, and nobody is told; what was on its way arrives when the mode ends |
| silent-requests, silent-replies | the same in one direction |
| lose-requests, lose-replies | now and then a piece is swallowed and its connection reset: before, or after, it was done |
| slow | every piece is late |
| slice | everything arrives in pieces of a few bytes |
| flap | all connections are reset every 300 ms |
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from worker.embedded import free_port

Direction = Literal["requests", "replies"]
MODES = (
    *("pass", "refuse", "reset", "silent", "silent-requests", "silent-replies"),
    *("lose-requests", "lose-replies", "slow", "slice", "flap"),
)
FLAP_SECONDS = 0.3
_CHUNK = 1 << 16


@dataclass(slots=True, eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def reset(self) -> None:
        """Ends both sides with an RST."""
        for writer in (self.client, self.server):
            _reset(writer)
        for task in self.tasks:
            task.cancel()


class Link:
    """One link. `upstream` says where the store listens now."""

    def __init__(self, name: str, upstream: Callable[[], int], chance: random.Random) -> None:
        self.name = name
        self.port = 0
        self.mode = "pass"
        self.loss = 0.1
        """How often `lose-*` strikes."""
        self.delay = 0.2
        self.lost = 0
        """How many pieces were swallowed."""
        self.lose_next = 0
        """With a `lose-*` mode: so many are swallowed for certain, and then the mode ends."""
        self._upstream = upstream
        self._chance = chance
        self._connections: set[_Connection] = set()
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._refusing: socket.socket | None = None
        self._flapping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens on a port of its own, which it keeps."""
        self.port = free_port()
        await self._listen()

    async def close(self) -> None:
        """Ends everything."""
        await self.set("reset")
        if self._server is not None:
            self._server.close()

    async def set(self, mode: str) -> None:
        """Changes the mode, for old connections too."""
        assert mode in MODES, mode
        before, self.mode = self.mode, mode
        self._changed.set()
        self._changed = asyncio.Event()
        if self._flapping is not None:
            self._flapping.cancel()
            self._flapping = None
        if mode == "refuse":
            await _insist(self._refuse)
        elif before == "refuse":
            await _insist(self._listen)
        if mode in ("refuse", "reset"):
            self.reset()
        elif mode == "flap":
            self._flapping = asyncio.create_task(self._flap())

    def reset(self) -> None:
        """Resets every connection."""
        for connection in list(self._connections):
            connection.reset()

    async def _listen(self) -> None:
        if self._refusing is not None:
            self._refusing.close()
            self._refusing = None
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=_CHUNK, reuse_address=True)

    async def _refuse(self) -> None:
        """A port that is bound, and not listened on, is refused and stays ours."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._refusing is None:
            holder = socket.socket()
            try:
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                holder.bind(("127.0.0.1", self.port))
            except OSError:
                holder.close()
                raise
            self._refusing = holder

    async def _flap(self) -> None:
        while True:
            self.reset()
            await asyncio.sleep(FLAP_SECONDS)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "reset":
            _reset(writer)
            return
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._upstream(), limit=_CHUNK)
        except OSError:  # the store is not there: neither is what listens for it
            _reset(writer)
            return
        connection = _Connection(writer, server_writer)
        self._connections.add(connection)
        connection.tasks = [
            asyncio.create_task(self._pump("requests", reader, server_writer, connection)),
            asyncio.create_task(self._pump("replies", server_reader, writer, connection)),
        ]
        try:
            await asyncio.wait(connection.tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            connection.reset()
            self._connections.discard(connection)

    async def _pump(
        self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection
    ) -> None:
        with contextlib.suppress(OSError):  # the other side is gone
            while data := await reader.read(_CHUNK):
                if not await self._pass(direction, data, writer):
                    return

    async def _pass(self, direction: Direction, data: bytes, writer: asyncio.StreamWriter) -> bool:
        """Hands a piece on; False if the connection is over."""
        while self.mode in ("silent", f"silent-{direction}"):
            await self._changed.wait()
        if self.mode == f"lose-{direction}" and (self.lose_next or self._chance.random() < self.loss):
            await self._swallow()
            return False
        if self.mode == "slow":
            await asyncio.sleep(self.delay * self._chance.uniform(0.2, 1.8))
        if self.mode == "slice" and len(data) < 4096:
            for at in range(0, len(data), 7):
                if writer.is_closing():  # reset meanwhile
                    return False
                writer.write(data[at : at + 7])
                await asyncio.sleep(0.001)
        else:
            writer.write(data)
        await writer.drain()
        return True

    async def _swallow(self) -> None:
        self.lost += 1
        if self.lose_next:
            self.lose_next -= 1
            if not self.lose_next:
                await self.set("pass")


async def _insist(take_port: Callable[[], Awaitable[None]]) -> None:
    """On a busy machine what was closed a moment ago may still hold the port."""
    for _ in range(100):
        try:
            return await take_port()
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            await asyncio.sleep(0.05)
    return await take_port()


def _reset(writer: asyncio.StreamWriter) -> None:
    """An RST instead of a FIN: what was on its way is gone."""
    held = writer.get_extra_info("socket")
    if held is not None and not writer.is_closing():
        with contextlib.suppress(OSError):
            held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
