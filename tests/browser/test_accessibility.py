"""axe on every view, light and dark, wide and narrow: it finds nothing."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests import schema
from tests.browser.chromium import NARROW, WIDE
from tests.browser.conftest import NewPage
from tests.browser.model import Failure, Gate, Model
from tests.browser.page import ChatPage

HERE = Path(__file__).parent
AXE = (HERE / "vendor" / "axe.js").read_text(encoding="utf-8")
RICH = '''# A heading

Some **bold** and `inline` words, a [link](https://example.org), and a list:

1. one
2. two

> A quotation.

```python
# a comment
@cache
def answer(n: int = 42) -> str:
    """Says it."""
    return f"{n}" if True else None
```

| a | b |
| --- | --- |
| 1 | 2 |'''
EDGE = """(name) => {
    const box = document.querySelector(name);
    return [getComputedStyle(box).borderTopColor, getComputedStyle(box).backgroundColor];
}"""
"""The colours of a field's outline and of the field."""
VIEWS = [
    pytest.param({"viewport": WIDE, "color_scheme": "light"}, id="wide-light"),
    pytest.param({"viewport": WIDE, "color_scheme": "dark"}, id="wide-dark"),
    pytest.param({"viewport": NARROW, "color_scheme": "light", "has_touch": True}, id="narrow-light"),
    pytest.param({"viewport": NARROW, "color_scheme": "dark", "has_touch": True}, id="narrow-dark"),
]


def barriers(page: Page) -> list[Any]:
    """What axe finds, all rules on."""
    page.evaluate(
        "Promise.all(document.getAnimations().filter((one) => one.effect.getTiming().iterations === 1).map((one) => one.finished))"
    )
    page.evaluate(AXE + "; undefined")
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    return [(rule["id"], [(node["html"][:160], node["failureSummary"]) for node in rule["nodes"]]) for rule in found["violations"]]


@pytest.mark.parametrize("options", VIEWS)
def test_no_barriers_in_the_chat(new_chat_page: NewPage, model: Model, options: dict[str, Any]) -> None:
    chat = new_chat_page(**options)
    assert barriers(chat.page) == [], "a new chat"
    model.will_say(*RICH.splitlines(keepends=True))
    chat.talk("Show me everything", "A quotation.")
    expect(chat.replies.locator(".hljs-keyword").first).to_be_visible()
    assert barriers(chat.page) == [], "a reply"
    gate = Gate()
    model.will_say("Writing ", gate)
    chat.say("And now?")
    expect(chat.stop).to_be_visible()
    expect(chat.replies.nth(1)).to_contain_text("Writing")
    assert barriers(chat.page) == [], "a reply that is being written"
    chat.stop.click()
    expect(chat.replies.nth(1)).to_contain_text("Cut short")
    gate.open()
    model.will_say(Failure())
    chat.say("And then?")
    expect(chat.log).to_contain_text("The model gave no reply")
    assert barriers(chat.page) == [], "a reply that failed"
    chat.context.set_offline(True)
    chat.say("Hello?")
    expect(chat.mine.last).to_have_attribute("data-state", "waiting")
    assert barriers(chat.page) == [], "offline"


@pytest.mark.parametrize("options", VIEWS)
def test_no_barriers_around_it(new_chat_page: NewPage, options: dict[str, Any]) -> None:
    chat = new_chat_page(**options)
    chat.fill([("user", "Something to delete"), ("assistant", "Yes")])
    narrow = options["viewport"] is NARROW
    if narrow:
        chat.page.get_by_role("button", name="Open conversations").click()
    expect(chat.row("Something to delete")).to_be_visible()
    assert barriers(chat.page) == [], "the list"
    chat.row("Something to delete").hover()
    chat.page.get_by_role("button", name=re.compile("Options for")).click()
    assert barriers(chat.page) == [], "the menu"
    chat.page.get_by_role("button", name="Rename").click()
    assert barriers(chat.page) == [], "renaming"
    chat.page.keyboard.press("Escape")
    chat.page.keyboard.press("Delete")
    expect(chat.page.get_by_role("button", name="Undo")).to_be_visible()
    assert barriers(chat.page) == [], "undo"
    chat.page.goto("/c/12345")
    expect(chat.log).to_contain_text("There is no such chat.")
    assert barriers(chat.page) == [], "not found"
    if narrow:
        chat.page.get_by_role("button", name="Open conversations").click()
    chat.page.get_by_role("button", name="Sign out").click()
    page = chat.page
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    assert barriers(page) == [], "signing in"
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).not_to_be_empty()
    assert barriers(page) == [], "a wrong password"


def test_chosen_theme_is_kept(chat: ChatPage) -> None:
    chat.page.get_by_role("button", name="Dark theme").click()
    dark = "getComputedStyle(document.body).backgroundColor"
    colour = chat.page.evaluate(dark)
    chat.page.reload()
    assert chat.page.evaluate(dark) == colour
    assert chat.page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_nothing_moves_for_those_who_asked_for_it(new_chat_page: NewPage, model: Model) -> None:
    chat = new_chat_page(reduced_motion="reduce", viewport=NARROW, has_touch=True)
    chat.page.get_by_role("button", name="Open conversations").click()
    assert chat.page.evaluate("document.getAnimations().length") == 0
    expect(chat.row("nothing")).to_have_count(0)
    chat.page.keyboard.press("Escape")
    gate = Gate()
    model.will_say("Slowly ", gate)
    chat.say("Go")
    expect(chat.replies).to_contain_text("Slowly")
    assert chat.page.evaluate("document.getAnimations().length") == 0
    gate.open()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_outlines_of_what_one_writes_in_are_seen(new_context: Any, new_chat_page: NewPage, scheme: str) -> None:
    """3:1 for the edges of fields and for the mark of the open chat (WCAG 1.4.11); axe looks at text only."""
    stranger = new_context(color_scheme=scheme).new_page()
    stranger.goto("/")
    chat = new_chat_page(color_scheme=scheme)
    chat.talk("Mark me")
    seen = [
        *(stranger.evaluate(EDGE, name) for name in ("#email", "#password")),
        *(chat.page.evaluate(EDGE, name) for name in ("#composer", "#search")),
    ]
    chat.page.get_by_role("searchbox").focus()
    seen[-1] = chat.page.evaluate(EDGE, "#search")
    bar = "getComputedStyle(document.querySelector('#conversations [aria-current]').parentElement, '::before').backgroundColor"
    seen.append([chat.page.evaluate(bar), chat.page.evaluate("getComputedStyle(document.getElementById('sidebar')).backgroundColor")])
    assert [pair for pair in seen if contrast(*pair) < 3] == []


def contrast(one: str, other: str) -> float:
    """Of two colours as a browser computes them, after WCAG."""
    lights = sorted(_light([int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]) for colour in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _light(parts: list[float]) -> float:
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_vendored_files_are_what_the_list_says() -> None:
    for listing in (schema.ROOT / "api/static/vendor/VENDOR.md", HERE / "vendor" / "VENDOR.md"):
        rows = re.findall(r"\| (\S+) \| (\d+) \| `([0-9a-f]{64})` \|", listing.read_text(encoding="utf-8"))
        assert {name for name, _, _ in rows} == {path.name for path in listing.parent.iterdir()} - {"VENDOR.md", "refresh.py"}
        for name, size, digest in rows:
            content = (listing.parent / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (int(size), digest), name
