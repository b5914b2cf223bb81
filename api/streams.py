"""Event streams over HTTP: what a running reply looks like on the wire, in our words and in those of Vercel's AI SDK.

An event's `id:` is `<user message's id>-<n>`, so `Last-Event-ID` says which reply a reader saw and how far. The AI SDK's protocol has no
cursor: its client drops what it had and is given the whole reply again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Annotated, Any, Literal

import orjson
from fastapi import Header, Query, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event

from api.errors import describe_problem
from api.tokens import User
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
    """The event streams that are open in this process: how many each user has, and which end with a sign-in."""

    def __init__(self, per_user_max: int, has_ended: Callable[[str], bool] = lambda _: False) -> None:
        self._per_user_max = per_user_max
        self._has_ended = has_ended
        self._open: Counter[int] = Counter()
        self._of_sign_in: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    def check(self, user_id: int) -> None:
        """Raises `TooManyStreams` at the limit. Before anything is stored."""
        if self._open[user_id] >= self._per_user_max:
            raise TooManyStreams()

    def reserve(self, user: User) -> asyncio.Event:
        """Takes one; the event is set when it has to end, because its user has signed out."""
        self._open[user.id] += 1
        over = asyncio.Event()
        if user.sign_in is not None:
            self._of_sign_in[user.sign_in].add(over)
            if self._has_ended(user.sign_in):  # since the request was let in
                over.set()
        return over

    def release(self, user: User, over: asyncio.Event) -> None:
        """Gives one back."""
        self._open[user.id] -= 1
        if self._open[user.id] <= 0:
            del self._open[user.id]
        if user.sign_in is not None:
            self._of_sign_in[user.sign_in].discard(over)
            if not self._of_sign_in[user.sign_in]:
                del self._of_sign_in[user.sign_in]

    def end(self, sign_in: str) -> None:
        """Ends all of this sign-in."""
        for over in self._of_sign_in.get(sign_in, ()):
            over.set()


class CountedStream(EventSourceResponse):
    """A stream that counts as open until it ends, however it ends (also before its first byte), and ends when its user signs out."""

    def __init__(
        self,
        content: AsyncGenerator[bytes, None],
        streams: OpenStreams,
        user: User,
        headers: dict[str, str],
        *,
        until: float = float("inf"),
    ) -> None:
        self._over = streams.reserve(user)
        super().__init__(_until(content, self._over), headers=_HEADERS | headers)
        self._streams = streams
        self._user = user
        self._seconds = until - time.time()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._seconds, self._over.set) if self._seconds < float("inf") else None
        try:
            await super().__call__(scope, receive, send)
        finally:
            if timer:
                timer.cancel()
            self._streams.release(self._user, self._over)


async def _until(content: AsyncGenerator[bytes, None], over: asyncio.Event) -> AsyncGenerator[bytes, None]:
    """What `content` yields, until it ends or has to."""
    ending = asyncio.ensure_future(over.wait())
    piece: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            piece = asyncio.ensure_future(anext(content, None))
            await asyncio.wait({piece, ending}, return_when=asyncio.FIRST_COMPLETED)
            if over.is_set() or (data := piece.result()) is None:
                return
            yield data
    finally:
        for waiting in (ending, piece):
            if waiting is not None:
                waiting.cancel()
        if piece is not None:
            await asyncio.gather(piece, return_exceptions=True)  # a generator cannot be closed while it runs
        await content.aclose()


def reply_stream(
    request: Request,
    user: User,
    conversation_id: int,
    *,
    begun: Begun | None,
    after: str = "",
    ai_sdk: bool,
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    """The running reply: of a turn that has just begun, or of whichever runs, after the event `after`."""
    turns: Turns = request.app.state.turns
    events = _events(turns, user.id, conversation_id, begun, after)
    content = _in_ai_sdk_words(events) if ai_sdk else _in_our_words(events)
    return CountedStream(content, request.app.state.streams, user, (headers or {}) | (_AI_SDK_HEADERS if ai_sdk else {}))


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


async def _in_our_words(events: AsyncIterator[Event | None]) -> AsyncGenerator[bytes, None]:
    async for event in events:
        if event is None:
            yield KEEPALIVE_COMMENT
        else:
            yield format_sse_event(event=event.name, data_str=event.data.decode(), id=event.id)


async def _in_ai_sdk_words(events: AsyncIterator[Event | None]) -> AsyncGenerator[bytes, None]:
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
