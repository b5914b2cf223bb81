"""What Redis has forgotten and Postgres knows: read here, synchronously, one statement each.

`worker/pending.py` installs it. Each function opens its own short transaction, so that its snapshot begins after the call
(READ COMMITTED); whoever calls it has asked Redis before (race R1: pending first, then committed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from sqlalchemy import text

from worker.codec import HASH_SQL, CommittedMessages, Stored, to_microseconds
from worker.database import read_rows, transaction
from worker.errors import ConfigurationError

RETRY_KEYS_MAX = 10_000
"""Retry keys of a conversation that are kept in Redis; for one with more, Postgres is asked for a key that is not among them."""
MESSAGES_BYTES_MAX = 4 << 20
KEYS_BYTES_MAX = 32 << 20
"""What a load reads at most, so that it fits into its time-out however long the messages are: 200 of the longest are 80 MB, which took
2 s; the keys' values are hashes of the messages, of which 64 MB took 0.7 s."""
SHARD_LOCK = 0x636B
"""The class of the advisory locks on shards ("ck")."""


@dataclass(frozen=True, slots=True)
class ConversationState:
    """A conversation as a reader sees it; times in Unix microseconds."""

    id: int
    user_id: int
    title: str | None
    created: int
    updated: int


@dataclass(frozen=True, slots=True)
class LoadedConversation:
    """A conversation with what is to be cached of it: the latest messages, oldest first, and its retry keys."""

    state: ConversationState
    deleted: bool
    messages: tuple[Stored, ...]
    whole: bool
    retry_keys: tuple[tuple[str, str], ...]
    all_keys: bool


def load_conversation(conversation_id: int, user_id: int, messages_max: int, seconds: float) -> LoadedConversation | None:
    """Everything of a conversation that the cache holds; None if this user has no such conversation."""
    values = {"id": conversation_id, "user": user_id, "count": messages_max + 1, "bytes": MESSAGES_BYTES_MAX}
    rows = read_rows(_LOAD, values | {"keys_count": RETRY_KEYS_MAX + 1, "keys_bytes": KEYS_BYTES_MAX}, user=user_id, seconds=seconds)
    found = next((row for row in rows if row[0] is None), None)
    if found is None:
        return None
    state = ConversationState(conversation_id, user_id, found[2], to_microseconds(found[3]), to_microseconds(found[6]))
    latest = [row for row in rows if row[1] is not None]
    keys = [row for row in rows if row[5] is not None]
    for part in (latest, keys):
        part.sort(key=itemgetter(0), reverse=True)  # UNION ALL promises no order; they come in it
    messages = CommittedMessages(conversation_id, user_id, [row for row in latest[:messages_max] if row[2] is not None])
    pairs = [(row[5], row[2]) for row in keys[:RETRY_KEYS_MAX] if row[2] is not None]
    return LoadedConversation(
        state=state,
        deleted=found[7] is not None,
        messages=tuple(reversed(messages)),
        whole=len(messages) == len(latest),
        retry_keys=tuple(pairs),
        all_keys=len(pairs) == len(keys),
    )


_NEWEST_FIRST = (
    "SELECT *, sum(octet_length(content)) OVER (ORDER BY conversation_id DESC, id DESC ROWS UNBOUNDED PRECEDING) AS size FROM message "
    "WHERE conversation_id = :id AND user_id = :user {} ORDER BY conversation_id DESC, id DESC LIMIT {}"
)
"""The length of a text is known without reading it. What is over the limit comes without it, and shows that there is more."""
_LOAD = text(
    "SELECT NULL::bigint AS id, NULL AS role, title AS content, created_at, NULL AS status, NULL AS key, updated_at, deleted_at "
    "FROM conversation WHERE id = :id AND user_id = :user UNION ALL "
    "(SELECT id, role, CASE WHEN size <= :bytes THEN content END, created_at, status, NULL, NULL, NULL "
    f"FROM ({_NEWEST_FIRST.format('', ':count')}) AS latest ORDER BY conversation_id DESC, id DESC) UNION ALL "
    f"(SELECT id, NULL, CASE WHEN size <= :keys_bytes THEN id || ':' || {HASH_SQL} END, NULL, NULL, idempotency_key, NULL, NULL "
    f"FROM ({_NEWEST_FIRST.format('AND idempotency_key IS NOT NULL', ':keys_count')}) AS latest ORDER BY conversation_id DESC, id DESC)"
)
"""The conversation (its row has no id), its latest messages, and the values of its latest retry keys (whose rows have no role)."""


def find_messages(conversation_id: int, user_id: int, ids: Sequence[int], seconds: float) -> CommittedMessages:
    """Those of these messages that are committed, in no order."""
    values = {"conversation": conversation_id, "user": user_id, "ids": list(ids)}
    with transaction(seconds=seconds, read_only=True, user=user_id) as connection:
        rows = connection.execute(_MESSAGES, values).all()
    return CommittedMessages(conversation_id, user_id, rows)


_MESSAGES = text(
    "SELECT id, role, content, created_at, status FROM message WHERE conversation_id = :conversation AND user_id = :user AND id = ANY(:ids)"
)


def find_retry_keys(conversation_id: int, user_id: int, keys: Sequence[str], seconds: float) -> tuple[tuple[str, str], ...]:
    """Those of these keys that Postgres knows, with their values as the cache keeps them; and that of the reply to the first's message."""
    with transaction(seconds=seconds, read_only=True, user=user_id) as connection:

        def ask(wanted: Sequence[str]) -> dict[str, str]:
            values = {"conversation": conversation_id, "user": user_id, "keys": list(wanted)}
            return {row[0]: row[1] for row in connection.execute(_KEYS, values)}

        found = ask(keys)
        if first := found.get(keys[0]):
            found |= ask(["r:" + first.partition(":")[0]])
    return tuple(found.items())


_KEYS = text(
    f"SELECT idempotency_key, id || ':' || {HASH_SQL} FROM message "
    "WHERE conversation_id = :conversation AND user_id = :user AND idempotency_key = ANY(:keys)"
)


def load_created_keys(user_id: int, seconds: float) -> tuple[tuple[tuple[str, str], ...], bool]:
    """The retry keys of the conversations that a user created, the latest first, and whether these are all."""
    with transaction(seconds=seconds, user=user_id) as connection:  # not read_only: this one has to sort
        rows = connection.execute(
            text(
                "SELECT idempotency_key, id, created_at, request_hash FROM conversation "
                "WHERE user_id = :user AND idempotency_key IS NOT NULL ORDER BY id DESC LIMIT :count"
            ),
            {"user": user_id, "count": RETRY_KEYS_MAX + 1},
        ).all()
    pairs = tuple((key, f"{number}:{to_microseconds(created)}:{digest}") for key, number, created, digest in rows[:RETRY_KEYS_MAX])
    return pairs, len(rows) <= RETRY_KEYS_MAX


def find_created_key(user_id: int, key: str, seconds: float) -> tuple[str, str] | None:
    """One such key, for a user who has more than the cache holds."""
    with transaction(seconds=seconds, read_only=True, user=user_id) as connection:
        row = connection.execute(
            text("SELECT id, created_at, request_hash FROM conversation WHERE user_id = :user AND idempotency_key = :key"),
            {"user": user_id, "key": key},
        ).one_or_none()
    return None if row is None else (key, f"{row[0]}:{to_microseconds(row[1])}:{row[2]}")


def highest_id(shard: int, shards: int, seconds: float) -> int:
    """The highest id of a shard that Postgres knows, read while no flush of it is under way.

    A flush holds the shard's lock from before it reads the log until its commit, so nothing that a wiped Redis once numbered can still be
    on its way when this returns (race R11). Notes down the number of shards at the first call; raises `ConfigurationError` for another.
    """
    with transaction(seconds=seconds, lock_timeout_ms=int(seconds * 1000)) as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:class, :shard)"), {"class": SHARD_LOCK, "shard": shard})
        connection.execute(
            text("INSERT INTO shard (number, shards, last_id) VALUES (:number, :shards, 0) ON CONFLICT (number) DO NOTHING"),
            {"number": shard, "shards": shards},
        )
        made_with, last_id = connection.execute(text("SELECT shards, last_id FROM shard WHERE number = :number"), {"number": shard}).one()
    check_shards(made_with, shards)
    return int(last_id)


def shards_in_postgres(seconds: float) -> int | None:
    """The number of shards that this installation was made with; None at the very first start."""
    with transaction(seconds=seconds) as connection:
        return connection.execute(text("SELECT max(shards) FROM shard")).scalar_one_or_none()


def check_shards(made_with: int, shards: int) -> None:
    """Raises `ConfigurationError` if a user's conversations would be looked for in another shard than they were put."""
    if made_with != shards:
        raise ConfigurationError(
            f"SHARDS is {shards}, but this installation was made with {made_with}, and a user's conversations cannot change their shard. "
            f"Set SHARDS={made_with}. To move: export the history, start an empty installation with the new number, and import it."
        )
