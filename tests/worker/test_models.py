"""What Postgres refuses by itself, and the index that each of our queries walks."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any
from unittest import mock

import pytest
from sqlalchemy import Connection, NullPool, TextClause, create_engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session

from worker import committed, database, loading
from worker.database import sqlalchemy_url
from worker.models import Conversation, DeadLetter, Message, Shard, User
from worker.settings import Settings

NOW = datetime(2026, 11, 21, 10, 30, 0, 123456, tzinfo=UTC)
LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)
AS_OWNER = text("SET LOCAL chatkeep.role = 'owner'")


class TestConstraints:
    def test_rows_come_back_as_they_were_written(self, connection: Connection) -> None:
        with Session(connection) as session:
            user = User(email="a@example.com", password_hash="x")
            session.add(user)
            session.flush()
            session.add(Conversation(id=64, user_id=user.id, title="A title", created_at=NOW, updated_at=NOW))
            session.flush()
            session.add(
                Message(conversation_id=64, id=128, user_id=user.id, role="user", content="ä\n😀", created_at=NOW, status="complete")
            )
            session.add(DeadLetter(entry_id="7", shard=1, reason="refused", error="DataError 22001", entry="{}"))
            session.add(Shard(number=1, shards=16))
            session.flush()
            session.expire_all()
            message = session.get_one(Message, (64, 128))
            assert (message.content, message.created_at, message.user_id) == ("ä\n😀", NOW, user.id)
            assert user.created_at.tzinfo is not None
            assert session.get_one(Shard, 1).last_id == 0

    def test_ids_use_all_53_bits(self, connection: Connection) -> None:
        _user(connection, 1)
        _conversation(connection, 2**53 - 1, 1)
        _message(connection, 2**53 - 1, 2**53 - 1, 1)

    def test_message_in_somebody_elses_conversation(self, connection: Connection) -> None:
        _user(connection, 1)
        _user(connection, 2)
        _conversation(connection, 64, 1)
        with _refused("fk_message_conversation_id_user_id"):
            _message(connection, 64, 1, 2)

    def test_message_without_a_conversation(self, connection: Connection) -> None:
        _user(connection, 1)
        with _refused("fk_message_conversation_id_user_id"):
            _message(connection, 64, 1, 1)

    def test_conversation_without_a_user(self, connection: Connection) -> None:
        with _refused("fk_conversation_user_id"):
            _conversation(connection, 64, 1)

    def test_conversation_cannot_change_hands_under_its_messages(self, connection: Connection) -> None:
        _user(connection, 1)
        _user(connection, 2)
        _conversation(connection, 64, 1)
        _message(connection, 64, 1, 1)
        with _refused("fk_message_conversation_id_user_id"):
            connection.execute(text("UPDATE conversation SET user_id = 2"))

    @pytest.mark.parametrize(("column", "value"), [("role", "system"), ("role", ""), ("status", "pending")])
    def test_limited_words(self, connection: Connection, column: str, value: str) -> None:
        _user(connection, 1)
        _conversation(connection, 64, 1)
        with _refused(f"ck_message_{column}"):
            _message(connection, 64, 1, 1, **{column: value})

    def test_email_is_unique_and_bounded(self, connection: Connection) -> None:
        _user(connection, 1, "a@example.com")
        with _refused("uq_user_email"), connection.begin_nested():
            _user(connection, 2, "a@example.com")
        with _refused("ck_user_email_length"):
            _user(connection, 3, "a" * 255)

    def test_retry_key_is_unique_within_its_conversation(self, connection: Connection) -> None:
        _user(connection, 1)
        _conversation(connection, 64, 1)
        _conversation(connection, 65, 1)
        _message(connection, 64, 1, 1, idempotency_key="k:a")
        _message(connection, 64, 2, 1, idempotency_key="k:b")
        _message(connection, 65, 3, 1, idempotency_key="k:a")
        _message(connection, 64, 4, 1)
        _message(connection, 64, 5, 1)
        with _refused("uq_message_conversation_id_idempotency_key"):
            _message(connection, 64, 6, 1, idempotency_key="k:a")

    def test_retry_key_is_unique_among_a_users_conversations(self, connection: Connection) -> None:
        _user(connection, 1)
        _user(connection, 2)
        _conversation(connection, 64, 1, idempotency_key="a")
        _conversation(connection, 65, 2, idempotency_key="a")
        _conversation(connection, 66, 1)
        _conversation(connection, 67, 1)
        with _refused("uq_conversation_user_id_idempotency_key"):
            _conversation(connection, 68, 1, idempotency_key="a")

    def test_log_entry_is_buried_once(self, connection: Connection) -> None:
        bury = text("INSERT INTO dead_letter (entry_id, shard, reason, error, entry) VALUES ('7', :shard, 'r', 'e', '{}')")
        connection.execute(bury, {"shard": 1})
        connection.execute(bury, {"shard": 2})
        with _refused("uq_dead_letter_shard_entry_id"):
            connection.execute(bury, {"shard": 1})


class TestRepr:
    def test_no_content_and_no_address_in_it(self) -> None:
        message = Message(conversation_id=1, id=2, user_id=1, role="user", content="between us", created_at=NOW, status="complete")
        user = User(email="a@example.com", password_hash="argon")
        conversation = Conversation(id=1, user_id=1, title="between us", created_at=NOW, updated_at=NOW)
        letter = DeadLetter(entry_id="1", shard=1, reason="r", error="e", entry="between us")
        said = repr((message, user, conversation, letter))
        assert "between us" not in said
        assert "example.com" not in said
        assert "argon" not in said


@pytest.mark.parametrize("analyzed", [False, True])
class TestIndexes:
    """On 60,000 messages, with the planner's statistics and without, planned for these values or once for all: one walk along one index, no
    sort, nothing read past the page."""

    @pytest.fixture(autouse=True, params=["EXPLAIN", "PREPARE"])
    def how(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param == "PREPARE":
            monkeypatch.setitem(globals(), "_say_explain", _say_explain_prepared)

    def test_history(self, crowd: None, analyzed: bool) -> None:
        _analyze(analyzed)
        columns = "SELECT id, role, content, created_at, status "
        for statement, direction in ((text(columns + committed._OLDER), "Backward"), (text(columns + committed._NEWER), "Forward")):
            for conversation in (1, 17, 1000, 999_999):
                for low, high in ((0, 2**63 - 1), (20_000, 2**63 - 1), (0, 20_000)):
                    values = {"user": 1 + conversation % 2, "conversation": conversation, "from": low, "until": high, "count": 51}
                    plan = _plan(statement, values)
                    assert (plan["Index Name"], plan["Scan Direction"]) == ("pk_message", direction)
                    assert plan["Index Cond"].count("ROW(conversation_id, id)") == 2
                    assert plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0) <= 51

    def test_whether_there_is_more(self, crowd: None, analyzed: bool) -> None:
        _analyze(analyzed)
        for conversation in (1, 17, 1000, 999_999):
            values = {"user": 1 + conversation % 2, "conversation": conversation, "beyond_from": 0, "beyond_until": 2**63 - 1}
            plan = _plan(text("SELECT id " + committed._BEYOND), values)
            assert plan["Index Name"] == "pk_message"
            assert plan["Actual Rows"] <= 1

    def test_page_is_these_one_after_the_other(self, crowd: None, analyzed: bool) -> None:
        _analyze(analyzed)
        for (direction, look_beyond), statement in committed._PAGES.items():
            for conversation in (1, 17, 1000, 999_999):
                values = {"user": 1 + conversation % 2, "conversation": conversation, "from": 0, "until": 2**63 - 1, "count": 51}
                page = _explained(statement, values | {"beyond_from": 20_000, "beyond_until": 2**63 - 1})
                assert page["Node Type"] == "Append"
                tables = [part for part in page["Plans"] if '"Relation Name"' in json.dumps(part)]
                parts = [_scan(part, ("Limit", "Result", "Subquery Scan")) for part in tables]
                assert [part["Index Name"] for part in parts[1:]] == ["pk_message"] * (2 if look_beyond else 1), direction
                assert parts[0]["Index Name"] in ("pk_conversation", "uq_conversation_id_user_id")
                assert all(part["Actual Rows"] + part.get("Rows Removed by Filter", 0) <= 51 for part in parts)

    def test_one_conversation(self, crowd: None, analyzed: bool) -> None:
        _analyze(analyzed)
        plan = _plan(committed._CONVERSATION, {"user": 2, "conversation": 17})
        assert plan["Index Name"] in ("pk_conversation", "uq_conversation_id_user_id")

    def test_list(self, crowd: None, analyzed: bool) -> None:
        _analyze(analyzed)
        for user in (1, 2, 999_999):
            for at in (LONG_AGO, NOW):
                values = {"user": user, "updated": at, "id": 500, "without": [998, 999], "count": 21}
                plan = _plan(committed._LIST, values)
                assert (plan["Index Name"], plan["Scan Direction"]) == ("ix_conversation_user_id_updated_at_id", "Forward")
                assert "ROW(updated_at, id) <" in plan["Index Cond"]

    def test_what_the_cache_has_forgotten(self, crowd: None, analyzed: bool) -> None:
        _analyze(analyzed)
        limits = (1, 202, loading.RETRY_KEYS_MAX + 2)  # a window looks one row ahead
        for conversation in (1, 17, 1000):
            user = 1 + conversation % 2
            with mock.patch.object(loading, "read_rows", return_value=[]) as asked:
                loading.load_conversation(conversation, user, 200, 30)
            load = _explained(*asked.call_args.args)
            assert load["Node Type"] == "Append"
            for number, part in enumerate(part for part in load["Plans"] if '"Relation Name"' in json.dumps(part)):
                plan = _scan(part, above=("Limit", "Result", "WindowAgg", "Subquery Scan", "Sort"))  # of what the limit has left
                assert plan["Index Name"] in (("pk_conversation", "uq_conversation_id_user_id") if number == 0 else ("pk_message",))
                assert plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0) <= limits[number]
            assert number == 2
            wanted: Any
            for find, wanted in ((loading.find_messages, [2]), (loading.find_retry_keys, [f"{n}:k:2" for n in range(100)])):
                [(statement, values), *_] = _asked(partial(find, conversation, user, wanted, 30))
                assert _plan(statement, values)["Index Name"] in ("pk_message", "uq_message_conversation_id_idempotency_key")
        [(statement, values)] = _asked(partial(loading.find_created_key, 1, "6", 30))
        assert _plan(statement, values)["Index Name"] == "uq_conversation_user_id_idempotency_key"

    def test_retries(self, crowd: None, analyzed: bool) -> None:
        _analyze(analyzed)
        key = text("SELECT id FROM message WHERE conversation_id = 17 AND user_id = :user AND idempotency_key = 'k:17017'")
        plan = _plan(key, {"user": 2})
        assert plan["Index Name"] == "uq_message_conversation_id_idempotency_key"
        plan = _plan(text("SELECT id FROM conversation WHERE user_id = :user AND idempotency_key = '7'"), {"user": 1})
        assert plan["Index Name"] == "uq_conversation_user_id_idempotency_key"


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    """A transaction of the owner's that is rolled back."""
    engine = create_engine(sqlalchemy_url(database_url), poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(AS_OWNER)
        yield connection
        connection.rollback()


@pytest.fixture
def crowd(settings: Settings) -> Iterator[None]:
    """Two users with 1,000 conversations; conversation 1 has 30,000 messages, the others 30 each."""
    with database.engine().begin() as connection:
        connection.execute(AS_OWNER)
        _user(connection, 1)
        _user(connection, 2)
        connection.execute(_MANY_CONVERSATIONS)
        connection.execute(_MANY_MESSAGES)
    yield
    database.dispose()


_MANY_CONVERSATIONS = text("""
    INSERT INTO conversation (id, user_id, created_at, updated_at, idempotency_key)
    SELECT n, 1 + n % 2, now(), now() - n * interval '1 minute', CASE WHEN n % 3 = 0 THEN n::text END FROM generate_series(1, 1000) n
""")
_MANY_MESSAGES = text("""
    INSERT INTO message (conversation_id, id, user_id, role, content, created_at, status, idempotency_key)
    SELECT c, n, 1 + c % 2, 'user', repeat('x', 100), now(), 'complete', 'k:' || n
    FROM (SELECT n, CASE WHEN n % 2 = 0 THEN 1 ELSE 1 + n % 1000 END c FROM generate_series(1, 60000) n) made
""")


def _user(connection: Connection, number: int, email: str | None = None) -> None:
    values = {"id": number, "email": email or f"{number}@example.com"}
    connection.execute(text("INSERT INTO \"user\" (id, email, password_hash) VALUES (:id, :email, 'x')"), values)


def _conversation(connection: Connection, number: int, user: int, **other: Any) -> None:
    _insert(connection, "conversation", {"id": number, "user_id": user, "created_at": NOW, "updated_at": NOW} | other)


def _message(connection: Connection, conversation: int, number: int, user: int, **other: Any) -> None:
    plain = {"conversation_id": conversation, "id": number, "user_id": user, "created_at": NOW}
    _insert(connection, "message", plain | {"role": "user", "content": "Hello", "status": "complete"} | other)


def _insert(connection: Connection, table: str, values: dict[str, Any]) -> None:
    names = ", ".join(values)
    connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({', '.join(':' + name for name in values)})"), values)


def _refused(constraint: str) -> Any:
    return pytest.raises(IntegrityError, match=f'"{constraint}"')


def _analyze(wanted: bool) -> None:
    """Autovacuum may have been quicker, which only makes a test without statistics one with them."""
    if wanted:
        with database.engine().begin() as connection:
            connection.execute(text("ANALYZE message"))
            connection.execute(text("ANALYZE conversation"))


def _asked(call: Callable[[], object]) -> list[tuple[TextClause, dict[str, Any]]]:
    """What a function of the product asks Postgres, without the beginning of its transactions."""
    asked: list[tuple[TextClause, dict[str, Any]]] = []

    def note(connection: Connection, statement: Any, values: Any, parameters: Any, options: Any) -> None:
        asked.append((statement, parameters))

    event.listen(database.engine(), "before_execute", note)
    try:
        with mock.patch.object(database, "_local_settings", wraps=database._local_settings) as settings:
            call()
    finally:
        event.remove(database.engine(), "before_execute", note)
    assert all(call.args[2] for call in settings.call_args_list), "not with the planner's settings that _plan shows"
    return asked


_EXPLAIN = "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON)"


def _explained(statement: TextClause, values: dict[str, Any]) -> dict[str, Any]:
    with database.read(seconds=30, user=values["user"]) as connection, database.raw_cursor(connection) as cursor:
        _say_explain(cursor, database._driver_sql(statement), values)
        [[explained]] = cursor.fetchall()
    plan: dict[str, Any] = explained[0]["Plan"]
    return plan


def _say_explain(cursor: Any, sql: str, values: dict[str, Any]) -> None:
    cursor.execute(f"{_EXPLAIN} {sql}", values)


def _say_explain_prepared(cursor: Any, sql: str, values: dict[str, Any]) -> None:
    """As `read_rows` does."""
    prepare, execute = database._prepared(sql)
    cursor.execute(f"DEALLOCATE ALL; {prepare}; {_EXPLAIN} {execute}", values)


def _plan(statement: TextClause, values: dict[str, Any], above: Collection[str] = ("Limit", "Result")) -> dict[str, Any]:
    """What one scan did; anything else above it (a sort, say) fails the test."""
    return _scan(_explained(statement, values), above)


def _scan(plan: dict[str, Any], above: Collection[str]) -> dict[str, Any]:
    while plan["Node Type"] in above:  # beside the settings that the policies compare with, which read no table
        [plan] = [part for part in plan["Plans"] if '"Relation Name"' in json.dumps(part)]
    assert plan["Node Type"] in ("Index Scan", "Index Only Scan"), plan
    return plan
