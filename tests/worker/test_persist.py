"""A batch becomes rows: replays change nothing, bad entries go to the dead letters alone, and a deleted conversation stays deleted."""

from __future__ import annotations

import json
import os
from contextlib import closing

import orjson
import psycopg2
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests import core
from worker import backlog, keys
from worker.codec import auto_title, conversation_body, decode_entry, message_body, request_hash
from worker.errors import RedisUnavailable
from worker.flush import flush_shard
from worker.pending import client_key, reply_key
from worker.persist import decode_batch, persist_batch, readable, try_lock, unreadable

pytestmark = pytest.mark.anyio
EMPTIED = True


@pytest.fixture(params=["together", "apart"], autouse=True)
def way(request, monkeypatch) -> None:
    """Messages get in by one statement, or each by its own."""
    if request.param == "apart":
        monkeypatch.setattr("worker.persist.INSERT_CHARS_MAX", 1)


def persist(redis, settings, shard, batch=None):
    """One batch without its trim: what a crash between the two leaves."""
    url = settings.database_url.get_secret_value()
    with closing(psycopg2.connect(url, connect_timeout=10)) as connection, connection, connection.cursor() as cursor:
        assert try_lock(cursor, [shard])
        batch = core.fetched(redis, shard) if batch is None else batch
        return batch, persist_batch(cursor, settings.shards, decode_batch({shard: batch}))


class TestReplay:
    async def test_a_batch_that_was_committed_before_changes_nothing(self, settings, redis, log, user, shard, conversation) -> None:
        first = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        await log.append(user, conversation, "assistant", "ho", key=reply_key(first.message.id))
        await log.rename(user, conversation, "title")
        gone = (await log.create(user, None, key=client_key("gone"))).conversation.id
        await log.append(user, gone, "user", "x")
        await log.delete(user, gone)
        seen = []
        for _ in range(3):
            _, persisted = persist(redis, settings, shard)
            assert (persisted.dead, persisted.withdrawn) == (0, [])
            seen.append((core.ask("SELECT * FROM conversation ORDER BY id"), core.ask("SELECT * FROM message ORDER BY id")))
        assert seen[0] == seen[1] == seen[2]
        assert len(seen[0][1]) == 2
        flush_shard(redis, settings, shard)
        core.assert_clean(redis, settings)

    async def test_a_batch_that_comes_again_is_no_error_in_the_log_of_postgres(
        self, settings, redis, log, user, shard, conversation, postgres, monkeypatch
    ) -> None:
        """Which would show the statement, and the messages in it, unless somebody has told Postgres not to."""
        said = [str(i) for i in range(5)]
        for content in said:
            await log.append(user, conversation, "user", content, key=client_key(content))

        def away(*_, **__):
            raise RedisUnavailable()

        errors = postgres.log.read_text().count("ERROR")
        with monkeypatch.context() as patched:
            patched.setattr(backlog, "trim", away)
            with pytest.raises(RedisUnavailable):
                flush_shard(redis, settings, shard)
        await log.append(user, conversation, "user", "after")
        assert flush_shard(redis, settings, shard).messages == 1
        assert core.contents(conversation) == [*said, "after"]
        assert postgres.log.read_text().count("ERROR") == errors
        core.assert_clean(redis, settings)

    async def test_a_replayed_beginning_of_the_log_does_not_bring_an_old_title_back(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        """A smaller batch than the one whose trim was lost, or a dead letter, comes after what followed it."""
        await log.append(user, conversation, "user", "named by the first message")
        batch, _ = persist(redis, settings, shard)
        await log.rename(user, conversation, "named by a person")
        flush_shard(redis, settings, shard)
        persist(redis, settings, shard, batch)
        assert core.ask("SELECT title FROM conversation") == [("named by a person",)]

    async def test_a_replayed_beginning_of_the_log_does_not_bring_a_deleted_conversation_back(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        await log.append(user, conversation, "user", "to be forgotten")
        await log.rename(user, conversation, "this too")
        batch, _ = persist(redis, settings, shard)
        await log.delete(user, conversation)
        flush_shard(redis, settings, shard)
        persist(redis, settings, shard, batch)
        assert core.ask("SELECT title FROM conversation WHERE deleted_at IS NOT NULL") == [(None,)]
        assert core.contents(conversation) == []

    async def test_activity_is_the_latest_message_and_a_title_does_not_move_it(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        await log.append(user, conversation, "user", "a")
        last = (await log.append(user, conversation, "user", "b")).message.microseconds
        redis.set(keys.clock(shard), int(redis.get(keys.clock(shard))) + 10)
        await log.rename(user, conversation, "title")
        seen = (await log.changed(user))[conversation].updated
        flush_shard(redis, settings, shard)
        [(updated,)] = core.ask("SELECT updated_at FROM conversation")
        assert seen == last == int(updated.timestamp() * 1e6 + 0.5)


class TestWithdrawn:
    """A retry under a key that Redis had lost is acknowledged under another id; Postgres knows better."""

    async def _twice(self, settings, redis, log, user, shard, conversation, second: str):
        first = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        flush_shard(redis, settings, shard)
        redis.hdel(keys.retry_keys(shard, conversation), client_key("a"))  # `k` still says that all are here
        again = await log.append(user, conversation, "user", second, key=client_key("a"))
        assert not again.replayed
        return first, again

    async def test_the_same_request_is_one_message(self, settings, redis, log, user, shard, conversation) -> None:
        first, _ = await self._twice(settings, redis, log, user, shard, conversation, "hi")
        report = flush_shard(redis, settings, shard)
        assert (report.messages, report.dead_letters) == (0, 0)
        assert core.contents(conversation) == ["hi"] == await core.shown(log, user, conversation)
        again = await log.append(user, conversation, "user", "hi", key=client_key("a"))
        assert (again.replayed, again.message) == (True, first.message)
        core.assert_clean(redis, settings)

    async def test_another_body_is_a_dead_letter(self, settings, redis, log, user, shard, conversation) -> None:
        await self._twice(settings, redis, log, user, shard, conversation, "something else")
        await log.append(user, conversation, "user", "after it")
        assert flush_shard(redis, settings, shard).dead_letters == 1
        assert core.dead_letters() == ["key_conflict"]
        assert core.contents(conversation) == ["hi", "after it"] == await core.shown(log, user, conversation)
        assert "something else" in core.ask("SELECT entry FROM dead_letter")[0][0]
        core.assert_clean(redis, settings)

    async def test_another_body_under_a_known_id_is_a_dead_letter(self, settings, redis, log, user, shard, conversation) -> None:
        first = (await log.append(user, conversation, "user", "hi")).message.id
        flush_shard(redis, settings, shard)
        redis.delete(keys.log(shard))
        core.plant(redis, shard, f"{first}-0", b=core.message_entry(user, conversation, "forged"))
        flush_shard(redis, settings, shard)
        assert core.dead_letters() == ["id_conflict"]
        assert core.contents(conversation) == ["hi"]

    async def test_a_created_conversation_whose_key_is_anothers_is_kept_without_it(self, settings, redis, log, user, shard) -> None:
        first = (await log.create(user, None, key=client_key("a"))).conversation
        flush_shard(redis, settings, shard)
        redis.hdel(keys.created_keys(shard, user), client_key("a"))
        second = (await log.create(user, None, key=client_key("a"))).conversation
        await log.append(user, second.id, "user", "kept")
        assert flush_shard(redis, settings, shard).dead_letters == 0
        assert core.contents(second.id) == ["kept"]
        assert core.ask("SELECT id, idempotency_key FROM conversation ORDER BY id") == [(first.id, "k:a"), (second.id, None)]


class TestTombstone:
    async def test_a_batch_in_a_flushers_hands_does_not_bring_a_deleted_conversation_back(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        await log.append(user, conversation, "user", "hi")
        batch, _ = persist(redis, settings, shard)
        await log.delete(user, conversation)
        flush_shard(redis, settings, shard)
        _, persisted = persist(redis, settings, shard, batch)
        assert (persisted.messages, persisted.dead) == (0, 0)
        assert core.contents(conversation) == []
        assert core.ask("SELECT deleted_at IS NULL, title FROM conversation") == [(False, None)]

    async def test_messages_before_the_deletion_in_the_same_batch_are_gone_too(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        await log.append(user, conversation, "user", "hi")
        await log.delete(user, conversation)
        other = (await log.create(user, "other")).conversation.id
        await log.append(user, other, "user", "stays")
        flush_shard(redis, settings, shard)
        assert (core.contents(conversation), core.contents(other), core.dead_letters()) == ([], ["stays"], [])
        core.assert_clean(redis, settings)


class TestPoison:
    """What somebody puts straight into the log: it goes to the dead letters, readable, and takes nobody along."""

    @pytest.mark.parametrize(
        "fields",
        [
            {"foo": "bar"},
            {"foo": "bar", "k": "m", "t": "1"},
            {"b": "not JSON"},
            {"b": b"\xff\xfe\x00"},
            {"b": "[]"},
            {"b": "null"},
            {"b": "7"},
            {"b": "{}"},
            {"b": "[" * 5000},
            {"b": '{"content":"\\ud800"}'},
            {"k": "q"},
            {"k": ""},
            {"k": "md"},
            {"k": b"\xff"},
            {"k": "c", "b": {"title": 7}},
            {"k": "c", "b": {"title": "\x00"}},
            {"k": "c", "b": {"title": "x" * 201}},
            {"k": "c", "b": {"title": None}, "a": "h" * 65},
            {"k": "c", "b": {"title": None}, "x": "k:\x00"},
            {"k": "c", "b": {"title": None, "user_id": 999_999}},
            {"k": "r", "b": {"title": None}},
            {"k": "r", "b": {"title": ["x"]}},
            {"k": "r", "b": {}},
            {"t": "yesterday"},
            {"t": ""},
            {"t": "-1"},
            {"t": "1e5"},
            {"t": "9" * 30},
            {"t": "253402300800000000"},
            {"t": "9" * 5000},
            {"x": "k" * 500},
            {"x": b"\xc3"},
            {"x": "k:\x00"},
            {"a": "t" * 500},
            {"a": "\x00"},
            {"b": {"role": "system"}},
            {"b": {"role": ["user"]}},
            {"b": {"role": None}},
            {"b": {"status": "done"}},
            {"b": {"content": "a\x00b"}},
            {"b": {"content": None}},
            {"b": {"content": 7}},
            {"b": {"content": {"a": 1}}},
            {"b": {"user_id": "1"}},
            {"b": {"user_id": True}},
            {"b": {"user_id": 1.0}},
            {"b": {"user_id": -1}},
            {"b": {"user_id": 0}},
            {"b": {"user_id": 1 << 53}},
            {"b": {"user_id": 999_999}},
            {"b": {"conversation_id": (1 << 53) - 64}},
            {"b": {"conversation_id": 1 << 62}},
            {"b": {"conversation_id": 17}},
            {"b": {"conversation_id": None}},
            {"b": b'{"conversation_id":1' + b"0" * 400 + b"}"},
        ],
        ids=lambda fields: str(fields)[:40],
    )
    async def test_is_buried_alone(self, settings, redis, log, user, shard, conversation, fields) -> None:
        """Beside it, before and behind, are messages of the same conversation."""
        await log.append(user, conversation, "user", "before", key=client_key("a"))
        wanted = {name: value for name, value in fields.items() if name in ("k", "t", "b", "x", "a")}
        if isinstance(wanted.get("b", {}), dict):
            sound = {"conversation_id": conversation, "user_id": user, "role": "user", "content": "x", "status": "complete"}
            wanted["b"] = orjson.dumps(sound | wanted.get("b", {}))
        last = int(redis.xrevrange(keys.log(shard), count=1)[0][0].split(b"-")[0])
        planted_id = f"{last + 64}-0"
        if wanted.keys() == fields.keys() | {"b"}:
            core.plant(redis, shard, planted_id, **wanted)
        else:
            redis.xadd(keys.log(shard), fields, id=planted_id)
        await log.append(user, conversation, "user", "after")
        report = flush_shard(redis, settings, shard)
        assert (report.entries, report.messages, report.dead_letters) == (4, 2, 1)
        assert core.contents(conversation) == ["before", "after"] == await core.shown(log, user, conversation)
        [(entry_id, entry)] = core.ask("SELECT entry_id, entry FROM dead_letter")
        assert entry_id == planted_id
        json.loads(entry)
        assert (await log.append(user, conversation, "user", "before", key=client_key("a"))).replayed
        core.assert_clean(redis, settings)

    async def test_nul_that_was_overlooked_mixes_up_no_messages(self, settings, redis, log, user, shard, conversation, monkeypatch) -> None:
        """Texts are quoted all at once, with NULs between them."""
        monkeypatch.setattr("worker.codec._fit", lambda *_: True)
        await log.append(user, conversation, "user", "before")
        last = int(redis.xrevrange(keys.log(shard), count=1)[0][0].split(b"-")[0])
        core.plant(redis, shard, f"{last + 64}-0", b=core.message_entry(user, conversation, "a\x00b"))
        await log.append(user, conversation, "user", "after")
        report = flush_shard(redis, settings, shard)
        assert (report.messages, report.dead_letters) == (2, 1)
        assert core.contents(conversation) == ["before", "after"]
        assert core.ask("SELECT reason, error FROM dead_letter") == [("refused", "ValueError")]

    async def test_that_takes_the_number_of_the_message_before_it_does_not_take_its_place(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        """`XADD log *` gives it the last id and another sequence, because ids are ahead of what Redis would give."""
        await log.append(user, conversation, "user", "mine")
        planted = core.plant(redis, shard, b=core.message_entry(user, conversation, "planted"))
        assert planted.endswith(b"-1")
        await log.append(user, conversation, "user", "after")
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["mine", "after"]
        assert core.dead_letters() == ["malformed"]
        core.assert_clean(redis, settings)

    async def test_into_another_users_conversation_is_refused(self, settings, redis, log, user, shard, conversation) -> None:
        stranger = core.make_user()
        last = int(redis.xrevrange(keys.log(shard), count=1)[0][0].split(b"-")[0])
        for i, kind in enumerate("mrdc", 1):
            body = (
                message_body(conversation, stranger, "user", "x", "complete")
                if kind == "m"
                else conversation_body(conversation, stranger, "x")
            )
            core.plant(redis, shard, f"{last + 64 * i}-0", k=kind, b=body)
        await log.append(user, conversation, "user", "mine")
        flush_shard(redis, settings, shard)
        assert core.dead_letters() == ["no_conversation"] * 4
        assert core.contents(conversation) == ["mine"] == await core.shown(log, user, conversation)
        core.assert_clean(redis, settings)

    @pytest.mark.parametrize("alone", [True, False])
    async def test_into_another_users_conversation_changes_nothing_of_it(
        self, settings, redis, log, user, shard, conversation, alone
    ) -> None:
        """Neither its activity nor its title, whether or not its owner writes at the same time."""
        flush_shard(redis, settings, shard)
        stranger = core.make_user()
        last = int(redis.get(keys.committed(shard)))
        core.plant(redis, shard, f"{last + 64}-0", b=core.message_entry(stranger, conversation), t=1_900_000_000_000_000, a="forged")
        if not alone:
            await log.append(user, conversation, "assistant", "mine")
        flush_shard(redis, settings, shard)
        assert core.dead_letters() == ["no_conversation"]
        assert core.contents(conversation) == ([] if alone else ["mine"])
        assert core.ask("SELECT title, updated_at < '2030-01-01' FROM conversation") == [(None, True)]

    async def test_does_not_run_over_into_its_neighbours(self, settings, redis, log, user, shard, conversation) -> None:
        """What would be one value of JSON, were they read together: with a message of somebody else's inside."""
        last = int(redis.get(keys.clock(shard))) * 64 + shard
        planted = [f"{last + 64}-0", f"{last + 128 + 64 * 1_000_000}-0"]
        forged = core.message_entry(user, conversation)
        core.plant(redis, shard, planted[0], b=forged[:-1] + b',"x":[1')
        redis.set(keys.clock(shard), last // 64 + 1)
        await log.append(user, conversation, "user", "mine")
        core.plant(redis, shard, planted[1], b=b"2]}," + forged + b"," + forged)
        assert flush_shard(redis, settings, shard).messages == 1
        assert core.dead_letters() == ["malformed"] * 2
        assert core.contents(conversation) == ["mine"]

    async def test_that_belongs_into_another_shards_log_is_refused(self, settings, redis, log, user, shard, conversation) -> None:
        """It would be written without the lock that orders what is written there."""
        neighbour = core.make_user()
        theirs = (await log.create(neighbour, None)).conversation.id
        message = (await log.append(neighbour, theirs, "user", "theirs")).message.id
        core.flush_all(redis, settings)
        core.plant(redis, shard, f"{message + 64}-0", b=core.message_entry(neighbour, theirs))
        flush_shard(redis, settings, shard)
        assert core.dead_letters() == ["other_shard"]
        assert core.contents(theirs) == ["theirs"]
        core.assert_clean(redis, settings)

    async def test_with_a_number_from_another_shard_or_a_far_future_marks_nothing_as_committed(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        """`committed` decides what may expire: it moves only with ids that an append gave."""
        with core.gates():
            core.plant(redis, shard, f"{(1 << 53) - 1}-0", b=core.message_entry(user, conversation))
            flusher = core.Flusher(lambda: flush_shard(redis, settings, shard))
            flusher.finish()
        first = await log.append(user, conversation, "user", "kept")
        assert int(redis.get(keys.committed(shard))) < first.message.id
        assert first.message.id < conversation + 64 * 100_000 * 60
        page = await log.read(user, conversation, "before", None, 5)
        assert page
        assert page.committed < first.message.id
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["kept"]
        core.assert_clean(redis, settings)

    @pytest.mark.parametrize("number", [(1 << 64) - 1, (1 << 63) + 5, (1 << 53) - 1, 1 << 53, 1 << 52])
    async def test_with_a_huge_number_blocks_its_shard_only_until_it_is_flushed(
        self, settings, redis, log, user, shard, conversation, number
    ) -> None:
        await log.append(user, conversation, "user", "before")
        core.plant(redis, shard, f"{number}-{(1 << 64) - 1}", b="{}")
        flush_shard(redis, settings, shard)
        after = await log.append(user, conversation, "user", "after")
        assert conversation < after.message.id < conversation + 64 * 100_000 * 3600
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["before", "after"]
        assert core.dead_letters() == ["malformed"]
        core.assert_clean(redis, settings)

    async def test_that_looks_like_an_id_from_the_future_passes_for_no_commit(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        """What is appended after it would be taken for committed while it is pending, and a new conversation's id for taken."""
        last = (await log.append(user, conversation, "user", "before")).message.id
        core.plant(redis, shard, f"{last + 64 * 100_000 * 60}-0", b="{")
        flush_shard(redis, settings, shard)
        assert int(redis.get(keys.committed(shard))) == last
        after = await log.append(user, conversation, "user", "after")
        assert after.committed < after.message.id
        assert redis.hget(keys.conversation(shard, conversation), "l") == b"%d" % after.message.id
        asked = []
        run = log._scripts.run
        monkeypatch.setattr(log._scripts, "run", lambda name, *rest, **named: asked.append(name) or run(name, *rest, **named))
        await log.create(user, None)
        assert asked == ["reserve", "create"]
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["before", "after"]
        core.assert_clean(redis, settings)

    async def test_among_thousands_is_found_by_halving(self, settings, redis, log, user, shard, conversation, monkeypatch) -> None:
        """What passes the check and is refused by Postgres all the same: a new conversation of nobody."""
        last = int(redis.xrevrange(keys.log(shard), count=1)[0][0].split(b"-")[0])
        with redis.pipeline(transaction=False) as pipeline:
            for i in range(1, 1001):
                nobody = i in (1, 500, 501, 1000)
                number = last + 64 * i
                body = conversation_body(number - 1024 * 64, 999_999) if nobody else core.message_entry(user, conversation, str(i))
                pipeline.xadd(
                    keys.log(shard),
                    {"k": "c" if nobody else "m", "t": 1_800_000_000_000_000, "b": body, "x": "", "a": ""},
                    id=f"{number}-0",
                )
            pipeline.execute()
        report = flush_shard(redis, settings, shard)
        assert (report.entries, report.messages, report.dead_letters) == (1001, 996, 4)
        assert core.dead_letters() == ["refused"] * 4
        assert {row[0] for row in core.ask("SELECT error FROM dead_letter")} == {"ForeignKeyViolation 23503"}
        assert core.contents(conversation) == [str(i) for i in range(1, 1001) if i not in (1, 500, 501, 1000)]

    @pytest.mark.parametrize("messages", [0, 1])
    async def test_of_the_users_own_conversation_leaves_it_able_to_expire(self, settings, redis, log, user, shard, messages) -> None:
        """Real entries that Postgres cannot take, because their user is gone: nothing of them stays in Redis for ever."""
        created = (await log.create(user, None, key=client_key("a"))).conversation.id
        for _ in range(messages):
            await log.append(user, created, "user", "x", key=client_key("a"))
        core.ask('DELETE FROM "user"')
        assert flush_shard(redis, settings, shard).dead_letters == 1 + messages
        assert sorted(core.dead_letters()) == ["no_conversation"] * messages + ["refused"]
        core.assert_clean(redis, settings)


class TestReadable:
    @given(st.dictionaries(st.binary(max_size=8), st.binary(max_size=40), max_size=5))
    @hypothesis_settings(max_examples=200, deadline=None)
    async def test_whatever_bytes_an_entry_holds_they_come_back(self, fields) -> None:
        kept = readable(backlog.RawEntry.of(b"1-0", fields))
        assert kept.isascii()
        assert "\x00" not in kept
        assert unreadable(kept) == fields


class TestInsertable:
    async def test_whatever_is_accepted_can_be_inserted_and_comes_back_exactly(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        """The contract's point 7, for texts of every kind; in one batch, so that one that could not would be among the dead."""
        found: list[str] = []

        @given(st.lists(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=60), min_size=5))
        @hypothesis_settings(max_examples=60, deadline=None, database=None)
        def collect(contents: list[str]) -> None:
            found.extend(contents)

        collect()
        found = list(dict.fromkeys(found))[:2000]
        for i in range(0, len(found), 200):
            for content in found[i : i + 200]:
                await log.append(user, conversation, "user", content, key=client_key(os.urandom(8).hex()))
        report = flush_shard(redis, settings, shard)
        assert (report.messages, report.dead_letters) == (len(found), 0)
        assert core.contents(conversation) == found
        rows = core.ask("SELECT content, created_at FROM message ORDER BY id")
        assert all(row[1].tzinfo is not None for row in rows)

    async def test_the_hash_of_a_row_is_the_hash_of_its_request(self, settings, redis, log, user, shard, conversation) -> None:
        from worker.codec import HASH_SQL

        contents = ["a", "\\N\t\n", "ünïcödé 👩‍👩‍👧", "\x1f", "x" * 100_000]
        for content in contents:
            await log.append(user, conversation, "assistant", content, status="incomplete")
        flush_shard(redis, settings, shard)
        hashes = [row[0] for row in core.ask(f"SELECT {HASH_SQL} FROM message ORDER BY id")]
        assert hashes == [request_hash("assistant", "incomplete", content) for content in contents]


def test_every_entry_that_an_append_writes_is_sound(redis, settings) -> None:
    """Also the longest of everything."""
    number = 64 * 10**12 + 1
    decode_entry(
        b"%d-0" % (number + 64),
        {
            b"k": b"m",
            b"t": b"1800000000000000",
            b"b": message_body(number, 1, "assistant", "\U0001f600" * 100_000, "incomplete"),
            b"x": client_key("x" * 200).encode(),
            b"a": auto_title("ß" * 1000).encode(),
        },
    )
