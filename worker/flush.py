"""The flush: from the log to Postgres, in batches. Plain functions; `worker/tasks.py` makes them Celery tasks.

One pass, in this order, and why:

1. clear the wake flag: what is appended from now on asks for another flush;
2. open the transaction and try the shard's lock; if somebody else holds it, leave: whoever holds it looks at the flag after its commit;
3. only now read the log, so that nothing stale is in hand;
4. persist, COMMIT;
5. trim exactly what was committed. A crash before 4 changes nothing; one before 5 makes the next flush insert it again, to no effect.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog
from redis import Redis
from redis.exceptions import RedisError

from worker import crashpoints, keys, pending
from worker.database import raw_cursor, transaction
from worker.persist import Persisted, persist_batch, try_lock
from worker.settings import Settings

log = structlog.get_logger(__name__)

FLUSH_LOOP_SECONDS = 0.5
"""A flush that still finds full batches goes on for this long, then it lets other shards have the process: with one process, that is how
long each shard with a backlog keeps the others waiting. The task that it sends for itself costs 3 ms."""
BATCH_BYTES_MAX = 32 << 20
"""A batch ends here even if it has fewer entries: it passes through this process's memory, and Postgres's, several times."""
_TRIM_CHUNK = 1000
"""Entries that one script removes: Redis serves nobody else meanwhile (about 1 ms)."""
WAKE_SECONDS = 8.0
"""How long a flush waits for a Postgres that is waking up."""
BATCH_BUCKETS = (1, 10, 100, 1000, 5000, 10_000, 100_000)
SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(slots=True)
class Report:
    """What a flush did; Flower shows it as the task's result."""

    shard: int
    batches: int = 0
    entries: int = 0
    messages: int = 0
    dead_letters: int = 0
    seconds: float = 0.0
    busy: bool = False
    more: bool = False
    """It let other shards have the process although there is more to do."""


def flush_shard(client: Redis, settings: Settings, shard: int, halvings: int = 0) -> Report:
    """Flushes a shard until nothing is left that nobody else will fetch; raises `TryAgainLater` errors, with the log untouched.

    The first batch is halved so many times: one that is too large for a slow Postgres to take within the deadline would fail for ever.
    """
    report = Report(shard)
    started = time.monotonic()
    report.more = _pass(client, settings, shard, report, halvings)
    while report.more and time.monotonic() - started < FLUSH_LOOP_SECONDS:
        halvings = max(0, halvings - 1)
        report.more = _pass(client, settings, shard, report, halvings)
    report.seconds = round(time.monotonic() - started, 4)
    return report


def _pass(client: Redis, settings: Settings, shard: int, report: Report, halvings: int = 0) -> bool:
    """One batch; True if there is another one to be fetched now."""
    started = time.monotonic()
    pending.clear_wake(client, shard)
    if not pending.has_entries(client, shard):  # so that an idle Postgres is left asleep
        return False
    with transaction(seconds=settings.flush_timeout_seconds, wake_seconds=WAKE_SECONDS, role="worker") as db, raw_cursor(db) as cursor:
        crashpoints.visit("flush:begun")
        if not try_lock(cursor, shard):
            report.busy = True
            return False
        crashpoints.visit("flush:locked")
        batch = pending.fetch(client, shard, max(1, settings.flush_batch_max >> halvings), BATCH_BYTES_MAX >> halvings)
        if not batch:
            return False
        crashpoints.visit("flush:fetched")
        persisted = persist_batch(cursor, shard, settings.shards, batch)
        crashpoints.visit("flush:before_commit")
    crashpoints.visit("flush:committed")
    trimmed = trim_batch(client, settings, shard, batch, persisted)
    seconds = time.monotonic() - started
    report.batches += 1
    report.entries += len(batch)
    report.messages += persisted.messages
    report.dead_letters += persisted.dead
    _count(client, batch, persisted, seconds)
    event = log.error if persisted.dead else log.info
    event("flushed", shard=shard, entries=len(batch), messages=persisted.messages, dead_letters=persisted.dead, seconds=round(seconds, 4))
    return trimmed.entries_left > 0 and (not trimmed.flush_asked or trimmed.entries_left >= settings.flush_batch_max)


def trim_batch(client: Redis, settings: Settings, shard: int, batch: list[pending.RawEntry], persisted: Persisted) -> pending.Trimmed:
    """Trims in chunks, in the log's order; each conversation is settled with its last entry."""
    trimmed = pending.Trimmed(0, True)
    for start in range(0, len(batch), _TRIM_CHUNK):
        chunk = batch[start : start + _TRIM_CHUNK]
        ids = {entry.id for entry in chunk}
        settled = {number: touched.user_id for number, touched in persisted.conversations.items() if touched.last.id in ids}
        trimmed = pending.trim(
            client,
            shard,
            chunk,
            list(settled.items()),
            [gone for gone in persisted.withdrawn if gone.conversation_id in settled],
            ttl_seconds=settings.cache_ttl_seconds,
            messages_kept=settings.cache_messages_max,
        )
    return trimmed


def _count(client: Redis, batch: list[pending.RawEntry], persisted: Persisted, seconds: float) -> None:
    """For /metrics, which the API renders. Its loss would be no loss, so it does not fail a flush that is done."""
    counts = {
        "flushes": 1,
        "flushed_entries": len(batch),
        "flushed_messages": persisted.messages,
        "dead_letters": persisted.dead,
        f"batch_le:{_bucket(len(batch), BATCH_BUCKETS)}": 1,
        f"seconds_le:{_bucket(seconds, SECONDS_BUCKETS)}": 1,
        "flush_microseconds": int(seconds * 1e6),
    }
    try:
        with client.pipeline(transaction=False) as pipeline:
            for name, count in counts.items():
                if count:
                    pipeline.hincrby(keys.STATS, name, count)
            pipeline.execute()
    except RedisError as exc:
        log.warning("flush not counted", error=type(exc).__name__)


def _bucket(value: float, limits: tuple[float, ...]) -> str:
    return next((str(limit) for limit in limits if value <= limit), "+Inf")
