"""The flush: what a crash leaves at each of its steps, who goes on after whom, and what it costs when there is nothing to do."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from tests import core
from worker import backlog, database, flush, keys
from worker.errors import PostgresUnavailable, RedisUnavailable
from worker.flush import flush_shard, flush_shards
from worker.pending import PendingLog, client_key, reply_key
from worker.persist import persist_batch

pytestmark = pytest.mark.anyio
EMPTIED = True


@pytest.fixture
def small_chunks(monkeypatch):
    """A trim takes two entries at a time."""
    monkeypatch.setattr(flush, "_TRIM_CHUNK", 2)


class TestCrash:
    @pytest.mark.parametrize(("step", "times"), [*((step, 1) for step in core.Flusher.STEPS), ("trim", 2), ("trim", 3)])
    async def test_at_any_step_loses_and_doubles_nothing(
        self, settings, redis, log, user, shard, conversation, small_chunks, step, times
    ) -> None:
        """Killed before this step; then more is said, and the next flush does the rest."""
        first = await log.append(user, conversation, "user", "1", key=client_key("a"))
        await log.append(user, conversation, "assistant", "2", key=reply_key(first.message.id))
        other = (await log.create(user, None, key=client_key("other"))).conversation.id
        await log.append(user, other, "user", "other")
        gone = (await log.create(user, None)).conversation.id
        await log.delete(user, gone)
        with core.gates():
            flusher = core.Flusher(lambda: flush_shard(redis, settings, shard))
            flusher.until(step)
            for _ in range(times - 1):
                flusher.step()
                flusher.until(step)
            flusher.kill()
        assert isinstance(flusher.failure, core.Killed)
        assert await core.shown(log, user, conversation) == ["1", "2"]
        assert await core.shown(log, user, other) == ["other"]
        assert (await log.append(user, conversation, "user", "1", key=client_key("a"))).replayed
        assert (await log.create(user, None, key=client_key("other"))).replayed
        await log.append(user, conversation, "user", "3")
        assert await core.shown(log, user, conversation) == ["1", "2", "3"]
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["1", "2", "3"]
        assert (core.contents(other), core.contents(gone), core.dead_letters()) == (["other"], [], [])
        assert (await log.append(user, conversation, "user", "1", key=client_key("a"))).reply_id is not None
        core.assert_clean(redis, settings)

    @pytest.mark.parametrize("times", range(1, 5))
    async def test_between_two_chunks_of_a_trim_leaves_nothing_that_nobody_settles(
        self, settings, redis, log, user, shard, small_chunks, times
    ) -> None:
        """Each conversation is settled with its own last entry, not with the batch's."""
        for i in range(4):
            await log.append(user, (await log.create(user, None)).conversation.id, "user", str(i))
        with core.gates():
            flusher = core.Flusher(lambda: flush_shard(redis, settings, shard))
            flusher.until("trim")
            for _ in range(times - 1):
                flusher.step()
            flusher.kill()
        flush_shard(redis, settings, shard)
        core.assert_clean(redis, settings)

    async def test_a_commit_whose_answer_is_lost_is_repeated_to_no_effect(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        await log.append(user, conversation, "user", "1")
        commit = database._commit

        def lost(connection):
            commit(connection)
            raise PostgresUnavailable()

        with monkeypatch.context() as patched:
            patched.setattr(database, "_commit", lost)
            with pytest.raises(PostgresUnavailable):
                flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["1"] == await core.shown(log, user, conversation)
        assert redis.xlen(keys.log(shard)) == 2
        assert flush_shard(redis, settings, shard).messages == 0
        assert core.contents(conversation) == ["1"]
        core.assert_clean(redis, settings)

    async def test_postgres_ends_a_flushers_transaction_and_the_next_one_takes_over(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        """One that was stalled with the log in its hands commits nothing, and trims nothing."""
        await log.append(user, conversation, "user", "1")
        with core.gates():
            stalled = core.Flusher(lambda: flush_shard(redis, settings, shard))
            stalled.until("persist")
            core.ask("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
            await log.delete(user, conversation)
            flush_shard(redis, settings, shard)
            assert core.contents(conversation) == []
            with pytest.raises(PostgresUnavailable):
                stalled.finish()
        assert core.contents(conversation) == []
        core.assert_clean(redis, settings)

    async def test_one_that_was_stalled_before_the_lock_writes_nothing_old(self, settings, redis, log, user, shard, conversation) -> None:
        """It reads the log when it has the lock, and not before."""
        await log.rename(user, conversation, "old")
        with core.gates():
            stalled = core.Flusher(lambda: flush_shard(redis, settings, shard), ("lock", "fetch"))
            other = core.Flusher(lambda: flush_shard(redis, settings, shard), ("wake",))
            stalled.until("lock")
            other.finish()
            await log.rename(user, conversation, "new")
            flush_shard(redis, settings, shard)
            stalled.finish()
        assert core.ask("SELECT title FROM conversation") == [("new",)]

    async def test_one_that_was_stalled_before_its_trim_takes_nothing_that_came_since(
        self, settings, redis, log, user, shard, conversation
    ) -> None:
        await log.append(user, conversation, "user", "1")
        with core.gates():
            stalled = core.Flusher(lambda: flush_shard(redis, settings, shard))
            stalled.until("trim")
            flush_shard(redis, settings, shard)
            await log.append(user, conversation, "user", "2", key=client_key("a"))
            redis.delete(keys.wake(shard))
            stalled.step()
            names = keys.of_conversation(shard, conversation)
            assert [redis.pttl(name) for name in names] == [-1, -1, -1]
            assert await core.shown(log, user, conversation) == ["1", "2"]
            assert stalled.finish().entries == 3, "nobody else was told to fetch what came since"
        assert core.contents(conversation) == ["1", "2"]
        core.assert_clean(redis, settings)

    async def test_a_trim_after_redis_was_wiped_touches_nothing_new(self, settings, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "1")
        with core.gates():
            stalled = core.Flusher(lambda: flush_shard(redis, settings, shard))
            stalled.until("trim")
            redis.flushall()
            await log.append(user, conversation, "user", "2")
            stalled.step()
            assert redis.pttl(keys.conversation(shard, conversation)) == -1
            stalled.finish()
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["1", "2"] == await core.shown(log, user, conversation)
        core.assert_clean(redis, settings)

    @pytest.mark.parametrize("step", ["wake", "fetch", "trim"])
    async def test_redis_away_in_the_middle_changes_nothing(
        self, settings, redis, log, user, shard, conversation, monkeypatch, step
    ) -> None:
        await log.append(user, conversation, "user", "1")

        def away(*arguments, **named):
            raise RedisUnavailable()

        with monkeypatch.context() as patched:
            patched.setattr(backlog, {"wake": "clear_wakes"}.get(step, step), away)
            with pytest.raises(RedisUnavailable):
                flush_shard(redis, settings, shard)
        assert core.contents(conversation) == (["1"] if step == "trim" else [])
        assert await core.shown(log, user, conversation) == ["1"]
        flush_shard(redis, settings, shard)
        assert core.contents(conversation) == ["1"]
        core.assert_clean(redis, settings)


class TestBatches:
    async def test_the_log_goes_in_batches_in_its_order(self, settings, redis, log, user, shard, conversation, monkeypatch) -> None:
        monkeypatch.setattr(settings, "flush_batch_max", 3)
        said = await say(log, user, conversation, 20)
        report = flush_shard(redis, settings, shard)
        assert (report.batches, report.entries, report.messages, report.more) == (7, 21, 20, [])
        assert core.contents(conversation) == said
        core.assert_clean(redis, settings)

    async def test_one_that_takes_too_long_says_that_there_is_more(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        monkeypatch.setattr(settings, "flush_batch_max", 1)
        monkeypatch.setattr(flush, "FLUSH_LOOP_SECONDS", 0.0)
        await log.append(user, conversation, "user", "1")
        report = flush_shard(redis, settings, shard)
        assert (report.batches, report.entries, report.more) == (1, 1, [shard])

    @pytest.mark.parametrize("entries_max", [1, 2, 7, 8, 9, 1000])
    async def test_fetch_takes_the_oldest_whole_and_in_order(self, redis, settings, shard, monkeypatch, entries_max) -> None:
        monkeypatch.setattr(backlog, "_FETCH_PAGE_FIRST", 2)
        monkeypatch.setattr(backlog, "_PART_FIRST", 2)
        monkeypatch.setattr(backlog, "_PART", 3)
        monkeypatch.setattr(backlog, "_ONE_PART", 0)
        ids = [redis.xadd(keys.log(shard), {"b": "x" * 10 * i}, id=f"{i}-{i % 2}") for i in range(1, 9)]
        assert [entry.id for entry in core.fetched(redis, shard, entries_max)] == ids[:entries_max]

    async def test_fetch_holds_about_as_many_bytes_as_it_may(self, redis, settings, shard) -> None:
        """And at least one entry, however large."""
        for i in range(1, 301):
            redis.xadd(keys.log(shard), {"b": "x" * 10_000}, id=f"{i}-0")
        assert len(core.fetched(redis, shard, 5000, 1)) == backlog._FETCH_PAGE_FIRST
        sizes = [entry.size for entry in core.fetched(redis, shard, 5000, 1_000_000)]
        assert 1_000_000 <= sum(sizes) < 1_100_000

    async def test_nothing_to_do_leaves_postgres_asleep(self, redis, settings, shard, monkeypatch) -> None:
        monkeypatch.setattr(flush, "transaction", None)
        assert flush_shard(redis, settings, shard).batches == 0

    async def test_who_finds_the_shard_locked_leaves_it(self, settings, redis, log, user, shard, conversation) -> None:
        with core.gates():
            first = core.Flusher(lambda: flush_shard(redis, settings, shard))
            first.until("commit")
            assert flush_shard(redis, settings, shard).busy
            first.finish()
        core.assert_clean(redis, settings)


class TestBeside:
    """Large parts are written by a thread, while the next are fetched."""

    @pytest.fixture(autouse=True)
    def _every_part(self, monkeypatch) -> None:
        monkeypatch.setattr(flush, "BESIDE_ENTRIES", 1)
        monkeypatch.setattr(backlog, "_FETCH_PAGE_FIRST", 2)
        monkeypatch.setattr(backlog, "_PART_FIRST", 2)
        monkeypatch.setattr(backlog, "_PART", 3)
        monkeypatch.setattr(backlog, "_ONE_PART", 0)

    @pytest.fixture
    def threads(self, monkeypatch) -> list[str]:
        """Who has written each part."""
        names = []

        def noted(*arguments):
            names.append(threading.current_thread().name)
            return persist_batch(*arguments)

        monkeypatch.setattr(flush, "persist_batch", noted)
        return names

    async def test_parts_go_in_the_logs_order_in_one_transaction(self, settings, redis, log, user, shard, conversation, threads) -> None:
        said = [str(i) for i in range(20)]
        for content in said:
            await log.append(user, conversation, "user", content, key=client_key(content))
        await log.rename(user, conversation, "old")
        await log.rename(user, conversation, "new")
        gone = (await log.create(user, None)).conversation.id
        await log.append(user, gone, "user", "x")
        await log.delete(user, gone)
        core.plant(redis, shard, b="{")
        report = flush_shard(redis, settings, shard)
        assert (report.batches, report.messages, report.dead_letters) == (1, 20, 1)
        assert len(threads) == 10
        assert threading.main_thread().name not in threads
        assert (core.contents(conversation), core.contents(gone)) == (said, [])
        assert core.ask("SELECT title FROM conversation ORDER BY id") == [("new",), (None,)]
        core.assert_clean(redis, settings)

    @pytest.mark.parametrize("part", [1, 2, 3])
    async def test_postgres_away_in_a_part_leaves_the_log_whole(
        self, settings, redis, log, user, shard, conversation, threads, monkeypatch, part
    ) -> None:
        await say(log, user, conversation, 9)
        persist = flush.persist_batch

        def away(cursor, *arguments):
            if len(threads) == part:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            return persist(cursor, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(flush, "persist_batch", away)
            with pytest.raises(PostgresUnavailable):
                flush_shard(redis, settings, shard)
        assert (core.contents(conversation), redis.xlen(keys.log(shard))) == ([], 10)
        assert flush_shard(redis, settings, shard).messages == 9
        core.assert_clean(redis, settings)

    async def test_redis_away_while_a_part_is_written_waits_for_it_and_commits_nothing(
        self, settings, redis, log, user, shard, conversation, threads, monkeypatch
    ) -> None:
        await say(log, user, conversation, 9)
        persist, pages, writing = flush.persist_batch, backlog._pages, threading.Event()
        written = []

        def slow(*arguments):
            writing.set()
            time.sleep(0.2)
            written.append(persist(*arguments))
            return written[-1]

        def away(*arguments):
            if writing.is_set():
                raise RedisUnavailable()
            return pages(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(flush, "persist_batch", slow)
            patched.setattr(backlog, "_pages", away)
            with pytest.raises(RedisUnavailable):
                flush_shard(redis, settings, shard)
        assert len(written) == 1
        assert (core.contents(conversation), redis.xlen(keys.log(shard))) == ([], 10)
        assert flush_shard(redis, settings, shard).messages == 9
        core.assert_clean(redis, settings)


class TestTrimBeside:
    """Full batches are trimmed by a thread, while the next one is written."""

    @pytest.fixture(autouse=True)
    def _every_batch(self, settings, monkeypatch) -> None:
        monkeypatch.setattr(flush, "BESIDE_ENTRIES", 2)
        monkeypatch.setattr(flush, "FLUSH_LOOP_SECONDS", 60)
        monkeypatch.setattr(settings, "flush_batch_max", 4)

    async def test_what_is_committed_and_still_there_is_not_read_again(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        said = await say(log, user, conversation, 17)
        trim, commit, steps = backlog.trim, flush._commit, []

        def late(*arguments, **named):
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.05)
                steps.append("trimmed")
            return trim(*arguments, **named)

        def noted(*arguments):
            batch = commit(*arguments)
            steps.append("committed")
            return batch

        monkeypatch.setattr(backlog, "trim", late)
        monkeypatch.setattr(flush, "_commit", noted)
        report = flush_shard(redis, settings, shard)
        assert (report.batches, report.entries, report.messages, report.more) == (5, 18, 17, [])
        assert steps == ["committed", *["committed", "trimmed"] * 4]
        assert core.contents(conversation) == said
        core.assert_clean(redis, settings)

    async def test_redis_away_meanwhile_fails_the_flush_and_the_next_one_finds_the_rest(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        said = await say(log, user, conversation, 17)

        def away(*_, **__):
            raise RedisUnavailable()

        with monkeypatch.context() as patched:
            patched.setattr(backlog, "trim", away)
            with pytest.raises(RedisUnavailable):
                flush_shard(redis, settings, shard)
        assert (len(core.contents(conversation)), redis.xlen(keys.log(shard))) == (7, 18), (
            "two batches, of which one began with the creation"
        )
        assert flush_shard(redis, settings, shard).entries == 18
        assert core.contents(conversation) == said
        core.assert_clean(redis, settings)


class TestRenames:
    """What is committed but not trimmed is written again, to no effect. A title would have one: there may be a later one."""

    async def test_another_flush_ends_its_batch_between_two_titles_that_are_committed(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        await log.rename(user, conversation, "old")
        await log.append(user, conversation, "user", "x")
        await log.rename(user, conversation, "new")
        monkeypatch.setattr(settings, "flush_batch_max", 4)
        with core.gates():
            first = core.Flusher(lambda: flush_shard(redis, settings, shard))
            first.until("trim")
            second = core.Flusher(lambda: flush_shards(redis, settings, [shard], 1))
            second.until("commit")
            first.finish()
            second.finish()
        assert core.ask("SELECT title FROM conversation") == [("new",)]
        core.assert_clean(redis, settings)

    async def test_another_flush_reads_a_full_batch_that_is_being_trimmed(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        monkeypatch.setattr(flush, "BESIDE_ENTRIES", 2)
        monkeypatch.setattr(flush, "FLUSH_LOOP_SECONDS", 60)
        monkeypatch.setattr(settings, "flush_batch_max", 4)
        await log.rename(user, conversation, "old")
        for content in ("a", "b", "c"):
            await log.append(user, conversation, "user", content)
        await log.rename(user, conversation, "new")
        await log.append(user, conversation, "user", "d")
        trim, decode = backlog.trim, flush.decode_batch
        trims, go_on, fetched, commit = (threading.Event() for _ in range(4))

        def late(*arguments, **named):
            if threading.current_thread().name.startswith("ThreadPool") and not trims.is_set():
                trims.set()
                assert go_on.wait(20)
            return trim(*arguments, **named)

        def held(part):
            if threading.current_thread().name == "second" and not fetched.is_set():
                fetched.set()
                assert commit.wait(20)
            return decode(part)

        monkeypatch.setattr(backlog, "trim", late)
        monkeypatch.setattr(flush, "decode_batch", held)
        first, second = (threading.Thread(target=flush_shard, args=(redis, settings, shard), name=name) for name in ("first", "second"))
        first.start()
        assert trims.wait(20)
        deadline = time.monotonic() + 20
        while core.ask("SELECT title FROM conversation") != [("new",)]:
            assert time.monotonic() < deadline, "its second batch was never committed"
            time.sleep(0.02)
        second.start()
        assert fetched.wait(20)
        go_on.set()
        first.join(20)
        assert redis.xlen(keys.log(shard)) == 0
        commit.set()
        second.join(20)
        assert core.ask("SELECT title FROM conversation") == [("new",)]
        core.assert_clean(redis, settings)

    async def test_one_in_a_half_of_a_batch(self, settings, redis, log, user, shard, conversation) -> None:
        """A bad row behind a title that was committed before."""
        await log.rename(user, conversation, "old")
        core.plant(redis, shard, b=core.message_entry(user, conversation + keys.SHARD_SLOTS))
        with core.gates():
            first = core.Flusher(lambda: flush_shard(redis, settings, shard))
            first.until("trim")
            core.ask("UPDATE conversation SET title = 'new'")  # in the place of one that is committed and trimmed
            flush_shard(redis, settings, shard)
            first.finish()
        assert core.ask("SELECT title FROM conversation") == [("new",)]


class TestTogether:
    """Shards that are flushed in one transaction."""

    @pytest.fixture
    async def three(self, settings, log) -> list[tuple[int, int, int]]:
        """(shard, user, conversation) in three shards, each with one message."""
        made = []
        for user in [core.make_user() for _ in range(3)]:
            conversation = (await log.create(user, None)).conversation.id
            await log.append(user, conversation, "user", f"of {user}", key=client_key("a"))
            made.append((keys.shard_of_user(user, settings.shards), user, conversation))
        assert len({shard for shard, _, _ in made}) == 3
        return made

    async def test_one_transaction_takes_them_all(self, settings, redis, three, monkeypatch) -> None:
        opened = []
        monkeypatch.setattr(flush, "transaction", lambda **named: opened.append(named) or database.transaction(**named))
        report = flush_shards(redis, settings, range(settings.shards))
        assert (report.batches, report.entries, report.messages, report.busy, report.more) == (1, 6, 3, [], [])
        assert len(opened) == 1
        assert [core.contents(conversation) for _, _, conversation in three] == [[f"of {user}"] for _, user, _ in three]
        assert core.ask("SELECT number FROM shard WHERE last_id > 0 ORDER BY number") == sorted((shard,) for shard, _, _ in three)
        core.assert_clean(redis, settings)

    @pytest.mark.parametrize("step", core.Flusher.STEPS)
    async def test_crash_at_any_step_loses_and_doubles_nothing_of_any(self, settings, redis, log, three, step) -> None:
        with core.gates():
            flusher = core.Flusher(lambda: flush_shards(redis, settings, [shard for shard, _, _ in three]))
            flusher.until(step)
            flusher.kill()
        for shard, user, conversation in three:
            assert await core.shown(log, user, conversation) == [f"of {user}"]
            assert (await log.append(user, conversation, "user", f"of {user}", key=client_key("a"))).replayed
            flush_shard(redis, settings, shard)
            assert core.contents(conversation) == [f"of {user}"]
        core.assert_clean(redis, settings)

    async def test_one_that_somebody_else_flushes_is_left_and_the_others_are_not(self, settings, redis, log, three) -> None:
        shards = [shard for shard, _, _ in three]
        with core.gates():
            other = core.Flusher(lambda: flush_shard(redis, settings, shards[1]))
            other.until("commit")
            report = flush_shards(redis, settings, shards)
            assert (report.busy, report.messages) == ([shards[1]], 2)
            assert [core.contents(conversation) for _, _, conversation in three][1] == []
            other.finish()
        core.assert_clean(redis, settings)

    async def test_bad_row_of_one_takes_nothing_of_the_others_along(self, settings, redis, log, three) -> None:
        core.plant(redis, three[0][0], b="{")
        core.plant(redis, three[1][0], b='{"content":"x"}')
        report = flush_shards(redis, settings, [shard for shard, _, _ in three])
        assert (report.messages, report.dead_letters, report.batches) == (3, 2, 1)
        assert sorted(core.ask("SELECT shard FROM dead_letter")) == sorted((shard,) for shard, _, _ in three[:2])
        core.assert_clean(redis, settings)

    async def test_what_was_planted_about_anothers_conversation_unsettles_nothing(self, settings, redis, log, three) -> None:
        (shard, user, conversation), (other, _, _), _ = three
        last = core.fetched(redis, shard)[-1]
        redis.delete(keys.log(other))
        redis.xadd(keys.log(other), last.fields, id=last.id)  # under the same id, even
        assert flush_shards(redis, settings, [other, shard]).dead_letters == 1
        assert core.ask("SELECT shard, reason FROM dead_letter") == [(other, "other_shard")]
        assert redis.hget(keys.conversation(shard, conversation), "l") == b"0"
        assert not redis.exists(keys.changed(other, user))
        assert core.contents(conversation) == [f"of {user}"]

    async def test_long_log_keeps_no_other_out(self, redis, settings, monkeypatch) -> None:
        for shard, count in ((3, 40), (4, 2), (5, 40)):
            for i in range(1, count + 1):
                redis.xadd(keys.log(shard), {"b": "x"}, id=f"{i}-0")
        monkeypatch.setattr(backlog, "_FETCH_PAGE_FIRST", 4)
        monkeypatch.setattr(backlog, "_PART_FIRST", 10)
        found: dict[int, list[backlog.RawEntry]] = {}
        parts = list(backlog.fetch(redis, [3, 4, 5, 6], 30, 1 << 20, {}))
        assert [sorted(part) for part in parts] == [[3, 4, 5], [3, 5]]
        for part in parts:
            for shard, entries in part.items():
                found.setdefault(shard, []).extend(entries)
        assert {shard: len(entries) for shard, entries in found.items()} == {3: 14, 4: 2, 5: 14}
        assert all([entry.id for entry in entries] == [b"%d-0" % i for i in range(1, len(entries) + 1)] for entries in found.values())

    @pytest.mark.parametrize("batch_max", [1, 2, 3, 4])
    async def test_batch_smaller_than_the_number_of_shards(self, settings, redis, log, three, monkeypatch, batch_max) -> None:
        monkeypatch.setattr(settings, "flush_batch_max", batch_max)
        report = flush_shards(redis, settings, [shard for shard, _, _ in three])
        assert (report.entries, report.messages, report.more) == (6, 3, [])
        assert report.batches >= 6 / max(batch_max, 3)
        core.assert_clean(redis, settings)

    async def test_what_lets_others_have_the_process_is_named(self, settings, redis, log, three, monkeypatch) -> None:
        monkeypatch.setattr(settings, "flush_batch_max", 1)
        monkeypatch.setattr(flush, "FLUSH_LOOP_SECONDS", 0.0)
        shards = [shard for shard, _, _ in three]
        assert sorted(flush_shards(redis, settings, shards).more) == sorted(shards)


class TestManyConversations:
    async def test_each_is_settled_whatever_else_is_in_the_batch(self, settings, redis, log, shard, small_chunks, monkeypatch) -> None:
        """Three users of one shard, created, talked in, renamed and deleted in every order, in chunks and batches of all sizes."""
        users = [core.make_user() for _ in range(2 * settings.shards + 1)][:: settings.shards]
        assert len({keys.shard_of_user(user, settings.shards) for user in users}) == 1
        shard = keys.shard_of_user(users[0], settings.shards)
        expected = {}
        for i, kinds in enumerate(itertools.permutations("mrd")):
            user = users[i % 3]
            conversation = (await log.create(user, None, key=client_key(str(i)))).conversation.id
            done = kinds[: kinds.index("d") + 1]
            for kind in done:
                if kind == "m":
                    await log.append(user, conversation, "user", "said", key=client_key("m"))
                elif kind == "r":
                    await log.rename(user, conversation, "renamed")
                elif i % 2:
                    await log.delete(user, conversation)
            expected[conversation] = None if i % 2 else ("renamed" if "r" in done else "said" if "m" in done else None)
        for batch_max in (1, 2, 3, 5):
            monkeypatch.setattr(settings, "flush_batch_max", batch_max)
            monkeypatch.setattr(flush, "FLUSH_LOOP_SECONDS", 0.0)
            flush_shard(redis, settings, shard)
        monkeypatch.undo()
        flush_shard(redis, settings, shard)
        assert dict(core.ask("SELECT id, title FROM conversation")) == expected
        core.assert_clean(redis, settings)


class TestReport:
    async def test_metrics_are_counted_and_their_loss_is_no_loss(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        await log.append(user, conversation, "user", "1")
        flush_shard(redis, settings, shard)
        stats = {name.decode(): int(value) for name, value in redis.hgetall(keys.STATS).items()}
        assert stats["flushes"] == 1
        assert (stats["flushed_entries"], stats["flushed_messages"], stats["batch_le:10"]) == (2, 1, 1)
        redis.set(keys.STATS, "not a hash")
        await log.append(user, conversation, "user", "2")
        assert flush_shard(redis, settings, shard).messages == 1

    async def test_a_log_line_names_no_content_and_no_user(self, settings, redis, log, user, shard, conversation, capsys) -> None:
        await log.append(user, conversation, "user", "a secret that nobody logs", key=client_key("secret-key"))
        core.plant(redis, shard, b='{"content":"another secret"}')
        flush_shard(redis, settings, shard)
        printed = "".join(capsys.readouterr())
        assert "dead_letters=1" in printed
        assert "secret" not in printed


async def say(log: PendingLog, user: int, conversation: int, count: int) -> list[str]:
    """Appends so many messages, one after the other."""
    said = [str(i) for i in range(count)]
    for content in said:
        await log.append(user, conversation, "user", content)
    return said
