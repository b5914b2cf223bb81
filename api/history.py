"""Reads: pending first, then committed, merged by id, so that nobody can tell the one from the other.

The order is the whole secret. Redis is asked first; what it does not have was committed before it answered, and Postgres is asked in a
transaction that begins afterwards. The other way round, a flush between the two would hide an acknowledged message (race R1).

What Redis holds of a conversation is its latest messages without a gap, so a page has one seam at most: from the cached messages down to
`first_id`, and below it what Postgres has. A page that does not reach the seam never asks Postgres. If Postgres is needed and away, the
answer is 503, never a page that only looks whole (race R22).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from api.dependencies import Page
from api.errors import Unprocessable
from worker import committed
from worker.codec import Stored
from worker.errors import NotFound
from worker.keys import ID_LIMIT
from worker.loading import ConversationState
from worker.pending import CachedPage, PendingLog, in_time


class HistoryPage(NamedTuple):
    """A page of a history, oldest first. `committed`: every id up to here is in Postgres."""

    conversation: ConversationState
    messages: Sequence[Stored]
    committed: int
    has_older: bool
    has_newer: bool


@dataclass(frozen=True, slots=True)
class ConversationList:
    """A page of a user's conversations, latest activity first."""

    items: tuple[ConversationState, ...]
    next_cursor: str | None


async def read_history(log: PendingLog, user_id: int, conversation_id: int, page: Page) -> HistoryPage:
    """A page of a conversation; raises `NotFound`, `RedisUnavailable`, `PostgresUnavailable` and `TooSlow`."""
    async with in_time():
        if page.after is not None:
            return await _read_after(log, user_id, conversation_id, page.after, page.limit)
        return await _read_before(log, user_id, conversation_id, page.before, page.limit)


async def read_conversation(log: PendingLog, user_id: int, conversation_id: int) -> ConversationState:
    """A conversation as it is now; raises as `read_history` does."""
    async with in_time():
        cached = await log.read(user_id, conversation_id, None, None, 0)
        if cached is not None:
            return cached.conversation
        found = await log.threads.run(partial(committed.read_conversation, user_id, conversation_id))
    if found is None:
        raise NotFound()
    log.load_soon(user_id, conversation_id)
    return found


async def list_conversations(log: PendingLog, user_id: int, limit: int, cursor: str | None) -> ConversationList:
    """A page of the conversation list. Those with pending changes are as Redis has them, the others as Postgres has them."""
    before = None if cursor is None else _decode_cursor(cursor)
    async with in_time():
        changed = await log.changed(user_id)
        rows = await log.threads.run(partial(committed.list_conversations, user_id, before, changed, limit + 1))
    rows += [state for state in changed.values() if state is not None and (before is None or _position(state) < before)]
    rows.sort(key=_position, reverse=True)
    items = tuple(rows[:limit])
    return ConversationList(items, _encode_cursor(items[-1]) if len(rows) > limit else None)


async def _read_before(log: PendingLog, user_id: int, conversation_id: int, before: int | None, limit: int) -> HistoryPage:
    cached = await log.read(user_id, conversation_id, "before", before, limit + 1)
    if cached is not None and (len(cached.messages) > limit or cached.whole):
        return HistoryPage(
            conversation=cached.conversation,
            messages=cached.messages[:limit][::-1],
            committed=cached.committed,
            has_older=len(cached.messages) > limit,
            has_newer=_has_at_or_after(cached, before),
        )
    newest_first: Sequence[Stored] = tuple(cached.messages) if cached else ()
    seam = newest_first[-1].id if newest_first else before
    count = limit + 1 - len(newest_first)
    page = partial(committed.read_page, user_id, conversation_id, "before", seam, None, count, look_beyond=cached is None)
    below = await log.threads.run(page)
    if below.conversation is None:  # also one that was deleted since Redis answered: the cached part alone would look whole
        raise NotFound()
    newest_first = (*newest_first, *below.messages) if newest_first else below.messages
    if cached is not None:
        conversation, has_newer = cached.conversation, _has_at_or_after(cached, before)
    else:
        conversation, has_newer = below.conversation, below.beyond
        log.load_soon(user_id, conversation_id)
    return HistoryPage(
        conversation=conversation,
        messages=newest_first[:limit][::-1],
        committed=cached.committed if cached else ID_LIMIT,
        has_older=len(newest_first) > limit,
        has_newer=has_newer,
    )


async def _read_after(log: PendingLog, user_id: int, conversation_id: int, after: int, limit: int) -> HistoryPage:
    cached = await log.read(user_id, conversation_id, "after", after, limit + 1)
    oldest_first: Sequence[Stored]
    if cached is not None and _covers(cached, after):
        oldest_first, conversation, has_older = cached.messages, cached.conversation, _has_at_or_before(cached, after)
    else:
        seam = cached.first_id if cached else None
        below = await log.threads.run(
            partial(committed.read_page, user_id, conversation_id, "after", after, seam, limit + 1, look_beyond=True)
        )
        if below.conversation is None:
            raise NotFound()
        oldest_first, conversation, has_older = below.messages, below.conversation, below.beyond
        if cached is not None:
            oldest_first, conversation = (*below.messages, *cached.messages), cached.conversation
        else:
            log.load_soon(user_id, conversation_id)
    return HistoryPage(
        conversation=conversation,
        messages=oldest_first[:limit],
        committed=cached.committed if cached else ID_LIMIT,
        has_older=has_older,
        has_newer=len(oldest_first) > limit,
    )


def _covers(cached: CachedPage, after: int) -> bool:
    """Whether every message after this id is cached."""
    return cached.whole or (cached.first_id is not None and after >= cached.first_id - 1)


def _has_at_or_after(cached: CachedPage, number: int | None) -> bool:
    return number is not None and cached.last_id >= number


def _has_at_or_before(cached: CachedPage, number: int) -> bool:
    return not cached.whole or (cached.first_id is not None and cached.first_id <= number)


def _position(state: ConversationState) -> tuple[int, int]:
    return state.updated, state.id


def _encode_cursor(state: ConversationState) -> str:
    return base64.urlsafe_b64encode(b"%d.%d" % _position(state)).rstrip(b"=").decode()


def _decode_cursor(cursor: str) -> tuple[int, int]:
    try:
        updated, number = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).split(b".")
        position = int(updated), int(number)
    except (ValueError, binascii.Error):
        position = (-1, -1)
    if not (0 <= position[0] < 1 << 57 and 0 <= position[1] < ID_LIMIT):
        raise Unprocessable(errors=[{"loc": ["query", "cursor"], "message": "must be a next_cursor that was answered before"}])
    return position
