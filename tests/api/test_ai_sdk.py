"""Vercel's AI SDK, the real one from npm, against a turn and its resume. Skipped where Node is absent."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import core
from tests.api.test_streams import Site, serve, site
from worker.errors import ReplyFailed
from worker.settings import Settings

__all__ = ["site"]  # a fixture

NODE = shutil.which("node")
NPM = shutil.which("npm")
CLIENT = Path(__file__).parent / "ai_sdk"
SECONDS = 90

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(not (NODE and NPM), reason="needs Node.js and npm")]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SDK, installed as the lock file says."""
    folder = tmp_path_factory.mktemp("ai_sdk")
    for file in CLIENT.iterdir():
        shutil.copy(file, folder)
    npm = [str(NPM), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    code, said = asyncio.run(run(*npm, cwd=folder))
    if code != 0 and not os.environ.get("CI"):
        pytest.skip(f"npm could not install the SDK: {said[-300:]}")
    assert code == 0, said
    return folder


async def run(*command: str, cwd: Path) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, stdin=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(SECONDS):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    return process.returncode or 0, said.decode()


async def sdk(client: Path, site: Site, session: str, *message: str) -> dict[str, Any]:
    token = site.http.headers["Authorization"].removeprefix("Bearer ")
    code, said = await run(str(NODE), "check.mjs", site.base_url, token, session, *message, cwd=client)
    assert code == 0, said
    return dict(json.loads(said.strip().splitlines()[-1]))


async def test_a_turn(client: Path, site: Site) -> None:
    session = await site.start()
    site.model.say("Hello ", "there", None)
    got = await sdk(client, site, session, "Hi")
    assert (got["role"], got["text"]) == ("assistant", "Hello there")
    assert [got["types"][0], *got["types"][-2:]] == ["start", "text-end", "finish"]
    assert [message["content"] for message in await site.history(session)] == ["Hi", "Hello there"]


async def test_resuming_gives_the_whole_reply_also_from_another_process(client: Path, settings: Settings) -> None:
    user = core.make_user()
    async with serve(settings, user) as one, serve(settings, user) as two:
        session = await one.start()
        turn = asyncio.create_task(one.http.post(f"/api/chat/{session}/message", json={"message": "Hi"}))
        one.model.say("first ")
        while len(await one.history(session)) < 1:
            await asyncio.sleep(0.02)
        resumed = asyncio.create_task(sdk(client, two, session))
        async with asyncio.timeout(SECONDS):
            while not two.app.state.streams._open:
                await asyncio.sleep(0.02)
        one.model.say("second", None)
        assert (await turn).status_code == 200
        assert (await resumed)["text"] == "first second"


async def test_nothing_to_resume(client: Path, site: Site) -> None:
    assert (await sdk(client, site, await site.start()))["nothing"]


async def test_a_failure_is_an_error_chunk(client: Path, site: Site) -> None:
    session = await site.start()
    site.model.say("half", ReplyFailed())
    got = await sdk(client, site, session, "Hi")
    assert got["text"] == "half"
    assert "error" in got["types"]
