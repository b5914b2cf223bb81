"""The running reply: streamed, followed, resumed, stopped, failing, and finished for a process that died."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.replies import Turn
from tests import core
from worker import keys
from worker.embedded import free_port
from worker.errors import ReplyFailed
from worker.flush import flush_shard
from worker.pending import reply_key
from worker.redis import connect_sync
from worker.settings import Settings

pytestmark = pytest.mark.anyio


class Scripted:
    """A model that says what a test puts in: text, an exception, or nothing for a while until the test goes on."""

    def __init__(self) -> None:
        self.steps: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self.asked: list[Sequence[Turn]] = []

    def say(self, *steps: str | Exception | None) -> None:
        for step in steps:
            self.steps.put_nowait(step)

    async def stream(self, turns: Sequence[Turn]) -> AsyncIterator[str]:
        self.asked.append(turns)
        while (step := await self.steps.get()) is not None:
            if isinstance(step, Exception):
                raise step
            yield step

    async def close(self) -> None: ...


class Site:
    """A running API process (in this one) with a signed-in client."""

    def __init__(self, app: FastAPI, model: Scripted, base_url: str, token: str) -> None:
        self.app, self.model, self.base_url = app, model, base_url
        self.http = httpx2.AsyncClient(base_url=base_url, headers={"Authorization": f"Bearer {token}"}, timeout=20)

    async def start(self) -> str:
        return str((await self.http.post("/api/chat/start", json={})).json()["session_id"])

    async def history(self, session: str) -> list[dict[str, Any]]:
        return list((await self.http.get(f"/api/chat/{session}/history")).json()["items"])


@asynccontextmanager
async def serve(settings: Settings, user_id: int) -> AsyncIterator[Site]:
    app, model, port = create_app(settings), Scripted(), free_port()
    app.state.responder = model
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, timeout_graceful_shutdown=2))
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not server.started:
            await asyncio.sleep(0.01)
    site = Site(app, model, f"http://127.0.0.1:{port}", app.state.tokens.issue(user_id))
    try:
        yield site
    finally:
        await site.http.aclose()
        server.should_exit = True
        await task


@pytest.fixture
async def site(settings: Settings) -> AsyncIterator[Site]:
    async with serve(settings, core.make_user()) as made:
        yield made


class Events:
    """An open event stream."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def next(self) -> dict[str, Any] | None:
        """The next event as {event, id, data}; None at the end."""
        event: dict[str, Any] = {}
        async with asyncio.timeout(20):
            async for line in self._lines:
                if not line and event:
                    return event
                name, _, value = line.partition(": ")
                if name:
                    event[name] = json.loads(value) if name == "data" and value != "[DONE]" else value
        return None

    async def rest(self) -> list[dict[str, Any]]:
        found = []
        while (event := await self.next()) is not None:
            found.append(event)
        return found


@asynccontextmanager
async def opened(site: Site, method: str, path: str, **options: Any) -> AsyncIterator[Events]:
    async with site.http.stream(method, path, **options) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        yield Events(response)


def turn(site: Site, session: str, text: str = "Hello", **headers: str) -> Any:
    headers = {"Accept": "text/event-stream", **headers}
    return opened(site, "POST", f"/api/chat/{session}/message", json={"message": text}, headers=headers)


def names(events: Sequence[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def text(events: Sequence[dict[str, Any]]) -> str:
    return "".join(event["data"]["text"] for event in events if event["event"] == "delta")


class TestTurnAsAStream:
    async def test_the_message_comes_first_then_text_then_the_stored_reply(self, site: Site) -> None:
        session = await site.start()
        async with turn(site, session) as events:
            first = await events.next()
            assert first
            assert first["event"] == "user_message"
            assert first["data"]["content"] == "Hello"
            assert [m["content"] for m in await site.history(session)] == ["Hello"]
            site.model.say("One ", "two", None)
            rest = await events.rest()
        assert set(names(rest[:-1])) == {"delta"}
        assert text(rest) == "One two"
        assert rest[-1]["event"] == "assistant_message"
        assert rest[-1]["data"]["status"] == "complete"
        assert (await site.history(session))[-1] == rest[-1]["data"] | {"state": (await site.history(session))[-1]["state"]}

    async def test_ids_rise_and_are_unique(self, site: Site) -> None:
        session = await site.start()
        site.model.say("a", None)
        async with turn(site, session) as events:
            ids = [tuple(map(int, event["id"].split("-"))) for event in await events.rest()]
        assert ids == sorted(set(ids))

    async def test_a_closed_connection_does_not_stop_the_reply(self, site: Site) -> None:
        session = await site.start()
        async with turn(site, session) as events:
            await events.next()
        site.model.say("still here", None)
        await eventually(lambda: site.history(session), lambda items: len(items) == 2 and items[1]["content"] == "still here")

    async def test_a_replayed_turn_is_the_same_two_messages(self, site: Site) -> None:
        session = await site.start()
        site.model.say("once", None)
        async with turn(site, session, **{"Idempotency-Key": "k"}) as events:
            first = await events.rest()
        async with turn(site, session, **{"Idempotency-Key": "k"}) as events:
            again = await events.rest()
            assert events.response.headers["idempotent-replayed"] == "true"
        assert [e["data"]["id"] for e in again] == [first[0]["data"]["id"], first[-1]["data"]["id"]]

    async def test_the_reply_that_is_cut_at_its_limit_is_kept_incomplete(self, settings: Settings) -> None:
        settings = settings.model_copy(update={"reply_chars_max": 5})
        async with serve(settings, core.make_user()) as site:
            session = await site.start()
            site.model.say("123", "4567", None)
            async with turn(site, session) as events:
                got = await events.rest()
            assert names(got)[-2:] == ["assistant_message", "error"]
            assert got[-2]["data"]["content"] == "12345"
            assert got[-2]["data"]["status"] == "incomplete"

    async def test_a_silent_model_has_failed(self, settings: Settings) -> None:
        settings = settings.model_copy(update={"reply_idle_seconds": 0.3})
        async with serve(settings, core.make_user()) as site:
            session = await site.start()
            answer = await site.http.post(f"/api/chat/{session}/message", json={"message": "Hello"})
            assert answer.status_code == 502
            assert [m["content"] for m in await site.history(session)] == ["Hello"]

    async def test_a_user_at_the_limit_of_streams_is_refused_before_anything_is_stored(self, settings: Settings) -> None:
        settings = settings.model_copy(update={"streams_per_user_max": 1})
        async with serve(settings, core.make_user()) as site:
            session, other = await site.start(), await site.start()
            async with turn(site, session) as events:
                await events.next()
                headers = {"Accept": "text/event-stream"}
                refused = await site.http.post(f"/api/chat/{other}/message", json={"message": "x"}, headers=headers)
                assert refused.status_code == 429
                assert await site.history(other) == []
                site.model.say("a", None)
                await events.rest()
            site.model.say("b", None)
            async with turn(site, other) as events:
                assert names(await events.rest())[-1] == "assistant_message"


class TestFollow:
    async def test_another_process_follows_the_whole_and_resumes_after_an_event(self, settings: Settings) -> None:
        user = core.make_user()
        async with serve(settings, user) as one, serve(settings, user) as two:
            session = await one.start()
            async with turn(one, session) as events:
                await events.next()
                one.model.say("first ")
                seen = await events.next()
                assert seen
                assert seen["data"] == {"text": "first "}
                async with opened(two, "GET", f"/api/chat/{session}/stream") as whole:
                    assert names([await whole.next(), await whole.next()]) == ["user_message", "delta"]  # type: ignore[list-item]
                    async with opened(two, "GET", f"/api/chat/{session}/stream", headers={"Last-Event-ID": seen["id"]}) as resumed:
                        one.model.say("second", None)
                        a, b, c = await events.rest(), await whole.rest(), await resumed.rest()
            assert a == b == c
            assert text(a) == "second"

    async def test_nothing_runs(self, site: Site) -> None:
        session = await site.start()
        assert (await site.http.get(f"/api/chat/{session}/stream")).status_code == 204
        site.model.say("a", None)
        async with turn(site, session) as events:
            got = await events.rest()
        assert (await site.http.get(f"/api/chat/{session}/stream")).status_code == 204
        late = await site.http.get(f"/api/chat/{session}/stream", headers={"Last-Event-ID": got[-1]["id"]})
        assert late.status_code == 204
        async with opened(site, "GET", f"/api/chat/{session}/stream", headers={"Last-Event-ID": got[0]["id"]}) as rest:
            assert await rest.rest() == got[1:]

    async def test_somebody_elses_reply_is_not_there(self, settings: Settings) -> None:
        async with serve(settings, core.make_user()) as site:
            session = await site.start()
            other = {"Authorization": f"Bearer {site.app.state.tokens.issue(core.make_user())}"}
            async with turn(site, session) as events:
                await events.next()
                for method, path in (("GET", "stream"), ("POST", "stop")):
                    answer = await site.http.request(method, f"/api/chat/{session}/{path}", headers=other)
                    assert answer.status_code == 404
                site.model.say("a", None)
                assert names(await events.rest())[-1] == "assistant_message"


class TestStop:
    async def test_any_process_stops_it_and_what_was_generated_is_kept(self, settings: Settings) -> None:
        user = core.make_user()
        async with serve(settings, user) as one, serve(settings, user) as two:
            session = await one.start()
            async with turn(one, session) as events:
                await events.next()
                one.model.say("so far")
                await events.next()
                assert (await two.http.post(f"/api/chat/{session}/stop")).status_code == 202
                last = (await events.rest())[-1]
            assert last["event"] == "assistant_message"
            assert (last["data"]["content"], last["data"]["status"]) == ("so far", "incomplete")
            one.model.say("next", None)
            assert (await one.http.post(f"/api/chat/{session}/message", json={"message": "go on"})).status_code == 200

    async def test_before_the_first_word_nothing_is_kept(self, site: Site) -> None:
        session = await site.start()
        async with turn(site, session, **{"Idempotency-Key": "k"}) as events:
            await events.next()
            await site.http.post(f"/api/chat/{session}/stop")
            last = (await events.rest())[-1]
        assert last["event"] == "error"
        assert last["data"]["type"].endswith("reply-stopped")
        site.model.say("now", None)
        again = await site.http.post(f"/api/chat/{session}/message", json={"message": "Hello"}, headers={"Idempotency-Key": "k"})
        assert again.json()["reply"] == "now"
        assert len(await site.history(session)) == 2

    async def test_stopping_nothing_is_fine(self, site: Site) -> None:
        assert (await site.http.post(f"/api/chat/{await site.start()}/stop")).status_code == 202


class TestFailure:
    async def test_before_any_text_the_message_stays_and_the_key_tries_again(self, site: Site) -> None:
        session = await site.start()
        site.model.say(ReplyFailed())
        call = {"json": {"message": "Hello"}, "headers": {"Idempotency-Key": "k"}}
        assert (await site.http.post(f"/api/chat/{session}/message", **call)).status_code == 502
        assert [m["role"] for m in await site.history(session)] == ["user"]
        site.model.say("better", None)
        again = await site.http.post(f"/api/chat/{session}/message", **call)
        assert again.status_code == 200
        assert again.json()["reply"] == "better"
        assert [m["content"] for m in await site.history(session)] == ["Hello", "better"]

    async def test_after_some_text_that_is_kept_and_an_error_says_why(self, site: Site) -> None:
        session = await site.start()
        site.model.say("half", ReplyFailed())
        async with turn(site, session) as events:
            got = await events.rest()
        assert names(got) == ["user_message", "delta", "assistant_message", "error"]
        assert got[2]["data"]["status"] == "incomplete"
        assert got[3]["data"]["status"] == 502

    async def test_a_second_turn_meanwhile_is_refused(self, site: Site) -> None:
        session = await site.start()
        async with turn(site, session) as events:
            await events.next()
            second = await site.http.post(f"/api/chat/{session}/message", json={"message": "me too"})
            assert second.status_code == 409
            site.model.say("a", None)
            await events.rest()
        assert [m["content"] for m in await site.history(session)] == ["Hello", "a"]

    async def test_a_deleted_conversation_ends_its_reply(self, site: Site) -> None:
        session = await site.start()
        async with turn(site, session) as events:
            await events.next()
            assert (await site.http.delete(f"/api/conversations/{session}")).status_code == 204
            site.model.say("too late")
            await eventually(lambda: asyncio.sleep(0, site.app.state.turns._running), lambda running: not running)
        assert (await site.http.get(f"/api/chat/{session}/history")).status_code == 404


class TestDeadProcess:
    async def abandon(self, site: Site, session: str) -> None:
        """Leaves a reply behind as a killed process does: text streamed, no end, and the lease run out."""
        async with turn(site, session, **{"Idempotency-Key": "k"}) as events:
            await events.next()
            site.model.say("half a ")
            await events.next()
            for task in list(site.app.state.turns._running):
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await site.app.state.turns._streams._client.delete(f"ck:{{s{int(session) % 64:02d}}}:turn:{session}")

    async def test_the_next_turn_stores_what_was_streamed(self, site: Site) -> None:
        session = await site.start()
        site.app.state.turns._watcher.cancel()
        await self.abandon(site, session)
        site.model.say("fine", None)
        answer = await site.http.post(f"/api/chat/{session}/message", json={"message": "And?"})
        assert answer.status_code == 200
        assert [(m["content"], m["status"]) for m in await site.history(session)] == [
            ("Hello", "complete"),
            ("half a ", "incomplete"),
            ("And?", "complete"),
            ("fine", "complete"),
        ]

    async def test_a_stalled_process_that_comes_back_is_told_what_happened(self, site: Site) -> None:
        """Its lease ran out, another process stored what there was, and then it has more to say than that."""
        session = await site.start()
        turns = site.app.state.turns
        asked = asyncio.create_task(site.http.post(f"/api/chat/{session}/message", json={"message": "Hello"}))
        await eventually(lambda: asyncio.sleep(0, list(turns._running.values())), bool)
        [writing] = turns._running.values()
        owner, conversation, question = writing.writer.user_id, int(session), writing.writer.question_id
        await turns._log.append(owner, conversation, "assistant", "half a ", status="incomplete", key=reply_key(question))
        site.model.say("half a reply", None)
        answer = await asked
        assert (answer.status_code, answer.json()["detail"]) == (502, "The reply was interrupted. The history has what was kept of it.")
        assert [m["content"] for m in await site.history(session)] == ["Hello", "half a "]

    async def test_a_stranger_cannot_end_it(self, site: Site, settings: Settings) -> None:
        session = await site.start()
        site.app.state.turns._watcher.cancel()
        await self.abandon(site, session)
        stranger = core.make_user()
        while stranger % settings.shards != int(session) % 64:
            stranger = core.make_user()
        headers = {"Authorization": "Bearer " + site.app.state.tokens.issue(stranger)}
        answer = await site.http.post(f"/api/chat/{session}/message", json={"message": "mine"}, headers=headers)
        assert answer.status_code == 404
        async with opened(site, "GET", f"/api/chat/{session}/stream") as events:
            got = await events.rest()
        assert [(m["content"], m["status"]) for m in await site.history(session)][1:] == [("half a ", "incomplete")]
        assert names(got)[-1] == "assistant_message"

    async def test_a_reader_gets_its_end(self, site: Site) -> None:
        session = await site.start()
        site.app.state.turns._watcher.cancel()
        await self.abandon(site, session)
        async with opened(site, "GET", f"/api/chat/{session}/stream") as events:
            got = await events.rest()
        assert names(got) == ["user_message", "delta", "assistant_message"]
        assert got[-1]["data"]["status"] == "incomplete"

    async def test_any_process_notices(self, site: Site) -> None:
        session = await site.start()
        await self.abandon(site, session)
        await eventually(lambda: site.history(session), lambda items: [m["content"] for m in items] == ["Hello", "half a "])


class TestContext:
    async def test_is_what_redis_has_and_postgres_is_not_waited_for(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("api.turns.read_history", None)
        monkeypatch.setattr(settings, "cache_messages_max", 3)
        async with serve(settings, core.make_user()) as site:
            session = await site.start()
            with closing(connect_sync(settings)) as redis:
                for number in range(3):
                    site.model.say("yes", None)
                    asked = await site.http.post(f"/api/chat/{session}/message", json={"message": str(number)})
                    assert asked.status_code == 200
                    await asyncio.to_thread(core.flush_all, redis, settings)
            assert [[one.content for one in turns] for turns in site.model.asked] == [["0"], ["0", "yes", "1"], ["yes", "1", "yes", "2"]]


class TestShutdown:
    async def test_what_there_is_is_kept(self, settings: Settings) -> None:
        settings = settings.model_copy(update={"shutdown_grace_seconds": 0.1})
        user = core.make_user()
        async with serve(settings, user) as site:
            session = await site.start()
            async with turn(site, session) as events:
                await events.next()
                site.model.say("so far")
                await events.next()
        async with serve(settings, user) as site:
            assert [(m["content"], m["status"]) for m in await site.history(session)][1:] == [("so far", "incomplete")]


class TestAiSdk:
    async def test_its_chunks_in_its_order(self, site: Site) -> None:
        session = await site.start()
        site.model.say("Hi", None)
        path = f"/api/chat/{session}/message?protocol=ai-sdk"
        async with opened(site, "POST", path, json={"message": "Hello"}) as events:
            assert events.response.headers["x-vercel-ai-ui-message-stream"] == "v1"
            chunks = [event["data"] for event in await events.rest()]
        assert chunks[-1] == "[DONE]"
        assert [chunk["type"] for chunk in chunks[:-1]] == ["start", "text-start", "text-delta", "text-end", "finish"]


def flush_now(settings: Settings, user: int) -> None:
    with closing(connect_sync(settings)) as client:
        flush_shard(client, settings, keys.shard_of_user(user, settings.shards))


async def eventually(look: Any, right: Any, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not right(await look()):
            await asyncio.sleep(0.05)


class TestEvents:
    async def test_another_device_sees_everything(self, settings: Settings) -> None:
        user = core.make_user()
        async with serve(settings, user) as one, serve(settings, user) as two, opened(two, "GET", "/api/events") as events:
            assert (await events.next() or {})["event"] == "resync"
            session = await one.start()
            assert (await events.next() or {})["data"]["title"] is None
            one.model.say("Hi", None)
            answer = (await one.http.post(f"/api/chat/{session}/message", json={"message": "Hello"})).json()
            got = [await events.next() for _ in range(5)]
            assert [event and event["event"] for event in got] == ["message", "conversation", "reply", "message", "reply"]
            assert [event and event["data"] for event in got[::3]] == [answer["user_message"], answer["assistant_message"]]
            assert got[1]["data"]["title"] == "Hello"  # type: ignore[index]
            await asyncio.to_thread(flush_now, settings, user)
            committed = await events.next()
            assert committed
            assert committed["data"] == {"conversation_id": int(session), "up_to": committed["data"]["up_to"]}
            assert committed["data"]["up_to"] >= answer["assistant_message"]["id"]
            await one.http.patch(f"/api/conversations/{session}", json={"title": "Named"})
            assert (await events.next() or {})["data"]["title"] == "Named"
            await one.http.delete(f"/api/conversations/{session}")
            assert (await events.next() or {})["event"] == "conversation_deleted"

    async def test_a_reader_goes_on_where_it_left_off_or_is_told_that_it_cannot(self, site: Site) -> None:
        async with opened(site, "GET", "/api/events") as events:
            first = await events.next()
        assert first
        session = await site.start()
        async with opened(site, "GET", "/api/events", headers={"Last-Event-ID": first["id"]}) as events:
            assert (await events.next() or {})["data"]["id"] == int(session)
        async with opened(site, "GET", "/api/events", headers={"Last-Event-ID": "1-1"}) as events:
            assert (await events.next() or {})["event"] == "resync"

    async def test_a_reader_who_is_overtaken_is_told(self, site: Site) -> None:
        """More is written between two looks than the stream holds."""
        session = await site.start()
        messages = [{"role": "user", "content": str(number)} for number in range(100)]
        async with opened(site, "GET", "/api/events") as events:
            assert (await events.next() or {})["event"] == "resync"
            for _ in range(15):
                await site.http.post(f"/api/conversations/{session}/messages/batch", json={"messages": messages})
            got = []
            while not got or (got[-1] != "resync" and len(got) < 1500):
                got.append((await events.next() or {})["event"])
            assert got.count("message") == 1500 or got[-1] == "resync"
            last = (await site.http.post(f"/api/conversations/{session}/messages", json=messages[0])).json()["id"]
            while (await events.next() or {})["data"].get("id") != last:
                pass

    async def test_newcomer_who_has_seen_less_is_not_forgotten(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """He comes while the others' events are under way, and begins before them."""
        hub = site.app.state.events
        async with opened(site, "GET", "/api/events") as events:
            start = await events.next() or {}
            early = await site.start()
            assert (await events.next() or {})["data"]["id"] == int(early)
            overtaken, late = hub._overtaken, asyncio.Event()
            newcomers = []

            async def meanwhile(user_ids: Any) -> Any:
                if hub._users and not late.is_set():
                    late.set()
                    newcomer = aiter(hub.subscribe(next(iter(hub._users)), start["id"]))
                    newcomers.append(asyncio.ensure_future(anext(newcomer)))
                    await asyncio.sleep(0.1)
                return await overtaken(user_ids)

            await site.start()
            monkeypatch.setattr(hub, "_overtaken", meanwhile)
            async with asyncio.timeout(10):
                await late.wait()
                [newcomer] = newcomers
                event = await newcomer
            assert event is not None
            assert json.loads(event.data)["id"] == int(early)

    async def test_nobody_elses(self, site: Site, settings: Settings) -> None:
        other = core.make_user()
        headers = {"Authorization": f"Bearer {site.app.state.tokens.issue(other)}"}
        async with opened(site, "GET", "/api/events", headers=headers) as events:
            await events.next()
            await site.start()
            theirs = (await site.http.post("/api/chat/start", json={}, headers=headers)).json()["conversation_id"]
            assert (await events.next() or {})["data"]["id"] == theirs

    async def test_without_a_reader_nothing_is_written(self, site: Site) -> None:
        await site.start()
        assert await site.app.state.turns._streams._client.keys("ck:*:e:*") == []
