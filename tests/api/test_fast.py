"""The fast way answers, stores, counts and logs as the ordinary one does, and is taken where it should be.

Every request of these tables is sent both ways, as the server would hand it over: what differs, apart from ids and times, fails.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi import FastAPI
from prometheus_client import Metric
from starlette.testclient import TestClient
from starlette.types import Message
from structlog.testing import capture_logs
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from api import fast, metrics
from api.app import create_app
from api.errors import Unauthorized
from api.metrics import REGISTRY
from api.tokens import COOKIE, Tokens, User
from tests import core
from worker import errors
from worker.ended import STALE_SECONDS
from worker.pending import PendingLog
from worker.settings import Settings

TEXT = b'{"role":"user","content":"hi"}'
Pairs = tuple[tuple[str, str], ...]
JSON: Pairs = (("content-type", "application/json"),)
BEARER: Pairs = (("authorization", "Bearer <token>"),)
TEXTS = b'{"messages":[{"role":"user","content":"hi"},{"content":"ho","role":"assistant"}]}'
PATH = "/api/conversations/<id>/messages"
LEFT: Message = {"type": "http.disconnect"}


@dataclass(frozen=True)
class Request:
    """`<token>` and `<id>` stand for those of the moment. Without `pieces`, the body comes at once, with its length before it."""

    method: str = "POST"
    target: str = PATH
    headers: Pairs = BEARER + JSON
    body: bytes = TEXT
    pieces: tuple[Message, ...] = ()
    root_path: str = ""

    def with_headers(self, *more: tuple[str, str]) -> Request:
        return replace(self, headers=self.headers + more)


def piece(body: bytes, *, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


POST = Request()
BATCH = Request(target=PATH + "/batch", body=TEXTS)
GET = Request("GET", body=b"", headers=BEARER)
CHUNKED = ("transfer-encoding", "chunked")

USUAL = [
    POST,
    POST.with_headers(("idempotency-key", "a")),
    POST.with_headers(("idempotency-key", "b" * 200)),
    POST.with_headers(("x-request-id", "1"), ("accept", "*/*"), ("cookie", "theme=dark"), ("origin", "http://evil.example")),
    replace(POST, target=PATH + "?x=1"),
    replace(POST, target="/api/%63onversations/<id>/messages"),
    replace(POST, headers=(("authorization", "Bearer   <token> "), *JSON)),
    replace(POST, headers=(("authorization", "bearer <token>"), *JSON)),
    replace(POST, headers=(("authorization", "Bearer <session>"), *JSON)),
    replace(POST, headers=(("cookie", f"a=b; {COOKIE}=<token>"), ("sec-fetch-site", "same-origin"), *JSON)),
    replace(POST, headers=(("cookie", f"{COOKIE}=<token>"), ("origin", "http://testserver"), *JSON)),
    replace(POST, pieces=({"type": "http.request", "body": TEXT},)),
    *(
        replace(POST, body=body)
        for body in (
            b'{"content":"hi","role":"assistant"}',
            b' {"role":"user",\n"content":"hi"} ',
            b'{"role":"user","content":"first","content":"last"}',
            b'{"role":"user","content":"a\\ud83d\\ude00b"}',
            b'{"role":"user","content":"' + b"x" * 100_000 + b'"}',
        )
    ),
    BATCH,
    BATCH.with_headers(("idempotency-key", "a")),
    replace(BATCH, body=b'{"messages":[%s]}' % b",".join([TEXT] * 100)),
    GET,
    replace(GET, headers=(("cookie", f"{COOKIE}=<token>"),)),
    GET.with_headers(CHUNKED),  # nobody looks at its body
    *(
        replace(GET, target=f"{PATH}?{query}")
        for query in ("", "limit=1", "limit=200", "before=9007199254740991", "limit=3&after=1", "after=1", "limit=003")
    ),
]

UNUSUAL = [
    *(replace(one, method=method) for one in (POST, GET) for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "post", "get")),
    *(
        replace(one, target=target)
        for one in (POST, GET)
        for target in (
            *(PATH + "/batch/", PATH + "/batches", PATH + "//batch", PATH + "/batch%0A", PATH + "/Batch"),
            *("/api/conversations/<id>/messages/", "/api/conversations/<id>/messages//", "/api/conversations//messages"),
            *("/api/conversations/0/messages", "/api/conversations/0<id>/messages", "/api/conversations/-1/messages"),
            *("/api/conversations/x/messages", "/api/conversations/<id>%D9%A1/messages", "/api/conversations/<id>%20/messages"),
            *("/api/conversations/9007199254740992/messages", "/api/conversations/99999999999999999/messages"),
            *("/api/conversations/<id>/messages%0A", "/API/conversations/<id>/messages", "/x/api/conversations/<id>/messages"),
            *("/api/conversations/<id>%2F/messages", "//api/conversations/<id>/messages", "/api/conversations/<id>"),
        )
    ),
    *(replace(one, root_path=root) for one in (POST, GET) for root in ("/chat", "/api")),
    *(replace(one, root_path="/chat", target="/chat" + PATH) for one in (POST, GET)),
    *(
        replace(one, headers=(*headers, *JSON))
        for one in (POST, GET)
        for headers in (
            (),
            *((("authorization", value),) for value in ("", "Bearer", "Bearer ", "Basic x", "Bearer x", "<token>", "Bearer <expired>")),
            *((("authorization", "Bearer " + value),) for value in ("<stranger>", "<ended>", "<token>x", "<to ken>", "\xe9")),
            (("authorization", "Bearer <token>"), ("authorization", "Bearer <token>")),
            (("authorization", "Bearer x"), ("authorization", "Bearer <token>")),
            (("authorization", "Bearer <token>"), ("authorization", "Bearer x")),
            (("authorization", "Basic x"), ("cookie", f"{COOKIE}=<token>"), ("sec-fetch-site", "same-origin")),
            (("cookie", "a=b"), ("cookie", f"{COOKIE}=<token>"), ("sec-fetch-site", "same-origin")),
            (("cookie", f"{COOKIE}=x"), ("sec-fetch-site", "same-origin")),
            (("cookie", f"{COOKIE}=<ended>"), ("sec-fetch-site", "same-origin")),
            (("cookie", f"{COOKIE}=x"),),
        )
    ),
    *(
        replace(POST, headers=(("cookie", f"{COOKIE}=<token>"), *headers, *JSON))
        for headers in (
            (),
            (("sec-fetch-site", "cross-site"),),
            (("sec-fetch-site", "same-site"), ("origin", "http://testserver")),
            (("origin", "http://evil.example"),),
            (("origin", "null"),),
        )
    ),
    *(
        replace(POST, headers=BEARER + headers)
        for headers in (
            (),
            *((("content-type", kind),) for kind in ("", "text/plain", "application/json; charset=utf-8", "APPLICATION/JSON")),
            (("content-type", "application/vnd.api+json"),),
            (("content-type", "text/plain"), *JSON),
            (*JSON, ("content-type", "text/plain")),
        )
    ),
    *(POST.with_headers(("idempotency-key", key)) for key in ("", "two words", "b" * 201, "\xe9", "a\tb")),
    POST.with_headers(("idempotency-key", "a"), ("idempotency-key", "b")),
    *(
        replace(POST, body=body)
        for body in (
            *(b"", b"{", b"[]", b"null", b'"hi"', b"{}", b'{"role":"user"}', b'{"role":"user","content":"hi"} x'),
            b'\xef\xbb\xbf{"role":"user","content":"hi"}',
            '{"role":"user","content":"hi"}'.encode("utf-16"),
            b'{"role":"user","content":"hi","more":1}',
            b'{"role":"system","content":"hi"}',
            b'{"role":"user","content":1}',
            b'{"role":"user","content":null}',
            b'{"role":"user","content":" \\n "}',
            b'{"role":"user","content":""}',
            b'{"role":"user","content":"a\\u0000b"}',
            b'{"role":"user","content":"a\\ud800b"}',
            b'{"role":"user","content":"a\xffb"}',
            b'{"role":"user","content":NaN}',
            b"[" * 100_000,
            b'{"role":"user","content":"' + b"x" * 100_001 + b'"}',
            b'{"role":"user","content":"' + b"x" * (1 << 20) + b'"}',
        )
    ),
    replace(BATCH, method="GET"),
    replace(BATCH, target=PATH),
    replace(POST, target=PATH + "/batch"),
    *(
        replace(BATCH, body=body)
        for body in (
            *(b"", b"[]", b"{}", b'{"messages":[]}', b'{"messages":{}}', b'{"messages":[[]]}', b'{"messages":null}'),
            b'{"messages":[%s],"more":1}' % TEXT,
            b'{"messages":[%s,{"role":"user","content":" "}]}' % TEXT,
            b'{"messages":[%s]}' % b",".join([TEXT] * 101),
            b'{"messages":[{"role":"user","content":"' + b"x" * (1 << 20) + b'"}]}',
        )
    ),
    replace(POST, pieces=(piece(TEXT, more=False),)).with_headers(CHUNKED),
    *(
        replace(POST, pieces=(piece(TEXT, more=False),)).with_headers(("content-length", length))
        for length in ("", "-1", "x", "1.5", "+5", " 5", "1048577", "9" * 30)
    ),
    replace(POST, pieces=(piece(TEXT, more=False),)).with_headers(("content-length", "30"), ("content-length", "30")),
    replace(POST, pieces=(piece(TEXT[:5], more=True), piece(b"", more=True), piece(TEXT[5:], more=True), piece(b"", more=False))),
    replace(POST, pieces=(piece(TEXT, more=True), piece(b"", more=False))),
    # The declared length is small, and the body is not.
    replace(POST, pieces=(piece(b"x" * (1 << 21), more=False),)).with_headers(("content-length", "30")),
    replace(POST, pieces=(piece(b" " * (1 << 20), more=True), piece(TEXT, more=False))).with_headers(("content-length", "30")),
    # The client leaves before the end.
    replace(POST, pieces=(LEFT,)),
    replace(POST, pieces=(piece(TEXT, more=True), LEFT)),
    replace(POST, pieces=(piece(TEXT[:5], more=True), LEFT)),
    replace(GET, body=b"x"),
    GET.with_headers(("content-length", "1048577")),
    *(
        replace(GET, target=f"{PATH}?{query}")
        for query in (
            *("limit=0", "limit=201", "limit=", "limit=-1", "limit=1.5", "limit=%31", "limit=1&limit=2", "limit=x", "limit=+1"),
            *("before=9007199254740992", "before=0", "before=01", "before=1&after=2", "after=1&limit=2", "before=", "x=1", "limit=1&"),
            *("&limit=1", "limit=1;after=1", "LIMIT=1"),
        )
    ),
]

FAILURES: list[Exception] = [
    *(errors.BacklogFull(), errors.UserBacklogFull(), errors.NotDurable(), errors.RedisUnavailable(), errors.PostgresUnavailable()),
    *(errors.NotFound(), errors.KeyReused(), errors.TurnRunning(), errors.TooManyMessages(7), errors.TooSlow()),
    *(errors.BadEntry("quokka"), errors.ConfigurationError("quokka"), RuntimeError("quokka"), ValueError("quokka")),
]


@dataclass
class Told:
    """What came of a request: what was answered, what was counted, logged and stored."""

    fast: bool = False
    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: str = ""
    sent: list[str] = field(default_factory=list)
    error: str = ""
    counted: dict[str, float] = field(default_factory=dict)
    logged: list[tuple[Any, ...]] = field(default_factory=list)
    stored: int = 0


class Ways:
    """Asks the same both ways, each in a conversation of its own, and compares."""

    def __init__(self, client: TestClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
        self.client = client
        self.app = app
        self.log: PendingLog = app.state.log
        self.user = core.make_user()
        self._monkeypatch = monkeypatch
        secret = app.state.settings.jwt_secret.get_secret_value()
        self._texts = {
            "<token>": app.state.tokens.issue(self.user),
            "<session>": app.state.tokens.issue(self.user, "a sign-in"),
            "<ended>": app.state.tokens.issue(self.user, "ended"),
            "<expired>": Tokens(secret, -3600).issue(self.user),
            "<stranger>": Tokens("x" * 48, 3600).issue(self.user),
        }
        app.state.ended.note(["ended"])

    def same(self, request: Request, *, usual: bool, twice: bool = False) -> Told:
        """What both are told; with `twice`, the second time."""
        ordinary = self._ask(request, twice, fast_way=False)
        told = self._ask(request, twice, fast_way=True)
        assert told.fast == usual, request
        assert replace(told, fast=False) == ordinary, request
        return told

    def _ask(self, request: Request, twice: bool, *, fast_way: bool) -> Told:
        assert self.client.portal is not None
        conversation = self.client.portal.call(self.log.create, self.user, "a title").conversation.id
        if twice:
            self.client.portal.call(self.send, request, conversation, fast_way)
        told: Told = self.client.portal.call(self.send, request, conversation, fast_way)
        page = self.client.portal.call(PendingLog.read, self.log, self.user, conversation, "before", None, 10)
        told.stored = len(page.messages) if page else 0
        return told

    async def send(self, request: Request, conversation: int, fast_way: bool) -> Told:
        told = Told()

        async def answer(state: Any, scope: Any, receive: Any, send: Any) -> Any:
            left = await fast_answer(state, scope, receive, send) if fast_way else receive
            told.fast = left is None
            return left

        told.fast = fast_way  # unless it says so itself

        fast_answer = fast.answer
        pieces = iter(request.pieces or (piece(request.body, more=False),))

        async def receive() -> Message:
            return next(pieces, LEFT)

        async def answering(message: Message) -> None:
            told.sent.append(message["type"])
            if message["type"] == "http.response.start":
                told.status, told.headers = message["status"], sorted(message["headers"])
            else:
                told.body += _without_numbers(message.get("body", b"").decode())

        before = _counted()
        with self._monkeypatch.context() as patched, capture_logs() as logged:
            patched.setattr(fast, "answer", answer)
            try:
                await self.app(self._scope(request, conversation), receive, answering)
            except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001 - what it is, is compared
                told.error = type(exc).__name__
        told.counted = {name: value - before.get(name, 0.0) for name, value in _counted().items() if value != before.get(name, 0.0)}
        told.logged = [(one["event"], one.get("error"), one.get("method")) for one in logged]
        return told

    def _scope(self, request: Request, conversation: int) -> dict[str, Any]:
        headers = [("host", "testserver"), *request.headers]
        if not request.pieces and request.body:
            headers.append(("content-length", str(len(request.body))))
        elif request.pieces and all(name not in ("content-length", "transfer-encoding") for name, _ in headers):
            headers.append(("content-length", str(len(TEXT))))
        path, _, query = request.target.replace("<id>", str(conversation)).partition("?")
        return {
            **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http"},
            **{"server": ("testserver", 80), "client": ("192.0.2.1", 1), "root_path": request.root_path, "state": {}},
            **{"method": request.method, "path": unquote(path), "raw_path": path.encode(), "query_string": query.encode()},
            "headers": [(name.encode(), self._filled(value).encode("latin-1")) for name, value in headers],
        }

    def _filled(self, value: str) -> str:
        for name, text in self._texts.items():
            value = value.replace(name, text)
        return value


def _without_numbers(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z|\d{9,}", "#", text)


def _counted() -> dict[str, float]:
    """What this process has counted, without what depends on time."""
    families: Sequence[Metric] = list(REGISTRY.collect())
    return {
        f"{sample.name}{sample.labels}": sample.value
        for family in families
        for sample in family.samples
        if family.name.startswith("chatkeep") and not sample.name.endswith(("_sum", "_bucket"))
    }


@contextmanager
def both(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    app = create_app(settings)
    with TestClient(app) as client:
        yield Ways(client, app, monkeypatch)


@pytest.fixture
def ways(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    with both(settings, monkeypatch) as found:
        yield found


def test_usual_calls_are_answered_alike_and_go_the_fast_way(ways: Ways) -> None:
    for request in USUAL:
        told = ways.same(request, usual=True)
        assert told.status == (201 if request.method == "POST" else 200), request
        count = request.body.count(b'"role"') if request.target.endswith("/batch") else int(request.method == "POST")
        assert told.stored == min(count, 10), request
        assert sum(value for name, value in told.counted.items() if name.startswith("chatkeep_accepted")) == count
        assert told.sent == ["http.response.start", "http.response.body"], request


def test_unusual_calls_are_answered_alike_by_the_ordinary_way(ways: Ways) -> None:
    told = [ways.same(request, usual=False) for request in UNUSUAL]
    assert {one.status for one in told} >= {200, 201, 400, 401, 403, 404, 405, 413, 422}


@pytest.mark.parametrize("pieces", [(LEFT,), (piece(TEXT, more=True), LEFT)])
def test_who_leaves_before_the_end_has_said_nothing(ways: Ways, pieces: tuple[Message, ...]) -> None:
    assert ways.same(replace(POST, pieces=pieces), usual=False).stored == 0


def test_retries_are_answered_alike(ways: Ways) -> None:
    for request, count in ((POST, 1), (BATCH, 2)):
        told = ways.same(request.with_headers(("idempotency-key", "a")), usual=True, twice=True)
        assert (b"idempotent-replayed", b"true") in told.headers
        assert told.stored == count
        assert not any(name.startswith("chatkeep_accepted") for name in told.counted)


def test_nobodys_conversations_are_refused_alike(ways: Ways) -> None:
    for request in (POST, GET):
        told = ways.same(replace(request, target="/api/conversations/9007199254740991/messages"), usual=True)
        assert told.status == 404


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_failures_of_the_log_are_told_alike_and_nothing_is_tried_again(
    ways: Ways, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def failing(name: str) -> Callable[..., Any]:
        async def call(*_: object, **__: object) -> None:
            calls.append(name)
            raise failure

        return call

    for name in ("append_all", "read"):
        monkeypatch.setattr(ways.log, name, failing(name))
    for request in (POST, BATCH, GET):
        told = ways.same(request, usual=True)
        assert told.status >= 400
        assert told.error == ""
        assert "quokka" not in told.body
        assert any(name.startswith("chatkeep_problems") for name in told.counted)
        assert len(told.logged) == (told.status == 500)
    assert calls == ["append_all"] * 4 + ["read"] * 2


def test_cancelled_call_is_counted_alike(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancelled(*_: object, **__: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(ways.log, "append_all", cancelled)
    told = ways.same(POST, usual=True)
    assert (told.error, told.sent) == ("CancelledError", [])
    assert [name for name in told.counted if "'status': '0'" in name]


def test_ended_sign_ins_that_are_not_known_are_asked_for_the_ordinary_way(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not heard for a while has to ask first, and refuses while it cannot."""
    request = replace(POST, headers=(("authorization", "Bearer <session>"), *JSON))
    ended = ways.app.state.ended
    monkeypatch.setattr(ended, "_clock", lambda: time.monotonic() + 2 * STALE_SECONDS)

    async def fail() -> None:
        raise errors.RedisUnavailable

    monkeypatch.setattr(ended, "_look", fail)
    assert ways.same(request, usual=False).status == 503
    assert ways.same(POST, usual=True).status == 201, "a token without a sign-in is good until it expires"


def test_outside_users_are_known_from_their_second_call_on(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    class Outside:
        """Knows one token, and has to ask for another."""

        def known(self, token: str) -> User | None:
            return User(ways.user) if token == "known" else None

        async def user(self, token: str) -> User:
            if token == "refused":
                raise Unauthorized
            return User(ways.user)

    monkeypatch.setattr(ways.app.state, "outside", Outside())
    for token, usual, status in (("known", True, 201), ("new", False, 201), ("refused", False, 401)):
        told = ways.same(replace(POST, headers=(("authorization", f"Bearer {token}"), *JSON)), usual=usual)
        assert told.status == status
    cookie = (("cookie", f"{COOKIE}=known"), ("sec-fetch-site", "same-origin"))
    assert ways.same(replace(POST, headers=cookie + JSON), usual=False).status == 401


def test_limits_of_an_app_hold_both_ways(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    small = settings.model_copy(update={"message_chars_max": 5, "body_bytes_max": 60, "unsafe_durability": True})
    with both(small, monkeypatch) as ways:
        told = ways.same(replace(POST, body=b'{"role":"user","content":"12345"}'), usual=True)
        assert told.status == 201
        assert (b"x-durability", b"memory") in told.headers
        assert ways.same(replace(POST, body=b'{"role":"user","content":"123456"}'), usual=False).status == 422
        for length, status in ((60, 201), (61, 413)):
            body = b'{"role":"user","content":"12345"}'.ljust(length)
            assert ways.same(replace(POST, body=body), usual=status == 201).status == status
            assert ways.same(replace(POST, pieces=(piece(body, more=False),)), usual=status == 201).status == status
            pieces = tuple(piece(body[i : i + 10], more=i + 10 < length) for i in range(0, length, 10))
            assert ways.same(replace(POST, pieces=pieces), usual=False).status == status


def test_safety_headers_stand_on_the_fast_way_too(ways: Ways) -> None:
    headers = dict(ways.same(GET, usual=True).headers)
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"x-content-type-options"] == b"nosniff"


def test_time_of_a_body_counts_whoever_answers(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []
    monkeypatch.setattr(metrics, "observe", lambda method, route, status, taken: seconds.append(taken))
    moments = iter([1.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments, 6.0))
    assert ways.client.portal is not None
    ways.client.portal.call(ways.send, replace(POST, body=b"{"), 64, True)
    assert seconds == [5.0]


class Wire:
    """A connection, as the server sees it."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        if data and not self.closed:
            self.written.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, _: str) -> None:
        return None

    def pause_reading(self) -> None: ...

    resume_reading = set_write_buffer_limits = pause_reading


def serve(
    ways: Ways,
    kind: Any,
    wire: Wire,
    data: bytes,
    until: Callable[[], bool],
    *,
    access_log: bool = False,
    before: Callable[[Any], None] = lambda protocol: None,
) -> bool:
    """Has one of the real server's protocols take this from a connection; whether it has closed it then. `before` it goes on, something
    may happen to the connection."""

    async def run() -> bool:
        config = Config(ways.app, lifespan="off", log_config=None, access_log=access_log)
        config.load()
        state = ServerState()
        state.default_headers = [(b"server", b"uvicorn")]
        protocol = kind(config, state, {})
        protocol.connection_made(wire)
        protocol.access_log = access_log  # else it is a matter of pytest's handlers
        protocol.data_received(data)
        before(protocol)
        async with asyncio.timeout(10):
            while not until():
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)  # for what should not come
        closed = wire.closed
        protocol.connection_lost(None)
        return closed

    assert ways.client.portal is not None
    return ways.client.portal.call(run)


def raw_post(ways: Ways, *headers: str) -> bytes:
    """A usual request as it comes over the wire."""
    assert ways.client.portal is not None
    conversation = ways.client.portal.call(ways.log.create, ways.user, "a title").conversation.id
    token = ways.app.state.tokens.issue(ways.user)
    lines = [
        f"POST {PATH.replace('<id>', str(conversation))} HTTP/1.1",
        *("Host: testserver", f"Authorization: Bearer {token}", "Content-Type: application/json", f"Content-Length: {len(TEXT)}"),
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + TEXT


def raw_get(post: bytes, number: int | None = None) -> bytes:
    """The page of a request's conversation, or of another."""
    path = post.split()[1].decode() if number is None else PATH.replace("<id>", str(number))
    authorization = next(line for line in post.split(b"\r\n") if line.startswith(b"Authorization"))
    return b"GET " + path.encode() + b" HTTP/1.1\r\nHost: testserver\r\n" + authorization + b"\r\n\r\n"


def one_answer(written: list[bytes]) -> bytes:
    """What was written, without what differs from call to call."""
    return re.sub(rb"\d{6,}", b"<digits>", re.sub(rb"\d\d:\d\d:\d\d\.\d+", b"<time>", b"".join(written)))


@pytest.mark.parametrize("count", [1, 3])
def test_an_answer_leaves_in_one_write(ways: Ways, count: int) -> None:
    """By the real server, whose insides `_sent_at_once` has to know; also of requests that come at once."""
    wire, data = Wire(), raw_post(ways) * count
    assert not serve(ways, HttpToolsProtocol, wire, data, lambda: len(wire.written) >= count)
    assert len(wire.written) == count
    for answer in wire.written:
        assert answer.startswith(b"HTTP/1.1 201 ")
        assert answer.endswith(b'"state":"pending"}')


@pytest.mark.parametrize("what", ["post", "page", "nobody's"])
def test_what_is_written_at_once_is_what_the_server_would_have_written(ways: Ways, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The 404 of a conversation that is nobody's comes that way too."""
    post = raw_post(ways)
    data = {"post": post, "page": raw_get(post), "nobody's": raw_get(post, ways.user)}[what] * 2
    at_once, by_the_server = Wire(), Wire()
    serve(ways, HttpToolsProtocol, at_once, data, lambda: len(at_once.written) >= 2)
    monkeypatch.setattr(fast, "_sent_at_once", lambda response, send: False)
    serve(ways, HttpToolsProtocol, by_the_server, data, lambda: len(by_the_server.written) >= 4)
    assert (len(at_once.written), len(by_the_server.written)) == (2, 4)
    assert one_answer(at_once.written) == one_answer(by_the_server.written)
    assert one_answer(at_once.written).count(b"HTTP/1.1 ") == 2


@pytest.mark.parametrize("unusual", ["another parser", "an access log", "the last on this connection"])
def test_other_answers_are_left_to_the_server(ways: Ways, unusual: str) -> None:
    close = unusual == "the last on this connection"
    kind = H11Protocol if unusual == "another parser" else HttpToolsProtocol
    wire, data = Wire(), raw_post(ways, *["Connection: close"] * close)
    closed = serve(ways, kind, wire, data, lambda: len(wire.written) >= 2, access_log=unusual == "an access log")
    assert closed == close
    assert len(wire.written) == 2
    assert wire.written[0].startswith(b"HTTP/1.1 201 ")
    assert wire.written[1].endswith(b'"state":"pending"}')


def test_nothing_is_written_to_who_does_not_read(ways: Ways) -> None:
    wire, held = Wire(), list[bytes]()

    def pause(protocol: Any) -> None:
        def go_on() -> None:
            held.extend(wire.written)
            protocol.resume_writing()

        protocol.pause_writing()
        asyncio.get_running_loop().call_later(0.3, go_on)

    serve(ways, HttpToolsProtocol, wire, raw_post(ways), lambda: len(wire.written) >= 2, before=pause)
    assert held == []
    assert len(wire.written) == 2


def test_nothing_is_written_to_who_has_left(ways: Ways) -> None:
    """What was sent is kept all the same."""
    wire, stored, post = Wire(), Wire(), raw_post(ways)

    def leave_soon(protocol: Any) -> None:
        """When the message is on its way to Redis."""
        soon = asyncio.get_running_loop().call_soon
        soon(soon, protocol.connection_lost, ConnectionResetError())

    serve(ways, HttpToolsProtocol, wire, post, lambda: True, before=leave_soon)
    assert wire.written == []
    serve(ways, HttpToolsProtocol, stored, raw_get(post), lambda: bool(stored.written))
    assert b'"content":"hi"' in stored.written[0]


@pytest.mark.parametrize("kind", [HttpToolsProtocol, H11Protocol])
def test_answer_leaves_before_the_server_looks_at_what_comes_next(ways: Ways, kind: Any) -> None:
    """Which it may not understand (h11 wants a Host): then it says so, and closes the connection."""
    wire = Wire()
    serve(ways, kind, wire, raw_post(ways) + b"GET / HTTP/1.1\r\n\r\n", lambda: b'"state":"pending"}' in b"".join(wire.written))
    assert wire.written[0].startswith(b"HTTP/1.1 201 ")
    first = b"".join(wire.written).split(b'"state":"pending"}')[0]
    assert first.count(b"HTTP/1.1 ") == 1
