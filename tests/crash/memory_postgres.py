"""A Postgres in this process, for the model: the tables, READ COMMITTED transactions, savepoints and the shard's advisory lock.

The statements are those of `worker/persist.py`, `worker/loading.py` and `worker/committed.py`, as they stand there. A SELECT from one table
is translated and run, with the conditions that it has, so that a condition that somebody forgets is missing here too. What writes is
recognised by its form. A statement that is neither raises: the model never passes by ignoring one.

Every statement sees what was committed when it began, and what its own transaction wrote. `Connection` is what SQLAlchemy gives, `Cursor`
what psycopg2 gives, as far as the product uses them. `step` is called around everything that a process waits for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any

from psycopg2 import errors
from sqlalchemy.exc import NoResultFound

from worker.codec import HASH_SQL, request_hash, to_datetime
from worker.errors import PostgresUnavailable

Row = dict[str, Any]
Step = Callable[[str, Callable[[], Any], type[Exception]], Any]
IDLE_SECONDS = 15.0

_GIVEN = ("id", "conversation_id", "user_id", "role", "content", "microseconds", "status", "idempotency_key")
_INSERT = (
    "INSERT INTO message (id, conversation_id, user_id, role, content, status, idempotency_key, created_at) "
    "SELECT id, conversation_id, user_id, role, content, status, NULLIF(idempotency_key, ''), "
    "timestamptz 'epoch' + microseconds * interval '1 microsecond' FROM"
)
_KEYS = {"conversation": ("id",), "message": ("conversation_id", "id"), "dead_letter": ("shard", "entry_id"), "shard": ("number",)}
_COLUMNS = {
    "conversation": ("id", "user_id", "title", "created_at", "updated_at", "deleted_at", "idempotency_key", "request_hash"),
    "message": ("id", "conversation_id", "user_id", "role", "content", "created_at", "status", "idempotency_key"),
    "dead_letter": ("shard", "entry_id", "reason", "error", "entry"),
    "shard": ("number", "shards", "last_id"),
}


class MemoryPostgres:
    """One server."""

    def __init__(self, step: Step, clock: Callable[[], float]) -> None:
        self.step = step
        self.clock = clock
        self.up = True
        self.tables: dict[str, dict[Any, Row]] = {name: {} for name in _KEYS}
        self.open: list[Transaction] = []
        self.locks: dict[tuple[int, int], Transaction] = {}

    def stop(self) -> None:
        """An immediate stop: what was not committed never was."""
        self.up = False
        self.end_transactions()

    def end_transactions(self, idle_seconds: float = 0.0) -> None:
        """Ends those that have been idle for so long, as the server does by itself; their clients find out later."""
        for transaction in [one for one in self.open if self.clock() - one.used >= idle_seconds]:
            transaction.end()

    @contextmanager
    def transaction(self, *, read_only: bool = False, **_: Any) -> Iterator[Connection]:
        """In the place of `worker.database.transaction`."""
        one: Transaction = self.step("begin", lambda: self._begin(read_only), PostgresUnavailable)
        try:
            yield Connection(one)
            if read_only or not one.changes:
                one.commit()
            else:
                self.step("commit", one.commit, PostgresUnavailable)
        finally:
            one.end()

    def read_rows(self, statement: Any, values: Mapping[str, Any], **_: Any) -> list[tuple[Any, ...]]:
        """In the place of `worker.database.read_rows`: one step, as it is one round trip."""
        words = _squeezed(statement.text)

        def run() -> list[tuple[Any, ...]]:
            one = self._begin(read_only=True)
            try:
                return _run(one, words, values)
            finally:
                one.end()

        rows: list[tuple[Any, ...]] = self.step(f"sql {words[:20]}", run, PostgresUnavailable)
        return rows

    def _begin(self, read_only: bool) -> Transaction:
        if not self.up:
            raise PostgresUnavailable
        one = Transaction(self, read_only)
        self.open.append(one)
        return one


class Transaction:
    """What it wrote, by table and key; None is a deleted row."""

    def __init__(self, server: MemoryPostgres, read_only: bool) -> None:
        self.server = server
        self.read_only = read_only
        self.used = server.clock()
        self.alive = True
        self.changes: dict[tuple[str, Any], Row | None] = {}
        self.savepoints: list[dict[tuple[str, Any], Row | None]] = []

    def use(self) -> None:
        """Called by every statement."""
        if not self.alive:
            raise PostgresUnavailable
        self.used = self.server.clock()

    def commit(self) -> None:
        self.use()
        for (table, key), row in self.changes.items():
            if row is None:
                self.server.tables[table].pop(key, None)
            else:
                self.server.tables[table][key] = row
        self.end()

    def end(self) -> None:
        """Over, one way or the other: its locks are free."""
        self.alive = False
        if self in self.server.open:
            self.server.open.remove(self)
        for name in [name for name, holder in self.server.locks.items() if holder is self]:
            del self.server.locks[name]

    def rows(self, table: str) -> list[Row]:
        """The table as this transaction sees it now."""
        if not self.changes:
            return list(self.server.tables[table].values())
        mine = {key: row for (name, key), row in self.changes.items() if name == table}
        return [row for row in ({**self.server.tables[table], **mine}).values() if row is not None]

    def put(self, table: str, row: Row) -> None:
        key = tuple(row[name] for name in _KEYS[table])
        self._claim(table, key)
        self.changes[table, key] = row

    def delete(self, table: str, row: Row) -> None:
        key = tuple(row[name] for name in _KEYS[table])
        self._claim(table, key)
        self.changes[table, key] = None

    def _claim(self, table: str, key: Any) -> None:
        """Another's row lock: its time-out is over at once."""
        if self.read_only:
            raise errors.ReadOnlySqlTransaction
        if any((table, key) in other.changes for other in self.server.open if other is not self):
            raise PostgresUnavailable

    def lock(self, name: tuple[int, int]) -> bool:
        return self.server.locks.setdefault(name, self) is self


class Result:
    """The rows of an answer."""

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self._rows)

    def all(self) -> list[tuple[Any, ...]]:
        return self._rows

    def one_or_none(self) -> tuple[Any, ...] | None:
        assert len(self._rows) <= 1
        return self._rows[0] if self._rows else None

    def one(self) -> tuple[Any, ...]:
        if len(self._rows) != 1:
            raise NoResultFound
        return self._rows[0]

    def scalar_one(self) -> Any:
        return self.one()[0]

    def scalar_one_or_none(self) -> Any:
        row = self.one_or_none()
        return row[0] if row else None


class Connection:
    """As SQLAlchemy's."""

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction

    def execute(self, statement: Any, parameters: Mapping[str, Any] | None = None) -> Result:
        words = _squeezed(statement.text)
        found = words.split(" ", 2)

        def run() -> list[tuple[Any, ...]]:
            self.transaction.use()
            return _run(self.transaction, words, parameters or {})

        return Result(self.transaction.server.step(f"sql {found[0]} {found[1]}", run, PostgresUnavailable))


class Cursor:
    """As psycopg2's. Nothing of a flush that holds the shard's lock can be seen from outside, so only few of its statements are steps."""

    def __init__(self, connection: Connection) -> None:
        self._transaction = connection.transaction
        self._rows: list[tuple[Any, ...]] = []
        self.rowcount = 0

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> None:
        words = _squeezed(statement)

        def run() -> None:
            self._transaction.use()
            self._rows = _run(self._transaction, words, parameters)
            self.rowcount = len(self._rows)

        if words.startswith(("SELECT pg_", "SELECT n, ", "INSERT INTO message")):
            self._transaction.server.step("sql " + words[:20], run, PostgresUnavailable)
        else:
            run()

    def values(self, statement: str, rows: Sequence[Sequence[Any]], **_: Any) -> None:
        """In the place of psycopg2's `execute_values`."""
        self._transaction.use()
        self.rowcount = _write(self._transaction, _squeezed(statement), rows)

    def fetchone(self) -> tuple[Any, ...]:
        return self._rows[0]

    def fetchall(self) -> list[tuple[Any, ...]]:
        return self._rows

    def close(self) -> None:
        pass


@contextmanager
def raw_cursor(connection: Connection) -> Iterator[Cursor]:
    """In the place of `worker.database.raw_cursor`."""
    yield Cursor(connection)


def execute_values(cursor: Cursor, statement: str, rows: Sequence[Sequence[Any]], **options: Any) -> None:
    """In the place of psycopg2's."""
    cursor.values(statement, rows, **options)


# Statements


def _run(one: Transaction, words: str, parameters: Any) -> list[tuple[Any, ...]]:
    if " UNION ALL " in words:
        return [row for part in words.split(" UNION ALL ") for row in _query(_unwrapped(part))(one, parameters)]
    if words.startswith("SELECT") and "advisory" not in words and "JOIN" not in words:
        return _query(words)(one, parameters)
    for beginning, run in _STATEMENTS:
        if words.startswith(beginning):
            return run(one, words, parameters) or []
    raise AssertionError(f"the model does not know this statement: {words}")


def _unwrapped(part: str) -> str:
    return part[1:-1] if part.startswith("(") else part


def _try_lock(one: Transaction, _: str, parameters: tuple[Sequence[int], int]) -> list[tuple[Any, ...]]:
    shards, lock_class = parameters
    last_ids = {row["number"]: row["last_id"] for row in one.rows("shard")}
    return [(shard, last_ids.get(shard, 0)) for shard in shards if one.lock((lock_class, shard))]


def _lock(one: Transaction, _: str, parameters: Mapping[str, int]) -> list[tuple[Any, ...]]:
    if not one.lock((parameters["class"], parameters["shard"])):
        raise PostgresUnavailable  # its time-out is over at once
    return [(None,)]


def _savepoint(one: Transaction, words: str, _: Any) -> None:
    if words.startswith("SAVEPOINT"):
        one.savepoints.append(dict(one.changes))
    elif words.startswith("ROLLBACK"):
        one.changes = one.savepoints.pop()
    else:
        one.savepoints.pop()


def _rows(columns: Sequence[str]) -> Iterator[tuple[int | str | None, ...]]:
    """What `unnest` makes of the texts of arrays."""
    return zip(*map(_elements, columns), strict=True)


def _elements(array: str) -> list[int | str | None]:
    assert re.fullmatch(rf"\{{({_ELEMENT})?(,({_ELEMENT}))*\}}", array, re.DOTALL), f"this is no array: {array}"
    plain: dict[str, None] = {"NULL": None}
    return [
        re.sub(r"\\(.)", r"\1", one[1:-1], flags=re.DOTALL) if one.startswith('"') else plain[one] if one in plain else int(one)
        for one in re.findall(_ELEMENT, array, re.DOTALL)
    ]


_ELEMENT = r'"(?:[^"\\]|\\.)*"|NULL|-?\d+'


def _messages(columns: Sequence[str]) -> list[Row]:
    rows = [dict(zip(_GIVEN, values, strict=True)) for values in _rows(columns)]
    return [row | {"idempotency_key": row["idempotency_key"] or None} for row in rows]  # NULLIF(idempotency_key, '')


def _insert_messages(one: Transaction, words: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """`INSERT INTO message (...) SELECT ... FROM unnest(...)`."""
    parents = {(row["id"], row["user_id"]) for row in one.rows("conversation")}
    there = {(row["conversation_id"], row["id"]) for row in one.rows("message")}
    keys = {(row["conversation_id"], row["idempotency_key"]) for row in one.rows("message") if row["idempotency_key"]}
    inserted: list[tuple[Any, ...]] = []
    for row in _messages(columns):
        if (row["conversation_id"], row["user_id"]) not in parents:
            raise errors.ForeignKeyViolation
        taken = (row["conversation_id"], row["id"]) in there
        taken |= row["idempotency_key"] is not None and (row["conversation_id"], row["idempotency_key"]) in keys
        if taken and "ON CONFLICT DO NOTHING" not in words:
            raise errors.UniqueViolation
        if taken:
            continue
        if "\0" in row["content"] or row["role"] not in ("user", "assistant") or row["status"] not in ("complete", "incomplete"):
            raise errors.DataError
        made = {name: row[name] for name in _GIVEN if name != "microseconds"}
        one.put("message", made | {"created_at": to_datetime(row["microseconds"])})
        there.add((row["conversation_id"], row["id"]))
        keys.add((row["conversation_id"], row["idempotency_key"]))
        inserted.append((row["id"],))
    return inserted


def _compare_messages(one: Transaction, _: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """Which of these were left out, and why (`persist._insert_messages`)."""
    messages = one.rows("message")
    found = []
    for s in _messages(columns):
        m = next((row for row in messages if (row["conversation_id"], row["id"]) == (s["conversation_id"], s["id"])), None)
        k = next(
            (
                row
                for row in messages
                if row["conversation_id"] == s["conversation_id"]
                and s["idempotency_key"] is not None
                and row["idempotency_key"] == s["idempotency_key"]
                and row["id"] != s["id"]
            ),
            None,
        )
        if m is None or any(m[name] != s[name] for name in ("user_id", "role", "status", "content")):
            same = k is not None and all(k[name] == s[name] for name in ("role", "status", "content"))
            found.append((s["id"], m is not None, k["id"] if k else None, same))
    return found


def _delete_messages(one: Transaction, _: str, parameters: Sequence[Any]) -> None:
    for row in one.rows("message"):
        if row["conversation_id"] in parameters[0]:
            one.delete("message", row)


def _note_first_shard(one: Transaction, words: str, parameters: Mapping[str, int]) -> None:
    _note_shard(one, words, (parameters["number"], parameters["shards"], 0))


def _note_shard(one: Transaction, words: str, values: Sequence[int]) -> None:
    number, shards, last_id = values
    row = next((row for row in one.rows("shard") if row["number"] == number), None)
    if row is None:
        one.put("shard", {"number": number, "shards": shards, "last_id": last_id})
    elif "DO UPDATE SET last_id = GREATEST(shard.last_id, EXCLUDED.last_id)" in words:
        one.put("shard", row | {"last_id": max(row["last_id"], last_id)})


def _update_all(one: Transaction, words: str, parameters: Sequence[str]) -> list[tuple[Any, ...]]:
    names, change = _update(words)
    return [()] * sum(change(one, dict(zip(names, values, strict=True))) for values in _rows(parameters))


_STATEMENTS: tuple[tuple[str, Callable[[Transaction, str, Any], list[tuple[Any, ...]] | None]], ...] = (
    ("SELECT n, COALESCE((SELECT last_id FROM shard WHERE number = n), 0) FROM unnest(%s::int[]) AS n WHERE pg_try_", _try_lock),
    ("SELECT pg_advisory_xact_lock(", _lock),
    ("SAVEPOINT part", _savepoint),
    ("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part", _savepoint),
    ("RELEASE SAVEPOINT part", _savepoint),
    (f"{_INSERT} unnest(", _insert_messages),
    ("SELECT s.id, m.id IS NOT NULL, k.id,", _compare_messages),
    ("UPDATE conversation c SET updated_at = ", _update_all),
    ("DELETE FROM message WHERE conversation_id = ANY(%s)", _delete_messages),
    ("INSERT INTO shard (number, shards, last_id) VALUES (:number, :shards, 0)", _note_first_shard),
)


def _write(one: Transaction, words: str, rows: Sequence[Sequence[Any]]) -> int:
    if found := re.match(r"INSERT INTO (conversation|dead_letter) \((.*?)\) VALUES %s(?: ON CONFLICT(?: \((.*?)\))? DO NOTHING)?$", words):
        return sum(
            _insert(one, found[1], dict(zip(found[2].split(", "), row, strict=True)), found[3], "ON CONFLICT" in words) for row in rows
        )
    if words.startswith("INSERT INTO shard (number, shards, last_id) VALUES %s"):
        for row in rows:
            _note_shard(one, words, row)
        return len(rows)
    if words.startswith("UPDATE conversation"):
        names, change = _update(words)
        return sum(change(one, dict(zip(names, row, strict=True))) for row in rows)
    raise AssertionError(f"the model does not know this statement: {words}")


def _insert(one: Transaction, table: str, row: Row, target: str | None, tolerant: bool) -> int:
    row = dict.fromkeys(_COLUMNS[table]) | row
    there = one.rows(table)
    if any(all(other[name] == row[name] for name in _KEYS[table]) for other in there):
        if tolerant:
            return 0
        raise errors.UniqueViolation
    key = row.get("idempotency_key")
    if key is not None and any(other["user_id"] == row["user_id"] and other["idempotency_key"] == key for other in there):
        if tolerant and target is None:
            return 0
        raise errors.UniqueViolation
    if row.get("title") and len(row["title"]) > 200:
        raise errors.StringDataRightTruncation
    one.put(table, row)
    return 1


@lru_cache
def _update(words: str) -> tuple[list[str], Callable[[Transaction, Row], int]]:
    """`UPDATE conversation c SET ... FROM ... AS v (...) WHERE ...`: the names of the values, and what to do with each."""
    found = re.match(r"UPDATE conversation c SET (.*) FROM (?:\(VALUES %s\)|unnest\([^()]*\)) AS v \((.*?)\) WHERE (.*)$", words)
    assert found, f"the model does not know this statement: {words}"
    assignments = [part.split(" = ", 1) for part in _parts(found[1])]
    changes = {name: _compiled(f"lambda r, v: {_joined(value)}") for name, value in assignments}
    test = _compiled(f"lambda r, v: {' and '.join(_joined(part) for part in found[3].split(' AND '))}")

    def change(one: Transaction, values: Row) -> int:
        rows = [row for row in one.rows("conversation") if test(row, values)]
        for row in rows:
            one.put("conversation", row | {name: value(row, values) for name, value in changes.items()})
        return len(rows)

    return found[2].split(", "), change


def _joined(part: str) -> str:
    """SQL as Python over a row of the table, `c`, and one of values, `v`."""
    part = part.replace("timestamptz 'epoch' + v.activity * interval '1 microsecond'", "moment(v.activity)")
    part = part.replace(" IS NOT NULL", " is not None").replace(" IS NULL", " is None").replace(" = ", " == ").replace("NULL", "None")
    return re.sub(r"\bv\.(\w+)", r'v["\1"]', re.sub(r"\bc\.(\w+)", r'r["\1"]', part))


# SELECT


@lru_cache
def _query(words: str) -> Callable[[Transaction, Any], list[tuple[Any, ...]]]:
    """A SELECT from one table as a function."""
    if found := re.match(r"SELECT (.*) FROM \((SELECT \*, sum\(octet_length\((\w+)\)\) OVER .*)\) AS latest ORDER BY .*$", words):
        return _with_sizes(found[1], found[2], found[3])
    exists = re.match(r"SELECT EXISTS \(SELECT(.*)\)$", words)
    found = re.match(
        r"SELECT ?(.*?) ?FROM (\w+)(?: WHERE (.*?))?(?: ORDER BY (.*?))?(?: LIMIT :?(\w+))?$", "SELECT" + exists[1] if exists else words
    )
    assert found, f"the model does not know this statement: {words}"
    assert found[2] in _COLUMNS, f"the model does not know this statement: {words}"
    columns, table, where, order, limit = found.groups()
    if columns.startswith("max("):
        name = columns[4:-1]
        return lambda one, _: [(max((row[name] for row in one.rows(table)), default=None),)]
    test = _compiled(f"lambda r, p: {_condition(where, table) if where else True}")
    chosen = _compiled("lambda r: (" + "".join(_expression(part, table) + ", " for part in _parts(columns)) + ")")
    ranks = [(_expression(part.split(" ")[0], table), part.endswith(" DESC")) for part in _parts(order)] if order else []
    sorting = _compiled("lambda r: (" + "".join(expression + ", " for expression, _ in ranks) + ")")
    backwards = bool(ranks) and ranks[0][1]
    assert all(descending == backwards for _, descending in ranks), words

    def run(one: Transaction, parameters: Any) -> list[tuple[Any, ...]]:
        rows = [row for row in one.rows(table) if test(row, parameters)]
        if exists:
            return [(bool(rows),)]
        rows.sort(key=sorting, reverse=backwards)
        count = None if limit is None else int(limit) if limit.isdigit() else parameters[limit]
        return [chosen(row) for row in rows[:count]]

    return run


def _with_sizes(columns: str, inner: str, measured: str) -> Callable[[Transaction, Any], list[tuple[Any, ...]]]:
    """Rows with the sum of their lengths so far, as `size`: what a loader limits its answer by."""
    names = _COLUMNS["message"]
    rows = _query(re.sub(r"^SELECT \*, sum\(.*?PRECEDING\) AS size", "SELECT " + ", ".join(names), inner))
    chosen = _compiled("lambda r, p: (" + "".join(_expression(part, "message", "size") + ", " for part in _parts(columns)) + ")")

    def run(one: Transaction, parameters: Any) -> list[tuple[Any, ...]]:
        size, found = 0, []
        for values in rows(one, parameters):
            row: Row = dict(zip(names, values, strict=True))
            size += len(row[measured].encode())
            found.append(chosen(row | {"size": size}, parameters))
        return found

    return run


def _condition(where: str, table: str) -> str:
    parts = re.split(r" AND ", where)
    return " and ".join(_expression(part, table) for part in parts)


def _expression(part: str, table: str, *more: str) -> str:
    """SQL as Python over a row `r` and parameters `p`."""
    part = re.sub(r"(::bigint)?( AS \w+)?$", "", part.strip()).replace(HASH_SQL, "HASH")
    if part == "NULL":
        return "None"
    if found := re.match(r"CASE WHEN (.*) THEN (.*) END$", part):
        return f"({_expression(found[2], table, *more)} if {_expression(found[1], table, *more)} else None)"
    part = re.sub(r"(NOT )?(\w+) = ANY\((.*?)\)", lambda found: f"{found[2]} {'not ' if found[1] else ''}in {found[3]}", part)
    part = part.replace(" IS NOT NULL", " is not None").replace(" IS NULL", " is None").replace(" = ", " == ")
    if "||" in part:
        part = " + ".join(f"str({piece.strip()})" for piece in part.split("||"))
    names = "|".join((*_COLUMNS[table], *more))
    part = re.sub(rf"(?<![:\w'])({names})\b", r'r["\1"]', part)
    part = re.sub(r"(?<![\w:'])\:(\w+)", r'p["\1"]', part).replace("%s", "p[0]")
    return part.replace("HASH", "hashed(r)")


def _parts(columns: str) -> list[str]:
    found, depth, begin = [], 0, 0
    columns = columns.replace(HASH_SQL, "HASH")
    for at, character in enumerate(columns):
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            found.append(columns[begin:at].strip())
            begin = at + 1
    return [part for part in (*found, columns[begin:].strip()) if part]


def _compiled(source: str) -> Callable[..., Any]:
    function: Callable[..., Any] = eval(source, {"hashed": _hashed, "GREATEST": _greatest, "COALESCE": _coalesce, "moment": _moment})
    return function


def _greatest(*values: Any) -> Any:
    return max((value for value in values if value is not None), default=None)


def _moment(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else to_datetime(microseconds)


def _coalesce(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _hashed(row: Row) -> str:
    return request_hash(row["role"], row["status"], row["content"])


@lru_cache
def _squeezed(statement: str) -> str:
    return " ".join(statement.split())
