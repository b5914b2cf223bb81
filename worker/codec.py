"""What a message and a log entry look like as bytes: written by the API, read by the API and the worker.

A message's body is the JSON that a reader gets, without what the script assigns (id, time) and what a flush changes (state).
History is put together from these bytes; nothing decodes them on the way out.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
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


class RawEntry(NamedTuple):
    """An entry of the log as it lies there, by field; None where one is missing, which no append leaves out."""

    id: bytes
    kind: bytes | None
    user: bytes | None
    time: bytes | None
    body: bytes | None
    key: bytes | None
    extra: bytes | None
    size: int
    """What it counts for in the backlog."""
    given: Sequence[bytes]
    """Names and values in turn, as they came."""

    @classmethod
    def of(cls, entry_id: bytes, fields: Mapping[bytes, bytes]) -> RawEntry:
        """One, whatever fields it has."""
        kind, user, time, body, key, extra = map(fields.get, _FIELDS)
        size = len(body or b"") + len(key or b"") + len(extra or b"") + ENTRY_OVERHEAD_BYTES
        return cls(entry_id, kind, user, time, body, key, extra, size, [part for pair in fields.items() for part in pair])

    @property
    def fields(self) -> dict[bytes, bytes]:
        return dict(zip(self.given[::2], self.given[1::2], strict=True))


def raw_entries(page: Sequence[tuple[bytes, Sequence[bytes]]]) -> list[RawEntry]:
    """Entries of the log as Redis gives them: (id, names and values in turn).

    Those of an append all have the same fields in the same order, and are taken column by column: 0.5 µs for each, where one by one they
    take 2.2.
    """
    if not page:
        return []
    ids, given = zip(*page, strict=True)
    columns = list(zip(*given, strict=False))  # as many as the shortest has
    others = {name for parts in given for name in parts[2 * len(_FIELDS) :: 2]}
    if [set(names) for names in columns[: 2 * len(_FIELDS) : 2]] != [{name} for name in _FIELDS] or not others <= {b"n"}:
        return [RawEntry.of(entry_id, dict(zip(parts[::2], parts[1::2], strict=True))) for entry_id, parts in page]
    _, _, _, bodies, keys_, extras = values = columns[1 : 2 * len(_FIELDS) : 2]
    sizes = [len(body) + len(key) + len(extra) + ENTRY_OVERHEAD_BYTES for body, key, extra in zip(bodies, keys_, extras, strict=True)]
    return list(map(RawEntry._make, zip(ids, *values, sizes, given, strict=True)))


_FIELDS = (b"k", b"u", b"t", b"b", b"x", b"a")


class Entry(NamedTuple):
    """One entry of the pending log, decoded and checked. `body` depends on `kind`; `key` is '' where there is none."""

    id: int
    kind: Kind
    microseconds: int
    conversation_id: int
    user_id: int
    key: str
    extra: str
    """A message: the title that it gave its conversation, or ''. A new conversation: the hash of the request."""
    role: str
    content: str
    status: str
    title: str | None


class Entries(NamedTuple):
    """Entries as columns, in the order of `Entry`'s fields. An `Entry` for each, checked by itself, took a worker 2 µs more."""

    ids: Sequence[int]
    kinds: Sequence[Kind]
    microseconds: Sequence[int]
    conversation_ids: Sequence[int]
    user_ids: Sequence[int]
    keys: Sequence[str]
    extras: Sequence[str]
    roles: Sequence[str]
    contents: Sequence[str]
    statuses: Sequence[str]
    titles: Sequence[str | None]

    def entry(self, position: int) -> Entry:
        """One of them."""
        return Entry._make(column[position] for column in self)

    def some(self, positions: Sequence[int]) -> Entries:
        """These of them."""
        return Entries._make([column[position] for position in positions] for column in self)


def message_body(conversation_id: int, user_id: int, role: str, content: str, status: str) -> bytes:
    """A message's bytes, in Redis and on the wire."""
    return orjson.dumps({"conversation_id": conversation_id, "user_id": user_id, "role": role, "content": content, "status": status})


def conversation_body(conversation_id: int, user_id: int, title: str | None = None) -> bytes:
    """The bytes of an entry that creates, renames or deletes a conversation."""
    return orjson.dumps({"conversation_id": conversation_id, "user_id": user_id, "title": title})


def request_hash(*parts: str) -> str:
    """What tells a retry from another request under the same key. `HASH_SQL` is the same for a row of `message`."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:32]


def decode_entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    """Reads one entry of the log; raises as `decode_entries` does."""
    return decode_entries([RawEntry.of(entry_id, fields)]).entry(0)


def decode_entries(entries: Sequence[RawEntry]) -> Entries:
    """Reads entries of the log; raises `BadEntry`, which names no content, if an append did not write all of them.

    What passes can be inserted, unless its user or its conversation is not there.
    """
    try:
        columns = _columns(entries)
        if _sound(columns):
            return columns
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise BadEntry(f"{_named(entries)} malformed ({type(exc).__name__})") from exc
    raise BadEntry(f"{_named(entries)} not what an append writes")


def _named(entries: Sequence[RawEntry]) -> str:
    only = f" {entries[0].id.decode(errors='replace')}" if len(entries) == 1 else ""
    return f"log entry{only} is" if only else f"one of {len(entries)} log entries is"


def _columns(entries: Sequence[RawEntry]) -> Entries:
    if not entries:
        return Entries._make([] for _ in Entries._fields)
    ids, kinds, _, times, bodies, given_keys, extras, _, _ = zip(*entries, strict=True)
    parsed = [orjson.loads(body) for body in bodies]  # each by itself: what somebody planted must not run over into its neighbour
    ours = [kind == b"m" for kind in kinds]
    return Entries(
        [int(entry_id[:-2]) if entry_id[-2:] == b"-0" else 0 for entry_id in ids],
        [kind.decode() for kind in kinds],
        list(map(int, times)),
        [body["conversation_id"] for body in parsed],
        [body["user_id"] for body in parsed],
        [key.decode() for key in given_keys],
        [extra.decode() for extra in extras],
        [body["role"] if is_message else "" for body, is_message in zip(parsed, ours, strict=True)],
        [body["content"] if is_message else "" for body, is_message in zip(parsed, ours, strict=True)],
        [body["status"] if is_message else "" for body, is_message in zip(parsed, ours, strict=True)],
        [None if kind in (b"m", b"d") else body["title"] for body, kind in zip(parsed, kinds, strict=True)],
    )


_SORTS = {("c", "", ""), ("r", "", ""), ("d", "", "")}
_SORTS |= {("m", role, status) for role in ("user", "assistant") for status in ("complete", "incomplete")}


def _sound(columns: Entries) -> bool:
    ids, kinds, microseconds, conversations, users, given_keys, extras, roles, contents, statuses, titles = columns
    if not ids:
        return True
    return (
        all(map(_are_ids, (ids, conversations, users)))
        and keys.shards_of_ids(ids) == keys.shards_of_ids(conversations)
        and min(microseconds) >= 0
        and max(microseconds) < _MICROSECONDS_LIMIT
        and set(zip(kinds, roles, statuses, strict=True)) <= _SORTS
        and _fit(given_keys, KEY_CHARS_MAX)
        and _fit(extras, TITLE_CHARS_MAX)
        and _fit([extra for kind, extra in zip(kinds, extras, strict=True) if kind == "c"], HASH_CHARS_MAX)
        and _fit(contents)
        and _fit([title for title in titles if title is not None], TITLE_CHARS_MAX)
        and ("r", None) not in zip(kinds, titles, strict=True)
    )


def _are_ids(values: Sequence[Any]) -> bool:
    return set(map(type, values)) == {int} and min(values) > 0 and max(values) < keys.ID_LIMIT


def _fit(texts: Sequence[Any], chars_max: int | None = None) -> bool:
    """Whether a text column takes them. (Half surrogate pairs have not come this far: neither JSON nor UTF-8 bytes hold them.) Raises
    `TypeError` for what is no text."""
    return "\x00" not in "".join(texts) and (chars_max is None or max(map(len, texts), default=0) <= chars_max)


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
    begin = content.lstrip()
    words = " ".join(begin[:120].split())  # as a rule enough
    if len(words) <= 80:
        words = " ".join(begin[:400].split())
    if len(words) <= 80:
        return words
    head = words[:79]
    return (head.rsplit(" ", 1)[0] if " " in head[40:] else head).rstrip() + "…"
