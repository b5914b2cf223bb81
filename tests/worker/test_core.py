"""One message from append to trim, and everything that may happen to its conversation, in the order of a life."""

from __future__ import annotations

import pytest

from tests import core
from worker import backlog
from worker.flush import flush_shard
from worker.pending import client_key

pytestmark = pytest.mark.anyio
EMPTIED = True


async def test_a_message_lives_through_all_of_it(settings, redis, log, user, shard) -> None:
    created = await log.create(user, None, key=client_key("c1"))
    conversation = created.conversation.id
    first = await log.append(user, conversation, "user", "Hello\\ there\n\tworld  ", key=client_key("a"))
    second = await log.append(user, conversation, "assistant", "Hi!")
    page = await log.read(user, conversation, "before", None, 10)
    assert page
    assert tuple(page.messages) == (second.message, first.message)
    assert page.conversation.title == "Hello\\ there world"
    assert page.committed < first.message.id

    report = flush_shard(redis, settings, shard)
    assert (report.entries, report.messages, report.dead_letters) == (3, 2, 0)
    rows = core.ask("SELECT id, content FROM message ORDER BY id")
    assert rows == [(first.message.id, "Hello\\ there\n\tworld  "), (second.message.id, "Hi!")]
    assert core.ask("SELECT title FROM conversation") == [("Hello\\ there world",)]
    left = backlog.look(redis, settings.shards)[shard]
    assert (left.entries, left.bytes) == (0, 0)
    committed = await log.read(user, conversation, "before", None, 10)
    assert committed
    assert tuple(committed.messages) == tuple(page.messages)
    assert committed.committed >= second.message.id

    for emptied in (False, True):
        if emptied:
            redis.flushall()
        again = await log.append(user, conversation, "user", "Hello\\ there\n\tworld  ", key=client_key("a"))
        assert (again.replayed, again.message) == (True, first.message)
        assert (await log.create(user, None, key=client_key("c1"))).conversation == created.conversation
    third = await log.append(user, conversation, "user", "more")
    assert third.message.id > second.message.id
    await log.rename(user, conversation, "Named")
    await log.delete(user, conversation)
    flush_shard(redis, settings, shard)
    assert (core.contents(conversation), core.dead_letters()) == ([], [])
    core.assert_clean(redis, settings)
