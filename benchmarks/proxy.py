"""A TCP proxy that makes the way to a server longer, and counts what goes over it.

`delay_seconds` is added to each direction, so a round trip takes twice that: the network between two regions on one machine. A *flight* is
what a client sends before the server answers: the number of flights is the number of round trips, whatever was in each of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Self

_CHUNK = 1 << 18
_START_SECONDS = 10.0


class Proxy:
    """Listens on a port of its own, in a thread of its own, as long as the `with` block runs."""

    def __init__(self, target_port: int, delay_seconds: float = 0.0) -> None:
        self.delay_seconds = delay_seconds
        self.flights = self.bytes_up = self.bytes_down = 0
        self.port = 0
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(_START_SECONDS):
            raise RuntimeError("the proxy did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_SECONDS)

    def reset(self) -> None:
        """Counts from zero again."""
        self.flights = self.bytes_up = self.bytes_down = 0

    def _run(self) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(self._hang_up())
        self._loop.close()

    @staticmethod
    async def _hang_up() -> None:
        lines = asyncio.all_tasks() - {asyncio.current_task()}
        for line in lines:
            line.cancel()
        await asyncio.gather(*lines, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:  # the server is away: so are we
            writer.close()
            return
        for one in (writer, up_writer):
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = _Line(self)
        with contextlib.suppress(asyncio.CancelledError):  # the end; asyncio's own callback would report it as an error
            await asyncio.gather(self._pump(reader, up_writer, line.up), self._pump(up_reader, writer, line.down))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[int], None]) -> None:
        """One direction: what was read leaves `delay_seconds` later, in order."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sender = asyncio.get_running_loop().create_task(self._send(queue, writer))
        with contextlib.suppress(ConnectionError):  # one side hung up; the other is told below
            while data := await reader.read(_CHUNK):
                count(len(data))
                if not self.delay_seconds and queue.empty():
                    writer.write(data)
                else:
                    queue.put_nowait((time.monotonic() + self.delay_seconds, data))
        queue.put_nowait((time.monotonic() + self.delay_seconds, b""))
        await sender

    @staticmethod
    async def _send(queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due, data = await queue.get()
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            if not data:
                writer.close()
                return
            writer.write(data)


class _Line:
    """One connection: whose turn it is, to tell flights apart."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._client_speaks = False

    def up(self, size: int) -> None:
        if not self._client_speaks:
            self._proxy.flights += 1
        self._client_speaks = True
        self._proxy.bytes_up += size

    def down(self, size: int) -> None:
        self._client_speaks = False
        self._proxy.bytes_down += size
