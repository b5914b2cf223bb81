"""Reads committed history from Postgres, a page at a time: the second half of every merged read.

Whoever calls these has asked Redis before: a transaction begins here, so its snapshot is later than Redis's answer, and a message that was
trimmed meanwhile is seen (race R1). Every query names the user, and so does every transaction. A page is a walk down
`(conversation_id, id)` by row comparison, which the planner answers from no other index (the tempting
`WHERE conversation_id = … ORDER BY id` was seen to walk past 40,000 newer messages of others).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, text

from worker.codec import Stored, to_datetime, to_microseconds
from worker.database import read
from worker.loading import ConversationState, to_stored

_LAST_ID = (1 << 63) - 1
_OLDER = text(
    "SELECT id, role, content, created_at, status FROM message WHERE user_id = :user "
    "AND (conversation_id, id) < (:conversation, :until) AND (conversation_id, id) > (:conversation, :from) "
    "ORDER BY conversation_id DESC, id DESC LIMIT :count"
)
_NEWER = text(
    "SELECT id, role, content, created_at, status FROM message WHERE user_id = :user "
    "AND (conversation_id, id) > (:conversation, :from) AND (conversation_id, id) < (:conversation, :until) "
    "ORDER BY conversation_id, id LIMIT :count"
)
_ANY = text(
    "SELECT EXISTS (SELECT FROM message WHERE user_id = :user "
    "AND (conversation_id, id) > (:conversation, :from) AND (conversation_id, id) < (:conversation, :until))"
)
_CONVERSATION = text(
    "SELECT title, created_at, updated_at FROM conversation WHERE id = :conversation AND user_id = :user AND deleted_at IS NULL"
)
_LIST = text(
    "SELECT id, title, created_at, updated_at FROM conversation WHERE user_id = :user AND deleted_at IS NULL "
    "AND (updated_at, id) < (:updated, :id) AND NOT id = ANY(:without) ORDER BY updated_at DESC, id DESC LIMIT :count"
)


@dataclass(frozen=True, slots=True)
class CommittedPage:
    """Messages nearest to the asked-for end ('before': newest first), and whether there is one on the other side of the start."""

    conversation: ConversationState | None
    messages: tuple[Stored, ...]
    beyond: bool


def read_page(
    user_id: int,
    conversation_id: int,
    direction: Literal["before", "after"],
    start: int | None,
    end: int | None,
    count: int,
    *,
    look_beyond: bool,
) -> CommittedPage:
    """Up to `count` messages between `start` and `end`, both exclusive, from `start` on, and their conversation (None: no such one).

    `look_beyond` asks whether the start has anything at it or behind it. At most three statements, one transaction.
    """
    whom = {"user": user_id, "conversation": conversation_id}
    backwards = direction == "before"
    low, high = (end, start) if backwards else (start, end)
    with read(user=user_id) as connection:
        bounds = {"from": low or 0, "until": _LAST_ID if high is None else high, "count": count}
        rows = connection.execute(_OLDER if backwards else _NEWER, whom | bounds).all() if count > 0 else []
        beyond = False
        if look_beyond and start is not None:
            other_side = {"from": start - 1, "until": _LAST_ID} if backwards else {"from": 0, "until": start + 1}
            beyond = bool(connection.execute(_ANY, whom | other_side).scalar_one())
        conversation = _conversation(connection, user_id, conversation_id)  # last: if it is there now, nobody had deleted the messages
        if conversation is None:
            return CommittedPage(None, (), False)
    return CommittedPage(conversation, tuple(to_stored(conversation_id, user_id, row) for row in rows), beyond)


def read_conversation(user_id: int, conversation_id: int) -> ConversationState | None:
    """One conversation; None if this user has none such."""
    with read(user=user_id) as connection:
        return _conversation(connection, user_id, conversation_id)


def list_conversations(user_id: int, before: tuple[int, int] | None, without: Collection[int], count: int) -> list[ConversationState]:
    """A user's conversations, latest activity first, from `before` (activity in microseconds, id) on, without those that Redis told of."""
    updated, number = before or (_YEAR_9999, _LAST_ID)
    values = {"user": user_id, "updated": to_datetime(updated), "id": number, "without": list(without), "count": count}
    with read(user=user_id) as connection:
        rows = connection.execute(_LIST, values).all()
    return [ConversationState(row[0], user_id, row[1], to_microseconds(row[2]), to_microseconds(row[3])) for row in rows]


_YEAR_9999 = 253_370_764_800_000_000


def _conversation(connection: Connection, user_id: int, conversation_id: int) -> ConversationState | None:
    row = connection.execute(_CONVERSATION, {"conversation": conversation_id, "user": user_id}).one_or_none()
    return None if row is None else ConversationState(conversation_id, user_id, row[0], to_microseconds(row[1]), to_microseconds(row[2]))
