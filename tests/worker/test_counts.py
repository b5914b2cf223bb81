"""A client that has run wild is stopped: messages a minute and conversations a day, counted where they are acknowledged."""

from __future__ import annotations

import pytest
from redis import Redis

from tests import core
from worker import keys
from worker.errors import TooManyConversations, TooManyMessages
from worker.pending import Draft, PendingLog, client_key, reply_key
from worker.settings import Settings

EMPTIED = True
pytestmark = pytest.mark.anyio

MESSAGES, CONVERSATIONS = 3, 2
DAY_MS = 86_400_000


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"messages_per_minute_max": MESSAGES, "conversations_per_day_max": CONVERSATIONS})


@pytest.fixture
def counters(user: int, shard: int) -> tuple[str, str]:
    return keys.messages_of_minute(shard, user), keys.conversations_of_day(shard, user)


async def say(log: PendingLog, user: int, conversation: int, count: int) -> None:
    for number in range(count):
        await log.append(user, conversation, "user", str(number))


async def test_messages_of_a_minute(log: PendingLog, redis: Redis, user: int, conversation: int, counters: tuple[str, str]) -> None:
    await say(log, user, conversation, MESSAGES)
    before = redis.info("commandstats")["cmdstat_xadd"]["calls"]
    with pytest.raises(TooManyMessages) as caught:
        await log.append(user, conversation, "user", "one too many")
    assert 55 <= caught.value.retry_after_seconds <= 60
    assert redis.info("commandstats")["cmdstat_xadd"]["calls"] == before, "before anything is stored"
    assert await core.shown(log, user, conversation) == ["0", "1", "2"]
    redis.pexpire(counters[0], 1)
    while redis.exists(counters[0]):
        pass
    await say(log, user, conversation, MESSAGES)


async def test_messages_that_come_together_count_each(
    log: PendingLog, redis: Redis, user: int, conversation: int, counters: tuple[str, str]
) -> None:
    pair = [Draft("user", "0"), Draft("user", "1")]
    for _ in range(2):
        await log.append_all(user, conversation, pair)  # the second call begins below the limit
    assert int(redis.get(counters[0]) or 0) == 4 == MESSAGES + 1
    assert 0 < redis.pttl(counters[0]) <= 60_000
    for call in (log.append_all(user, conversation, pair), log.append(user, conversation, "user", "x")):
        with pytest.raises(TooManyMessages):
            await call


async def test_conversations_of_a_day(log: PendingLog, redis: Redis, user: int, counters: tuple[str, str]) -> None:
    for _ in range(CONVERSATIONS):
        await log.create(user, None)
    with pytest.raises(TooManyConversations) as caught:
        await log.create(user, None)
    assert 86_390 <= caught.value.retry_after_seconds <= 86_400
    assert len(await log.changed(user)) == CONVERSATIONS
    redis.delete(counters[1])
    await log.create(user, None)


async def test_others_are_not_held_up(log: PendingLog, user: int, conversation: int) -> None:
    await say(log, user, conversation, MESSAGES)
    other = core.make_user()
    await say(log, other, (await log.create(other, None)).conversation.id, MESSAGES)


async def test_retry_is_answered_and_not_counted(
    log: PendingLog, redis: Redis, user: int, conversation: int, counters: tuple[str, str]
) -> None:
    made = await log.create(user, None, key=client_key("c"))
    first = await log.append(user, conversation, "user", "first", key=client_key("m"))
    await say(log, user, conversation, MESSAGES - 1)
    for _ in range(3):
        again = await log.append(user, conversation, "user", "first", key=client_key("m"))
        assert (again.message.id, again.replayed) == (first.message.id, True)
        assert (await log.create(user, None, key=client_key("c"))).conversation.id == made.conversation.id
    assert [redis.get(counter) for counter in counters] == [b"%d" % MESSAGES, b"%d" % CONVERSATIONS]


async def test_reply_is_never_refused(log: PendingLog, redis: Redis, user: int, conversation: int, counters: tuple[str, str]) -> None:
    asked = await log.append(user, conversation, "user", "question")
    await say(log, user, conversation, MESSAGES - 1)
    await log.append(user, conversation, "assistant", "answer", key=reply_key(asked.message.id), counted=False)
    assert redis.get(counters[0]) == b"%d" % MESSAGES


async def test_only_the_counters_expire(log: PendingLog, redis: Redis, user: int, conversation: int, counters: tuple[str, str]) -> None:
    await say(log, user, conversation, 2)
    messages, conversations = (redis.pttl(counter) for counter in counters)
    assert 50_000 < messages <= 60_000
    assert DAY_MS - 60_000 < conversations <= DAY_MS
    expiring = {name.decode() for name in redis.scan_iter(count=1000) if redis.pttl(name) >= 0}
    assert {name for name in expiring if not name.endswith(":wake")} == set(counters)


@pytest.mark.parametrize("left", [-1, 2 * DAY_MS], ids=["without expiry", "clock set back"])
async def test_counter_that_nobody_can_have_made_holds_nobody_up(
    log: PendingLog, redis: Redis, user: int, conversation: int, counters: tuple[str, str], left: int
) -> None:
    for counter in counters:
        redis.set(counter, 1_000_000, px=left if left > 0 else None)
    await say(log, user, conversation, 1)
    await log.create(user, None)
    assert [redis.get(counter) for counter in counters] == [b"1", b"1"]
    assert all(0 < redis.pttl(counter) <= DAY_MS for counter in counters)


async def test_without_limits_nothing_is_counted(settings: Settings, log: PendingLog, redis: Redis, user: int) -> None:
    settings.messages_per_minute_max = settings.conversations_per_day_max = 0
    conversation = (await log.create(user, None)).conversation.id
    await say(log, user, conversation, MESSAGES + 1)
    assert not list(redis.scan_iter("ck:*:mm:*")) + list(redis.scan_iter("ck:*:cd:*"))
