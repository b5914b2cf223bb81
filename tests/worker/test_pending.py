"""The log from the API's side: what an acknowledgement means, who may write what, and what Redis still knows afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import pytest

from api.history import list_conversations, read_conversation
from tests import core
from worker import backlog, flush, keys, loading, pending
from worker.codec import ENTRY_OVERHEAD_BYTES
from worker.database import dispose
from worker.errors import (
    BacklogFull,
    ConfigurationError,
    KeyReused,
    NotDurable,
    NotFound,
    PostgresUnavailable,
    RedisUnavailable,
    TooSlow,
    TurnRunning,
)
from worker.flush import flush_shard
from worker.pending import Draft, PendingLog, client_key, reply_key
from worker.redis import connect
from worker.settings import SHARD_SLOTS

pytestmark = pytest.mark.anyio
EMPTIED = True


class TestAppend:
    async def test_ids_rise_in_the_order_of_acknowledgement_and_name_their_shard(self, log, user, shard, conversation) -> None:
        ids = [(await log.append(user, conversation, "user", "x")).message.id for _ in range(20)]
        assert ids == sorted(set(ids))
        assert ids[0] > conversation
        assert {keys.shard_of_id(number) for number in (*ids, conversation)} == {shard}
        assert ids[-1] < 1 << 53

    async def test_many_at_once_are_all_kept_once(self, settings, redis, log, user, shard, conversation) -> None:
        done = await asyncio.gather(*(log.append(user, conversation, "user", str(i)) for i in range(300)))
        by_id = [message for _, message in sorted((one.message.id, core.text(one.message.body)) for one in done)]
        assert await core.shown(log, user, conversation, limit=400) == by_id
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == by_id
        core.assert_clean(redis, settings)

    async def test_the_time_is_the_servers_and_the_text_comes_back_exactly(self, settings, redis, log, user, shard, conversation) -> None:
        nasty = [
            "\\N",
            "\\",
            "a\tb\nc\rd\\t",
            "\u2028\u0085\ufeff",
            "\x01\x7f\x1b[0m",
            "𝔘 👩‍👩‍👧 e\u0301",
            "\\.",
            "' OR 1=1 --",
            '{"a":"\\u0000"}',
            "%s {} $1",
            'NULL"',
            "null",
            "NULL",
            '{"a\\",b,}',
        ]
        before = time.time() * 1e6
        stored = [(await log.append(user, conversation, "assistant", content)).message for content in nasty]
        assert all(before - 2e6 < message.microseconds < time.time() * 1e6 + 2e6 for message in stored)
        assert await core.shown(log, user, conversation) == nasty
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == nasty
        core.forget(redis, user, conversation, settings)
        await log.append(user, conversation, "user", "load it")
        page = await log.read(user, conversation, "after", 0, 100)
        assert page
        assert tuple(page.messages)[:-1] == tuple(stored)

    async def test_one_retry_key_is_one_message_with_one_answer(self, redis, log, user, conversation, shard) -> None:
        first = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        again = await asyncio.gather(*(log.append(user, conversation, "user", "hi", key=client_key("a")) for _ in range(20)))
        assert all(one.replayed and one.message == first.message for one in again)
        assert redis.xlen(keys.log(shard)) == 2

    @pytest.mark.parametrize("other", [("user", "ho", "complete"), ("assistant", "hi", "complete"), ("user", "hi", "incomplete")])
    async def test_a_key_with_another_body_is_refused(self, log, user, conversation, other) -> None:
        await log.append(user, conversation, "user", "hi", key=client_key("a"))
        with pytest.raises(KeyReused):
            await log.append(user, conversation, other[0], other[1], status=other[2], key=client_key("a"))

    async def test_keys_of_users_and_conversations_and_replies_never_meet(self, settings, log, user, conversation) -> None:
        [*_, stranger] = (core.make_user() for _ in range(settings.shards))  # of the same shard
        theirs = (await log.create(stranger, None, key=client_key("a"))).conversation.id
        second = (await log.create(user, None, key=client_key("a"))).conversation.id
        assert len({theirs, second, conversation}) == 3
        first = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        others = [
            await log.append(user, second, "user", "hi", key=client_key("a")),
            await log.append(stranger, theirs, "user", "hi", key=client_key("a")),
            await log.append(user, conversation, "user", "hi", key=reply_key(1)),
            await log.append(user, conversation, "user", "hi", key=client_key("r:1")),
        ]
        assert not any(one.replayed for one in others)
        assert len({one.message.id for one in (first, *others)}) == 5

    async def test_a_key_is_known_after_the_flush_and_after_the_cache_was_emptied(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        first = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        reply = await log.append(user, conversation, "assistant", "ho", key=reply_key(first.message.id))
        flush_shard(redis, settings, shard)
        for emptied in (False, True, True):
            if emptied:
                redis.flushall()
            again = await log.append(user, conversation, "user", "hi", key=client_key("a"))
            assert (again.replayed, again.message, again.reply_id) == (True, first.message, reply.message.id)
            with pytest.raises(KeyReused):
                await log.append(user, conversation, "user", "ho", key=client_key("a"))
        assert core.contents(conversation) == ["hi", "ho"]

    async def test_a_replay_of_a_message_that_has_left_the_cache_is_answered_from_postgres(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        monkeypatch.setattr(settings, "cache_messages_max", 1)
        first = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        await log.append(user, conversation, "user", "more")
        flush_shard(redis, settings, shard)
        again = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        assert (again.replayed, again.message) == (True, first.message)

    async def test_a_key_that_redis_does_not_hold_is_looked_for_in_postgres(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        """A conversation with more keys than are loaded: the first is known all the same, also if the cache is emptied meanwhile."""
        monkeypatch.setattr(loading, "RETRY_KEYS_MAX", 1)
        first = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        await log.append(user, conversation, "user", "ho", key=client_key("b"))
        flush_shard(redis, settings, shard)
        core.forget(redis, user, conversation, settings)
        again = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        assert (again.replayed, again.message) == (True, first.message)
        new = await log.append(user, conversation, "user", "new", key=client_key("c"))
        assert not new.replayed
        flush_shard(redis, settings, shard)
        core.forget(redis, user, conversation, settings)

        ask_key = log._ask_key

        async def emptied_then_asked(*arguments: object) -> str:
            told = await ask_key(*arguments)
            core.forget(redis, user, conversation, settings)
            monkeypatch.setattr(log, "_ask_key", ask_key)
            return told

        monkeypatch.setattr(log, "_ask_key", emptied_then_asked)
        again = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        assert (again.replayed, again.message) == (True, first.message)

    async def test_what_postgres_said_of_a_key_is_not_believed_after_the_cache_was_emptied(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        """Two attempts with one key: between Postgres's "unknown" to the one and its append, the other is flushed and forgotten."""
        monkeypatch.setattr(loading, "RETRY_KEYS_MAX", 1)
        for i in range(2):
            await log.append(user, conversation, "user", "hi", key=client_key(f"{i}"))
        flush_shard(redis, settings, shard)
        core.forget(redis, user, conversation, settings)
        others = []
        ask_key = log._ask_key

        async def asked_then_overtaken(*arguments: object) -> str:
            told = await ask_key(*arguments)
            monkeypatch.setattr(log, "_ask_key", ask_key)
            others.append(await log.append(user, conversation, "user", "hi", key=client_key("a")))
            await log.append(user, conversation, "user", "the one that is loaded", key=client_key("b"))
            flush_shard(redis, settings, shard)
            core.forget(redis, user, conversation, settings)
            await log._load(shard, user, conversation)
            return told

        monkeypatch.setattr(log, "_ask_key", asked_then_overtaken)
        again = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        assert (again.replayed, again.message) == (True, others[0].message)
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["hi", "hi", "hi", "the one that is loaded"]

    async def test_a_lost_answer_is_found_by_its_key(self, redis, log, user, conversation, shard, monkeypatch) -> None:
        """The script has run twice: once without an answer, once more for the retry."""
        run = log._scripts.run

        async def lost(*arguments: object, **options: object) -> object:
            await run(*arguments, **options)
            raise RedisUnavailable()

        with monkeypatch.context() as patched:
            patched.setattr(log._scripts, "run", lost)
            with pytest.raises(RedisUnavailable):
                await log.append(user, conversation, "user", "hi", key=client_key("a"))
        again = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        assert again.replayed
        assert await core.shown(log, user, conversation) == ["hi"]
        assert redis.xlen(keys.log(shard)) == 2


PAIR = (Draft("user", "hi"), Draft("assistant", "ho"))
TRIPLE = (*PAIR, Draft("user", "hey"))


class TestAppendAll:
    """Messages that are sent together."""

    async def test_are_kept_in_their_order_and_next_to_each_other(self, settings, redis, log, user, shard, conversation) -> None:
        calls = [log.append_all(user, conversation, [Draft("user", f"{i} {j}") for j in range(1 + i % 4)]) for i in range(40)]
        for done in await asyncio.gather(*calls):
            ids = [one.message.id for one in done]
            assert ids == list(range(ids[0], ids[0] + len(ids) * SHARD_SLOTS, SHARD_SLOTS)), "nobody's is between them"
            assert len({one.message.microseconds for one in done}) == 1
        told = [f"{i} {j}" for i in range(40) for j in range(1 + i % 4)]
        assert await core.shown(log, user, conversation, limit=200) == told
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == told
        core.assert_clean(redis, settings)

    @pytest.mark.parametrize("size", range(1, 8))
    async def test_no_commit_comes_between_them(self, settings, redis, log, user, shard, conversation, monkeypatch, size) -> None:
        monkeypatch.setattr(settings, "flush_batch_max", size)
        said = []
        for i, count in enumerate((1, 3, 2, 1, 100, 4)):
            said.append([f"{i} {j}" for j in range(count)])
            await log.append_all(user, conversation, [Draft("user", content) for content in said[-1]])
        commit, seen = flush._commit, []

        def noted(*arguments):
            done = commit(*arguments)
            seen.append(core.contents(conversation))
            return done

        monkeypatch.setattr(flush, "_commit", noted)
        flush_shard(redis, settings, shard)
        whole = [[content for one in said[:count] for content in one] for count in range(len(said) + 1)]
        assert [contents for contents in seen if contents not in whole] == []
        assert core.contents(conversation) == whole[-1]
        assert len(seen) > 2
        core.assert_clean(redis, settings)

    async def test_what_somebody_planted_among_them_is_harmless(self, settings, redis, log, user, shard, conversation, monkeypatch) -> None:
        """More followers than there are, and words for a number."""
        monkeypatch.setattr(settings, "flush_batch_max", 2)
        for number in (b"3", b"99999999", b"many", b"-1", b""):
            core.plant(redis, shard, b="{", n=number)
        await log.append(user, conversation, "user", "hi")
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["hi"]
        assert len(core.dead_letters()) == 5
        core.assert_clean(redis, settings)

    async def test_key_is_known_wherever_they_are(self, settings, redis, log, user, shard, conversation, monkeypatch) -> None:
        first = await log.append_all(user, conversation, PAIR, key=client_key("a"))
        monkeypatch.setattr(settings, "cache_messages_max", 1)  # one of them leaves the cache
        steps = (
            lambda: None,
            lambda: flush_shard(redis, settings, shard),
            lambda: core.forget(redis, user, conversation, settings),
            redis.flushall,
        )
        for step in steps:
            step()
            again = await log.append_all(user, conversation, PAIR, key=client_key("a"))
            assert [one.message for one in again] == [one.message for one in first]
            assert all(one.replayed for one in again)
        assert core.contents(conversation) == ["hi", "ho"]

    @pytest.mark.parametrize("step", ["pending", "forgotten", "not all loaded"])
    async def test_key_with_another_list_is_refused(self, settings, redis, log, user, shard, conversation, monkeypatch, step) -> None:
        """Also a shorter or a longer one, and one message by itself."""
        await log.append_all(user, conversation, TRIPLE, key=client_key("a"))
        await log.append(user, conversation, "user", "one", key=client_key("b"))
        if step != "pending":
            flush_shard(redis, settings, shard)
            core.forget(redis, user, conversation, settings)
        if step == "not all loaded":
            monkeypatch.setattr(loading, "RETRY_KEYS_MAX", 2)
        others = [PAIR, TRIPLE[:1], (*TRIPLE, *PAIR), TRIPLE[::-1], (*PAIR, Draft("user", "Hey")), (*PAIR, Draft("assistant", "hey"))]
        for other in others:
            with pytest.raises(KeyReused):
                await log.append_all(user, conversation, other, key=client_key("a"))
        with pytest.raises(KeyReused):
            await log.append_all(user, conversation, (Draft("user", "one"), *PAIR), key=client_key("b"))
        assert [one.replayed for one in await log.append_all(user, conversation, TRIPLE, key=client_key("a"))] == [True] * 3
        [again] = await log.append_all(user, conversation, [Draft("user", "one")], key=client_key("b"))
        assert again.replayed, "a list of one is that one"
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["hi", "ho", "hey", "one"]

    async def test_longest_key_is_inserted(self, settings, redis, log, user, shard, conversation) -> None:
        many = [Draft("user", str(i)) for i in range(pending.MESSAGES_PER_CALL_MAX)]
        await log.append_all(user, conversation, many, key=client_key("x" * 200))
        flush_shard(redis, settings, shard)
        assert core.dead_letters() == []
        redis.flushall()
        assert all(one.replayed for one in await log.append_all(user, conversation, many, key=client_key("x" * 200)))
        assert core.contents(conversation) == [str(i) for i in range(pending.MESSAGES_PER_CALL_MAX)]

    async def test_keys_of_others_never_meet_theirs(self, log, user, conversation) -> None:
        await log.append_all(user, conversation, TRIPLE, key=client_key("5"))
        for key in (client_key("1:k:5"), client_key("1"), reply_key(5), client_key("k:5")):
            assert not (await log.append(user, conversation, "assistant", "ho", key=key)).replayed
            assert (await log.append(user, conversation, "assistant", "ho", key=key)).replayed

    async def test_are_refused_together(self, settings, redis, log, user, shard, conversation, monkeypatch) -> None:
        """Where there is room for the first only."""
        held = int(redis.get(keys.backlog_bytes(shard)))
        monkeypatch.setattr(log._backlog, "limit", lambda _: held + 500)
        many = [Draft("user", "x" * 100) for _ in range(3)]
        with pytest.raises(BacklogFull):
            await log.append_all(user, conversation, many, key=client_key("a"))
        assert await core.shown(log, user, conversation) == []
        assert int(redis.get(keys.backlog_bytes(shard))) == held
        await log.append_all(user, conversation, many[:1])

    async def test_title_is_of_the_first_user_message(self, settings, redis, log, user, shard, conversation) -> None:
        await log.append_all(user, conversation, [Draft("assistant", "Welcome"), Draft("user", "Where am I?"), Draft("user", "Who?")])
        assert (await read_conversation(log, user, conversation)).title == "Where am I?"
        flush_shard(redis, settings, shard)
        redis.flushall()
        assert (await read_conversation(log, user, conversation)).title == "Where am I?"

    async def test_committed_under_other_ids_they_are_shown_once(self, settings, redis, log, user, shard, conversation) -> None:
        """Redis has lost their keys (and says that it has all of them): they are appended again, and the commit notices."""
        first = await log.append_all(user, conversation, PAIR, key=client_key("a"))
        flush_shard(redis, settings, shard)
        redis.hdel(keys.retry_keys(shard, conversation), client_key("a"), "1:" + client_key("a"))
        assert not (await log.append_all(user, conversation, PAIR, key=client_key("a")))[0].replayed
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["hi", "ho"] == await core.shown(log, user, conversation)
        again = await log.append_all(user, conversation, PAIR, key=client_key("a"))
        assert [one.message for one in again] == [one.message for one in first]
        assert core.dead_letters() == []


class TestOwner:
    @pytest.mark.parametrize("state", ["pending", "committed", "forgotten", "deleted", "absent"])
    async def test_a_stranger_finds_nothing_whatever_the_state(self, settings, redis, log, user, shard, conversation, state) -> None:
        """A stranger of the same shard and one of another, against a conversation in every state, and one that there never was."""
        await log.append(user, conversation, "user", "secret")
        if state == "deleted":
            await log.delete(user, conversation)
        if state not in ("pending", "absent"):
            flush_shard(redis, settings, shard)
        if state == "forgotten":
            core.forget(redis, user, conversation, settings)
        number = conversation + 64 if state == "absent" else conversation
        for stranger in (user + settings.shards, user + 1):
            for call in (
                lambda: log.append(stranger, number, "user", "x"),  # noqa: B023
                lambda: log.append(stranger, number, "user", "x", key=client_key("a"), turn="t"),  # noqa: B023
                lambda: log.rename(stranger, number, "x"),  # noqa: B023
                lambda: log.delete(stranger, number),  # noqa: B023
                lambda: core.shown(log, stranger, number),  # noqa: B023
            ):
                with pytest.raises(NotFound) as refused:
                    await call()
                assert str(refused.value) == str(NotFound())
            assert await log.changed(stranger) == {}
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ([] if state == "deleted" else ["secret"])
        assert core.dead_letters() == []


class TestCreate:
    async def test_a_key_creates_once(self, settings, redis, log, user, shard) -> None:
        first = await log.create(user, "title", key=client_key("a"))
        again = await asyncio.gather(*(log.create(user, "title", key=client_key("a")) for _ in range(10)))
        assert all(one.replayed and one.conversation == first.conversation for one in again)
        with pytest.raises(KeyReused):
            await log.create(user, None, key=client_key("a"))
        flush_shard(redis, settings, shard)
        assert core.ask("SELECT count(*) FROM conversation") == [(1,)]

    async def test_the_first_answer_is_given_again_whatever_became_of_it(self, settings, redis, log, user, shard) -> None:
        first = await log.create(user, None, key=client_key("a"))
        await log.append(user, first.conversation.id, "user", "gives it a title")
        flush_shard(redis, settings, shard)
        await log.rename(user, first.conversation.id, "renamed")
        flush_shard(redis, settings, shard)
        for emptied in (False, True):
            if emptied:
                redis.flushall()
            again = await log.create(user, None, key=client_key("a"))
            assert (again.replayed, again.conversation) == (True, first.conversation)

    async def test_what_postgres_said_of_a_key_is_not_believed_after_the_cache_was_emptied(
        self, settings, redis, log, user, shard, monkeypatch
    ) -> None:
        others = []
        load = log._load_created_keys

        async def loaded_then_overtaken(*arguments: object) -> str:
            told = await load(*arguments)
            monkeypatch.setattr(log, "_load_created_keys", load)
            others.append(await log.create(user, "once", key=client_key("a")))
            flush_shard(redis, settings, shard)
            redis.delete(keys.created_keys(shard, user))
            return told

        monkeypatch.setattr(log, "_load_created_keys", loaded_then_overtaken)
        again = await log.create(user, "once", key=client_key("a"))
        assert (again.replayed, again.conversation) == (True, others[0].conversation)

    @pytest.mark.parametrize("flushed", [False, True])
    async def test_an_id_that_was_reserved_twice_is_given_once(self, settings, redis, log, user, shard, monkeypatch, flushed) -> None:
        """Redis was emptied in between, and its clock set back: the number that one caller holds is given to the next one too."""
        run, reserved = log._scripts.run, []

        async def twice(name: str, *arguments: object) -> object:
            if name != "reserve":
                return await run(name, *arguments)
            reserved.append(reserved[0] if len(reserved) == 1 else await run(name, *arguments))
            return reserved[-1]

        await log.create(user, None)  # so that the shard's clock is there
        flush_shard(redis, settings, shard)
        monkeypatch.setattr(log._scripts, "run", twice)
        first = await log.create(user, "one", key=client_key("a"))
        if flushed:
            flush_shard(redis, settings, shard)
            core.forget(redis, user, first.conversation.id, settings)
        second = await log.create(user, "two", key=client_key("b"))
        assert reserved[0] == reserved[1]
        assert first.conversation.id != second.conversation.id
        core.flush_all(redis, settings)
        stored = core.ask("SELECT id, title FROM conversation WHERE title IS NOT NULL ORDER BY id")
        assert stored == [(first.conversation.id, "one"), (second.conversation.id, "two")]

    async def test_an_id_from_before_redis_was_emptied_is_not_used(self, settings, redis, log, user, shard, monkeypatch) -> None:
        """The new clock is behind it, and comes to it again when nobody knows any more that there is such a conversation."""
        run, emptied = log._scripts.run, []

        async def emptied_meanwhile(name: str, *arguments: object) -> object:
            if name == "create" and not emptied:
                emptied.append(redis.flushall())
            return await run(name, *arguments)

        await log.create(user, None)
        flush_shard(redis, settings, shard)
        hour_ahead = an_hour_ahead(redis, shard)
        monkeypatch.setattr(log._scripts, "run", emptied_meanwhile)
        first = await log.create(user, "one")
        flush_shard(redis, settings, shard)
        core.forget(redis, user, first.conversation.id, settings)
        redis.set(keys.clock(shard), hour_ahead)
        second = await log.create(user, "two")
        assert first.conversation.id != second.conversation.id
        core.flush_all(redis, settings)
        stored = core.ask("SELECT id, title FROM conversation WHERE title IS NOT NULL ORDER BY id")
        assert stored == [(first.conversation.id, "one"), (second.conversation.id, "two")]

    async def test_that_all_keys_are_here_is_forgotten_together_with_the_keys(self, settings, redis, log, user, shard) -> None:
        """The mark that says so lies among them: no expiry can take keys and leave it."""
        first = await log.create(user, None, key=client_key("a"))
        name = keys.created_keys(shard, user)
        assert set(redis.hkeys(name)) == {b"*", b"k:a"}
        assert redis.pttl(name) == -1
        flush_shard(redis, settings, shard)
        assert redis.pttl(name) > 0
        second = await log.create(user, None)  # pending: nothing of the user's may expire now, whether it has a key or not
        assert redis.pttl(name) == -1
        flush_shard(redis, settings, shard)
        redis.delete(name)
        assert (await log.create(user, None, key=client_key("a"))).conversation == first.conversation
        assert redis.pttl(name) > 0
        assert second.conversation != first.conversation
        core.assert_clean(redis, settings)

    async def test_keys_stay_while_another_conversation_of_the_user_is_pending(self, settings, redis, log, user, shard) -> None:
        """The keys of a pending conversation are nowhere else."""
        old = (await log.create(user, None)).conversation.id
        flush_shard(redis, settings, shard)
        await log.append(user, old, "user", "x")
        with core.gates():
            flusher = core.Flusher(lambda: flush_shard(redis, settings, shard))
            flusher.until("persist")
            created = await log.create(user, None, key=client_key("a"))
            flusher.finish()
        assert redis.xlen(keys.log(shard)) == 1
        assert redis.pttl(keys.created_keys(shard, user)) == -1
        assert (await log.create(user, None, key=client_key("a"))).conversation == created.conversation
        flush_shard(redis, settings, shard)
        core.assert_clean(redis, settings)

    async def test_a_user_with_more_keys_than_are_loaded(self, settings, redis, log, user, shard, monkeypatch) -> None:
        monkeypatch.setattr(loading, "RETRY_KEYS_MAX", 1)
        first = await log.create(user, None, key=client_key("a"))
        await log.create(user, None, key=client_key("b"))
        flush_shard(redis, settings, shard)
        for _ in range(2):
            redis.delete(keys.created_keys(shard, user))
            assert (await log.create(user, None, key=client_key("a"))).conversation == first.conversation
            assert not (await log.create(user, None, key=client_key(os.urandom(4).hex()))).replayed
            await log._load_created_keys(shard, user, client_key("x"))
            assert redis.pttl(keys.created_keys(shard, user)) == -1, "the last one is pending"
            flush_shard(redis, settings, shard)

    async def test_an_id_that_was_given_again_is_nobody_elses(self, redis, log, user, shard, settings) -> None:
        """A wiped Redis whose clock was set back too may give out a reserved id a second time."""
        theirs = (await log.create(user + settings.shards, "theirs")).conversation
        run = log._scripts.run

        async def reserved_twice(name: str, *arguments: object) -> object:
            if name == "reserve":
                log._scripts.run = run
                return [b"OK", b"%d" % theirs.id]
            return await run(name, *arguments)

        log._scripts.run = reserved_twice
        mine = (await log.create(user, "mine")).conversation
        assert mine.id != theirs.id
        assert redis.hget(keys.conversation(shard, theirs.id), "t") == b"theirs"


class TestDelete:
    async def test_nobody_finds_it_from_the_acknowledgement_on(self, settings, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "hi", key=client_key("a"), turn="token")
        await log.delete(user, conversation)
        for after in ("acknowledged", "committed", "forgotten", "loaded"):
            if after == "committed":
                flush_shard(redis, settings, shard)
            elif after == "forgotten":
                core.forget(redis, user, conversation, settings)
            for call in (
                lambda: log.append(user, conversation, "user", "hi", key=client_key("a")),
                lambda: log.append(user, conversation, "user", "hi"),
                lambda: log.rename(user, conversation, "x"),
                lambda: log.delete(user, conversation),
                lambda: core.shown(log, user, conversation),
            ):
                with pytest.raises(NotFound):
                    await call()
        assert core.contents(conversation) == []
        assert core.ask("SELECT title, deleted_at IS NULL FROM conversation") == [(None, False)]
        assert not await log.keep_turn(user, conversation, "token")
        flush_shard(redis, settings, shard)
        assert core.dead_letters() == []
        core.assert_clean(redis, settings)

    async def test_a_full_backlog_does_not_stop_it(self, settings, redis, log, user, conversation, monkeypatch) -> None:
        monkeypatch.setattr(log._backlog, "_settings_max", 1)
        await log._backlog.look()
        with pytest.raises(BacklogFull):
            await log.append(user, conversation, "user", "x")
        await log.delete(user, conversation)


class TestTitle:
    async def test_the_first_message_of_the_user_names_it(self, settings, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "assistant", "Welcome")
        await log.append(user, conversation, "user", "  How do\nI  knit? ")
        await log.append(user, conversation, "user", "Another")
        assert (await log.changed(user))[conversation].title == "How do I knit?"
        flush_shard(redis, settings, shard)
        assert core.ask("SELECT title FROM conversation") == [("How do I knit?",)]

    async def test_what_a_person_set_is_never_overwritten(self, settings, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "first")
        flush_shard(redis, settings, shard)
        await log.rename(user, conversation, "mine")
        await log.append(user, conversation, "user", "second")
        for flushed in (False, True):
            if flushed:
                flush_shard(redis, settings, shard)
            core.forget(redis, user, conversation, settings)
            assert (await log.rename(user, conversation, "mine")).title == "mine"
            await log.append(user, conversation, "user", "third")
        flush_shard(redis, settings, shard)
        assert core.ask("SELECT title FROM conversation") == [("mine",)]


class TestTurn:
    async def test_a_second_turn_is_refused_until_the_first_ends(self, log, user, conversation) -> None:
        first = await log.append(user, conversation, "user", "a", key=client_key("a"), turn="one")
        for key in (client_key("b"), client_key("a"), None):
            with pytest.raises(TurnRunning):
                await log.append(user, conversation, "user", "a" if key == client_key("a") else "b", key=key, turn="two")
        assert not await log.end_turn(user, conversation, "two")
        assert await log.keep_turn(user, conversation, "one")
        assert await log.end_turn(user, conversation, "one")
        again = await log.append(user, conversation, "user", "a", key=client_key("a"), turn="two")
        assert (again.replayed, again.message, again.reply_id) == (True, first.message, None)
        with pytest.raises(TurnRunning):  # the retry has taken it
            await log.append(user, conversation, "user", "c", turn="three")
        assert await core.shown(log, user, conversation) == ["a"]

    async def test_a_turn_from_before_the_clock_was_set_back_does_not_last_an_hour(self, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "a", turn="one")
        redis.pexpire(keys.turn(shard, conversation), 3_600_000)
        await log.append(user, conversation, "user", "b", turn="two")


class TestBacklog:
    async def test_what_is_over_the_limit_is_refused_and_nothing_else(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        size = len(core.message_entry(user, conversation, "x" * 1000, "assistant")) + ENTRY_OVERHEAD_BYTES
        held = int(redis.get(keys.backlog_bytes(shard)))
        monkeypatch.setattr(log._backlog, "_settings_max", held + 3 * size)
        await log._backlog.look()
        kept = [await log.append(user, conversation, "assistant", "x" * 1000, key=client_key("a")) for _ in range(5)]
        assert [one.replayed for one in kept] == [False, True, True, True, True]
        for _ in range(2):
            await log.append(user, conversation, "assistant", "x" * (1000 - len("k:a")))
        for refused in (
            lambda: log.append(user, conversation, "user", "x" * 1000),
            lambda: log.rename(user, conversation, "x"),
            lambda: log.create(user, "x" * 200),
        ):
            with pytest.raises(BacklogFull):
                await refused()
        assert (await log.append(user, conversation, "assistant", "x" * 1000, key=client_key("a"))).replayed
        assert len(await core.shown(log, user, conversation)) == 3
        flush_shard(redis, settings, shard)
        await log.append(user, conversation, "user", "x" * 1000)
        flush_shard(redis, settings, shard)
        core.assert_clean(redis, settings)

    async def test_the_other_shards_count_too(self, settings, redis, log, user, conversation, monkeypatch) -> None:
        other = core.make_user()
        theirs = (await log.create(other, None)).conversation.id
        monkeypatch.setattr(log._backlog, "_settings_max", 10_000)
        await log._backlog.look()

        async def fill() -> None:
            while True:
                await log.append(other, theirs, "assistant", "x" * 200)

        with pytest.raises(BacklogFull):
            await fill()
        await log._backlog.look()
        with pytest.raises(BacklogFull):
            await log.append(user, conversation, "user", "x" * 600)

    async def test_a_log_that_fills_redis_leaves_room_to_flush_it(self, settings, redis, log, user, shard, conversation) -> None:
        """At `maxmemory` nobody can ask for a flush any more: what is acknowledged ends before."""

        async def fill() -> None:
            while True:
                await asyncio.gather(*(log.append(user, conversation, "user", "x" * 50_000) for _ in range(8)))
                await log._backlog.look()

        redis.config_set("maxmemory", redis.info("memory")["used_memory"] + (12 << 20))
        try:
            with pytest.raises(BacklogFull):
                await fill()
            redis.lpush("broker", "a task" * 1000)
            assert backlog.ask_for_flush(redis, shard) in (True, False)
            flush_shard(redis, settings, shard)
            await log._backlog.look()
            await log.append(user, conversation, "user", "x")
        finally:
            redis.config_set("maxmemory", 0)

    async def test_redis_out_of_memory_refuses_and_changes_nothing(self, settings, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "before", key=client_key("a"))
        before = {name: redis.dump(name) for name in redis.scan_iter("ck:*")}
        redis.config_set("maxmemory", 1)
        try:
            for call in (
                lambda: log.append(user, conversation, "user", "x", key=client_key("b"), turn="t"),
                lambda: log.rename(user, conversation, "x"),
                lambda: log.create(user, None),
                lambda: log.delete(user, conversation),
            ):
                with pytest.raises(BacklogFull):
                    await call()
            assert await core.shown(log, user, conversation) == ["before"]
            assert before == {name: redis.dump(name) for name in redis.scan_iter("ck:*")}
            flush_shard(redis, settings, shard)  # what is there can still be written to Postgres
        finally:
            redis.config_set("maxmemory", 0)
        core.assert_clean(redis, settings)


class TestCache:
    async def test_pending_messages_are_never_dropped_for_the_cap(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        monkeypatch.setattr(settings, "cache_messages_max", 2)
        said = [str(i) for i in range(30)]
        for content in said[:20]:
            await log.append(user, conversation, "user", content)
        assert redis.xlen(keys.messages(shard, conversation)) == 20
        with core.gates():
            flusher = core.Flusher(lambda: flush_shard(redis, settings, shard))
            flusher.until("persist")
            for content in said[20:]:
                await log.append(user, conversation, "user", content)
            flusher.until("trim")
            flusher.step()
            assert 10 <= redis.xlen(keys.messages(shard, conversation)) <= 16, "the cap is not held while it is busy"
            assert await core.shown(log, user, conversation) == said
            flusher.finish()
        flush_shard(redis, settings, shard)
        assert redis.xlen(keys.messages(shard, conversation)) == 2
        assert await core.shown(log, user, conversation) == said
        page = await log.read(user, conversation, "before", None, 10)
        assert page
        assert not page.whole
        core.assert_clean(redis, settings)

    async def test_a_whole_conversation_is_read_without_postgres(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        for content in "abc":
            await log.append(user, conversation, "user", content)
        flush_shard(redis, settings, shard)
        core.forget(redis, user, conversation, settings)
        await log._load(shard, user, conversation)
        monkeypatch.setattr(log.threads, "run", None)
        assert await core.shown(log, user, conversation) == ["a", "b", "c"]

    async def test_nothing_pending_ever_has_an_expiry(self, settings, redis, log, user, shard) -> None:
        """After every kind of write to a conversation in every state, and every read and load in between."""
        writes = {
            "append": lambda number: log.append(user, number, "user", "x", key=client_key(os.urandom(4).hex())),
            "append without a key": lambda number: log.append(user, number, "user", "x"),
            "rename": lambda number: log.rename(user, number, "x"),
            "delete": lambda number: log.delete(user, number),
        }
        states = ("new", "committed", "touched", "loaded", "key remembered")
        for name, write in writes.items():
            for state in states:
                number = (await log.create(user, None, key=client_key(os.urandom(4).hex()))).conversation.id
                await log.append(user, number, "user", "x", key=client_key("a"))
                if state != "new":
                    flush_shard(redis, settings, shard)
                    names = keys.of_conversation(shard, number)
                    if state == "touched":
                        await log._touch(names)
                    elif state == "loaded":
                        core.forget(redis, user, number, settings)
                        await log._load(shard, user, number)
                    elif state == "key remembered":
                        redis.hset(names[0], "k", "0")
                        redis.delete(names[2])
                        await log._ask_key(shard, number, user, client_key("a"))
                await write(number)
                await log.read(user, number, "before", None, 5) if name != "delete" else None
                await log._touch(keys.of_conversation(shard, number))
                for key in (*keys.of_conversation(shard, number), keys.changed(shard, user)):
                    assert redis.pttl(key) in (-1, -2), (name, state, key)
                assert (redis.pttl(keys.created_keys(shard, user)) == -1) == (state == "new"), "its own keys are pending only with it"
                flush_shard(redis, settings, shard)
                core.assert_clean(redis, settings)

    async def test_a_conversation_of_long_messages_is_loaded_in_part(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        """However long they are, a load fits into its time-out; what it leaves out is not missed."""
        said = [str(i) * 1000 for i in range(8)]
        for content in said:
            await log.append(user, conversation, "user", content, key=client_key(content[:1]))
        flush_shard(redis, settings, shard)
        large = 1 << 20
        for messages_max, messages_bytes, cached, whole in [
            (200, large, 8, True),
            (8, large, 8, True),
            (7, large, 7, False),
            (200, 3500, 3, False),
            (200, 10, 0, False),
        ]:
            monkeypatch.setattr(settings, "cache_messages_max", messages_max)
            monkeypatch.setattr(loading, "MESSAGES_BYTES_MAX", messages_bytes)
            monkeypatch.setattr(loading, "KEYS_BYTES_MAX", messages_bytes)
            core.forget(redis, user, conversation, settings)
            assert await core.shown(log, user, conversation) == said, "while nothing is cached"
            while (page := await log.read(user, conversation, "before", None, 100)) is None:
                await asyncio.sleep(0.02)
            assert (len(page.messages), page.whole) == (cached, whole)
            assert await core.shown(log, user, conversation) == said
            assert await core.shown(log, user, conversation, after=1) == said
            for content in said:
                assert (await log.append(user, conversation, "user", content, key=client_key(content[:1]))).replayed
        await log.append(user, conversation, "user", "more")
        assert await core.shown(log, user, conversation) == [*said, "more"]
        assert await core.shown(log, user, conversation, after=1) == [*said, "more"]

    async def test_a_read_prolongs_what_is_committed(self, settings, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "x", key=client_key("a"))
        flush_shard(redis, settings, shard)
        names = keys.of_conversation(shard, conversation)
        assert [redis.ttl(name) for name in names] == pytest.approx([900, 960, 960], abs=2)
        redis.expire(names[0], 100)
        await log.read(user, conversation, None, None, 0)
        await asyncio.sleep(0.1)
        assert [redis.ttl(name) for name in names] == pytest.approx([900, 960, 960], abs=2)


class TestRead:
    async def test_a_strangers_read_looks_at_no_message_and_prolongs_nothing(self, settings, redis, log, user, shard, conversation) -> None:
        """The answer is the same anyway; but how long it takes, and what it leaves, would tell."""
        stranger, nobodys = user + settings.shards, conversation + SHARD_SLOTS
        await log.append(user, conversation, "user", "x", key=client_key("a"))
        flush_shard(redis, settings, shard)
        names = keys.of_conversation(shard, conversation)
        for owner_has_read in (False, True):
            redis.expire(names[0], 100)
            redis.config_resetstat()
            for _ in range(2):
                for number in (conversation, nobodys):
                    for direction, start in (("before", None), ("after", 1), (None, None)):
                        assert await log.read(stranger, number, direction, start, 50) is None
            await asyncio.sleep(0.1)
            done = {name.removeprefix("cmdstat_") for name in redis.info("commandstats")}
            assert not done & {"xrange", "xrevrange", "expire", "set", "xadd", "hset"}, done
            assert redis.ttl(names[0]) <= 100, owner_has_read
            assert not redis.exists(keys.loading(shard, conversation))
            assert len((await log.read(user, conversation, "before", None, 50)).messages) == 1
            await asyncio.sleep(0.1)

    async def test_a_remembered_owner_is_asked_for_again(self, redis, log, user, shard, conversation) -> None:
        """What a process remembers spares time, and decides nothing."""
        await log.append(user, conversation, "user", "x")
        assert await log.read(user, conversation, "before", None, 50)
        redis.hset(keys.conversation(shard, conversation), "u", user + 64)
        assert await log.read(user, conversation, "before", None, 50) is None

    async def test_owners_are_not_remembered_without_end(self, log, user, monkeypatch) -> None:
        monkeypatch.setattr(pending, "OWNERS_MAX", 3)
        for _ in range(5):
            conversation = (await log.create(user, None)).conversation.id
            assert (await log.read(user, conversation, "before", None, 5)).whole
            assert len(log._owners) <= 3

    async def test_a_deleted_conversation_is_not_found(self, settings, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "x")
        assert await log.read(user, conversation, "before", None, 50)
        await log.delete(user, conversation)
        for direction, start in (("before", None), ("after", 1), (None, None)):
            with pytest.raises(NotFound):
                await log.read(user, conversation, direction, start, 50)
        flush_shard(redis, settings, shard)
        with pytest.raises(NotFound):
            await log.read(user, conversation, "before", None, 50)
        core.forget(redis, user, conversation, settings)
        for read in (read_conversation(log, user, conversation), core.shown(log, user, conversation)):
            with pytest.raises(NotFound):
                await read
        assert (await list_conversations(log, user, 20, None)).items == ()

    async def test_what_is_committed(self, settings, redis, log, user, shard, conversation) -> None:
        """Of a clean conversation everything, whatever has become of the shard's mark; of another, what the mark says."""
        first = (await log.append(user, conversation, "user", "1")).message.id
        assert (await log.read(user, conversation, "before", None, 50)).committed < first
        flush_shard(redis, settings, shard)
        redis.delete(keys.committed(shard))
        assert (await log.read(user, conversation, "before", None, 50)).committed == first
        redis.set(keys.committed(shard), first)
        second = (await log.append(user, conversation, "user", "2")).message.id
        page = await log.read(user, conversation, "after", 0, 50)
        assert (page.committed, page.last_id, page.first_id) == (first, second, first)
        redis.delete(keys.committed(shard))
        assert (await log.read(user, conversation, "before", None, 50)).committed == 0

    async def test_damaged_keys_are_an_error_and_no_page(self, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "1")
        assert await log.read(user, conversation, "before", None, 50)
        redis.set(keys.messages(shard, conversation), "not a stream")
        for direction, start in (("before", None), ("after", 1)):
            with pytest.raises(RedisUnavailable):
                await log.read(user, conversation, direction, start, 50)
        assert await log.read(user, conversation, None, None, 0)


class TestClock:
    async def test_an_hour_forth_and_back_ids_rise_and_stay_exact(self, settings, redis, log, user, shard, conversation) -> None:
        before = (await log.append(user, conversation, "user", "before")).message.id
        ahead = int(redis.get(keys.clock(shard))) + 3600 * 100_000  # as the clock had given it before it was set back an hour
        redis.set(keys.clock(shard), ahead)
        ids = [(await log.append(user, conversation, "user", str(i))).message.id for i in range(3)]
        assert ids == [(ahead + 1 + i) * 64 + shard for i in range(3)]
        assert before < ids[0]
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["before", "0", "1", "2"]
        core.assert_clean(redis, settings)

    async def test_activity_never_goes_back_with_the_clock(self, settings, redis, log, user, shard, conversation) -> None:
        """In Redis as in Postgres: or the list would change its order by a flush."""
        ahead = int(time.time() * 1e6) + 3_600_000_000
        redis.hset(keys.conversation(shard, conversation), "a", ahead)
        await log.append(user, conversation, "user", "x")
        assert (await log.changed(user))[conversation].updated == ahead

    async def test_a_lost_clock_is_seeded_from_both_stores_and_the_highest_wins(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        first = (await log.append(user, conversation, "user", "a")).message.id
        redis.delete(keys.clock(shard))
        second = (await log.append(user, conversation, "user", "b")).message.id
        assert second > first
        flush_shard(redis, settings, shard)
        last_tick = second // 64 + 3600 * 100_000
        core.ask("UPDATE shard SET last_id = %s", last_tick * 64 + shard)
        redis.flushall()
        third = (await log.append(user, conversation, "user", "c")).message.id
        assert third == (last_tick + 1) * 64 + shard
        assert await core.shown(log, user, conversation) == ["a", "b", "c"]

    async def test_a_clock_behind_the_log_is_seeded_from_it(self, redis, log, user, shard, conversation) -> None:
        first = (await log.append(user, conversation, "user", "a")).message.id
        redis.set(keys.clock(shard), 1)
        redis.xadd(keys.log(shard), {"x": "y"}, id=f"{first + 64 * 360_000_000}-0")  # an hour ahead
        second = (await log.append(user, conversation, "user", "b")).message.id
        assert second > first + 64 * 360_000_000

    async def test_a_redis_that_was_restored_behind_postgres_does_not_number_backwards(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        await log.append(user, conversation, "user", "a")
        an_hour_ahead(redis, shard)
        await log.append(user, conversation, "user", "b")
        flush_shard(redis, settings, shard)
        core.forget(redis, user, conversation, settings)
        redis.set(keys.clock(shard), 1)
        redis.delete(keys.log(shard))
        await log.append(user, conversation, "user", "c")
        assert await core.shown(log, user, conversation) == ["a", "b", "c"]
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["a", "b", "c"]

    async def test_nor_does_a_title_there_get_an_id_of_before(self, settings, redis, log, user, shard, conversation) -> None:
        """It would pass for one that is committed, and not be written."""
        an_hour_ahead(redis, shard)
        await log.append(user, conversation, "user", "a")
        flush_shard(redis, settings, shard)
        redis.set(keys.clock(shard), 1)
        redis.delete(keys.log(shard))
        await log.rename(user, conversation, "named after that")
        flush_shard(redis, settings, shard)
        assert core.ask("SELECT title FROM conversation") == [("named after that",)]

    async def test_a_seed_waits_for_a_flush_that_is_under_way(self, settings, redis, log, user, shard, conversation) -> None:
        """What a wiped Redis had numbered may still be on its way into Postgres."""
        an_hour_ahead(redis, shard)
        first = (await log.append(user, conversation, "user", "a")).message.id
        with core.gates():
            flusher = core.Flusher(lambda: flush_shard(redis, settings, shard))
            flusher.until("persist")
            redis.flushall()
            seeding = asyncio.create_task(log._seed(shard))
            await asyncio.sleep(0.2)
            assert not seeding.done()
            flusher.until("trim")
            await seeding
            flusher.finish()
        second = (await log.append(user, conversation, "user", "b")).message.id
        assert second > first
        assert await core.shown(log, user, conversation) == ["a", "b"]
        flush_shard(redis, settings, shard)
        core.assert_clean(redis, settings)

    async def test_a_seed_from_before_redis_was_emptied_again_gives_no_id_twice(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        """Others have gone beyond what Postgres knew when the slow one asked; the server's clock is behind, so only the seed can tell."""
        an_hour_ahead(redis, shard)
        await log.append(user, conversation, "user", "a")
        core.flush_all(redis, settings)
        redis.flushall()
        halves = core.Halves(log)
        slow = await halves.start(log.create(user, "slow"))
        await halves.step(slow)
        quick = (await log.create(user, "quick")).conversation.id
        core.flush_all(redis, settings)
        redis.flushall()
        assert (await halves.finish(slow)).conversation.id > quick
        core.flush_all(redis, settings)
        assert core.ask("SELECT title FROM conversation WHERE title IS NOT NULL ORDER BY id") == [("a",), ("quick",), ("slow",)]
        core.assert_clean(redis, settings)

    async def test_who_dies_in_a_seed_and_who_is_slow_keep_nobody_waiting(self, settings, redis, log, user, shard, conversation) -> None:
        """Of several at once each may be the first, also with the token of a dead one, from before the server's clock was set back."""
        an_hour_ahead(redis, shard)
        await log.append(user, conversation, "user", "a")
        core.flush_all(redis, settings)
        redis.flushall()
        redis.set(keys.seeding(shard), "a dead one's", px=3_600_000)
        halves = core.Halves(log)
        slow = await halves.start(log.append(user, conversation, "user", "slow"))
        while not redis.exists(keys.conversation(shard, conversation)):  # until it has loaded the conversation, and asks for the clock
            await halves.step(slow)
        await halves.step(slow)
        started = time.monotonic()
        texts = [str(i) for i in range(10)]
        await asyncio.gather(*(log.append(user, conversation, "user", one) for one in texts))
        assert time.monotonic() - started < 1
        await halves.finish(slow)
        assert not redis.exists(keys.seeding(shard))
        assert sorted(await core.shown(log, user, conversation)) == sorted([*texts, "a", "slow"])


class TestWipedCache:
    async def test_nothing_committed_is_missed(self, settings, redis, log, user, shard, conversation) -> None:
        said = [str(i) for i in range(5)]
        for content in said:
            await log.append(user, conversation, "user", content, key=client_key(content))
        flush_shard(redis, settings, shard)
        redis.flushall()
        assert await core.shown(log, user, conversation) == said
        again = await log.append(user, conversation, "user", "3", key=client_key("3"))
        assert again.replayed
        assert again.committed >= again.message.id
        new = await log.append(user, conversation, "user", "new")
        page = await log.read(user, conversation, "before", None, 10)
        assert page
        assert page.committed < new.message.id
        assert page.committed >= page.messages[1].id, "what was committed is not pending again"
        flush_shard(redis, settings, shard)
        assert await core.shown(log, user, conversation) == [*said, "new"]
        core.assert_clean(redis, settings)

    async def test_another_number_of_shards_is_refused_when_the_clock_is_seeded(
        self, settings, redis, log, user, conversation, monkeypatch
    ) -> None:
        monkeypatch.setattr(settings, "shards", 8)
        redis.flushall()
        with pytest.raises(ConfigurationError, match="SHARDS=16"):
            await log.create(user, None)

    async def test_a_server_that_has_forgotten_the_scripts_gets_them_again(self, settings, redis, log, user, shard, conversation) -> None:
        for _ in range(2):
            redis.script_flush()
            await asyncio.gather(*(log.append(user, conversation, "user", "x") for _ in range(5)))
        assert len(await core.shown(log, user, conversation)) == 10
        redis.script_flush()
        assert flush_shard(redis, settings, shard).messages == 10
        core.assert_clean(redis, settings)


class TestStoresAway:
    @pytest.fixture
    def frozen_postgres(self, postgres) -> Iterator[None]:
        """It answers nothing, and its own time-outs are frozen with it."""
        pids = [int(line) for line in os.popen(f"pgrep -P {postgres.pid}").read().split()]
        for pid in (postgres.pid, *pids):
            os.kill(pid, signal.SIGSTOP)
        yield
        for pid in (postgres.pid, *pids):
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
        dispose()

    async def _writes(self, log: PendingLog, user: int, conversation: int) -> None:
        """Every kind of write to a conversation that Redis knows; Postgres must not be asked."""
        first = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        assert (await log.append(user, conversation, "user", "hi", key=client_key("a"))).message == first.message
        await log.append(user, conversation, "assistant", "ho", key=reply_key(first.message.id))
        await log.rename(user, conversation, "title")
        await log.create(user, None)
        await log.create(user, None, key=client_key("b"))
        assert await core.shown(log, user, conversation) == ["hi", "ho"]
        await log.delete(user, conversation)

    async def test_postgres_frozen_changes_nothing_in_writes(self, log, user, conversation, request) -> None:
        await log.create(user, None, key=client_key("known"))
        request.getfixturevalue("frozen_postgres")
        started = time.monotonic()
        await self._writes(log, user, conversation)
        assert time.monotonic() - started < 0.5

    async def test_postgres_frozen_an_unknown_conversation_is_refused_in_time(
        self, settings, redis, log, user, shard, conversation, request
    ) -> None:
        """Also for those who wait behind others: no thread that hangs is waited for twice."""
        await log.append(user, conversation, "user", "x")
        flush_shard(redis, settings, shard)
        core.forget(redis, user, conversation, settings)
        request.getfixturevalue("frozen_postgres")
        started = time.monotonic()
        calls = [log.append(user, conversation, "user", "x", key=client_key(str(i))) for i in range(20)]
        calls += [core.shown(log, user, conversation) for _ in range(20)]
        refused = await asyncio.gather(*calls, return_exceptions=True)
        assert time.monotonic() - started < 2.2
        assert {type(one) for one in refused} <= {PostgresUnavailable, TooSlow}

    async def test_postgres_frozen_somebody_elses_conversation_is_answered_like_one_that_never_was(
        self, settings, redis, log, user, shard, conversation, request
    ) -> None:
        """Redis knows the one and not the other; a stranger of the same shard must not learn which."""
        await log.append(user, conversation, "user", "x")
        stranger, nobodys = user + settings.shards, conversation + SHARD_SLOTS
        assert keys.shard_of_user(stranger, settings.shards) == shard
        request.getfixturevalue("frozen_postgres")

        calls = [
            call
            for number in (conversation, nobodys)
            for call in (
                log.append(stranger, number, "user", "x"),
                log.append(stranger, number, "user", "x", key=client_key("a"), turn="t"),
                log.rename(stranger, number, "mine"),
                log.delete(stranger, number),
                core.shown(log, stranger, number),
                core.shown(log, stranger, number, after=1),
                read_conversation(log, stranger, number),
            )
        ]
        refused = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(one) for one in refused} <= {PostgresUnavailable, TooSlow}

    async def test_postgres_frozen_no_page_only_looks_whole(
        self, settings, redis, log, user, shard, conversation, monkeypatch, request
    ) -> None:
        monkeypatch.setattr(settings, "cache_messages_max", 2)
        for i in range(4):
            await log.append(user, conversation, "user", str(i))
        flush_shard(redis, settings, shard)
        request.getfixturevalue("frozen_postgres")
        assert await core.shown(log, user, conversation, limit=1) == ["3"]
        started = time.monotonic()
        reads = [core.shown(log, user, conversation), core.shown(log, user, conversation, after=1), list_conversations(log, user, 5, None)]
        refused = await asyncio.gather(*reads, return_exceptions=True)
        assert time.monotonic() - started < 2.2
        assert {type(one) for one in refused} == {PostgresUnavailable}

    async def test_redis_frozen_is_refused_in_time(self, valkey, log, user, conversation) -> None:
        os.kill(valkey.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            calls = [log.append(user, conversation, "user", "x"), log.create(user, None), log.read(user, conversation, None, None, 0)]
            refused = await asyncio.gather(*calls, return_exceptions=True)
            assert time.monotonic() - started < 2
            assert {type(one) for one in refused} == {RedisUnavailable}
        finally:
            os.kill(valkey.pid, signal.SIGCONT)

    async def test_redis_frozen_longer_than_anybody_waits_is_refused_in_time(self, settings, valkey, redis, user, monkeypatch) -> None:
        """Here its own time-out is the longer one."""
        monkeypatch.setattr(pending, "ANSWER_WITHIN_SECONDS", 0.3)
        client = connect(settings.model_copy(update={"redis_timeout_seconds": 10.0}))
        log = PendingLog(client, settings.model_copy(update={"redis_timeout_seconds": 10.0}), wake=lambda shard: None)
        conversation = (await log.create(user, None)).conversation.id
        try:
            os.kill(valkey.pid, signal.SIGSTOP)
            started = time.monotonic()
            with pytest.raises(TooSlow):
                await log.append(user, conversation, "user", "x")
            assert time.monotonic() - started < 2
        finally:
            os.kill(valkey.pid, signal.SIGCONT)
            await log.close()
            await client.aclose()

    @pytest.mark.parametrize(("look", "stored"), [(1, 0), (2, 1)])
    @pytest.mark.parametrize("what", ["append", "create"])
    async def test_what_could_be_lost_is_not_acknowledged(self, settings, redis, user, shard, conversation, what, look, stored) -> None:
        """There is a look before the write, and one after it: it may have met another server."""
        looks = iter(range(1, 3))

        def check() -> None:
            if next(looks) == look:
                raise NotDurable

        client = connect(settings)
        log = PendingLog(client, settings, lambda shard: None, check)
        before = redis.xlen(keys.log(shard))
        with pytest.raises(NotDurable):
            await (log.append(user, conversation, "user", "x") if what == "append" else log.create(user, None))
        assert redis.xlen(keys.log(shard)) == before + stored
        await log.close()
        await client.aclose()

    async def test_what_has_to_be_asked_for_twice_has_one_time_for_both(self, redis, log, user, conversation, monkeypatch) -> None:
        run = log._scripts.run

        async def slowly(*arguments: object, **options: object) -> object:
            await asyncio.sleep(0.8)
            return await run(*arguments, **options)

        async def forever(*_: object) -> None:
            await asyncio.sleep(60)

        redis.flushall()
        monkeypatch.setattr(pending, "ANSWER_WITHIN_SECONDS", 1.0)
        monkeypatch.setattr(log._scripts, "run", slowly)
        monkeypatch.setattr(log, "_prepare", forever)
        started = time.monotonic()
        with pytest.raises(TooSlow):
            await log.append(user, conversation, "user", "x")
        assert time.monotonic() - started < 1.6

    async def test_redis_killed_and_started_again_has_every_acknowledged_message(
        self, settings, redis, log, user, shard, conversation, valkey
    ) -> None:
        said = []
        for i in range(10):
            await log.append(user, conversation, "user", str(i), key=client_key(str(i)))
            said.append(str(i))
        valkey.kill()
        with pytest.raises(RedisUnavailable):
            await log.append(user, conversation, "user", "lost", key=client_key("lost"))
        valkey.start()
        assert await core.shown(log, user, conversation) == said
        assert (await log.append(user, conversation, "user", "3", key=client_key("3"))).replayed
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == said
        core.assert_clean(redis, settings)


class TestCallers:
    async def test_a_caller_who_hangs_up_during_a_load_keeps_nobody_waiting(self, settings, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "a")
        flush_shard(redis, settings, shard)
        core.forget(redis, user, conversation, settings)
        halves = core.Halves(log)
        loading = await halves.start(log.append(user, conversation, "user", "never"))
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        started = time.monotonic()
        await log.append(user, conversation, "user", "b")
        assert time.monotonic() - started < 1
        assert await core.shown(log, user, conversation) == ["a", "b"]

    async def test_of_many_who_need_a_conversation_few_load_it(self, settings, redis, log, user, shard, conversation, monkeypatch) -> None:
        """Writers and readers of two processes at once: nobody is refused, nothing is overwritten."""
        await log.append(user, conversation, "user", "first")
        flush_shard(redis, settings, shard)
        core.forget(redis, user, conversation, settings)
        loads = []
        load = loading.load_conversation
        monkeypatch.setattr(loading, "load_conversation", lambda *arguments: loads.append(1) or load(*arguments))
        client = connect(settings)
        second = PendingLog(client, settings, wake=lambda shard: None)
        calls = [one.append(user, conversation, "user", str(i)) for i in range(15) for one in (log, second)]
        calls += [core.shown(one, user, conversation) for one in (log, second)]
        await asyncio.gather(*calls)
        assert len(loads) < 5, "one, and who came when it was just done"
        assert len(await core.shown(log, user, conversation)) == 31
        flush_shard(redis, settings, shard)
        assert len(core.contents(conversation)) == 31
        core.assert_clean(redis, settings)
        await second.close()
        await client.aclose()

    async def test_a_call_that_fails_takes_none_of_its_pipeline_along(self, redis, log, user, shard, conversation) -> None:
        broken = conversation + 64
        redis.set(keys.conversation(shard, broken), "not a hash")
        calls = [log.append(user, number, "user", "x") for number in (conversation, broken, conversation)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answers[1], RedisUnavailable)
        assert len(await core.shown(log, user, conversation)) == 2

    async def test_a_lease_from_before_the_clock_was_set_back_keeps_nobody_waiting(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        flush_shard(redis, settings, shard)
        core.forget(redis, user, conversation, settings)
        redis.set(keys.loading(shard, conversation), "somebody", px=3_600_000)
        await log.append(user, conversation, "user", "a")

    async def test_cancelled_writes_are_kept_once_or_not_at_all(self, settings, redis, log, user, shard, conversation) -> None:
        """The outcome is unknown to whoever hung up; a retry with the key settles it."""
        for i in range(20):
            writing = asyncio.create_task(log.append(user, conversation, "user", str(i), key=client_key(str(i))))
            await asyncio.sleep(i * 0.0002)
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        for i in range(20):
            await log.append(user, conversation, "user", str(i), key=client_key(str(i)))
        assert sorted(await core.shown(log, user, conversation), key=int) == [str(i) for i in range(20)]

    async def test_close_leaves_no_task_and_no_thread(self, settings, redis, user) -> None:
        before = {task for task in asyncio.all_tasks() if not task.done()}
        client = connect(settings)
        log = PendingLog(client, settings, wake=lambda shard: None)
        await log.start()
        conversation = (await log.create(user, None)).conversation.id
        reads = [asyncio.create_task(log.read(user, conversation + 64 * i, "before", None, 5)) for i in range(1, 20)]
        await asyncio.gather(*reads)
        await log.close()
        await client.aclose()
        assert {task for task in asyncio.all_tasks() if not task.done()} == before
        assert log._background == set()


class TestWakeUp:
    async def test_a_flush_is_asked_for_once_until_one_begins(self, settings, redis, log, user, shard, conversation, wakes) -> None:
        for _ in range(5):
            await log.append(user, conversation, "user", "x")
        assert wakes == [shard]
        flush_shard(redis, settings, shard)
        await log.rename(user, conversation, "x")
        await log.delete(user, conversation)
        await log.create(user, None)
        assert wakes == [shard, shard]

    async def test_a_lost_one_is_asked_for_again_when_its_lease_is_over(self, redis, log, user, shard, conversation, wakes) -> None:
        assert 0 < redis.pttl(keys.wake(shard)) <= pending.WAKE_LEASE_MS
        redis.delete(keys.wake(shard))
        await log.append(user, conversation, "user", "x")
        redis.set(keys.wake(shard), "1", px=3_600_000)  # from before the clock was set back an hour
        await log.append(user, conversation, "user", "x")
        assert wakes == [shard] * 3

    async def test_the_lease_grows_with_the_age_of_the_log(self, redis, log, user, shard, conversation) -> None:
        redis.delete(keys.log(shard), keys.wake(shard))
        now = int(time.time() * 1e6)
        redis.xadd(keys.log(shard), {"x": "y"}, id=f"{keys.first_id_at(now - 40_000_000, shard)}-0")
        await log.append(user, conversation, "user", "x")
        assert redis.pttl(keys.wake(shard)) == pytest.approx(20_000, abs=2000)


def an_hour_ahead(redis, shard: int) -> int:
    """Puts a shard's clock where it would be if the server's had been set back an hour since; answers the tick."""
    tick = int(redis.get(keys.clock(shard))) + 3600 * 100_000
    redis.set(keys.clock(shard), tick)
    return tick
