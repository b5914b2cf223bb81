"""Reads that nobody can tell the boundary from: pages both ways, while pending messages become committed under them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.served import House, house
from tests.people import Person, ok, problem
from worker import keys
from worker.embedded import EmbeddedPostgres, EmbeddedValkey

KEPT = 4
"""Committed messages that stay in the cache: few, so that short histories have a seam."""


@pytest.fixture(scope="module")
def served(postgres: EmbeddedPostgres, migrated_template: str, valkey: EmbeddedValkey) -> Iterator[House]:
    with house(postgres, migrated_template, valkey, CACHE_MESSAGES_MAX=str(KEPT)) as found:
        yield found


@pytest.fixture
def ann(served: House) -> Person:
    return served.person()


def write(person: Person, conversation: int, count: int, first: int = 1) -> list[dict[str, Any]]:
    """Messages numbered from `first` on."""
    roles = ("user", "assistant")
    return [person.say(conversation, f"message {number}", roles[number % 2 == 0]) for number in range(first, first + count)]


def settled(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without what a flush changes."""
    return [{name: value for name, value in message.items() if name != "state"} for message in messages]


def check_every_page(person: Person, conversation: int, messages: list[dict[str, Any]], limits: tuple[int, ...]) -> None:
    """Every page that can be asked for, from every place, in both directions, is the right piece of the history."""
    history = settled(messages)
    places = [1, history[0]["id"] - 1, *(message["id"] for message in history), history[-1]["id"] + 1, (1 << 53) - 1]
    for limit in limits:
        check_page(person.page(conversation, limit=limit), history[-limit:], len(history) > limit, False)
        for place in places:
            older = [message for message in history if message["id"] < place]
            newer = [message for message in history if message["id"] > place]
            page = person.page(conversation, limit=limit, before=place)
            check_page(page, older[-limit:], len(older) > limit, len(older) < len(history))
            page = person.page(conversation, limit=limit, after=place)
            check_page(page, newer[:limit], len(newer) < len(history), len(newer) > limit)


def check_page(page: dict[str, Any], expected: list[dict[str, Any]], has_older: bool, has_newer: bool) -> None:
    assert settled(page["items"]) == expected
    assert (page["has_older"], page["has_newer"]) == (has_older, has_newer)
    states = [message["state"] for message in page["items"]]
    assert states == sorted(states), "a committed message after a pending one"


class TestOneHistory:
    @pytest.mark.parametrize("pending", [0, 1, 4, 8])
    @pytest.mark.parametrize("copies", ["cached", "gone before the pending ones"])
    def test_every_page_is_the_same_wherever_the_boundary_lies(self, served: House, ann: Person, pending: int, copies: str) -> None:
        conversation = ann.start()["id"]
        messages = write(ann, conversation, 8 - pending)
        served.flush(ann)
        if copies != "cached":
            served.forget()
        messages += write(ann, conversation, pending, first=9 - pending)
        check_every_page(ann, conversation, messages, limits=(1, 3))
        assert [m["state"] for m in ann.history(conversation)] == ["committed"] * (8 - pending) + ["pending"] * pending
        assert served.pending(ann) == pending
        served.flush(ann)
        check_every_page(ann, conversation, messages, limits=(2,))
        assert {m["state"] for m in ann.history(conversation)} == {"committed"}

    def test_every_page_is_the_same_at_each_step_of_the_flush(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        messages = write(ann, conversation, 3)
        served.flush(ann)
        messages += write(ann, conversation, 4, first=4)
        with served.flushing(ann) as flusher:
            for step in ("wake", "lock", "fetch", "persist", "commit", "trim", None):
                assert flusher.at == step
                messages += write(ann, conversation, 1, first=len(messages) + 1)
                check_every_page(ann, conversation, messages, limits=(2,))
                flusher.step()
        served.flush(ann)
        check_every_page(ann, conversation, messages, limits=(2,))
        assert served.query("SELECT count(*) FROM message WHERE conversation_id = %s", conversation) == [(len(messages),)]

    def test_cold_history_is_read_from_postgres_alone(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        messages = write(ann, conversation, 9)
        for limit in (1, 4, 200):
            served.forget()
            assert not served.redis.exists(keys.conversation(keys.shard_of_user(ann.id, served.settings.shards), conversation))
            assert settled(ann.page(conversation, limit=limit)["items"]) == settled(messages)[-limit:]
            served.forget()
            page = ann.page(conversation, limit=limit, before=messages[5]["id"])
            assert settled(page["items"]) == settled(messages)[:5][-limit:]
            assert page["has_newer"]
            assert page["has_older"] == (limit < 5)
            served.forget()
            page = ann.page(conversation, limit=limit, after=messages[5]["id"])
            assert settled(page["items"]) == settled(messages)[6:][:limit]
            assert page["has_older"]
            assert page["has_newer"] == (limit < 3)

    def test_walk_is_whole_while_everything_moves(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        messages = write(ann, conversation, 12)
        page = ann.page(conversation, limit=3)
        walked = page["items"]
        for step in (served.flush_all, lambda: write(ann, conversation, 1, first=13), served.wipe):
            assert page["has_older"]
            step()
            page = ann.page(conversation, limit=3, before=walked[0]["id"])
            walked = page["items"] + walked
        assert not page["has_older"]
        assert settled(walked) == settled(messages)
        newer = ann.page(conversation, limit=200, after=walked[-1]["id"])
        assert [m["content"] for m in newer["items"]] == ["message 13"]

    def test_reader_who_follows_sees_each_message_once(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        seen = write(ann, conversation, 1)
        last = seen[-1]["id"]
        for number, step in enumerate([served.flush_all, served.forget, served.wipe, lambda: None, served.flush_all], start=2):
            step()
            assert ann.page(conversation, after=last)["items"] == []
            write(ann, conversation, 2, first=2 * number)
            page = ann.page(conversation, after=last)
            assert [m["content"] for m in page["items"]] == [f"message {2 * number}", f"message {2 * number + 1}"]
            assert page["has_older"]
            assert not page["has_newer"]
            last = page["items"][-1]["id"]

    def test_empty_conversation_has_an_empty_page(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        for step in (lambda: None, served.flush_all, served.forget):
            step()
            for query in ({}, {"before": 5}, {"after": 5}):
                assert ann.page(conversation, **query) == {"items": [], "has_older": False, "has_newer": False}

    def test_committed_copies_expire_and_pending_ones_never(self, served: House, ann: Person) -> None:
        conversation = ann.start(key="start")["id"]
        write(ann, conversation, 2)
        ann.say(conversation, "with a key", key="a")
        names = [
            name for name in served.redis.scan_iter(count=10_000) if str(ann.id) in name.decode() or str(conversation) in name.decode()
        ]
        mine = [name for name in names if b":mm:" not in name and b":cd:" not in name]  # these count what the user does, and hold nothing
        assert len(mine) == 5, "the conversation, its messages and retry keys, the user's changes and retry keys"
        assert {served.redis.ttl(name) for name in mine} == {-1}
        assert ann.page(conversation)["items"]
        assert {served.redis.ttl(name) for name in mine} == {-1}
        served.flush(ann)
        ttl = served.settings.cache_ttl_seconds
        left = [name for name in mine if served.redis.exists(name)]
        assert len(left) == 4
        assert all(ttl - 5 <= served.redis.ttl(name) <= ttl + 60 for name in left)
        ann.say(conversation, "again")
        assert {served.redis.ttl(name) for name in left if b":n:" not in name} == {-1}

    def test_cap_on_cached_messages_drops_only_committed_ones(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        messages = write(ann, conversation, 30)
        name = keys.messages(keys.shard_of_user(ann.id, served.settings.shards), conversation)
        assert served.redis.xlen(name) == 30
        served.flush(ann)
        assert served.redis.xlen(name) == KEPT
        messages += write(ann, conversation, 10, first=31)
        assert served.redis.xlen(name) == KEPT + 10
        assert settled(ann.history(conversation)) == settled(messages)


class TestQuery:
    @pytest.mark.parametrize(
        "query",
        [
            *({"limit": value} for value in (0, -1, 201, 10**30, "ten", "", "1.5", "1e2", "0x10")),
            *(
                {side: value}
                for side in ("before", "after")
                for value in (0, -1, 1 << 53, 10**30, "x", "", "\x00", "\ud800".encode("utf-8", "surrogatepass"))
            ),
            {"before": 5, "after": 5},
        ],
    )
    def test_bad_page_is_refused(self, ann: Person, query: dict[str, Any]) -> None:
        conversation = ann.start()["id"]
        told = problem(ann.http.get(f"/api/conversations/{conversation}/messages", params=query), 422)
        assert told["errors"][0]["loc"][0] == "query"
        assert problem(ann.http.get(f"/api/chat/{conversation}/history", params=query), 422)["errors"] == told["errors"]

    def test_default_page_is_the_latest_fifty(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        messages = write(ann, conversation, 53)
        page = ann.page(conversation)
        assert settled(page["items"]) == settled(messages[-50:])
        assert page["has_older"]
        assert not page["has_newer"]

    def test_page_of_two_hundred(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        messages = write(ann, conversation, 101)
        served.forget()
        messages += write(ann, conversation, 101, first=102)
        page = ann.page(conversation, limit=200)
        assert settled(page["items"]) == settled(messages[-200:])
        assert page["has_older"]
        assert settled(ann.history(conversation)) == settled(messages)

    def test_chat_history_is_the_same_page(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        messages = write(ann, conversation, 6)
        for query in ({}, {"limit": 2}, {"limit": 2, "before": messages[3]["id"]}, {"limit": 2, "after": messages[3]["id"]}):
            session = ok(ann.http.get(f"/api/chat/{conversation}/history", params=query))
            assert session == {"session_id": str(conversation), "conversation_id": conversation} | ann.page(conversation, **query)


class TestConversationList:
    @pytest.mark.parametrize("limit", [1, 2, 3, 7])
    def test_pages_are_the_whole_list_wherever_the_boundary_lies(self, served: House, ann: Person, limit: int) -> None:
        started = [ann.start(f"number {number}")["id"] for number in range(7)]
        served.forget()
        for index in (5, 0):  # activity moves these to the front, and one of them stays pending
            ann.say(started[index], "hello")
            if index == 5:
                served.flush(ann)
        order = [started[index] for index in (0, 5, 6, 4, 3, 2, 1)]
        pages = list(ann.walk(limit))
        assert [item["id"] for item in pages] == order
        assert pages == [ann.look(number) for number in order]
        served.flush(ann)
        assert list(ann.walk(limit)) == pages
        served.wipe()
        assert list(ann.walk(limit)) == pages

    def test_flush_between_two_pages_changes_nothing(self, served: House, ann: Person) -> None:
        started = [ann.start(f"number {number}")["id"] for number in range(6)]
        walked = []
        page = ann.conversations(limit=2)
        for step in (served.flush_all, served.forget, lambda: None):
            walked += [item["id"] for item in page["items"]]
            step()
            if page["next_cursor"]:
                page = ann.conversations(limit=2, cursor=page["next_cursor"])
        assert walked == started[::-1]

    def test_pending_changes_show_at_once(self, served: House, ann: Person) -> None:
        old, renamed, deleted = (ann.start(title)["id"] for title in ("old", "to be renamed", "to be deleted"))
        served.forget()
        ok(ann.http.patch(f"/api/conversations/{renamed}", json={"title": "renamed"}))
        assert ann.http.delete(f"/api/conversations/{deleted}").status_code == 204
        fresh = ann.start("fresh")["id"]
        shown = [(fresh, "fresh"), (renamed, "renamed"), (old, "old")]
        for step in (lambda: None, served.flush_all, served.forget):
            step()
            assert [(item["id"], item["title"]) for item in ann.conversations()["items"]] == shown

    def test_limits_and_default(self, served: House, ann: Person) -> None:
        started = [ann.start()["id"] for _ in range(22)]
        first = ann.conversations()
        assert [item["id"] for item in first["items"]] == started[:1:-1]
        assert first["next_cursor"]
        assert len(ann.conversations(limit=100)["items"]) == 22
        assert ann.conversations(limit=100)["next_cursor"] is None
        assert ann.conversations(limit=22)["next_cursor"] is None, "a page that ends with the last has no next one"

    @pytest.mark.parametrize("query", [{"limit": value} for value in (0, -1, 101, 10**30, "x", "")])
    def test_bad_limit_is_refused(self, ann: Person, query: dict[str, Any]) -> None:
        assert problem(ann.http.get("/api/conversations", params=query), 422)["errors"][0]["loc"] == ["query", "limit"]

    @pytest.mark.parametrize(
        "cursor", ["", "x", "MTIz", "é", "\x00", "a" * 101, "LTEuLTE", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5LjE", "MS45MDA3MTk5MjU0NzQwOTky"]
    )
    def test_bad_cursor_is_refused(self, ann: Person, cursor: str) -> None:
        assert problem(ann.http.get("/api/conversations", params={"cursor": cursor}), 422)["errors"][0]["loc"] == ["query", "cursor"]

    def test_somebody_elses_cursor_is_only_a_place(self, served: House, ann: Person) -> None:
        bob = served.person(ann.id + served.settings.shards * 1000)
        for person in (ann, bob):
            for _ in range(3):
                person.start("private to " + str(person.id))
        cursor = ann.conversations(limit=1)["next_cursor"]
        assert {item["user_id"] for item in bob.conversations(cursor=cursor)["items"]} <= {bob.id}
