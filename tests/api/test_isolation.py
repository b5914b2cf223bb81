"""Nobody else's: every route of the OpenAPI document, every kind of caller, every state of a conversation.

What is not yours is answered as what is not there: same status, same body, same headers. A route that is new fails here until `ROWS` says
what it is.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import httpx2
import jwt
import pytest
from fastapi.routing import iter_route_contexts

from api.app import create_app
from api.tokens import AUDIENCE, ISSUER, PURPOSE
from tests.api.provider import AUDIENCE as OUTSIDE_AUDIENCE
from tests.api.provider import Key, Provider, provider
from tests.api.served import House, house
from tests.people import Person, browser, ok, problem
from worker import keys
from worker.embedded import EmbeddedPostgres, EmbeddedValkey
from worker.settings import Settings

Route = tuple[str, str]
Call = Callable[[httpx2.Client, int], httpx2.Response]


@dataclass(frozen=True)
class Row:
    """A route that is about one conversation: how it is called, and what its owner is answered."""

    call: Call
    status: int


def simple(method: str, path: str, status: int, body: dict[str, Any] | None = None) -> tuple[Route, Row]:
    """A row whose conversation stands in the path."""
    name = path.split("{")[1].split("}")[0]
    return (method, path), Row(lambda http, number: http.request(method, path.replace("{" + name + "}", str(number)), json=body), status)


SECRET = "the owner's own words"
CONVERSATION = "/api/conversations/{conversation_id}"
SESSION = "/api/chat/{session_id}"
ROWS: dict[Route, Row | Literal["the caller's own", "open to all"]] = dict([
    simple("GET", CONVERSATION, 200),
    simple("PATCH", CONVERSATION, 200, {"title": "changed"}),
    simple("DELETE", CONVERSATION, 204),
    simple("POST", CONVERSATION + "/messages", 201, {"role": "user", "content": "added"}),
    simple("POST", CONVERSATION + "/messages/batch", 201, {"messages": [{"role": "user", "content": "added"}] * 2}),
    simple("GET", CONVERSATION + "/messages", 200),
    simple("POST", SESSION + "/message", 200, {"message": "added"}),
    simple("GET", SESSION + "/history", 200),
    simple("GET", SESSION + "/stream", 204),
    simple("POST", SESSION + "/stop", 202),
    (("POST", "/api/chat/start"), Row(lambda http, number: http.post("/api/chat/start", json={"conversation_id": number}), 201)),
    (("GET", "/api/conversations/"), "the caller's own"),
    (("POST", "/api/conversations/"), "the caller's own"),
    (("GET", "/api/auth/me"), "the caller's own"),
    (("GET", "/api/events"), "the caller's own"),
    (("POST", "/api/auth/logout"), "the caller's own"),
    *((("POST", "/api/auth/" + name), "open to all") for name in ("register", "token", "refresh", "session", "session/refresh")),
    (("DELETE", "/api/auth/session"), "open to all"),
    *((("GET", "/" + name), "open to all") for name in ("livez", "healthz", "readyz", "metrics")),
])  # fmt: skip


def documented() -> list[Route]:
    """Every operation of the OpenAPI document, as the app makes it."""
    made_up = {"database_url": "postgresql://x", "redis_url": "redis://x", "jwt_secret": secrets.token_urlsafe(48)}
    paths = create_app(Settings(_env_file=None, **made_up)).openapi()["paths"]  # type: ignore[call-arg, arg-type]
    return [(method.upper(), path) for path, operations in paths.items() for method in operations if method != "head"]


ROUTES = documented()
ABOUT_A_CONVERSATION = [route for route in ROUTES if isinstance(ROWS.get(route), Row)]
SIGNED_IN = [route for route in ROUTES if ROWS.get(route) != "open to all"]
each_route = pytest.mark.parametrize("route", ABOUT_A_CONVERSATION, ids=" ".join)


@pytest.fixture(scope="module")
def idp() -> Iterator[Provider]:
    with provider() as found:
        yield found


@pytest.fixture(scope="module")
def served(postgres: EmbeddedPostgres, migrated_template: str, valkey: EmbeddedValkey, idp: Provider) -> Iterator[House]:
    with house(postgres, migrated_template, valkey, OIDC_ISSUER=idp.issuer, OIDC_AUDIENCE=OUTSIDE_AUDIENCE) as found:
        yield found


@pytest.fixture(scope="module")
def owner(served: House) -> Person:
    return served.person(7)


@pytest.fixture(scope="module")
def others(served: House, idp: Provider) -> list[Person]:
    """Somebody whose keys lie in the owner's shard, somebody whose keys do not, and somebody whom the provider calls by the owner's id."""
    with browser(served.url, bearer(token := idp.token(sub="7"))) as http:
        number = ok(http.get("/api/auth/me"))["id"]
    return [served.person(7 + served.settings.shards), served.person(8), Person(served.url, number, token)]


def pending(served: House, owner: Person) -> int:
    conversation: int = owner.start("the owner's title")["id"]
    owner.say(conversation, SECRET)
    assert served.pending(owner) >= 2
    return conversation


def committed(served: House, owner: Person) -> int:
    conversation = pending(served, owner)
    served.flush(owner)
    assert served.pending(owner) == 0
    return conversation


def cold(served: House, owner: Person) -> int:
    conversation = committed(served, owner)
    served.forget()
    assert not served.redis.exists(keys.conversation(keys.shard_of_user(owner.id, served.settings.shards), conversation))
    return conversation


def deleted_and_pending(served: House, owner: Person) -> int:
    conversation = pending(served, owner)
    assert owner.http.delete(f"/api/conversations/{conversation}").status_code == 204
    return conversation


def deleted(served: House, owner: Person) -> int:
    conversation = deleted_and_pending(served, owner)
    served.flush(owner)
    return conversation


def deleted_and_cold(served: House, owner: Person) -> int:
    conversation = deleted_and_pending(served, owner)
    served.forget()
    return conversation


def never(served: House, owner: Person) -> int:
    """An id that could be one of the owner's, but is not."""
    newest: int = owner.start()["id"]
    return newest + 64 * 1000


def never_in_this_shard(served: House, owner: Person) -> int:
    return never(served, owner) + 1


STATES = [pending, committed, cold, deleted_and_pending, deleted, deleted_and_cold, never, never_in_this_shard]
THERE = [pending, committed, cold]


def credentials(served: House, owner: Person, idp: Provider) -> dict[str, dict[str, str]]:
    """Headers of people who are not the owner, however much they say so."""
    secret = served.settings.jwt_secret.get_secret_value()
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": str(owner.id), "iat": now, "exp": now + 600, "typ": PURPOSE}
    assert ok(owner.at(served.url).http.get("/api/conversations", headers=bearer(jwt.encode(claims, secret, "HS256")))), (
        "the forgery is good"
    )
    refresh_tokens = served.app.state.refresh_tokens
    kept, _ = refresh_tokens.begin(owner.id, 10)
    ended, _ = refresh_tokens.begin(owner.id, 10)
    signed_out = bearer(served.app.state.tokens.issue(owner.id, ended.id))
    with browser(served.url, signed_out) as http:
        assert http.post("/api/auth/logout").status_code == 204
    head, _, signature = owner.token.split(".")
    somebody_elses_claims = jwt.encode(claims | {"sub": "1"}, "x" * 40, "HS256").split(".")[1]
    return {
        "anonymous": {},
        "expired": bearer(jwt.encode(claims | {"iat": now - 900, "exp": now - 60}, secret, "HS256")),
        "another algorithm": bearer(jwt.encode(claims, secret, "HS512")),
        "no algorithm": bearer(jwt.encode(claims, None, "none")),
        "wrong audience": bearer(jwt.encode(claims | {"aud": "another"}, secret, "HS256")),
        "no audience": bearer(jwt.encode({name: value for name, value in claims.items() if name != "aud"}, secret, "HS256")),
        "no expiry": bearer(jwt.encode({name: value for name, value in claims.items() if name != "exp"}, secret, "HS256")),
        "another secret": bearer(jwt.encode(claims, secrets.token_urlsafe(48), "HS256")),
        "refresh token": bearer(kept.token),
        "signed out": signed_out,
        "sign-in that is no name": bearer(jwt.encode(claims | {"sid": 1}, secret, "HS256")),
        "another purpose": bearer(jwt.encode(claims | {"typ": "refresh"}, secret, "HS256")),
        "edited": bearer(f"{head}.{somebody_elses_claims}.{signature}"),
        "not a token": bearer("x"),
        **{name: bearer(token) for name, token in outside_tokens(idp, str(owner.id)).items()},
        "another scheme": {"Authorization": f"Basic {owner.token}"},
    }


def outside_tokens(idp: Provider, subject: str) -> dict[str, str]:
    """Of an identity provider, and not good."""
    stranger = Key(idp.key.name)
    return {
        "outside, wrong audience": idp.token(sub=subject, aud="another"),
        "outside, no expiry": idp.token(sub=subject, exp=None),
        "outside, expired": idp.token(sub=subject, exp=int(time.time()) - 60),
        "outside, another's key": idp.token(stranger, sub=subject),
        "foreign issuer": idp.token(stranger, sub=subject, iss="https://idp.example"),
        "foreign issuer with a good key": idp.token(sub=subject, iss="https://idp.example"),
        "our issuer with the provider's key": idp.token(sub=subject, iss=ISSUER, aud=AUDIENCE, typ=PURPOSE),
    }


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def told(answer: httpx2.Response) -> tuple[int, bytes, list[tuple[str, str]]]:
    """All that an answer says, but for the time of day."""
    return answer.status_code, answer.content, sorted((name, value) for name, value in answer.headers.items() if name != "date")


def is_whole(owner: Person, conversation: int) -> bool:
    return owner.contents(conversation) == [SECRET] and owner.look(conversation)["title"] == "the owner's title"


def test_every_route_has_its_row() -> None:
    assert [route for route in ROUTES if route not in ROWS] == []


def test_no_route_of_the_api_hides_from_the_document(served: House) -> None:
    known = {(method, path.rstrip("/")) for method, path in ROUTES}
    for context in iter_route_contexts(served.app.routes):
        for method in getattr(context, "methods", None) or ():
            if (context.path or "").startswith("/api") and method != "HEAD":
                assert (method, (context.path or "").rstrip("/")) in known


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@each_route
def test_what_is_not_yours_is_not_there(
    served: House, owner: Person, others: list[Person], route: Route, state: Callable[..., int]
) -> None:
    row = ROWS[route]
    assert isinstance(row, Row)
    conversation = state(served, owner)
    for other in others:
        not_yours = row.call(other.http, conversation)
        problem(not_yours, 404)
        assert told(not_yours) == told(row.call(other.http, never(served, other)))
        if state is cold:
            served.forget()
    if state in THERE:
        assert is_whole(owner, conversation)
        assert row.call(owner.http, conversation).status_code == row.status
    else:
        gone = row.call(owner.http, conversation)
        assert told(gone) == told(row.call(owner.http, never(served, owner)))
        problem(gone, 404)


@pytest.mark.parametrize("state", [pending, cold, deleted, never], ids=lambda state: state.__name__)
@each_route
def test_without_a_good_token_nothing_is_told(served: House, owner: Person, idp: Provider, route: Route, state: Callable[..., int]) -> None:
    row = ROWS[route]
    assert isinstance(row, Row)
    conversation = state(served, owner)
    answers = {}
    for name, headers in credentials(served, owner, idp).items():
        with browser(served.url, headers) as http:
            answers[name] = row.call(http, conversation)
    problem(answers["anonymous"], 401)
    assert answers["anonymous"].headers["www-authenticate"].startswith("Bearer")
    assert {name: told(answer) for name, answer in answers.items()} == dict.fromkeys(answers, told(answers["anonymous"]))
    if state in THERE:
        assert is_whole(owner, conversation)


@pytest.mark.parametrize("route", SIGNED_IN, ids=" ".join)
def test_nothing_of_a_request_is_looked_at_before_its_token(served: House, route: Route) -> None:
    method, path = route
    for number in ("1", "-1", "x", str(10**30)):
        url = path.replace("{conversation_id}", number).replace("{session_id}", number)
        answer = served.http.request(method, url, json={"unknown": 1}, headers={"Idempotency-Key": "bad key"}, params={"limit": "x"})
        problem(answer, 401)


@pytest.mark.parametrize(
    "number", ["0", "-1", "1.0", "007", "+7", "1e3", "x", "%00", "%EF%BC%97", str(1 << 53), str(1 << 63), "9" * 400, "7%20", "7;", "null"]
)
@pytest.mark.parametrize("route", [route for route in ABOUT_A_CONVERSATION if "{" in route[1]], ids=" ".join)
def test_what_cannot_be_an_id_is_not_there(served: House, owner: Person, route: Route, number: str) -> None:
    row = ROWS[route]
    assert isinstance(row, Row)
    answer = row.call(owner.http, number)  # type: ignore[arg-type]  # as it may come over the wire
    assert told(answer) == told(row.call(owner.http, never(served, owner)))
    problem(answer, 404)


@pytest.mark.parametrize("step", ["pending", "committed", "cold"])
def test_list_shows_only_ones_own(served: House, step: str) -> None:
    first = served.person()
    everybody = [first, served.person(first.id + 10_000 * served.settings.shards), served.person()]
    mine = {person.id: [person.start(f"of {person.id}")["id"] for _ in range(3)] for person in everybody}
    if step != "pending":
        served.flush(*everybody)
    if step == "cold":
        served.forget()
    for person in everybody:
        listed = list(person.walk(2))
        assert {item["user_id"] for item in listed} == {person.id}
        assert [item["id"] for item in listed] == mine[person.id][::-1]


def test_events_are_only_ones_own(served: House) -> None:
    ann = served.person()
    bob = served.person(ann.id + 10_000 * served.settings.shards)
    seen = ""
    with bob.http.stream("GET", "/api/events") as answer:
        for piece in answer.iter_text():
            if not seen:  # the stream is open
                conversation = ann.start("Ann's own")["id"]
                ok(ann.chat(conversation, SECRET))
                served.flush(ann)
                bob.say(bob.start()["id"], "Bob's own")
            seen += piece
            if "Bob's own" in seen:
                break
    assert SECRET not in seen
    assert str(conversation) not in seen
    assert f'"user_id":{ann.id},' not in seen


def test_owner_is_who_the_token_says_and_nothing_else(served: House, owner: Person, others: list[Person]) -> None:
    other = others[0]
    for extra in ({"user_id": owner.id}, {"owner": owner.id}, {"id": 1}):
        problem(other.http.post("/api/conversations", json=extra), 422)
    answer = other.http.post("/api/conversations", json={}, params={"user_id": owner.id}, headers={"X-User-Id": str(owner.id)})
    assert ok(answer, 201)["user_id"] == other.id
    assert ok(owner.http.post("/api/conversations", json={}), 201)["user_id"] == owner.id


def test_public_routes_tell_nothing_of_anybody(served: House, owner: Person) -> None:
    conversation = pending(served, owner)
    for (method, path), kind in ROWS.items():
        if kind == "open to all" and method == "GET":
            text = served.http.get(path).text
            assert SECRET not in text
            assert str(conversation) not in text
            assert "@example.org" not in text


def test_postgres_itself_refuses_a_message_in_anothers_conversation(served: House, owner: Person, others: list[Person]) -> None:
    """A log entry that no append would write: somebody else's user id in the owner's conversation."""
    conversation = committed(served, owner)
    shard = keys.shard_of_user(owner.id, served.settings.shards)
    body = b'{"conversation_id":%d,"user_id":%d,"role":"user","content":"intruder","status":"complete"}' % (conversation, others[0].id)
    served.redis.xadd(
        keys.log(shard), {"k": "m", "t": "1800000000000000", "b": body, "x": "", "a": ""}, id=f"{conversation + 6400 * 10**6}-0"
    )
    (report,) = served.flush(owner)
    assert report.dead_letters == 1
    assert served.query("SELECT reason FROM dead_letter") == [("no_conversation",)]
    served.forget()
    assert is_whole(owner, conversation)
    with pytest.raises(Exception, match="foreign key"):
        served.query(
            "INSERT INTO message (id, conversation_id, user_id, role, content, created_at, status) "
            "VALUES (1, %s, %s, 'user', 'x', now(), 'complete')",
            conversation,
            others[0].id,
        )
