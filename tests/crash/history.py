"""What happened, as the clients saw it: the only thing that the checker believes, beside the state at the end.

Every operation leaves two lines in a file: an invocation before it is sent, and how it ended. `ok` was acknowledged, `fail` certainly had
no effect (4xx), `info` may have had one, now or later (a lost answer, a time-out, 503). An invocation without an end is an `info`.

Texts are not kept, only digests of them; every text that a client sends is unique, so a digest names a message.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import orjson

Outcome = Literal["ok", "fail", "info"]
Kind = Literal["create", "append", "turn", "page", "list", "get", "rename", "delete", "probe"]


@dataclass(frozen=True, slots=True)
class Item:
    """A message as an answer shows it."""

    id: int
    text: str
    """The digest of its content."""
    role: str
    state: str
    status: str = "complete"


@dataclass(frozen=True, slots=True)
class Listed:
    """A conversation as an answer shows it; `title` is a digest, '' for none."""

    id: int
    title: str
    updated: str


@dataclass(slots=True)
class Operation:
    """One call. What was asked, and what came back; times in seconds of one monotonic clock."""

    op: int
    kind: Kind
    user: int
    started: float
    conversation: int = 0
    key: str = ""
    text: str = ""
    role: str = "user"
    also: list[tuple[str, str]] = field(default_factory=list)
    """Of an append of several messages: text and role of those after the first."""
    title: str = ""
    before: int | None = None
    after: int | None = None
    limit: int = 0
    cursor: str = ""
    refused: bool = False
    """It asks for something that has to be refused: acknowledging it is a violation."""
    # The answer
    ended: float | None = None
    outcome: Outcome = "info"
    status: int = 0
    replayed: bool = False
    messages: list[Item] = field(default_factory=list)
    """Of an append or a turn: what it acknowledged. Of a page: its items."""
    conversations: list[Listed] = field(default_factory=list)
    has_older: bool = False
    has_newer: bool = False
    more: str = ""
    note: str = ""
    """Whatever a person may want to know of it."""

    @property
    def said(self) -> list[tuple[str, str]]:
        """Text and role of each message that an append or a turn asks for, in their order."""
        return [(self.text, self.role), *self.also]


_FIELDS = {field.name: field for field in dataclasses.fields(Operation)}
_DEFAULTS = {
    name: field.default if field.default is not dataclasses.MISSING else []
    for name, field in _FIELDS.items()
    if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
}
_ANSWER = ("ended", "outcome", "status", "replayed", "messages", "conversations", "has_older", "has_newer", "more", "note")


class History:
    """The operations so far, in memory and, with a path, on disk line by line."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.operations: list[Operation] = []
        self._file: IO[bytes] | None = path.open("wb") if path else None
        self._clock = clock

    def invoke(self, kind: Kind, user: int, **asked: Any) -> Operation:
        """Writes down what is about to be sent."""
        operation = Operation(len(self.operations), kind, user, self._clock(), **asked)
        self.operations.append(operation)
        self._write({"type": "invoke"} | _asked(operation))
        return operation

    def end(self, operation: Operation, outcome: Outcome, **answer: Any) -> None:
        """Writes down how it ended."""
        for name, value in answer.items():
            setattr(operation, name, value)
        operation.outcome = outcome
        operation.ended = self._clock()
        self._write({"type": outcome, "op": operation.op} | _answered(operation))

    def event(self, name: str, **fields: Any) -> None:
        """Writes down something that is not a client's: a fault, a restart."""
        self._write({"type": "event", "event": name, "at": self._clock()} | fields)

    def close(self) -> None:
        """Ends the file."""
        if self._file:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file:
            self._file.write(orjson.dumps(line) + b"\n")


def read(path: Path) -> list[Operation]:
    """The operations of a file that a run has left behind, whole or not."""
    operations: dict[int, Operation] = {}
    with path.open("rb") as file:
        for raw in file:
            try:
                line = orjson.loads(raw)
            except orjson.JSONDecodeError:  # the last line of a run that was killed
                continue
            kind = line.pop("type")
            if kind == "invoke":
                operations[line["op"]] = Operation(**line)
                operations[line["op"]].also = [(text, role) for text, role in line.get("also", ())]
            elif kind != "event":
                _apply(operations[line.pop("op")], line)
    return list(operations.values())


def digest(text: str) -> str:
    """A text's name in the history."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def items(messages: Iterable[dict[str, Any]]) -> list[Item]:
    """Messages of the contract as the history keeps them."""
    return [Item(one["id"], digest(one["content"]), one["role"], one["state"], one["status"]) for one in messages]


def _asked(operation: Operation) -> dict[str, Any]:
    return {name: value for name in _FIELDS if name not in _ANSWER and (value := getattr(operation, name)) != _DEFAULTS.get(name, _NOTHING)}


def _answered(operation: Operation) -> dict[str, Any]:
    return {name: value for name in _ANSWER if (value := getattr(operation, name)) != _DEFAULTS[name]}


def _apply(operation: Operation, answer: dict[str, Any]) -> None:
    made = {"messages": Item, "conversations": Listed}
    for name, value in answer.items():
        setattr(operation, name, [made[name](**one) for one in value] if name in made else value)


_NOTHING = object()
