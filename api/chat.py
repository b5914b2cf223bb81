"""Chat over HTTP: a session is a conversation, and a turn is a message with the reply to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from api import history
from api.conversations import acknowledgement, as_json, history_json
from api.dependencies import AppSettings, CurrentUser, HistoryPage, IdempotencyKey, Log, SessionId
from api.errors import describe_problem, problems
from api.schemas import ChatMessage, ChatStart, ChatTurn, Session, SessionHistory
from api.turns import Begun, Turns
from worker.codec import Stored
from worker.errors import ChatkeepError
from worker.pending import client_key

router = APIRouter(prefix="/api/chat", tags=["chat"])

EVENT_STREAM = "text/event-stream"


async def _turns(request: Request) -> Turns:
    turns: Turns = request.app.state.turns
    return turns


TurnsOf = Annotated[Turns, Depends(_turns)]


@router.post("/start", status_code=201, response_model=Session, responses=problems(401, 404, 413, 422, 503))
async def start(user: CurrentUser, log: Log, settings: AppSettings, body: ChatStart, key: IdempotencyKey = None) -> Response:
    """Starts a session: a new conversation, or one to go on with."""
    if body.conversation_id is not None:
        conversation = await history.read_conversation(log, user.id, body.conversation_id)
        return as_json(orjson.dumps(_session(conversation.id)), 201)
    created = await log.create(user.id, body.title, key=client_key(key) if key else None)
    return as_json(orjson.dumps(_session(created.conversation.id)), 201, acknowledgement(settings, created.replayed))


@router.post(
    "/{session_id}/message",
    response_model=ChatTurn,
    responses={200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}, **problems(401, 404, 409, 413, 422, 502, 503)},
)
async def message(
    user: CurrentUser,
    turns: TurnsOf,
    settings: AppSettings,
    session_id: SessionId,
    body: ChatMessage,
    key: IdempotencyKey = None,
    accept: Annotated[str, Header()] = "",
) -> Response:
    """Stores a message and answers with the reply; with `Accept: text/event-stream`, as it is written."""
    begun = await turns.begin(user.id, session_id, body.message, key)
    headers = acknowledgement(settings, begun.replayed)
    if EVENT_STREAM in accept:
        headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(turns, session_id, begun), headers=headers, media_type=EVENT_STREAM)
    reply = await asyncio.shield(begun.reply)  # a client that hangs up does not stop it
    turn = _session(session_id) | {
        "reply": orjson.loads(reply.message.body)["content"],
        "user_message": orjson.Fragment(begun.user.message.public(begun.user.committed)),
        "assistant_message": orjson.Fragment(reply.message.public(reply.committed)),
    }
    return as_json(orjson.dumps(turn), headers=headers)


@router.get("/{session_id}/history", response_model=SessionHistory, responses=problems(401, 404, 422, 503))
async def session_history(user: CurrentUser, log: Log, session_id: SessionId, page: HistoryPage) -> Response:
    """Gives a page of the session's history, as the messages of its conversation."""
    found = await history.read_history(log, user.id, session_id, page)
    return as_json(orjson.dumps(_session(session_id))[:-1] + b"," + history_json(found) + b"}")


async def _events(turns: Turns, conversation_id: int, begun: Begun) -> AsyncIterator[bytes]:
    """A turn as server-sent events. Its end does not depend on the stream in Redis: the task's result is the last event if that is lost."""
    after = ""
    try:
        if not begun.replayed:
            async for event in turns.follow(conversation_id, after):
                if event is None:
                    yield KEEPALIVE_COMMENT
                    continue
                after = event.id
                yield format_sse_event(event=event.name, data_str=event.data.decode(), id=event.id)
                if event.last:
                    return
        if not after:
            yield _message_event("user_message", begun.user.message, begun.user.committed)
        reply = await asyncio.shield(begun.reply)
    except ChatkeepError as exc:
        yield format_sse_event(event="error", data_str=orjson.dumps(describe_problem(exc)).decode(), id="0-0")
    else:
        yield _message_event("assistant_message", reply.message, reply.committed)


def _message_event(name: str, stored: Stored, committed: int) -> bytes:
    return format_sse_event(event=name, data_str=stored.public(committed).decode(), id=f"{stored.id}-0")


def _session(conversation_id: int) -> dict[str, object]:
    return {"session_id": str(conversation_id), "conversation_id": conversation_id}
