"""Staying signed in and signing out, over HTTP and over two processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from api.tokens import COOKIE, REFRESH_COOKIE
from tests import core
from tests.api.conftest import EMAIL, PASSWORD
from tests.api.test_errors import assert_problem
from tests.api.test_streams import Site, opened, serve, turn
from worker.embedded import EmbeddedValkey
from worker.settings import Settings
from worker.sign_ins import GRACE_SECONDS

ME, TOKEN, REFRESH, LOGOUT, SESSION = (f"/api/auth/{name}" for name in ("me", "token", "refresh", "logout", "session"))
FORM = {"username": EMAIL, "password": PASSWORD}
OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def account(client: TestClient) -> None:
    assert client.post("/api/auth/register", json={"email": EMAIL, "password": PASSWORD}).status_code == 201


@pytest.fixture
def tokens(client: TestClient, account: None) -> dict[str, Any]:
    return dict(client.post(TOKEN, data=FORM).json())


def bearer(tokens: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {tokens['access_token']}"}


def refreshed(client: TestClient, tokens: dict[str, Any]) -> httpx2.Response:
    return client.post(REFRESH, data={"refresh_token": tokens["refresh_token"]})


def pass_the_grace() -> None:
    core.ask("UPDATE sign_in SET renewed_at = renewed_at - make_interval(secs => %s) RETURNING id", GRACE_SECONDS + 1)


class TestRefresh:
    def test_gives_the_same_answer_as_signing_in(self, client: TestClient, tokens: dict[str, Any]) -> None:
        answer = client.post(REFRESH, data={"refresh_token": tokens["refresh_token"], "grant_type": "refresh_token"})
        assert answer.status_code == 200
        assert set(answer.json()) == set(tokens)
        assert answer.json()["refresh_token"] != tokens["refresh_token"]
        assert client.get(ME, headers=bearer(answer.json())).json() == client.get(ME, headers=bearer(tokens)).json()

    def test_token_that_was_used_before_ends_all_of_its_sign_in(self, client: TestClient, tokens: dict[str, Any]) -> None:
        other = dict(client.post(TOKEN, data=FORM).json())
        second = refreshed(client, tokens).json()
        pass_the_grace()
        assert_problem(refreshed(client, tokens), 401)
        for ended in (tokens, second):
            assert_problem(client.get(ME, headers=bearer(ended)), 401)
            assert_problem(refreshed(client, ended), 401)
        assert client.get(ME, headers=bearer(other)).status_code == 200
        assert refreshed(client, other).status_code == 200

    def test_what_is_no_refresh_token_is_refused(self, client: TestClient, tokens: dict[str, Any]) -> None:
        for wrong in ("x", tokens["access_token"], tokens["refresh_token"][:-1], tokens["refresh_token"] + "x", "1.2.3", "\ud7ff"):
            assert_problem(client.post(REFRESH, data={"refresh_token": wrong}), 401)
        assert_problem(client.post(REFRESH), 422)
        assert_problem(client.post(REFRESH, data={"refresh_token": "x", "grant_type": "password"}), 422)
        assert refreshed(client, tokens).status_code == 200

    def test_refresh_token_opens_nothing_else(self, client: TestClient, tokens: dict[str, Any]) -> None:
        refresh_token = tokens["refresh_token"]
        assert_problem(client.get(ME, headers={"Authorization": f"Bearer {refresh_token}"}), 401)
        client.cookies.set(COOKIE, refresh_token)
        assert_problem(client.get(ME), 401)

    def test_deleted_user_is_not_signed_in(self, client: TestClient, tokens: dict[str, Any]) -> None:
        core.ask('DELETE FROM "user" RETURNING id')
        assert_problem(refreshed(client, tokens), 401)


class TestLogout:
    def test_ends_both_tokens_at_once(self, client: TestClient, tokens: dict[str, Any]) -> None:
        other = dict(client.post(TOKEN, data=FORM).json())
        renewed = refreshed(client, tokens).json()
        assert client.post(LOGOUT, headers=bearer(tokens)).status_code == 204
        for ended in (tokens, renewed):
            assert_problem(client.get(ME, headers=bearer(ended)), 401)
            assert_problem(client.post("/api/conversations/", json={}, headers=bearer(ended)), 401)
            assert_problem(refreshed(client, ended), 401)
        assert client.get(ME, headers=bearer(other)).status_code == 200

    def test_token_without_a_sign_in_is_told_so(self, client: TestClient, account: None) -> None:
        token = client.app.state.tokens.issue(1)  # type: ignore[attr-defined]
        assert_problem(client.post(LOGOUT, headers={"Authorization": f"Bearer {token}"}), 422)

    def test_it_is_not_said_to_be_done_while_redis_is_away(
        self, client: TestClient, tokens: dict[str, Any], valkey: EmbeddedValkey
    ) -> None:
        valkey.kill()
        assert_problem(client.post(LOGOUT, headers=bearer(tokens)), 503)
        valkey.start()
        assert_problem(refreshed(client, tokens), 401)
        assert_problem(client.get(ME, headers=bearer(tokens)), 401)


class TestPage:
    @pytest.fixture
    def page(self, client: TestClient, account: None) -> TestClient:
        assert client.post(SESSION, data=FORM, headers=OWN_PAGE).status_code == 200
        return client

    def test_renews_its_cookies(self, page: TestClient) -> None:
        before = dict(page.cookies)
        del page.cookies[COOKIE]
        assert_problem(page.get(ME), 401)
        answer = page.post(SESSION + "/refresh", headers=OWN_PAGE)
        assert (answer.status_code, answer.content) == (204, b"")
        assert set(page.cookies) == {COOKIE, REFRESH_COOKIE}
        assert page.cookies[REFRESH_COOKIE] != before[REFRESH_COOKIE]
        assert page.get(ME).status_code == 200

    def test_only_our_own_page_renews(self, page: TestClient) -> None:
        for headers in ({}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://evil.example"}):
            answer = page.post(SESSION + "/refresh", headers=headers)
            assert_problem(answer, 403)
            assert "set-cookie" not in answer.headers

    def test_without_a_cookie_nothing_is_renewed(self, client: TestClient) -> None:
        answer = client.post(SESSION + "/refresh", headers=OWN_PAGE)
        assert_problem(answer, 401)
        assert "set-cookie" not in answer.headers

    @pytest.mark.parametrize("has", [(COOKIE, REFRESH_COOKIE), (COOKIE,), (REFRESH_COOKIE,)], ids="+".join)
    def test_signing_out_ends_both_tokens(self, page: TestClient, has: tuple[str, ...]) -> None:
        access, refresh_token = page.cookies[COOKIE], page.cookies[REFRESH_COOKIE]
        for name in {COOKIE, REFRESH_COOKIE} - set(has):
            del page.cookies[name]
        assert page.delete(SESSION, headers=OWN_PAGE).status_code == 204
        assert not set(page.cookies)
        assert_problem(page.get(ME, headers={"Authorization": f"Bearer {access}"}), 401)
        assert_problem(page.post(REFRESH, data={"refresh_token": refresh_token}), 401)

    def test_signing_out_without_a_cookie_is_no_error(self, client: TestClient) -> None:
        assert client.delete(SESSION, headers=OWN_PAGE).status_code == 204


@asynccontextmanager
async def two_processes(settings: Settings) -> AsyncIterator[tuple[Site, Site, dict[str, str]]]:
    """Two processes, and the header of somebody who has signed in at the first one."""
    user = core.make_user()
    async with serve(settings, user) as one, serve(settings, user) as two:
        made, _ = one.app.state.refresh_tokens.begin(user, 10)
        yield one, two, {"Authorization": f"Bearer {one.app.state.tokens.issue(user, made.id)}"}


@pytest.mark.anyio
class TestTwoProcesses:
    async def test_sign_out_is_known_everywhere_in_a_moment(self, settings: Settings) -> None:
        async with two_processes(settings) as (one, two, headers):
            assert (await two.http.get("/api/conversations", headers=headers)).status_code == 200
            assert (await one.http.post(LOGOUT, headers=headers)).status_code == 204
            assert (await one.http.get("/api/conversations", headers=headers)).status_code == 401
            async with asyncio.timeout(5):
                while (await two.http.get("/api/conversations", headers=headers)).status_code != 401:
                    await asyncio.sleep(0.02)

    @pytest.mark.parametrize("where", ["here", "elsewhere"])
    async def test_sign_out_ends_running_streams(self, settings: Settings, where: str) -> None:
        async with two_processes(settings) as (one, two, headers):
            at = one if where == "here" else two
            session = (await at.http.post("/api/chat/start", json={}, headers=headers)).json()["session_id"]
            async with opened(at, "GET", "/api/events", headers=headers) as events, turn(at, session) as anothers:
                url = f"/api/chat/{session}/stream"
                await anothers.next()
                async with opened(at, "GET", url, headers=headers) as reply:
                    await events.next()
                    await reply.next()
                    assert (await one.http.post(LOGOUT, headers=headers)).status_code == 204
                    async with asyncio.timeout(5):
                        await reply.rest()
                        await events.rest()
                at.model.say("it goes on without a reader", None)
                assert (await anothers.rest())[-1]["event"] == "assistant_message"
            assert not at.app.state.streams._of_sign_in

    async def test_events_end_with_their_token(self, settings: Settings) -> None:
        user = core.make_user()
        async with serve(settings.model_copy(update={"access_token_seconds": 1}), user) as site:
            token = site.app.state.tokens.issue(user)
            async with opened(site, "GET", "/api/events", headers={"Authorization": f"Bearer {token}"}) as events, asyncio.timeout(5):
                await events.rest()
