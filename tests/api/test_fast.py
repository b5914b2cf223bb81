"""The fast way answers as the ordinary one does, and is taken where it should be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import Request, Response
from starlette.testclient import TestClient

from api import conversations
from api.app import create_app
from api.fast import FastHandler
from tests.api.test_health import sign_up
from worker.settings import Settings

TEXT = b'{"role":"user","content":"hi"}'
JSON = {"content-type": "application/json"}
POSTS: list[tuple[bytes, dict[str, str]]] = [
    (TEXT, JSON),
    (TEXT, JSON | {"idempotency-key": "a"}),
    (TEXT, JSON | {"idempotency-key": "b" * 200}),
    (TEXT, JSON | {"idempotency-key": "b" * 201}),
    (TEXT, JSON | {"idempotency-key": ""}),
    (TEXT, JSON | {"idempotency-key": "two words"}),
    (b'{"content":"hi","role":"assistant"}', JSON),
    (b'{"role":"user","content":"first","content":"last"}', JSON),
    (b'\xef\xbb\xbf{"role":"user","content":"hi"}', JSON),
    ('{"role":"user","content":"hi"}'.encode("utf-16"), JSON),
    (TEXT, {}),
    (TEXT, {"content-type": "text/plain"}),
    (TEXT, {"content-type": "application/json; charset=utf-8"}),
    (TEXT, {"content-type": "APPLICATION/JSON"}),
    (TEXT, {"content-type": "application/vnd.api+json"}),
    *(
        (body, JSON)
        for body in (
            b"",
            b"{",
            b"[]",
            b"null",
            b'"hi"',
            b"{}",
            b'{"role":"user"}',
            b'{"role":"user","content":"hi"} x',
            b'{"role":"user","content":"hi","more":1}',
            b'{"role":"system","content":"hi"}',
            b'{"role":"user","content":1}',
            b'{"role":"user","content":null}',
            b'{"role":"user","content":" \\n "}',
            b'{"role":"user","content":""}',
            b'{"role":"user","content":"a\\u0000b"}',
            b'{"role":"user","content":"a\\ud800b"}',
            b'{"role":"user","content":"a\\ud83d\\ude00b"}',
            b'{"role":"user","content":"a\xffb"}',
            b'{"role":"user","content":NaN}',
            b"[" * 100_000,
            b'{"role":"user","content":"' + b"x" * 100_000 + b'"}',
            b'{"role":"user","content":"' + b"x" * 100_001 + b'"}',
            b'{"role":"user","content":"' + b"x" * (1 << 20) + b'"}',
        )
    ),
]
QUERIES = [
    *("", "limit=1", "limit=200", "before=9007199254740991", "limit=3&after=1", "after=1", "limit=003"),
    *("limit=0", "limit=201", "limit=", "limit=-1", "limit=1.5", "limit=%31", "limit=1&limit=2", "limit=x", "limit= 1", "limit=+1"),
    *("before=9007199254740992", "before=0", "before=01", "before=1&after=2", "after=1&limit=2", "before=", "x=1", "limit=1&", "&limit=1"),
]


def _without_numbers(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z|\d{9,}", "#", text)


class Ways:
    """Asks the same in both ways, each in a conversation of its own, and compares."""

    def __init__(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.client = client
        self.bearer = {"authorization": sign_up(client, "ann@example.org")["Authorization"]}
        self._monkeypatch = monkeypatch

    def same(self, method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> int:
        """The status that both answer."""
        ordinary = self._ask(method, path, headers, options)
        with self._monkeypatch.context() as patched:
            patched.setattr(conversations, "usual_body", _never)
            patched.setattr(conversations, "usual_page", lambda _: None)
            assert self._ask(method, path, headers, options) == ordinary
        return ordinary[0]

    def _ask(self, method: str, path: str, headers: dict[str, str] | None, options: dict[str, Any]) -> tuple[int, list[str], str]:
        conversation = self.client.post("/api/conversations/", json={}, headers=self.bearer).json()["id"]
        given = {name.lower(): value for name, value in (self.bearer | (headers or {})).items()}
        answer = self.client.request(method, path.replace("{}", str(conversation)), headers=given, **options)
        return answer.status_code, sorted(set(answer.headers)), _without_numbers(answer.text)


async def _never(*_: Any) -> None:
    return None


@pytest.fixture
def ways(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    with TestClient(create_app(settings)) as client:
        yield Ways(client, monkeypatch)


def test_messages_are_taken_and_refused_alike(ways: Ways) -> None:
    told = [ways.same("POST", "/api/conversations/{}/messages", headers, content=body) for body, headers in POSTS]
    assert {201, 413, 422} <= set(told)
    assert told[0] == told[1] == 201


def test_pages_are_given_and_refused_alike(ways: Ways) -> None:
    told = [ways.same("GET", "/api/conversations/{}/messages?" + query) for query in QUERIES]
    assert {200, 422} == set(told)


@pytest.mark.parametrize("path", ["/api/conversations/0/messages", "/api/conversations/x/messages", "/api/conversations/64/messages/"])
def test_ids_are_refused_alike(ways: Ways, path: str) -> None:
    assert ways.same("POST", path, JSON, content=TEXT) == ways.same("GET", path) == 404


@pytest.mark.parametrize("authorization", ["", "Basic x", "Bearer x", "bearer"])
def test_strangers_are_refused_alike(ways: Ways, authorization: str) -> None:
    path = "/api/conversations/{}/messages"
    for headers in ({"authorization": authorization}, {"authorization": authorization} | JSON):
        assert ways.same("POST", path, headers, content=TEXT) == ways.same("GET", path, headers) == 401


def test_usual_calls_go_the_fast_way(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []

    def noting(handler: FastHandler) -> FastHandler:
        async def handle(request: Request) -> Response | None:
            answer = await handler(request)
            taken.append(answer is not None)
            return answer

        return handle

    for endpoint in (conversations.add_message, conversations.list_messages):
        monkeypatch.setattr(endpoint, "fast", noting(endpoint.fast))  # type: ignore[attr-defined]
    conversation = ways.client.post("/api/conversations/", json={}, headers=ways.bearer).json()["id"]
    path = f"/api/conversations/{conversation}/messages"
    for headers in ({}, {"Idempotency-Key": "a"}):
        assert ways.client.post(path, json={"role": "user", "content": "hi"}, headers=ways.bearer | headers).status_code == 201
    for query in ("", "?limit=50", "?before=5", "?limit=2&after=5"):
        assert ways.client.get(path + query, headers=ways.bearer).status_code == 200
    assert taken == [True] * 6
    assert ways.client.get(path + "?after=5&limit=2", headers=ways.bearer).status_code == 200
    assert taken == [True] * 6 + [False]
