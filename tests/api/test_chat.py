"""Chat: a session is a conversation, a turn is a message with its reply, and no connection owns the reply."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from api.replies import Turn
from tests.api.served import Gate, House, house
from tests.people import Person, browser, events, keyed, ok, problem, until
from worker.embedded import EmbeddedPostgres, EmbeddedValkey
from worker.errors import ReplyFailed

STEPS = ["pending", "committed", "cold", "wiped"]


@pytest.fixture(scope="module")
def house_of_tests(postgres: EmbeddedPostgres, migrated_template: str, valkey: EmbeddedValkey) -> Iterator[House]:
    with house(postgres, migrated_template, valkey) as found:
        yield found


@pytest.fixture
def served(house_of_tests: House) -> Iterator[House]:
    yield house_of_tests
    house_of_tests.model.reset()


@pytest.fixture
def ann(served: House) -> Person:
    return served.person()


@pytest.fixture
def session(ann: Person) -> int:
    """A session of Ann's."""
    return int(ok(ann.http.post("/api/chat/start", json={}), 201)["conversation_id"])


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def gate(served: House) -> Iterator[Gate]:
    """A reply that says "Once " and then waits for the test."""
    made = Gate("Once ", after=("upon ", "a time."))
    served.model.play = made.play
    yield made
    made.opened.set()


def step_of(served: House, name: str) -> Callable[[], None]:
    return {"pending": lambda: None, "committed": served.flush_all, "cold": served.forget, "wiped": served.wipe}[name]


def saying(*pieces: str, then: Exception | None = None) -> Callable[[Sequence[Turn]], AsyncGenerator[str, None]]:
    """A model that says this, and then fails if it is to."""

    async def play(turns: Sequence[Turn]) -> AsyncGenerator[str, None]:
        for piece in pieces:
            yield piece
        if then is not None:
            raise then

    return play


def said(person: Person, session: int) -> list[tuple[str, str, str]]:
    return [(message["role"], message["content"], message["status"]) for message in person.history(session)]


class TestStart:
    def test_session_is_a_new_conversation(self, ann: Person) -> None:
        made = ok(ann.http.post("/api/chat/start", json={"title": "Mine"}), 201)
        assert made == {"session_id": str(made["conversation_id"]), "conversation_id": made["conversation_id"]}
        assert ann.look(made["conversation_id"])["title"] == "Mine"
        assert ann.look(ok(ann.http.post("/api/chat/start", json={}), 201)["conversation_id"])["title"] is None

    @pytest.mark.parametrize("step", STEPS)
    def test_goes_on_with_a_conversation(self, served: House, ann: Person, step: str) -> None:
        conversation = ann.start("Mine")["id"]
        ann.say(conversation, "before")
        step_of(served, step)()
        made = ok(ann.http.post("/api/chat/start", json={"conversation_id": conversation}), 201)
        assert made == {"session_id": str(conversation), "conversation_id": conversation}
        assert len(ann.conversations()["items"]) == 1
        ok(ann.chat(made["session_id"], "after"))
        assert ann.contents(conversation)[:2] == ["before", "after"]

    @pytest.mark.parametrize(
        "body",
        [
            {"title": "x", "conversation_id": 1},
            *({"conversation_id": bad} for bad in ("1", 0, -1, 1.5, True, 1 << 53, 10**40, [])),
            {"session_id": "1"},
            [],
            "x",
            None,
        ],
    )
    def test_anything_else_is_refused(self, ann: Person, body: Any) -> None:
        problem(ann.http.post("/api/chat/start", json=body), 422)

    @pytest.mark.parametrize("step", STEPS)
    def test_retry_is_the_same_session(self, served: House, ann: Person, step: str) -> None:
        first = ok(ann.http.post("/api/chat/start", json={"title": "x"}, headers=keyed("k")), 201)
        step_of(served, step)()
        again = ann.http.post("/api/chat/start", json={"title": "x"}, headers=keyed("k"))
        assert (again.status_code, again.json(), again.headers["idempotent-replayed"]) == (201, first, "true")
        problem(ann.http.post("/api/chat/start", json={"title": "y"}, headers=keyed("k")), 422)


class TestTurn:
    def test_is_as_the_contract_says(self, served: House, ann: Person, session: int) -> None:
        served.model.play = saying("Good ", "day.")
        turn = ok(ann.chat(session, "Hello"))
        assert set(turn) == {"session_id", "conversation_id", "reply", "user_message", "assistant_message"}
        assert (turn["session_id"], turn["conversation_id"], turn["reply"]) == (str(session), session, "Good day.")
        assert ann.history(session) == [turn["user_message"], turn["assistant_message"]]
        assert said(ann, session) == [("user", "Hello", "complete"), ("assistant", "Good day.", "complete")]
        assert turn["user_message"]["id"] < turn["assistant_message"]["id"] < 1 << 53
        assert ann.look(session)["title"] == "Hello"
        served.forget()
        assert said(ann, session) == [("user", "Hello", "complete"), ("assistant", "Good day.", "complete")]

    def test_offline_responder_answers(self, ann: Person, session: int) -> None:
        first = ok(ann.chat(session, "My cat is ill."))["reply"]
        assert first
        assert ok(ann.chat(session, "I feel sad."))["reply"]

    def test_users_message_is_stored_before_the_reply_begins(
        self, ann: Person, session: int, gate: Gate, threads: ThreadPoolExecutor
    ) -> None:
        running = threads.submit(ann.chat, session, "Hello")
        assert gate.reached.wait(5)
        assert said(ann, session) == [("user", "Hello", "complete")]
        gate.opened.set()
        assert ok(running.result(10))["reply"] == "Once upon a time."

    @pytest.mark.parametrize("step", STEPS)
    def test_model_is_given_the_conversation(self, served: House, ann: Person, session: int, step: str) -> None:
        given: list[Sequence[Turn]] = []

        async def play(turns: Sequence[Turn]) -> AsyncGenerator[str, None]:
            given.append(turns)
            yield f"reply {len(given)}"

        served.model.play = play
        ok(ann.chat(session, "one"))
        ann.say(session, "aside", "assistant")
        step_of(served, step)()
        ok(ann.chat(session, "two"))
        assert [(turn.role, turn.content) for turn in given[-1]] == [
            ("user", "one"),
            ("assistant", "reply 1"),
            ("assistant", "aside"),
            ("user", "two"),
        ]

    def test_model_is_given_the_latest_messages_only(self, served: House, ann: Person, session: int) -> None:
        given: list[Sequence[Turn]] = []

        async def play(turns: Sequence[Turn]) -> AsyncGenerator[str, None]:
            given.append(turns)
            yield "ok"

        for number in range(60):
            ann.say(session, f"message {number}")
        served.model.play = play
        ok(ann.chat(session, "the question"))
        assert [turn.content for turn in given[0]] == [*(f"message {number}" for number in range(11, 60)), "the question"]

    @pytest.mark.parametrize(
        "body", [{}, {"message": "x", "role": "user"}, {"content": "x"}, {"message": "x", "stream": True}, [], "x", None]
    )
    def test_bad_body_is_refused(self, ann: Person, session: int, body: Any) -> None:
        problem(ann.http.post(f"/api/chat/{session}/message", json=body), 422)
        assert ann.history(session) == []

    def test_one_at_a_time(self, ann: Person, session: int, gate: Gate, threads: ThreadPoolExecutor) -> None:
        running = threads.submit(ann.chat, session, "first")
        assert gate.reached.wait(5)
        for attempt in (ann.chat, ann.stream):
            problem(attempt(session, "second"), 409)
        assert [text for _, text, _ in said(ann, session)] == ["first"]
        ann.say(session, "an aside is not a turn")
        gate.opened.set()
        ok(running.result(10))
        ok(ann.chat(session, "third"))
        assert [text for role, text, _ in said(ann, session) if role == "user"] == ["first", "an aside is not a turn", "third"]

    def test_at_once_one_is_chosen(self, ann: Person, session: int, gate: Gate, threads: ThreadPoolExecutor) -> None:
        running = [threads.submit(ann.chat, session, f"turn {number}") for number in range(4)]
        refused = until(
            lambda: [future for future in running if future.done()] if sum(map(Future.done, running)) == 3 else None, "three are refused"
        )
        for future in refused:
            problem(future.result(), 409)
        gate.opened.set()
        until(lambda: all(map(Future.done, running)), "the turn ends")
        assert sorted(future.result().status_code for future in running) == [200, 409, 409, 409]
        assert [role for role, _, _ in said(ann, session)] == ["user", "assistant"]

    def test_other_conversations_go_on(self, served: House, ann: Person, session: int, gate: Gate, threads: ThreadPoolExecutor) -> None:
        running = threads.submit(ann.chat, session, "first")
        assert gate.reached.wait(5)
        served.model.reset()
        ok(ann.chat(ann.start()["id"], "elsewhere"))
        gate.opened.set()
        ok(running.result(10))


class TestStream:
    def test_is_the_same_turn_in_pieces(self, served: House, ann: Person, session: int) -> None:
        served.model.play = saying("Good ", "day\nto ", "you, ", "\r\n👋")
        answer = ann.stream(session, "Hello")
        assert answer.status_code == 200
        found = events(answer)
        names = [name for name, _ in found]
        assert names[0] == "user_message"
        assert names[-1] == "assistant_message"
        assert set(names[1:-1]) == {"delta"}
        assert all(set(data) == {"text"} for name, data in found if name == "delta")
        assert "".join(data["text"] for name, data in found if name == "delta") == "Good day\nto you, \r\n👋" == found[-1][1]["content"]
        assert ann.history(session) == [found[0][1], found[-1][1]]

    def test_comes_as_it_is_written(self, ann: Person, session: int, gate: Gate) -> None:
        seen = ""
        with ann.http.stream(
            "POST", f"/api/chat/{session}/message", json={"message": "Hello"}, headers={"Accept": "text/event-stream"}
        ) as answer:
            for piece in answer.iter_text():
                seen += piece
                if '"Once "' in seen and not gate.opened.is_set():
                    assert "event: user_message" in seen
                    assert "assistant_message" not in seen
                    gate.opened.set()
        assert "Once upon a time." in seen

    def test_ids_are_all_different_and_rise(self, served: House, ann: Person, session: int) -> None:
        served.model.play = saying(*(f"{number} " for number in range(50)))
        ids = []
        for number in range(2):
            answer = ann.stream(session, f"Hello {number}")
            ids += [line.removeprefix("id: ") for line in answer.text.splitlines() if line.startswith("id: ")]
        assert len(ids) == len(set(ids)) >= 6
        assert ids == sorted(ids, key=lambda one: tuple(map(int, one.split("-"))))

    def test_refusals_are_no_streams(self, served: House, ann: Person, session: int) -> None:
        problem(ann.stream(session + 64, "x"), 404)
        problem(ann.stream(session, ""), 422)
        problem(served.http.post(f"/api/chat/{session}/message", json={"message": "x"}, headers={"Accept": "text/event-stream"}), 401)


class TestReplyOutlivesItsClient:
    def test_that_follows_the_stream(self, served: House, ann: Person, session: int, gate: Gate) -> None:
        with (
            browser(served.url) as http,
            http.stream(
                "POST",
                f"/api/chat/{session}/message",
                json={"message": "Hello"},
                headers={"Accept": "text/event-stream", "Authorization": f"Bearer {ann.token}"},
            ) as answer,
        ):
            next(answer.iter_raw())
            assert gate.reached.wait(5)
        gate.opened.set()
        until(lambda: said(ann, session)[1:] == [("assistant", "Once upon a time.", "complete")], "the reply is stored")
        ok(ann.chat(session, "more"))

    def test_that_waits_for_the_whole(self, served: House, ann: Person, session: int, gate: Gate) -> None:
        with browser(served.url) as http, pytest.raises(httpx2.ReadTimeout):
            http.post(
                f"/api/chat/{session}/message", json={"message": "Hello"}, headers={"Authorization": f"Bearer {ann.token}"}, timeout=0.3
            )
        assert gate.reached.wait(5)
        gate.opened.set()
        until(lambda: said(ann, session)[1:] == [("assistant", "Once upon a time.", "complete")], "the reply is stored")


class TestFailure:
    @pytest.mark.parametrize("step", STEPS)
    def test_keeps_the_users_message_and_tries_again_by_key(self, served: House, ann: Person, session: int, step: str) -> None:
        served.model.play = saying(then=ReplyFailed())
        told = problem(ann.chat(session, "Hello", key="k"), 502)
        assert "Idempotency-Key" in told["detail"]
        assert said(ann, session) == [("user", "Hello", "complete")]
        step_of(served, step)()
        problem(ann.chat(session, "Hello", key="k"), 502)
        step_of(served, step)()
        served.model.play = saying("There you are.")
        turn = ok(ann.chat(session, "Hello", key="k"))
        assert said(ann, session) == [("user", "Hello", "complete"), ("assistant", "There you are.", "complete")]
        assert ann.history(session)[0]["id"] == turn["user_message"]["id"]
        step_of(served, step)()
        again = ann.chat(session, "Hello", key="k")
        assert again.headers["idempotent-replayed"] == "true"
        assert again.json()["assistant_message"]["id"] == turn["assistant_message"]["id"]

    def test_of_a_stream_is_an_event(self, served: House, ann: Person, session: int) -> None:
        served.model.play = saying(then=ReplyFailed())
        found = events(ann.stream(session, "Hello", key="k"))
        assert [name for name, _ in found] == ["user_message", "error"]
        assert set(found[1][1]) == {"type", "title", "status", "detail"}
        assert found[1][1]["status"] == 502
        served.model.play = saying("There you are.")
        found = events(ann.stream(session, "Hello", key="k"))
        assert [name for name, _ in found] == ["user_message", "delta", "assistant_message"]
        assert [role for role, _, _ in said(ann, session)] == ["user", "assistant"]

    def test_without_a_key_is_another_message(self, served: House, ann: Person, session: int) -> None:
        served.model.play = saying(then=ReplyFailed())
        problem(ann.chat(session, "Hello"), 502)
        served.model.reset()
        ok(ann.chat(session, "Hello"))
        assert [role for role, _, _ in said(ann, session)] == ["user", "user", "assistant"]

    @pytest.mark.parametrize("pieces", [(), ("",), ("  \n",)])
    def test_reply_without_text_is_a_failure(self, served: House, ann: Person, session: int, pieces: tuple[str, ...]) -> None:
        served.model.play = saying(*pieces)
        problem(ann.chat(session, "Hello"), 502)
        assert said(ann, session) == [("user", "Hello", "complete")]

    def test_half_way_keeps_what_was_said_as_incomplete(self, served: House, ann: Person, session: int) -> None:
        served.model.play = saying("Half a ", then=ReplyFailed())
        ann.chat(session, "Hello")
        assert said(ann, session) == [("user", "Hello", "complete"), ("assistant", "Half a ", "incomplete")]
        served.forget()
        assert said(ann, session)[1] == ("assistant", "Half a ", "incomplete")

    @pytest.mark.parametrize("pieces", [(), ("Half a ",)])
    def test_that_nobody_foresaw_is_one_like_any_other(self, served: House, ann: Person, session: int, pieces: tuple[str, ...]) -> None:
        served.model.play = saying(*pieces, then=RuntimeError("with the secret of the model"))
        answer = ann.chat(session, "Hello")
        assert "secret" not in answer.text
        assert pieces or problem(answer, 502)
        assert said(ann, session)[1:] == [("assistant", text, "incomplete") for text in pieces]
        served.model.reset()
        ok(ann.chat(session, "again"))

    def test_conversation_that_is_deleted_meanwhile_stays_deleted(
        self, served: House, ann: Person, session: int, gate: Gate, threads: ThreadPoolExecutor
    ) -> None:
        running = threads.submit(ann.chat, session, "Hello")
        assert gate.reached.wait(5)
        assert ann.http.delete(f"/api/conversations/{session}").status_code == 204
        problem(ann.chat(session, "another"), 404)
        gate.opened.set()
        problem(running.result(10), 404)
        for step in STEPS:
            step_of(served, step)()
            problem(ann.http.get(f"/api/chat/{session}/history"), 404)
        assert served.query("SELECT count(*) FROM message WHERE conversation_id = %s", session) == [(0,)]


class TestRetry:
    @pytest.mark.parametrize("step", STEPS)
    def test_of_a_turn_is_the_first_answer(self, served: House, ann: Person, session: int, step: str) -> None:
        first = ok(ann.chat(session, "Hello", key="k"))
        ok(ann.chat(session, "something since"))
        step_of(served, step)()
        served.model.play = saying("This is asked for in vain.")
        again = ann.chat(session, "Hello", key="k")
        assert again.headers["idempotent-replayed"] == "true"
        state = "pending" if step == "pending" else "committed"
        assert ok(again) == first | {name: first[name] | {"state": state} for name in ("user_message", "assistant_message")}
        streamed = ann.stream(session, "Hello", key="k")
        assert streamed.headers["idempotent-replayed"] == "true"
        assert events(streamed) == [
            ("user_message", again.json()["user_message"]),
            ("assistant_message", again.json()["assistant_message"]),
        ]
        assert len(ann.history(session)) == 4

    @pytest.mark.parametrize("step", ["pending", "wiped"])
    def test_with_another_message_is_refused(self, served: House, ann: Person, session: int, step: str) -> None:
        ok(ann.chat(session, "Hello", key="k"))
        step_of(served, step)()
        problem(ann.chat(session, "Hello!", key="k"), 422)
        problem(ann.stream(session, "Hello!", key="k"), 422)
        assert len(ann.history(session)) == 2

    def test_while_it_runs_stores_nothing(self, ann: Person, session: int, gate: Gate, threads: ThreadPoolExecutor) -> None:
        running = threads.submit(ann.chat, session, "Hello", key="k")
        assert gate.reached.wait(5)
        problem(ann.chat(session, "Hello", key="k"), 409)
        gate.opened.set()
        turn = ok(running.result(10))
        assert ok(ann.chat(session, "Hello", key="k"))["assistant_message"]["id"] == turn["assistant_message"]["id"]
        assert len(ann.history(session)) == 2

    def test_keys_of_sessions_and_users_never_meet(self, served: House, ann: Person, session: int) -> None:
        bob = served.person(ann.id + 1000 * served.settings.shards)
        first = ok(ann.chat(session, "Hello", key="k"))
        for person, other in ((ann, ann.start()["id"]), (bob, bob.start()["id"])):
            answer = person.chat(other, "Hello", key="k")
            assert "idempotent-replayed" not in answer.headers
            assert ok(answer)["user_message"]["id"] != first["user_message"]["id"]
