"""What a message and a log entry look like as bytes: written by the API, read by the API and the worker.

A message's body is the JSON that a reader gets, without what the script assigns (id, time) and what a flush changes (state).
History is put together from these bytes; nothing decodes them on the way out.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Self, TypeAlias, overload

import orjson

from worker import keys
from worker.errors import BadEntry
from worker.text import TITLE_CHARS_MAX

Role: TypeAlias = Literal["user", "assistant"]
Status: TypeAlias = Literal["complete", "incomplete"]
Kind: TypeAlias = Literal["c", "m", "r", "d"]
"""conversation created, message, renamed, deleted"""

ENTRY_OVERHEAD_BYTES = 100
"""About what Redis needs for an entry beside its fields, in the log and in the conversation's messages together."""

KEY_CHARS_MAX = 205
"""A client's key has at most 200 characters and a prefix; see `client_key` and `nth_key` in `worker/pending.py`."""
HASH_CHARS_MAX = 64
HASH_SQL = "left(encode(sha256(convert_to(role || chr(31) || status || chr(31) || content, 'UTF8')), 'hex'), 32)"
_UNIX = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECONDS_LIMIT = 1 << 53
"""In the year 2255. Above it Postgres, which multiplies intervals by doubles, would not keep each of them."""


class Stored(NamedTuple):
    """A message as it lies in the cache or comes from a row."""

    id: int
    microseconds: int
    body: bytes

    def public(self, committed: int) -> bytes:
        """The Message of the contract as JSON; `committed` is the highest id that is in Postgres."""
        state = b"committed" if self.id <= committed else b"pending"
        return b'{"id":%d,%s,"created_at":"%s","state":"%s"}' % (self.id, self.body[1:-1], rfc3339(self.microseconds).encode(), state)


class GivenMessages(Sequence[Stored], ABC):
    """Messages as a store gave them: taken apart only for who looks at one. A page of them goes out as it lies there."""

    __slots__ = ("_given",)

    def __init__(self, given: Sequence[Any]) -> None:
        self._given = given

    def __len__(self) -> int:
        return len(self._given)

    @overload
    def __getitem__(self, index: int) -> Stored: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> Stored | Self:
        return self._part(self._given[index]) if isinstance(index, slice) else self._stored(self._given[index])

    @abstractmethod
    def _part(self, given: Sequence[Any]) -> Self:
        """Some of them."""

    @abstractmethod
    def _stored(self, given: Any) -> Stored:
        """One of them, taken apart."""

    @abstractmethod
    def public(self, committed: int) -> bytes:
        """What `Stored.public` gives for each of them, with commas between."""


class CachedMessages(GivenMessages):
    """Messages as Redis holds them, each (b"<id>-0", [b"t", microseconds, b"b", body]), in the order of their ids where they are put out.

    A `Stored` and its `public` for each of 50 messages took 82 µs, this takes 27.
    """

    __slots__ = ()

    def _part(self, given: Sequence[Any]) -> Self:
        return type(self)(given)

    def _stored(self, given: Any) -> Stored:
        entry_id, fields = given
        return Stored(_number(entry_id), int(fields[1]), fields[3])

    def public(self, committed: int) -> bytes:
        """As above."""
        entries = self._given
        seam = bisect_right(entries, committed, key=lambda entry: _number(entry[0]))
        return b",".join(_public(entries[:seam], b"committed") + _public(entries[seam:], b"pending"))


def _public(entries: Sequence[Any], state: bytes) -> list[bytes]:
    template = b'{"id":%%s,%%s,"created_at":"%%s%%sZ","state":"%s"}' % state
    return [
        template % (entry_id[:-2], fields[3][1:-1], _second_in_bytes((time := fields[1].zfill(7))[:-6]), time[-6:])
        for entry_id, fields in entries
    ]


def _number(entry_id: bytes) -> int:
    return int(entry_id[:-2])  # without "-0"


class CommittedMessages(GivenMessages):
    """Messages of a conversation as rows of Postgres (id, role, content, created_at, status, …).

    A `Stored` and its `public` for each of 50 messages took 94 µs, this takes 22.
    """

    __slots__ = ("_conversation_id", "_user_id")

    def __init__(self, conversation_id: int, user_id: int, rows: Sequence[Sequence[Any]]) -> None:
        super().__init__(rows)
        self._conversation_id, self._user_id = conversation_id, user_id

    def _part(self, given: Sequence[Any]) -> Self:
        return type(self)(self._conversation_id, self._user_id, given)

    def _stored(self, given: Any) -> Stored:
        body = message_body(self._conversation_id, self._user_id, given[1], given[2], given[4])
        return Stored(given[0], to_microseconds(given[3]), body)

    def public(self, committed: int) -> bytes:
        """As above; they are committed, whatever Redis knows."""
        conversation_id, user_id = self._conversation_id, self._user_id
        messages = [
            {
                "id": row[0],
                "conversation_id": conversation_id,
                "user_id": user_id,
                "role": row[1],
                "content": row[2],
                "status": row[4],
                # orjson leaves the microseconds out where there are none
                "created_at": row[3] if row[3].microsecond else rfc3339(to_microseconds(row[3])),
                "state": "committed",
            }
            for row in self._given
        ]
        return orjson.dumps(messages, option=orjson.OPT_UTC_Z)[1:-1]


def public(messages: Sequence[Stored], committed: int) -> bytes:
    """Messages of the contract as JSON, with commas between."""
    if isinstance(messages, GivenMessages):
        return messages.public(committed)
    return b",".join(message.public(committed) for message in messages)


class Entry(NamedTuple):
    """One entry of the pending log, decoded and checked. `body` depends on `kind`; `key` is '' where there is none.

    Made once for each row, so a tuple: 0.3 µs, where a frozen dataclass takes 1.6.
    """

    id: int
    kind: Kind
    microseconds: int
    conversation_id: int
    user_id: int
    key: str
    extra: str
    """A message: the title that it gave its conversation, or ''. A new conversation: the hash of the request."""
    role: str = ""
    content: str = ""
    status: str = ""
    title: str | None = None


def message_body(conversation_id: int, user_id: int, role: str, content: str, status: str) -> bytes:
    """A message's bytes, in Redis and on the wire."""
    return orjson.dumps({"conversation_id": conversation_id, "user_id": user_id, "role": role, "content": content, "status": status})


def conversation_body(conversation_id: int, user_id: int, title: str | None = None) -> bytes:
    """The bytes of an entry that creates, renames or deletes a conversation."""
    return orjson.dumps({"conversation_id": conversation_id, "user_id": user_id, "title": title})


def request_hash(*parts: str) -> str:
    """What tells a retry from another request under the same key. `HASH_SQL` is the same for a row of `message`."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:32]


def decode_entry(entry_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    """Reads one entry of the log; raises `BadEntry`, which names no content, for anything that an append did not write.

    What passes can be inserted, unless its user or its conversation is not there.
    """
    try:
        body: dict[str, Any] = orjson.loads(fields[b"b"])
        kind = fields[b"k"].decode()
        entry = Entry(
            keys.entry_number(entry_id) or 0,
            kind,  # type: ignore[arg-type]  # checked by _sound
            int(fields[b"t"]),
            body["conversation_id"],
            body["user_id"],
            fields[b"x"].decode(),
            fields[b"a"].decode(),
            body["role"] if kind == "m" else "",
            body["content"] if kind == "m" else "",
            body["status"] if kind == "m" else "",
            None if kind in "md" else body["title"],
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise BadEntry(f"log entry {entry_id.decode(errors='replace')} is malformed ({type(exc).__name__})") from exc
    if not _sound(entry):
        raise BadEntry(f"log entry {entry_id.decode(errors='replace')} holds a value that no append writes")
    return entry


def _sound(entry: Entry) -> bool:
    number, kind, microseconds, conversation, user, key, extra, role, content, status, title = entry
    if not (type(number) is int and type(conversation) is int and type(user) is int):
        return False
    if not (0 < number < keys.ID_LIMIT and 0 < conversation < keys.ID_LIMIT and 0 < user < keys.ID_LIMIT):
        return False
    if not 0 <= microseconds < _MICROSECONDS_LIMIT:
        return False
    if keys.shard_of_id(number) != keys.shard_of_id(conversation):
        return False
    if (key and not _fits(key, KEY_CHARS_MAX)) or (extra and not _fits(extra, HASH_CHARS_MAX if kind == "c" else TITLE_CHARS_MAX)):
        return False
    if kind == "m":
        return _fits(content) and role in ("user", "assistant") and status in ("complete", "incomplete")
    if kind == "r":
        return _fits(title, TITLE_CHARS_MAX)
    return kind == "d" or (kind == "c" and (title is None or _fits(title, TITLE_CHARS_MAX)))


def _fits(value: Any, chars_max: int | None = None) -> bool:
    """Whether a text column takes it. (Half surrogate pairs have not come this far: neither JSON nor UTF-8 bytes hold them.)"""
    return type(value) is str and "\x00" not in value and (chars_max is None or len(value) <= chars_max)


def rfc3339(microseconds: int) -> str:
    """RFC 3339 in UTC with six digits, from Unix microseconds."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return f"{_second(seconds)}{rest:06d}Z"


@lru_cache(maxsize=4096)
def _second(seconds: int) -> str:
    """Messages of a page share theirs: 18 µs for 50 of them instead of 125."""
    return (_UNIX + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S.")


@lru_cache(maxsize=4096)
def _second_in_bytes(seconds: bytes) -> bytes:
    return _second(int(seconds)).encode()


def to_datetime(microseconds: int) -> datetime:
    return _UNIX + timedelta(microseconds=microseconds)


def to_microseconds(moment: datetime) -> int:
    since = moment - _UNIX
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds  # 0.3 µs; dividing by a microsecond takes 0.9


def auto_title(content: str) -> str:
    """A title out of the first user message: its words on one line, at most 80 characters."""
    words = " ".join(content.strip()[:400].split())
    if len(words) <= 80:
        return words
    head = words[:79]
    return (head.rsplit(" ", 1)[0] if " " in head[40:] else head).rstrip() + "…"
