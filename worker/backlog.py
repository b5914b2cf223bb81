"""The worker's side of the pending log: how entries leave it, and what lies there.

`fetch` and `trim` stand on both sides of the commit (`worker/flush.py`). A crash before the commit leaves the log as it was; one between
commit and trim leaves entries that the next flush inserts again, to no effect, and trims.

Synchronous, unlike the API's side (`worker/pending.py`). Raw answers of Redis do not leave this file either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from redis import Redis
from redis.client import CaseInsensitiveDict
from redis.exceptions import RedisError

from worker import keys
from worker.codec import RawEntry, raw_entries
from worker.multiplexed import Argument
from worker.pending import EXTRA_TTL_SECONDS, MESSAGES_PER_CALL_MAX, WAKE_LEASE_MS
from worker.scripts import run, run_all, translate

T = TypeVar("T")

_FETCH_PAGE_FIRST = 50
"""Entries of each shard that are read at first: more than most flushes find."""
_PART_FIRST, _PART_GROWTH, _PART = 500, 3, 3000
"""Entries of a part of a batch. Each is three times as large as the one before, because Postgres takes almost three times as long to write
one as it takes to fetch and decode it. With 1,000 at most, what a part costs Postgres beside its rows was 6 of 21 µs a row."""
_ONE_PART = 1200
"""Entries that are one part, if there are no more: in two, many of their conversations would be changed twice."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A message that was committed under another id: its copy must leave the cache."""

    conversation_id: int
    message_id: int
    key: str


def clear_wakes(client: Redis, shards: Sequence[int]) -> dict[int, int]:
    """Clears wake flags, and answers which of these shards hold entries, and how many.

    What is appended from now on asks for another flush. Before the locks are tried: whoever holds one looks at this after its commit.
    """

    def ask() -> list[Any]:
        pipeline = client.pipeline(transaction=False)
        pipeline.delete(*(keys.wake(shard) for shard in shards))
        for shard in shards:
            pipeline.xlen(keys.log(shard))
        return list(pipeline.execute())

    _, *lengths = _call(ask)
    return {shard: int(length) for shard, length in zip(shards, lengths, strict=True) if length}


def fetch(
    client: Redis, shards: Sequence[int], entries_max: int, bytes_max: int, after: Mapping[int, bytes], expected: int = 1 << 32
) -> Iterator[dict[int, list[RawEntry]]]:
    """The oldest entries of these shards (beyond those in `after`), each in its order, in parts: page by page in turn, so that a long log
    keeps no other out.

    At least one entry of each shard, if there is any, and no shard without one. Over `entries_max` goes only what was appended together
    with the last one of a shard: nobody is to read half of it. About as many as `expected` are there. Call it only while holding the
    shards' locks.
    """
    going = {shard: _beyond(after[shard]) if shard in after else "-" for shard in shards}
    total, size, count = 0, 0, max(1, min(_FETCH_PAGE_FIRST, entries_max // len(shards)))
    part: dict[int, list[RawEntry]] = {}
    held, part_size = 0, _PART if expected <= _ONE_PART else _PART_FIRST
    ends: dict[int, RawEntry] = {}
    while going:
        full: dict[int, str] = {}
        for shard, entries in zip(going, _pages(client, going, count), strict=True):
            ends.pop(shard, None)
            if entries:
                part.setdefault(shard, []).extend(entries)
                held += len(entries)
                total += len(entries)
                size += sum([entry.size for entry in entries])
                if len(entries) == count:
                    full[shard], ends[shard] = _beyond(entries[-1].id), entries[-1]
        has_room = size < bytes_max and total < entries_max
        going = dict(list(full.items())[: entries_max - total]) if has_room else {}
        if not going:
            for shard, entries in _companions(client, ends).items():
                part.setdefault(shard, []).extend(entries)
        if part and (not going or held > part_size - len(going)):
            yield part
            part, held, part_size = {}, 0, min(_PART_GROWTH * part_size, _PART)
        if going:
            average = size // total  # a page of the largest messages would take 300 MB
            most = min(part_size - held, entries_max - total, (bytes_max - size) // average + 1)
            count = max(1, most // len(going))


def _companions(client: Redis, ends: Mapping[int, RawEntry]) -> dict[int, list[RawEntry]]:
    """What was appended together with these entries, after each of them."""
    found: dict[int, list[RawEntry]] = {}
    for shard, entry in ends.items():
        if followers := _followers(entry):
            [found[shard]] = _pages(client, {shard: _beyond(entry.id)}, followers)
    return found


def _followers(entry: RawEntry) -> int:
    """How many entries come after it that were appended by the same call."""
    count = entry.fields.get(b"n", b"")
    return min(int(count), MESSAGES_PER_CALL_MAX - 1) if count.isdigit() and len(count) < 4 else 0


def _beyond(entry_id: bytes) -> str:
    return f"({entry_id.decode()}"


def _pages(client: Redis, starts: Mapping[int, str], count: int) -> list[list[RawEntry]]:
    def ask() -> list[Any]:
        pipeline = client.pipeline(transaction=False)
        pipeline.response_callbacks = CaseInsensitiveDict({})  # what Redis gave: redis-py would make a dict of each entry
        for shard, start in starts.items():
            pipeline.execute_command("XRANGE", keys.log(shard), start, "+", "COUNT", count)  # type: ignore[no-untyped-call]
        return list(pipeline.execute())

    return [raw_entries(page) for page in _call(ask)]


@dataclass(frozen=True, slots=True)
class Trim:
    """Committed entries that are to be removed from a shard's log.

    `committed` is the highest id among them that an append has given, or 0. `conversations` are (id, user id) of those whose last entry is
    among these: they are settled in the same step, so that a crash between two trims leaves no conversation that nobody settles.
    """

    shard: int
    entries: Sequence[RawEntry]
    committed: int
    conversations: Sequence[tuple[int, int]] = ()
    withdrawn: Sequence[Withdrawn] = ()


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What a trim left behind."""

    entries_left: int
    flush_asked: bool


def trim(client: Redis, trims: Sequence[Trim], *, ttl_seconds: int, messages_kept: int) -> list[Trimmed]:
    """Removes these committed entries, and lets what they touched expire. Safe to run again.

    A script for each shard, all in one round trip; in a second one those whose entries have to be named one by one.
    """

    def run_trims(some: Sequence[Trim], *, one_by_one: bool) -> list[Any]:
        return run_all(client, "trim", [_trim_call(one, ttl_seconds, messages_kept, one_by_one=one_by_one) for one in some])

    answers = run_trims(trims, one_by_one=False)
    if late := [i for i, answer in enumerate(answers) if answer[0] == b"EACH"]:
        for i, answer in zip(late, run_trims([trims[i] for i in late], one_by_one=True), strict=True):
            answers[i] = answer
    return [Trimmed(int(left), bool(asked)) for left, asked in answers]


def _trim_call(trim: Trim, ttl_seconds: int, messages_kept: int, *, one_by_one: bool) -> tuple[list[str], list[Argument]]:
    shard, entries, conversations = trim.shard, trim.entries, trim.conversations
    position = {conversation: i + 1 for i, (conversation, _) in enumerate(conversations)}
    script_keys = [keys.log(shard), keys.committed(shard), keys.backlog_bytes(shard), keys.wake(shard), keys.users(shard)]
    for conversation_id, user_id in conversations:
        script_keys += [
            *keys.of_conversation(shard, conversation_id),
            keys.loading(shard, conversation_id),
            keys.changed(shard, user_id),
            keys.created_keys(shard, user_id),
            keys.events(shard, user_id),
        ]
    sizes: defaultdict[bytes, int] = defaultdict(int)
    for entry in entries:
        sizes[entry.user or b""] += entry.size
    named = [entry.id for entry in entries] if one_by_one else [entries[0].id, entries[-1].id]
    arguments: list[Argument] = [ttl_seconds, ttl_seconds + EXTRA_TTL_SECONDS, messages_kept, trim.committed]
    arguments += ["each" if one_by_one else "run", len(named), len(sizes), len(conversations), *named]
    arguments += [*sizes, *sizes.values()]
    arguments += [conversation_id for conversation_id, _ in conversations]
    for gone in trim.withdrawn:
        arguments += [position[gone.conversation_id], gone.message_id, gone.key]
    return script_keys, arguments


@dataclass(frozen=True, slots=True)
class ShardBacklog:
    """What a shard holds; ages in seconds by Redis's own clock (its distance, if the clock was set back since)."""

    shard: int
    entries: int
    bytes: int
    oldest_age_seconds: float


def look(client: Redis, shards: int) -> list[ShardBacklog]:
    """The state of every shard's log."""

    def ask() -> list[Any]:
        pipeline = client.pipeline(transaction=False)
        pipeline.time()
        for shard in range(shards):
            pipeline.xlen(keys.log(shard))
            pipeline.get(keys.backlog_bytes(shard))
            pipeline.xrange(keys.log(shard), "-", "+", 1)
        return list(pipeline.execute())

    (seconds, microseconds), *answers = _call(ask)
    now = seconds * 1_000_000 + microseconds
    found = []
    for shard in range(shards):
        length, size, oldest = answers[3 * shard : 3 * shard + 3]
        age = abs(now - _born(*oldest[0])) / 1e6 if oldest else 0.0
        found.append(ShardBacklog(shard, length, int(size or 0), age))
    return found


def _born(entry_id: bytes, fields: dict[bytes, bytes]) -> int:
    """When an entry was appended (Unix microseconds); of one that no append wrote, what its id says."""
    moment = fields.get(b"t", b"")
    return int(moment) if moment.isdigit() and len(moment) < 18 else keys.microseconds_of(int(entry_id.partition(b"-")[0]))


def ask_for_flush(client: Redis, shard: int) -> bool:
    """True if no flush of this shard is on its way: the caller then sends one."""
    return bool(run(client, "ask", [keys.log(shard), keys.wake(shard)], [WAKE_LEASE_MS]))


def note_worker(client: Redis, host: str, now: float) -> None:
    """Notes that a task runs on this host (its own clock, which is also who compares)."""
    _call(lambda: client.hset(keys.WORKERS, host, repr(now)))


def worker_active_at(client: Redis, host: str) -> float | None:
    """When a task last ran on this host."""
    value: Any = _call(lambda: client.hget(keys.WORKERS, host))
    return None if value is None else float(value)


def made_with_shards(client: Redis) -> int | None:
    """The number of shards that was written down at the first start."""
    value = _call(lambda: client.get(keys.SHARDS))
    return None if value is None else int(value)


def note_shards(client: Redis, shards: int) -> None:
    """Writes the number of shards down, once."""
    _call(lambda: client.set(keys.SHARDS, shards, nx=True))


def hold_flushes(client: Redis, shard: int, milliseconds: int) -> None:
    """Keeps appends and sweeps from asking for a flush for a while: Postgres is away."""
    _call(lambda: client.set(keys.wake(shard), "0", px=milliseconds))


def _call(command: Callable[[], T]) -> T:
    try:
        return command()
    except RedisError as exc:
        raise translate(exc) from exc
