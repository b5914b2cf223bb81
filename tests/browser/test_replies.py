"""From the first visit to the first reply, and everything that can happen while a reply is being written."""

from __future__ import annotations

import re
import time

from playwright.sync_api import Page, expect

from tests.browser.conftest import NewPage
from tests.browser.model import Failure, Gate, Model, words
from tests.browser.page import PASSWORD, ChatPage
from tests.browser.stack import Stack

WATCH_SHIFTS = """() => {
    window.shifts = [];
    const box = ({ x, y, width, height }) => [x, y, width, height].map(Math.round).join(" ");
    const told = ({ node, previousRect, currentRect }) => `${node?.className ?? node} from ${box(previousRect)} to ${box(currentRect)}`;
    new PerformanceObserver((list) => {
        for (const { sources } of list.getEntries()) {
            // What stands below growing text moves down with it; nothing else may.
            const moved = sources.filter(({ node }) => !node?.closest?.("article:last-child > footer"));
            if (moved.length) shifts.push(moved.map(told));
        }
    }).observe({ type: "layout-shift", buffered: false });
}"""
LONG = " ".join(f"word{number}" for number in range(400))


class TestFirstVisit:
    def test_from_nothing_to_a_reply(self, visitor: Page) -> None:
        started = time.monotonic()
        visitor.goto("/")
        visitor.get_by_role("textbox", name="Email").fill("New.Person@example.org")
        visitor.get_by_label("Password").fill(PASSWORD)
        visitor.get_by_role("button", name="Sign up").click()
        chat = ChatPage(visitor)
        expect(chat.box).to_be_focused()
        chat.say("Hello, is anybody there?")
        chat.finished(0, "You said: Hello, is anybody there?")
        assert time.monotonic() - started < 10
        expect(visitor).to_have_url(re.compile(r"/c/\d+$"))
        expect(chat.row("Hello, is anybody there?")).to_have_attribute("aria-current", "page")
        expect(visitor).to_have_title("Hello, is anybody there? · Chatkeep")

    def test_wrong_password_then_sign_in_and_out(self, chat: ChatPage) -> None:
        page = chat.page
        email = page.locator("#who").inner_text()
        page.get_by_role("button", name="Sign out").click()
        for password, told in (("short", "8 to 128"), ("not the password", "Wrong e-mail address or password.")):
            page.get_by_label("Email").fill(email)
            page.get_by_label("Password").fill(password)
            page.get_by_role("button", name="Sign in").click()
            expect(page.get_by_role("alert")).to_contain_text(told)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign up").click()  # the address is taken, but the password is right
        expect(chat.box).to_be_visible()
        assert [cookie["httpOnly"] and cookie["sameSite"] == "Lax" for cookie in page.context.cookies()] == [True, True]
        assert "eyJ" not in page.evaluate("JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie])")


class TestSending:
    def test_state_goes_from_sending_to_stored(self, chat: ChatPage, stack: Stack) -> None:
        seen = chat.page.evaluate_handle("""() => {
            const seen = [];
            new MutationObserver(() => {
                const state = document.querySelector("article.user")?.dataset.state;
                if (state && seen.at(-1) !== state) seen.push(state);
            }).observe(document.getElementById("thread"), { subtree: true, childList: true, attributes: true });
            return seen;
        }""")
        chat.talk("Watch the tick")
        expect(chat.state(0)).to_have_attribute("data-state", "committed")
        expect(chat.state(0)).to_contain_text("Stored")
        assert seen.json_value() == ["sending", "pending", "committed"]

    def test_reload_at_once_and_open_from_the_list(self, chat: ChatPage) -> None:
        chat.say("Do not lose me")
        expect(chat.mine).to_have_count(1)
        chat.page.reload()
        chat.new_chat.click()
        expect(chat.messages).to_have_count(0)
        chat.row("Do not lose me").click()
        chat.finished(0, "You said: Do not lose me")
        assert chat.texts() == ["Do not lose me", "You said: Do not lose me"]

    def test_message_sent_while_a_reply_runs_goes_out_after_it(self, chat: ChatPage, model: Model) -> None:
        gate = Gate()
        model.will_say("One. ", gate, "Two.")
        chat.say("first")
        gate.wait_until_reached()
        chat.say("second")
        expect(chat.mine.nth(1)).to_contain_text("Goes out after this reply")
        gate.open()
        chat.finished(1, "You said: second")
        assert chat.texts() == ["first", "One. Two.", "second", "You said: second"]


class TestWhileItIsWritten:
    def test_reload_in_the_middle_and_the_reply_goes_on(self, chat: ChatPage, model: Model) -> None:
        gate = Gate()
        model.will_say(*words("The first half,"), gate, *words("and the second."))
        chat.say("Tell me")
        expect(chat.replies).to_contain_text("The first half,")
        chat.page.reload()
        expect(chat.replies).to_contain_text("The first half,")
        expect(chat.replies).to_have_attribute("aria-busy", "true")
        expect(chat.stop).to_be_visible()
        gate.open()
        chat.finished(0, "The first half, and the second.")
        assert len(chat.texts()) == 2

    def test_stop_keeps_what_was_written(self, chat: ChatPage, model: Model) -> None:
        gate = Gate()
        model.will_say(*words("This much"), gate, "and no more.")
        chat.say("Talk for ever")
        expect(chat.replies).to_contain_text("This much")
        chat.stop.click()
        expect(chat.replies).to_contain_text("Cut short")
        expect(chat.stop).to_be_hidden()
        expect(chat.send).to_be_visible()
        gate.open()
        chat.page.reload()
        expect(chat.replies).to_contain_text("Cut short")
        assert chat.texts() == ["Talk for ever", "This much"]

    def test_failed_reply_is_tried_again_with_the_same_message(self, chat: ChatPage, model: Model) -> None:
        model.will_say(Failure())
        chat.say("Are you well?")
        expect(chat.log).to_contain_text("The model gave no reply")
        expect(chat.state(0)).to_have_attribute("data-state", re.compile("pending|committed"))
        chat.page.reload()
        expect(chat.log).to_contain_text("The model gave no reply")  # also later
        chat.log.get_by_role("button", name="Retry").click()
        chat.finished(0, "You said: Are you well?")
        assert chat.texts() == ["Are you well?", "You said: Are you well?"]

    def test_reply_that_breaks_off_says_why_and_can_be_tried_again(self, chat: ChatPage, model: Model) -> None:
        model.will_say(*words("Half of it"), Failure())
        chat.say("Tell me all")
        expect(chat.replies.first).to_contain_text("Cut short")
        expect(chat.strip).to_contain_text("The model broke off. What it had said is kept")
        chat.page.reload()
        expect(chat.replies.first).to_contain_text("Cut short")
        chat.replies.get_by_role("button", name="Try again").click()
        chat.finished(1, "You said: Tell me all")
        assert chat.texts() == ["Tell me all", "Half of it", "Tell me all", "You said: Tell me all"]
        expect(chat.page.get_by_role("button", name="Try again")).to_have_count(0)

    def test_nothing_moves_while_it_is_written(self, chat: ChatPage, model: Model) -> None:
        chat.page.evaluate(WATCH_SHIFTS)
        text = "Some **bold** words.\n\n- one\n- two\n\n```python\nprint('hello')\n```\n\n" + LONG
        model.will_say(*words(text))
        chat.say("Write at length")
        chat.finished(0, "word399")
        assert chat.page.evaluate("shifts") == []
        box = chat.log.evaluate("log => [log.scrollTop + log.clientHeight, log.scrollHeight]")
        assert abs(box[0] - box[1]) < 2  # and the end of it is in sight

    def test_new_messages_button_while_one_reads_further_up(self, chat: ChatPage, model: Model) -> None:
        chat.page.goto(f"/c/{chat.fill([('user', LONG), ('assistant', LONG)] * 3)}")
        gate = Gate()
        model.will_say(gate, *words(LONG))
        chat.say("More")
        gate.wait_until_reached()
        chat.log.hover()
        chat.page.mouse.wheel(0, -2000)
        expect(chat.page.get_by_role("button", name=re.compile("Latest|New messages"))).to_be_visible()
        before = chat.log.evaluate("log => log.scrollTop")
        gate.open()
        button = chat.page.get_by_role("button", name="New messages")
        chat.finished(3, "word399")
        assert chat.log.evaluate("log => log.scrollTop") == before
        button.click()
        expect(button).to_be_hidden()
        expect(chat.replies.nth(3).get_by_role("button", name="Copy")).to_be_in_viewport()

    def test_one_announcer_and_no_token_in_a_live_region(self, chat: ChatPage, model: Model) -> None:
        gate = Gate()
        model.will_say(*words("Word by word"), gate, "it grows.")
        chat.say("Speak")
        expect(chat.replies).to_contain_text("Word by word")
        expect(chat.log).to_have_attribute("aria-live", "off")
        assert chat.page.locator("[aria-live]:not([aria-live=off]), [role=status], [role=alert]:visible").count() == 1
        voice = chat.page.get_by_role("status")
        expect(voice).to_have_text("Chatkeep is replying.")
        gate.open()
        expect(voice).to_have_text("Chatkeep: Word by word it grows.")


class TestElsewhere:
    def test_two_tabs_see_the_same(self, chat: ChatPage, new_chat_page: NewPage, model: Model) -> None:
        chat.talk("From the first tab")
        other = new_chat_page(chat.context, f"/c/{chat.conversation_id}")
        expect(other.messages).to_have_count(2)
        gate = Gate()
        model.will_say(*words("Both of you"), gate, "see this.")
        other.say("From the second tab")
        expect(chat.mine.nth(1)).to_have_text(re.compile("From the second tab"))
        expect(chat.replies.nth(1)).to_contain_text("Both of you")
        expect(chat.stop).to_be_visible()
        gate.open()
        for tab in (chat, other):
            tab.finished(1, "Both of you see this.")
            expect(tab.state(1)).to_have_attribute("data-state", "committed")
            assert tab.texts() == ["From the first tab", "You said: From the first tab", "From the second tab", "Both of you see this."]

    def test_two_tabs_that_write_at_once_end_with_the_same(self, chat: ChatPage, new_chat_page: NewPage, model: Model) -> None:
        chat.talk("Before")
        other = new_chat_page(chat.context, f"/c/{chat.conversation_id}")
        expect(other.messages).to_have_count(2)
        gate = Gate()
        model.will_say("To the first. ", gate, "All of it.")
        chat.box.fill("From the first")
        other.box.fill("From the second")
        for tab in (chat, other):
            tab.box.press("Enter")
        gate.wait_until_reached()
        gate.open()
        for tab in (chat, other):
            expect(tab.messages).to_have_count(6)
            tab.finished(2, "You said: From the ")
        assert chat.texts() == other.texts()
        assert chat.texts()[3] == "To the first. All of it."

    def test_reply_of_another_tab_that_ends_before_this_ones_question_is_taken(self, chat: ChatPage, model: Model) -> None:
        """This tab's message is on its way all the time that the other reply is written, so it reads no stream of it."""
        chat.talk("Before")
        path, held = f"/api/chat/{chat.conversation_id}/message", []
        chat.page.route("**" + path, lambda route: held.append(route))  # noqa: PLW0108 - Playwright takes no built-in
        with chat.page.expect_request("**" + path):
            chat.say("Slow to leave")
        chat.api("POST", path, data={"message": "From elsewhere"})
        held[0].continue_()
        chat.finished(2, "You said: Slow to leave")
        expect(chat.messages).to_have_count(6)
        assert chat.texts()[2:4] == ["From elsewhere", "You said: From elsewhere"]

    def test_other_device_sees_new_chats_titles_and_deletions(self, chat: ChatPage, new_chat_page: NewPage) -> None:
        other = new_chat_page(chat.context)
        chat.talk("A chat about bees")
        expect(other.row("A chat about bees")).to_be_visible()
        chat.api("PATCH", f"/api/conversations/{chat.conversation_id}", data={"title": "Bees"})
        for tab in (chat, other):
            expect(tab.row("Bees")).to_be_visible()
        chat.api("DELETE", f"/api/conversations/{chat.conversation_id}")
        for tab in (chat, other):
            expect(tab.row("Bees")).to_have_count(0)
        expect(chat.messages).to_have_count(0)

    def test_words_outlive_a_chat_that_is_deleted_elsewhere(self, chat: ChatPage, model: Model) -> None:
        gate = Gate()
        model.will_say("Yes ", gate)
        chat.say("A chat that goes")
        gate.wait_until_reached()
        chat.say("Said meanwhile")
        expect(chat.mine.nth(1)).to_have_attribute("data-state", "waiting")
        chat.box.fill("and half a thought")
        chat.api("DELETE", f"/api/conversations/{chat.conversation_id}")
        expect(chat.strip).to_contain_text("This chat was deleted.")
        expect(chat.box).to_have_value("Said meanwhile\n\nand half a thought")
        expect(chat.messages).to_have_count(0)
        gate.open()

    def test_chat_that_was_deleted_while_offline(self, chat: ChatPage, new_chat_page: NewPage) -> None:
        chat.talk("Soon gone")
        conversation = chat.conversation_id
        phone = new_chat_page(chat.context)
        chat.page.route("**/api/events", lambda route: route.abort())  # its event is missed
        chat.page.reload()
        expect(chat.messages).to_have_count(2)
        phone.api("DELETE", f"/api/conversations/{conversation}")
        expect(chat.messages).to_have_count(0)
        expect(chat.row("Soon gone")).to_have_count(0)

    def test_new_message_from_elsewhere_while_one_reads_further_up(self, chat: ChatPage) -> None:
        conversation = chat.fill([("user", LONG), ("assistant", LONG)] * 3)
        chat.open(f"/c/{conversation}")
        expect(chat.messages).to_have_count(6)
        chat.log.hover()
        chat.page.mouse.wheel(0, -2000)
        expect(chat.page.get_by_role("button", name="Latest")).to_be_visible()
        before = chat.log.evaluate("log => log.scrollTop")
        chat.api("POST", f"/api/conversations/{conversation}/messages", data={"role": "user", "content": "From afar"})
        chat.page.get_by_role("button", name="New messages").click()
        expect(chat.mine.last).to_contain_text("From afar")
        expect(chat.mine.last).to_be_in_viewport()
        assert before < chat.log.evaluate("log => log.scrollTop")

    def test_signing_out_signs_out_the_other_tab(self, chat: ChatPage, new_chat_page: NewPage) -> None:
        chat.talk("Private matters")
        other = new_chat_page(chat.context)
        expect(other.row("Private matters")).to_be_visible()
        chat.page.get_by_role("button", name="Sign out").click()
        for tab in (chat, other):
            expect(tab.page.get_by_role("button", name="Sign in")).to_be_visible()
            expect(tab.page.get_by_role("status")).to_be_empty()
            for trace in ("Private matters", '@example.org"'):
                assert trace not in tab.page.content()
        assert chat.page.evaluate("Object.keys(localStorage)") == []

    def test_two_users_never_meet(self, chat: ChatPage, new_chat_page: NewPage) -> None:
        stranger = new_chat_page()
        chat.talk("My secret garden")
        stranger.page.goto(f"/c/{chat.conversation_id}")
        expect(stranger.log).to_contain_text("There is no such chat.")
        expect(stranger.conversations).not_to_contain_text("garden")
        stranger.talk("My own words")
        expect(chat.conversations).not_to_contain_text("My own words")
        assert stranger.conversation_id != chat.conversation_id
