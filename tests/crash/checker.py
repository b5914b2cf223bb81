"""Says whether a history keeps the promise. Plain Python over operations and the state at the end; linear, but for sorting.

The invariants, numbered as they are reported:

 1 durability    what was acknowledged is in every read that began afterwards and covers it, and in Postgres at the end
 2 no phantom    nothing is read or stored that nobody asked for, and nothing that was refused
 3 once          a retry key, and a message, has one id, in every answer, read and row; no two conversations have one; no retry is refused
 4 order         acknowledged before the other was sent: the lower id; every answer is in the order of ids
 5 no way back   what a read has shown, no later read lacks; committed never becomes pending again
 6 paging        the walks by pages, backwards and forwards, equal the whole; `has_older` and `has_newer` are true
 7 isolation     nothing of one user in an answer to another; a probe is answered as what does not exist
 8 deletion      what was deleted does not come back, and nothing else disappears
 9 content       the same text as was sent
10 integrity     no message without its conversation, no owner but the conversation's
11 empty log     at the end nothing is pending, nothing without an expiry is left, memory is back at its base
12 honesty       no acknowledgement while it could not be kept, none for what must be refused, and no call that hangs
13 no wedge      everything works again by itself
14 dead letters  exactly the planted poison
15 together      of messages that were sent together, all are there or none: in every read, as far as it reaches, and in Postgres
16 neighbours    no other message stands between messages that were sent together

A read is a page, and a page says which ids it covers: from its first item (or the beginning, if nothing is older) to `before`, or from
`after` to its last item (or the end). Whatever is known to be in there before the page was asked for has to be in it.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.crash.history import Item, Operation

EVER = float("inf")
LAST_ID = 1 << 62


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise."""

    invariant: int
    what: str

    def __str__(self) -> str:
        return f"[{self.invariant}] {self.what}"


@dataclass(frozen=True, slots=True)
class MessageRow:
    """A row of `message`; `text` is a digest."""

    conversation: int
    id: int
    user: int
    role: str
    text: str
    status: str = "complete"
    key: str | None = None


@dataclass(frozen=True, slots=True)
class ConversationRow:
    """A row of `conversation`; `title` is a digest, '' for none."""

    id: int
    user: int
    title: str
    deleted: bool
    key: str | None = None


@dataclass(slots=True)
class Final:
    """How things are at the end, when everything works and is quiet."""

    conversations: list[ConversationRow] = field(default_factory=list)
    messages: list[MessageRow] = field(default_factory=list)
    dead_letters: list[str] = field(default_factory=list)
    """Ids of log entries."""
    poison: set[str] = field(default_factory=set)
    log_entries: int = 0
    log_bytes: int = 0
    lasting_keys: list[str] = field(default_factory=list)
    """Keys without an expiry that should have one or be gone."""
    troubles: list[Violation] = field(default_factory=list)
    """What whoever made this saw by itself: hangs, wedges, leaks, memory."""


def check(operations: Iterable[Operation], final: Final | None, earlier: frozenset[int] = frozenset()) -> list[Violation]:
    """Every violation that is found (of one kind at one place only the first). Without `final`, only what the answers say.

    `earlier` are conversations of a history that was judged before: lists still show them.
    """
    index = _Index(list(operations))
    found = [*index.violations]
    for conversation in index.by_conversation.values():
        found += _check_conversation(conversation)
    found += _check_keys(index)
    found += _check_lists(index, earlier)
    found += _check_probes(index)
    if final is not None:
        found += _check_final(index, final)
    return found


@dataclass(slots=True)
class _Conversation:
    """Everything that was done to a conversation."""

    id: int
    owner: int
    created: float
    """When its creation was acknowledged."""
    operations: list[Operation] = field(default_factory=list)
    texts: dict[str, list[Operation]] = field(default_factory=lambda: defaultdict(list))
    """Attempts to say something, by what."""
    replies: bool = False
    """Whether the server itself may have written something (a turn)."""
    known: dict[int, tuple[float, str]] = field(default_factory=dict)
    """Message id: since when somebody has been told of it, and its text."""
    acknowledged: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Message id: text and role of what was acknowledged."""
    ids: dict[str, int] = field(default_factory=dict)
    """Text: the id it was seen under."""
    deleted: float = EVER
    """When the first deletion was acknowledged."""
    deleting: float = EVER
    """When the first deletion was sent that may have had an effect."""
    batches: dict[str, _Batch] = field(default_factory=dict)
    """Text: what it was sent together with."""


@dataclass(slots=True)
class _Batch:
    """Messages that were sent together, once or several times under one key: each time perhaps another list, of which one was taken."""

    attempts: list[Operation] = field(default_factory=list)

    def texts(self) -> set[str]:
        return {text for one in self.attempts for text, _ in one.said}

    def lists(self) -> list[list[str]]:
        """What may be there: the texts that were acknowledged, or those of each attempt that may have had an effect."""
        acknowledged = [one for one in self.attempts if one.outcome == "ok"]
        return [[text for text, _ in one.said] for one in acknowledged or self.attempts if one.outcome != "fail"]


class _Index:
    """The operations, sorted into conversations."""

    def __init__(self, operations: list[Operation]) -> None:
        self.operations = operations
        self.violations: list[Violation] = []
        self.by_conversation: dict[int, _Conversation] = {}
        self.unknown_creations: dict[int, int] = defaultdict(int)
        """User: creations that may have had an effect under an id that nobody was told."""
        for one in operations:
            if one.refused and one.outcome == "ok":
                self.violations.append(Violation(12, f"op {one.op}: {one.kind} was acknowledged, but had to be refused ({one.note})"))
            if one.kind == "create":
                self._note_creation(one)
        for one in operations:
            if one.conversation and one.kind not in ("create", "probe"):
                self._note(one)
        for known in self.by_conversation.values():
            _note_batches(known)

    def _note_creation(self, one: Operation) -> None:
        if one.outcome == "info":
            self.unknown_creations[one.user] += 1
        if one.outcome != "ok":
            return
        known = self.by_conversation.setdefault(one.conversation, _Conversation(one.conversation, one.user, one.ended or EVER))
        if known.owner != one.user:
            self.violations.append(Violation(7, f"conversation {one.conversation} was created for users {known.owner} and {one.user}"))
        elif known.operations and not (one.key and one.key == known.operations[0].key):
            self.violations.append(Violation(3, f"op {one.op}: conversation {one.conversation} is that of op {known.operations[0].op}"))
        known.created = min(known.created, one.ended or EVER)
        known.operations.append(one)

    def _note(self, one: Operation) -> None:
        if one.conversation not in self.by_conversation:  # found in a list: its creation was never answered
            self.by_conversation[one.conversation] = _Conversation(one.conversation, one.user, EVER)
        known = self.by_conversation[one.conversation]
        known.operations.append(one)
        if one.kind in ("append", "turn"):
            for text, _ in one.said:
                known.texts[text].append(one)
            known.replies |= one.kind == "turn"
        elif one.kind == "delete" and one.outcome != "fail":
            known.deleting = min(known.deleting, one.started)
            if one.outcome == "ok":
                known.deleted = min(known.deleted, one.ended or EVER)


def _note_batches(one: _Conversation) -> None:
    by_key: dict[str | int, _Batch] = defaultdict(_Batch)
    for operation in one.operations:
        if operation.kind == "append":
            by_key[operation.key or operation.op].attempts.append(operation)
    for batch in by_key.values():
        if any(operation.also for operation in batch.attempts):
            one.batches |= dict.fromkeys(batch.texts(), batch)


# One conversation


def _check_conversation(one: _Conversation) -> Iterator[Violation]:
    yield from _check_owner(one)
    yield from _learn(one)
    yield from _check_order(one)
    yield from _check_existence(one)
    yield from _check_pages(one)
    yield from _check_batches(one, {number: text for number, (_, text) in one.known.items()}, "the answers")
    yield from _check_states(one)


def _check_owner(one: _Conversation) -> Iterator[Violation]:
    for operation in one.operations:
        if operation.user != one.owner and operation.outcome == "ok":
            yield Violation(7, f"op {operation.op}: user {operation.user} was served conversation {one.id} of user {one.owner}")


def _learn(one: _Conversation) -> Iterator[Violation]:
    """Fills `known`, `acknowledged` and `ids`; every id has one text and every text one id, and somebody asked for it."""
    ids = one.ids
    for operation in one.operations:
        if operation.outcome != "ok":
            continue
        said = operation.kind in ("append", "turn")
        for item in operation.messages:
            before = one.known.get(item.id)
            if before is not None and before[1] != item.text:
                yield Violation(9, f"op {operation.op}: message {item.id} of conversation {one.id} has another text than before")
            one.known[item.id] = min(before[0] if before else EVER, operation.ended or EVER), item.text
            if said:
                one.acknowledged[item.id] = item.text, item.role
            if item.text in one.texts:
                if ids.setdefault(item.text, item.id) != item.id:
                    yield Violation(3, f"op {operation.op}: the same message has the ids {ids[item.text]} and {item.id} ({one.id})")
                yield from _check_origin(one, operation, item)
            elif not (one.replies and item.role == "assistant"):
                yield Violation(2, f"op {operation.op}: nobody wrote message {item.id} of conversation {one.id}")
        asked = [text for text, _ in operation.said]
        answered = [item.text for item in operation.messages]
        if said and asked != (answered[:1] if operation.kind == "turn" else answered):  # to a turn the server adds its reply
            yield Violation(9, f"op {operation.op}: the answer holds other texts than were sent ({one.id})")


def _check_origin(one: _Conversation, operation: Operation, item: Item) -> Iterator[Violation]:
    attempts = one.texts[item.text]
    if all(attempt.outcome == "fail" for attempt in attempts):
        how = ", ".join(f"op {attempt.op}: {attempt.kind} {attempt.status} {attempt.note}" for attempt in attempts)
        yield Violation(2, f"op {operation.op}: message {item.id} of conversation {one.id} was refused, and is there ({how})")
    elif all(attempt.started > (operation.ended or EVER) for attempt in attempts):
        yield Violation(2, f"op {operation.op}: message {item.id} of conversation {one.id} is there before it was sent")
    if item.role != dict(attempts[0].said)[item.text]:
        yield Violation(9, f"op {operation.op}: message {item.id} of conversation {one.id} has changed its role")


def _check_order(one: _Conversation) -> Iterator[Violation]:
    """What was acknowledged before another was first sent has the lower id."""
    ends = sorted(
        (operation.ended or EVER, item.id)
        for operation in one.operations
        if operation.kind in ("append", "turn") and operation.outcome == "ok"
        for item in operation.messages
    )
    starts = sorted(
        (min(attempt.started for attempt in attempts), number)
        for text, attempts in one.texts.items()
        if (number := one.ids.get(text)) is not None
    )
    at, highest = 0, 0
    for started, number in starts:
        while at < len(ends) and ends[at][0] < started:
            highest = max(highest, ends[at][1])
            at += 1
        if number <= highest:
            yield Violation(4, f"message {number} of conversation {one.id} was sent after {highest} was acknowledged")
    for operation in one.operations:
        numbers = [item.id for item in operation.messages]
        if numbers != sorted(set(numbers)):
            yield Violation(4, f"op {operation.op}: the ids of conversation {one.id} are not in order: {numbers[:8]}")


def _check_existence(one: _Conversation) -> Iterator[Violation]:
    """There from its creation to its deletion, and never again."""
    for operation in one.operations:
        if operation.user != one.owner or operation.kind == "create":
            continue
        if operation.outcome == "ok" and operation.started > one.deleted and operation.kind != "delete":
            yield Violation(8, f"op {operation.op}: {operation.kind} found conversation {one.id} after it was deleted")
        gone = operation.status == 404 and operation.started > one.created
        if gone and one.deleting > (operation.ended or EVER):
            yield Violation(1, f"op {operation.op}: {operation.kind} did not find conversation {one.id}, which nobody deleted")


def _check_pages(one: _Conversation) -> Iterator[Violation]:
    pages = sorted(
        (operation for operation in one.operations if operation.kind == "page" and operation.outcome == "ok"), key=lambda page: page.started
    )
    appearing = sorted((since, number) for number, (since, _) in one.known.items())
    known: list[int] = []
    at = 0
    for page in pages:
        while at < len(appearing) and appearing[at][0] < page.started:
            bisect.insort(known, appearing[at][1])
            at += 1
        yield from _check_page(one, page, known)


def _check_page(one: _Conversation, page: Operation, known: list[int]) -> Iterator[Violation]:
    low, high = covered(page)
    shown = {item.id for item in page.messages}
    expected = known[bisect.bisect_right(known, low) : bisect.bisect_left(known, high)]
    lacking = [number for number in expected if number not in shown]
    if lacking:
        acknowledged = [number for number in lacking if number in one.acknowledged]
        what = "acknowledged" if acknowledged else "read before"
        yield Violation(
            1 if acknowledged else 5,
            f"op {page.op}: a page of conversation {one.id} lacks {len(lacking)} messages that were {what} ({lacking[:4]})",
        )
    yield from _check_torn(one, page, low, high)
    if any(not low < number < high for number in shown):
        yield Violation(6, f"op {page.op}: a page of conversation {one.id} holds messages that were not asked for")
    if page.before is not None and not page.has_newer and known and known[-1] >= page.before:
        yield Violation(6, f"op {page.op}: has_newer is false, but {known[-1]} is there")
    if page.after is not None and not page.has_older and known and known[0] <= page.after:
        yield Violation(6, f"op {page.op}: has_older is false, but {known[0]} is there")
    if len(page.messages) > page.limit:
        yield Violation(6, f"op {page.op}: {len(page.messages)} messages where {page.limit} were asked for")
    if len(page.messages) < page.limit and (page.has_newer if page.after is not None else page.has_older):
        yield Violation(6, f"op {page.op}: a page of conversation {one.id} ends early")


def _check_torn(one: _Conversation, page: Operation, low: int, high: int) -> Iterator[Violation]:
    """What came together is shown together, but for what is beyond an end of the page."""
    texts = [item.text for item in page.messages]
    for batch in _distinct(one.batches[text] for text in texts if text in one.batches):
        shown = [text for text in texts if one.batches.get(text) is batch]
        if not any(_is_cut(one, page, together, shown, low, high) for together in batch.lists()):
            what = f"{len(shown)} of the messages of op {batch.attempts[0].op}"
            yield Violation(15, f"op {page.op}: a page of conversation {one.id} shows {what}, and not the others")


def _is_cut(one: _Conversation, page: Operation, together: list[str], shown: list[str], low: int, high: int) -> bool:
    """Whether these texts are all of them, or all on this side of an end of the page at which there may be more."""
    if not set(shown) <= set(together):
        return False
    if any(low < one.ids.get(text, LAST_ID) < high for text in together if text not in shown):
        return False
    begins = together[0] in shown or (low > 0 and page.messages[0].text in shown)
    ends = together[-1] in shown or (high < LAST_ID and page.messages[-1].text in shown)
    return begins and ends


def _check_batches(one: _Conversation, texts: dict[int, str], where: str) -> Iterator[Violation]:
    """What came together has ids in its order, and nothing else has an id between them."""
    numbers = sorted(texts)
    place = {texts[number]: at for at, number in enumerate(numbers)}
    for batch in _distinct(one.batches.values()):
        places = sorted(place[text] for text in batch.texts() if text in place)
        stretch = [texts[number] for number in numbers[places[0] : places[-1] + 1]] if places else []
        if len(stretch) > len(places):
            yield Violation(16, f"conversation {one.id}: in {where} others stand between the messages of op {batch.attempts[0].op}")
        elif places and not any(stretch == [text for text in together if text in stretch] for together in batch.lists()):
            yield Violation(4, f"conversation {one.id}: in {where} the messages of op {batch.attempts[0].op} are in another order")


def _distinct(batches: Iterable[_Batch]) -> Iterable[_Batch]:
    return {id(batch): batch for batch in batches}.values()


def covered(page: Operation) -> tuple[int, int]:
    """Between which ids (both exclusive) a page shows everything."""
    if page.after is not None:
        return page.after, page.messages[-1].id + 1 if page.has_newer and page.messages else LAST_ID
    low = page.messages[0].id - 1 if page.has_older and page.messages else 0
    return low, LAST_ID if page.before is None else page.before


def _check_states(one: _Conversation) -> Iterator[Violation]:
    """Once committed, always committed."""
    shown = [(page, item) for page in one.operations if page.kind == "page" and page.outcome == "ok" for item in page.messages]
    committed: dict[int, float] = {}
    for page, item in shown:
        if item.state == "committed":
            committed[item.id] = min(committed.get(item.id, EVER), page.ended or EVER)
    for page, item in shown:
        if item.state == "pending" and committed.get(item.id, EVER) < page.started:
            yield Violation(5, f"op {page.op}: message {item.id} of conversation {one.id} was committed and is pending again")


# Across conversations


def _check_keys(index: _Index) -> Iterator[Violation]:
    """A retry key has one answer, within its user (creations) or its conversation (messages)."""
    answers: dict[tuple[object, ...], tuple[int, object]] = {}
    for one in index.operations:
        if not one.key or one.outcome != "ok" or one.kind not in ("create", "append", "turn"):
            continue
        number = one.conversation if one.kind == "create" else one.messages[0].id
        place = (one.user, one.key) if one.kind == "create" else (one.conversation, one.key)
        asked = one.title if one.kind == "create" else one.said
        first = answers.setdefault(place, (number, asked))
        if first[0] != number:
            yield Violation(3, f"op {one.op}: the key of {first[0]} was answered with {number}")
        elif first[1] != asked:
            yield Violation(3, f"op {one.op}: the key of {first[0]} was accepted for another request")
    yield from _check_refusals(index)


def _check_refusals(index: _Index) -> Iterator[Violation]:
    """A retry is not taken for another request."""
    by_key: dict[tuple[int, str], list[Operation]] = defaultdict(list)
    for one in index.operations:
        if one.kind == "append" and one.key:
            by_key[one.conversation, one.key].append(one)
    for attempts in by_key.values():
        acknowledged = [one for one in attempts if one.outcome == "ok"]
        for one in attempts:
            if one.outcome == "fail" and one.status == 422 and all(other.said == one.said for other in acknowledged or attempts):
                yield Violation(3, f"op {one.op}: a retry in conversation {one.conversation} was refused, as if its key were another's")


def _check_lists(index: _Index, earlier: frozenset[int]) -> Iterator[Violation]:
    owners = {one.id: one.owner for one in index.by_conversation.values()}
    unheard: dict[int, set[int]] = defaultdict(set)
    of_user: dict[int, list[_Conversation]] = defaultdict(list)
    for one in index.by_conversation.values():
        of_user[one.owner].append(one)
    for listing in index.operations:
        if listing.kind != "list" or listing.outcome != "ok":
            continue
        shown = {one.id: one for one in listing.conversations}
        if len(shown) != len(listing.conversations):
            yield Violation(3, f"op {listing.op}: a list shows a conversation twice")
        positions = [(one.updated, one.id) for one in listing.conversations]
        if positions != sorted(positions, reverse=True):
            yield Violation(4, f"op {listing.op}: a list is not in the order of activity")
        for number in shown.keys() - earlier:
            if owners.get(number, listing.user) != listing.user:
                yield Violation(7, f"op {listing.op}: the list of user {listing.user} shows {number} of user {owners[number]}")
            elif number not in owners or index.by_conversation[number].created == EVER:
                unheard[listing.user].add(number)
        yield from _check_list(listing, shown.keys(), of_user[listing.user])
    for user, numbers in unheard.items():
        if len(numbers) > index.unknown_creations[user]:
            yield Violation(2, f"user {user} has {len(numbers)} conversations that nobody created")


def _check_list(listing: Operation, shown: Iterable[int], conversations: Iterable[_Conversation]) -> Iterator[Violation]:
    """A list that is complete in one answer holds all that was there from before it was asked for until it was answered."""
    numbers = set(shown)
    for one in conversations:
        if one.id in numbers and one.deleted < listing.started:
            yield Violation(8, f"op {listing.op}: a list shows conversation {one.id} after it was deleted")
        whole = not listing.more and not listing.cursor
        if whole and one.id not in numbers and one.created < listing.started and one.deleting > (listing.ended or EVER):
            yield Violation(1, f"op {listing.op}: a list lacks conversation {one.id}")
    yield from _check_titles(listing, conversations)


def _check_titles(reading: Operation, conversations: Iterable[_Conversation]) -> Iterator[Violation]:
    by_id = {one.id: one for one in conversations}
    for listed in reading.conversations:
        if listed.id in by_id and (why := _wrong_title(by_id[listed.id], listed.title, reading.started, reading.ended or EVER)):
            yield Violation(5, f"op {reading.op}: conversation {listed.id} {why}")


def _wrong_title(one: _Conversation, title: str, started: float, ended: float) -> str:
    """Whether a title may be read between these times. One that a person set is only replaced by another that a person set."""
    renames = [operation for operation in one.operations if operation.kind == "rename" and operation.outcome != "fail"]
    created = next((operation.title for operation in one.operations if operation.kind == "create"), "")
    settled = [operation for operation in renames if operation.outcome == "ok" and (operation.ended or EVER) < started]
    ends = [operation.ended if operation.outcome == "ok" else EVER for operation in renames if operation.title == title]
    if title and title == created:
        ends.append(one.created)
    if ends:
        replaced = all(any(later.started > (end or EVER) for later in settled) for end in ends)
        return "has a title that was replaced before" if replaced else ""
    if created or settled:
        return "has lost the title that a person gave it"
    written = any(role == "user" for attempts in one.texts.values() for attempt in attempts for _, role in attempt.said)
    return "has a title that nobody gave it" if title and not written else ""


def _check_probes(index: _Index) -> Iterator[Violation]:
    """Somebody else's and nobody's are answered alike: `note` is the body of the answer."""
    bodies: dict[str, int] = {}
    for probe in index.operations:
        if probe.kind != "probe":
            continue
        if probe.outcome == "ok":
            yield Violation(7, f"op {probe.op}: user {probe.user} got in: {probe.title} on conversation {probe.conversation}")
        elif probe.outcome == "fail" and probe.status:
            if probe.status != 404:
                yield Violation(7, f"op {probe.op}: a probe was answered with {probe.status} ({probe.title})")
            bodies.setdefault(probe.note, probe.op)
    if len(bodies) > 1:
        yield Violation(7, f"probes are answered in {len(bodies)} ways: ops {sorted(bodies.values())[:4]}")


# The end


def _check_final(index: _Index, final: Final) -> Iterator[Violation]:
    yield from final.troubles
    rows: dict[int, dict[int, MessageRow]] = defaultdict(dict)
    for row in final.messages:
        rows[row.conversation][row.id] = row
    stored = {row.id: row for row in final.conversations}
    for one in index.by_conversation.values():
        yield from _check_rows(one, stored.get(one.id), rows[one.id])
    yield from _check_integrity(index, final, stored)
    if final.log_entries or final.log_bytes:
        yield Violation(11, f"the log holds {final.log_entries} entries and {final.log_bytes} bytes at the end")
    if final.lasting_keys:
        yield Violation(11, f"{len(final.lasting_keys)} keys have no expiry at the end: {final.lasting_keys[:4]}")
    buried = set(final.dead_letters)
    if buried != final.poison or len(buried) != len(final.dead_letters):
        spare, lacking = sorted(buried - final.poison), sorted(final.poison - buried)
        yield Violation(14, f"dead letters: {len(spare)} too many {spare[:4]}, {len(lacking)} too few {lacking[:4]}")


def _check_rows(one: _Conversation, row: ConversationRow | None, messages: dict[int, MessageRow]) -> Iterator[Violation]:
    if row is None:
        if one.created < EVER:
            yield Violation(1, f"conversation {one.id} was acknowledged and is not in Postgres")
        return
    if row.deleted:
        if one.deleting == EVER:
            yield Violation(8, f"conversation {one.id} is deleted, and nobody did that")
        if messages:
            yield Violation(8, f"conversation {one.id} is deleted and has {len(messages)} messages")
        return
    if one.deleted < EVER:
        yield Violation(8, f"conversation {one.id} was deleted and is there")
    lacking = [number for number in one.acknowledged if number not in messages]
    if lacking:
        yield Violation(1, f"conversation {one.id}: {len(lacking)} acknowledged messages are not in Postgres ({sorted(lacking)[:4]})")
    read = [number for number in one.known if number not in messages and number not in one.acknowledged]
    if read:
        yield Violation(5, f"conversation {one.id}: {len(read)} messages that were read are not in Postgres ({sorted(read)[:4]})")
    yield from _check_contents(one, messages)
    yield from _check_batches(one, {row.id: row.text for row in messages.values()}, "Postgres")
    stored = {row.text for row in messages.values()}
    for batch in _distinct(one.batches.values()):
        there = stored & batch.texts()
        if there and there not in map(set, batch.lists()):
            yield Violation(
                15, f"conversation {one.id}: {len(there)} of the messages of op {batch.attempts[0].op} are in Postgres, and not the others"
            )
    if why := _wrong_title(one, row.title, EVER, EVER):
        yield Violation(5, f"in Postgres conversation {one.id} {why}")


def _check_contents(one: _Conversation, messages: dict[int, MessageRow]) -> Iterator[Violation]:
    ids: dict[str, int] = {}
    keys: set[str] = set()
    for row in messages.values():
        if row.id in one.known and one.known[row.id][1] != row.text:
            yield Violation(9, f"message {row.id} of conversation {one.id} has another text in Postgres")
        attempts = one.texts.get(row.text, [])
        if attempts:
            if ids.setdefault(row.text, row.id) != row.id:
                yield Violation(3, f"conversation {one.id}: one message has the rows {ids[row.text]} and {row.id}")
            if all(attempt.outcome == "fail" for attempt in attempts):
                yield Violation(2, f"message {row.id} of conversation {one.id} was refused, and is in Postgres")
        elif not (one.replies and row.role == "assistant"):
            yield Violation(2, f"nobody wrote message {row.id} of conversation {one.id}, which is in Postgres")
        if row.key is not None:
            if row.key in keys:
                yield Violation(3, f"conversation {one.id}: a retry key has two rows")
            keys.add(row.key)


def _check_integrity(index: _Index, final: Final, stored: dict[int, ConversationRow]) -> Iterator[Violation]:
    unheard: dict[int, int] = defaultdict(int)
    for row in final.conversations:
        known = index.by_conversation.get(row.id)
        if known is None or known.created == EVER:
            unheard[row.user] += 1
        elif known.owner != row.user:
            yield Violation(10, f"conversation {row.id} belongs to user {row.user} instead of {known.owner}")
    for user, count in unheard.items():
        if count > index.unknown_creations[user]:
            yield Violation(2, f"user {user} has {count} conversations in Postgres that nobody created")
    for message in final.messages:
        parent = stored.get(message.conversation)
        if parent is None:
            yield Violation(10, f"message {message.id} has no conversation")
        elif parent.user != message.user:
            yield Violation(10, f"message {message.id} of user {message.user} is in a conversation of user {parent.user}")
