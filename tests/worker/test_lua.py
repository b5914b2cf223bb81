"""The scripts by themselves: run twice, run late, run where a Redis Cluster would run them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from tests import core, schema
from worker import backlog, keys, scripts
from worker.embedded import EmbeddedValkey
from worker.errors import BacklogFull, NotDurable, RedisUnavailable
from worker.flush import flush_shard
from worker.pending import PendingLog, client_key
from worker.redis import connect, connect_sync
from worker.scripts import run, translate

pytestmark = pytest.mark.anyio
EMPTIED = True
NAMES = sorted(path.stem for path in (Path(scripts.__file__).parent / "lua").glob("*.lua") if path.stem != "common")


@pytest.mark.parametrize("name", NAMES)
def test_every_script_compiles_and_builds_no_key(redis: Redis, name: str) -> None:
    chosen = scripts.script(name)
    assert redis.script_load(chosen.source) == chosen.sha
    code = re.sub(r"--.*", "", chosen.source)
    assert "ck:" not in code
    assert "KEYS[" in code or "unpack(KEYS" in code


class TestLoad:
    def _load(self, redis: Redis, token: str) -> list[bytes]:
        names = [*keys.of_conversation(1, 65), keys.loading(1, 65)]
        arguments = [token, 900, 960, 1, "title", 1, 2, 129, 1, 1, 0, 1, 129, 5, "body", "k:a", "129:hash"]
        return run(redis, "load", names, arguments)

    def test_only_whoever_holds_the_lease_installs_and_only_once(self, redis) -> None:
        assert self._load(redis, "mine") == [b"LOST"]
        redis.set(keys.loading(1, 65), "another's")
        assert self._load(redis, "mine") == [b"LOST"]
        assert not redis.exists(keys.conversation(1, 65))
        redis.set(keys.loading(1, 65), "mine")
        assert self._load(redis, "mine") == [b"OK"]
        assert self._load(redis, "mine") == [b"LOST"]
        assert redis.hget(keys.conversation(1, 65), "l") == b"0"
        assert [redis.ttl(name) for name in keys.of_conversation(1, 65)] == pytest.approx([900, 960, 960], abs=1)

    def test_what_is_known_is_left_alone(self, redis) -> None:
        redis.hset(keys.conversation(1, 65), "t", "newer")
        redis.set(keys.loading(1, 65), "mine")
        assert self._load(redis, "mine") == [b"KNOWN"]
        assert redis.hgetall(keys.conversation(1, 65)) == {b"t": b"newer"}
        assert redis.pttl(keys.conversation(1, 65)) == -1

    def test_what_hung_on_an_expired_conversation_is_replaced(self, redis) -> None:
        redis.xadd(keys.messages(1, 65), {"t": 1, "b": "old"}, id="200-0")
        redis.hset(keys.retry_keys(1, 65), "k:old", "1:x")
        redis.set(keys.loading(1, 65), "mine")
        assert self._load(redis, "mine") == [b"OK"]
        assert [entry[0] for entry in redis.xrange(keys.messages(1, 65))] == [b"129-0"]
        assert redis.hkeys(keys.retry_keys(1, 65)) == [b"k:a"]


class TestLease:
    def test_one_holds_it_until_it_is_over(self, redis) -> None:
        assert run(redis, "lease", ["x"], ["mine", 2500])
        assert not run(redis, "lease", ["x"], ["yours", 2500])
        assert not run(redis, "turn", ["x"], ["yours", 0])
        assert run(redis, "turn", ["x"], ["mine", 0])
        assert run(redis, "lease", ["x"], ["yours", 2500])
        assert 0 < redis.pttl("x") <= 2500

    def test_one_from_before_the_clock_was_set_back_is_nobodys(self, redis) -> None:
        for lasting in (3_600_000, None):
            redis.set("x", "old", px=lasting)
            assert run(redis, "lease", ["x"], ["mine", 2500])
            assert redis.get("x") == b"mine"


class TestSeed:
    NAMES = (keys.clock(1), keys.committed(1), keys.log(1), keys.seeding(1))

    def _begin(self, redis: Redis, token: str) -> bytes:
        return run(redis, "seed_begin", [keys.seeding(1)], [token, 2500])

    def _seed(self, redis: Redis, token: str | bytes, highest: int) -> list[bytes]:
        return run(redis, "seed", self.NAMES, [token, highest, 0])

    def test_only_with_the_token_that_redis_holds(self, redis) -> None:
        assert self._seed(redis, "mine", 640) == [b"LATE"]
        assert self._begin(redis, "mine") == b"mine"
        redis.flushall()
        assert self._seed(redis, "mine", 640) == [b"LATE"]
        assert self._begin(redis, "another's") == b"another's"
        assert self._seed(redis, "mine", 640) == [b"LATE"]
        assert redis.keys() == [keys.seeding(1).encode()]
        assert self._seed(redis, "another's", 1280) == [b"OK"]
        assert self._seed(redis, "another's", 640) == [b"LATE"], "it is good once"
        assert [redis.get(name) for name in self.NAMES] == [b"20", b"1280", None, None]

    def test_several_share_a_token_and_each_has_its_full_time(self, redis) -> None:
        self._begin(redis, "first")
        for left in (20, 3_600_000):  # nearly over, and from before the clock was set back
            redis.pexpire(keys.seeding(1), left)
            assert self._begin(redis, "second") == b"first"
            assert redis.pttl(keys.seeding(1)) == pytest.approx(2500, abs=100)

    def test_the_highest_wins(self, redis) -> None:
        for highest in (1280, 640):
            assert self._seed(redis, self._begin(redis, "mine"), highest) == [b"OK"]
        assert [redis.get(name) for name in self.NAMES] == [b"20", b"1280", None, None]


class TestTrim:
    def _entries(self, redis: Redis, shard: int) -> list[backlog.RawEntry]:
        return core.fetched(redis, shard)

    def _trim(self, redis: Redis, shard: int, batch: list[backlog.RawEntry], *conversations: tuple[int, int]) -> backlog.Trimmed:
        one = backlog.Trim(shard, batch, keys.entry_number(batch[-1].id) or 0, conversations)
        return backlog.trim(redis, [one], ttl_seconds=900, messages_kept=10)[0]

    async def test_run_twice_and_late_it_does_nothing_more(self, settings, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "1", key=client_key("a"))
        batch = self._entries(redis, shard)

        def trim() -> backlog.Trimmed:
            return self._trim(redis, shard, batch, (conversation, user))

        assert trim() == backlog.Trimmed(0, True)
        core.assert_clean(redis, settings)
        assert trim() == backlog.Trimmed(0, True)
        core.assert_clean(redis, settings)
        later = await log.append(user, conversation, "user", "2")
        held = redis.get(keys.backlog_bytes(shard))
        assert trim() == backlog.Trimmed(1, True)
        assert redis.get(keys.backlog_bytes(shard)) == held
        assert int(redis.get(keys.committed(shard))) < later.message.id
        assert [redis.pttl(name) for name in keys.of_conversation(shard, conversation)] == [-1, -1, -1]
        assert redis.zscore(keys.changed(shard, user), conversation) == later.message.id

    async def test_takes_exactly_what_it_is_told(self, settings, redis, log, user, shard, conversation) -> None:
        """By their ids and never by their number: here one from the middle is missing already."""
        for i in range(5):
            await log.append(user, conversation, "user", str(i))
        everything = self._entries(redis, shard)
        batch = everything[:3]
        redis.xdel(keys.log(shard), batch[1].id)
        self._trim(redis, shard, batch)
        assert self._entries(redis, shard) == everything[3:]
        assert int(redis.get(keys.backlog_bytes(shard))) == sum(entry.size for entry in everything[3:])

    async def test_counts_nothing_down_that_another_trim_has_removed(self, settings, redis, log, user, shard, conversation) -> None:
        """A trim that comes late: its first entries are gone, the others are still there."""
        for i in range(5):
            await log.append(user, conversation, "user", str(i), key=client_key(str(i)))
        everything = self._entries(redis, shard)
        for end, gone in ((2, 2), (4, 4), (3, 4)):
            batch = everything[:end]
            self._trim(redis, shard, batch)
            assert self._entries(redis, shard) == everything[gone:]
            held = sum(entry.size for entry in everything[gone:])
            assert (int(redis.get(keys.backlog_bytes(shard))), redis.hgetall(keys.users(shard))) == (held, {b"%d" % user: b"%d" % held})

    async def test_what_a_restored_redis_lacks_is_not_counted_down(self, redis, log, user, shard, conversation) -> None:
        for i in range(5):
            await log.append(user, conversation, "user", str(i))
        batch = self._entries(redis, shard)
        for entry in batch[3:]:  # it was restored from before these, and counts as it did then
            redis.xdel(keys.log(shard), entry.id)
            redis.decrby(keys.backlog_bytes(shard), entry.size)
            redis.hincrby(keys.users(shard), str(user), -entry.size)
        later = await log.append(user, conversation, "user", "later")
        self._trim(redis, shard, batch)
        [left] = self._entries(redis, shard)
        assert keys.entry_number(left.id) == later.message.id
        assert (int(redis.get(keys.backlog_bytes(shard))), int(redis.hget(keys.users(shard), str(user)))) == (left.size, left.size)

    async def test_goes_on_where_redis_is_full(self, redis, log, user, shard, conversation) -> None:
        """Also where there is nothing left to be removed."""
        await log.append(user, conversation, "user", "x")
        batch = self._entries(redis, shard)
        try:
            redis.config_set("maxmemory", 1)
            for _ in range(2):
                self._trim(redis, shard, batch, (conversation, user))
        finally:
            redis.config_set("maxmemory", 0)
        assert redis.xlen(keys.log(shard)) == 0

    async def test_a_conversation_whose_copy_is_gone_is_settled_too(self, settings, redis, log, user, shard) -> None:
        conversation = (await log.create(user, None, key=client_key("a"))).conversation.id
        redis.delete(keys.conversation(shard, conversation))  # somebody emptied the cache by hand
        flush_shard(redis, settings, shard)
        core.assert_clean(redis, settings)


class TestTouch:
    async def test_gives_nothing_an_expiry_that_had_none(self, redis, log, user, shard, conversation) -> None:
        await log.append(user, conversation, "user", "1", key=client_key("a"))
        names = keys.of_conversation(shard, conversation)
        run(redis, "touch", names, [900, 960])
        assert [redis.pttl(name) for name in names] == [-1, -1, -1]


class TestForget:
    async def test_drops_a_copy_only_if_nothing_of_it_is_pending(self, settings, redis, log, user, shard, conversation) -> None:
        names = [*keys.of_conversation(shard, conversation), keys.loading(shard, conversation)]
        await log.append(user, conversation, "user", "1")
        redis.set(names[3], "somebody's", px=2500)
        assert not run(redis, "forget", names, [])
        assert redis.exists(names[0])
        flush_shard(redis, settings, shard)
        assert run(redis, "forget", names, [])
        assert not redis.exists(*names)


class TestCluster:
    @pytest.fixture
    def cluster(self) -> Iterator[EmbeddedValkey]:
        """One node that is a whole cluster: it refuses every call and every script whose keys lie in two slots."""
        with schema.state_directory() as directory:
            server = EmbeddedValkey(Path(directory), settings={"cluster-enabled": "yes", "cluster-allow-replica-migration": "no"})
            server.start()
            with Redis.from_url(server.url) as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
                while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
                    time.sleep(0.02)
                with pytest.raises(ResponseError, match="same slot"):
                    client.eval("redis.call('SET', KEYS[1], 1) redis.call('SET', KEYS[2], 1)", 2, "{a}", "{b}")
            yield server
            server.destroy()

    async def test_a_whole_life_never_crosses_slots(self, settings, cluster, monkeypatch) -> None:
        from pydantic import SecretStr

        monkeypatch.setattr(settings, "redis_url", SecretStr(cluster.url))
        monkeypatch.setattr(settings, "cache_messages_max", 1)
        client, redis = connect(settings), connect_sync(settings)
        log = PendingLog(client, settings, wake=lambda shard: None)
        await log.start()
        users = [core.make_user() for _ in range(3)]
        for user in users:
            shard = keys.shard_of_user(user, settings.shards)
            conversation = (await log.create(user, None, key=client_key("a"))).conversation.id
            first = await log.append(user, conversation, "user", "1", key=client_key("a"), turn="t")
            await log.keep_turn(user, conversation, "t")
            await log.end_turn(user, conversation, "t")
            await log.rename(user, conversation, "title")
            assert await core.shown(log, user, conversation) == ["1"]
            assert list(await log.changed(user)) == [conversation]
            assert flush_shard(redis, settings, shard).messages == 1
            await log._touch(keys.of_conversation(shard, conversation))
            core.forget(redis, user, conversation, settings)
            assert (await log.append(user, conversation, "user", "1", key=client_key("a"))).message == first.message
            assert (await log.create(user, None, key=client_key("a"))).replayed
            await log._ask_key(shard, conversation, user, client_key("a"))
            redis.hdel(keys.retry_keys(shard, conversation), client_key("a"))
            await log.append(user, conversation, "user", "1", key=client_key("a"))
            assert flush_shard(redis, settings, shard).messages == 0
            await log.delete(user, conversation)
            assert backlog.ask_for_flush(redis, shard) in (True, False)
            flush_shard(redis, settings, shard)
        await log._backlog.look()
        core.assert_clean(redis, settings)
        await log.close()
        await client.aclose()
        redis.close()


class TestTranslate:
    @pytest.mark.parametrize(
        ("error", "wanted"),
        [
            (OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), BacklogFull),
            (ResponseError("user_script:25: OOM command not allowed when used memory > 'maxmemory'. script: x"), BacklogFull),
            (ResponseError("MISCONF Errors writing to the AOF file"), NotDurable),
            (ResponseError("user_script:25: MISCONF Errors writing to the AOF file script: x"), NotDurable),
            (ReadOnlyError("You can't write against a read only replica."), NotDurable),
            (ResponseError("NOREPLICAS Not enough good replicas to write."), NotDurable),
            (ResponseError("ERR unknown"), RedisUnavailable),
            (ConnectionError(), RedisUnavailable),
        ],
    )
    def test_what_redis_refuses_because_it_could_not_keep_it_is_no_outage(self, error, wanted) -> None:
        assert type(translate(error)) is wanted

    async def test_a_replica_takes_no_write(self, redis, log, user, conversation) -> None:
        redis.replicaof("127.0.0.1", 1)
        try:
            with pytest.raises(NotDurable):
                await log.append(user, conversation, "user", "x")
        finally:
            redis.replicaof("no", "one")
