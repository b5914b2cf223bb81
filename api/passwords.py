"""Passwords: argon2id, off the event loop, a bounded number at a time."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher

from worker.errors import TryAgainLater

MEMORY_KIB = 19 * 1024
ITERATIONS = 2
"""OWASP's figures for argon2id with one lane: about 20 ms, and 19 MiB for each that runs at once."""
WAIT_SECONDS = 1.5

T = TypeVar("T")


class Busy(TryAgainLater):
    """Too many people are signing in at once; try again in a moment."""


class Passwords:
    """Hashes and verifies; `start` before use, `close` after."""

    def __init__(self, threads: int | None = None, wait_seconds: float = WAIT_SECONDS) -> None:
        count = threads or min(4, os.cpu_count() or 1)
        self._hasher = PasswordHash((Argon2Hasher(time_cost=ITERATIONS, memory_cost=MEMORY_KIB, parallelism=1),))
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="passwords")
        self._free = asyncio.Semaphore(count)
        self._wait_seconds = wait_seconds
        self._decoy = ""

    async def start(self) -> None:
        """Makes the hash that the password of an unknown user is compared with."""
        self._decoy = await self.hash(secrets.token_urlsafe(32))

    def close(self) -> None:
        """Takes no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def hash(self, password: str) -> str:
        """Raises `Busy` when too many are waiting."""
        return await self._run(lambda: self._hasher.hash(password))

    async def verify(self, password: str, stored: str | None) -> bool:
        """Whether this is the password; without a stored hash it takes the same time to say no. Raises `Busy`."""
        compared = stored or self._decoy
        return await self._run(lambda: self._hasher.verify(password.encode("utf-8", "surrogatepass"), compared)) and stored is not None

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._free.acquire()
        except TimeoutError as exc:
            raise Busy() from exc
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        future.add_done_callback(lambda _: self._free.release())  # also when the caller was cancelled: the thread is still at work
        return await asyncio.shield(future)
