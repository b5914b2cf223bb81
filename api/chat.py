"""Chat over HTTP: a session is a conversation, and a turn is a message with the reply to it."""

from __future__ import annotations

import asyncio
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Header, Request, Response

from api import history
from api.conversations import acknowledgement, as_json, history_json
from api.dependencies import AppSettings, CurrentUser, HistoryPage, IdempotencyKey, Log, SessionId
from api.errors import problems
from api.schemas import ChatMessage, ChatStart, ChatTurn, Session, SessionHistory
from api.streams import EVENT_STREAM, ai_sdk_asked, reply_stream
from api.turns import Turns
from worker.pending import client_key

router = APIRouter(prefix="/api/chat", tags=["chat"])


async def _turns(request: Request) -> Turns:
    turns: Turns = request.app.state.turns
    return turns


TurnsOf = Annotated[Turns, Depends(_turns)]
AiSdk = Annotated[bool, Depends(ai_sdk_asked)]
LastEventId = Annotated[
    str,
    Header(alias="Last-Event-ID", pattern=r"^$|^[0-9]{1,16}-[0-9]{1,9}$", description="The last event that the client has seen"),
]
_STREAM = {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}


@router.post("/start", status_code=201, response_model=Session, responses=problems(401, 404, 413, 422, 429, 503))
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
    responses={200: _STREAM, **problems(401, 404, 409, 413, 422, 429, 502, 503)},
)
async def message(
    request: Request,
    user: CurrentUser,
    turns: TurnsOf,
    settings: AppSettings,
    session_id: SessionId,
    body: ChatMessage,
    ai_sdk: AiSdk,
    key: IdempotencyKey = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Response:
    """Stores a message and answers with the reply; with `Accept: text/event-stream`, as it is written."""
    streamed = ai_sdk or EVENT_STREAM in accept
    if streamed:
        request.app.state.streams.check(user.id)
    begun = await turns.begin(user.id, session_id, body.message, key)
    headers = acknowledgement(settings, begun.replayed)
    if streamed:
        return reply_stream(request, user, session_id, begun=begun, ai_sdk=ai_sdk, headers=headers)
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


@router.get(
    "/{session_id}/stream",
    response_class=Response,
    responses={200: _STREAM, 204: {"description": "Nothing is running"}, **problems(401, 404, 422, 429, 503)},
)
async def stream(
    request: Request,
    user: CurrentUser,
    log: Log,
    turns: TurnsOf,
    session_id: SessionId,
    ai_sdk: AiSdk,
    last_event_id: LastEventId = "",
) -> Response:
    """Follows the running reply: the whole so far and the rest, or what came after `Last-Event-ID`."""
    await history.read_conversation(log, user.id, session_id)
    request.app.state.streams.check(user.id)
    after = "" if ai_sdk else last_event_id
    if not await turns.is_running(session_id, after):
        return Response(status_code=204)
    return reply_stream(request, user, session_id, begun=None, after=after, ai_sdk=ai_sdk)


@router.post("/{session_id}/stop", status_code=202, response_model=Session, responses=problems(401, 404, 503))
async def stop(user: CurrentUser, log: Log, turns: TurnsOf, session_id: SessionId) -> Response:
    """Stops the running reply, if there is one; what was written so far is kept, `incomplete`."""
    await history.read_conversation(log, user.id, session_id)
    await turns.stop(session_id)
    return as_json(orjson.dumps(_session(session_id)), 202)


def _session(conversation_id: int) -> dict[str, object]:
    return {"session_id": str(conversation_id), "conversation_id": conversation_id}
