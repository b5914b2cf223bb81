"""One stack and one browser for all tests here; a new context, user and clean record for each test.

Every test ends with a look at what the browser had to say: no error of a script, nothing that the content security policy had to stop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.browser import chromium
from tests.browser.model import Model
from tests.browser.page import ChatPage, sign_up
from tests.browser.stack import Stack

EXPECT_MS = 15_000
_WATCH_POLICY = """
addEventListener("securitypolicyviolation", (event) => reportViolation(`${event.effectiveDirective}: ${event.blockedURI} ${event.sample}`));
"""

expect.set_options(timeout=EXPECT_MS)
NewPage = Callable[..., ChatPage]


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium: `CHROMIUM`, or the first that is found. Without one, continuous integration fails, and others are told why they skip."""
    program = chromium.find()
    if program is None and os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(chromium.MISSING)
    if program is None:
        pytest.skip(chromium.MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=chromium.ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def stack(browser: Browser) -> Iterator[Stack]:
    """All processes. (It asks for the browser first: without one, there is nothing to start them for.)"""
    with Stack() as running:
        running.migrate()
        running.start("api", "worker", "beat")
        yield running


@pytest.fixture
def model(stack: Stack) -> Iterator[Model]:
    """The model, with nothing planned."""
    stack.script.reset()
    yield stack.script
    stack.script.reset()


class Record:
    """What the browser complained about."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.violations: list[str] = []

    def watch(self, context: BrowserContext) -> None:
        """Listens to every page of this context."""
        context.expose_binding("reportViolation", lambda _, text: self.violations.append(text))
        context.add_init_script(_WATCH_POLICY)
        context.on("weberror", lambda error: self.errors.append(str(error.error)))
        context.on("console", self._note)

    def clear(self) -> None:
        """For the test that wanted this."""
        self.errors.clear()
        self.violations.clear()

    def _note(self, message: Any) -> None:
        # An answer that is an error, or none, is logged by the browser itself; the tests with outages provoke just that.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)


@pytest.fixture
def record() -> Iterator[Record]:
    """Ends each test with: nothing was wrong in any page."""
    kept = Record()
    yield kept
    assert kept.violations == [], "the content security policy had to stop something"
    assert kept.errors == []


@pytest.fixture
def new_context(browser: Browser, stack: Stack, record: Record) -> Iterator[Callable[..., BrowserContext]]:
    """Makes browser contexts: other people, or the same person's other devices."""
    made: list[BrowserContext] = []

    def make(**options: Any) -> BrowserContext:
        context = browser.new_context(**({"viewport": chromium.WIDE, "base_url": stack.api.url, "locale": "en-GB"} | options))
        context.set_default_timeout(EXPECT_MS)
        record.watch(context)
        made.append(context)
        return context

    yield make
    for context in made:
        context.close()


@pytest.fixture
def new_chat_page(new_context: Callable[..., BrowserContext]) -> NewPage:
    """Makes a page of a new user, signed in; `context` for another page of the same one."""

    def make(context: BrowserContext | None = None, path: str = "/", **options: Any) -> ChatPage:
        if context is None:
            context = new_context(**options)
            sign_up(context)
        page = ChatPage(context.new_page())
        page.open(path)
        return page

    return make


@pytest.fixture
def chat(new_chat_page: NewPage) -> ChatPage:
    """The page of a new user, signed in."""
    return new_chat_page()


@pytest.fixture
def visitor(new_context: Callable[..., BrowserContext]) -> Page:
    """A page of somebody who has never been here."""
    return new_context().new_page()
