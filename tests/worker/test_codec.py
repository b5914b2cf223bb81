"""What a message looks like as bytes, and what is not read as one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.codec import (
    CachedMessages,
    CommittedMessages,
    RawEntry,
    Stored,
    auto_title,
    conversation_body,
    decode_entry,
    message_body,
    public,
    raw_entries,
    request_hash,
    rfc3339,
    to_datetime,
    to_microseconds,
)
from worker.errors import BadEntry

ID = 179434769364481
CONVERSATION = ID - 64
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


def fields(kind: str = "m", body: bytes = b"", key: str = "", extra: str = "", moment: str = "1800000000000000") -> dict[bytes, bytes]:
    return {b"k": kind.encode(), b"t": moment.encode(), b"b": body, b"x": key.encode(), b"a": extra.encode()}


class TestPublic:
    @given(UNICODE, st.sampled_from(["user", "assistant"]), st.sampled_from(["complete", "incomplete"]))
    def test_is_the_message_of_the_contract(self, content: str, role: str, status: str) -> None:
        stored = Stored(ID, 1_800_000_000_123_456, message_body(CONVERSATION, 7, role, content, status))
        assert json.loads(stored.public(ID)) == {
            "id": ID,
            "conversation_id": CONVERSATION,
            "user_id": 7,
            "role": role,
            "content": content,
            "created_at": "2027-01-15T08:00:00.123456Z",
            "status": status,
            "state": "committed",
        }
        assert json.loads(stored.public(ID - 1))["state"] == "pending"

    @given(st.lists(st.tuples(UNICODE, st.integers(0, 253_402_300_799_999_999)), max_size=6), st.integers(-1, 7))
    def test_a_cached_page_is_the_same_bytes(self, messages: list[tuple[str, int]], committed: int) -> None:
        """Whatever of it is pending, and whenever it was written."""
        stored = [
            Stored(ID + 64 * i, time, message_body(CONVERSATION, 7, "user", text, "complete")) for i, (text, time) in enumerate(messages)
        ]
        cached = CachedMessages([[b"%d-0" % one.id, [b"t", b"%d" % one.microseconds, b"b", one.body]] for one in stored])
        mark = ID + 64 * committed
        assert public(cached, mark) == b",".join(one.public(mark) for one in stored) == public(stored, mark)
        assert list(cached) == stored
        assert list(cached[:4][::-1]) == stored[:4][::-1]

    @given(st.lists(st.tuples(UNICODE, st.integers(0, 253_402_300_799_999_999)), max_size=6), st.booleans())
    def test_a_page_of_rows_is_the_same_bytes(self, messages: list[tuple[str, int]], whole_seconds: bool) -> None:
        messages = [(text, time // 1_000_000 * 1_000_000 if whole_seconds else time) for text, time in messages]
        rows, stored = [], []
        for number, (text, time) in enumerate(messages, start=ID):
            rows.append((number, "user", text, to_datetime(time), "complete", None, None))
            stored.append(Stored(number, time, message_body(CONVERSATION, 7, "user", text, "complete")))
        committed = CommittedMessages(CONVERSATION, 7, rows)
        assert public(committed, ID + 6) == public(stored, ID + 6)
        assert list(committed) == stored
        assert list(committed[:4][::-1]) == stored[:4][::-1]

    def test_half_a_surrogate_pair_never_gets_as_far_as_redis(self) -> None:
        with pytest.raises(TypeError):
            message_body(CONVERSATION, 7, "user", "\ud800", "complete")


class TestDecode:
    @given(UNICODE.filter(lambda content: "\x00" not in content))
    def test_a_message_comes_back_as_it_was_appended(self, content: str) -> None:
        entry = decode_entry(
            b"%d-0" % ID, fields(body=message_body(CONVERSATION, 7, "user", content, "complete"), key="k:a", extra="title")
        )
        assert (entry.id, entry.conversation_id, entry.user_id, entry.content) == (ID, CONVERSATION, 7, content)
        assert (entry.role, entry.status, entry.key, entry.extra) == ("user", "complete", "k:a", "title")

    @pytest.mark.parametrize(("kind", "title"), [("c", None), ("c", "x" * 200), ("r", "x"), ("d", None)])
    def test_a_change_comes_back_too(self, kind: str, title: str | None) -> None:
        entry = decode_entry(b"%d-0" % ID, fields(kind, conversation_body(CONVERSATION, 7, title)))
        assert (entry.kind, entry.conversation_id, entry.title) == (kind, CONVERSATION, title)

    @given(st.binary(max_size=30), st.dictionaries(st.sampled_from([b"k", b"t", b"b", b"x", b"a"]), st.binary(max_size=30)))
    def test_nothing_but_bad_entry_comes_of_any_bytes(self, entry_id: bytes, anything: dict[bytes, bytes]) -> None:
        with pytest.raises(BadEntry):
            decode_entry(entry_id, anything)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | UNICODE,
            lambda inner: st.lists(inner) | st.dictionaries(UNICODE, inner),
        )
    )
    def test_nor_of_any_json(self, anything: object) -> None:
        with pytest.raises(BadEntry):
            decode_entry(b"%d-0" % ID, fields(body=json.dumps(anything).encode()))

    @pytest.mark.parametrize("others", [[], [[b"k", b"m"]]])
    def test_a_field_that_comes_twice_is_read_alike_whoever_stands_beside_it(self, others: list[list[bytes]]) -> None:
        """The last one counts, as in a dictionary."""
        parts = [b"k", b"m", b"u", b"7", b"t", b"1", b"b", b"first", b"x", b"", b"a", b""]
        first, *_ = raw_entries([(b"1-0", [*parts, b"b", b"second!"]), *((b"2-0", one) for one in others)])
        assert (first.body, first.fields[b"b"]) == (b"second!", b"second!")
        assert first == RawEntry.of(b"1-0", first.fields)._replace(given=first.given)

    @pytest.mark.parametrize("entry_id", [b"179434769364481-1", b"0-1", b"179434769364482-0", b"%d-0" % (1 << 53), b"x", b""])
    def test_an_id_that_no_append_gives(self, entry_id: bytes) -> None:
        """Another sequence, zero, another shard than its conversation's, too high."""
        with pytest.raises(BadEntry):
            decode_entry(entry_id, fields(body=message_body(CONVERSATION, 7, "user", "x", "complete")))

    @pytest.mark.parametrize("moment", ["-1", str(1 << 53), "253402300799999999"])
    def test_a_time_that_postgres_would_not_keep_as_it_is(self, moment: str) -> None:
        with pytest.raises(BadEntry):
            decode_entry(b"%d-0" % ID, fields(body=message_body(CONVERSATION, 7, "user", "x", "complete"), moment=moment))

    def test_the_error_names_no_content(self) -> None:
        with pytest.raises(BadEntry) as refused:
            decode_entry(b"%d-0" % ID, fields("secret", b'{"secret":1}', "secret"))
        assert "secret" not in str(refused.value)


class TestTitle:
    @pytest.mark.parametrize(
        ("content", "title"),
        [
            ("Hello", "Hello"),
            ("  two\n\n lines\t", "two lines"),
            ("x" * 80, "x" * 80),
            ("x" * 81, "x" * 79 + "…"),
            ("word " * 100, "word " * 14 + "word…"),
            ("a " + "b" * 100, "a " + "b" * 77 + "…"),
            ("\u2003\u00a0wide\u3000space", "wide space"),
        ],
    )
    def test_is_the_beginning_on_one_line(self, content: str, title: str) -> None:
        assert auto_title(content) == title

    @pytest.mark.parametrize("gap", [" ", "\n  ", " " * 50])
    def test_the_first_words_say_as_much_as_all_of_them(self, gap: str) -> None:
        """It looks at no more than it needs."""
        for words in range(1, 120):
            content = gap + gap.join(f"w{n}" for n in range(words))
            whole = " ".join(content.strip()[:400].split())
            assert auto_title(content).rstrip("…") == (whole if len(whole) <= 80 else whole[:79].rsplit(" ", 1)[0])

    @given(UNICODE)
    def test_always_fits(self, content: str) -> None:
        assert len(auto_title(content)) <= 80
        assert "\n" not in auto_title(content)


class TestTimes:
    @given(st.integers(0, 253_402_300_799_999_999))
    def test_microseconds_come_back(self, moment: int) -> None:
        assert to_microseconds(to_datetime(moment)) == moment
        assert len(rfc3339(moment)) == len("2026-01-01T00:00:00.000000Z")


def test_a_request_is_told_from_another_whatever_the_parts_hold() -> None:
    hashes = [request_hash("user", "complete", "a"), request_hash("user", "complete", "b"), request_hash("assistant", "complete", "a")]
    assert len({*hashes, request_hash("conversation", "\x00"), request_hash("conversation", "")}) == 5
    assert all(len(digest) == 32 for digest in hashes)
