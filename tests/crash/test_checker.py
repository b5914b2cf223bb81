"""The checker: a history that keeps the promise has no violation, and each way of breaking it has the one that is meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.crash.checker import ConversationRow, Final, MessageRow, check
from tests.crash.history import Item, Listed, Operation

ANN, BEN = 1, 2
TALK = 100


class Past:
    """Two people, one conversation of Ann's with three messages, and what is left of it at the end."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.now = 0.0
        self.did("create", ANN, conversation=TALK, key="c")
        for number, text in ((101, "one"), (102, "two"), (103, "three")):
            self.said(number, text)
        self.paged(101, 102, 103)
        self.did("list", ANN, conversations=[Listed(TALK, "", "2026-11-21T10:00:00Z")], limit=100)
        self.did("probe", BEN, "fail", conversation=TALK, status=404, note="not found")
        self.did("probe", BEN, "fail", conversation=999, status=404, note="not found")
        self.final = Final(
            conversations=[ConversationRow(TALK, ANN, "", False, "k:c")],
            messages=[MessageRow(TALK, n, ANN, "user", t, key=f"k:{t}") for n, t in ((101, "one"), (102, "two"), (103, "three"))],
        )

    def did(self, kind: Any, user: int, outcome: Any = "ok", **fields: Any) -> Operation:
        self.now += 1
        one = Operation(len(self.operations), kind, user, self.now, outcome=outcome, ended=self.now + 0.5, **fields)
        self.operations.append(one)
        return one

    def said(self, number: int, text: str, user: int = ANN, **fields: Any) -> Operation:
        given = {"conversation": TALK, "text": text, "key": text, "messages": [Item(number, text, "user", "pending")]}
        return self.did("append", user, **(given | fields))

    def paged(self, *numbers: int, state: str = "committed", **fields: Any) -> Operation:
        texts = {101: "one", 102: "two", 103: "three"}
        shown = [Item(number, texts.get(number, f"text {number}"), "user", state) for number in numbers]
        return self.did("page", ANN, **({"conversation": TALK, "messages": shown, "limit": 50} | fields))

    def found(self) -> set[int]:
        return {violation.invariant for violation in check(self.operations, self.final)}


def change(rows: list[Any], at: int, **fields: Any) -> None:
    rows[at] = replace(rows[at], **fields)


def deleted(past: Past) -> None:
    past.did("delete", ANN, conversation=TALK)
    past.final.conversations, past.final.messages = [ConversationRow(TALK, ANN, "", True, "k:c")], []


def deleted_and_read(past: Past) -> None:
    deleted(past)
    past.paged(101, 102, 103)


def twice(past: Past) -> None:
    past.said(104, "two", replayed=True)
    past.final.messages.append(MessageRow(TALK, 104, ANN, "user", "two"))


def overtaken(past: Past) -> None:
    past.said(90, "late")
    past.final.messages.insert(0, MessageRow(TALK, 90, ANN, "user", "late"))


def phantom(past: Past) -> None:
    past.paged(101, 102, 103, 104)
    past.final.messages.append(MessageRow(TALK, 104, ANN, "user", "text 104"))


def refused_and_there(past: Past) -> None:
    past.did("append", ANN, "fail", conversation=TALK, text="text 104", status=422)
    phantom(past)


def together(past: Past, *numbers: int, outcome: Any = "ok", there: bool = True, **fields: Any) -> Operation:
    """Three messages that Ann sends together; what is there of them at the end has these ids."""
    texts = ["text 104", "text 105", "text 106"]
    shown = [Item(number, text, "user", "pending") for number, text in zip(numbers, texts, strict=False)] if outcome == "ok" else []
    if there:
        past.final.messages += [MessageRow(TALK, number, ANN, "user", text) for number, text in zip(numbers, texts, strict=False)]
    given = {"conversation": TALK, "text": texts[0], "also": [(text, "user") for text in texts[1:]], "key": "b", "messages": shown}
    return past.did("append", ANN, outcome, **(given | fields))


def together_items(last: int) -> list[Item]:
    return [Item(number, f"text {number}", "user", "pending") for number in range(104, last + 1)]


def split_by_another(past: Past) -> None:
    together(past, 104, 105, 107)
    past.said(106, "another")
    past.final.messages.append(MessageRow(TALK, 106, ANN, "user", "another"))


def torn_in_a_page(past: Past) -> None:
    unheard(past)
    past.paged(101, 102, 103, 104)
    past.paged(101, 102, 103, 104, 105, 106)


def unheard(past: Past) -> None:
    """All three are there, and nobody was told."""
    together(past, 104, 105, 106, outcome="info")


def torn_by_an_end(past: Past) -> None:
    """The page reaches further than what it shows."""
    unheard(past)
    past.paged(102, 103, 104, before=107, has_older=True)
    past.paged(104, 105, 106, after=103, has_older=True)


def shorter_is_accepted(past: Past) -> None:
    first = together(past, 104, 105, 106)
    together(past, also=first.also[:1], messages=first.messages[:2], replayed=True)


def retry_is_refused(past: Past, outcome: str) -> None:
    together(past, 104, 105, 106, outcome=outcome)
    together(past, outcome="fail", status=422)


BROKEN: dict[str, tuple[int, Callable[[Past], Any]]] = {
    "a page lacks what was acknowledged": (1, lambda past: past.paged(101, 103)),
    "a page ends too early": (1, lambda past: past.paged(102, 103)),
    "Postgres lacks what was acknowledged": (1, lambda past: past.final.messages.pop()),
    "Postgres lacks the conversation": (1, lambda past: (past.final.conversations.clear(), past.final.messages.clear())),
    "a conversation is not found": (1, lambda past: past.did("page", ANN, "fail", conversation=TALK, status=404)),
    "a list lacks it": (1, lambda past: past.did("list", ANN, limit=100)),
    "nobody wrote it": (2, phantom),
    "it was refused": (2, refused_and_there),
    "one message has two ids": (3, twice),
    "a key is accepted for another text": (3, lambda past: past.said(101, "another", key="one")),
    "two conversations have one id": (3, lambda past: past.did("create", ANN, conversation=TALK)),
    "a later one has a lower id": (4, overtaken),
    "a page is out of order": (4, lambda past: past.paged(102, 101, 103)),
    "committed becomes pending": (5, lambda past: past.paged(101, 102, 103, state="pending")),
    "a page says that it is the last": (6, lambda past: past.paged(101, before=102, has_newer=False)),
    "a page holds more than was asked for": (6, lambda past: past.paged(101, 102, 103, limit=2)),
    "another user is let in": (7, lambda past: past.did("probe", BEN, conversation=TALK, title="GET")),
    "another user reads it": (7, lambda past: past.did("get", BEN, conversation=TALK)),
    "a probe is told from nothing": (7, lambda past: past.did("probe", BEN, "fail", conversation=TALK, status=404, note="not yours")),
    "another's list shows it": (7, lambda past: past.did("list", BEN, conversations=[Listed(TALK, "", "x")], limit=100)),
    "the deleted is read": (8, deleted_and_read),
    "it is gone, and nobody deleted it": (8, lambda past: change(past.final.conversations, 0, deleted=True)),
    "another text is read": (9, lambda past: past.said(101, "other", key="", messages=[Item(101, "one", "user", "pending")])),
    "a row is another's": (10, lambda past: change(past.final.messages, 0, user=BEN)),
    "a conversation is another's": (10, lambda past: change(past.final.conversations, 0, user=BEN)),
    "the log is not empty": (11, lambda past: setattr(past.final, "log_entries", 1)),
    "a key lasts": (11, lambda past: past.final.lasting_keys.append("ck:{s00}:c:1")),
    "what must be refused is acknowledged": (12, lambda past: past.said(104, "NUL", refused=True)),
    "a dead letter that nobody planted": (14, lambda past: past.final.dead_letters.append("1-0")),
    "poison that is not a dead letter": (14, lambda past: past.final.poison.add("1-0")),
    "of a batch, Postgres lacks one that was acknowledged": (1, lambda past: together(past, 104, 105, messages=together_items(106))),
    "of a batch, one has two ids": (3, lambda past: (together(past, 104, 105, 106), together(past, 104, 105, 107, there=False))),
    "a key is accepted for a shorter batch": (3, shorter_is_accepted),
    "the retry of an acknowledged batch is refused": (3, lambda past: retry_is_refused(past, "ok")),
    "the retry of an unanswered batch is refused": (3, lambda past: retry_is_refused(past, "info")),
    "a batch is in another order": (4, lambda past: together(past, 105, 104, 106, outcome="info")),
    "of a batch, not all are acknowledged": (9, lambda past: together(past, 104, 105)),
    "a batch is acknowledged in another order": (9, lambda past: together(past, 104, 105, 106, messages=together_items(106)[::-1])),
    "a page shows half a batch": (15, torn_in_a_page),
    "a page reaches beyond half a batch": (15, torn_by_an_end),
    "Postgres has half a batch": (15, lambda past: together(past, 104, 105, outcome="info")),
    "others stand in a batch": (16, split_by_another),
}


def test_kept_promise_has_no_violation() -> None:
    assert Past().found() == set()


@pytest.mark.parametrize("what", BROKEN)
def test_broken_promise_is_found(what: str) -> None:
    invariant, spoil = BROKEN[what]
    past = Past()
    spoil(past)
    assert invariant in past.found()


def test_unknown_outcomes_may_have_had_an_effect_or_not() -> None:
    for there in (False, True):
        past = Past()
        past.did("append", ANN, "info", conversation=TALK, text="text 104", key="k")
        if there:
            phantom(past)
        assert past.found() == set()


def test_batch_is_there_as_a_whole_or_not_at_all() -> None:
    for numbers in ((104, 105, 106), ()):
        past = Past()
        together(past, *numbers, outcome="info")
        past.paged(101, 102, 103, *numbers)
        assert past.found() == set()


def test_page_may_end_within_a_batch() -> None:
    past = Past()
    together(past, 104, 105, 106)
    together(past, 104, 105, 106, there=False, replayed=True)
    past.paged(105, 106, limit=2, has_older=True)
    past.paged(103, 104, limit=2, before=105, has_older=True, has_newer=True)
    past.paged(105, limit=1, after=104, has_older=True, has_newer=True)
    assert past.found() == set()


def test_key_of_an_unanswered_batch_may_be_that_of_another() -> None:
    """The first never arrived; then the shorter one was the first under the key."""
    past = Past()
    first = together(past, outcome="info")
    together(past, 104, 105, also=first.also[:1])
    together(past, outcome="fail", status=422)
    assert past.found() == set()


def test_deletion_is_allowed() -> None:
    past = Past()
    deleted(past)
    assert past.found() == set()


def test_lists_may_show_what_was_judged_before() -> None:
    past = Past()
    past.did("list", ANN, conversations=[Listed(50, "", "z"), Listed(TALK, "", "a")], limit=100)
    assert past.found() == {2}
    assert check(past.operations, past.final, frozenset({50})) == []
