"""Conversations and messages: what is kept, how exactly, how often, and what is refused before anything is acknowledged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.api.served import House, house
from tests.people import JSON, TIME, Person, keyed, ok, problem
from worker.embedded import EmbeddedPostgres, EmbeddedValkey

NASTY = {
    "emoji": "👋🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇳🇿",
    "the last of Unicode": "\U0010ffff \U0001fffe",
    "right to left": "\u202eשלום עולם\u202c مرحبا بالعالم",
    "combining": "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A é vs e\u0301 ﬀ",
    "byte order mark": "\ufeffat the beginning and \ufeff within",
    "line ends": "\r\none\rtwo\ntwo and a half\u2028three\u2029four\x85five\x0bsix\x0c\r\n",
    "white space around": " \t\n in the middle \u00a0\u2003\t ",
    "what COPY means": "\\N \\. \\\\ \\t \\n\t\\\t\\",
    "only what COPY means by null": "\\N",
    "only what COPY means by the end": "\\.",
    "quotes": "'; DROP TABLE message; -- \" $$ %s %(x)s {0} ${x}",
    "markup": "<script>alert(1)</script> &amp; ]]>",
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "not characters": "\ufffe\uffff\ufdd0 \ufffd",
    "invisible": "\u200b",
    "words of JSON": "null",
    "words of SQL": "NULL",
    "what arrays mean": '{"a","b\\"} \\" , "',
    "numbers": "1e400",
}
REFUSED: dict[str, Any] = {
    **{
        "nothing": "",
        "white space": " \t\r\n",
        "white space of Unicode": "\u2003\u00a0\u3000\x85\u2028",
        "NUL": "a\x00b",
        "only NUL": "\x00",
    },
    **{"high surrogate": "a\ud800", "low surrogate": "\udfffb", "swapped surrogates": "\ude00\ud83d", "too long": "x" * 100_001},
    **{
        "too long in emoji": "👋" * 100_001,
        "null": None,
        "number": 1,
        "fraction": 1.5,
        "truth": True,
        "list": ["text"],
        "object": {"text": "x"},
    },
}


TURN = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"}]


@pytest.fixture(scope="module")
def served(postgres: EmbeddedPostgres, migrated_template: str, valkey: EmbeddedValkey) -> Iterator[House]:
    with house(postgres, migrated_template, valkey) as found:
        yield found


@pytest.fixture
def ann(served: House) -> Person:
    return served.person()


@pytest.fixture
def bob(served: House, ann: Person) -> Person:
    """Somebody else in the same shard."""
    return served.person(ann.id + 1000 * served.settings.shards)


def send(person: Person, path: str, body: Any, method: str = "POST") -> httpx2.Response:
    """A body as JSON; half of a surrogate pair can only be sent in ASCII."""
    try:
        content = json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        content = json.dumps(body).encode()
    return person.http.request(method, path, content=content, headers=JSON)


def messages_of(conversation: int) -> str:
    return f"/api/conversations/{conversation}/messages"


class TestConversation:
    def test_new_one_is_as_the_contract_says(self, ann: Person) -> None:
        answer = ann.http.post("/api/conversations", json={})
        made = ok(answer, 201)
        assert set(made) == {"id", "user_id", "title", "created_at", "updated_at"}
        assert (made["user_id"], made["title"], made["updated_at"]) == (ann.id, None, made["created_at"])
        assert TIME.fullmatch(made["created_at"])
        assert type(made["id"]) is int
        assert 0 < made["id"] < 1 << 53
        assert ok(ann.http.get(answer.headers["location"])) == made == ann.look(made["id"])
        assert "idempotent-replayed" not in answer.headers

    def test_is_the_same_committed_and_cold(self, served: House, ann: Person) -> None:
        made = ann.start("Titled")
        for step in (served.flush_all, served.forget, served.wipe):
            step()
            assert ann.look(made["id"]) == made

    @pytest.mark.parametrize("title", [*NASTY.values(), "x", "x" * 200, "👋" * 200])
    def test_title_is_kept_exactly(self, served: House, ann: Person, title: str) -> None:
        made = ok(send(ann, "/api/conversations", {"title": title}), 201)
        assert made["title"] == title
        served.forget()
        assert ann.look(made["id"])["title"] == title == ann.conversations()["items"][0]["title"]

    @pytest.mark.parametrize("bad", [*(value for value in REFUSED.values() if value is not None), "x" * 201, "👋" * 201])
    def test_bad_title_is_refused(self, served: House, ann: Person, bad: Any) -> None:
        conversation = ann.start("kept")["id"]
        before = served.pending(ann)
        for method, path in (("POST", "/api/conversations"), ("PATCH", f"/api/conversations/{conversation}"), ("POST", "/api/chat/start")):
            problem(send(ann, path, {"title": bad}, method), 422)
        assert served.pending(ann) == before
        assert ann.look(conversation)["title"] == "kept"

    def test_title_can_be_left_out_or_null_but_not_taken_away(self, ann: Person) -> None:
        assert ok(send(ann, "/api/conversations", {"title": None}), 201)["title"] is None
        conversation = ann.start("kept")["id"]
        problem(send(ann, f"/api/conversations/{conversation}", {"title": None}, "PATCH"), 422)
        problem(send(ann, f"/api/conversations/{conversation}", {}, "PATCH"), 422)


class TestTitle:
    def test_comes_from_the_first_message_of_the_user(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        ann.say(conversation, "I am the assistant", "assistant")
        assert ann.look(conversation)["title"] is None
        ann.say(conversation, "  What  is\n\nthe time?  ")
        ann.say(conversation, "And the date?")
        assert ann.look(conversation)["title"] == "What is the time?"
        served.forget()
        assert ann.look(conversation)["title"] == "What is the time?"

    def test_comes_late_if_the_user_does(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        ann.say(conversation, "I am the assistant", "assistant")
        served.forget()
        ann.say(conversation, "First")
        served.forget()
        ann.say(conversation, "Second")
        served.forget()
        assert ann.look(conversation)["title"] == "First"

    @pytest.mark.parametrize("content", [*NASTY.values(), "word " * 50, "x" * 100_000, "👋" * 300])
    def test_can_be_made_of_any_message(self, served: House, ann: Person, content: str) -> None:
        conversation = ann.start()["id"]
        ok(send(ann, messages_of(conversation), {"role": "user", "content": content}), 201)
        title = ann.look(conversation)["title"]
        assert 1 <= len(title) <= 200
        assert not title.isspace()
        served.forget()
        assert ann.look(conversation)["title"] == title

    @pytest.mark.parametrize("flushed", [False, True])
    @pytest.mark.parametrize("named", ["at the start", "before the first message", "after it"])
    def test_that_a_person_set_is_never_overwritten(self, served: House, ann: Person, named: str, flushed: bool) -> None:
        step: Callable[[], None] = served.forget if flushed else lambda: None
        conversation = ann.start("Mine" if named == "at the start" else None)["id"]
        rename = lambda: ok(ann.http.patch(f"/api/conversations/{conversation}", json={"title": "Mine"}))  # noqa: E731
        step()
        if named == "before the first message":
            rename()
            step()
        ann.say(conversation, "A title, if there were none")
        step()
        if named == "after it":
            rename()
            step()
        ann.say(conversation, "Another")
        assert ann.look(conversation)["title"] == "Mine"
        served.forget()
        assert ann.look(conversation)["title"] == "Mine"

    def test_renaming_answers_the_conversation(self, served: House, ann: Person) -> None:
        made = ann.start()
        ann.say(made["id"], "Hello")
        before = ann.look(made["id"])
        renamed = ok(ann.http.patch(f"/api/conversations/{made['id']}", json={"title": "New"}))
        assert renamed == before | {"title": "New"} == ann.look(made["id"])
        served.forget()
        assert ann.look(made["id"]) == renamed


class TestActivity:
    def test_moves_with_each_message(self, served: House, ann: Person) -> None:
        made = ann.start()
        times = [made["updated_at"]]
        for number, step in enumerate((lambda: None, served.flush_all, served.forget, served.wipe)):
            message = ann.say(made["id"], f"message {number}", "assistant" if number % 2 else "user")
            step()
            now = ann.look(made["id"])
            assert now["updated_at"] == message["created_at"]
            assert now["created_at"] == made["created_at"]
            times.append(now["updated_at"])
        assert times == sorted(set(times))


class TestDelete:
    def test_leaves_nothing(self, served: House, ann: Person) -> None:
        conversation = ann.start("to go")["id"]
        ann.say(conversation, "to go too")
        answer = ann.http.delete(f"/api/conversations/{conversation}")
        assert (answer.status_code, answer.content) == (204, b"")
        assert ann.conversations()["items"] == []
        served.flush(ann)
        assert served.query("SELECT title FROM conversation WHERE id = %s", conversation) == [(None,)]
        assert served.query("SELECT count(*) FROM message WHERE conversation_id = %s", conversation) == [(0,)]
        problem(ann.http.delete(f"/api/conversations/{conversation}"), 404)

    @pytest.mark.parametrize("step", ["fetch", "persist", "commit", "trim"])
    def test_no_batch_in_flight_brings_it_back(self, served: House, ann: Person, step: str) -> None:
        conversation = ann.start("to go")["id"]
        served.flush(ann)
        ann.say(conversation, "pending")
        with served.flushing(ann) as flusher:
            flusher.until(step)
            assert ann.http.delete(f"/api/conversations/{conversation}").status_code == 204
            problem(ann.post(conversation, "late"), 404)
            flusher.finish()
        for step in (lambda: None, served.flush_all, served.forget, served.wipe):
            problem(ann.post(conversation, "late"), 404)
            problem(ann.http.get(messages_of(conversation)), 404)
            assert ann.conversations()["items"] == []
            step()
        assert served.query("SELECT count(*) FROM message WHERE conversation_id = %s", conversation) == [(0,)]

    @pytest.mark.parametrize("step", ["cached", "cold", "wiped"])
    def test_no_retry_brings_it_back(self, served: House, ann: Person, step: str) -> None:
        made = ann.start("to go", key="start")
        ann.say(made["id"], "hello", key="a")
        assert ann.http.delete(f"/api/conversations/{made['id']}").status_code == 204
        {"cached": lambda: None, "cold": served.forget, "wiped": served.wipe}[step]()
        problem(ann.post(made["id"], "hello", key="a"), 404)
        problem(ann.post(made["id"], "new", key="b"), 404)
        again = ann.http.post("/api/conversations", json={"title": "to go"}, headers=keyed("start"))
        assert ok(again, 201)["id"] == made["id"]
        assert again.headers["idempotent-replayed"] == "true"
        problem(ann.http.get(f"/api/conversations/{made['id']}"), 404)
        assert ann.conversations()["items"] == []

    def test_cold_one_can_be_deleted(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        served.wipe()
        assert ann.http.delete(f"/api/conversations/{conversation}").status_code == 204
        served.wipe()
        problem(ann.http.get(f"/api/conversations/{conversation}"), 404)


class TestMessage:
    def test_is_as_the_contract_says(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        answer = ann.post(conversation, "Hello")
        message = ok(answer, 201)
        assert set(message) == {"id", "conversation_id", "user_id", "role", "content", "created_at", "status", "state"}
        assert TIME.fullmatch(message["created_at"])
        assert type(message["id"]) is int
        assert message["id"] < 1 << 53
        told = {name: message[name] for name in ("conversation_id", "user_id", "role", "content", "status", "state")}
        assert told == {
            **{"conversation_id": conversation, "user_id": ann.id, "role": "user", "content": "Hello", "status": "complete"},
            "state": "pending",
        }
        assert ann.page(conversation)["items"] == [message]
        for step in (served.flush_all, served.forget, served.wipe):
            step()
            assert ann.page(conversation)["items"] == [message | {"state": "committed"}], "the only field that a flush changes"
        assert "x-durability" not in answer.headers
        assert "idempotent-replayed" not in answer.headers

    def test_ids_rise_in_the_order_of_acknowledgement(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        acknowledged = []
        for number in range(30):
            acknowledged.append(ann.say(conversation, f"message {number}")["id"])
            if number % 10 == 9:
                (served.flush_all, served.forget, served.wipe)[number // 10]()
        assert acknowledged == sorted(set(acknowledged))
        assert [message["id"] for message in ann.history(conversation)] == acknowledged
        times = [message["created_at"] for message in ann.history(conversation)]
        assert times == sorted(times)

    @pytest.mark.parametrize("content", [*NASTY.values(), "x", "x" * 100_000, "👋" * 100_000], ids=[*NASTY, "one", "many", "many emoji"])
    def test_text_comes_back_exactly(self, served: House, ann: Person, content: str) -> None:
        conversation = ann.start("t")["id"]
        assert ann.say(conversation, content)["content"] == content
        for step in (lambda: None, served.flush_all, served.forget):
            step()
            assert ann.contents(conversation) == [content]
        assert served.query("SELECT content FROM message WHERE conversation_id = %s", conversation) == [(content,)]
        assert served.query("SELECT count(*) FROM dead_letter") == [(0,)]

    @pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED)
    def test_what_cannot_be_inserted_is_refused(self, served: House, ann: Person, bad: Any) -> None:
        conversation = ann.start("t")["id"]
        before = served.pending(ann)
        answer = send(ann, messages_of(conversation), {"role": "user", "content": bad})
        assert problem(answer, 422)["errors"][0]["loc"] == ["body", "content"]
        assert problem(send(ann, f"/api/chat/{conversation}/message", {"message": bad}), 422)["errors"][0]["loc"] == ["body", "message"]
        assert served.pending(ann) == before
        assert ann.page(conversation)["items"] == []
        assert not isinstance(bad, str) or len(bad) < 3 or bad[:3] not in answer.text, "no answer repeats what was sent"

    @pytest.mark.parametrize("role", ["system", "User", "", "user ", None, 1, ["user"], "assistant\x00", "tool"])
    def test_role_is_one_of_two(self, ann: Person, role: Any) -> None:
        conversation = ann.start()["id"]
        answer = send(ann, messages_of(conversation), {"role": role, "content": "x"})
        assert problem(answer, 422)["errors"][0]["loc"] == ["body", "role"]

    @pytest.mark.parametrize("missing", ["role", "content"])
    def test_nothing_may_be_missing(self, ann: Person, missing: str) -> None:
        conversation = ann.start()["id"]
        body = {"role": "user", "content": "x"}
        body.pop(missing)
        assert problem(send(ann, messages_of(conversation), body), 422)["errors"][0]["loc"] == ["body", missing]

    @pytest.mark.parametrize("extra", ["id", "user_id", "conversation_id", "created_at", "status", "state", "seq", "\ud800", "\x00", ""])
    def test_unknown_fields_are_refused(self, ann: Person, extra: str) -> None:
        conversation = ann.start()["id"]
        problem(send(ann, messages_of(conversation), {"role": "user", "content": "x", extra: 1}), 422)
        assert ann.page(conversation)["items"] == []

    def test_no_more_errors_are_told_than_anybody_reads(self, ann: Person) -> None:
        conversation = ann.start()["id"]
        body = {f"unknown{number}": 1 for number in range(5000)}
        assert len(problem(send(ann, messages_of(conversation), body), 422)["errors"]) == 20

    def test_every_text_that_is_accepted_is_inserted(self, served: House, ann: Person) -> None:
        conversation = ann.start("t")["id"]
        accepted: list[str] = []

        @hypothesis_settings(max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.text(st.characters(exclude_categories=()), max_size=40))
        def write(text: str) -> None:
            answer = send(ann, messages_of(conversation), {"role": "user", "content": text})
            if answer.status_code == 201:
                accepted.append(text)
            else:
                problem(answer, 422)
                assert not text or text.isspace() or "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text)

        write()
        served.forget()
        assert ann.contents(conversation) == accepted
        assert len(accepted) > 20
        assert served.query("SELECT count(*) FROM dead_letter") == [(0,)]


class TestBatch:
    def test_is_answered_as_the_messages_are_shown(self, served: House, ann: Person) -> None:
        conversation = ann.start()["id"]
        answer = ann.http.post(messages_of(conversation) + "/batch", json={"messages": TURN})
        assert answer.headers["content-type"] == "application/json"
        assert set(ok(answer, 201)) == {"items"}
        items = answer.json()["items"]
        assert [{"role": item["role"], "content": item["content"]} for item in items] == TURN
        assert ann.page(conversation)["items"] == items
        assert ann.http.get(f"/api/conversations/{conversation}").json()["title"] == "Hello"
        for step in (served.flush_all, served.forget, served.wipe):
            step()
            assert ann.page(conversation)["items"] == [item | {"state": "committed"} for item in items]

    @pytest.mark.parametrize("step", ["pending", "committed", "cold", "wiped"])
    def test_retry_is_answered_as_the_first_time(self, served: House, ann: Person, step: str) -> None:
        conversation = ann.start("t")["id"]
        path = messages_of(conversation) + "/batch"
        first = ann.http.post(path, json={"messages": TURN}, headers=keyed("key-1"))
        {"pending": lambda: None, "committed": served.flush_all, "cold": served.forget, "wiped": served.wipe}[step]()
        again = ann.http.post(path, json={"messages": TURN}, headers=keyed("key-1"))
        assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
        for one, other in zip(first.json()["items"], again.json()["items"], strict=True):
            assert other == one | {"state": "pending" if step == "pending" else "committed"}
        for other in (TURN[:1], [*TURN, *TURN], TURN[::-1]):
            problem(ann.http.post(path, json={"messages": other}, headers=keyed("key-1")), 422)
        problem(ann.post(conversation, TURN[0]["content"], key="key-1"), 422)
        assert ann.contents(conversation) == ["Hello", "Good morning"]

    @pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED)
    def test_one_that_is_refused_takes_all_along(self, served: House, ann: Person, bad: Any) -> None:
        conversation = ann.start("t")["id"]
        before = served.pending(ann)
        answer = send(ann, messages_of(conversation) + "/batch", {"messages": [*TURN, {"role": "user", "content": bad}]})
        assert problem(answer, 422)["errors"][0]["loc"] == ["body", "messages", 2, "content"]
        assert served.pending(ann) == before
        assert not isinstance(bad, str) or len(bad) < 3 or bad[:3] not in answer.text, "no answer repeats what was sent"

    @pytest.mark.parametrize("messages", [[], None, {}, "x", [None], [[]], TURN * 51, [TURN[0] | {"id": 1}], [{"role": "user"}]])
    def test_anything_else_is_refused(self, served: House, ann: Person, messages: Any) -> None:
        conversation = ann.start("t")["id"]
        before = served.pending(ann)
        assert problem(send(ann, messages_of(conversation) + "/batch", {"messages": messages}), 422)["errors"][0]["loc"][:2] == [
            "body",
            "messages",
        ]
        assert served.pending(ann) == before

    def test_as_many_as_there_may_be(self, served: House, ann: Person) -> None:
        conversation = ann.start("t")["id"]
        sent = [{"role": "user", "content": str(number)} for number in range(100)]
        ok(ann.http.post(messages_of(conversation) + "/batch/", json={"messages": sent}), 201)
        served.forget()
        assert ann.contents(conversation) == [str(number) for number in range(100)]


class TestRetry:
    @pytest.mark.parametrize("step", ["pending", "committed", "cold", "wiped"])
    def test_of_a_message_is_answered_as_the_first_time(self, served: House, ann: Person, step: str) -> None:
        conversation = ann.start("t")["id"]
        first = ann.post(conversation, "Hello", key="key-1")
        {"pending": lambda: None, "committed": served.flush_all, "cold": served.forget, "wiped": served.wipe}[step]()
        again = ann.post(conversation, "Hello", key="key-1")
        assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
        assert again.json() | {"state": ""} == first.json() | {"state": ""}
        assert again.json()["state"] == ("pending" if step == "pending" else "committed")
        assert ann.contents(conversation) == ["Hello"]
        served.flush(ann)
        assert served.query("SELECT count(*) FROM message WHERE conversation_id = %s", conversation) == [(1,)]

    @pytest.mark.parametrize("step", ["pending", "committed", "cold", "wiped"])
    def test_of_a_new_conversation_is_answered_as_the_first_time(self, served: House, ann: Person, step: str) -> None:
        post = lambda: ann.http.post("/api/conversations", json={"title": "Once"}, headers=keyed("key-1"))  # noqa: E731
        first = post()
        ann.say(first.json()["id"], "something since")
        {"pending": lambda: None, "committed": served.flush_all, "cold": served.forget, "wiped": served.wipe}[step]()
        again = post()
        assert (again.status_code, again.headers["idempotent-replayed"], again.json()) == (201, "true", first.json())
        assert again.headers["location"] == first.headers["location"]
        assert len(ann.conversations()["items"]) == 1
        served.flush(ann)
        assert served.query("SELECT count(*) FROM conversation WHERE user_id = %s", ann.id) == [(1,)]

    @pytest.mark.parametrize("step", ["pending", "cold", "wiped"])
    def test_with_another_body_is_refused(self, served: House, ann: Person, step: str) -> None:
        made = ann.start("Once", key="start")
        ann.say(made["id"], "Hello", key="key-1")
        {"pending": lambda: None, "cold": served.forget, "wiped": served.wipe}[step]()
        before = served.pending(ann)
        for content, role in (("Hello!", "user"), ("hello", "user"), ("Hello", "assistant"), ("Hello ", "user")):
            assert "Idempotency-Key" in problem(ann.post(made["id"], content, role, key="key-1"), 422)["detail"]
        for body in ({"title": "Twice"}, {}, {"title": "once"}):
            problem(ann.http.post("/api/conversations", json=body, headers=keyed("start")), 422)
        assert served.pending(ann) == before
        assert ann.contents(made["id"]) == ["Hello"]
        assert len(ann.conversations()["items"]) == 1

    @pytest.mark.parametrize("step", ["pending", "wiped"])
    def test_keys_of_different_users_and_conversations_never_meet(self, served: House, ann: Person, bob: Person, step: str) -> None:
        conversations = [
            (person, person.start(title, key=f"key of {title}".replace(" ", "-"))["id"])
            for person, title in ((ann, "1"), (ann, "2"), (bob, "1"))
        ]
        said = []
        for index, (person, conversation) in enumerate(conversations):
            {"pending": lambda: None, "wiped": served.wipe}[step]()
            answer = person.post(conversation, f"text {index}", key="the-same")
            assert answer.status_code == 201
            assert "idempotent-replayed" not in answer.headers
            said.append(answer.json()["id"])
        assert len(set(said)) == 3
        for index, (person, conversation) in enumerate(conversations):
            assert person.contents(conversation) == [f"text {index}"]
        served.wipe()
        for index, (person, conversation) in enumerate(conversations):
            again = person.post(conversation, f"text {index}", key="the-same")
            assert (again.json()["id"], again.headers["idempotent-replayed"]) == (said[index], "true")

    def test_key_of_a_message_is_none_of_a_conversations(self, ann: Person) -> None:
        conversation = ann.start("t", key="k")["id"]
        assert "idempotent-replayed" not in ann.post(conversation, "t", key="k").headers
        assert ann.http.post("/api/conversations", json={"title": "t"}, headers=keyed("k")).headers["idempotent-replayed"] == "true"

    def test_at_the_same_time_is_stored_once(self, served: House, ann: Person) -> None:
        served.wipe()
        with ThreadPoolExecutor(12) as threads:
            started = list(threads.map(lambda _: ann.http.post("/api/conversations", json={}, headers=keyed("s")), range(12)))
            assert len({answer.json()["id"] for answer in started}) == 1
            conversation = started[0].json()["id"]
            served.wipe()
            sent = list(threads.map(lambda _: ann.post(conversation, "Hello", key="k"), range(12)))
        for answers in (started, sent):
            assert {answer.status_code for answer in answers} == {201}
            assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
        assert len({answer.json()["id"] for answer in sent}) == 1 == len(ann.history(conversation)) == len(ann.conversations()["items"])

    def test_without_a_key_is_another_message(self, ann: Person) -> None:
        conversation = ann.start()["id"]
        assert ann.say(conversation, "Hello")["id"] < ann.say(conversation, "Hello")["id"]
        assert ann.contents(conversation) == ["Hello", "Hello"]

    @pytest.mark.parametrize("key", ["!", "~", "x" * 200, "r:1", "k:1", "*", "Aé".encode().hex(), "\\N", "a,b;c=d", "'--"])
    def test_any_visible_ascii_is_a_key(self, served: House, ann: Person, key: str) -> None:
        conversation = ann.start("t", key=key)["id"]
        first = ann.say(conversation, "Hello", key=key)["id"]
        served.wipe()
        assert ann.say(conversation, "Hello", key=key)["id"] == first
        assert ann.start("t", key=key)["id"] == conversation

    @pytest.mark.parametrize("key", ["", "a b", "x" * 201, "é", "a\tb"])
    def test_anything_else_is_not(self, served: House, ann: Person, key: str) -> None:
        conversation = ann.start("t")["id"]
        before = served.pending(ann)
        paths = {
            "/api/conversations": {},
            messages_of(conversation): {"role": "user", "content": "x"},
            messages_of(conversation) + "/batch": {"messages": TURN},
            "/api/chat/start": {},
            f"/api/chat/{conversation}/message": {"message": "x"},
        }
        for path, body in paths.items():
            answer = ann.http.post(path, json=body, headers={"Idempotency-Key": key.encode()})
            assert problem(answer, 422)["errors"][0]["loc"] == ["header", "Idempotency-Key"]
        assert served.pending(ann) == before

    def test_of_a_message_that_has_left_the_cache(self, served: House, ann: Person) -> None:
        conversation = ann.start("t")["id"]
        first = ann.say(conversation, "Hello", key="first")
        for number in range(served.settings.cache_messages_max + 1):
            ann.say(conversation, f"filler {number}", key=f"filler-{number}")
        served.flush(ann)
        answer = ann.post(conversation, "Hello", key="first")
        assert (answer.json(), answer.headers["idempotent-replayed"]) == (first | {"state": "committed"}, "true")
