"""Runs synchronous database work for the API off its event loop, a bounded number at a time.

Starlette's own pool of 40 threads is shared with everything else; psycopg2 calls that hang on a frozen Postgres would starve it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from worker.errors import PostgresUnavailable

T = TypeVar("T")
_MARGIN_SECONDS = 0.05
"""Work that ends by its own deadline says more about why."""


class DatabaseThreads:
    """As many threads as the pool has connections; a call that finds none free waits a bounded time."""

    def __init__(self, threads: int, wait_seconds: float) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="postgres")
        self._free = asyncio.Semaphore(threads)
        self._wait_seconds = wait_seconds

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work`, which bounds itself (`worker.database.transaction`); raises `PostgresUnavailable` if it is not done in time.

        The time includes the wait for a thread, so that behind eight that hang nobody waits twice as long.
        """
        try:
            async with asyncio.timeout(self._wait_seconds + _MARGIN_SECONDS):
                await self._free.acquire()
                future = asyncio.get_running_loop().run_in_executor(self._executor, work)
                future.add_done_callback(lambda _: self._free.release())  # also when the caller was cancelled: the thread is still at work
                return await asyncio.shield(future)
        except TimeoutError as exc:
            raise PostgresUnavailable("The database is too busy; try again in a few seconds.") from exc

    def close(self) -> None:
        """Lets running work end by itself (it is bounded) and takes no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)
