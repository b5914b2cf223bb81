"""Database work off the event loop: whoever waits gets the answer, an error, or is told in time; and what nobody waits for is not begun."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from worker.errors import NotFound, PostgresUnavailable
from worker.threads import DatabaseThreads

pytestmark = pytest.mark.anyio


class Work:
    """Something that lasts until it may end."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        self.may_end.wait(10)
        return "done"


@pytest.fixture
def works() -> Iterator[tuple[Work, Work]]:
    made = Work(), Work()
    yield made
    for work in made:
        work.may_end.set()


async def begun(work: Work) -> None:
    async with asyncio.timeout(5):
        while not work.begun.is_set():
            await asyncio.sleep(0.001)


async def test_answers_and_errors_come_back() -> None:
    threads = DatabaseThreads(2, 5)
    assert await asyncio.gather(*(threads.run(lambda n=n: n * n) for n in range(50))) == [n * n for n in range(50)]

    def fails() -> None:
        raise NotFound()

    with pytest.raises(NotFound):
        await threads.run(fails)
    threads.close()


async def test_no_more_at_once_than_there_are_threads() -> None:
    threads, running, most, lock = DatabaseThreads(3, 5), 0, 0, threading.Lock()

    def count() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1

    await asyncio.gather(*(threads.run(count) for _ in range(30)))
    assert most <= 3
    threads.close()


async def test_who_waits_for_a_thread_is_told_in_time_and_his_work_is_not_begun(works: tuple[Work, Work]) -> None:
    hangs, waits = works
    threads = DatabaseThreads(1, 0.2)
    first = asyncio.create_task(threads.run(hangs))
    await begun(hangs)
    started = time.monotonic()
    with pytest.raises(PostgresUnavailable):
        await threads.run(waits)
    assert time.monotonic() - started < 2
    with pytest.raises(PostgresUnavailable):
        await first
    hangs.may_end.set()
    assert await threads.run(lambda: "next") == "next"
    assert not waits.begun.is_set()
    threads.close()


async def test_what_a_caller_has_given_up_is_not_begun(works: tuple[Work, Work]) -> None:
    runs, waits = works
    threads = DatabaseThreads(1, 5)
    first = asyncio.create_task(threads.run(runs))
    await begun(runs)
    second = asyncio.create_task(threads.run(waits))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    runs.may_end.set()
    assert await first == "done"
    assert await threads.run(lambda: "next") == "next"
    assert not waits.begun.is_set()
    threads.close()


async def test_closing_tells_who_waits_and_lets_running_work_end(works: tuple[Work, Work]) -> None:
    runs, waits = works
    threads = DatabaseThreads(1, 5)
    first, second = asyncio.create_task(threads.run(runs)), asyncio.create_task(threads.run(waits))
    await begun(runs)
    threads.close()
    with pytest.raises(PostgresUnavailable):
        await second
    runs.may_end.set()
    assert await first == "done"
