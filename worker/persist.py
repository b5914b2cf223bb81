"""How a batch gets from the log into Postgres: the body of the transaction between `fetch` and `trim`.

Everything here can be repeated: ids were assigned at the acknowledgement, so a second insert finds the first. A bad row never blocks its
shard and never takes its neighbours along: the batch is halved under savepoints until the row is alone, and that goes, readable, into
`dead_letter` in the same transaction. An outage is not a bad row: it ends the transaction, and the log keeps all of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import psycopg2
from psycopg2.extensions import cursor as Cursor
from psycopg2.extras import execute_values

from worker import crashpoints, keys
from worker.backlog import RawEntry, Withdrawn
from worker.codec import Entry, decode_entry, to_datetime
from worker.errors import BadEntry
from worker.loading import SHARD_LOCK

_MESSAGES = """unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::text[], %s::text[], %s::bigint[], %s::text[], %s::text[])
AS s (id, conversation_id, user_id, role, content, microseconds, status, idempotency_key)"""
_INSERT = f"""
INSERT INTO message (id, conversation_id, user_id, role, content, status, idempotency_key, created_at)
SELECT id, conversation_id, user_id, role, content, status, NULLIF(idempotency_key, ''),
       timestamptz 'epoch' + microseconds * interval '1 microsecond'
FROM {_MESSAGES}
ON CONFLICT DO NOTHING
"""
_LEFT_OUT = f"""
SELECT s.id, m.id IS NOT NULL, k.id, (k.role, k.status, k.content) IS NOT DISTINCT FROM (s.role, s.status, s.content)
FROM {_MESSAGES}
LEFT JOIN message m ON m.conversation_id = s.conversation_id AND m.id = s.id
LEFT JOIN message k ON k.conversation_id = s.conversation_id AND k.idempotency_key = s.idempotency_key AND k.id <> s.id
WHERE m.id IS NULL OR (m.user_id, m.role, m.status, m.content) IS DISTINCT FROM (s.user_id, s.role, s.status, s.content)
"""
"""Of messages that an insertion left out: why. The same again is a replay, and no row comes back for it."""
_UPDATE = """
UPDATE conversation c
SET updated_at = GREATEST(c.updated_at, timestamptz 'epoch' + v.activity * interval '1 microsecond'),
    title = COALESCE(v.title, c.title, v.given)
FROM unnest(%s::bigint[], %s::bigint[], %s::text[], %s::text[]) AS v (id, activity, title, given)
WHERE c.id = v.id AND c.deleted_at IS NULL
"""
INSERT_CHARS_MAX = 1 << 20
"""Of the messages that one statement inserts: both sides hold several copies of it.

A statement, because row-level security refuses COPY into `message`. COPY into a temporary table and INSERT from there took this process
half a µs a row less and Postgres the same; but the table itself took 3.5 ms, and left its traces in Postgres's catalogue each time."""


@dataclass(frozen=True, slots=True)
class Touched:
    """A conversation that a batch is about, dead letters included; `last` is its last entry in the batch."""

    user_id: int
    last: RawEntry


@dataclass(slots=True)
class Persisted:
    """What a batch came to."""

    messages: int = 0
    dead: int = 0
    conversations: dict[int, Touched] = field(default_factory=dict)
    """By id, which tells their shard: that of their entries (`decode_entry` takes no other)."""
    withdrawn: list[Withdrawn] = field(default_factory=list)
    planted: set[tuple[int, bytes]] = field(default_factory=set)
    """Shard and id of entries that no append has written: their ids say nothing about what is committed."""

    def add(self, later: Persisted) -> None:
        """What was written after this, in the same transaction."""
        self.messages += later.messages
        self.dead += later.dead
        self.conversations |= later.conversations
        self.withdrawn += later.withdrawn
        self.planted |= later.planted


@dataclass(slots=True)
class _Change:
    """What a batch changes in a conversation's row. `given_title`: what its first message named it."""

    activity: int | None = None
    """Unix microseconds; None if it has no message."""
    title: str | None = None
    given_title: str | None = None


class _Row(NamedTuple):
    """An entry that Postgres may take."""

    raw: RawEntry
    entry: Entry


@dataclass(frozen=True, slots=True)
class _Dead:
    """An entry that Postgres cannot take; `reason` and `error` name no content."""

    shard: int
    entry: RawEntry
    reason: str
    error: str = ""


@dataclass
class _Plan:
    """What entries come to, if Postgres has their conversations."""

    rows: Sequence[_Row]
    committed: Mapping[int, int]
    """For each shard, the highest id that was committed before, where that was asked: only for renames it makes a difference."""
    created: list[Entry] = field(default_factory=list)
    messages: list[_Row] = field(default_factory=list)
    owners: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Who the entries of each conversation say that it belongs to."""
    changes: dict[int, _Change] = field(default_factory=lambda: defaultdict(_Change))
    deletions: dict[int, datetime] = field(default_factory=dict)
    last: dict[int, _Row] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[_Row], committed: Mapping[int, int] = MappingProxyType({})) -> _Plan:
        """Takes them in their order."""
        plan = cls(rows, committed)
        for row in rows:
            entry = row.entry
            number = entry.conversation_id
            plan.last[number] = row
            plan.owners[number].add(entry.user_id)
            if entry.kind == "m":
                plan.messages.append(row)
                change = plan.changes[number]
                if change.activity is None or entry.microseconds > change.activity:
                    change.activity = entry.microseconds
                if entry.extra and not change.given_title:
                    change.given_title = entry.extra
            elif entry.kind == "c":
                plan.created.append(entry)
            elif entry.kind == "r":
                if entry.id > committed.get(_shard(entry), 0):
                    plan.changes[number].title = entry.title
            else:
                plan.deletions[number] = to_datetime(entry.microseconds)
        if plan.deletions:
            plan.messages = [row for row in plan.messages if row.entry.conversation_id not in plan.deletions]
        return plan

    @cached_property
    def insertions(self) -> list[tuple[Sequence[_Row], list[str]]]:
        """The messages that one statement inserts, as rows and as columns, and those of the next."""
        found: list[tuple[Sequence[_Row], list[str]]] = []
        start = size = 0
        for end, row in enumerate(self.messages, 1):
            size += len(row.entry.content)
            if size >= INSERT_CHARS_MAX or end == len(self.messages):
                part = self.messages[start:end]
                entries = [row.entry for row in part]
                values = [(e.id, e.conversation_id, e.user_id, e.role, e.content, e.microseconds, e.status, e.key) for e in entries]
                found.append((part, _columns(values)))
                start, size = end, 0
        return found


@dataclass(frozen=True, slots=True)
class Decoded:
    """A batch as it is to be written."""

    plan: _Plan
    dead: list[_Dead]
    last_ids: dict[int, int]
    """For each shard, the highest id that an append has given."""


def try_lock(cursor: Cursor, shards: Sequence[int]) -> list[int]:
    """Takes the locks of these shards for the rest of the transaction; the others, somebody else has.

    A log is read only after this, so a flusher that was stalled holds nothing stale: its transaction, and the lock with it, is ended by
    the server, and what it read is read again by the next one.
    """
    cursor.execute("SELECT n FROM unnest(%s::int[]) AS n WHERE pg_try_advisory_xact_lock(%s, n)", (list(shards), SHARD_LOCK))
    return [number for (number,) in cursor.fetchall()]


def decode_batch(batches: Mapping[int, Sequence[RawEntry]]) -> Decoded:
    """All that can be done without Postgres, so that it can be done while Postgres is busy with the part before."""
    rows: list[_Row] = []
    dead: list[_Dead] = []
    last_ids: dict[int, int] = {}
    for shard, batch in batches.items():
        for raw in batch:
            try:
                entry = decode_entry(raw.id, raw.fields)
            except BadEntry as exc:
                dead.append(_Dead(shard, raw, "malformed", type(exc.__cause__).__name__ if exc.__cause__ else ""))
            else:
                if keys.shard_of_id(entry.id) == shard:
                    rows.append(_Row(raw, entry))
                    last_ids[shard] = entry.id
                else:
                    dead.append(_Dead(shard, raw, "other_shard"))
    plan = _Plan.of(rows)
    with suppress(ValueError):  # comes again where it can be dealt with
        plan.insertions  # noqa: B018 - now, and not while Postgres waits for them
    return Decoded(plan, dead, last_ids)


def persist_batch(cursor: Cursor, shards: int, batch: Decoded, *, by_hand: bool = False) -> Persisted:
    """Writes what each shard's log held, in its order; the caller commits. Raises psycopg2's errors for anything but bad rows.

    A title is not written again (unless `by_hand`, from a dead letter): everything else may be, but behind this rename there may be another
    one that is committed, and trimmed by somebody else before this commit.
    """
    plan = batch.plan
    if not by_hand and any(change.title is not None for change in plan.changes.values()):
        cursor.execute("SELECT number, last_id FROM shard WHERE number = ANY(%s)", (list(batch.last_ids),))
        plan = _Plan.of(plan.rows, dict(cursor.fetchall()))
    done = Persisted(planted={(one.shard, one.entry.id) for one in batch.dead})
    dead = batch.dead + _apply_or_halve(cursor, plan, done)
    _bury(cursor, dead)
    done.dead = len(dead)
    if batch.last_ids:
        execute_values(
            cursor,
            "INSERT INTO shard (number, shards, last_id) VALUES %s "
            "ON CONFLICT (number) DO UPDATE SET last_id = GREATEST(shard.last_id, EXCLUDED.last_id)",
            [(shard, shards, last_id) for shard, last_id in sorted(batch.last_ids.items())],
            page_size=len(batch.last_ids),
        )
    return done


def _shard(entry: Entry) -> int:
    """Whose log it lay in: that of its id, or it would not have come so far."""
    return keys.shard_of_id(entry.id)


def _apply_or_halve(cursor: Cursor, plan: _Plan, done: Persisted) -> list[_Dead]:
    rows = plan.rows
    if not rows:
        return []
    cursor.execute("SAVEPOINT part")
    try:
        part = Persisted()
        dead = _apply(cursor, plan, part)
    except (psycopg2.DataError, psycopg2.IntegrityError, OverflowError, ValueError) as exc:  # the last two: psycopg2 cannot write the value
        cursor.execute("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part")
        if len(rows) == 1:
            [(raw, entry)] = rows
            before = done.conversations.get(entry.conversation_id)
            done.conversations[entry.conversation_id] = Touched(before.user_id if before else entry.user_id, raw)
            return [_Dead(_shard(entry), raw, "refused", f"{type(exc).__name__} {getattr(exc, 'pgcode', None) or ''}".strip())]
        middle = len(rows) // 2
        first, second = (_Plan.of(half, plan.committed) for half in (rows[:middle], rows[middle:]))
        return _apply_or_halve(cursor, first, done) + _apply_or_halve(cursor, second, done)
    cursor.execute("RELEASE SAVEPOINT part")
    done.add(part)
    return dead


def _apply(cursor: Cursor, plan: _Plan, done: Persisted) -> list[_Dead]:
    """Conversations before messages; of a conversation that is deleted, nothing comes back."""
    _insert_conversations(cursor, plan.created)
    crashpoints.visit("flush:half_written")
    cursor.execute("SELECT id, user_id, deleted_at IS NOT NULL FROM conversation WHERE id = ANY(%s)", (list(plan.last),))
    owners: dict[int, int] = {}
    gone: set[int] = set()
    for number, user_id, deleted in cursor.fetchall():
        owners[number] = user_id
        if deleted:
            gone.add(number)
    done.conversations = {number: Touched(owners.get(number, row.entry.user_id), row.raw) for number, row in plan.last.items()}
    dead: list[_Dead] = []
    if gone or any(users != {owners.get(number)} for number, users in plan.owners.items()):
        kept = []
        for row in plan.rows:
            number = row.entry.conversation_id
            if owners.get(number) != row.entry.user_id:
                dead.append(_Dead(_shard(row.entry), row.raw, "no_conversation"))
            elif number not in gone:
                kept.append(row)
        plan = _Plan.of(kept, plan.committed)
    dead += _insert_messages(cursor, plan, done)
    _update_conversations(cursor, plan.changes)
    _delete_conversations(cursor, plan.deletions)
    return dead


def _insert_conversations(cursor: Cursor, created: Sequence[Entry]) -> None:
    if not created:
        return
    rows = [(e.conversation_id, e.user_id, e.title, *(to_datetime(e.microseconds),) * 2, e.key or None, e.extra) for e in created]
    statement = (
        "INSERT INTO conversation (id, user_id, title, created_at, updated_at, idempotency_key, request_hash) VALUES %s "
        "ON CONFLICT {} DO NOTHING"
    )
    execute_values(cursor, statement.format(""), rows, page_size=len(rows))
    if cursor.rowcount < len(rows):
        # Replays; or its retry key belongs to another one, which Redis should have known. It was acknowledged: it is kept, without the key.
        execute_values(cursor, statement.format("(id)"), [(*row[:5], None, None) for row in rows], page_size=len(rows))


def _insert_messages(cursor: Cursor, plan: _Plan, done: Persisted) -> list[_Dead]:
    dead = []
    for part, columns in plan.insertions:
        cursor.execute(_INSERT, columns)
        done.messages += cursor.rowcount
        if cursor.rowcount < len(part):
            cursor.execute(_LEFT_OUT, columns)
            dead += _left_out(cursor.fetchall(), {row.entry.id: row for row in part}, done)
    return dead


def _left_out(found: Sequence[tuple[int, bool, int | None, bool]], messages: Mapping[int, _Row], done: Persisted) -> list[_Dead]:
    dead = []
    for number, same_id, key_id, same_request in found:
        raw, entry = messages[number]
        if same_id:
            dead.append(_Dead(_shard(entry), raw, "id_conflict"))
        elif key_id is not None and not same_request:
            dead.append(_Dead(_shard(entry), raw, "key_conflict"))
        elif key_id is None:
            dead.append(_Dead(_shard(entry), raw, "not_inserted"))
        done.withdrawn.append(Withdrawn(entry.conversation_id, entry.id, entry.key))
    return dead


def _update_conversations(cursor: Cursor, changes: dict[int, _Change]) -> None:
    """A title that a message gave never overwrites one, not even when its entry is replayed after a person has renamed."""
    if not changes:
        return
    rows = [(number, change.activity, change.title, change.given_title) for number, change in sorted(changes.items())]
    cursor.execute(_UPDATE, _columns(rows))


def _delete_conversations(cursor: Cursor, deletions: dict[int, datetime]) -> None:
    """The row stays as a tombstone, without its title: what the person wrote is gone."""
    if not deletions:
        return
    execute_values(
        cursor,
        "UPDATE conversation c SET deleted_at = v.deleted_at, title = NULL FROM (VALUES %s) AS v (id, deleted_at) WHERE c.id = v.id",
        list(deletions.items()),
        template="(%s, %s::timestamptz)",
        page_size=len(deletions),
    )
    cursor.execute("DELETE FROM message WHERE conversation_id = ANY(%s)", (list(deletions),))


def _bury(cursor: Cursor, dead: Sequence[_Dead]) -> None:
    if not dead:
        return
    rows = [(one.shard, one.entry.id.decode(errors="backslashreplace"), one.reason, one.error, readable(one.entry)) for one in dead]
    execute_values(
        cursor,
        "INSERT INTO dead_letter (shard, entry_id, reason, error, entry) VALUES %s ON CONFLICT (shard, entry_id) DO NOTHING",
        rows,
        page_size=len(rows),
    )


def readable(entry: RawEntry) -> str:
    """An entry as JSON in plain ASCII: whatever bytes it holds, a text column takes it, and `unreadable` gives them back."""
    return json.dumps({name.decode("latin-1"): value.decode(errors="surrogateescape") for name, value in entry.fields.items()})


def unreadable(entry: str) -> dict[bytes, bytes]:
    """The fields of an entry from what `readable` made of it."""
    fields: dict[str, Any] = json.loads(entry)
    return {name.encode("latin-1"): value.encode(errors="surrogateescape") for name, value in fields.items()}


def _columns(rows: Sequence[Sequence[int | str | None]]) -> list[str]:
    """Columns for `unnest`, each as the text of an array. psycopg2's lists took this process several times as long for 400 messages, and
    Postgres, which reads each element as an expression of its own, a fifth longer."""
    return [_array(column) for column in zip(*rows, strict=True)]


def _array(column: Sequence[Any]) -> str:
    """Texts are quoted all at once, with a NUL between any two: none holds one (`decode_entry`), and Postgres would not take it."""
    if None in column:
        return "{" + ",".join(["NULL" if value is None else _array((value,))[1:-1] for value in column]) + "}"
    if isinstance(column[0], int):
        return "{" + ",".join(map(str, column)) + "}"
    texts = "\0".join(column)
    if texts.count("\0") != len(column) - 1:
        raise ValueError("a text holds a NUL")
    return '{"' + texts.replace("\\", "\\\\").replace('"', '\\"').replace("\0", '","') + '"}'
