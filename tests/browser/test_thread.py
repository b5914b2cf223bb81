"""Reading: old messages, days, code, other scripts, and text that means harm."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from playwright.sync_api import Error, Route, expect

from tests.browser.conftest import NewPage, Record
from tests.browser.model import Model
from tests.browser.page import ChatPage
from tests.browser.stack import Stack

MANY = 5000
HOSTILE = """<script>window.harmed = 1</script><img src="https://evil.example/beacon.png" onerror="window.harmed = 2">
<iframe srcdoc="<script>parent.harmed = 3</script>"></iframe><svg onload="window.harmed = 4"><style>body{display:none}</style>

[click me](javascript:window.harmed=5) [or me](JAVASCRIPT&colon;harmed=6)
[data](data:text/html,<script>harmed=7</script>) [here](/api/auth/me)
![beacon](https://evil.example/beacon.png "x") <a href="https://evil.example" target=_top onclick=harmed=8>raw</a>
<https://good.example/?q="><script>harmed=9</script>> <b><i></b></table></div></article></main>

```html"><script>harmed=10</script>
<script>window.harmed = 11</script>
```

| a <img src=x onerror=harmed=12> | b |
| --- | --- |
| [x](vbscript:harmed=13) | `<script>harmed=14</script>` |"""


MIDDLE = """log => {
    const { left, top, width, height } = log.getBoundingClientRect();
    return document.elementFromPoint(left + width / 2, top + height / 2).closest("article").innerText.match(/Line \\d+\\./)[0];
}"""
"""The beginning of the message in the middle of what is seen."""


def settle(chat: ChatPage, first: str = "") -> None:
    """Lets the browser come to rest: messages are laid out when they come near, which moves those above."""
    chat.log.evaluate(f"""async (log) => {{
        let still = 0;
        for (let before = null; still < 3;) {{
            {first};
            await new Promise(requestAnimationFrame);
            const now = `${{log.scrollTop}} ${{log.scrollHeight}}`;
            still = now === before ? still + 1 : 0;
            before = now;
        }}
    }}""")


class TestHistory:
    def test_five_thousand_messages_scrolled_to_the_top(self, chat: ChatPage, stack: Stack) -> None:
        begun = datetime.now(UTC) - timedelta(days=10)
        said = ["The very first", *(f"Message {number}. " + "Some words. " * (number % 40) for number in range(MANY - 2)), "The very last"]
        minutes = [(begun + timedelta(minutes=at), "assistant" if at % 2 else "user", text) for at, text in enumerate(said)]
        chat.open(f"/c/{stack.store(chat.user_id, 'Long ago', minutes)}")
        expect(chat.messages.last).to_contain_text("The very last")
        expect(chat.messages.last).to_be_in_viewport()
        messages, log = chat.page.locator("article"), chat.page.locator("#messages")  # by role, each look would take seconds
        pages = 0
        while chat.page.locator(".older").count():
            before = messages.count()
            log.evaluate("log => { log.scrollTop = 0; }")
            chat.page.wait_for_function("before => document.querySelectorAll('article').length > before", arg=before)
            pages += 1
        assert messages.count() == MANY
        assert pages <= MANY / 200 + 1
        expect(messages.first).to_contain_text("The very first")
        log.evaluate("log => { log.scrollTop = 0; }")
        expect(messages.first).to_be_in_viewport()
        ids = messages.evaluate_all("all => all.map((one) => Number(one.dataset.id))")
        assert ids == sorted(set(ids))
        chat.page.locator("#jump").click()
        expect(messages.last).to_be_in_viewport()

    def test_older_messages_come_and_what_one_reads_stays_in_place(self, chat: ChatPage) -> None:
        conversation = chat.fill([("user", f"Line {number}. " + "word " * (number % 60)) for number in range(120)])
        chat.open(f"/c/{conversation}")
        expect(chat.messages).to_have_count(50)
        held: list[Route] = []
        chat.page.route(re.compile("before="), lambda route: held.append(route))  # noqa: PLW0108 - Playwright takes no built-in
        with chat.page.expect_request(re.compile("before=")):
            settle(chat, "log.scrollTop = 300")
        reading = chat.messages.filter(has_text=chat.log.evaluate(MIDDLE))
        before = reading.bounding_box()
        held[0].continue_()
        expect(chat.messages).to_have_count(120)
        settle(chat)
        after = reading.bounding_box()
        assert before is not None
        assert after is not None
        assert abs(after["y"] - before["y"]) <= 1
        expect(chat.messages.first).to_contain_text("Line 0.")

    def test_days_are_marked(self, new_chat_page: NewPage) -> None:
        chat = new_chat_page(timezone_id="Europe/Berlin")
        chat.talk("Said today")
        expect(chat.log.get_by_role("heading", name="Today")).to_be_visible()
        chat.page.clock.set_system_time(datetime.now(UTC) + timedelta(days=1))
        chat.page.reload()
        expect(chat.log.get_by_role("heading", name="Yesterday")).to_be_visible()
        expect(chat.conversations.get_by_role("heading", name="Yesterday")).to_be_visible()

    def test_earlier_days_are_marked_by_their_dates(self, new_chat_page: NewPage, stack: Stack) -> None:
        chat = new_chat_page(timezone_id="UTC")
        noon = datetime.now(UTC).replace(hour=0, minute=0, second=1)
        days = (150, 3, 3, 1, 0)
        said = [(noon - timedelta(days=ago) + timedelta(seconds=at), "user", f"{ago} days ago") for at, ago in enumerate(days)]
        chat.open(f"/c/{stack.store(chat.user_id, 'For long', said)}")
        expect(chat.messages).to_have_count(5)
        marks = chat.log.locator("h2").all_inner_texts()
        assert [mark.replace(",", "") for mark in marks[:2]] == [
            f"{day:%A} {day.day} {day:%B}" + (f" {day.year}" if day.year != noon.year else "")
            for day in (noon - timedelta(days=150), noon - timedelta(days=3))
        ]
        assert marks[2:] == ["Yesterday", "Today"]


class TestText:
    def test_hostile_text_does_nothing(self, chat: ChatPage, model: Model) -> None:
        asked: list[str] = []
        chat.page.on("request", lambda request: asked.append(request.url))
        model.will_say(*HOSTILE.splitlines(keepends=True))
        chat.say(HOSTILE)
        chat.finished(0, "<script>window.harmed = 1</script>")  # as text
        chat.page.reload()
        chat.finished(0, "<script>window.harmed = 1</script>")
        assert chat.mine.locator(".body").inner_text().startswith("<script>window.harmed = 1</script>")
        assert chat.page.evaluate("window.harmed") is None
        assert not [url for url in asked if "evil" in url]
        assert chat.log.locator("script, img, iframe, svg:not([aria-hidden]), style, table table, [onerror], [onclick]").count() == 0
        links = chat.log.locator("a").evaluate_all("all => all.map((one) => [one.protocol, one.rel, one.target])")
        assert links
        assert {tuple(link) for link in links} == {("https:", "noopener noreferrer nofollow", "_blank")}
        expect(chat.box).to_be_visible()

    def test_not_even_our_own_scripts_can_write_html(self, chat: ChatPage, record: Record) -> None:
        with pytest.raises(Error, match="TrustedHTML"):
            chat.page.evaluate("document.body.innerHTML = '<b>no</b>'")
        chat.page.evaluate("document.head.append(Object.assign(document.createElement('style'), { textContent: 'body { opacity: 0 }' }))")
        assert chat.page.evaluate("getComputedStyle(document.body).opacity") == "1"
        assert [violation.partition(":")[0] for violation in record.violations] == ["require-trusted-types-for", "style-src-elem"]
        record.clear()  # and so it would have been seen in any other test

    def test_markdown_code_and_copy(self, chat: ChatPage, model: Model) -> None:
        chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
        code = "def greet(name):\n    return f'Hello, {name}'"
        text = f"# A title\n\n3. **first**\n4. *second*\n\n```python\n{code}\n```\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |"
        model.will_say(*text.splitlines(keepends=True))
        chat.talk("Show me", "A title")
        reply = chat.replies
        expect(reply.get_by_role("heading", name="A title")).to_be_visible()
        expect(reply.get_by_role("listitem")).to_have_count(2)
        expect(reply.get_by_role("list")).to_have_attribute("start", "3")
        expect(reply.get_by_role("cell")).to_have_text(["1", "2"])
        expect(reply.get_by_role("cell").nth(1)).to_have_css("text-align", "end")
        expect(reply.locator(".hljs-keyword").first).to_have_text("def")
        reply.get_by_role("button", name="Copy code").click()
        expect(reply.get_by_role("button", name="Copied")).to_be_visible()
        assert chat.page.evaluate("navigator.clipboard.readText()") == code
        reply.get_by_role("button", name="Copy", exact=True).click()
        chat.page.wait_for_function("async (text) => (await navigator.clipboard.readText()) === text", arg=text)

    def test_everything_is_ours_and_colours_come_with_the_first_code(self, chat: ChatPage, model: Model) -> None:
        asked: list[str] = []
        chat.page.on("request", lambda request: asked.append(request.url))
        chat.page.reload()
        chat.talk("No code yet")
        assert not [url for url in asked if "highlight" in url]
        model.will_say("```js\nlet x\n```")
        chat.talk("Now some", "let x")
        expect(chat.replies.locator(".hljs-keyword")).to_have_text("let")
        assert [url for url in asked if "highlight" in url]
        origin = chat.page.evaluate("location.origin")
        assert [url for url in asked if not url.startswith(origin + "/")] == []

    def test_copying_where_the_clipboard_is_withheld(self, chat: ChatPage) -> None:
        chat.talk("Copy me")
        chat.page.evaluate("() => { navigator.clipboard.writeText = async () => { throw new DOMException('no', 'NotAllowedError'); }; }")
        copied = chat.page.evaluate_handle("""() => {
            const copied = [];
            addEventListener("copy", () => copied.push(document.activeElement.value ?? getSelection().toString()));
            return copied;
        }""")
        button = chat.replies.get_by_role("button", name=re.compile("^(Copy|Copied)$"))
        button.click()
        expect(button).to_have_text("Copied")
        assert copied.json_value() == ["You said: Copy me "]
        expect(button).to_be_focused()

    def test_a_second_look_at_a_reply_leaves_its_button_alone(self, chat: ChatPage) -> None:
        foot = chat.page.evaluate("""async () => {
            const { MessageView } = await import("/static/app/message.js");
            const message = { id: 1, content: "x", created_at: "2026-01-01T00:00:00Z", state: "pending", status: "complete" };
            const view = new MessageView("assistant");
            view.update(message);
            document.body.append(view.element);
            const button = view.element.querySelector(".copy");
            button.focus();
            button.lastElementChild.textContent = "Copied";
            view.update({ ...message, state: "committed" });
            const kept = [button === document.activeElement, button.isConnected, view.foot.textContent.endsWith("Copied")];
            view.element.remove();
            return kept;
        }""")
        assert foot == [True, True, True]

    def test_own_text_stays_as_it_was_written(self, chat: ChatPage) -> None:
        text = "  *not* emphasised\n\n\n1) no list    and   spaces\n```js\nlet x = '<b>';\n```\nend"
        chat.talk(text, "You said:")
        chat.page.reload()
        expect(chat.messages).to_have_count(2)
        assert chat.mine.locator(".plain").all_text_contents() == ["  *not* emphasised\n\n\n1) no list    and   spaces", "end"]
        assert chat.mine.locator("pre").text_content() == "let x = '<b>';"

    def test_long_words_and_right_to_left(self, chat: ChatPage, model: Model) -> None:
        model.will_say("مرحبا بالعالم\n\n", "- واحد\n- اثنان\n\n", "x" * 3000)
        chat.talk("שלום עולם " + "y" * 3000, "مرحبا")
        assert chat.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        assert chat.log.evaluate("log => log.scrollWidth <= log.clientWidth")
        directions = chat.log.evaluate("log => [...log.querySelectorAll('.body > *')].map((one) => getComputedStyle(one).direction)")
        assert directions == ["rtl", "rtl", "rtl", "ltr"]
