"""Where replies come from: the rules, and a model behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from api.replies import OfflineResponder, OpenAIResponder, Responder, Turn, responder
from worker import logs
from worker.errors import ConfigurationError, ReplyFailed
from worker.settings import Settings
from worker.text import check_text

KEY = "sk-very-secret-key"
PROMPT = "something-private"
TURNS = [Turn("user", PROMPT)]
BROKE_OFF = "The model broke off. What it had said is kept; send another message to go on."


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings without stores: none is needed here."""
    monkeypatch.setitem(Settings.model_config, "env_file", None)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    return Settings(
        database_url=SecretStr("postgresql://nowhere"),
        redis_url=SecretStr("redis://nowhere"),
        jwt_secret=SecretStr("0123456789abcdefghijklmnopqrstuv"),
    )


def collect(source: Responder, turns: Sequence[Turn] = TURNS) -> list[str]:
    async def read() -> list[str]:
        return [piece async for piece in source.stream(turns)]

    return asyncio.run(read())


class TestChoice:
    def test_without_a_model_it_is_the_rules(self, plain: Settings) -> None:
        assert isinstance(responder(plain), OfflineResponder)

    def test_with_a_model_it_is_asked(self, plain: Settings) -> None:
        chosen = plain.model_copy(update={"llm_base_url": "http://127.0.0.1:1/v1", "llm_model": "m"})
        assert isinstance(responder(chosen), OpenAIResponder)

    @pytest.mark.parametrize(
        ("settings", "message"), [({"llm_api_key": SecretStr(KEY)}, "LLM_MODEL"), ({"llm_model": "m"}, "LLM_BASE_URL")]
    )
    def test_half_a_configuration_says_what_is_missing(self, plain: Settings, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message) as caught:
            responder(plain.model_copy(update=settings))
        assert KEY not in str(caught.value)

    def test_without_the_client_it_says_how_to_get_it(self, plain: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(ConfigurationError, match=r"\.\[llm\]"):
            responder(plain.model_copy(update={"llm_model": "m", "llm_api_key": SecretStr(KEY)}))


class TestRules:
    def test_same_turns_give_the_same_reply(self) -> None:
        turns = [Turn("user", "I lost my keys")]
        assert OfflineResponder(seed=1).reply(turns) == OfflineResponder(seed=1).reply(turns)
        assert len({OfflineResponder(seed=seed).reply(turns) for seed in range(50)}) > 1

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            ("I feel lonely", "feel lonely"),
            ("I can't find my keys.", "you cannot find your keys"),
            ("I am tired, really", "tired"),
            ("You are clever", "that I am clever"),
            ("my cat bit me", "Your cat bit you?"),
            ("Do you like your job?", "What do you think?"),
            ("I’m not sure", "not sure"),
        ],
    )
    def test_remark_is_turned_round(self, said: str, expected: str) -> None:
        assert any(expected in OfflineResponder(seed=seed).reply([Turn("user", said)]) for seed in range(40))

    def test_comes_back_to_what_was_said_before(self) -> None:
        turns = [Turn("user", "my old bicycle was stolen"), Turn("assistant", "Your old bicycle?"), Turn("user", "Rain today")]
        assert any("old bicycle" in OfflineResponder(seed=seed).reply(turns) for seed in range(20))
        turns[-1] = Turn("user", "Do you remember anything?")
        assert "old bicycle" in OfflineResponder().reply(turns)

    def test_does_not_say_the_same_twice_running(self) -> None:
        turns: list[Turn] = []
        last = ""
        for _ in range(60):
            turns.append(Turn("user", "ok"))
            reply = OfflineResponder().reply(turns)
            assert reply != last
            turns.append(Turn("assistant", reply))
            last = reply

    @pytest.mark.parametrize("said", ["Привет! Как дела?", "我今天很累", "こんにちは", "¡Hola! ¿Qué tal?", "مرحبا"])
    def test_other_languages_are_not_talked_over(self, said: str) -> None:
        assert "English" in OfflineResponder().reply([Turn("user", said)])

    @pytest.mark.parametrize("said", ["", " \n", "🙂", "12 + 30", "?!", "…"])
    def test_no_words_at_all(self, said: str) -> None:
        assert "words" in OfflineResponder().reply([Turn("user", said)])

    def test_no_turns_at_all(self) -> None:
        assert OfflineResponder().reply([])

    @given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=200)), max_size=6), st.integers())
    def test_every_reply_can_be_stored_and_is_short(self, said: list[tuple[Any, str]], seed: int) -> None:
        reply = "".join(collect(OfflineResponder(seed=seed), [Turn(role, text) for role, text in said]))
        assert check_text(reply, 400) == reply

    @pytest.mark.parametrize(
        "said", ["x" * 100_000, "I am " * 20_000, "my " * 30_000, "a'" * 50_000, "i feel " + "(" * 90_000, "my a-" * 20_000]
    )
    def test_long_input_takes_no_time(self, said: str) -> None:
        started = time.perf_counter()
        assert len(OfflineResponder().reply([Turn("user", said), Turn("user", said)])) < 400
        assert time.perf_counter() - started < 0.1

    def test_comes_in_pieces(self) -> None:
        pieces = collect(OfflineResponder(), [Turn("user", "hello")])
        assert len(pieces) > 2
        assert "".join(pieces) == OfflineResponder().reply([Turn("user", "hello")])


def event(content: Any, finish: str | None = None) -> bytes:
    chunk = {
        "id": "1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}],
    }
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


DONE = event(None, "stop") + b"data: [DONE]\n\n"


class TestModel:
    @pytest.fixture
    def output(self, own_logging: None) -> io.StringIO:
        stream = io.StringIO()
        logs.configure("DEBUG", process="test", stream=stream, as_json=True)
        return stream

    @pytest.fixture
    def settings(self, plain: Settings) -> Settings:
        return plain.model_copy(
            update={"llm_base_url": "http://model.test/v1", "llm_model": "m", "llm_api_key": SecretStr(KEY), "llm_timeout_seconds": 0.5}
        )

    def _model(self, settings: Settings, handler: Callable[[httpx2.Request], Any], **changes: Any) -> OpenAIResponder:
        return OpenAIResponder(settings.model_copy(update=changes), transport=httpx2.MockTransport(handler))

    def _replying(self, settings: Settings, *events: bytes, **changes: Any) -> OpenAIResponder:
        return self._model(
            settings, lambda _: httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=b"".join(events)), **changes
        )

    def test_is_asked_with_the_turns_and_answers_in_pieces(self, settings: Settings) -> None:
        asked: list[httpx2.Request] = []

        def handler(request: httpx2.Request) -> httpx2.Response:
            asked.append(request)
            return httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=event("Hel") + event("lo") + DONE)

        turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
        assert collect(self._model(settings, handler), turns) == ["Hel", "lo"]
        assert str(asked[0].url) == "http://model.test/v1/chat/completions"
        body = json.loads(asked[0].content)
        assert body["messages"] == [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        assert (body["model"], body["stream"]) == ("m", True)

    def test_what_cannot_be_stored_is_left_out(self, settings: Settings) -> None:
        pieces = collect(self._replying(settings, event("a\x00b"), event("\ud800"), event(None), event(""), event("c\udc00"), DONE))
        assert "".join(pieces) == "abc"

    def test_character_that_is_cut_in_two_is_put_together(self, settings: Settings) -> None:
        assert "".join(collect(self._replying(settings, event("x\ud83d"), event("\ude00y"), DONE))) == "x😀y"

    def test_is_cut_where_a_message_ends_and_says_so(self, settings: Settings) -> None:
        pieces, told = _until_failure(self._replying(settings, *[event("12345")] * 10, DONE, message_chars_max=12))
        assert "".join(pieces) == "123451234512"
        assert told == "The reply was cut at 12 characters."
        assert "".join(collect(self._replying(settings, event("12345"), event("67"), DONE, message_chars_max=7))) == "1234567"

    @pytest.mark.parametrize(
        ("end", "why"), [(b"", "broke off"), (event(None, "length"), "its own limit"), (event("", "content_filter"), "filter")]
    )
    def test_what_the_model_did_not_end_is_not_whole(self, settings: Settings, end: bytes, why: str) -> None:
        """A connection that is closed in the middle looks like an end to HTTP/1.0, and to proxies."""
        pieces, told = _until_failure(self._replying(settings, event("so far"), end))
        assert pieces == ["so far"]
        assert told
        assert why in told

    @pytest.mark.parametrize(
        "events",
        [[], [event("")], [event(" \n"), event("\x00")], [b'data: {"choices": []}\n\n'], [b'data: {"choices": [{"index": 0}]}\n\n']],
    )
    def test_nothing_but_white_space_is_no_reply(self, settings: Settings, events: list[bytes]) -> None:
        with pytest.raises(ReplyFailed):
            collect(self._replying(settings, *events, DONE))

    @pytest.mark.parametrize("status", [301, 307, 400, 401, 404, 429, 500, 503])
    def test_refusal_is_told_without_the_key_or_the_text(self, settings: Settings, output: io.StringIO, status: int) -> None:
        asked: list[str] = []

        def handler(request: httpx2.Request) -> httpx2.Response:
            asked.append(str(request.url))
            message = f"You sent {PROMPT} with {KEY}"
            headers = {"Location": "http://elsewhere.test/", "Retry-After": "0", "x-should-retry": "false"}
            return httpx2.Response(status, headers=headers, json={"error": {"message": message}})

        with pytest.raises(ReplyFailed) as caught:
            collect(self._model(settings, handler))
        assert all(url.startswith("http://model.test/") for url in asked)
        for told in (caught.value.detail, output.getvalue()):
            assert PROMPT not in told
            assert KEY not in told
        assert '"reply failed"' in output.getvalue()

    @pytest.mark.parametrize("broken", [b"data: {not json\n\n", b'data: {"error": {"message": "overloaded"}}\n\n'])
    def test_trouble_half_way_is_a_failure_after_what_there_was(self, settings: Settings, broken: bytes) -> None:
        pieces, failed = _until_failure(self._replying(settings, event("so far"), broken))
        assert (pieces, failed) == (["so far"], BROKE_OFF)

    def test_connection_that_breaks_is_a_failure(self, settings: Settings) -> None:
        async def body() -> Any:
            yield event("so far")
            raise httpx2.ReadError("cut")

        model = self._model(settings, lambda _: httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=body()))
        assert _until_failure(model) == (["so far"], BROKE_OFF)

    def test_silent_model_is_given_up(self, settings: Settings) -> None:
        async def body() -> Any:
            yield event("so far")
            await asyncio.sleep(60)

        model = self._model(settings, lambda _: httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=body()))
        started = time.monotonic()
        assert _until_failure(model) == (["so far"], BROKE_OFF)
        assert time.monotonic() - started < 3

    def test_reader_that_leaves_closes_the_connection(self, settings: Settings) -> None:
        class Body(httpx2.AsyncByteStream):
            closed = False

            async def __aiter__(self) -> Any:
                while True:
                    yield event("x")

            async def aclose(self) -> None:
                self.closed = True

        async def leave() -> None:
            body = Body()
            model = self._model(settings, lambda _: httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, stream=body))
            stream = model.stream(TURNS)
            assert await anext(stream) == "x"
            await stream.aclose()
            assert body.closed

        asyncio.run(leave())


def _until_failure(source: Responder) -> tuple[list[str], str | None]:
    """What came, and why it ended if it failed."""

    async def read() -> tuple[list[str], str | None]:
        pieces: list[str] = []
        try:
            async for piece in source.stream(TURNS):
                pieces.append(piece)
        except ReplyFailed as exc:
            return pieces, exc.detail
        return pieces, None

    return asyncio.run(read())
