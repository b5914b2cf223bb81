"""Takes the pictures in `screenshots/`: `python -m tests.browser.screenshots`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect, sync_playwright

from tests.browser import chromium
from tests.browser.model import Failure, Gate, words
from tests.browser.page import PASSWORD, ChatPage, sign_up
from tests.browser.stack import Stack

HERE = Path(__file__).parent / "screenshots"
EARLIER = (
    (1, "Names for a small sailing boat"),
    (1, "Why is the sky darker at altitude?"),
    (3, "Reading list for the winter"),
    (5, "Sourdough that does not rise"),
    (24, "Letter to the landlord"),
    (31, "Plan for two days in Lisbon"),
    (40, "Regular expressions, gently"),
    (66, "Birthday speech for Ines"),
    (71, "How do tides work?"),
)
QUESTION = "How do I count the words in a file with Python, most frequent first?"
ANSWER = """Split the text into words, and let `Counter` do the rest. Its `most_common` sorts by frequency:

```python
from collections import Counter

def top_words(text: str, count: int = 10) -> list[tuple[str, int]]:
    words = text.lower().split()
    return Counter(words).most_common(count)
```"""
FOLLOW_UP = "And how fast is that for a large file?"
TABLE = """With the whole file in memory, it is fine up to a few *hundred* megabytes:

| File | Words | Time |
| --- | ---: | ---: |
| 1 MB | 180 thousand | 0.04 s |
| 100 MB | 18 million | 4 s |

For more than that, go **line by line** and call `update` for each of them."""
WRITING = """Yes. Three things change:

1. Open the file and iterate over its lines instead of reading it.
2. Call `counter.update(…)` for each of"""


def main() -> None:
    """Everything, wide and narrow, light and dark."""
    program = chromium.find() or sys.exit(chromium.MISSING)
    HERE.mkdir(exist_ok=True)
    with Stack() as stack, sync_playwright() as playwright:
        stack.migrate()
        stack.start("api", "worker", "beat")
        browser = playwright.chromium.launch(executable_path=program, args=chromium.ARGUMENTS)
        try:
            for size, viewport in (("wide", chromium.WIDE), ("narrow", chromium.NARROW)):
                for theme in ("light", "dark"):
                    _tour(browser, stack, size, theme, viewport)
        finally:
            browser.close()


def _tour(browser: Browser, stack: Stack, size: str, theme: Any, viewport: Any) -> None:
    name, narrow = f"{size}-{theme}", size == "narrow"
    options = {"device_scale_factor": 2, "has_touch": True, "is_mobile": True} if narrow else {}
    context = browser.new_context(viewport=viewport, color_scheme=theme, base_url=stack.api.url, locale="en-GB", **options)
    page = context.new_page()

    def shoot(what: str) -> None:
        page.mouse.move(0, 0)
        page.evaluate(
            "Promise.all(document.getAnimations().filter((one) => one.effect.getTiming().iterations === 1).map((one) => one.finished))"
        )
        page.screenshot(path=HERE / f"{name}-{what}.png", caret="initial", animations="allow")

    page.goto("/")
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    page.get_by_label("Email").fill("ines@example.org")
    page.get_by_label("Password").fill(PASSWORD)
    if (size, theme) in (("wide", "light"), ("narrow", "dark")):
        shoot("sign-in")
    sign_up(context, f"ines.{name}@example.org")
    chat = ChatPage(page)
    for days, title in EARLIER:
        at = datetime.now(UTC) - timedelta(days=days)
        stack.store(chat.user_id, title, [(at, "user", title), (at + timedelta(seconds=9), "assistant", "…")])
    chat.open("/")
    expect(page.locator("#conversations a")).to_have_count(len(EARLIER))
    page.evaluate("document.activeElement.blur()")
    shoot("empty")
    _talk(chat, stack, shoot)
    if narrow:
        page.get_by_role("button", name="Open conversations").tap()
        shoot("drawer")
    context.close()


def _talk(chat: ChatPage, stack: Stack, shoot: Any) -> None:
    stack.script.will_say(*words(ANSWER))
    chat.talk(QUESTION, "most_common(count)")
    expect(chat.replies.locator(".hljs-keyword").first).to_be_visible()
    stack.script.will_say(*words(TABLE))
    chat.talk(FOLLOW_UP, "for each of them")
    expect(chat.state(1)).to_have_attribute("data-state", "committed")
    shoot("long")
    gate = Gate()
    stack.script.will_say(*words(WRITING), gate)
    chat.say("Can you show me what that changes?")
    expect(chat.replies.nth(2)).to_contain_text("for each of")
    expect(chat.state(2)).to_have_attribute("data-state", "committed")
    shoot("streaming")
    chat.stop.click()
    expect(chat.replies.nth(2)).to_contain_text("Cut short")
    gate.open()
    stack.script.will_say(Failure())
    chat.say("Go on, please.")
    expect(chat.log).to_contain_text("The model gave no reply")
    expect(chat.state(3)).to_have_attribute("data-state", "committed")
    expect(chat.page.locator("#conversations li.running")).to_have_count(0)
    chat.context.set_offline(True)
    chat.say("Are you there?")
    expect(chat.mine.last).to_have_attribute("data-state", "waiting")
    expect(chat.strip).to_be_visible()
    shoot("error")
    chat.context.set_offline(False)
    chat.finished(3, "Are you there?")


if __name__ == "__main__":
    main()
