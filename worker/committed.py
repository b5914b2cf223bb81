"""Reads committed history from Postgres, a page at a time: the second half of every merged read.

Whoever calls these has asked Redis before: a transaction begins here, so its snapshot is later than Redis's answer, and a message that was
trimmed meanwhile is seen (race R1). Every query names the user, and so does every transaction. A page is a walk down
`(conversation_id, id)` by row comparison, which the planner answers from no other index (the tempting
`WHERE conversation_id = … ORDER BY id` was seen to walk past 40,000 newer messages of others).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

from sqlalchemy import TextClause, text

from worker.codec import CommittedMessages, Stored, to_datetime, to_microseconds
from worker.database import read_rows
from worker.loading import ConversationState

_LAST_ID = (1 << 63) - 1
_THE_CONVERSATION = "FROM conversation WHERE id = :conversation AND user_id = :user"
"""`AND deleted_at IS NULL` would tempt a planner without statistics to walk the list of the user's conversations: it is looked at here."""
_OLDER = (
    "FROM message WHERE user_id = :user "
    "AND (conversation_id, id) < (:conversation, :until) AND (conversation_id, id) > (:conversation, :from) "
    "ORDER BY conversation_id DESC, id DESC LIMIT :count"
)
_NEWER = (
    "FROM message WHERE user_id = :user "
    "AND (conversation_id, id) > (:conversation, :from) AND (conversation_id, id) < (:conversation, :until) "
    "ORDER BY conversation_id, id LIMIT :count"
)
_BEYOND = (
    "FROM message WHERE user_id = :user "
    "AND (conversation_id, id) > (:conversation, :beyond_from) AND (conversation_id, id) < (:conversation, :beyond_until) LIMIT 1"
)


def _page(messages: str, *, look_beyond: bool) -> TextClause:
    """The conversation (its row has no id), up to `count` messages, and any message on the other side (whose row has no role).

    Of one snapshot, because it is one statement: a conversation that is there has all of its messages.
    """
    parts = [
        "SELECT NULL::bigint AS id, NULL AS role, title AS content, created_at, NULL AS status, updated_at, deleted_at "
        f"{_THE_CONVERSATION}",
        f"(SELECT id, role, content, created_at, status, NULL, NULL {messages})",
        f"(SELECT id, NULL, NULL, NULL, NULL, NULL, NULL {_BEYOND})",
    ]
    return text(" UNION ALL ".join(parts if look_beyond else parts[:2]))


_PAGES = {
    (direction, look_beyond): _page(messages, look_beyond=look_beyond)
    for direction, messages in (("before", _OLDER), ("after", _NEWER))
    for look_beyond in (False, True)
}
_CONVERSATION = text(f"SELECT title, created_at, updated_at, deleted_at {_THE_CONVERSATION}")
_LIST = text(
    "SELECT id, title, created_at, updated_at FROM conversation WHERE user_id = :user AND deleted_at IS NULL "
    "AND (updated_at, id) < (:updated, :id) AND NOT id = ANY(:without) ORDER BY updated_at DESC, id DESC LIMIT :count"
)


@dataclass(frozen=True, slots=True)
class CommittedPage:
    """Messages nearest to the asked-for end ('before': newest first), and whether there is one on the other side of the start."""

    conversation: ConversationState | None
    messages: Sequence[Stored]
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

    `look_beyond` asks whether the start has anything at it or behind it. One statement.
    """
    backwards = direction == "before"
    low, high = (end, start) if backwards else (start, end)
    values = {
        "user": user_id,
        "conversation": conversation_id,
        "from": low or 0,
        "until": _LAST_ID if high is None else high,
        "count": count,
    }
    look_beyond = look_beyond and start is not None
    if start is not None:
        values |= {"beyond_from": start - 1, "beyond_until": _LAST_ID} if backwards else {"beyond_from": 0, "beyond_until": start + 1}
    rows = read_rows(_PAGES[direction, look_beyond], values, user=user_id)
    found = next((row for row in rows if row[0] is None), None)
    if found is None or found[6] is not None:
        return CommittedPage(None, (), False)
    messages = [row for row in rows if row[1] is not None]
    messages.sort(key=itemgetter(0), reverse=backwards)  # UNION ALL promises no order; they come in it
    conversation = ConversationState(conversation_id, user_id, found[2], to_microseconds(found[3]), to_microseconds(found[5]))
    beyond = len(rows) > len(messages) + 1
    return CommittedPage(conversation, CommittedMessages(conversation_id, user_id, messages), beyond)


def read_conversation(user_id: int, conversation_id: int) -> ConversationState | None:
    """One conversation; None if this user has none such."""
    rows = read_rows(_CONVERSATION, {"conversation": conversation_id, "user": user_id}, user=user_id)
    if not rows or rows[0][3] is not None:
        return None
    return ConversationState(conversation_id, user_id, rows[0][0], to_microseconds(rows[0][1]), to_microseconds(rows[0][2]))


def list_conversations(user_id: int, before: tuple[int, int] | None, without: Collection[int], count: int) -> list[ConversationState]:
    """A user's conversations, latest activity first, from `before` (activity in microseconds, id) on, without those that Redis told of."""
    updated, number = before or (_YEAR_9999, _LAST_ID)
    values = {"user": user_id, "updated": to_datetime(updated), "id": number, "without": list(without), "count": count}
    rows = read_rows(_LIST, values, user=user_id)
    return [ConversationState(row[0], user_id, row[1], to_microseconds(row[2]), to_microseconds(row[3])) for row in rows]


_YEAR_9999 = 253_370_764_800_000_000
