"""A message from append to trim, on real stores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import sqlalchemy as sa

from tests import core
from worker import keys, pending
from worker.database import dispose, transaction
from worker.flush import flush_shard
from worker.pending import PendingLog, client_key
from worker.redis import connect, connect_sync
from worker.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture
def redis(settings: Settings) -> Iterator[object]:
    client = connect_sync(settings)
    yield client
    client.close()
    dispose()


@pytest.fixture
async def log(settings: Settings) -> AsyncIterator[PendingLog]:
    client = connect(settings)
    made = PendingLog(client, settings, wake=lambda shard: None)
    await made.start()
    yield made
    await made.close()
    await client.aclose()


async def test_a_message_lives_through_all_of_it(settings, redis, log) -> None:
    user = core.make_user()
    shard = keys.shard_of_user(user, settings.shards)
    created = await log.create(user, None, key=client_key("c1"))
    assert (await log.create(user, None, key=client_key("c1"))).conversation == created.conversation
    conversation = created.conversation.id
    first = await log.append(user, conversation, "user", "Hello\\ there\n\tworld  ", key=client_key("a"))
    again = await log.append(user, conversation, "user", "Hello\\ there\n\tworld  ", key=client_key("a"))
    assert again.replayed and again.message == first.message
    second = await log.append(user, conversation, "assistant", "Hi!")
    assert second.message.id > first.message.id
    page = await log.read(user, conversation, "before", None, 10)
    assert page and [m.id for m in page.messages] == [second.message.id, first.message.id]
    assert page.conversation.title == "Hello\\ there world"
    report = flush_shard(redis, settings, shard)
    assert report.entries == 3 and report.messages == 2 and not report.dead_letters
    with transaction(seconds=5) as connection:
        rows = connection.execute(sa.text("SELECT id, content FROM message ORDER BY id")).all()
        title = connection.execute(sa.text("SELECT title FROM conversation")).scalar_one()
    assert [tuple(row) for row in rows] == [(first.message.id, "Hello\\ there\n\tworld  "), (second.message.id, "Hi!")]
    assert title == "Hello\\ there world"
    assert pending.backlog(redis, settings.shards)[shard].entries == 0
    assert pending.backlog(redis, settings.shards)[shard].bytes == 0
    page2 = await log.read(user, conversation, "before", None, 10)
    assert page2 and page2.messages == page.messages and page2.committed >= second.message.id
    again = await log.append(user, conversation, "user", "Hello\\ there\n\tworld  ", key=client_key("a"))
    assert again.replayed and again.message == first.message
    redis.flushall()
    again = await log.append(user, conversation, "user", "Hello\\ there\n\tworld  ", key=client_key("a"))
    assert again.replayed and again.message == first.message
    assert (await log.create(user, None, key=client_key("c1"))).conversation == created.conversation
    third = await log.append(user, conversation, "user", "more")
    assert third.message.id > second.message.id
    await log.rename(user, conversation, "Named")
    await log.delete(user, conversation)
    flush_shard(redis, settings, shard)
    with transaction(seconds=5) as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM message")).scalar_one() == 0
        assert connection.execute(sa.text("SELECT count(*) FROM dead_letter")).scalar_one() == 0
