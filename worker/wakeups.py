"""Sends flush tasks: after the acknowledgement, off the event loop, and never more than a hint.

A task says only which shards have work. It waits `FLUSH_INTERVAL_MS` here, so that company gathers while no worker is blocked by waiting.
When the broker is away or the process dies, nothing is lost but time: the wake lease runs out, and the next append or sweep asks again.
"""

from __future__ import annotations

import threading
import time

import structlog
from celery import Celery

from worker import crashpoints

log = structlog.get_logger(__name__)
PACE_SECONDS = 0.02
"""Between two tasks, however short the delay: each costs this process 0.65 ms, the worker and Postgres several."""
_CLOSE_SECONDS = 2.0


class Wakeups:
    """One thread that sends the flush of a shard a little after it was asked for, in one task with all that were asked for meanwhile."""

    def __init__(self, app: Celery, delay_seconds: float) -> None:
        self._app = app
        self._delay_seconds = delay_seconds
        self._asked: set[int] = set()
        self._due = self._last = float("-inf")
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="wakeups", daemon=True)
        self._thread.start()

    def ask(self, shard: int) -> None:
        """Sends the flush of `shard` after the delay at the latest. Returns at once; callable from any thread."""
        with self._changed:
            if not self._asked:
                self._due = max(time.monotonic() + self._delay_seconds, self._last + PACE_SECONDS)
                self._changed.notify()
            self._asked.add(shard)

    def close(self) -> None:
        """Sends what is waiting, now, and ends; bounded."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while shards := self._next():
            send_flush(self._app, *shards)

    def _next(self) -> list[int]:
        with self._changed:
            while not self._closing and not (self._asked and self._due <= time.monotonic()):
                self._changed.wait(self._due - time.monotonic() if self._asked else None)
            shards, self._asked = sorted(self._asked), set()
            self._last = time.monotonic()
            return shards


def send_flush(app: Celery, *shards: int) -> bool:
    """Sends one task that flushes these shards, without retries (the broker's time-outs bound it); False if the broker did not take it.

    Any error is only logged: whatever the broker's client raises, the entries are safe and somebody asks again.
    """
    try:
        crashpoints.visit("wakeup:before_send")
        app.send_task("flush", args=shards, retry=False)
        crashpoints.visit("wakeup:sent")
    except Exception as exc:  # noqa: BLE001 - see above: kombu raises the errors of every transport it knows
        log.warning("flush task not sent", shards=shards, error=type(exc).__name__)
        return False
    return True
