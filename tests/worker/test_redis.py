"""The clients, and what the monitor finds out about the server."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
import redis
import uvloop
from pydantic import SecretStr
from redis.asyncio import Redis as AsyncRedis

from worker.embedded import EmbeddedValkey
from worker.errors import ConfigurationError, NotDurable, RedisUnavailable
from worker.redis import STALE_SECONDS, Check, DurabilityMonitor, connect, connect_sync, durability, judge
from worker.settings import Settings

DURABLE = {
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
    "maxmemory-policy": "noeviction",
    "maxmemory": "0",
}


@contextmanager
def server_settings(url: str, **changes: str) -> Iterator[redis.Redis]:
    """The server with other settings for a while."""
    with closing(redis.Redis.from_url(url)) as admin:
        for name, value in changes.items():
            admin.config_set(name.replace("_", "-"), value)
        try:
            yield admin
        finally:
            for name, value in DURABLE.items():
                admin.config_set(name, value)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process stopped: its sockets stay open, and nothing is answered."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def losing_replies(url: str, to: bytes) -> Iterator[str]:
    """The server behind a proxy that passes everything on, and cuts the line instead of answering one command."""
    host, port = re.search(r"@([\d.]+):(\d+)", url).groups()  # type: ignore[union-attr]  # the tests' own URL
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection((host, int(port))) as server:
            while request := client.recv(65536):
                server.sendall(request)
                reply = server.recv(65536)
                if to in request:
                    return
                client.sendall(reply)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listener:
        yield url.replace(f"{host}:{port}", f"127.0.0.1:{listener.getsockname()[1]}")


def look(settings: Settings) -> dict[str, Check]:
    async def once() -> tuple[Check, ...]:
        client = connect(settings)
        try:
            return await durability(client, settings)
        finally:
            await client.aclose()

    return {check.name: check for check in asyncio.run(once())}


def failed(settings: Settings) -> list[str]:
    return [name for name, check in look(settings).items() if not check.ok]


class TestDurability:
    def test_durable_server_passes(self, settings: Settings) -> None:
        assert list(look(settings)) == ["redis", "append_only_file", "fsync_always", "no_eviction", "memory"]
        assert failed(settings) == []

    @pytest.mark.parametrize(
        ("name", "value", "check"),
        [
            ("appendonly", "no", "append_only_file"),
            ("appendfsync", "everysec", "fsync_always"),
            ("appendfsync", "no", "fsync_always"),
            ("no_appendfsync_on_rewrite", "yes", "fsync_always"),
            ("maxmemory_policy", "allkeys-lru", "no_eviction"),
            ("maxmemory_policy", "volatile-ttl", "no_eviction"),
            ("maxmemory", "1kb", "memory"),
        ],
    )
    def test_each_setting_that_can_lose_a_write_is_named(
        self, settings: Settings, redis_url: str, name: str, value: str, check: str
    ) -> None:
        with server_settings(redis_url, **{name: value}):
            found = look(settings)
        assert [name for name, one in found.items() if not one.ok] == [check]
        assert found[check].detail

    @pytest.mark.parametrize(("used", "ok"), [(89, True), (90, False), (200, False)])
    def test_memory_is_short_where_writes_begin_to_be_refused(self, used: int, ok: bool) -> None:
        answers: list[Any] = [[name.encode(), value.encode()] for name, value in (DURABLE | {"maxmemory": "100"}).items()]
        found = judge([*answers, b"loading:0\r\n", b"used_memory:%d\r\nmaxmemory:100\r\n" % used, b"role:master\r\n"])
        assert {check.name: check.ok for check in found}["memory"] == ok

    def test_replica_is_no_place_to_write(self, settings: Settings, redis_url: str) -> None:
        with server_settings(redis_url) as admin:
            admin.replicaof("127.0.0.1", "1")
            try:
                assert "redis" in failed(settings)
            finally:
                admin.replicaof("NO", "ONE")

    def test_what_is_not_answered_is_not_assumed(self) -> None:
        refusal = redis.ResponseError("NOPERM")
        info = [
            b"# Persistence\r\nloading:0\r\naof_enabled:1\r\naof_last_write_status:ok\r\n",
            b"used_memory:5\r\nmaxmemory:0\r\n",
            b"role:master\r\n",
        ]
        found = judge([refusal] * 5 + info)
        assert [check.name for check in found if not check.ok] == ["fsync_always", "no_eviction"]

    @pytest.mark.parametrize(
        ("line", "check"), [(b"aof_last_write_status:err", "append_only_file"), (b"loading:1", "redis"), (b"used_memory:100", "memory")]
    )
    def test_trouble_is_seen_in_what_the_server_tells(self, line: bytes, check: str) -> None:
        answers: list[Any] = [[name.encode(), value.encode()] for name, value in (DURABLE | {"maxmemory": "100"}).items()]
        found = judge([*answers, line + b"\r\n", b"", b"role:master\r\n"])
        assert [one.name for one in found if not one.ok] == [check]

    def test_wrong_password_is_told_without_it(self, settings: Settings) -> None:
        url = settings.redis_url.get_secret_value().replace("redis://:", "redis://:wrong")
        found = look(settings.model_copy(update={"redis_url": SecretStr(url)}))
        assert found["redis"].detail == "wrong user name or password"

    def test_server_that_is_away_is_an_answer(self, settings: Settings) -> None:
        found = look(settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")}))
        assert not any(check.ok for check in found.values())

    def test_frozen_server_is_an_answer_in_time(self, settings: Settings, valkey: EmbeddedValkey) -> None:
        started = time.monotonic()
        with frozen(valkey.pid):
            assert not look(settings)["redis"].ok
        assert time.monotonic() - started < settings.redis_timeout_seconds + 0.4


class TestMonitor:
    def test_refuses_before_the_first_look(self, settings: Settings) -> None:
        with pytest.raises(RedisUnavailable):
            DurabilityMonitor(settings).check()

    def test_old_look_proves_nothing(self, settings: Settings) -> None:
        now = 1000.0
        monitor = DurabilityMonitor(settings, clock=lambda: now)
        asyncio.run(_look_once(settings, monitor))
        monitor.check()
        now += STALE_SECONDS + 0.1
        with pytest.raises(RedisUnavailable):
            monitor.check()

    def test_names_what_is_wrong(self, settings: Settings, redis_url: str) -> None:
        monitor = DurabilityMonitor(settings)
        with server_settings(redis_url, appendfsync="everysec"):
            asyncio.run(_look_once(settings, monitor))
        with pytest.raises(NotDurable, match="fsync_always"):
            monitor.check()

    def test_operator_may_accept_it(self, settings: Settings, redis_url: str) -> None:
        monitor = DurabilityMonitor(settings.model_copy(update={"unsafe_durability": True}))
        with server_settings(redis_url, appendfsync="everysec"):
            asyncio.run(_look_once(settings, monitor))
        monitor.check()
        assert monitor.unsafe

    def test_new_connection_is_looked_at_before_it_is_used(self, settings: Settings, redis_url: str) -> None:
        async def after_a_restart() -> None:
            monitor = DurabilityMonitor(settings)
            client = connect(settings, monitor=monitor)
            await monitor.refresh_from(client)
            monitor.check()
            with server_settings(redis_url, appendfsync="everysec") as admin:
                admin.client_kill_filter(_type="normal", skipme=True)  # what a restart looks like from here
                await asyncio.sleep(0.05)
                await client.ping()
                with pytest.raises(NotDurable):
                    monitor.check()
            await client.aclose()

        asyncio.run(after_a_restart())

    def test_goes_on_looking_until_it_is_closed(self, settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("worker.redis.REFRESH_SECONDS", 0.02)

        async def watch() -> None:
            monitor = DurabilityMonitor(settings)
            client = connect(settings)
            await monitor.start(client)
            monitor.check()
            with server_settings(redis_url, appendonly="no"):
                await asyncio.sleep(0.3)
                with pytest.raises(NotDurable):
                    monitor.check()
            await asyncio.wait_for(monitor.close(), 2)
            await client.aclose()

        asyncio.run(watch())

    def test_many_who_ask_share_one_look(self, settings: Settings, redis_url: str) -> None:
        async def rush() -> None:
            monitor = DurabilityMonitor(settings)
            client = connect(settings)
            await monitor.refresh_from(client)
            with closing(redis.Redis.from_url(redis_url)) as admin:
                before = _calls(admin)
                await asyncio.gather(*(monitor.refresh() for _ in range(50)))
                assert 3 <= _calls(admin) - before <= 6
            await client.aclose()

        asyncio.run(rush())


class TestClients:
    def test_connection_that_uvloop_has_closed_is_an_outage(self, settings: Settings) -> None:
        """uvloop raises `RuntimeError` where asyncio raises `ConnectionResetError`; unhandled it was a 500."""

        async def use_it_after_its_end() -> None:
            client = connect(settings)
            connection = await client.connection_pool.get_connection()
            await connection.send_command("PING")
            await connection.read_response()
            connection._writer.transport.abort()
            await asyncio.sleep(0)
            with pytest.raises(redis.ConnectionError):
                await connection.send_command("PING")
            await connection.send_command("PING")  # it connects again
            assert await connection.read_response() == b"PONG"
            await client.connection_pool.release(connection)
            await client.aclose()

        uvloop.run(use_it_after_its_end())

    def test_cancellation_is_never_overheard(self, settings: Settings) -> None:
        async def survivors() -> int:
            client = connect(settings)
            survived = 0
            for _ in range(200):
                task = asyncio.create_task(_ping_forever(client))
                for _ in range(random.randrange(3, 60)):
                    await asyncio.sleep(0)
                task.cancel()
                done, _ = await asyncio.wait([task], timeout=1)
                survived += not done
                while not task.done():
                    task.cancel()
                    await asyncio.wait([task], timeout=0.01)
            await client.aclose()
            return survived

        assert asyncio.run(survivors()) == 0

    def test_nothing_is_sent_twice_when_the_reply_is_lost(self, settings: Settings, redis_url: str) -> None:
        async def increment(client: AsyncRedis) -> None:
            with pytest.raises(redis.ConnectionError):
                await client.incr("counter")
            await client.aclose()

        with losing_replies(redis_url, to=b"INCR") as url, closing(redis.Redis.from_url(redis_url)) as admin:
            through = settings.model_copy(update={"redis_url": SecretStr(url)})
            asyncio.run(increment(connect(through)))
            assert admin.getdel("counter") == b"1"
            with connect_sync(through) as client, pytest.raises(redis.ConnectionError):
                client.incr("counter")
            assert admin.getdel("counter") == b"1"

    def test_closed_connection_is_opened_again(self, settings: Settings, redis_url: str) -> None:
        async def use_after_kill() -> None:
            client = connect(settings)
            await client.ping()
            with closing(redis.Redis.from_url(redis_url)) as admin:
                admin.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.05)
            assert await client.ping()
            await client.aclose()

        asyncio.run(use_after_kill())
        with connect_sync(settings) as client:
            client.ping()
            with closing(redis.Redis.from_url(redis_url)) as admin:
                admin.client_kill_filter(_type="normal", skipme=True)
            assert client.ping()

    def test_more_callers_than_connections_wait(self, settings: Settings) -> None:
        async def rush() -> None:
            client = connect(settings)
            assert all(await asyncio.gather(*(client.ping() for _ in range(500))))
            await client.aclose()

        asyncio.run(rush())

    @pytest.mark.parametrize(
        "url", ["", "localhost", "http://localhost", "redis://localhost:x/0", "redis://localhost?socket_timeout=x", "redis://h?what=1"]
    )
    @pytest.mark.parametrize("make", [connect, connect_sync])
    def test_bad_address_is_one_clear_error(self, settings: Settings, url: str, make: Any) -> None:
        with pytest.raises(ConfigurationError, match="REDIS_URL is not"):
            make(settings.model_copy(update={"redis_url": SecretStr(url)}))

    @pytest.mark.parametrize(
        "url", ["redis://:pw@h:1/2", "rediss://u:pw@h/0", "unix:///tmp/s.sock?db=1", "redis://h?ssl_cert_reqs=none", "redis://[::1]:1"]
    )
    @pytest.mark.parametrize("make", [connect, connect_sync])
    def test_every_kind_of_address_makes_a_client(self, settings: Settings, url: str, make: Any) -> None:
        if url.endswith("ssl_cert_reqs=none"):
            url = url.replace("redis://", "rediss://")
        make(settings.model_copy(update={"redis_url": SecretStr(url)}))


async def _look_once(settings: Settings, monitor: DurabilityMonitor) -> None:
    client = connect(settings)
    await monitor.refresh_from(client)
    await client.aclose()


async def _ping_forever(client: AsyncRedis) -> None:
    while True:
        await client.ping()


def _calls(admin: redis.Redis) -> int:
    stats: Any = admin.info("commandstats")
    return int(stats.get("cmdstat_info", {}).get("calls", 0))
