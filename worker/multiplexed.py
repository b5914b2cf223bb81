"""One connection to Redis that many callers share.

With a pool, every call takes a connection, packs, sends, waits for and parses by itself: 70 µs of CPU an append, of 97 for the append as a
whole. Here the commands of a turn of the event loop leave in one write, the answers come back in the same order, and hiredis does both
packing and parsing: 12 µs. Redis runs scripts one at a time anyway, so nobody waits for longer than in a queue of its own. What is sent
again and again is packed once (`Packed`): of the 31 arguments of an append, the 13 keys.

redis-py opens the connection (address, TLS, password, and the look at the server's settings) and hands over its transport.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Self, cast

import hiredis
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

Argument = str | bytes | int | float
Command = tuple[Argument, ...]
Answered = Callable[[Any], None]
"""Is called with the answer, or with the exception that came instead of it."""
_MORE = object()


def pack(arguments: Iterable[Argument]) -> bytes:
    """Arguments as they go over the wire, without what comes before them there: how many a command has."""
    command = pack_command(tuple(arguments))
    return command[command.index(b"\n") + 1 :]


def pack_command(command: Command) -> bytes:
    """A command as it goes over the wire."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub says a tuple of one
    return packed


class Packed(tuple[Argument, ...]):
    """Arguments that are packed once: for what is sent again and again."""

    wire: bytes

    def __new__(cls, arguments: Iterable[Argument]) -> Self:
        """Packs them."""
        made = super().__new__(cls, arguments)
        made.wire = pack(made)
        return made


class PackedCommands(tuple[Command, ...]):
    """The same for whole commands."""

    wire: bytes

    def __new__(cls, commands: Iterable[Command]) -> Self:
        """Packs them."""
        made = super().__new__(cls, commands)
        made.wire = b"".join(map(pack_command, made))
        return made


class Multiplexed(asyncio.Protocol):
    """The connection; `open` makes one. Once `lost`, it stays so, and every caller who waited has been told."""

    def __init__(self, connection: Any, transport: asyncio.Transport) -> None:
        self._connection = connection  # redis-py closes the socket when nobody refers to it any more
        self._transport = transport
        self._reader = hiredis.Reader(replyError=ResponseError, notEnoughData=_MORE)
        self._waiting: deque[Answered] = deque()
        self._used_at = time.monotonic()
        self.lost = False

    @classmethod
    async def open(cls, client: Redis) -> Multiplexed:
        """A new one, like those of the client's pool; raises redis-py's errors, within the time-outs that the client was made with."""
        connection: Any = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        await connection.connect()
        transport = cast(asyncio.Transport, connection._writer.transport)
        made = cls(connection, transport)
        transport.set_protocol(made)
        if transport.is_closing():
            raise RedisConnectionError("closed at once")
        return made

    @property
    def idle_seconds(self) -> float:
        """How long nothing has been sent."""
        return time.monotonic() - self._used_at

    def send(self, commands: bytes, answered: Iterable[Answered]) -> None:
        """Sends packed commands in one write. For each there is one `answered`, which is called once, whatever happens."""
        self._waiting.extend(answered)
        self._used_at = time.monotonic()
        if self.lost or self._transport.is_closing():  # uvloop raises RuntimeError where asyncio would only drop what is written
            self._fail()
        else:
            self._transport.write(commands)

    async def ping(self, seconds: float) -> bool:
        """Whether the server answers in time. One that was cut off silently is then noticed before a write is on its way."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.send(pack_command(("PING",)), [lambda value: None if answer.done() else answer.set_result(value)])
        try:
            async with asyncio.timeout(seconds):
                return bool(await answer == b"PONG")
        except TimeoutError:
            return False

    def abort(self) -> None:
        """Drops the connection: whoever waits is told that the outcome is unknown."""
        self._transport.abort()
        self._fail()

    # What asyncio calls

    def data_received(self, data: bytes) -> None:
        """Gives each answer to whom it belongs."""
        try:
            self._reader.feed(data)
            while (answer := self._reader.gets()) is not _MORE:
                self._waiting.popleft()(answer)
        except (hiredis.ProtocolError, IndexError):  # no answer that was asked for: nothing after it can be told apart
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The server, or the network, has ended it."""
        self._fail()

    def _fail(self) -> None:
        self.lost = True
        self._connection._close()
        while self._waiting:
            self._waiting.popleft()(RedisConnectionError("the connection was lost before the answer"))
