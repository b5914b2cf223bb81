"""The contract's lines that hold for every route: read off the OpenAPI document, so that a new route is held to them too.

What one route does is in test_conversations.py, test_history.py and test_chat.py; who may ask is in test_isolation.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import orjson
import pytest
from pydantic import BaseModel, ConfigDict

from api import schemas
from tests.api.served import House, house
from tests.people import JSON, TIME, Person, browser, events, ok, problem, sign_up, until
from worker.embedded import EmbeddedPostgres, EmbeddedValkey

PASSWORD = "correct horse battery"
MIB = 1 << 20


@pytest.fixture(scope="module")
def served(postgres: EmbeddedPostgres, migrated_template: str, valkey: EmbeddedValkey) -> Iterator[House]:
    with house(postgres, migrated_template, valkey) as found:
        yield found


@pytest.fixture(scope="module")
def document(served: House) -> dict[str, Any]:
    found: dict[str, Any] = ok(served.http.get("/openapi.json"))
    return found


@pytest.fixture
def ann(served: House) -> Person:
    return served.person()


@pytest.fixture
def conversation(ann: Person) -> int:
    return int(ann.start("Ann's")["id"])


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def filled(path: str, conversation: int) -> str:
    return path.replace("{conversation_id}", str(conversation)).replace("{session_id}", str(conversation))


def json_bodies(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every route that takes JSON, with the properties of its body."""
    for method, path, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {})
        if "application/json" in content:
            name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            yield method, path, document["components"]["schemas"][name]["properties"]


def send(http: httpx2.Client, method: str, path: str, body: bytes) -> httpx2.Response:
    return http.request(method, path, content=body, headers=JSON)


class Exactly(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def check(model: type[BaseModel], told: Any) -> None:
    """An answer has the fields that the documentation shows, of these types, and no others."""
    strict = type(model.__name__, (Exactly, model), {"__annotations__": {}})
    strict.model_validate(told)  # type: ignore[attr-defined]
    assert set(told) == set(model.model_fields)


class TestShapes:
    def test_accounts(self, served: House) -> None:
        with browser(served.url) as http:
            made = ok(http.post("/api/auth/register", json={"email": "Carol@Example.org", "password": PASSWORD}), 201)
            check(schemas.UserOut, made)
            assert made["email"] == "carol@example.org"
            assert TIME.fullmatch(made["created_at"])
            problem(http.post("/api/auth/register", json={"email": "carol@example.org", "password": PASSWORD}), 409)
            token = ok(http.post("/api/auth/token", data={"username": "carol@example.org", "password": PASSWORD}))
            check(schemas.TokenOut, token)
            assert token["token_type"] == "bearer"
            assert token["expires_in"] > 0
            problem(http.post("/api/auth/token", data={"username": "carol@example.org", "password": PASSWORD + "!"}), 401)
            assert ok(http.get("/api/auth/me", headers={"Authorization": f"bearer {token['access_token']}"})) == made

    def test_conversations_and_messages(self, served: House, ann: Person) -> None:
        made = ann.start("x")
        check(schemas.ConversationOut, made)
        check(schemas.MessageOut, ann.say(made["id"], "hello"))
        for step in (lambda: None, served.forget):
            step()
            check(schemas.ConversationOut, ann.look(made["id"]))
            check(schemas.ConversationPage, ann.conversations())
            check(schemas.ConversationPage, ann.conversations(limit=1))
            check(schemas.MessagePage, ann.page(made["id"]))
            check(schemas.ConversationOut, ok(ann.http.patch(f"/api/conversations/{made['id']}", json={"title": "y"})))

    def test_chat(self, ann: Person) -> None:
        session = ok(ann.http.post("/api/chat/start", json={}), 201)
        check(schemas.Session, session)
        turn = ok(ann.chat(session["session_id"], "Hello"))
        check(schemas.ChatTurn, turn)
        assert turn["reply"] == turn["assistant_message"]["content"]
        check(schemas.SessionHistory, ok(ann.http.get(f"/api/chat/{session['session_id']}/history")))
        for name, data in events(ann.stream(session["conversation_id"], "Again")):
            check(schemas.MessageOut, data) if name != "delta" else None

    def test_ids_are_exact_in_a_browser_and_times_are_utc_with_microseconds(self, served: House, ann: Person) -> None:
        turn = ok(ann.chat(ann.start()["id"], "Hello"))
        answers = [ann.conversations(), ann.page(turn["conversation_id"]), turn]

        def walk(told: Any, name: str = "") -> None:
            for key, value in told.items() if isinstance(told, dict) else ((name, one) for one in told):
                if isinstance(value, (dict, list)):
                    walk(value, key)
                elif key == "id" or (key.endswith("_id") and key != "session_id"):
                    assert type(value) is int
                    assert int(float(value)) == value
                    assert 0 < value < 1 << 53
                elif key.endswith("_at"):
                    assert TIME.fullmatch(value)
                assert key == key.lower()

        for answer in answers:
            walk(answer)


GOOD = {
    **{"title": "t", "role": "user", "content": "c", "message": "m", "email": "x@example.org", "password": PASSWORD},
    "messages": [{"role": "user", "content": "c"}],
}
"""Something good for each field."""


class TestEveryRoute:
    def test_trailing_slash_is_optional(self, served: House, document: dict[str, Any], ann: Person) -> None:
        for method, path, _ in operations(document):
            results = []
            for url in (path.rstrip("/"), path.rstrip("/") + "/"):
                body = {"title": "t"} if method == "PATCH" else {}
                with ann.http.stream(method, filled(url, ann.start()["id"]), json=body) as answer:  # one of them never ends
                    results.append((answer.status_code, answer.headers.get("content-type")))
                    assert not answer.is_redirect
            assert results[0] == results[1], (method, path, results)
            assert results[0][0] not in (404, 405), (method, path)

    @pytest.mark.parametrize(
        "body",
        [
            *(
                b"",
                b"{",
                b"null",
                b"[]",
                b'"text"',
                b"1",
                b"NaN",
                b"-Infinity",
                b"{'a': 1}",
                b'{"a": 1,}',
                b"\xff\xfe{}",
                b'{"a": "\xff"}',
                b"\x00",
            ),
            *(
                b'{"\xed\xa0\x80": 1}',
                b'{"\\ud800": 1}',
                b'{"a": NaN}',
                b'{"a": 1e400}',
                b'{"a": %s}' % (b"9" * 5000),
                b"[" * 50_000,
                b'{"a":' * 20_000,
            ),
        ],
        ids=lambda body: repr(body[:12]),
    )
    def test_body_that_is_no_object_is_refused(
        self, served: House, document: dict[str, Any], ann: Person, conversation: int, body: bytes
    ) -> None:
        before = served.pending(ann)
        for method, path, _ in json_bodies(document):
            problem(send(ann.http, method, filled(path, conversation), body), 422)
        assert served.pending(ann) == before

    def test_unknown_field_is_refused(self, document: dict[str, Any], ann: Person, conversation: int) -> None:
        for method, path, properties in json_bodies(document):
            body = {name: GOOD[name] for name in properties if name in GOOD} | {"surprise": 1}
            told = problem(ann.http.request(method, filled(path, conversation), json=body), 422)
            assert [error["loc"] for error in told["errors"]] == [["body", "surprise"]], (method, path)

    @pytest.mark.parametrize("bad", ["\x00", "nul in \x00 it", "\ud800", "\udc00 half", "pair the wrong way \udc00\ud800"], ids=repr)
    def test_nul_and_lone_surrogates_are_refused_in_every_text(
        self, served: House, document: dict[str, Any], ann: Person, conversation: int, bad: str
    ) -> None:
        before = served.pending(ann)
        for method, path, properties in json_bodies(document):
            for name in set(properties) - {"conversation_id"}:
                body = {other: GOOD[other] for other in properties if other in GOOD} | {name: bad + PASSWORD}
                told = problem(send(ann.http, method, filled(path, conversation), json.dumps(body).encode()), 422)
                assert ["body", name] in [error["loc"] for error in told["errors"]], (method, path, name)
        assert served.pending(ann) == before

    @pytest.mark.parametrize("bad", [None, 0, 1.5, True, [], {}, ["x"], {"x": "y"}], ids=repr)
    def test_wrong_type_is_refused_in_every_field(self, document: dict[str, Any], ann: Person, conversation: int, bad: Any) -> None:
        for method, path, properties in json_bodies(document):
            for name in properties:
                if bad is None and "anyOf" in properties[name]:
                    continue  # null is what leaving it out means
                body = {other: GOOD[other] for other in properties if other in GOOD} | {name: bad}
                told = problem(ann.http.request(method, filled(path, conversation), json=body), 422)
                assert name in [error["loc"][1] for error in told["errors"] if len(error["loc"]) > 1], (method, path, name)

    def test_body_of_one_mib_is_taken_and_one_byte_more_is_not(
        self, served: House, document: dict[str, Any], ann: Person, conversation: int
    ) -> None:
        body = orjson.dumps({"role": "user", "content": "x"}).ljust(MIB)
        assert send(ann.http, "POST", f"/api/conversations/{conversation}/messages", body).status_code == 201
        before = served.pending(ann)
        for method, path, _ in json_bodies(document):
            problem(send(ann.http, method, filled(path, conversation), body + b" "), 413)
            chunks = [body, b" "]
            problem(ann.http.request(method, filled(path, conversation), content=iter(chunks), headers=JSON), 413)
        assert served.pending(ann) == before

    def test_wrong_content_type_is_refused(self, document: dict[str, Any], ann: Person, conversation: int) -> None:
        for method, path, _ in json_bodies(document):
            for kind in ("text/plain", "application/x-www-form-urlencoded", "application/octet-stream"):
                problem(
                    ann.http.request(method, filled(path, conversation), content=b'{"title": "t"}', headers={"Content-Type": kind}), 422
                )

    def test_wrong_method_and_unknown_route_are_problems(self, document: dict[str, Any], ann: Person, conversation: int) -> None:
        for path, methods in document["paths"].items():
            answer = ann.http.put(filled(path, conversation))
            problem(answer, 405)
            allowed = {method.strip() for method in answer.headers["allow"].split(",")}
            assert {method.upper() for method in methods} <= allowed, path
        for path in (
            "/api",
            "/api/",
            "/api/nothing",
            "/nothing",
            f"/api/conversations/{conversation}/nothing",
            "/api/conversations//messages",
            "/%00",
        ):
            problem(ann.http.get(path), 404)

    def test_every_answer_that_is_given_is_documented(self, document: dict[str, Any]) -> None:
        for method, path, operation in operations(document):
            signed_in = "security" in operation
            expected = {"401", "503"} if signed_in else set()
            expected |= {"404"} if "{" in path else set()
            assert expected <= set(operation["responses"]), (method, path)
            assert "HTTPValidationError" not in str(operation["responses"])


class TestOperations:
    def test_alive_and_ready(self, served: House) -> None:
        for path in ("/livez", "/healthz"):
            assert ok(served.http.get(path)) == {"status": "ok"}
        ready = ok(served.http.get("/readyz"))
        assert ready["status"] == "ok"
        assert all(check["ok"] for check in ready["checks"].values())
        assert {"redis", "append_only_file", "fsync_always", "no_eviction", "memory"} <= set(ready["checks"])

    def test_metrics_count_what_was_accepted_and_what_is_pending(self, served: House, ann: Person, conversation: int) -> None:
        def value(name: str) -> float:
            lines = served.http.get("/metrics").text.splitlines()
            return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

        served.flush_all()
        accepted, committed = value("chatkeep_accepted_total"), value("chatkeep_committed_messages_total")
        for number in range(3):
            ann.say(conversation, "counted", key=str(number))
            ann.say(conversation, "counted", key=str(number))
        assert value("chatkeep_accepted_total") == accepted + 3
        assert value("chatkeep_pending_entries") == 3
        assert value("chatkeep_pending_bytes") > 300
        assert 0 < value("chatkeep_pending_oldest_age_seconds") < 60
        served.flush(ann)
        assert value("chatkeep_committed_messages_total") == committed + 3
        assert value("chatkeep_pending_entries") == 0
        assert value("chatkeep_flush_duration_seconds_count") >= 1
        assert value("chatkeep_dead_letters_total") == 0

    def test_page_and_documentation(self, served: House) -> None:
        for path in ("/", "/docs"):
            answer = served.http.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/html")
        assert ok(served.http.get("/openapi.json"))["openapi"].startswith("3.")


class TestHonesty:
    """When it cannot keep the promise it says so: at once, and without a false 2xx."""

    @pytest.fixture
    def untrustworthy(self, served: House) -> Iterator[None]:
        served.redis.config_set("appendfsync", "everysec")
        yield
        served.redis.config_set("appendfsync", "always")
        somebody = served.person()
        until(lambda: somebody.http.post("/api/conversations", json={}).status_code == 201, "it trusts Redis again", 5)

    def test_redis_that_can_lose_writes_is_not_written_to(self, served: House, ann: Person, conversation: int, untrustworthy: None) -> None:
        until(lambda: ann.post(conversation, "x").status_code == 503, "the check has failed", 5)
        before = served.pending(ann)
        calls = {
            "POST": [
                ("/api/conversations", {}),
                (f"/api/conversations/{conversation}/messages", {"role": "user", "content": "x"}),
                ("/api/chat/start", {}),
            ],
            "PATCH": [(f"/api/conversations/{conversation}", {"title": "x"})],
        }
        for method, each in calls.items():
            for path, body in each:
                assert "fsync_always" in problem(ann.http.request(method, path, json=body), 503)["detail"]
        problem(ann.http.delete(f"/api/conversations/{conversation}"), 503)
        problem(ann.chat(conversation, "x"), 503)
        assert served.pending(ann) == before
        ready = until(lambda: None if (answer := served.http.get("/readyz")).status_code == 200 else answer.json(), "it is not ready", 5)
        assert not ready["checks"]["fsync_always"]["ok"]
        assert ann.look(conversation)["title"] == "Ann's", "reading goes on"


def test_everything_through_the_front_door(served: House) -> None:
    """Sign up, write, read, over HTTP alone."""
    started = time.monotonic()
    dave = sign_up(served.url, "dave@example.org")
    conversation = dave.start()["id"]
    dave.say(conversation, "Hello")
    assert dave.contents(conversation) == ["Hello"]
    assert dave.look(conversation)["title"] == "Hello"
    assert time.monotonic() - started < 5
