"""Notices a worker that lives but does nothing while the log ages: `python -m worker.health`, and the watch inside each worker.

It is Celery's best known failure: after a lost broker connection a worker is connected, logs nothing and consumes nothing (celery #8030
and its kin, repaired four times). So a worker that has work waiting in its queue, a log that ages, and no task of its own for a while ends
itself, and whoever runs it starts it again (the local runner, Compose, systemd, Kubernetes). While Postgres is away nothing of this holds:
tasks run, and are postponed.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

import structlog
from celery import Celery
from redis import Redis

from worker import backlog
from worker.errors import TryAgainLater
from worker.settings import Settings, get_settings

STALLED_SECONDS = 24.0
"""Longer than a task takes whose Postgres is frozen (`flush_timeout_seconds`); with a look every 5 s it is noticed within 30 s."""
LOOK_SECONDS = 5.0
EXIT_CODE = 70
QUEUE = "celery"
_BROKER_SECONDS = 5.0
NOTE_SECONDS = 1.0
"""A busy worker has ten tasks a second, and each note is an fsync of the log's server, which everybody waits for."""

log = structlog.get_logger(__name__)


_noted_at = float("-inf")


def note_activity(client: Redis) -> None:
    """Called when a task begins or ends; notes it, but not more often than `NOTE_SECONDS`."""
    global _noted_at
    if time.monotonic() - _noted_at >= NOTE_SECONDS:
        backlog.note_worker(client, socket.gethostname(), time.time())
        _noted_at = time.monotonic()


def stalled(client: Redis, app: Celery, settings: Settings, host: str, now: float, since: float) -> str | None:
    """What is wrong with the worker on `host`, or None. `since`: when it began to be watched, so that a fresh one gets its time."""
    patience = max(STALLED_SECONDS, settings.flush_timeout_seconds + 4)
    backlogs = backlog.look(client, settings.shards)
    oldest = max((one.oldest_age_seconds for one in backlogs if one.entries), default=0.0)
    active = max(backlog.worker_active_at(client, host) or 0.0, since)
    if oldest < patience or now - active < patience:
        return None
    waiting = _queued(app)
    if not waiting:
        return None
    idle = now - active
    return f"the oldest pending entry has waited {oldest:.0f} s and {waiting} tasks are queued, but for {idle:.0f} s no task has run here"


def watch(client: Redis, app: Celery, settings: Settings) -> None:
    """Starts a thread that ends this process when it is stalled. In the worker's main process."""
    threading.Thread(target=_watch, args=(client, app, settings), name="watch", daemon=True).start()


def _watch(client: Redis, app: Celery, settings: Settings) -> None:
    since = time.time()
    while True:
        time.sleep(LOOK_SECONDS)
        try:
            problem = stalled(client, app, settings, socket.gethostname(), time.time(), since)
        except TryAgainLater as exc:
            since = time.time()  # without Redis no task can run; afterwards it gets its time again
            log.info("worker not looked at", error=type(exc).__name__)
            continue
        if problem:
            log.error("worker stalled, ending it", problem=problem)
            os._exit(EXIT_CODE)  # its main loop hangs, so nothing gentler reaches it; a killed flush is done again


def _queued(app: Celery) -> int:
    """Tasks that wait in the queue; 0 if the broker does not answer (then it is not the worker's fault)."""
    try:
        with app.connection_for_read(connect_timeout=_BROKER_SECONDS) as connection:
            return int(connection.default_channel.queue_declare(queue=QUEUE, passive=True).message_count)
    except Exception as exc:  # noqa: BLE001 - kombu raises the errors of every transport it knows
        log.info("queue not looked at", error=type(exc).__name__)
        return 0


def main() -> int:
    """For a health check: 0 if this host's worker is well, else 1 with the reason."""
    from worker.app import app
    from worker.tasks import client

    try:
        problem = stalled(client(), app, get_settings(), socket.gethostname(), time.time(), since=0.0)
    except TryAgainLater as exc:
        print(f"not known: {exc.detail}")  # noqa: T201 - a health check's answer
        return 0  # the stores have checks of their own; starting a worker again does not bring them back
    print(problem or "ok")  # noqa: T201
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
