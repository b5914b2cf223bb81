"""What a person sees, and does not lose, when something is away."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import BrowserContext, Route, expect

from tests.browser.conftest import NewPage
from tests.browser.model import Gate, Model, words
from tests.browser.page import PASSWORD, ChatPage, sign_up
from tests.browser.stack import Stack
from tests.processes import frozen_server


def test_api_killed_in_the_middle_of_a_reply(chat: ChatPage, stack: Stack, model: Model) -> None:
    gate = Gate()
    model.will_say(*words("This was said before it died,"), gate, "and this never.")
    chat.say("Carry on")
    expect(chat.replies).to_contain_text("before it died,")
    stack.api.kill()
    gate.open()
    expect(chat.strip).to_contain_text("cannot be reached")
    chat.say("Are you back?")
    stack.api.start()
    expect(chat.replies.first).to_contain_text("Cut short", timeout=40_000)  # the turn's lease has to run out
    chat.finished(1, "You said: Are you back?")
    expect(chat.strip).to_be_hidden()
    assert chat.texts() == ["Carry on", "This was said before it died,", "Are you back?", "You said: Are you back?"]


def test_redis_away_and_back(chat: ChatPage, stack: Stack) -> None:
    chat.talk("Before")
    stack.valkey.kill()
    try:
        chat.say("Meanwhile")
        expect(chat.strip).to_contain_text("cannot save anything right now")
        expect(chat.mine.nth(1)).to_have_attribute("data-state", "waiting")
    finally:
        stack.valkey.start()
    chat.finished(1, "You said: Meanwhile")
    expect(chat.strip).to_be_hidden()
    chat.page.reload()
    expect(chat.messages).to_have_count(4)
    assert chat.texts() == ["Before", "You said: Before", "Meanwhile", "You said: Meanwhile"]


def test_postgres_away_and_the_chat_goes_on(chat: ChatPage, stack: Stack) -> None:
    chat.talk("While it is there")
    expect(chat.state(0)).to_have_attribute("data-state", "committed")
    with frozen_server(stack.postgres):
        chat.talk("While it is away")
        expect(chat.state(1)).to_have_attribute("data-state", "pending")
        chat.page.reload()
        expect(chat.messages).to_have_count(4)
        expect(chat.state(1)).to_have_attribute("data-state", "pending")
        expect(chat.conversations).to_contain_text("The list cannot be loaded right now.")
    expect(chat.state(1)).to_have_attribute("data-state", "committed", timeout=60_000)
    expect(chat.row("While it is there")).to_be_visible()


def test_message_sent_offline_goes_out_once(chat: ChatPage) -> None:
    chat.talk("Online")
    chat.context.set_offline(True)
    expect(chat.strip).to_contain_text("You are offline")
    chat.say("One")
    chat.say("Two")
    expect(chat.mine.nth(2)).to_have_attribute("data-state", "waiting")
    assert chat.page.evaluate("Object.keys(localStorage).filter((name) => name.includes(':outbox:')).length") == 2
    chat.context.set_offline(False)
    chat.finished(2, "You said: Two")
    expect(chat.strip).to_be_hidden()
    assert chat.texts() == ["Online", "You said: Online", "One", "You said: One", "Two", "You said: Two"]
    chat.page.reload()
    expect(chat.messages).to_have_count(6)
    assert chat.page.evaluate("Object.keys(localStorage).filter((name) => name.includes(':outbox:')).length") == 0


def test_what_was_written_offline_outlives_its_page_and_goes_out_with_its_key(chat: ChatPage) -> None:
    chat.talk("Online")
    path = f"/c/{chat.conversation_id}"
    chat.context.set_offline(True)
    chat.say("One")
    chat.say("Two")
    expect(chat.mine.nth(2)).to_have_attribute("data-state", "waiting")
    names = chat.page.evaluate("Object.keys(localStorage).filter((name) => name.includes(':outbox:'))")
    chat.page.close()
    chat.context.set_offline(False)
    page, sent = chat.context.new_page(), []
    page.on("request", lambda request: sent.append(request.headers.get("idempotency-key")) if request.method == "POST" else None)
    again = ChatPage(page)
    again.open(path)
    again.finished(2, "You said: Two")
    expect(again.messages).to_have_count(6)
    assert again.texts() == ["Online", "You said: Online", "One", "You said: One", "Two", "You said: Two"]
    assert sorted(sent) == sorted(name.rpartition(":")[2] for name in names)


def test_new_chat_begun_offline_survives_a_lost_answer_and_a_reload(chat: ChatPage) -> None:
    lost = 0

    def lose_the_answer(route: Route) -> None:
        """The server takes it, and the browser never hears of it."""
        nonlocal lost
        lost += 1
        kept = {name: value for name, value in route.request.headers.items() if name in ("idempotency-key", "content-type")}
        chat.context.request.post(route.request.url, data=route.request.post_data, headers=kept | {"Sec-Fetch-Site": "same-origin"})
        route.abort()

    chat.page.route(re.compile("/api/chat/.*"), lose_the_answer)
    chat.say("Only once, please")
    expect(chat.mine).to_have_attribute("data-state", "waiting")
    chat.page.unroute(re.compile("/api/chat/.*"))
    chat.page.reload()
    chat.finished(0, "You said: Only once, please")
    assert lost >= 1
    assert chat.texts() == ["Only once, please", "You said: Only once, please"]
    assert len(chat.api("GET", "/api/conversations/")["items"]) == 1


def test_without_an_event_stream_the_page_asks(new_context: Callable[..., BrowserContext], new_chat_page: NewPage) -> None:
    context = new_context()
    context.route("**/api/events", lambda route: route.fulfill(status=404, json={"detail": "There is nothing at this address."}))
    sign_up(context)
    chat = new_chat_page(context)
    chat.talk("One")
    expect(chat.state(0)).to_have_attribute("data-state", "committed")
    chat.api("POST", f"/api/conversations/{chat.conversation_id}/messages", data={"role": "user", "content": "Two, from elsewhere"})
    expect(chat.mine.nth(1)).to_contain_text("Two, from elsewhere")


def test_signing_out_with_something_unsent_asks_first(chat: ChatPage) -> None:
    chat.talk("Online")
    chat.context.set_offline(True)
    chat.say("Not yet")
    expect(chat.mine.nth(1)).to_have_attribute("data-state", "waiting")
    asked: list[str] = []
    chat.page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    chat.page.get_by_role("button", name="Sign out").click()
    assert asked == ["One message has not been sent and would be lost. Sign out all the same?"]
    chat.context.set_offline(False)
    chat.finished(1, "You said: Not yet")


def test_message_that_is_refused_can_be_edited(chat: ChatPage) -> None:
    chat.say("x" * 100_001)
    expect(chat.mine).to_have_attribute("data-state", "failed")
    expect(chat.mine).to_contain_text("must have at most 100000 characters")
    chat.mine.get_by_role("button", name="Edit").click()
    expect(chat.mine).to_have_count(0)
    assert len(chat.box.input_value()) == 100_001
    chat.box.fill("Shorter")
    chat.box.press("Enter")
    chat.finished(0, "You said: Shorter")


def test_refused_message_is_tried_again_with_its_key(chat: ChatPage) -> None:
    chat.talk("Taken")
    keys: list[str] = []

    def refuse(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        route.fulfill(status=413, json={"type": "about:blank", "title": "Too large", "status": 413, "detail": "Not today."})

    chat.page.route(re.compile("/message$"), refuse)
    chat.say("Refused at first")
    expect(chat.mine.nth(1)).to_have_attribute("data-state", "failed")
    expect(chat.mine.nth(1)).to_contain_text("Not today.")
    chat.page.unroute(re.compile("/message$"))
    chat.page.reload()
    expect(chat.mine.nth(1)).to_have_attribute("data-state", "failed")  # it is not forgotten
    with chat.page.expect_request(re.compile("/message$")) as request:
        chat.mine.nth(1).get_by_role("button", name="Retry").click()
    chat.finished(1, "You said: Refused at first")
    assert [request.value.headers["idempotency-key"]] == keys


def test_history_that_cannot_be_loaded_now_comes_by_itself(chat: ChatPage) -> None:
    conversation = chat.fill([("user", f"Line {number}. " + "word " * 30) for number in range(80)])
    refusals = 2

    def refuse(route: Route) -> None:
        nonlocal refusals
        refusals -= 1
        if refusals < 0:
            return route.continue_()
        return route.fulfill(status=503, headers={"Retry-After": "2"}, json={"type": "about:blank", "status": 503, "detail": "Away."})

    chat.page.route(re.compile(r"/messages\?limit"), refuse)
    chat.page.route(re.compile("before="), lambda route: route.abort())
    chat.open(f"/c/{conversation}")
    expect(chat.log).to_contain_text("This chat cannot be loaded right now.")
    expect(chat.messages).to_have_count(50)
    chat.log.evaluate("log => { log.scrollTop = 0; }")
    again = chat.page.get_by_role("button", name="Older messages could not be loaded. Try again")
    expect(again).to_be_visible()
    chat.page.unroute(re.compile("before="))
    again.click()
    expect(chat.messages).to_have_count(80)


def test_session_that_ends_asks_to_sign_in_and_loses_nothing(chat: ChatPage) -> None:
    chat.talk("Before it ended")
    expect(chat.state(0)).to_have_attribute("data-state", "committed")
    email = chat.page.locator("#who").inner_text()
    chat.context.clear_cookies()
    chat.say("After it ended")
    page = chat.page
    expect(page.get_by_role("alert")).to_contain_text("Your session has ended")
    expect(page.get_by_label("Email")).to_have_value(email)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    chat.finished(1, "You said: After it ended")
    assert len(chat.texts()) == 4
