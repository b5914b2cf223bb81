"""One user who fills the backlog is refused; the others are not, and what was refused was not stored."""

from __future__ import annotations

import pytest
from redis import Redis

from tests import core
from worker import keys
from worker.errors import UserBacklogFull
from worker.flush import flush_shard
from worker.pending import PendingLog
from worker.settings import Settings

pytestmark = pytest.mark.anyio

LIMIT = 20_000


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"pending_bytes_per_user_max": LIMIT, "shards": 1})


async def test_only_the_one_who_has_his_share(settings: Settings, redis: Redis, log: PendingLog) -> None:
    greedy, modest = core.make_user(), core.make_user()
    theirs = (await log.create(greedy, None)).conversation.id
    other = (await log.create(modest, None)).conversation.id
    stored = 0

    async def fill() -> None:
        nonlocal stored
        for _ in range(100):
            await log.append(greedy, theirs, "user", "x" * 1000)
            stored += 1

    with pytest.raises(UserBacklogFull):
        await fill()
    assert 10 <= stored < 20
    await log.append(modest, other, "user", "hello")
    assert redis.hlen(keys.users(0)) == 2
    flush_shard(redis, settings, 0)
    assert redis.exists(keys.users(0)) == 0
    assert len(core.contents(theirs)) == stored
    await log.append(greedy, theirs, "user", "x" * 1000)


async def test_a_trim_of_a_part_gives_back_that_part(
    settings: Settings, redis: Redis, log: PendingLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = core.make_user()
    conversation = (await log.create(user, None)).conversation.id
    await log.append(user, conversation, "user", "one")
    one_more = settings.model_copy(update={"flush_batch_max": 2})
    before = int(redis.hget(keys.users(0), str(user)) or 0)
    await log.append(user, conversation, "user", "two")
    both = int(redis.hget(keys.users(0), str(user)) or 0)
    monkeypatch.setattr("worker.flush.FLUSH_LOOP_SECONDS", 0.0)  # one batch
    assert flush_shard(redis, one_more, 0).entries == 2
    assert int(redis.hget(keys.users(0), str(user)) or 0) == both - before == int(redis.get(keys.backlog_bytes(0)) or 0)
