"""Conversations and their messages over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Response

from api import history
from api.dependencies import AppSettings, ConversationId, CurrentUser, HistoryPage, IdempotencyKey, Log, Page
from api.errors import problems
from api.metrics import ACCEPTED
from api.schemas import (
    ConversationChange,
    ConversationOut,
    ConversationPage,
    MessageOut,
    MessagePage,
    MessagesOut,
    NewConversation,
    NewMessage,
    NewMessages,
)
from worker import crashpoints
from worker.codec import public, rfc3339
from worker.loading import ConversationState
from worker.pending import Appended, Draft, PendingLog, client_key
from worker.settings import Settings

MESSAGES_ROUTE = "/api/conversations/{conversation_id}/messages"
BATCH_ROUTE = MESSAGES_ROUTE + "/batch"
router = APIRouter(prefix="/api/conversations", tags=["conversations"])


@router.post("/", status_code=201, response_model=ConversationOut, responses=problems(401, 413, 422, 429, 503))
async def create_conversation(
    user: CurrentUser, log: Log, settings: AppSettings, body: NewConversation, key: IdempotencyKey = None
) -> Response:
    """Creates a conversation."""
    created = await log.create(user.id, body.title, key=client_key(key) if key else None)
    headers = acknowledgement(settings, created.replayed) | {"Location": f"/api/conversations/{created.conversation.id}"}
    return as_json(conversation_json(created.conversation), 201, headers)


@router.get("/", response_model=ConversationPage, responses=problems(401, 422, 503))
async def list_conversations(
    user: CurrentUser,
    log: Log,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """Lists the caller's conversations, the latest activity first."""
    page = await history.list_conversations(log, user.id, limit, cursor)
    items = b",".join(conversation_json(item) for item in page.items)
    return as_json(b'{"items":[%s],"next_cursor":%s}' % (items, orjson.dumps(page.next_cursor)))


@router.get("/{conversation_id}", response_model=ConversationOut, responses=problems(401, 404, 503))
async def get_conversation(user: CurrentUser, log: Log, conversation_id: ConversationId) -> Response:
    """Gives one conversation."""
    return as_json(conversation_json(await history.read_conversation(log, user.id, conversation_id)))


@router.patch("/{conversation_id}", response_model=ConversationOut, responses=problems(401, 404, 413, 422, 429, 503))
async def rename_conversation(
    user: CurrentUser, log: Log, settings: AppSettings, conversation_id: ConversationId, body: ConversationChange
) -> Response:
    """Gives a conversation a title that no message will overwrite."""
    renamed = await log.rename(user.id, conversation_id, body.title)
    return as_json(conversation_json(renamed), headers=acknowledgement(settings))


@router.delete("/{conversation_id}", status_code=204, responses=problems(401, 404, 503))
async def delete_conversation(user: CurrentUser, log: Log, settings: AppSettings, conversation_id: ConversationId) -> Response:
    """Deletes a conversation with its messages; nothing brings it back."""
    await log.delete(user.id, conversation_id)
    return Response(status_code=204, headers=acknowledgement(settings))


@router.post("/{conversation_id}/messages", status_code=201, response_model=MessageOut, responses=problems(401, 404, 413, 422, 429, 503))
async def add_message(
    user: CurrentUser, log: Log, settings: AppSettings, conversation_id: ConversationId, body: NewMessage, key: IdempotencyKey = None
) -> Response:
    """Adds a message; it is safe in the pending log when the answer leaves."""
    return await add(log, settings, user.id, conversation_id, body, key)


async def add(log: PendingLog, settings: Settings, user_id: int, conversation_id: int, body: NewMessage, key: str | None) -> Response:
    """The same, also for `api/fast.py`."""
    [appended] = await _append(log, user_id, conversation_id, (body,), key)
    return as_json(appended.message.public(appended.committed), 201, acknowledgement(settings, appended.replayed))


@router.post(
    "/{conversation_id}/messages/batch", status_code=201, response_model=MessagesOut, responses=problems(401, 404, 413, 422, 429, 503)
)
async def add_messages(
    user: CurrentUser, log: Log, settings: AppSettings, conversation_id: ConversationId, body: NewMessages, key: IdempotencyKey = None
) -> Response:
    """Adds up to 100 messages at once, such as a question and its answer: all of them are safe when the answer leaves, or none is there."""
    return await add_all(log, settings, user.id, conversation_id, body, key)


async def add_all(log: PendingLog, settings: Settings, user_id: int, conversation_id: int, body: NewMessages, key: str | None) -> Response:
    """The same, also for `api/fast.py`."""
    appended = await _append(log, user_id, conversation_id, body.messages, key)
    items = b",".join(one.message.public(one.committed) for one in appended)
    return as_json(b'{"items":[%s]}' % items, 201, acknowledgement(settings, appended[0].replayed))


async def _append(
    log: PendingLog, user_id: int, conversation_id: int, messages: Sequence[NewMessage], key: str | None
) -> Sequence[Appended]:
    crashpoints.visit("append:validated")
    drafts = [Draft(message.role, message.content) for message in messages]
    appended = await log.append_all(user_id, conversation_id, drafts, key=client_key(key) if key else None)
    if not appended[0].replayed:
        ACCEPTED.inc(len(appended))
    crashpoints.visit("append:before_answer")
    return appended


@router.get("/{conversation_id}/messages", response_model=MessagePage, responses=problems(401, 404, 422, 503))
async def list_messages(user: CurrentUser, log: Log, conversation_id: ConversationId, page: HistoryPage) -> Response:
    """Gives a page of the history, oldest first: pending and committed messages as one."""
    return await list_page(log, user.id, conversation_id, page)


async def list_page(log: PendingLog, user_id: int, conversation_id: int, page: Page) -> Response:
    """The same, also for `api/fast.py`."""
    return as_json(b"{" + history_json(await history.read_history(log, user_id, conversation_id, page)) + b"}")


def history_json(page: history.HistoryPage) -> bytes:
    """The members of a page of messages, out of stored bytes."""
    items = public(page.messages, page.committed)
    return b'"items":[%s],"has_older":%s,"has_newer":%s' % (items, orjson.dumps(page.has_older), orjson.dumps(page.has_newer))


def conversation_json(state: ConversationState) -> bytes:
    """A Conversation of the contract."""
    return orjson.dumps(
        {
            "id": state.id,
            "user_id": state.user_id,
            "title": state.title,
            "created_at": rfc3339(state.created),
            "updated_at": rfc3339(state.updated),
        }
    )


def acknowledgement(settings: Settings, replayed: bool = False) -> dict[str, str]:
    """The headers of an acknowledged write."""
    headers = {"Idempotent-Replayed": "true"} if replayed else {}
    return headers | {"X-Durability": "memory"} if settings.unsafe_durability else headers


def as_json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer out of finished bytes."""
    return _Finished(body, status, headers)


class _Finished(Response):
    """Starlette's looks at each header that it is given, and encodes its own each time: with that, 3 of an answer's 8 µs."""

    def __init__(self, body: bytes, status: int, headers: dict[str, str] | None) -> None:
        self.status_code, self.body, self.background = status, body, None
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        if headers:
            self.raw_headers += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
