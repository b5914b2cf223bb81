"""Streams in which nothing happens: they stay open through whatever closes idle connections, and are not held back on the way."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from api import turns
from tests import core
from tests.api.test_streams import serve
from worker import events
from worker.settings import Settings

pytestmark = pytest.mark.anyio


async def comments(response: httpx2.Response, count: int) -> list[str]:
    """The first comments of a stream."""
    found: list[str] = []
    async with asyncio.timeout(20):
        async for line in response.aiter_lines():
            if line.startswith(":"):
                found.append(line)
            if len(found) == count:
                break
    return found


async def test_a_silent_reply_and_a_quiet_user_have_a_heartbeat(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(events, "HEARTBEAT_SECONDS", 0.1)
    async with serve(settings, core.make_user()) as site:
        session = await site.start()
        headers = {"Accept": "text/event-stream"}
        calls = (
            site.http.stream("POST", f"/api/chat/{session}/message", json={"message": "Hello"}, headers=headers),
            site.http.stream("GET", f"/api/chat/{session}/stream"),
            site.http.stream("GET", "/api/events"),
        )
        for call in calls:
            async with call as response:
                assert response.status_code == 200
                assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
                assert len(await comments(response, 2)) == 2
        site.model.say("done", None)
