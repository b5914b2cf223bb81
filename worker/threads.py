"""Runs synchronous database work for the API off its event loop, a bounded number at a time.

Starlette's own pool of 40 threads is shared with everything else; psycopg2 calls that hang on a frozen Postgres would starve it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from worker.errors import PostgresUnavailable

T = TypeVar("T")
_MARGIN_SECONDS = 0.05
"""Work that ends by its own deadline says more about why."""


class DatabaseThreads:
    """As many threads as the pool has connections; a call that finds none free waits a bounded time."""

    def __init__(self, threads: int, wait_seconds: float) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="postgres")
        self._wait_seconds = wait_seconds

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work`, which bounds itself (`worker.database.transaction`); raises `PostgresUnavailable` if it is not done in time.

        The time includes the wait for a thread, so that behind eight that hang nobody waits twice as long. What no thread has begun when
        its caller gives up is never begun.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        # By hand, because a read waits for each turn of the event loop that `asyncio.timeout`, `shield` and `run_in_executor` take.
        job = self._executor.submit(work)
        timer = loop.call_later(self._wait_seconds + _MARGIN_SECONDS, _settle, answer, None)
        job.add_done_callback(partial(_hand_over, loop, answer))
        try:
            return await answer
        finally:
            timer.cancel()
            job.cancel()

    def close(self) -> None:
        """Lets running work end by itself (it is bounded) and takes no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _hand_over(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Any], job: Future[Any]) -> None:
    """In the thread that has done it."""
    with suppress(RuntimeError):  # the event loop was closed meanwhile, so nobody waits
        loop.call_soon_threadsafe(_settle, answer, job)


def _settle(answer: asyncio.Future[Any], job: Future[Any] | None) -> None:
    """Without a job: time is over."""
    if answer.done():  # the caller gave up
        return
    if job is None or job.cancelled():
        answer.set_exception(PostgresUnavailable("The database is too busy; try again in a few seconds."))
    elif (failure := job.exception()) is not None:
        answer.set_exception(failure)
    else:
        answer.set_result(job.result())
