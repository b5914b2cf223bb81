"""Sends flush tasks: after the acknowledgement, off the event loop, and never more than a hint.

A task says only that a shard has work. It waits `FLUSH_INTERVAL_MS` here, so that company gathers while no worker is blocked by waiting.
When the broker is away or the process dies, nothing is lost but time: the wake lease runs out, and the next append or sweep asks again.
"""

from __future__ import annotations

import threading
import time
from collections import deque

import structlog
from celery import Celery

from worker import crashpoints

log = structlog.get_logger(__name__)
PACE_SECONDS = 0.02
"""Between two tasks. Each costs this process 0.65 ms, the worker and Postgres several, however little it finds to do: when every shard is
busy (16, ten times a second), all of them together wait longer, and each flush takes more with it."""
_CLOSE_SECONDS = 2.0


class Wakeups:
    """One thread that sends the flush of a shard a little after it was asked for; a shard that is already waiting is not sent twice."""

    def __init__(self, app: Celery, delay_seconds: float) -> None:
        self._app = app
        self._delay_seconds = delay_seconds
        self._due: deque[tuple[float, int]] = deque()
        self._last = float("-inf")
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="wakeups", daemon=True)
        self._thread.start()

    def ask(self, shard: int) -> None:
        """Sends the flush of `shard` after the delay. Returns at once; callable from any thread."""
        with self._changed:
            if all(waiting != shard for _, waiting in self._due):
                self._last = max(time.monotonic() + self._delay_seconds, self._last + PACE_SECONDS)
                self._due.append((self._last, shard))  # each is due after the one before it
                self._changed.notify()

    def close(self) -> None:
        """Sends what is waiting, now, and ends; bounded."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            send_flush(self._app, shard)

    def _next(self) -> int | None:
        with self._changed:
            while True:
                if self._due and (self._closing or self._due[0][0] <= time.monotonic()):
                    return self._due.popleft()[1]
                if self._closing:
                    return None
                self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)


def send_flush(app: Celery, shard: int) -> bool:
    """Sends one flush task, without retries (the broker's time-outs bound it); False if the broker did not take it.

    Any error is only logged: whatever the broker's client raises, the entry is safe and somebody asks again.
    """
    try:
        crashpoints.visit("wakeup:before_send")
        app.send_task("flush", args=(shard,), retry=False)
        crashpoints.visit("wakeup:sent")
    except Exception as exc:  # noqa: BLE001 - see above: kombu raises the errors of every transport it knows
        log.warning("flush task not sent", shard=shard, error=type(exc).__name__)
        return False
    return True
