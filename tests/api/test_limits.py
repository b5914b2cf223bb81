"""Everything has a limit, and says so. The limits are made small here, and reached."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import httpx2
import pytest
import uvicorn
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api.app import create_app
from tests.api.conftest import sign_up
from tests.api.test_errors import assert_problem
from worker.settings import Settings
from worker.text import check_text, insertable, is_unicode

JSON = {"Content-Type": "application/json"}
ANY_TEXT = st.text(st.characters(), max_size=50)  # lone surrogates and NUL included
UNUSUAL = (
    *(
        " leading and trailing \n",
        "\u200b\ufeff\u2060x",
        "e\u0301 é",
        "\r\n\tx\x0b\x0c\x1b\x7f",
        "\uffff\ufffe\ufdd0",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "\U0010ffff",
    ),
    *(
        "\u202eright to left\u202c",
        "ﬁ Å K ſ",
        '<script>alert("x")</script>',
        "\\u0000 \\ud800 is only text",
        "'; DROP TABLE message; --",
        "\\N\t\\.",
        "null",
    ),
)


class TestBodySize:
    @pytest.fixture
    def small(self, settings: Settings) -> Iterator[TestClient]:
        with TestClient(create_app(settings.model_copy(update={"body_bytes_max": 4096})), raise_server_exceptions=False) as client:
            yield client

    def _body(self, size: int) -> bytes:
        return json.dumps({"title": "x"}).ljust(size).encode()

    def test_up_to_the_limit_is_read(self, small: TestClient) -> None:
        bearer = sign_up(small, "ann@example.org")
        assert small.post("/api/conversations/", content=self._body(4096), headers=bearer | JSON).status_code == 201
        assert small.post("/api/conversations/", content=iter([self._body(4096)]), headers=bearer | JSON).status_code == 201

    def test_beyond_it_is_413_whether_the_size_is_said_or_not(self, small: TestClient) -> None:
        bearer = sign_up(small, "ann@example.org")
        for headers in (bearer | JSON, JSON, {}):
            said = small.post("/api/conversations/", content=self._body(4097), headers=headers)
            not_said = small.post("/api/conversations/", content=iter([self._body(4000), b" " * 97]), headers=headers)
            for answer in (said, not_said):
                assert_problem(answer, 413)
                assert "4096" in answer.json()["detail"]
        assert said.content == not_said.content

    def test_forms_are_bodies_too(self, small: TestClient) -> None:
        assert_problem(small.post("/api/auth/token", data={"username": "x" * 5000, "password": "x"}), 413)
        parts = iter([b"username=", b"x" * 5000])
        assert_problem(small.post("/api/auth/token", content=parts, headers={"Content-Type": "application/x-www-form-urlencoded"}), 413)

    def test_is_refused_before_it_is_read(self, small: TestClient) -> None:
        read = 0

        def parts() -> Iterator[bytes]:
            nonlocal read
            for _ in range(1000):
                read += 1
                yield b" " * 1000

        assert_problem(small.post("/livez", content=parts(), headers={"Content-Length": "1000000"}), 413)

    def test_sender_of_a_large_body_sees_the_answer(self, settings: Settings) -> None:
        server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_config=None))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
                for body in (b"x" * 20_000_000, iter([b"x" * 100_000] * 200)):
                    assert_problem(client.post("/api/conversations/", content=body, headers=JSON), 413)
                    assert client.get("/livez").status_code == 200
        finally:
            server.should_exit = True
            thread.join()

    def test_nonsense_as_a_size_is_no_way_round(self, small: TestClient) -> None:
        for size in ("1" * 5000, "9" * 18):
            assert_problem(small.post("/api/conversations/", content=b"{}", headers={"Content-Length": size}), 413)

    def test_default_is_one_mebibyte(self, settings: Settings) -> None:
        assert settings.body_bytes_max == 1 << 20


class TestText:
    def test_content_may_be_as_long_as_the_setting_says(self, settings: Settings) -> None:
        with TestClient(create_app(settings.model_copy(update={"message_chars_max": 5}))) as client:
            bearer = sign_up(client, "ann@example.org")
            conversation = client.post("/api/conversations/", json={}, headers=bearer).json()["id"]
            for text, status in (("12345", 201), ("123456", 422), ("🔑" * 5, 201), ("🔑" * 6, 422), ("e\u0301" * 3, 422)):
                body = {"role": "user", "content": text}
                assert client.post(f"/api/conversations/{conversation}/messages", json=body, headers=bearer).status_code == status
                chat = client.post(f"/api/chat/{conversation}/message", json={"message": text}, headers=bearer).status_code
                assert chat == (200 if status == 201 else 422)

    def test_default_is_a_hundred_thousand_characters(self, client: TestClient, bearer: dict[str, str], conversation: int) -> None:
        for length, status in ((100_000, 201), (100_001, 422)):
            body = {"role": "user", "content": "ä" * length}
            assert client.post(f"/api/conversations/{conversation}/messages", json=body, headers=bearer).status_code == status

    def test_title_has_one_to_two_hundred(self, client: TestClient, bearer: dict[str, str], conversation: int) -> None:
        for title, status in (("x", 200), ("🔑" * 200, 200), ("x" * 201, 422), ("", 422), (" \u2003\n", 422), ("a\x00", 422), (None, 422)):
            answer = client.patch(f"/api/conversations/{conversation}", json={"title": title}, headers=bearer)
            assert (title, answer.status_code) == (title, status)
            if title is not None:
                created = client.post("/api/conversations/", json={"title": title}, headers=bearer)
                assert created.status_code == (201 if status == 200 else 422)
        assert client.post("/api/conversations/", json={"title": None}, headers=bearer).status_code == 201

    def test_start_takes_a_title_or_a_conversation(self, client: TestClient, bearer: dict[str, str], conversation: int) -> None:
        for body, status in (
            ({}, 201),
            ({"title": "x"}, 201),
            ({"conversation_id": conversation}, 201),
            ({"conversation_id": str(conversation)}, 422),
        ):
            assert client.post("/api/chat/start", json=body, headers=bearer).status_code == status
        assert_problem(client.post("/api/chat/start", json={"title": "x", "conversation_id": conversation}, headers=bearer), 422)

    def test_any_unicode_comes_back_exactly_as_it_was_sent(self, client: TestClient, bearer: dict[str, str], conversation: int) -> None:
        path = f"/api/conversations/{conversation}/messages"
        for text in UNUSUAL:
            stored = client.post(path, json={"role": "user", "content": text}, headers=bearer)
            assert (text, stored.status_code, stored.json().get("content")) == (text, 201, text)
            title = client.patch(f"/api/conversations/{conversation}", json={"title": text}, headers=bearer)
            assert title.json()["title"] == text
        items = client.get(path, headers=bearer).json()["items"]
        assert [item["content"] for item in items] == list(UNUSUAL)

    @hypothesis_settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(text=ANY_TEXT)
    def test_what_is_taken_is_exactly_what_can_be_kept(
        self, client: TestClient, bearer: dict[str, str], conversation: int, text: str
    ) -> None:
        path = f"/api/conversations/{conversation}/messages"
        sent = json.dumps({"role": "user", "content": text}).encode()
        answer = client.post(path, content=sent, headers=bearer | JSON)
        keepable = (
            bool(text) and not text.isspace() and "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
        )
        assert answer.status_code == (201 if keepable else 422)
        if keepable:
            assert answer.json()["content"] == text


class TestRules:
    @given(text=ANY_TEXT)
    def test_insertable_text_passes_the_check(self, text: str) -> None:
        kept = insertable(text)
        assert "\x00" not in kept
        assert is_unicode(kept)
        if is_unicode(text) and "\x00" not in text:
            assert kept == text
        if kept.strip():
            assert check_text(kept, 1000) == kept

    @pytest.mark.parametrize("text", ["", " ", "\n", "\u2003", "a\x00", "\ud800", "x" * 11])
    def test_check_names_the_rule_and_not_the_text(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"^must ") as caught:
            check_text(text, 10)
        assert not text.strip() or text not in str(caught.value)

    def test_halves_that_belong_together_become_one(self) -> None:
        assert insertable("\ud83d\ude00 \ude00\ud83d") == "😀 "


class TestCounts:
    @pytest.fixture
    def small(self, settings: Settings) -> Iterator[TestClient]:
        limits = {"messages_per_minute_max": 2, "conversations_per_day_max": 2}
        with TestClient(create_app(settings.model_copy(update=limits)), raise_server_exceptions=False) as client:
            yield client

    def test_too_many_messages_and_conversations_are_429_and_say_for_how_long(self, small: TestClient) -> None:
        bearer = sign_up(small, "ann@example.org")
        calls = [("/api/conversations/", {}), ("/api/chat/start", {})]
        _, conversation = (small.post(path, json=body, headers=bearer).json().get("conversation_id") for path, body in calls)
        for path, body in calls:
            answer = small.post(path, json=body, headers=bearer)
            assert_problem(answer, 429)
            assert answer.json()["type"] == "urn:chatkeep:too-many-conversations"
            assert 86_000 < int(answer.headers["retry-after"]) <= 86_400
        said = small.post(f"/api/chat/{conversation}/message", json={"message": "one"}, headers=bearer).json()
        assert said["assistant_message"]["content"], "a reply does not count"
        messages = f"/api/conversations/{conversation}/messages"
        assert small.post(messages, json={"role": "assistant", "content": "two"}, headers=bearer).status_code == 201
        for path, body in ((messages, {"role": "user", "content": "x"}), (f"/api/chat/{conversation}/message", {"message": "x"})):
            answer = small.post(path, json=body, headers=bearer)
            assert_problem(answer, 429)
            assert answer.json()["type"] == "urn:chatkeep:too-many-messages"
            assert 0 < int(answer.headers["retry-after"]) <= 60
        assert len(small.get(messages, headers=bearer).json()["items"]) == 3
