"""A small HTTP client that says how much of a call can have happened. One connection, one call at a time.

`NotSent`: the request cannot have reached the server. Anything else that goes wrong is `Lost`: it may have, and may still.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import orjson


class NotSent(Exception):
    """Nobody listens: nothing was sent."""


class Lost(Exception):
    """No whole answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return orjson.loads(self.body)


class Client:
    """Calls one server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def call(self, method: str, path: str, *, body: bytes = b"", headers: dict[str, str] | None = None, seconds: float) -> Answer:
        """One request; the connection is kept if the server keeps it."""
        try:
            async with asyncio.timeout(seconds):
                return await self._call(method, path, body, headers or {})
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError, asyncio.LimitOverrunError) as exc:
            self.close()
            raise Lost(type(exc).__name__) from exc
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drops the connection."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = self._reader = None

    async def _call(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        if self._reader is not None and self._reader.at_eof():
            self.close()
        if self._writer is None:
            try:
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
            except OSError as exc:
                raise NotSent from exc
        assert self._reader is not None
        lines = [f"{method} {path} HTTP/1.1", "Host: chatkeep", *(f"{name}: {value}" for name, value in headers.items())]
        if body:
            lines += [f"Content-Length: {len(body)}"]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self._writer.drain()
        return await self._answer(self._reader)

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(head[0].split(" ")[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readexactly(2)
        else:
            body = await reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self.close()
        return Answer(status, headers, body)


async def ask(port: int, path: str, seconds: float = 3.0) -> Answer | None:
    """One GET; None if there is no answer."""
    client = Client(port)
    with contextlib.suppress(NotSent, Lost):
        return await client.call("GET", path, seconds=seconds)
    client.close()
    return None
