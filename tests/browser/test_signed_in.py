"""The page stays signed in by itself, and is signed out everywhere at once."""

from __future__ import annotations

from playwright.sync_api import BrowserContext, expect

from api.tokens import COOKIE, REFRESH_COOKIE
from tests.browser.conftest import NewPage
from tests.browser.page import ChatPage


def cookie(context: BrowserContext, name: str) -> str:
    return next((one["value"] for one in context.cookies() if one["name"] == name), "")


def test_access_token_that_runs_out_is_renewed_unnoticed(chat: ChatPage) -> None:
    chat.talk("before")
    kept = cookie(chat.context, REFRESH_COOKIE)
    chat.context.clear_cookies(name=COOKIE)
    chat.talk("after")
    assert chat.texts() == ["before", "You said: before", "after", "You said: after"]
    assert cookie(chat.context, COOKIE)
    assert cookie(chat.context, REFRESH_COOKIE) not in ("", kept)
    chat.context.clear_cookies(name=COOKIE)
    chat.page.reload()
    expect(chat.replies).to_have_count(2)


def test_tabs_that_renew_at_the_same_time_both_stay(chat: ChatPage, new_chat_page: NewPage) -> None:
    chat.talk("first")
    tabs = [chat, *(new_chat_page(chat.context, f"/c/{chat.conversation_id}") for _ in range(2))]
    for _ in range(3):
        chat.context.clear_cookies(name=COOKIE)
        for tab in tabs:
            tab.page.reload(wait_until="commit")
        for tab in tabs:
            expect(tab.box).to_be_visible()
            expect(tab.replies).to_have_count(1)


def test_signing_out_ends_what_somebody_else_holds(chat: ChatPage) -> None:
    stolen = {"Authorization": f"Bearer {cookie(chat.context, COOKIE)}"}
    request = chat.context.request
    assert request.get("/api/auth/me", headers=stolen).status == 200
    chat.page.get_by_role("button", name="Sign out").click()
    expect(chat.page.get_by_role("button", name="Sign in", exact=True)).to_be_visible()
    assert request.get("/api/auth/me", headers=stolen).status == 401
    assert not cookie(chat.context, REFRESH_COOKIE)
