"""`GET /api/events`: what happens to the caller's conversations, on any device, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from api.dependencies import CurrentUser
from api.errors import problems
from api.streams import EVENT_STREAM, CountedStream
from worker.errors import TryAgainLater
from worker.events import EventHub, UserEvent

router = APIRouter(prefix="/api", tags=["chat"])


@router.get(
    "/events",
    response_class=Response,
    responses={200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}, **problems(401, 422, 429, 503)},
)
async def events(
    request: Request,
    user: CurrentUser,
    last_event_id: Annotated[str, Header(alias="Last-Event-ID", pattern=r"^$|^[0-9]{1,16}-[0-9]{1,16}$")] = "",
) -> Response:
    """Follows the caller's conversations.

    `message` (a Message), `conversation` (a Conversation), `conversation_deleted` (`{"id"}`), `committed` (`{"conversation_id","up_to"}`:
    every message up to this id is committed), `reply` (`{"conversation_id","running"}`), `resync` (`{}`: something may have been missed,
    read the lists again; also the first event of a first visit). The stream ends with the sign-in, and when the access token expires.
    """
    request.app.state.streams.check(user.id)
    hub: EventHub = request.app.state.events
    wire = _wire(hub.subscribe(user.id, last_event_id))
    return CountedStream(wire, request.app.state.streams, user, {}, until=user.expires)


async def _wire(found: AsyncIterator[UserEvent | None]) -> AsyncGenerator[bytes, None]:
    try:
        async for event in found:
            if event is None:
                yield KEEPALIVE_COMMENT
            else:
                yield format_sse_event(event=event.name, data_str=event.data.decode(), id=event.id)
    except TryAgainLater:
        return  # the client comes back with its Last-Event-ID
