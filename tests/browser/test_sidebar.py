"""The list of conversations, the way between them, and everything by keyboard."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from playwright.sync_api import Page, expect

from tests.browser.chromium import NARROW
from tests.browser.conftest import NewPage
from tests.browser.model import Failure, Gate, Model
from tests.browser.page import PASSWORD, ChatPage
from tests.browser.stack import Stack
from tests.people import until


class TestList:
    def test_open_back_forward_and_a_second_tab(self, chat: ChatPage, new_chat_page: NewPage) -> None:
        ids = [chat.fill([("user", f"Topic {name}")]) for name in "AB"]
        chat.row("Topic A").click()
        expect(chat.mine).to_have_text(re.compile("Topic A"))
        chat.row("Topic B").click()
        expect(chat.mine).to_have_text(re.compile("Topic B"))
        chat.page.go_back()
        expect(chat.mine).to_have_text(re.compile("Topic A"))
        expect(chat.row("Topic A")).to_have_attribute("aria-current", "page")
        chat.page.go_forward()
        expect(chat.mine).to_have_text(re.compile("Topic B"))
        expect(chat.page).to_have_url(re.compile(rf"/c/{ids[1]}$"))
        expect(new_chat_page(chat.context, f"/c/{ids[0]}").mine).to_have_text(re.compile("Topic A"))

    def test_latest_activity_first_and_more_on_scroll(self, chat: ChatPage) -> None:
        ids = [chat.fill([], title=f"Chat {number}") for number in range(70)]
        chat.page.reload()
        rows = chat.conversations.get_by_role("link")
        expect(rows).to_have_count(50)
        expect(rows.first).to_have_text("Chat 69")
        rows.last.scroll_into_view_if_needed()
        expect(rows).to_have_count(70)
        chat.api("POST", f"/api/conversations/{ids[0]}/messages", data={"role": "user", "content": "Awake again"})
        expect(rows.first).to_have_text("Chat 0")

    def test_groups(self, new_chat_page: NewPage, stack: Stack) -> None:
        chat = new_chat_page(timezone_id="UTC")
        noon = datetime.now(UTC).replace(hour=0, minute=0, second=1)
        for days in (0, 1, 2, 6, 45, 46, 110):
            stack.store(chat.user_id, f"{days} days ago", [(noon - timedelta(days=days), "user", "Something")])
        chat.page.reload()
        expect(chat.conversations.get_by_role("link")).to_have_count(7)
        groups = chat.conversations.locator("section").evaluate_all(
            "all => all.map((one) => [one.querySelector('h2').textContent, [...one.querySelectorAll('a')].map((a) => a.textContent)])"
        )
        expected: dict[str, list[str]] = {}
        for days in (0, 1, 2, 6, 45, 46, 110):
            group = {0: "Today", 1: "Yesterday", 2: "Last 7 days", 6: "Last 7 days"}.get(days) or f"{noon - timedelta(days=days):%B %Y}"
            expected.setdefault(group, []).append(f"{days} days ago")
        assert groups == [[name, titles] for name, titles in expected.items()]

    def test_open_one_stays_in_the_list_however_old_it_is(self, chat: ChatPage) -> None:
        oldest = chat.fill([("user", "The oldest of all")])
        for number in range(52):
            chat.fill([], title=f"Chat {number}")
        chat.page.route("**/api/events", lambda route: route.abort())
        chat.open(f"/c/{oldest}")
        expect(chat.row("The oldest of all")).to_have_attribute("aria-current", "page")
        for _ in range(2):  # without events, the list is read again and again
            with chat.page.expect_event("requestfinished", lambda request: "conversations/?limit" in request.url):
                pass
        expect(chat.row("The oldest of all")).to_have_attribute("aria-current", "page")

    def test_rename(self, chat: ChatPage) -> None:
        chat.talk("A first title")
        chat.row("A first title").hover()
        chat.page.get_by_role("button", name="Options for A first title").click()
        chat.page.get_by_role("button", name="Rename").click()
        chat.page.get_by_role("textbox", name="Title").fill("A better title")
        chat.page.keyboard.press("Enter")
        expect(chat.row("A better title")).to_be_focused()
        expect(chat.page.get_by_role("heading", level=1)).to_have_text("A better title")
        chat.talk("More words")
        chat.page.reload()
        expect(chat.row("A better title")).to_be_visible()

    def test_delete_and_undo(self, chat: ChatPage) -> None:
        conversation = chat.fill([("user", "Keep me after all")])
        chat.row("Keep me after all").focus()
        chat.page.keyboard.press("Delete")
        expect(chat.row("Keep me after all")).to_have_count(0)
        chat.page.get_by_role("button", name="Undo").click()
        expect(chat.row("Keep me after all")).to_be_visible()
        chat.row("Keep me after all").click()
        expect(chat.mine).to_have_count(1)
        chat.page.keyboard.press("Tab")
        chat.row("Keep me after all").press("Delete")
        expect(chat.messages).to_have_count(0)
        chat.page.reload()  # nobody can take it back any more
        expect(chat.page.get_by_role("button", name="Undo")).to_be_hidden()
        expect(chat.row("Keep me after all")).to_have_count(0)
        chat.page.wait_for_function(f"async () => (await fetch('/api/conversations/{conversation}')).status === 404")

    def test_undo_holds_although_a_second_tab_opens(self, chat: ChatPage, new_chat_page: NewPage) -> None:
        conversation = chat.fill([("user", "Keep me")])
        chat.row("Keep me").press("Delete")
        other = new_chat_page(chat.context)
        expect(other.conversations).to_contain_text("Your chats will be listed here.")
        chat.page.get_by_role("button", name="Undo").click()
        for tab in (chat, other):
            expect(tab.row("Keep me")).to_be_visible()
        assert chat.api("GET", f"/api/conversations/{conversation}")["title"] == "Keep me"

    def test_closing_the_page_settles_a_deletion(self, chat: ChatPage) -> None:
        conversation = chat.fill([("user", "Drop me")])
        chat.row("Drop me").press("Delete")
        expect(chat.page.get_by_role("button", name="Undo")).to_be_visible()
        chat.page.close()
        until(lambda: chat.context.request.get(f"/api/conversations/{conversation}").status == 404, "the server knows")

    def test_signing_out_settles_a_deletion(self, chat: ChatPage) -> None:
        conversation = chat.fill([("user", "Drop me")])
        page, email = chat.page, chat.page.locator("#who").inner_text()
        chat.row("Drop me").press("Delete")
        page.get_by_role("button", name="Sign out").click()
        page.get_by_label("Email").fill(email)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        expect(chat.conversations).to_contain_text("Your chats will be listed here.")
        assert chat.context.request.get(f"/api/conversations/{conversation}").status == 404

    def test_search_in_titles(self, chat: ChatPage) -> None:
        for number in range(60):
            chat.fill([], title=f"Apple {number}")
        chat.fill([], title="Pear")
        chat.page.reload()
        expect(chat.row("Pear")).to_be_visible()
        chat.page.keyboard.press("Control+k")
        search = chat.page.get_by_role("searchbox", name="Search conversations")
        expect(search).to_be_focused()
        search.fill("apple 0")
        expect(chat.conversations.get_by_role("link")).to_have_text(["Apple 0"])  # it was not on the first page
        search.press("Enter")
        expect(chat.page.get_by_role("heading", level=1)).to_have_text("Apple 0")
        search.fill("nothing like it")
        expect(chat.conversations).to_contain_text("Nothing is called that.")
        search.press("Escape")
        expect(chat.row("Pear")).to_be_visible()

    def test_draft_is_kept_for_each_chat(self, chat: ChatPage) -> None:
        chat.fill([("user", "One"), ("assistant", "Yes")])
        chat.fill([("user", "Two"), ("assistant", "Yes")])
        chat.row("One").click()
        chat.box.fill("for the first")
        chat.row("Two").click()
        expect(chat.box).to_have_value("")
        chat.box.fill("for the second")
        chat.page.reload()
        expect(chat.box).to_have_value("for the second")
        chat.row("One").click()
        expect(chat.box).to_have_value("for the first")


class TestKeys:
    def test_first_visit_by_keyboard(self, visitor: Page) -> None:
        visitor.goto("/")
        keys = visitor.keyboard
        expect(visitor.get_by_label("Email")).to_be_focused()
        keys.type(f"keys{datetime.now(UTC).timestamp()}@example.org")
        keys.press("Tab")
        keys.type(PASSWORD)
        keys.press("Tab")
        expect(visitor.get_by_role("button", name="Sign in")).to_be_focused()
        keys.press("Tab")
        expect(visitor.get_by_role("button", name="Sign up")).to_be_focused()
        keys.press("Enter")
        chat = ChatPage(visitor)
        expect(chat.box).to_be_focused()
        keys.type("No mouse here")
        keys.press("Enter")
        chat.finished(0, "You said: No mouse here")

    def test_menu_of_a_row_by_keyboard(self, chat: ChatPage) -> None:
        chat.fill([("user", "Menu me")])
        keys = chat.page.keyboard
        chat.row("Menu me").focus()
        keys.press("Tab")
        keys.press("Enter")
        expect(chat.page.get_by_role("button", name="Rename")).to_be_focused()
        keys.press("Escape")
        expect(chat.page.get_by_role("button", name="Options for Menu me")).to_be_focused()
        keys.press("Enter")
        keys.press("Tab")
        keys.press("Enter")
        expect(chat.row("Menu me")).to_have_count(0)
        expect(chat.page.get_by_role("button", name="Undo")).to_be_visible()

    def test_everything_by_keyboard(self, chat: ChatPage, model: Model) -> None:
        keys = chat.page.keyboard
        expect(chat.box).to_be_focused()
        keys.type("line one")
        keys.press("Shift+Enter")
        keys.type("line two")
        expect(chat.mine).to_have_count(0)
        gate = Gate()
        model.will_say("Going on ", gate)
        keys.press("Enter")
        expect(chat.mine.locator(".plain")).to_have_text("line one\nline two")
        expect(chat.replies).to_contain_text("Going on")
        keys.press("Escape")
        expect(chat.replies).to_contain_text("Cut short")
        gate.open()
        expect(chat.box).to_be_focused()
        keys.press("ArrowUp")
        expect(chat.box).to_have_value("line one\nline two")
        keys.press("Control+Shift+O")
        expect(chat.messages).to_have_count(0)
        expect(chat.box).to_be_focused()
        keys.press("Control+k")
        keys.press("ArrowDown")
        expect(chat.row("line one line two")).to_be_focused()
        keys.press("F2")
        keys.type("Renamed by keyboard")
        keys.press("Enter")
        expect(chat.row("Renamed by keyboard")).to_be_focused()
        keys.press("Enter")
        expect(chat.messages).to_have_count(2)
        expect(chat.box).to_be_focused()

    def test_every_control_is_reached_by_tab_and_shows_it(self, chat: ChatPage) -> None:
        chat.fill([("user", "A chat"), ("assistant", "```js\nlet x\n```")])
        chat.row("A chat").click()
        expect(chat.messages).to_have_count(2)
        chat.page.evaluate("document.activeElement.blur()")
        reached: set[str] = set()
        for _ in range(25):
            chat.page.keyboard.press("Tab")
            name, outlined = chat.page.evaluate("""() => {
                const on = document.activeElement;
                const style = getComputedStyle(on);
                const frame = getComputedStyle(document.getElementById("composer"));
                const seen = style.outlineStyle !== "none" || (on.id === "message" && frame.borderColor !== "rgba(0, 0, 0, 0)");
                return [on.ariaLabel || on.textContent.trim(), seen || on === document.body];
            }""")
            assert outlined, name
            reached.add(name)
        wanted = {
            "New chat",
            "Search conversations",
            "A chat",
            "Options for A chat",
            "Dark theme",
            "Sign out",
            "Messages",
            "Message",
            "Copy code",
        }
        assert wanted <= reached

    def test_enter_in_a_composition_does_not_send(self, chat: ChatPage) -> None:
        session = chat.context.new_cdp_session(chat.page)
        chat.box.focus()
        session.send("Input.imeSetComposition", {"text": "にほん", "selectionStart": 3, "selectionEnd": 3})
        chat.box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
        chat.box.dispatch_event("keydown", {"key": "Enter", "keyCode": 229})
        expect(chat.mine).to_have_count(0)
        session.send("Input.insertText", {"text": "日本"})
        expect(chat.box).to_have_value("日本")
        chat.box.press("Enter")
        chat.finished(0, "You said: 日本")


class TestPhone:
    def test_drawer(self, new_chat_page: NewPage) -> None:
        chat = new_chat_page(viewport=NARROW, has_touch=True, is_mobile=True)
        chat.talk("From a phone")
        expect(chat.conversations).to_be_hidden()
        chat.page.get_by_role("button", name="Open conversations").tap()
        expect(chat.row("From a phone")).to_be_in_viewport()
        expect(chat.page.get_by_role("button", name="Close conversations")).to_be_focused()
        chat.page.keyboard.press("Escape")
        expect(chat.conversations).to_be_hidden()
        expect(chat.page.get_by_role("button", name="Open conversations")).to_be_focused()
        chat.page.get_by_role("button", name="Open conversations").tap()
        chat.page.get_by_role("button", name="New chat").tap()
        expect(chat.conversations).to_be_hidden()
        expect(chat.messages).to_have_count(0)
        assert chat.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")

    def test_targets_are_large_enough(self, new_chat_page: NewPage, model: Model) -> None:
        chat = new_chat_page(viewport=NARROW, has_touch=True, is_mobile=True)
        model.will_say("Broken", Failure())
        chat.talk("```js\nlet x\n```", "Broken")
        assert too_small(chat.page) == [], "a reply that was cut short"
        model.will_say(Failure())
        chat.say("And this?")
        expect(chat.log).to_contain_text("The model gave no reply")
        chat.context.set_offline(True)
        chat.say("Not sent")
        expect(chat.mine.last).to_have_attribute("data-state", "waiting")
        assert too_small(chat.page) == [], "a reply that failed, and a message that waits"
        chat.context.set_offline(False)
        chat.page.get_by_role("button", name="Open conversations").tap()
        assert too_small(chat.page) == [], "the drawer"
        chat.page.get_by_role("button", name=re.compile("Options for")).tap()
        assert too_small(chat.page) == [], "the menu"
        chat.page.get_by_role("button", name="Delete").tap()
        expect(chat.page.get_by_role("button", name="Undo")).to_be_visible()
        assert too_small(chat.page) == [], "undo"
        chat.page.get_by_role("button", name="Open conversations").tap()
        chat.page.get_by_role("button", name="Sign out").tap()
        expect(chat.page.get_by_role("button", name="Sign in")).to_be_visible()
        assert too_small(chat.page) == [], "signing in"


def too_small(page: Page) -> list[list[object]]:
    """What can be tapped and is smaller than 44 px."""
    sizes: list[list[object]] = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, nav a")]
        .filter((one) => one.checkVisibility({ visibilityProperty: true }) && (one.offsetWidth < 44 || one.offsetHeight < 44))
        .map((one) => [one.ariaLabel || one.textContent.trim(), one.offsetWidth, one.offsetHeight])""")
    return sizes
