"""What a client is told when something is not done."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api import errors
from worker import errors as core
from worker import logs
from worker.errors import ChatkeepError, TooManyStreams, TryAgainLater

JSON = {"Content-Type": "application/json"}
NOBODYS_IDS = (
    "abc",
    "-1",
    "0",
    "01",
    "1.0",
    "+1",
    "1e3",
    "１２",
    "%00",
    "%20",
    "null",
    "9" * 16,
    "9" * 400,
    str(1 << 53),
    str((1 << 53) - 1),
    "12345",
)
MARK = "ech0-Me-N0t"


def assert_problem(answer: Any, status: int) -> dict[str, Any]:
    """The answer is a problem as RFC 9457 has it; its body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert set(body) == {"type", "title", "status", "detail"} | ({"errors"} if status == 422 else set())
    assert body["status"] == status
    assert all(isinstance(body[name], str) and body[name] for name in ("type", "title", "detail"))
    for error in body.get("errors", []):
        assert set(error) == {"loc", "message"}
    return body


class TestShape:
    def test_every_problem_has_it(self, client: TestClient, bearer: dict[str, str], conversation: int) -> None:
        assert_problem(client.get("/api/conversations/"), 401)
        assert_problem(client.get("/api/conversations/1", headers=bearer), 404)
        assert_problem(client.get("/nothing/here"), 404)
        assert_problem(client.get("/static/nothing.js"), 404)
        assert_problem(client.put("/api/conversations/"), 405)
        assert_problem(client.post("/api/auth/register", json={"email": "ann@example.org", "password": "12345678"}), 409)
        assert_problem(client.post("/api/conversations/", json={"title": ""}, headers=bearer), 422)
        assert_problem(client.post("/api/conversations/", content=b"x" * (1 << 21), headers=bearer | JSON), 413)

    def test_method_that_is_not_there_names_all_that_are(self, client: TestClient) -> None:
        allowed = {
            "/api/conversations/": "GET, POST",
            "/api/conversations": "GET, POST",
            "/api/conversations/1": "DELETE, GET, PATCH",
            "/livez": "GET, HEAD",
        }
        for path, methods in allowed.items():
            answer = client.request("PUT", path)
            assert_problem(answer, 405)
            assert answer.headers["allow"] == methods

    def test_what_can_be_tried_again_says_when(self, app: FastAPI) -> None:
        kinds = [core.RedisUnavailable, core.PostgresUnavailable, core.NotDurable, core.BacklogFull]
        for kind in kinds:
            app.add_api_route(f"/raise/{kind.__name__}", _raiser(kind()))
        with TestClient(app) as client:
            for kind in kinds:
                answer = client.get(f"/raise/{kind.__name__}")
                assert_problem(answer, 503)
                assert int(answer.headers["retry-after"]) >= 1

    def test_every_error_of_ours_has_a_status(self, app: FastAPI) -> None:
        meant = {
            core.NotFound: 404,
            core.KeyReused: 422,
            core.TurnRunning: 409,
            core.ReplyFailed: 502,
            core.ConfigurationError: 500,
            core.BadEntry: 500,
        }
        for kind in meant:
            app.add_api_route(f"/raise/{kind.__name__}", _raiser(kind(f"about {MARK}")))
        with TestClient(app, raise_server_exceptions=False) as client:
            for kind, status in meant.items():
                body = assert_problem(client.get(f"/raise/{kind.__name__}"), status)
                assert (MARK in body["detail"]) == (status != 500)

    def test_event_of_a_stream_is_a_problem_too(self) -> None:
        for error in (core.ReplyFailed(), core.RedisUnavailable(), core.ConfigurationError(MARK)):
            body = errors.describe_problem(error)
            assert set(body) == {"type", "title", "status", "detail"}
            assert MARK not in json.dumps(body)


class TestUnforeseen:
    @pytest.fixture
    def output(self, own_logging: None) -> io.StringIO:
        stream = io.StringIO()
        logs.configure(process="test", stream=stream, as_json=True)
        return stream

    def test_is_a_500_that_tells_nobody_anything(self, app: FastAPI, output: io.StringIO) -> None:
        app.add_api_route("/boom", _raiser(ValueError(f"could not parse {MARK}")))
        with TestClient(app) as client:  # it raises what reaches the server: nothing may
            answer = client.get("/boom", headers={"X-Secret": MARK})
        assert_problem(answer, 500)
        assert MARK not in answer.text
        event = next(json.loads(line) for line in output.getvalue().splitlines() if "unforeseen" in line)
        assert event["error"] == "ValueError"
        assert any("test_errors.py" in place for place in event["where"])
        assert MARK not in output.getvalue()

    def test_broken_answer_is_cut_off(self, app: FastAPI, output: io.StringIO) -> None:
        async def half(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise ValueError(MARK)

        app.mount("/half", half)
        with TestClient(app) as client, pytest.raises(errors.BrokenAnswer):
            client.get("/half/way")
        assert MARK not in output.getvalue()


class TestBodies:
    @pytest.fixture
    def path(self, conversation: int) -> str:
        return f"/api/conversations/{conversation}/messages"

    def test_what_is_not_json_is_said_so(self, client: TestClient, bearer: dict[str, str], path: str) -> None:
        for body in (
            b"{",
            b'{"role": "user", "content": "x"',
            b"\xff\xfe",
            b'"\x01"',
            b"[" * 100_000,
            b"9" * 5000,
            b"{'a': 1}",
        ):
            problem = assert_problem(client.post(path, content=body, headers=bearer | JSON), 422)
            assert "not valid JSON" in problem["detail"]

    def test_other_types_are_told_what_is_expected(self, client: TestClient, bearer: dict[str, str], path: str) -> None:
        for body in (b"", b'{"role": "user", "content": "\xed\xa0\x80"}', b"null", b"[]", b"1", b"NaN", b'"text"', b"true"):
            assert_problem(client.post(path, content=body, headers=bearer | JSON), 422)
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            answer = client.post(path, content=b'{"role": "user", "content": "x"}', headers=bearer | {"Content-Type": kind})
            assert_problem(answer, 422)

    def test_no_value_is_ever_a_500(self, client: TestClient, bearer: dict[str, str], path: str) -> None:
        values = (
            *(
                "\ud800",
                "\udc00x",
                "x\ud83d",
                "\x00",
                "a\x00b",
                "",
                " ",
                "\n\t\u2003",
                float("nan"),
                float("inf"),
                10**23,
                -1,
                1.5,
                1e400,
                True,
            ),
            *(None, [], {}, ["x"], {"x": 1}, {"\ud800": 1}, [[[[]]]]),
        )
        for value in values:
            for field in ("content", "role"):
                body = json.dumps({"role": "user", "content": "x"} | {field: value}).encode()
                problem = assert_problem(client.post(path, content=body, headers=bearer | JSON), 422)
                assert problem["errors"][0]["loc"] == ["body", field]
            assert_problem(
                client.post("/api/conversations/", content=json.dumps({"title": value or []}).encode(), headers=bearer | JSON), 422
            )
            body = json.dumps({"conversation_id": value if value != "" and value is not None else []}).encode()
            assert client.post("/api/chat/start", content=body, headers=bearer | JSON).status_code == 422

    def test_unknown_fields_are_refused(self, client: TestClient, bearer: dict[str, str], path: str) -> None:
        for name in ("id", "user_id", "created_at", "status", "state", "idempotency_key", "__proto__"):
            problem = assert_problem(client.post(path, json={"role": "user", "content": "x", name: 1}, headers=bearer), 422)
            assert problem["errors"][0]["loc"][0] == "body"
        for role in ("system", "tool", "User", "user ", ""):
            assert_problem(client.post(path, json={"role": role, "content": "x"}, headers=bearer), 422)

    def test_name_that_cannot_be_written_is_not_repeated(self, client: TestClient, bearer: dict[str, str], path: str) -> None:
        for name in ("\ud800", "<script>", "x" * 1000, "\x00", MARK + " \n"):
            body = json.dumps({"role": "user", "content": "x", name: 1}).encode()
            answer = client.post(path, content=body, headers=bearer | JSON)
            assert_problem(answer, 422)
            assert "<script>" not in answer.text
            assert MARK not in answer.text

    def test_nothing_that_was_sent_is_repeated(self, client: TestClient, bearer: dict[str, str], path: str) -> None:
        answers = [
            client.post(path, json={"role": MARK, "content": "x"}, headers=bearer),
            client.post(path, json={"role": "user", "content": [MARK]}, headers=bearer),
            client.post(path, json={"role": "user", "content": MARK + "\x00"}, headers=bearer),
            client.post(path, json=MARK, headers=bearer),
            client.post(path, content=f'{{"role": "{MARK}'.encode(), headers=bearer | JSON),
            client.post(path, content=MARK, headers=bearer | {"Content-Type": "text/plain"}),
            client.post("/api/conversations/", json={}, headers=bearer | {"Idempotency-Key": MARK + " " * 2 + MARK}),
            client.post("/api/auth/register", json={"email": MARK, "password": MARK}),
            client.post("/api/auth/token", data={"username": MARK, "password": MARK}),
            client.post("/api/auth/token", data={"username": MARK}),
            client.get("/api/conversations/", params={"limit": MARK, "cursor": MARK}, headers=bearer),
            client.get(f"/api/conversations/{MARK}", headers=bearer),
            client.get(f"/{MARK}"),
            client.get("/api/auth/me", headers={"Authorization": f"Bearer {MARK}"}),
            client.request(MARK.upper().replace("-", ""), "/livez"),
        ]
        for answer in answers:
            assert answer.status_code >= 400
            assert MARK not in answer.text
            assert MARK not in str(answer.headers)


class TestIds:
    def test_what_is_nobodys_id_is_answered_like_one_that_does_not_exist(
        self, client: TestClient, bearer: dict[str, str], conversation: int
    ) -> None:
        expected = client.get(f"/api/conversations/{conversation + 64}", headers=bearer)
        assert_problem(expected, 404)
        for one in NOBODYS_IDS:
            answers = [
                client.get(f"/api/conversations/{one}", headers=bearer),
                client.patch(f"/api/conversations/{one}", json={"title": "x"}, headers=bearer),
                client.delete(f"/api/conversations/{one}", headers=bearer),
                client.post(f"/api/conversations/{one}/messages", json={"role": "user", "content": "x"}, headers=bearer),
                client.get(f"/api/conversations/{one}/messages", headers=bearer),
                client.post(f"/api/chat/{one}/message", json={"message": "x"}, headers=bearer),
                client.get(f"/api/chat/{one}/history", headers=bearer),
            ]
            for answer in answers:
                assert (one, answer.status_code, answer.content) == (one, 404, expected.content)

    def test_without_a_token_it_is_401_whatever_the_id(self, client: TestClient) -> None:
        for one in NOBODYS_IDS:
            assert_problem(client.get(f"/api/conversations/{one}"), 401)

    def test_page_is_checked(self, client: TestClient, bearer: dict[str, str], conversation: int) -> None:
        bad: tuple[dict[str, Any], ...] = (
            *({"limit": 0}, {"limit": 201}, {"limit": -1}, {"limit": "x"}, {"limit": ""}, {"limit": 10**23}, {"limit": "9" * 5000}),
            *({"before": 0}, {"before": -1}, {"before": 1 << 53}, {"before": "x"}, {"after": 0}, {"after": 1 << 53}, {"after": "\x00"}),
            {"before": 5, "after": 4},
        )
        for query in bad:
            for path in (f"/api/conversations/{conversation}/messages", f"/api/chat/{conversation}/history"):
                problem = assert_problem(client.get(path, params=query, headers=bearer), 422)
                assert problem["errors"][0]["loc"][0] == "query"
        for query in ({"limit": 1}, {"limit": 200}, {"before": 1}, {"after": (1 << 53) - 1}):
            assert client.get(f"/api/conversations/{conversation}/messages", params=query, headers=bearer).status_code == 200
        for limit, status in ((0, 422), (1, 200), (100, 200), (101, 422)):
            assert client.get("/api/conversations/", params={"limit": limit}, headers=bearer).status_code == status

    def test_retry_key_is_checked(self, client: TestClient, bearer: dict[str, str], conversation: int) -> None:
        keys = {b"": 422, b"x" * 201: 422, b"a b": 422, b"a\tb": 422, "ä".encode("latin-1"): 422, b"\x7f": 422, b"x" * 200: 201, b"!~": 201}
        for path, body in ((f"/api/conversations/{conversation}/messages", {"role": "user", "content": "x"}), ("/api/conversations/", {})):
            for key, status in keys.items():
                headers = [(b"Authorization", bearer["Authorization"].encode()), (b"Idempotency-Key", key)]
                assert (key, client.post(path, json=body, headers=headers).status_code) == (key, status)


class TestPaths:
    def test_trailing_slash_is_optional_everywhere(self, client: TestClient, app: FastAPI) -> None:
        paths = app.openapi()["paths"]
        assert len(paths) > 10
        for template, operations in paths.items():
            path = template.replace("{conversation_id}", "1").replace("{session_id}", "1").rstrip("/")
            for method in operations:  # without a token, because streams do not end
                answers = [client.request(method, path + end, follow_redirects=False) for end in ("", "/")]
                assert (path, answers[0].status_code) == (path, answers[1].status_code)
                assert answers[0].status_code not in (307, 308, 404, 405)

    def test_two_slashes_are_another_address(self, client: TestClient, bearer: dict[str, str]) -> None:
        for path in ("/api/conversations//", "/livez//"):
            assert client.get(path, headers=bearer).status_code == 404

    def test_behind_a_prefix(self, app: FastAPI) -> None:
        with TestClient(app, root_path="/chat") as client:
            for path in ("/chat/api/conversations", "/chat/api/conversations/", "/chat/livez/"):
                assert client.get(path).status_code in (200, 401)


class TestHeaders:
    def test_browsers_are_told_what_not_to_do(self, client: TestClient, bearer: dict[str, str]) -> None:
        for path in ("/", "/api/auth/me", "/api/nothing", "/livez", "/metrics", "/docs"):
            headers = client.get(path, headers=bearer).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"]
            assert headers["x-frame-options"] == "DENY"
        assert client.get("/api/auth/me", headers=bearer).headers["cache-control"] == "no-store"
        assert client.get("/api/auth/me").headers["cache-control"] == "no-store"

    def test_page_runs_no_script_but_ours(self, client: TestClient) -> None:
        policy = client.get("/").headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy

    def test_other_origins_get_no_permission(self, client: TestClient) -> None:
        answer = client.options("/api/conversations/", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})
        assert not any(name.startswith("access-control") for name in answer.headers)


class TestDocumentation:
    def test_every_call_names_its_problems_and_asks_for_a_token(self, app: FastAPI) -> None:
        document = app.openapi()
        open_to_all = {f"/api/auth/{name}" for name in ("register", "token", "refresh", "session", "session/refresh")}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert operation["tags"]
                if path.startswith("/api/"):
                    assert bool(operation.get("security")) == (path not in open_to_all), path
                    assert any("application/problem+json" in answer.get("content", {}) for answer in operation["responses"].values()), path
        assert "HTTPValidationError" not in json.dumps(document)
        assert set(document["components"]["schemas"]["Problem"]["properties"]) == {"type", "title", "status", "detail", "errors"}


def _raiser(exc: Exception) -> Any:
    async def endpoint() -> None:
        raise exc

    return endpoint


def test_every_error_that_may_be_tried_again_waits_a_little() -> None:
    def leaves(kind: type[ChatkeepError]) -> Iterator[type[ChatkeepError]]:
        for child in kind.__subclasses__():
            yield child
            yield from leaves(child)

    for kind in leaves(ChatkeepError):
        assert (errors.status_of(kind()) in (503, 429)) == issubclass(kind, TryAgainLater | TooManyStreams)
