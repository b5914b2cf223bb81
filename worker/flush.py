"""The flush: from the log to Postgres, in batches. Plain functions; `worker/tasks.py` makes them Celery tasks.

One pass, in this order, and why:

1. clear the shards' wake flags: what is appended from now on asks for another flush;
2. open the transaction and try the shards' locks; what somebody else holds is left: whoever holds it looks at the flag after its commit;
3. only now read the logs, so that nothing stale is in hand;
4. persist, COMMIT;
5. trim exactly what was committed. A crash before 4 changes nothing; one before 5 makes the next flush insert it again, to no effect.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

import structlog
from psycopg2.extensions import cursor as Cursor
from redis import Redis
from redis.exceptions import RedisError

from worker import backlog, crashpoints, keys
from worker.codec import RawEntry
from worker.database import raw_cursor, transaction
from worker.persist import Persisted, decode_batch, persist_batch, try_lock
from worker.settings import Settings

log = structlog.get_logger(__name__)

FLUSH_LOOP_SECONDS = 0.2
"""A flush that still finds full batches goes on for this long, then it lets other shards have the process: with one process, that (and a
batch) is how long each shard with a backlog keeps the others waiting: 0.7 s at p99, and 1.2 s with 0.5. The task that it sends for itself
costs 3 ms."""
BATCH_BYTES_MAX = 32 << 20
"""A batch ends here even if it has fewer entries: it passes through this process's memory, and Postgres's, several times."""
BESIDE_ENTRIES = 500
"""A part that is as large is written by a thread, while this one fetches the next; and a full batch of as many is trimmed by one, while
this one goes on."""
_TRIM_CHUNK = 1000
"""Entries of a shard that one script removes: Redis serves nobody else meanwhile (about 1 ms)."""
WAKE_SECONDS = 8.0
"""How long a flush waits for a Postgres that is waking up."""
BATCH_BUCKETS = (1, 10, 100, 1000, 5000, 10_000, 100_000)
SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


_Entries: TypeAlias = dict[int, list[RawEntry]]
"""Entries of each shard, in its order."""


@dataclass(slots=True)
class Report:
    """What a flush did; Flower shows it as the task's result."""

    shards: list[int]
    batches: int = 0
    entries: int = 0
    messages: int = 0
    dead_letters: int = 0
    seconds: float = 0.0
    busy: list[int] = field(default_factory=list)
    """Shards that somebody else was flushing."""
    more: list[int] = field(default_factory=list)
    """Shards in which there is more to do: it let others have the process."""


def flush_shards(client: Redis, settings: Settings, shards: Sequence[int], halvings: int = 0) -> Report:
    """Flushes these shards together until nothing is left that nobody else will fetch. Raises `TryAgainLater` errors, the logs untouched.

    Together, because what a flush costs beside its rows (2 ms of this process, 1.5 ms of Postgres, a commit) is the same for one shard and
    for all: with 16 busy shards it was most of what the worker and Postgres did.
    The first batch is halved so many times: one that is too large for a slow Postgres to take within the deadline would fail for ever.
    """
    report = Report(list(shards), more=list(shards))
    started = time.monotonic()
    after: dict[int, bytes] = {}
    trimming: Future[list[int]] | None = None
    with ThreadPoolExecutor(1) as beside:
        while report.more:
            batch, later = _commit(client, settings, report, halvings, after)
            if trimming is not None:
                trimming.result()
                trimming = None
            goes_on = time.monotonic() - started < FLUSH_LOOP_SECONDS
            if batch is None:
                report.more = later
            elif batch.is_full and goes_on:  # what is left in these shards the next turn of this loop sees
                trimming = beside.submit(_trim, client, settings, batch, report)
                after |= {shard: entries[-1].id for shard, entries in batch.entries.items()}
                report.more = later + list(batch.entries)
            else:
                report.more = later + _trim(client, settings, batch, report)
            if not goes_on:
                break
            halvings = max(0, halvings - 1)
    report.seconds = round(time.monotonic() - started, 4)
    return report


def flush_shard(client: Redis, settings: Settings, shard: int) -> Report:
    """Flushes one."""
    return flush_shards(client, settings, [shard])


@dataclass(frozen=True, slots=True)
class _Batch:
    """A committed batch."""

    entries: _Entries
    persisted: Persisted
    is_full: bool
    """There may be another one to be fetched at once."""
    started: float


def _commit(
    client: Redis, settings: Settings, report: Report, halvings: int, after: Mapping[int, bytes]
) -> tuple[_Batch | None, list[int]]:
    """Commits a batch of the shards in which there is more, from `after` these entries on (they are committed, but may still be there).

    Answers it, and the shards that have to wait for the next one.
    """
    started = time.monotonic()
    entries_max = max(1, settings.flush_batch_max >> halvings)
    waiting = backlog.clear_wakes(client, report.more)
    if not waiting:  # so that an idle Postgres is left asleep
        return None, []
    now, later = list(waiting)[:entries_max], list(waiting)[entries_max:]
    with transaction(seconds=settings.flush_timeout_seconds, wake_seconds=WAKE_SECONDS, role="worker") as db, raw_cursor(db) as cursor:
        crashpoints.visit("flush:begun")
        locked = try_lock(cursor, now)
        report.busy += [shard for shard in now if shard not in locked]
        if not locked:
            return None, later
        crashpoints.visit("flush:locked")
        expected = sum(waiting[shard] for shard in locked)
        parts = backlog.fetch(client, list(locked), entries_max, BATCH_BYTES_MAX >> halvings, after, expected)
        entries, persisted = _write(cursor, settings, parts, locked)
        if not entries:
            return None, later
        crashpoints.visit("flush:before_commit")
    crashpoints.visit("flush:committed")
    count = sum(map(len, entries.values()))
    return _Batch(entries, persisted, BESIDE_ENTRIES <= entries_max <= count, started), later


def _trim(client: Redis, settings: Settings, batch: _Batch, report: Report) -> list[int]:
    """Trims and counts a committed batch; the shards in which there is another one to be fetched now."""
    left = trim_batches(client, settings, batch.entries, batch.persisted)
    seconds = time.monotonic() - batch.started
    entries, persisted = sum(map(len, batch.entries.values())), batch.persisted
    report.batches += 1
    report.entries += entries
    report.messages += persisted.messages
    report.dead_letters += persisted.dead
    _count(client, entries, persisted, seconds)
    event = log.error if persisted.dead else log.info
    event(
        "flushed",
        shards=list(batch.entries),
        entries=entries,
        messages=persisted.messages,
        dead_letters=persisted.dead,
        seconds=round(seconds, 4),
    )
    return [
        shard for shard, one in left.items() if one.entries_left and (not one.flush_asked or one.entries_left >= settings.flush_batch_max)
    ]


def _write(cursor: Cursor, settings: Settings, parts: Iterator[_Entries], committed: Mapping[int, int]) -> tuple[_Entries, Persisted]:
    """Writes what is fetched, part by part; while Postgres takes in a large one, the next is fetched and decoded.

    `committed`: the highest id of each shard that was committed before.
    """
    batches: _Entries = {}
    persisted = Persisted()
    writing: Future[Persisted] | None = None
    with ThreadPoolExecutor(1) as beside:  # its end waits for what is under way, so nobody else uses the cursor meanwhile
        for part in parts:
            crashpoints.visit("flush:fetched")
            for shard, entries in part.items():
                batches.setdefault(shard, []).extend(entries)
            decoded = decode_batch(part)
            if writing is not None:
                persisted.add(writing.result())
                writing = None
            if sum(map(len, part.values())) < BESIDE_ENTRIES:
                persisted.add(persist_batch(cursor, settings.shards, decoded, committed))
            else:
                writing = beside.submit(persist_batch, cursor, settings.shards, decoded, committed)
        if writing is not None:
            persisted.add(writing.result())
    return batches, persisted


def trim_batches(
    client: Redis, settings: Settings, batches: Mapping[int, Sequence[RawEntry]], persisted: Persisted
) -> dict[int, backlog.Trimmed]:
    """Trims in chunks, in each log's order; each conversation is settled with its last entry. What is left in each shard."""
    left: dict[int, backlog.Trimmed] = {}
    settled = {(keys.shard_of_id(number), one.last.id): (number, one.user_id) for number, one in persisted.conversations.items()}
    for start in range(0, max(map(len, batches.values())), _TRIM_CHUNK):
        parts = []
        for shard, batch in batches.items():
            if chunk := batch[start : start + _TRIM_CHUNK]:
                conversations = [settled[shard, entry.id] for entry in chunk if (shard, entry.id) in settled]
                numbers = {number for number, _ in conversations}
                withdrawn = [gone for gone in persisted.withdrawn if gone.conversation_id in numbers]
                appended = (entry.id for entry in reversed(chunk) if (shard, entry.id) not in persisted.planted)  # in the order of ids
                committed = keys.entry_number(next(appended, b"")) or 0
                parts.append(backlog.Trim(shard, chunk, committed, conversations, withdrawn))
        trimmed = backlog.trim(client, parts, ttl_seconds=settings.cache_ttl_seconds, messages_kept=settings.cache_messages_max)
        left |= zip((part.shard for part in parts), trimmed, strict=True)
    return left


def _count(client: Redis, entries: int, persisted: Persisted, seconds: float) -> None:
    """For /metrics, which the API renders. Its loss would be no loss, so it does not fail a flush that is done."""
    counts = {
        "flushes": 1,
        "flushed_entries": entries,
        "flushed_messages": persisted.messages,
        "dead_letters": persisted.dead,
        f"batch_le:{_bucket(entries, BATCH_BUCKETS)}": 1,
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
