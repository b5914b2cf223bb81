"""Ended sign-ins: heard of by every process, refused rather than guessed, and forgotten in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis import Redis

from worker import ended, keys
from worker.embedded import EmbeddedValkey
from worker.ended import EndedSignIns
from worker.errors import RedisUnavailable
from worker.redis import connect
from worker.settings import Settings

EMPTIED = True
pytestmark = pytest.mark.anyio


class Process:
    """One API process, as far as this goes."""

    def __init__(self, known: EndedSignIns, heard: list[str]) -> None:
        self.known, self.heard = known, heard

    async def hears(self, sign_in: str) -> None:
        async with asyncio.timeout(10):
            while not self.known.knows(sign_in):
                await asyncio.sleep(0.01)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def process(settings: Settings, clock: Clock | None = None, *, start: bool = True) -> AsyncIterator[Process]:
    client, heard = connect(settings), list[str]()
    known = EndedSignIns(client, settings, heard.append, **({"clock": clock} if clock else {}))
    if start:
        await known.start()
    yield Process(known, heard)
    await known.close()
    await client.aclose()


async def test_every_process_hears_of_it_once(settings: Settings) -> None:
    async with process(settings) as one, process(settings) as two:
        await one.known.end("a")
        assert await one.known.has_ended("a")
        assert not await one.known.has_ended("b")
        await two.hears("a")
        two.known.note(["b", "a"])
        await one.hears("b")
        async with process(settings) as late:
            assert await late.known.has_ended("a")
            assert await late.known.has_ended("b")
        assert (sorted(one.heard), sorted(two.heard)) == (["a", "b"], ["a", "b"])


async def test_process_that_has_not_looked_looks_before_it_answers(settings: Settings) -> None:
    async with process(settings, start=False) as one, process(settings, start=False) as two:
        assert not await two.known.has_ended("a")
        await one.known.end("a")
        two.known._looked_at -= ended.STALE_SECONDS + 1
        assert await two.known.has_ended("a")


async def test_without_redis_nothing_is_guessed(settings: Settings, valkey: EmbeddedValkey) -> None:
    async with process(settings) as one:
        await one.known.end("a")
        valkey.kill()
        async with one.known._looking:  # a look that was under way has ended, and may have had its answer
            one.known._looked_at -= ended.STALE_SECONDS + 1
        with pytest.raises(RedisUnavailable):
            await one.known.has_ended("b")
        assert await one.known.has_ended("a"), "this much is known"
        with pytest.raises(RedisUnavailable):
            await one.known.end("c")
        valkey.start()
        async with process(settings) as two:
            await two.hears("c")


async def test_redis_that_has_lost_it_is_told_again(settings: Settings, redis: Redis) -> None:
    async with process(settings) as one:
        await one.known.end("a")
        redis.flushall()
        async with process(settings) as two:
            await two.hears("a")
            redis.flushall()
            redis.xadd(keys.ENDED, {"i": "b"}, id="1-1")  # by somebody else, on a clock that was set back
            await one.hears("b")


async def test_it_is_forgotten_when_no_token_can_be_good(settings: Settings, redis: Redis) -> None:
    clock = Clock()
    async with process(settings, clock, start=False) as one:
        await one.known.end("a")
        lifetime = settings.access_token_seconds + ended.MARGIN_SECONDS
        assert lifetime < redis.ttl(keys.ENDED) <= lifetime + ended.MARGIN_SECONDS
        clock.now += lifetime + 1
        redis.delete(keys.ENDED)
        assert not await one.known.has_ended("b")
        assert not one.known.knows("a")
        assert redis.exists(keys.ENDED) == 0, "and nobody tells it again"


async def test_more_than_one_answer_holds(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended, "_COUNT", 3)
    async with process(settings, start=False) as one, process(settings, start=False) as two:
        for number in range(10):
            await one.known.end(str(number))
        assert await two.known.has_ended("9")
        assert two.heard == [str(number) for number in range(10)]
