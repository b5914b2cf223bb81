"""Committed history put straight into PostgreSQL: conversations that Redis has never seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from benchmarks.stand import Stand
from worker import keys
from worker.settings import SHARD_SLOTS

CHUNK = 500_000


@dataclass(frozen=True, slots=True)
class Planted:
    """(user, conversation) of each, and the ids of the last one's messages, in order."""

    pairs: tuple[tuple[int, int], ...]
    message_ids: Sequence[int]


def plant(stand: Stand, database: str, *, user: int, conversations: int, messages: int) -> Planted:
    """Conversations of one user with so many messages each (200 characters), older than anything that is written now."""
    shard = keys.shard_of_user(user, stand.chatkeep.settings.shards)
    start = 1 + max(
        (stand.query(f"SELECT coalesce(max(id), 0) FROM {table} WHERE id < %s", _PLANTED_MAX * SHARD_SLOTS, database=database)[0][0])
        // SHARD_SLOTS
        for table in ("conversation", "message")
    )
    with stand.connection(database) as connection, connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO conversation (id, user_id, title, created_at, updated_at) "
            "SELECT (%s::bigint + n) * %s + %s, %s, 'planted ' || n, now() - interval '1 day', "
            "now() - interval '1 day' - n * interval '1 s' FROM generate_series(0, %s) n",
            (start, SHARD_SLOTS, shard, user, conversations - 1),
        )
        first_message = start + conversations
        total = conversations * messages
        with _without_foreign_keys(cursor) if total > CHUNK else nullcontext():
            for chunk in range(0, total, CHUNK):  # message by message through all conversations, as live traffic would lie in the heap
                cursor.execute(
                    "INSERT INTO message (conversation_id, id, user_id, role, content, created_at, status) "
                    "SELECT (%s::bigint + n %% %s) * %s + %s, (%s::bigint + n) * %s + %s, %s, "
                    "CASE n / %s %% 2 WHEN 0 THEN 'user' ELSE 'assistant' END, left(repeat(md5(n::text) || ' ', 7), 200), "
                    "now() - interval '1 day', 'complete' FROM generate_series(%s, %s) n",
                    (
                        *(start, conversations, SHARD_SLOTS, shard),
                        *(first_message, SHARD_SLOTS, shard, user),
                        *(conversations, chunk, min(chunk + CHUNK, total) - 1),
                    ),
                )
        cursor.execute("VACUUM (ANALYZE) message")
        cursor.execute("VACUUM (ANALYZE) conversation")
    pairs = tuple((user, (start + n) * SHARD_SLOTS + shard) for n in range(conversations))
    last = range(first_message + conversations - 1, first_message + total, conversations)
    return Planted(pairs, [tick * SHARD_SLOTS + shard for tick in last])


@contextmanager
def _without_foreign_keys(cursor: Any) -> Iterator[None]:
    """Ten million rows: their keys are checked at the end, at once. Only for a database that nobody uses."""
    cursor.execute("SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'message'::regclass AND contype = 'f'")
    constraints = cursor.fetchall()
    for name, _ in constraints:
        cursor.execute(f"ALTER TABLE message DROP CONSTRAINT {name}")
    yield
    for name, definition in constraints:
        cursor.execute(f"ALTER TABLE message ADD CONSTRAINT {name} {definition}")


_PLANTED_MAX = 1 << 40
"""In ticks: what is written now has higher ones (the clock passed this in May 2026)."""
