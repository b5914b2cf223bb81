"""The calls that a chat makes all the time, before FastAPI: adding a message (or several), and reading a page of them.

Of the CPU that an append took in this process, more than half was FastAPI's and that of the middlewares around it. The server asks `answer`
first. That takes a call only if it is usual in every respect, and does at once what they would have done together. Whatever is unusual or
wrong it leaves to them, as it came, with nothing done: they answer as documented, with their own words for what is wrong. What it has
begun it ends itself, an error too. So the two ways differ in speed alone (`tests/api/test_fast.py` compares them).

A middleware or a tracer that is added to the app sees only what is left to it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.datastructures import State
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from api import errors, metrics
from api.conversations import BATCH_ROUTE, MESSAGES_ROUTE, add, add_all, list_page
from api.middleware import ON_API
from api.schemas import IDEMPOTENCY_KEY, PAGE_DEFAULT, PAGE_MAX, NewMessage, NewMessages, Page
from api.tokens import Credentials, User, credentials, user_at_once
from worker.errors import ChatkeepError
from worker.keys import ID_LIMIT

Headers = dict[bytes, bytes]

_PATH = re.compile(r"/api/conversations/([1-9][0-9]{0,15})/messages(/batch)?")
_KEY = re.compile(IDEMPOTENCY_KEY.encode())
_QUERY = re.compile(rb"(?:limit=(\d{1,3}))?(?:(?:^|&)(before|after)=([1-9]\d{0,15}))?")


async def answer(state: State, scope: Scope, receive: Receive, send: Send) -> Receive | None:
    """Answers a usual call. Any other is for the ordinary way, with the `receive` that comes back."""
    path = _PATH.fullmatch(scope["path"])
    if path is None or scope.get("root_path") or (conversation_id := int(path[1])) >= ID_LIMIT:
        return receive
    started = time.perf_counter()
    headers: Headers = dict(scope["headers"])
    method: str = scope["method"]
    batch = path[2] is not None
    if len(headers) != len(scope["headers"]) or method not in (("POST",) if batch else ("GET", "POST")):  # a header that comes twice
        return receive
    user = _user(state, scope, headers)
    if user is None:
        return receive
    if method == "POST":
        if not _is_usual_post(headers, state.settings.body_bytes_max):
            return receive
        received = await receive()
        body = _body(received, NewMessages if batch else NewMessage, state.settings.body_bytes_max)
        if body is None:
            scope[metrics.STARTED] = started
            return _again(received, receive)
        given = headers.get(b"idempotency-key")
        key = given.decode() if given else None
        if isinstance(body, NewMessages):
            response = add_all(state.log, state.settings, user.id, conversation_id, body, key)
        else:
            response = add(state.log, state.settings, user.id, conversation_id, body, key)
    else:
        page = _page(scope["query_string"])
        if page is None or b"content-length" in headers:  # whose length is a matter of the body's limit
            return receive
        response = list_page(state.log, user.id, conversation_id, page)
    await _send(response, state, method, BATCH_ROUTE if batch else MESSAGES_ROUTE, started, send)
    return None


async def _send(working: Awaitable[Response], state: State, method: str, route: str, started: float, send: Send) -> None:
    """What the layers around a route do: the answer to an error, the headers, the measurement."""
    status = 0  # stays so if this is cancelled
    try:
        try:
            response = await working
        except Exception as exc:  # noqa: BLE001 - as in `errors.Unforeseen`
            response = _problem(exc, state, method)
        status = response.status_code
        if not _sent_at_once(response, send):
            await send({"type": "http.response.start", "status": status, "headers": [*response.raw_headers, *ON_API]})
            await send({"type": "http.response.body", "body": response.body})
    finally:
        metrics.observe(method, route, status, time.perf_counter() - started)


def _problem(exc: Exception, state: State, method: str) -> Response:
    try:
        if isinstance(exc, ChatkeepError):
            return errors.answer_to(exc, state)
    except Exception as worse:  # noqa: BLE001 - as in `errors.Unforeseen`
        exc = worse
    return errors.unforeseen(exc, method)


_ON_API = b"".join(b"%s: %s\r\n" % header for header in ON_API)


def _sent_at_once(response: Response, send: Send) -> bool:
    """Does what two `send` of uvicorn would have done, where an answer is as usual: the same bytes.

    Those send each header past two regular expressions, for what may not be in it, and write head and body one after the other: two system
    calls, and two wake-ups of the client. Another server, another parser, an access log, a client who has left, does not read, or wants the
    connection closed: all that goes the ordinary way.
    """
    cycle = getattr(send, "__self__", None)
    if (
        type(cycle) is not RequestResponseCycle
        or not cycle.keep_alive
        or cycle.access_log
        or cycle.disconnected
        or cycle.flow.write_paused
        or cycle.response_started
    ):
        return False
    lines = [b"%s: %s\r\n" % header for header in (*cycle.default_headers, *response.raw_headers)]
    cycle.transport.write(b"".join((STATUS_LINE[response.status_code], *lines, _ON_API, b"\r\n", response.body)))
    cycle.waiting_for_100_continue = False
    cycle.response_started = cycle.response_complete = True
    cycle.message_event.set()
    cycle.on_response()  # goes on to what comes next on this connection: the answer has to be on its way before
    return True


def _user(state: State, scope: Scope, headers: Headers) -> User | None:
    """Who asks, if that is known without asking anybody else."""
    authorization = headers.get(b"authorization", b"")
    if authorization.startswith(b"Bearer "):
        given = Credentials(authorization[7:].decode("latin-1").strip(), in_header=True)
    else:
        try:
            given = credentials(Request(scope))
        except errors.Problem:
            return None
    return user_at_once(state, given)


def _is_usual_post(headers: Headers, bytes_max: int) -> bool:
    length, key = headers.get(b"content-length", b""), headers.get(b"idempotency-key")
    return (
        headers.get(b"content-type") == b"application/json"
        and length.isdigit()
        and len(length) <= 18
        and int(length) <= bytes_max
        and (key is None or _KEY.fullmatch(key) is not None)
    )


def _body(received: Message, kind: type[NewMessage | NewMessages], bytes_max: int) -> NewMessage | NewMessages | None:
    """What was sent, if it came in one piece and is valid. (Where the client has left instead, there is no body, which is not.)"""
    body: bytes = received.get("body", b"")
    if received.get("more_body") or len(body) > bytes_max:
        return None
    try:
        return kind.model_validate_json(body)
    except ValidationError:
        return None


def _again(received: Message, receive: Receive) -> Receive:
    """Gives what was received, and then what comes after it."""
    first = iter((received,))

    async def give() -> Message:
        return next(first, None) or await receive()

    return give


def _page(query: bytes) -> Page | None:
    """The page that is asked for, if it is one."""
    found = _QUERY.fullmatch(query)
    if found is None:
        return None
    limit, side, number = int(found[1] or PAGE_DEFAULT), found[2], int(found[3] or 0)
    if not 1 <= limit <= PAGE_MAX or number >= ID_LIMIT:
        return None
    return Page(limit, number if side == b"before" else None, number if side == b"after" else None)
