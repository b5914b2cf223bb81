"""Flush tasks are sent after the delay, once, by a thread that nothing ends before `close`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from worker.broker import make_app
from worker.wakeups import PACE_SECONDS, Wakeups, send_flush

EMPTIED = True


class Broker:
    """Stands in for Celery: notes what it is sent, and when; may fail or hang."""

    def __init__(self) -> None:
        self.sent: list[tuple[tuple[int, ...], float]] = []
        self.failing = False
        self.hold = threading.Event()
        self.hold.set()

    def send_task(self, name: str, args: tuple[int, ...], retry: bool) -> None:
        assert (name, retry) == ("flush", False)
        self.hold.wait(10)
        if self.failing:
            raise ConnectionError("the broker is away")
        self.sent.append((args, time.monotonic()))

    @property
    def shards(self) -> list[tuple[int, ...]]:
        return [shards for shards, _ in self.sent]


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def wakeups(broker: Broker) -> Iterator[Wakeups]:
    made = Wakeups(broker, 0.05)  # type: ignore[arg-type]
    yield made
    made.close()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_shards_are_sent_together_once_after_the_delay(broker, wakeups) -> None:
    started = time.monotonic()
    for _ in range(5):
        wakeups.ask(7)
    wakeups.ask(3)
    wait_for(lambda: broker.sent)
    assert broker.shards == [(3, 7)]
    assert 0.05 <= broker.sent[0][1] - started < 1
    wakeups.ask(7)
    wait_for(lambda: len(broker.sent) == 2)
    assert broker.shards == [(3, 7), (7,)]
    assert broker.sent[1][1] - broker.sent[0][1] >= 0.05


def test_tasks_keep_a_distance_however_short_the_delay(broker) -> None:
    made = Wakeups(broker, 0.0)  # type: ignore[arg-type]
    started = time.monotonic()
    while len(broker.sent) < 5:
        made.ask(1)
    made.close()
    assert broker.sent[4][1] - started >= 4 * PACE_SECONDS


def test_asking_never_waits_for_the_broker(broker, wakeups) -> None:
    """One that hangs holds back what is sent, and nobody who asks."""
    broker.hold.clear()
    wakeups.ask(1)
    time.sleep(0.1)
    started = time.monotonic()
    for shard in range(64):
        wakeups.ask(shard)
    assert time.monotonic() - started < 0.05
    broker.hold.set()
    wait_for(lambda: broker.shards == [(1,), tuple(range(64))])


def test_a_failing_broker_does_not_end_it(broker, wakeups) -> None:
    broker.failing = True
    wakeups.ask(1)
    time.sleep(0.1)
    broker.failing = False
    wakeups.ask(2)
    wait_for(lambda: broker.shards == [(2,)])


def test_close_sends_what_waits_and_ends_the_thread(broker) -> None:
    made = Wakeups(broker, 60)  # type: ignore[arg-type]
    made.ask(1)
    made.ask(2)
    made.close()
    assert broker.shards == [(1, 2)]
    assert not made._thread.is_alive()


def test_close_is_bounded(broker, monkeypatch) -> None:
    from worker import wakeups

    monkeypatch.setattr(wakeups, "_CLOSE_SECONDS", 0.1)
    broker.hold.clear()
    made = Wakeups(broker, 0)  # type: ignore[arg-type]
    made.ask(1)
    started = time.monotonic()
    made.close()
    assert time.monotonic() - started < 1
    broker.hold.set()


def test_a_task_carries_shards_and_nothing_else(settings, redis) -> None:
    """On the real broker."""
    app = make_app(settings)
    assert send_flush(app, 5, 7)
    [message] = redis.lrange("celery", 0, -1)
    assert b'"argsrepr": "(5, 7)"' in message
    assert redis.llen("celery") == 1
    app.close()


def test_a_broker_that_is_away_is_no_error(settings, monkeypatch) -> None:
    from pydantic import SecretStr

    monkeypatch.setattr(settings, "celery_broker_url", SecretStr("redis://127.0.0.1:1/0"))
    app = make_app(settings)
    app.conf.broker_transport_options |= {"max_retries": 1, "interval_start": 0}
    assert send_flush(app, 5) is False
    app.close()
