"""Everything has a limit, and is reached here by shrinking it: what an operator sets is what holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.served import House, house
from tests.people import keyed, ok, problem, until
from worker import keys
from worker.embedded import EmbeddedPostgres, EmbeddedValkey

LIMITS = {
    **{"PENDING_BYTES_MAX": "4000", "MESSAGE_CHARS_MAX": "500", "BODY_BYTES_MAX": "3000", "CACHE_TTL_SECONDS": "7", "SHARDS": "4"},
    "UNSAFE_DURABILITY": "1",
}


@pytest.fixture(scope="module")
def small(postgres: EmbeddedPostgres, migrated_template: str, valkey: EmbeddedValkey) -> Iterator[House]:
    with house(postgres, migrated_template, valkey, **LIMITS) as found:
        yield found


def test_full_backlog_refuses_writes_and_nothing_else(small: House) -> None:
    ann, bob = small.person(), small.person()
    conversation, other = ann.start()["id"], bob.start()["id"]
    accepted = ann.say(conversation, "x" * 400, key="first")
    while (answer := ann.post(conversation, "x" * 400)).status_code == 201:
        assert len(ann.history(conversation)) < 20
    problem(answer, 503)
    assert small.redis.get(keys.backlog_bytes(ann.id % 4)) is not None
    until(lambda: bob.post(other, "x" * 400).status_code == 503, "the limit is one for all shards", 5)
    problem(ann.http.patch(f"/api/conversations/{conversation}", json={"title": "x" * 200}), 503)
    problem(ann.chat(conversation, "x" * 400), 503)
    replayed = ann.post(conversation, "x" * 400, key="first")
    assert replayed.headers["idempotent-replayed"] == "true"
    assert ok(replayed, 201)["id"] == accepted["id"]
    stored = ann.contents(conversation)
    assert ann.look(conversation)["title"] == "x" * 79 + "…"
    assert bob.http.delete(f"/api/conversations/{other}").status_code == 204, "a deletion is what frees space"
    small.flush_all()
    until(lambda: ann.post(conversation, "at last").status_code == 201, "there is room again", 5)
    assert ann.contents(conversation) == [*stored, "at last"]


def test_message_and_body_have_the_limits_that_were_set(small: House) -> None:
    ann = small.person()
    conversation = until(
        lambda: ann.http.post("/api/conversations", json={}).json().get("id"), "the backlog of the test before is forgotten", 5
    )
    ok(ann.post(conversation, "x" * 500), 201)
    problem(ann.post(conversation, "x" * 501), 422)
    problem(ann.post(conversation, "x" * 3000), 413)


def test_acknowledgements_of_unsafe_durability_say_so(small: House) -> None:
    ann = small.person()
    made = until(
        lambda: answer if (answer := ann.http.post("/api/conversations", json={}, headers=keyed("k"))).is_success else None,
        "there is room",
        5,
    )
    conversation = made.json()["id"]
    small.redis.config_set("appendfsync", "no")
    try:
        until(lambda: small.http.get("/readyz").json()["status"] == "degraded", "it has seen the difference", 5)
        for answer in (
            made,
            ann.http.post("/api/conversations", json={}, headers=keyed("k")),
            ann.post(conversation, "x"),
            ann.chat(conversation, "x"),
            ann.stream(conversation, "x"),
            ann.http.post("/api/chat/start", json={}),
            ann.http.patch(f"/api/conversations/{conversation}", json={"title": "t"}),
            ann.http.delete(f"/api/conversations/{conversation}"),
        ):
            assert answer.is_success
            assert answer.headers["x-durability"] == "memory"
    finally:
        small.redis.config_set("appendfsync", "always")


def test_committed_copies_live_as_long_as_was_set(small: House) -> None:
    ann = small.person()
    conversation = ann.start()["id"]
    small.flush(ann)
    assert 0 < small.redis.ttl(keys.conversation(ann.id % 4, conversation)) <= 7
    small.forget()
    ann.page(conversation)
    until(lambda: 0 < small.redis.ttl(keys.conversation(ann.id % 4, conversation)) <= 7, "a read brings it back for as long")
