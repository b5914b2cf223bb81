"""The Celery tasks: an explicit name and one call each. An argument is a shard's number and never anything else."""

from __future__ import annotations

import os
import random
from dataclasses import asdict
from typing import Any

import structlog
from redis import Redis

from worker import backlog, crashpoints, loading
from worker.app import app
from worker.database import sqlalchemy_url
from worker.errors import TryAgainLater
from worker.flush import flush_shards
from worker.health import note_activity
from worker.redis import connect_sync
from worker.settings import get_settings
from worker.wakeups import send_flush

log = structlog.get_logger(__name__)

PAUSE_FIRST_SECONDS = 0.25
PAUSE_MAX_SECONDS = 5.0
"""A store that came back is noticed within this and a sweep."""
SWEEP_AGE_SECONDS = 1.0

_clients: dict[int, Redis] = {}
_failures: dict[int, int] = {}


@app.task(name="flush")
def flush(*shards: int) -> dict[str, Any]:
    """Writes what these shards hold to Postgres. While a store is away it fails fast, and the sweep tries again after a growing pause.

    A shard whose last flush failed gets a task of its own, so that whatever is wrong with it keeps no other waiting.
    """
    settings = get_settings()
    known = [shard for shard in shards if 0 <= shard < settings.shards]
    if not known:
        return {"shards": list(shards), "refused": "no such shard"}
    crashpoints.visit("task:begun")
    together = [shard for shard in known if shard not in _failures] or known[:1]
    try:
        note_activity(client())
        report = flush_shards(client(), settings, together, halvings=min(_failures.get(together[0], 0), 16))
        note_activity(client())
    except TryAgainLater as exc:
        pauses = {shard: _postpone(shard, exc) for shard in together}
        return {"shards": together, "postponed": type(exc).__name__, "seconds": max(pauses.values())}
    finally:
        for shard in known:
            if shard not in together:
                send_flush(app, shard)
    for shard in together:
        _failures.pop(shard, None)
    for shard in report.more:  # a task each: other children may help
        send_flush(app, shard)
    crashpoints.visit("task:done")
    return asdict(report)


@app.task(name="sweep")
def sweep() -> dict[str, Any]:
    """Asks for a flush of every shard whose oldest entry is too old: whatever got lost on the way costs seconds, not messages."""
    settings = get_settings()
    late = max(SWEEP_AGE_SECONDS, 3 * settings.flush_interval_ms / 1000)
    try:
        note_activity(client())
        backlogs = backlog.look(client(), settings.shards)
        asked = [
            one.shard for one in backlogs if one.entries and one.oldest_age_seconds > late and backlog.ask_for_flush(client(), one.shard)
        ]
    except TryAgainLater as exc:
        log.warning("sweep postponed", error=type(exc).__name__)
        return {"postponed": type(exc).__name__}
    for shard in asked:
        send_flush(app, shard)
    return {"asked": asked}


def check_installation() -> None:
    """Compares `SHARDS` with what this installation was made with, in Redis and in Postgres, and writes it down at the first start.

    Raises `ConfigurationError` for another number or an address that is none, `TryAgainLater` if neither store could be asked.
    """
    settings = get_settings()
    sqlalchemy_url(settings.database_url.get_secret_value())  # while Redis knows the number, nothing else would look at it
    redis = client()
    made_with = backlog.made_with_shards(redis)
    if made_with is None:
        made_with = loading.shards_in_postgres(settings.postgres_timeout_seconds)
    loading.check_shards(made_with or settings.shards, settings.shards)
    backlog.note_shards(redis, settings.shards)
    loading.check_shards(backlog.made_with_shards(redis) or settings.shards, settings.shards)  # somebody else may have been first


def client() -> Redis:
    """This process's connection to Redis, opened after the fork."""
    pid = os.getpid()
    if pid not in _clients:
        _clients[pid] = connect_sync(get_settings())
    return _clients[pid]


def forget_clients() -> None:
    """Drops what was inherited by a fork, without a word on the parent's sockets."""
    _clients.clear()


def _postpone(shard: int, exc: TryAgainLater) -> float:
    """Keeps appends and sweeps from asking for a while, longer with each failure, jittered so that shards do not come back together."""
    _failures[shard] = _failures.get(shard, 0) + 1
    pause: float = min(PAUSE_MAX_SECONDS, PAUSE_FIRST_SECONDS * 2 ** min(_failures[shard], 10)) * random.uniform(0.5, 1.0)  # noqa: S311
    log.warning("flush postponed", shard=shard, error=type(exc).__name__, seconds=round(pause, 3), failures=_failures[shard])
    try:
        backlog.hold_flushes(client(), shard, int(pause * 1000))
    except TryAgainLater as second:
        log.warning("flushes not held", shard=shard, error=type(second).__name__)
    return round(pause, 3)
