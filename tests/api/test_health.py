"""Alive, ready, and what has been counted."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from typing import Any

import psycopg2
import pytest
import redis
from fastapi import FastAPI
from starlette.testclient import TestClient

from api import health, metrics
from api.app import create_app
from tests.api.conftest import sign_up
from tests.api.test_errors import assert_problem
from tests.worker.test_redis import frozen, server_settings
from worker import database
from worker.backlog import ShardBacklog
from worker.embedded import EmbeddedPostgres, EmbeddedValkey
from worker.settings import Settings, get_settings

CHECKS = ["redis", "append_only_file", "fsync_always", "no_eviction", "memory", "postgres"]
NOWHERE = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the stores each time that it is asked."""
    monkeypatch.setattr(health, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(health, "QUERY_PAUSE_SECONDS", 0.0)


def ready(client: TestClient) -> tuple[int, str, list[str]]:
    """The status, the word for it, and the checks that fail; the answer came in time."""
    started = time.monotonic()
    answer = client.get("/readyz")
    assert time.monotonic() - started < 2
    body = answer.json()
    assert list(body["checks"]) == CHECKS
    failed = [name for name, check in body["checks"].items() if not check["ok"]]
    assert all(body["checks"][name]["detail"] for name in failed)
    return answer.status_code, body["status"], failed


def without(monkeypatch: pytest.MonkeyPatch, **urls: str) -> Settings:
    """Settings that lead nowhere. Celery's application keeps those that it was made with, so it is made before."""
    import_module("worker.app")
    for name, url in urls.items():
        monkeypatch.setenv(name, url)
    get_settings.cache_clear()
    return get_settings()


class TestAlive:
    def test_asks_neither_store(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        away = without(monkeypatch, DATABASE_URL=f"postgresql://a:b@{NOWHERE}/c", REDIS_URL=f"redis://{NOWHERE}/0")
        with TestClient(create_app(away)) as client:
            for path in ("/livez", "/healthz", "/livez/"):
                assert client.get(path).json() == {"status": "ok"}
                assert client.head(path).status_code == 200


class TestReady:
    def test_ok(self, client: TestClient) -> None:
        assert ready(client) == (200, "ok", [])
        assert client.head("/readyz").status_code == 200

    @pytest.mark.parametrize(
        ("name", "value", "check"),
        [
            ("appendonly", "no", "append_only_file"),
            ("appendfsync", "everysec", "fsync_always"),
            ("maxmemory_policy", "allkeys-lru", "no_eviction"),
            ("maxmemory", "1kb", "memory"),
        ],
    )
    def test_redis_that_cannot_keep_the_promise_is_named_and_not_written_to(
        self, client: TestClient, bearer: dict[str, str], conversation: int, redis_url: str, name: str, value: str, check: str
    ) -> None:
        path = f"/api/conversations/{conversation}/messages"
        with server_settings(redis_url, **{name: value}):
            assert ready(client) == (503, "unavailable", [check])
            assert client.get("/readyz").headers["retry-after"]
            refused = client.post(path, json={"role": "user", "content": "x"}, headers=bearer)
            assert_problem(refused, 503)
            assert int(refused.headers["retry-after"]) >= 1
            assert client.get(path, headers=bearer).json()["items"] == []
        assert ready(client) == (200, "ok", [])
        assert client.post(path, json={"role": "user", "content": "x"}, headers=bearer).status_code == 201

    def test_operator_may_accept_it_and_every_acknowledgement_says_so(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, redis_url: str
    ) -> None:
        monkeypatch.setenv("UNSAFE_DURABILITY", "1")
        get_settings.cache_clear()
        with TestClient(create_app()) as client, server_settings(redis_url, appendfsync="no"):
            assert ready(client) == (200, "degraded", ["fsync_always"])
            answer = client.post("/api/conversations/", json={}, headers=sign_up(client, "ann@example.org"))
            assert (answer.status_code, answer.headers["x-durability"]) == (201, "memory")

    def test_redis_away(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        with TestClient(create_app(without(monkeypatch, REDIS_URL=f"redis://{NOWHERE}/0"))) as client:
            assert ready(client) == (503, "unavailable", CHECKS[:-1])

    def test_redis_frozen_and_back(self, client: TestClient, valkey: EmbeddedValkey) -> None:
        with frozen(valkey.pid):
            assert ready(client) == (503, "unavailable", CHECKS[:-1])
        assert ready(client) == (200, "ok", [])

    def test_postgres_away_is_only_degraded(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        with TestClient(create_app(without(monkeypatch, DATABASE_URL=f"postgresql://a:b@{NOWHERE}/c"))) as client:
            assert ready(client) == (200, "degraded", ["postgres"])

    def test_postgres_frozen_and_back(self, client: TestClient, postgres: EmbeddedPostgres) -> None:
        assert ready(client) == (200, "ok", [])
        with frozen(postgres.pid):
            assert ready(client) == (200, "degraded", ["postgres"])
        assert ready(client) == (200, "ok", [])

    def test_database_that_is_not_there_is_noticed_though_the_server_answers(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = settings.database_url.get_secret_value().rsplit("/", 1)[0] + "/no_such_database"
        with TestClient(create_app(without(monkeypatch, DATABASE_URL=url))) as client:
            assert ready(client) == (200, "degraded", ["postgres"])
            assert ready(client) == (200, "degraded", ["postgres"])

    def test_idle_postgres_is_left_asleep(self, client: TestClient, settings: Settings, database_url: str) -> None:
        assert ready(client) == (200, "ok", [])
        database.dispose()  # as Neon does with idle connections
        for _ in range(5):
            assert ready(client) == (200, "ok", [])
        with closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
            assert cursor.fetchone() == (0,)

    def test_failed_request_makes_it_ask(self, client: TestClient, app: FastAPI, database_url: str) -> None:
        assert ready(client) == (200, "ok", [])
        database.dispose()
        app.state.readiness.doubt_postgres()
        with _database_renamed(database_url):
            assert ready(client) == (200, "degraded", ["postgres"])
        assert ready(client) == (200, "ok", [])

    def test_many_who_ask_share_one_look(self, app: FastAPI, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(health, "FRESH_SECONDS", 1.0)

        async def rush() -> int:
            async with app.router.lifespan_context(app):
                with closing(redis.Redis.from_url(redis_url)) as admin:
                    await app.state.readiness.look()
                    before = _info_calls(admin)
                    found = await asyncio.gather(*(app.state.readiness.look() for _ in range(100)))
                    assert {one.status for one in found} == {"ok"}
                    return _info_calls(admin) - before

        assert asyncio.run(rush()) <= 6


class TestMetrics:
    def test_counts_requests_by_route_and_never_by_id(self, client: TestClient, bearer: dict[str, str], conversation: int) -> None:
        client.get(f"/api/conversations/{conversation}", headers=bearer)
        client.get("/api/nothing/secret-path")
        client.request("BREW", "/api/conversations/")
        text = client.get("/metrics").text
        assert 'route="/api/conversations/{conversation_id}",status="200"' in text
        assert 'method="other"' in text
        assert str(conversation) not in text
        assert "secret-path" not in text
        assert "BREW" not in text
        assert "example.org" not in text

    def test_counts_what_was_accepted_and_what_was_not(self, client: TestClient, bearer: dict[str, str], conversation: int) -> None:
        path = f"/api/conversations/{conversation}/messages"
        before = _values(client)
        for content in ("x", "y", ""):
            client.post(path, json={"role": "user", "content": content}, headers=bearer | {"Idempotency-Key": content or "z"})
        client.post(path, json={"role": "user", "content": "x"}, headers=bearer | {"Idempotency-Key": "x"})
        after = _values(client)
        assert after["chatkeep_accepted_total"] - before.get("chatkeep_accepted_total", 0) == 2
        name = 'chatkeep_problems_total{kind="unprocessable"}'
        assert after[name] - before.get(name, 0) == 1

    def test_shows_what_is_pending(self, client: TestClient, bearer: dict[str, str], conversation: int) -> None:
        shard = conversation % 64
        values = _values(client)
        assert values["chatkeep_redis_up"] == 1
        assert values[f'chatkeep_pending_entries{{shard="{shard:02d}"}}'] == 1
        assert values[f'chatkeep_pending_bytes{{shard="{shard:02d}"}}'] > 0
        assert values[f'chatkeep_pending_oldest_age_seconds{{shard="{shard:02d}"}}'] > 0

    def test_is_answered_without_redis(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        with TestClient(create_app(without(monkeypatch, REDIS_URL=f"redis://{NOWHERE}/0"))) as client:
            values = _values(client)
        assert values["chatkeep_redis_up"] == 0
        assert not any(name.startswith("chatkeep_pending") for name in values)

    def test_buckets_of_the_workers_are_cumulated(self, settings: Settings) -> None:
        stats = {
            "flushes": 3,
            "flushed_entries": 1207,
            "batch_le:10": 2,
            "batch_le:5000": 1,
            "seconds_le:0.01": 3,
            "flush_microseconds": 12_000,
        }
        text = metrics.render([ShardBacklog(3, 4, 500, 1.5)], stats).decode()
        assert 'chatkeep_flush_batch_entries_bucket{le="1"} 0.0' in text
        assert 'chatkeep_flush_batch_entries_bucket{le="10"} 2.0' in text
        assert 'chatkeep_flush_batch_entries_bucket{le="1000"} 2.0' in text
        assert 'chatkeep_flush_batch_entries_bucket{le="+Inf"} 3.0' in text
        assert "chatkeep_flush_batch_entries_sum 1207.0" in text
        assert "chatkeep_flush_duration_seconds_sum 0.012" in text
        assert 'chatkeep_pending_oldest_age_seconds{shard="03"} 1.5' in text

    def test_counts_stores_that_are_away(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, client: TestClient, bearer: dict[str, str]
    ) -> None:
        before = _values(client)
        with TestClient(
            create_app(without(monkeypatch, REDIS_URL=f"redis://{NOWHERE}/0", JWT_SECRET=settings.jwt_secret.get_secret_value()))
        ) as away:
            assert_problem(away.post("/api/conversations/", json={}, headers=bearer), 503)
            after = _values(away)
        assert after["chatkeep_redis_errors_total"] - before["chatkeep_redis_errors_total"] == 1


def _values(client: TestClient) -> dict[str, float]:
    lines = re.findall(r"^(chatkeep_\S+) (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def _info_calls(admin: redis.Redis) -> int:
    stats: Any = admin.info("commandstats")
    return int(stats.get("cmdstat_info", {}).get("calls", 0))


@contextmanager
def _database_renamed(url: str) -> Iterator[None]:
    """The database gone for a while, on a server that lives."""
    server, name = url.rsplit("/", 1)

    def run(*statements: str) -> None:
        with closing(psycopg2.connect(server + "/chatkeep")) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)

    run(f"ALTER DATABASE {name} RENAME TO {name}_away")
    try:
        yield
    finally:
        run(f"ALTER DATABASE {name}_away RENAME TO {name}")
