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
from typing import Any

import orjson
import psycopg2
import psycopg2.errors
from psycopg2.extensions import cursor as Cursor
from psycopg2.extras import execute_values

from worker import crashpoints, keys
from worker.backlog import Withdrawn
from worker.codec import Entries, Entry, RawEntry, decode_entries, to_datetime
from worker.errors import BadEntry
from worker.loading import SHARD_LOCK

_MESSAGES = """unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::text[], %s::text[], %s::bigint[], %s::text[], %s::text[])
AS s (id, conversation_id, user_id, role, content, microseconds, status, idempotency_key)"""
_INSERT = f"""
INSERT INTO message (id, conversation_id, user_id, role, content, status, idempotency_key, created_at)
SELECT id, conversation_id, user_id, role, content, status, NULLIF(idempotency_key, ''),
       timestamptz 'epoch' + microseconds * interval '1 microsecond'
FROM {_MESSAGES}
"""
_LEAVE_OUT = "ON CONFLICT DO NOTHING"
"""What is there. Only where a batch may come again: to look before it inserts took Postgres 1.5 of 13.6 µs a row. (That it would refuse a
plain INSERT of what is there is no way to find out: it would note the statement in its log, with the messages in it.)"""
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
FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::text[], %s::text[]) AS v (id, user_id, activity, title, given)
WHERE c.id = v.id AND c.user_id = v.user_id AND c.deleted_at IS NULL
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


@dataclass(frozen=True, slots=True)
class _Dead:
    """An entry that Postgres cannot take; `reason` and `error` name no content."""

    shard: int
    entry: RawEntry
    reason: str
    error: str = ""


@dataclass
class _Plan:
    """What entries come to, if Postgres has their conversations. An entry is named by its position among them."""

    raw: Sequence[RawEntry]
    entries: Entries
    committed: Mapping[int, int]
    """For each shard, the highest id that was committed before, where that was asked: only for renames it makes a difference."""
    created: list[Entry] = field(default_factory=list)
    messages: Sequence[int] = ()
    owners: set[tuple[int, int]] = field(default_factory=set)
    """Conversations, and who the entries say that they belong to."""
    changes: dict[int, _Change] = field(default_factory=lambda: defaultdict(_Change))
    deletions: dict[int, datetime] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    """Of each conversation."""

    @classmethod
    def of(cls, raw: Sequence[RawEntry], entries: Entries, committed: Mapping[int, int] = MappingProxyType({})) -> _Plan:
        """Takes them in their order."""
        numbers = entries.conversation_ids
        plan = cls(raw, entries, committed, owners=set(zip(numbers, entries.user_ids, strict=True)))
        plan.last = {number: position for position, number in enumerate(numbers)}
        plan.messages = [position for position, kind in enumerate(entries.kinds) if kind == "m"]
        if len(plan.messages) < len(raw):
            plan._take_others()
        for position in plan.messages:
            change, microseconds = plan.changes[numbers[position]], entries.microseconds[position]
            if change.activity is None or microseconds > change.activity:
                change.activity = microseconds
            if entries.extras[position] and not change.given_title:
                change.given_title = entries.extras[position]
        if plan.deletions:
            plan.messages = [position for position in plan.messages if numbers[position] not in plan.deletions]
        return plan

    def _take_others(self) -> None:
        for position, kind in enumerate(self.entries.kinds):
            if kind == "m":
                continue
            entry = self.entries.entry(position)
            if kind == "c":
                self.created.append(entry)
            elif kind == "d":
                self.deletions[entry.conversation_id] = to_datetime(entry.microseconds)
            elif entry.id > self.committed.get(keys.shard_of_id(entry.id), 0):
                self.changes[entry.conversation_id].title = entry.title

    def part(self, positions: Sequence[int]) -> _Plan:
        """Of these entries alone."""
        return _Plan.of([self.raw[position] for position in positions], self.entries.some(positions), self.committed)

    @cached_property
    def insertions(self) -> list[tuple[Sequence[int], list[str]]]:
        """The messages that one statement inserts, and their columns, and those of the next."""
        found: list[tuple[Sequence[int], list[str]]] = []
        start = size = 0
        for end, position in enumerate(self.messages, 1):
            size += len(self.entries.contents[position])
            if size >= INSERT_CHARS_MAX or end == len(self.messages):
                part = self.messages[start:end]
                e = self.entries if len(part) == len(self.raw) else self.entries.some(part)
                columns = (e.ids, e.conversation_ids, e.user_ids, e.roles, e.contents, e.microseconds, e.statuses, e.keys)
                found.append((part, list(map(_array, columns))))
                start, size = end, 0
        return found


@dataclass(frozen=True, slots=True)
class Decoded:
    """A batch as it is to be written."""

    plan: _Plan
    dead: list[_Dead]
    last_ids: dict[int, int]
    """For each shard, the highest id that an append has given."""
    first_ids: dict[int, int]
    """And the lowest."""

    def is_beyond(self, committed: Mapping[int, int]) -> bool:
        """Whether all of it comes behind what was committed before, where that is known."""
        return all(number > committed.get(shard, number) for shard, number in self.first_ids.items())


def try_lock(cursor: Cursor, shards: Sequence[int]) -> dict[int, int]:
    """Takes the locks of these shards for the rest of the transaction; the others, somebody else has. Answers which it has, and the highest
    id of each that is committed. (Or was a moment ago: whoever held the lock until then may have committed more. Do not build on it.)

    A log is read only after this, so a flusher that was stalled holds nothing stale: its transaction, and the lock with it, is ended by
    the server, and what it read is read again by the next one.
    """
    cursor.execute(
        "SELECT n, COALESCE((SELECT last_id FROM shard WHERE number = n), 0) FROM unnest(%s::int[]) AS n "
        "WHERE pg_try_advisory_xact_lock(%s, n)",
        (list(shards), SHARD_LOCK),
    )
    return dict(cursor.fetchall())


def decode_batch(batches: Mapping[int, Sequence[RawEntry]]) -> Decoded:
    """All that can be done without Postgres, so that it can be done while Postgres is busy with the part before."""
    raw = [entry for batch in batches.values() for entry in batch]
    shards = [shard for shard, batch in batches.items() for _ in batch]
    dead: list[_Dead] = []
    try:
        entries = _decode(raw, shards)
    except BadEntry:  # seldom: who is it?
        good = []
        for shard, entry in zip(shards, raw, strict=True):
            try:
                _decode([entry], [shard])
                good.append(entry)
            except _OtherShard:
                dead.append(_Dead(shard, entry, "other_shard"))
            except BadEntry as exc:
                dead.append(_Dead(shard, entry, "malformed", type(exc.__cause__).__name__ if exc.__cause__ else ""))
        raw, entries = good, decode_entries(good)
    plan = _Plan.of(raw, entries)
    with suppress(ValueError):  # comes again where it can be dealt with
        plan.insertions  # noqa: B018 - now, and not while Postgres waits for them
    numbers = list(zip(keys.shards_of_ids(entries.ids), entries.ids, strict=True))
    return Decoded(plan, dead, last_ids=dict(numbers), first_ids=dict(reversed(numbers)))


class _OtherShard(BadEntry):
    """It lay in the log of another shard than its id was made in."""


def _decode(raw: Sequence[RawEntry], shards: Sequence[int]) -> Entries:
    entries = decode_entries(raw)
    if keys.shards_of_ids(entries.ids) != shards:
        raise _OtherShard
    return entries


def persist_batch(
    cursor: Cursor, shards: int, batch: Decoded, committed: Mapping[int, int] = MappingProxyType({}), *, by_hand: bool = False
) -> Persisted:
    """Writes what each shard's log held, in its order; the caller commits. Raises psycopg2's errors for anything but bad rows.

    `committed` is what `try_lock` said.

    A title is not written again (unless `by_hand`, from a dead letter): everything else may be, but behind this rename there may be another
    one that is committed, and trimmed by somebody else before this commit.
    """
    plan = batch.plan
    if not by_hand and any(change.title is not None for change in plan.changes.values()):
        cursor.execute("SELECT number, last_id FROM shard WHERE number = ANY(%s)", (list(batch.last_ids),))
        plan = _Plan.of(plan.raw, plan.entries, dict(cursor.fetchall()))
    done = Persisted(planted={(one.shard, one.entry.id) for one in batch.dead})
    dead = batch.dead + _apply_or_halve(cursor, plan, done, is_new=batch.is_beyond(committed))
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


def _apply_or_halve(cursor: Cursor, plan: _Plan, done: Persisted, *, is_new: bool) -> list[_Dead]:
    """`is_new`: Postgres has none of it, as far as is known."""
    raw, entries = plan.raw, plan.entries
    if not raw:
        return []
    cursor.execute("SAVEPOINT part")
    try:
        part = Persisted()
        dead = _apply(cursor, plan, part, is_new=is_new)
    except (psycopg2.DataError, psycopg2.IntegrityError, OverflowError, ValueError) as exc:  # the last two: psycopg2 cannot write the value
        cursor.execute("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part")
        if is_new and isinstance(exc, psycopg2.errors.UniqueViolation):
            return _apply_or_halve(cursor, plan, done, is_new=False)
        if len(raw) == 1:
            number, user_id = entries.conversation_ids[0], entries.user_ids[0]
            before = done.conversations.get(number)
            done.conversations[number] = Touched(before.user_id if before else user_id, raw[0])
            error = f"{type(exc).__name__} {getattr(exc, 'pgcode', None) or ''}".strip()
            return [_Dead(keys.shard_of_id(entries.ids[0]), raw[0], "refused", error)]
        middle = len(raw) // 2
        first, second = plan.part(range(middle)), plan.part(range(middle, len(raw)))
        return _apply_or_halve(cursor, first, done, is_new=is_new) + _apply_or_halve(cursor, second, done, is_new=is_new)
    cursor.execute("RELEASE SAVEPOINT part")
    done.add(part)
    return dead


def _apply(cursor: Cursor, plan: _Plan, done: Persisted, *, is_new: bool) -> list[_Dead]:
    """Conversations before messages; of a conversation that is deleted, nothing comes back."""
    _insert_conversations(cursor, plan.created)
    crashpoints.visit("flush:half_written")
    users = plan.entries.user_ids
    done.conversations = {number: Touched(users[position], plan.raw[position]) for number, position in plan.last.items()}
    dead: list[_Dead] = []
    # What changes conversations finds out in passing whether they are there, undeleted, and whose the entries say. To ask first took
    # Postgres 5 µs for each, and to change it takes 15.
    if len(plan.changes) < len(plan.owners) or _update_conversations(cursor, plan) < len(plan.owners):
        plan, dead = _without_strangers(cursor, plan, done)
        _update_conversations(cursor, plan)
    dead += _insert_messages(cursor, plan, done, is_new=is_new)
    _delete_conversations(cursor, plan.deletions)
    return dead


def _update_conversations(cursor: Cursor, plan: _Plan) -> int:
    """Changes those that are there, undeleted, and whose the entries say; answers how many. Can be repeated.

    A title that a message gave never overwrites one, not even when its entry is replayed after a person has renamed.
    """
    if not plan.changes:
        return 0
    owner = dict(plan.owners)
    rows = [(number, owner[number], change.activity, change.title, change.given_title) for number, change in sorted(plan.changes.items())]
    cursor.execute(_UPDATE, [_array(column) for column in zip(*rows, strict=True)])
    return int(cursor.rowcount)


def _without_strangers(cursor: Cursor, plan: _Plan, done: Persisted) -> tuple[_Plan, list[_Dead]]:
    """What is left of a plan without the entries whose conversation is not there, is deleted, or is not whose the entry says."""
    cursor.execute("SELECT id, user_id, deleted_at IS NOT NULL FROM conversation WHERE id = ANY(%s)", (list(plan.last),))
    owners: dict[int, int] = {}
    gone: set[int] = set()
    for number, user_id, deleted in cursor.fetchall():
        owners[number] = user_id
        if deleted:
            gone.add(number)
    done.conversations |= {
        number: Touched(owners[number], plan.raw[position]) for number, position in plan.last.items() if number in owners
    }
    if not gone and all(owners.get(number) == user_id for number, user_id in plan.owners):
        return plan, []
    kept, dead = [], []
    for position, (number, user_id) in enumerate(zip(plan.entries.conversation_ids, plan.entries.user_ids, strict=True)):
        if owners.get(number) != user_id:
            dead.append(_Dead(keys.shard_of_id(plan.entries.ids[position]), plan.raw[position], "no_conversation"))
        elif number not in gone:
            kept.append(position)
    return plan.part(kept), dead


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


def _insert_messages(cursor: Cursor, plan: _Plan, done: Persisted, *, is_new: bool) -> list[_Dead]:
    dead = []
    for part, columns in plan.insertions:
        cursor.execute(_INSERT if is_new else _INSERT + _LEAVE_OUT, columns)
        done.messages += cursor.rowcount
        if cursor.rowcount < len(part):
            cursor.execute(_LEFT_OUT, columns)
            dead += _left_out(cursor.fetchall(), plan, part, done)
    return dead


def _left_out(found: Sequence[tuple[int, bool, int | None, bool]], plan: _Plan, part: Sequence[int], done: Persisted) -> list[_Dead]:
    dead = []
    entries, at = plan.entries, {plan.entries.ids[position]: position for position in part}
    for number, same_id, key_id, same_request in found:
        position = at[number]
        raw, shard = plan.raw[position], keys.shard_of_id(number)
        if same_id:
            dead.append(_Dead(shard, raw, "id_conflict"))
        elif key_id is not None and not same_request:
            dead.append(_Dead(shard, raw, "key_conflict"))
        elif key_id is None:
            dead.append(_Dead(shard, raw, "not_inserted"))
        done.withdrawn.append(Withdrawn(entries.conversation_ids[position], number, entries.keys[position]))
    return dead


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


def _array(column: Sequence[Any]) -> str:
    """A column for `unnest`, as the text of an array. psycopg2's lists took this process several times as long for 400 messages, and
    Postgres, which reads each element as an expression of its own, a fifth longer.

    Texts are quoted all at once, with a NUL between any two: none holds one (`decode_entries`), and Postgres would not take it.
    """
    if None in column:
        return "{" + ",".join(["NULL" if value is None else _array((value,))[1:-1] for value in column]) + "}"
    if isinstance(column[0], int):
        return "{" + orjson.dumps(column).decode()[1:-1] + "}"
    texts = "\0".join(column)
    if texts.count("\0") != len(column) - 1:
        raise ValueError("a text holds a NUL")
    return '{"' + texts.replace("\\", "\\\\").replace('"', '\\"').replace("\0", '","') + '"}'
