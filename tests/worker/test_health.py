"""A worker that lives but does nothing is told from one that has nothing to do, or no store to do it with."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from redis import Redis

from worker import health, keys
from worker.broker import make_app
from worker.health import STALLED_SECONDS, note_activity, stalled
from worker.redis import connect_sync
from worker.settings import Settings
from worker.wakeups import send_flush

HOST = socket.gethostname()


@pytest.fixture
def redis(settings: Settings) -> Iterator[Redis]:
    with closing(connect_sync(settings)) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a test before."""
    monkeypatch.setattr(health, "_noted_at", float("-inf"))


def age_the_log(redis: Redis, seconds: float) -> None:
    """One entry that has waited this long."""
    then = int((time.time() - seconds) * 1e6)
    redis.xadd(keys.log(3), {"k": "m", "t": then, "b": "{}", "x": "", "a": ""}, id=f"{keys.first_id_at(then, 3)}-0")


class TestStalled:
    def look(self, redis: Redis, settings: Settings, later: float = 0.0, since: float = 0.0) -> str | None:
        return stalled(redis, make_app(settings), settings, HOST, time.time() + later, since)

    def test_work_waits_and_no_task_runs(self, settings: Settings, redis: Redis) -> None:
        age_the_log(redis, STALLED_SECONDS + 10)
        send_flush(make_app(settings), 3)
        note_activity(redis)
        assert self.look(redis, settings) is None
        problem = self.look(redis, settings, later=STALLED_SECONDS + 10)
        assert problem
        assert "1 tasks are queued" in problem

    def test_tasks_are_noted_once_a_second(self, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        def noted() -> bool:
            redis.delete(keys.WORKERS)
            note_activity(redis)
            return redis.exists(keys.WORKERS) == 1

        assert [noted(), noted()] == [True, False]
        monkeypatch.setattr(health, "NOTE_SECONDS", 0.0)
        assert noted()

    def test_one_that_was_just_started_gets_its_time(self, settings: Settings, redis: Redis) -> None:
        age_the_log(redis, STALLED_SECONDS + 10)
        send_flush(make_app(settings), 3)
        assert self.look(redis, settings, since=time.time()) is None

    def test_without_work_it_may_rest(self, settings: Settings, redis: Redis) -> None:
        send_flush(make_app(settings), 3)
        assert self.look(redis, settings) is None

    def test_an_empty_queue_is_not_its_fault(self, settings: Settings, redis: Redis) -> None:
        age_the_log(redis, STALLED_SECONDS + 10)
        assert self.look(redis, settings) is None

    def test_the_health_check_says_so(self, settings: Settings, redis: Redis) -> None:
        def check() -> tuple[int, str]:
            done = subprocess.run([sys.executable, "-m", "worker.health"], capture_output=True, text=True, timeout=60, check=False)
            return done.returncode, done.stdout.strip().splitlines()[-1]

        assert check() == (0, "ok")
        age_the_log(redis, STALLED_SECONDS + 10)
        send_flush(make_app(settings), 3)
        code, said = check()
        assert code == 1
        assert "no task has run" in said
