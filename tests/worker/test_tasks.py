"""The tasks: whatever happens to them costs seconds, not messages."""

from __future__ import annotations

import pytest

from tests import core
from worker import backlog, keys, pending
from worker.errors import BacklogFull, ConfigurationError, PostgresUnavailable, RedisUnavailable
from worker.pending import WAKE_LEASE_MS

pytestmark = pytest.mark.anyio
EMPTIED = True


@pytest.fixture
def tasks(settings, redis, monkeypatch):
    """The module (it reads the settings when it is imported), on this test's Redis."""
    from worker import tasks

    monkeypatch.setattr(tasks, "client", lambda: redis)
    tasks._failures.clear()
    return tasks


@pytest.fixture
def sent(tasks, monkeypatch) -> list[int]:
    """The shards whose flush was sent."""
    found: list[int] = []
    monkeypatch.setattr(tasks, "send_flush", lambda app, *shards: found.extend(shards))
    return found


def age(redis, shard: int, seconds: float) -> None:
    """An entry that was appended so long ago (or, with a set-back clock, in the future)."""
    now, micro = redis.time()
    moment = now * 1_000_000 + micro - int(seconds * 1e6)
    redis.xadd(keys.log(shard), {"k": "m", "t": moment, "b": "{}", "x": "", "a": ""}, id=f"{keys.first_id_at(moment, shard)}-0")


class TestSweep:
    def test_asks_once_for_every_shard_that_waits_too_long(self, redis, tasks, sent) -> None:
        age(redis, 3, 0.1)
        age(redis, 4, 1.5)
        age(redis, 5, 100)
        assert tasks.sweep() == {"asked": [4, 5]}
        assert tasks.sweep() == {"asked": []}
        assert sent == [4, 5]
        assert redis.pttl(keys.wake(4)) == pytest.approx(WAKE_LEASE_MS, abs=500)
        assert redis.pttl(keys.wake(5)) == pytest.approx(50_000, abs=1000), "an hour without a worker leaves no hour of tasks"
        redis.delete(keys.wake(4))
        assert tasks.sweep() == {"asked": [4]}

    @pytest.mark.parametrize("fields", [{"foo": "bar"}, {"t": "yesterday"}, {"t": ""}, {"t": "-5"}, {"t": "9" * 40}, {"t": b"\xff"}])
    @pytest.mark.parametrize("entry_id", ["*", "1-1", f"{(1 << 64) - 1}-1", f"{1 << 53}-0"])
    def test_finds_what_was_planted_too(self, redis, tasks, sent, fields, entry_id) -> None:
        redis.xadd(keys.log(3), fields, id=entry_id)
        age(redis, 4, 10)
        assert tasks.sweep() == {"asked": [3, 4]}

    def test_finds_what_was_appended_before_the_clock_was_set_back(self, redis, tasks, sent) -> None:
        age(redis, 3, -3600)
        assert tasks.sweep() == {"asked": [3]}

    def test_a_lease_from_before_the_clock_was_set_back_holds_nobody_up(self, redis, tasks, sent) -> None:
        age(redis, 3, 10)
        redis.set(keys.wake(3), "0", px=3_600_000)
        assert tasks.sweep() == {"asked": [3]}

    def test_redis_away_is_put_off(self, tasks, sent, monkeypatch) -> None:
        def away(*arguments):
            raise RedisUnavailable()

        monkeypatch.setattr(backlog, "look", away)
        assert tasks.sweep() == {"postponed": "RedisUnavailable"}


class TestFlush:
    async def test_reports_numbers_and_nothing_else(self, settings, redis, tasks, sent, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "secret")
        report = tasks.flush(shard)
        assert report["shards"] == [shard]
        assert report["messages"] == 1
        assert all(isinstance(one, (int, float)) for value in report.values() for one in (value if isinstance(value, list) else [value]))
        core.assert_clean(redis, settings)

    @pytest.mark.parametrize("shard", [-1, 16, 10**30])
    def test_a_shard_that_does_not_exist_is_refused(self, tasks, shard) -> None:
        assert tasks.flush(shard) == {"shards": [shard], "refused": "no such shard"}

    async def test_what_is_left_is_somebodys(self, settings, redis, tasks, sent, log, user, shard, conversation, monkeypatch) -> None:
        from worker import flush

        monkeypatch.setattr(flush, "FLUSH_LOOP_SECONDS", 0.0)
        monkeypatch.setattr(settings, "flush_batch_max", 1)
        await log.append(user, conversation, "user", "1")
        assert tasks.flush(shard)["more"]
        assert sent == [shard]

    @pytest.mark.parametrize("error", [PostgresUnavailable, RedisUnavailable, BacklogFull])
    async def test_a_store_that_is_away_is_tried_again_after_a_growing_pause(
        self, redis, tasks, sent, log, user, shard, conversation, wakes, monkeypatch, error
    ) -> None:
        def away(*arguments, **named):
            backlog.clear_wakes(redis, [shard])
            raise error()

        pauses = []
        with monkeypatch.context() as patched:
            patched.setattr(tasks, "flush_shards", away)
            for _ in range(10):
                result = tasks.flush(shard)
                assert result["postponed"] == error.__name__
                pauses.append(result["seconds"])
        assert 0.25 <= pauses[0] <= 0.5
        assert 2.5 <= pauses[-1] <= tasks.PAUSE_MAX_SECONDS
        wakes.clear()
        await log.append(user, conversation, "user", "x")
        age(redis, shard + 1, 10)
        assert wakes == [], "meanwhile nobody asks"
        assert tasks.sweep() == {"asked": [shard + 1]}
        redis.delete(keys.wake(shard))
        assert tasks.flush(shard)["messages"] == 1
        assert tasks._failures == {}

    async def test_a_postgres_that_is_too_slow_for_a_batch_gets_smaller_ones(
        self, settings, redis, tasks, sent, log, user, shard, conversation, monkeypatch
    ) -> None:
        """Or the shard would try the same batch for ever."""
        from worker import flush

        persist = flush.persist_batch

        def slow(cursor, shards, batch, *more):
            if len(batch.plan.raw) > 3:
                raise PostgresUnavailable()
            return persist(cursor, shards, batch, *more)

        monkeypatch.setattr(flush, "persist_batch", slow)
        monkeypatch.setattr(settings, "flush_batch_max", 16)
        said = [str(i) for i in range(20)]
        for content in said:
            await log.append(user, conversation, "user", content)
        for _ in range(40):
            tasks.flush(shard)
            if not redis.xlen(keys.log(shard)):
                break
        assert core.contents(conversation) == said
        core.assert_clean(redis, settings)


class TestTogether:
    """A task may name several shards."""

    async def test_are_flushed_in_one_batch(self, settings, redis, tasks, sent, log) -> None:
        for user in [core.make_user() for _ in range(3)]:
            await log.create(user, None)
        report = tasks.flush(*range(settings.shards), 99, -1)
        assert (report["batches"], report["entries"], report["shards"]) == (1, 3, list(range(settings.shards)))
        assert sent == []

    async def test_one_that_failed_gets_a_task_of_its_own(self, settings, redis, tasks, sent, log, monkeypatch) -> None:
        """Or a shard whose flush fails for ever would keep the others from theirs."""
        bad, good = (keys.shard_of_user(user, settings.shards) for user in await self._pending(log))
        flush_shards = tasks.flush_shards

        def refuses(client, settings, shards, halvings):
            if bad in shards:
                raise PostgresUnavailable()
            return flush_shards(client, settings, shards, halvings)

        monkeypatch.setattr(tasks, "flush_shards", refuses)
        assert tasks.flush(bad, good)["postponed"] == "PostgresUnavailable"
        assert set(tasks._failures) == {bad, good}
        assert tasks.flush(good)["messages"] == 1
        assert sent == []
        assert tasks.flush(bad, good)["shards"] == [good]
        assert sent == [bad]
        assert tasks.flush(bad)["postponed"] == "PostgresUnavailable"
        assert (redis.xlen(keys.log(bad)), redis.xlen(keys.log(good))) == (2, 0)

    async def test_all_are_held_when_they_fail_together(self, settings, redis, tasks, sent, log, wakes, monkeypatch) -> None:
        users = await self._pending(log)
        shards = [keys.shard_of_user(user, settings.shards) for user in users]

        def away(*arguments, **named):
            raise PostgresUnavailable()

        monkeypatch.setattr(tasks, "flush_shards", away)
        tasks.flush(*shards)
        assert all(redis.get(keys.wake(shard)) == b"0" for shard in shards)
        tasks.flush(*shards)
        assert (sent, tasks._failures) == ([shards[1]], {shards[0]: 2, shards[1]: 1})

    async def test_of_what_is_left_each_gets_its_own(self, settings, redis, tasks, sent, log, monkeypatch) -> None:
        from worker import flush

        shards = [keys.shard_of_user(user, settings.shards) for user in await self._pending(log)]
        monkeypatch.setattr(flush, "FLUSH_LOOP_SECONDS", 0.0)
        monkeypatch.setattr(settings, "flush_batch_max", 2)
        assert sorted(tasks.flush(*shards)["more"]) == sorted(shards)
        assert sorted(sent) == sorted(shards)

    @staticmethod
    async def _pending(log) -> list[int]:
        users = [core.make_user() for _ in range(2)]
        for user in users:
            await log.append(user, (await log.create(user, None)).conversation.id, "user", "x")
        return users


class TestInstallation:
    def test_the_number_of_shards_is_written_down_once(self, settings, redis, tasks, monkeypatch) -> None:
        tasks.check_installation()
        assert redis.get(keys.SHARDS) == b"16"
        tasks.check_installation()
        monkeypatch.setattr(settings, "shards", 8)
        with pytest.raises(ConfigurationError, match="SHARDS=16"):
            tasks.check_installation()
        assert redis.get(keys.SHARDS) == b"16"

    def test_of_two_that_start_first_with_different_numbers_one_is_refused(self, settings, redis, tasks, monkeypatch) -> None:
        note = backlog.note_shards

        def overtaken(client, shards):
            note(client, 8)
            note(client, shards)

        monkeypatch.setattr(backlog, "note_shards", overtaken)
        with pytest.raises(ConfigurationError, match="SHARDS=8"):
            tasks.check_installation()

    async def test_postgres_remembers_it_for_a_wiped_redis(self, settings, redis, tasks, log, user, conversation, monkeypatch) -> None:
        redis.flushall()
        monkeypatch.setattr(settings, "shards", 8)
        with pytest.raises(ConfigurationError, match="SHARDS=16"):
            tasks.check_installation()
        assert redis.get(keys.SHARDS) is None


def test_what_is_configured_agrees_with_itself(settings) -> None:
    from worker.broker import make_app
    from worker.flush import FLUSH_LOOP_SECONDS

    conf = make_app(settings).conf
    assert conf.task_time_limit > settings.flush_timeout_seconds + FLUSH_LOOP_SECONDS
    assert conf.broker_transport_options["visibility_timeout"] > conf.task_time_limit
    assert conf.task_acks_late
    assert conf.task_ignore_result
    assert conf.accept_content == ["json"]
    assert settings.redis_timeout_seconds < pending.ANSWER_WITHIN_SECONDS < 2
    assert settings.postgres_timeout_seconds * 1000 < pending.LOAD_LEASE_MS
    assert pending.LOAD_LEASE_MS > pending.ANSWER_WITHIN_SECONDS * 1000
