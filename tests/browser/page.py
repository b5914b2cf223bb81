"""The chat page as a person knows it: by the names of its parts."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from typing import Any

from playwright.sync_api import BrowserContext, Locator, Page, expect

PASSWORD = "correct horse battery"
_OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}
"""What a browser says of a request that our own page has made."""
_numbers = itertools.count(1)


class ChatPage:
    """One tab."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.box = page.get_by_role("textbox", name="Message")
        self.send = page.get_by_role("button", name="Send", exact=True)
        self.stop = page.get_by_role("button", name="Stop", exact=True)
        self.new_chat = page.get_by_role("button", name="New chat", exact=True)
        self.conversations = page.get_by_role("navigation", name="Conversations")
        self.log = page.get_by_role("log", name="Messages")
        self.messages = self.log.get_by_role("article")
        self.mine = self.log.locator("article.user")
        self.replies = self.log.locator("article.assistant")
        self.strip = page.locator("#strip")

    @property
    def context(self) -> BrowserContext:
        """The browser context, with its cookies."""
        return self.page.context

    @property
    def conversation_id(self) -> int:
        """Of the open conversation, out of the address."""
        return int(self.page.url.rsplit("/c/", 1)[1])

    @property
    def user_id(self) -> int:
        """Of whoever is signed in."""
        return int(self.api("GET", "/api/auth/me")["id"])

    def open(self, path: str = "/") -> None:
        """Goes there, and waits until one can write."""
        self.page.goto(path)
        expect(self.box).to_be_visible()

    def say(self, text: str) -> None:
        """Writes and sends."""
        self.box.fill(text)
        self.box.press("Enter")

    def talk(self, text: str, answer: str | None = None) -> None:
        """Says something and waits for the whole reply; by itself the model repeats what was said."""
        before = self.replies.count()
        self.say(text)
        self.finished(before, answer or text)

    def finished(self, index: int, text: str) -> None:
        """Waits until this reply has ended and holds this text."""
        reply = self.replies.nth(index)
        expect(reply).to_contain_text(text)
        expect(reply).not_to_have_attribute("aria-busy", "true")

    def row(self, title: str) -> Locator:
        """A conversation in the list."""
        return self.conversations.get_by_role("link", name=title, exact=True)

    def state(self, index: int) -> Locator:
        """An own message, to look at its `data-state`."""
        return self.mine.nth(index)

    def texts(self) -> list[str]:
        """What all messages say, in the order in which they stand."""
        return [text.strip() for text in self.messages.locator(".body").all_inner_texts()]

    def api(self, method: str, path: str, **options: Any) -> Any:
        """A call of the API as this user, as if from elsewhere; its JSON."""
        answer = self.context.request.fetch(path, method=method, headers=_OWN_PAGE, **options)
        assert answer.ok, f"{answer.status} {answer.text()}"
        return answer.json() if answer.status != 204 else None

    def fill(self, messages: Sequence[tuple[str, str]], title: str | None = None) -> int:
        """Makes a conversation with these messages (role, content); its id."""
        conversation = self.api("POST", "/api/conversations/", data={"title": title} if title else {})["id"]
        for role, content in messages:
            self.api("POST", f"/api/conversations/{conversation}/messages", data={"role": role, "content": content})
        return int(conversation)


def sign_up(context: BrowserContext, email: str = "") -> str:
    """Makes a user and signs the context in; the e-mail address."""
    email = email or f"person{next(_numbers)}.{secrets.token_hex(4)}@example.org"
    account = {"email": email, "password": PASSWORD}
    assert context.request.post("/api/auth/register", data=account).status == 201
    answer = context.request.post("/api/auth/session", form={"username": email, "password": PASSWORD}, headers=_OWN_PAGE)
    assert answer.status == 200
    return email
