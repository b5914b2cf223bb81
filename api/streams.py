"""Event streams over HTTP: what a running reply looks like on the wire, in our words and in those of Vercel's AI SDK.

An event's `id:` is `<user message's id>-<n>`, so `Last-Event-ID` says which reply a reader saw and how far. The AI SDK's protocol has no
cursor: its client drops what it had and is given the whole reply again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

import orjson
from fastapi import Header, Query, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event

from api.errors import describe_problem
from api.turns import Begun, Turns
from worker.errors import ChatkeepError, TooManyStreams
from worker.replies import Event

EVENT_STREAM = "text/event-stream"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_AI_SDK_HEADER = "x-vercel-ai-ui-message-stream"
_AI_SDK_HEADERS = {_AI_SDK_HEADER: "v1"}


async def ai_sdk_asked(
    protocol: Annotated[Literal["ai-sdk"] | None, Query(description="`ai-sdk`: Vercel's UI message stream")] = None,
    version: Annotated[str | None, Header(alias=_AI_SDK_HEADER, include_in_schema=False)] = None,
) -> bool:
    """Whether the client is Vercel's AI SDK."""
    return protocol is not None or version == "v1"


class OpenStreams:
    """How many event streams each user has open in this process."""

    def __init__(self, per_user_max: int) -> None:
        self._per_user_max = per_user_max
        self._open: Counter[int] = Counter()

    def check(self, user_id: int) -> None:
        """Raises `TooManyStreams` at the limit. Before anything is stored."""
        if self._open[user_id] >= self._per_user_max:
            raise TooManyStreams()

    def reserve(self, user_id: int) -> None:
        """Takes one."""
        self._open[user_id] += 1

    def release(self, user_id: int) -> None:
        """Gives one back."""
        self._open[user_id] -= 1
        if self._open[user_id] <= 0:
            del self._open[user_id]


class CountedStream(EventSourceResponse):
    """A stream that counts as open until it ends, however it ends (also before its first byte)."""

    def __init__(self, content: AsyncIterator[bytes], streams: OpenStreams, user_id: int, headers: dict[str, str]) -> None:
        super().__init__(content, headers=_HEADERS | headers)
        self._streams = streams
        self._user_id = user_id
        streams.reserve(user_id)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.release(self._user_id)


def reply_stream(
    request: Request,
    user_id: int,
    conversation_id: int,
    *,
    begun: Begun | None,
    after: str = "",
    ai_sdk: bool,
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    """The running reply: of a turn that has just begun, or of whichever runs, after the event `after`."""
    turns: Turns = request.app.state.turns
    events = _events(turns, user_id, conversation_id, begun, after)
    content = _in_ai_sdk_words(events) if ai_sdk else _in_our_words(events)
    return CountedStream(content, request.app.state.streams, user_id, (headers or {}) | (_AI_SDK_HEADERS if ai_sdk else {}))


async def _events(turns: Turns, user_id: int, conversation_id: int, begun: Begun | None, after: str) -> AsyncIterator[Event | None]:
    """A turn's events. Its end does not depend on the stream in Redis: if that is lost, the task's result is the last event."""
    seen = False
    try:
        if begun is None or not begun.replayed:
            async for event in turns.follow(user_id, conversation_id, after):
                yield event
                seen = seen or event is not None
                if event is not None and event.last:
                    return
        if begun is None:
            return
        question = begun.user.message
        if not seen:
            yield Event(f"{question.id}-0", "user_message", question.public(begun.user.committed), last=False)
        reply = await asyncio.shield(begun.reply)
        yield Event(f"{question.id}-0", "assistant_message", reply.message.public(reply.committed), last=True)
    except ChatkeepError as exc:
        yield Event("0-0", "error", orjson.dumps(describe_problem(exc)), last=True)


async def _in_our_words(events: AsyncIterator[Event | None]) -> AsyncIterator[bytes]:
    async for event in events:
        if event is None:
            yield KEEPALIVE_COMMENT
        else:
            yield format_sse_event(event=event.name, data_str=event.data.decode(), id=event.id)


async def _in_ai_sdk_words(events: AsyncIterator[Event | None]) -> AsyncIterator[bytes]:
    """UI message stream v1: start, text-start, text-delta…, text-end, finish, [DONE]; one text part, named after its message."""
    started = text_open = False
    async for event in events:
        if event is None:
            yield KEEPALIVE_COMMENT
            continue
        for chunk in _chunks(event, started, text_open):
            yield _data(chunk)
            started = True
            text_open = {"text-start": True, "text-end": False}.get(chunk["type"], text_open)
    if not started:
        yield _data({"type": "start"})
    yield _data({"type": "finish"})
    yield format_sse_event(data_str="[DONE]")


def _chunks(event: Event, started: bool, text_open: bool) -> list[dict[str, Any]]:
    name = event.id.partition("-")[0]
    opening: Callable[[], list[dict[str, Any]]] = lambda: (  # noqa: E731 - three lines, used thrice below
        ([] if started else [{"type": "start", "messageId": f"reply-{name}"}]) + ([] if text_open else [{"type": "text-start", "id": name}])
    )
    data = orjson.loads(event.data)
    if event.name == "user_message":
        return [] if started else [{"type": "start", "messageId": f"reply-{name}"}]
    if event.name == "delta":
        return [*opening(), {"type": "text-delta", "id": name, "delta": data["text"]}]
    if event.name == "assistant_message":
        whole = [] if text_open else [{"type": "text-delta", "id": name, "delta": data["content"]}]  # a replay has no deltas
        return [*opening(), *whole, {"type": "text-end", "id": name}]
    return [*([{"type": "text-end", "id": name}] if text_open else []), {"type": "error", "errorText": data["detail"]}]


def _data(chunk: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=orjson.dumps(chunk).decode())
