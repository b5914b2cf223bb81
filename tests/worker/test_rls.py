"""Nobody else's: row-level security in every kind of installation, whatever the queries ask for.

hosted      one login like Neon's default role: no superuser, but BYPASSRLS, so that only the roles it changes into are held to policies
superuser   one login that is a superuser, as in most containers
plain       one login that may make no roles: by the policies alone
three       the owner migrates, the API and the worker have logins of their own
"""

# ruff: noqa: PT012 - that a transaction raises at its end is the subject here

from __future__ import annotations

import contextlib
import importlib.util
import random
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import psycopg2
import psycopg2.errors
import pytest
import sqlalchemy
import structlog.testing
from pydantic import SecretStr
from redis import Redis
from sqlalchemy import Connection, text

import api.history
import worker.pending
from api.dependencies import Page
from api.history import list_conversations, read_history
from tests import schema
from tests.core import conversation_entry, flush_all, message_entry
from worker import accounts, committed, database, dead_letters, loading
from worker.backlog import RawEntry
from worker.database import raw_cursor, read, read_rows, transaction
from worker.embedded import EmbeddedPostgres
from worker.errors import NotFound, PostgresUnavailable
from worker.models import Table
from worker.pending import PendingLog, client_key
from worker.persist import decode_batch, persist_batch, try_lock
from worker.settings import Settings

TABLES = ("user", "sign_in", "conversation", "message", "dead_letter", "shard")
ANN, BOB = 1, 2
WRITES = (
    "INSERT INTO conversation (id, user_id, created_at, updated_at) VALUES (30, 1, now(), now())",
    "UPDATE conversation SET title = 'changed'",
    "DELETE FROM conversation",
    "INSERT INTO message (conversation_id, id, user_id, role, content, created_at, status) "
    "VALUES (10, 13, 1, 'user', 'x', now(), 'complete')",
    "UPDATE message SET content = 'changed'",
    "DELETE FROM message",
    "INSERT INTO dead_letter (entry_id, shard, reason, error, entry) VALUES ('9', 1, 'r', 'e', '{}')",
    "UPDATE dead_letter SET reason = 'changed'",
    "DELETE FROM dead_letter",
    "INSERT INTO \"user\" (email, password_hash) VALUES ('eve@example.org', 'x')",
    "UPDATE \"user\" SET password_hash = 'changed'",
    'DELETE FROM "user"',
)


def only(*kinds: str) -> pytest.MarkDecorator:
    """In these kinds of installation; by itself a test runs in all."""
    return pytest.mark.parametrize("kind", kinds, scope="module")


class TestWhoSeesWhat:
    def test_user_sees_what_is_the_users(self, house: House) -> None:
        for user, conversation in ((ANN, 10), (BOB, 20)):
            with read(user=user) as connection:
                assert _all(connection, "SELECT id FROM conversation") == [(conversation,)]
                assert _all(connection, "SELECT id FROM message ORDER BY id") == [(conversation + 1,), (conversation + 2,)]
                assert _all(connection, 'SELECT id FROM "user"') == [(user,)]
                assert _all(connection, "SELECT id FROM sign_in") == [(f"of {user}",)]
            assert _visible("dead_letter", user=user) == 0

    def test_nobody_sees_nothing(self, house: House) -> None:
        for identity in ({}, {"user": 0}, {"user": 3}, {"email": ""}, {"email": "nobody@example.org"}):
            assert [_visible(table, **identity) for table in TABLES[:-1]] == [0] * 5

    def test_worker_sees_all_history_and_no_account(self, house: House) -> None:
        with house.as_worker():
            seen = [_visible(table, role="worker") for table in TABLES[:-1]]
        assert seen == [0, 0, 2, 4, 1]

    def test_sign_in_sees_one_account(self, house: House) -> None:
        ann = accounts.find_account("ann@example.org", 10)
        assert ann is not None
        assert (ann.id, ann.password_hash) == (ANN, "x")
        assert accounts.get_account(BOB, 10) is not None
        assert accounts.find_account("eve@example.org", 10) is None
        with read(email="ann@example.org") as connection:
            assert _all(connection, 'SELECT id FROM "user" WHERE true OR email = :email', email="bob@example.org") == [(ANN,)]
        accounts.ask_postgres(10)

    def test_sign_up(self, house: House) -> None:
        made = accounts.create_account("eve@example.org", "hash", 10)
        assert made is not None
        assert made == accounts.get_account(made.id, 10)
        assert accounts.create_account("ann@example.org", "another", 10) is None
        found = accounts.find_account("ann@example.org", 10)
        assert found is not None
        assert found.password_hash == "x"

    def test_sign_ins_are_their_users(self, house: House) -> None:
        insert = "INSERT INTO sign_in (id, user_id, token_hash, expires_at) VALUES ('new', 1, 'x', now())"
        for identity in ({}, {"user": BOB}, {"email": "ann@example.org"}):
            assert _rows_written(insert, **identity) == 0
            for statement in ("UPDATE sign_in SET token_hash = 'y' WHERE user_id = 1", "DELETE FROM sign_in WHERE id = 'of 1'"):
                assert _rows_written(statement, **identity) == 0
        assert _rows_written("DELETE FROM sign_in", user=ANN) == 1
        assert house.owner("SELECT id FROM sign_in") == [("of 2",)]

    def test_only_the_worker_writes_history(self, house: House) -> None:
        before = house.snapshot()
        for identity in ({}, {"user": ANN}, {"user": BOB}, {"email": "ann@example.org"}):
            for statement in WRITES:
                assert _rows_written(statement, **identity) == 0, (statement, identity)
        assert house.snapshot() == before

    def test_owner_at_work_sees_everything(self, house: House) -> None:
        assert [len(rows) for rows in house.snapshot().values()] == [2, 2, 2, 4, 1, 1]

    def test_operator_sees_dead_letters(self, house: House, capsys: pytest.CaptureFixture[str]) -> None:
        with house.as_worker():
            dead_letters.list_letters()
            dead_letters.drop([1], yes=True)
        assert "malformed" in capsys.readouterr().out
        assert house.owner("SELECT count(*) FROM dead_letter") == [(0,)]


class TestFlush:
    """Foreign keys, ON CONFLICT, COPY and savepoints under the policies."""

    def test_all_that_a_batch_can_hold(self, house: House, settings: Settings) -> None:
        new, old = 64 * 100 + 1, 64 * 101 + 1
        batch = [
            _entry(64 * 200 + 1, "c", conversation_entry(ANN, new), x="key"),
            _entry(64 * 201 + 1, "m", message_entry(ANN, new, "first"), x="k:a"),
            _entry(64 * 202 + 1, "m", message_entry(ANN, new, "second"), x="k:a"),  # another request with the same key
            _entry(64 * 203 + 1, "m", message_entry(BOB, new, "not his")),
            _entry(64 * 204 + 1, "c", conversation_entry(999, old)),  # no such user
            _entry(64 * 205 + 1, "m", message_entry(ANN, 64 * 999 + 1, "no such conversation")),
        ]
        with house.as_worker():
            assert self._persist(settings, batch) == (1, 4)
            assert self._persist(settings, batch) == (0, 4)
        assert house.owner("SELECT content FROM message WHERE conversation_id = %s", new) == [("first",)]
        reasons = house.owner("SELECT reason, error FROM dead_letter WHERE id > 1 ORDER BY entry_id")
        assert reasons == [
            ("key_conflict", ""),
            ("no_conversation", ""),
            ("refused", "ForeignKeyViolation 23503"),
            ("no_conversation", ""),
        ]
        assert house.owner("SELECT last_id FROM shard WHERE number = 1") == [(64 * 205 + 1,)]
        with house.as_worker():
            self._persist(settings, [_entry(64 * 206 + 1, "d", message_entry(ANN, new))])
        assert house.owner(
            "SELECT deleted_at IS NULL, (SELECT count(*) FROM message WHERE conversation_id = id) FROM conversation WHERE id > 20"
        ) == [(False, 0)]

    def test_api_and_worker_know_the_shards(self, house: House) -> None:
        assert loading.highest_id(1, 16, 10) == 0
        assert loading.highest_id(2, 16, 10) == 0
        with house.as_worker():
            assert loading.shards_in_postgres(10) == 16
        assert house.owner("SELECT number, shards, last_id FROM shard ORDER BY number") == [(1, 16, 0), (2, 16, 0)]

    def test_flush_that_does_not_say_it_is_one_buries_nothing(self, house: House, settings: Settings) -> None:
        """It would find none of the conversations, and take the messages for orphans."""
        before = house.snapshot()
        batch = [_entry(64 * 201 + 1, "m", message_entry(ANN, 10 * 64 + 1, "to a conversation that is there"))]
        with house.as_worker() if house.kind == "three" else contextlib.nullcontext(), pytest.raises(PostgresUnavailable):
            self._persist(settings, batch, role="api")
        assert house.snapshot() == before

    @staticmethod
    def _persist(settings: Settings, batch: Sequence[RawEntry], role: database.Role = "worker") -> tuple[int, int]:
        with transaction(seconds=20, role=role) as connection, raw_cursor(connection) as cursor:
            assert try_lock(cursor, [1])
            persisted = persist_batch(cursor, settings.shards, decode_batch({1: batch}))
        return persisted.messages, persisted.dead


class TestPooledConnections:
    def test_one_connection_serves_two_users(self, house: House, one_connection: None) -> None:
        backends = set()
        for user in (ANN, BOB, None, BOB, ANN, None):
            with read(user=user) as connection:
                backends.add(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())
                assert {row[0] for row in _all(connection, "SELECT user_id FROM message")} == ({user} if user else set())
        assert len(backends) == 1

    def test_exception_in_between(self, house: House, one_connection: None) -> None:
        def fail(connection: Connection) -> None:
            raise ZeroDivisionError

        def interrupt(connection: Connection) -> None:
            raise KeyboardInterrupt

        def divide(connection: Connection) -> None:
            connection.execute(text("SELECT 1 / 0"))

        def swallow(connection: Connection) -> None:
            with contextlib.suppress(sqlalchemy.exc.DataError):
                divide(connection)

        def end(connection: Connection) -> None:
            connection.connection.commit()

        def take_too_long(connection: Connection) -> None:
            connection.execute(text("SET LOCAL statement_timeout = 20"))
            connection.execute(text("SELECT pg_sleep(5)"))

        for failure in (fail, interrupt, divide, swallow, end, take_too_long):
            with pytest.raises(BaseException) as caught, transaction(seconds=10, user=ANN) as connection:  # noqa: PT011 - any will do
                assert len(_all(connection, "SELECT FROM message")) == 2
                failure(connection)
            assert not isinstance(caught.value, AssertionError)
            assert _visible("message") == 0
            assert _visible("message", user=BOB) == 2

    def test_two_hundred_users_over_two_connections(self, house: House, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        house.owner(
            'INSERT INTO "user" (id, email, password_hash) OVERRIDING SYSTEM VALUE '
            "SELECT n, n::text, 'x' FROM generate_series(101, 300) n"
        )
        house.owner(
            "INSERT INTO conversation (id, user_id, created_at, updated_at) SELECT n, n, now(), now() FROM generate_series(101, 300) n"
        )
        house.owner(
            "INSERT INTO message (conversation_id, id, user_id, role, content, created_at, status) "
            "SELECT n, n * 10 + m, n, 'user', 'x', now(), 'complete' FROM generate_series(101, 300) n, generate_series(0, 4) m"
        )
        monkeypatch.setattr(settings, "postgres_pool_size", 2)
        database.dispose()
        leaks: list[object] = []
        together = threading.Barrier(200)

        def work(user: int) -> None:
            dice = random.Random(user)
            together.wait(60)
            for _ in range(6):
                with contextlib.suppress(ZeroDivisionError, sqlalchemy.exc.DataError), read(60, user=user) as connection:
                    seen = _all(connection, "SELECT user_id, count(*) FROM message GROUP BY user_id")
                    if seen != [(user, 5)]:
                        leaks.append((user, seen))
                    what = dice.randrange(4)
                    if what == 0:
                        raise ZeroDivisionError
                    if what == 1:
                        connection.execute(text("SELECT 1 / 0"))
                if _visible("message", seconds=60):
                    leaks.append(("nobody", user))

        failed = _in_threads([lambda user=user: work(user) for user in range(101, 301)])
        assert (failed, leaks) == ([], [])
        assert database.engine().pool.checkedin() <= 2  # type: ignore[attr-defined]  # QueuePool's

    def test_one_statement_sets_it_all(self, house: House) -> None:
        """No round trip more than before there were policies."""
        said: list[object] = []

        class Cursor(psycopg2.extensions.cursor):
            def execute(self, statement: str, values: Any = None) -> None:
                said.append(statement)
                super().execute(statement, values)

        read_rows(text("SELECT 1"), {}, user=ANN)  # a new connection is asked more
        make = database._Connection.cursor
        with mock.patch.object(database._Connection, "cursor", lambda self: make(self, cursor_factory=Cursor)):
            with read(user=ANN) as connection:
                connection.execute(text("SELECT 1"))
            assert len(said) == 3, "the beginning with the settings, the body, the end"
            said.clear()
            assert read_rows(text("SELECT user_id FROM message"), {}, user=ANN) == [(ANN,), (ANN,)]
            assert len(said) == 1

    def test_nothing_is_left_in_the_session(self, house: House, one_connection: None) -> None:
        asked = "SELECT current_user = session_user, current_setting('chatkeep.role', true), current_setting('chatkeep.user_id', true)"
        names = "SELECT name, setting FROM pg_settings WHERE source IN ('session', 'override') ORDER BY name"
        with database.engine().connect() as connection:
            before = _all(connection, names)
        with transaction(seconds=10, user=ANN):
            pass
        with database.engine().connect() as connection:
            assert _all(connection, asked) == [(True, "", "")]
            assert _all(connection, names) == before


class TestFailsClosed:
    def test_settings_without_a_transaction_are_refused(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database, "_BEGIN", "/* no BEGIN */ ")
        with pytest.raises(RuntimeError, match="none has begun"), transaction(seconds=10, user=ANN):
            pytest.fail("it began")

    def test_engine_in_autocommit_mode_makes_no_difference(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        make = database._make_engine
        monkeypatch.setattr(
            database, "_make_engine", lambda url, **options: make(url, **options).execution_options(isolation_level="AUTOCOMMIT")
        )
        database.dispose()
        for user in (ANN, BOB):
            with transaction(seconds=10, user=user) as connection:
                assert _all(connection, "SELECT DISTINCT user_id FROM message") == [(user,)]

    def test_one_round_trip_read_is_a_transaction_of_its_own(self, house: House, one_connection: None) -> None:
        """Whatever became of it, the next one begins as nobody; and it cannot write."""
        seen = text("SELECT pg_backend_pid(), current_setting('chatkeep.user_id'), user_id FROM message")
        [(backend, _, _), _] = read_rows(seen, {}, user=ANN)
        for user in (BOB, ANN, BOB):
            assert read_rows(seen, {}, user=user) == [(backend, str(user), user)] * 2
            with database.engine().connect() as connection:
                assert _all(connection, "SELECT current_user = session_user, current_setting('chatkeep.user_id', true)") == [(True, "")]
        assert read_rows(text("SELECT current_setting('transaction_read_only')"), {}, user=ANN) == [("on",)]
        with pytest.raises(PostgresUnavailable):
            read_rows(text("DELETE FROM message RETURNING user_id"), {}, user=ANN)
        with pytest.raises(PostgresUnavailable):
            read_rows(text("SELECT user_id FROM message WHERE pg_sleep(5) IS NULL"), {}, user=ANN, seconds=0.2)
        assert _visible("message") == 0
        assert _visible("message", user=BOB) == 2

    @only("plain", "three")
    def test_settings_under_autocommit_show_nothing(self, house: House) -> None:
        """Where the login bypasses policies it would see everything; that is why the transaction refuses."""
        with contextlib.closing(psycopg2.connect(house.api)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute("SELECT set_config('chatkeep.user_id', '1', true)")
            cursor.execute("SELECT count(*) FROM message")
            assert cursor.fetchone() == (0,)

    @only("hosted")
    def test_login_that_bypasses_policies_and_has_no_role_to_change_into(self, house: House) -> None:
        with house.login("BYPASSRLS") as stranger:
            house.owner(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {stranger.name}")
            database._say_not_confined.cache_clear()
            with house.using(stranger.url), structlog.testing.capture_logs() as logs:
                for identity in ({}, {"user": ANN}, {"role": "worker"}):
                    with pytest.raises(PostgresUnavailable), transaction(seconds=10, **identity):
                        pytest.fail("it began")
                with pytest.raises(PostgresUnavailable):
                    read_rows(text("SELECT user_id FROM message"), {}, user=ANN)
            assert ["row-level security does not apply" in line["event"] for line in logs] == [True]
            house.owner(f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {stranger.name}")

    def test_schema_without_policies(self, house: House) -> None:
        schema.downgrade(house.owner_url, "first_tables")
        try:
            with pytest.raises(PostgresUnavailable), read(user=ANN):
                pytest.fail("it began")
            with pytest.raises(PostgresUnavailable):
                read_rows(text("SELECT user_id FROM message"), {}, user=ANN)
        finally:
            schema.upgrade(house.owner_url)
        with read(user=ANN) as connection:
            assert len(_all(connection, "SELECT FROM message")) == 2

    @only("three")
    def test_worker_takes_what_is_not_permitted_for_an_outage(self, house: House, settings: Settings) -> None:
        """Not for a bad entry, which it would bury."""
        batch = [_entry(64 * 200 + 1, "c", conversation_entry(ANN, 64 * 100 + 1))]
        with pytest.raises(PostgresUnavailable):  # DATABASE_URL has the API's login
            TestFlush._persist(settings, batch)
        assert house.owner("SELECT count(*) FROM dead_letter") == [(1,)]


@only("three")
class TestPrivileges:
    """What holds against SQL of an attacker's choice, where each has a login of its own."""

    @pytest.mark.parametrize("role", ["api", "worker", "owner"])
    def test_api_writes_no_history_and_no_account_whatever_it_says(self, house: House, role: str) -> None:
        before = house.snapshot()
        for statement in WRITES:
            if role == "owner" and statement.startswith('INSERT INTO "user"'):
                continue
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                _raw(house.api, role, statement)
        assert house.snapshot() == before

    @pytest.mark.parametrize("role", ["api", "worker", "owner"])
    def test_api_reads_no_dead_letters(self, house: House, role: str) -> None:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            _raw(house.api, role, "SELECT entry FROM dead_letter")

    @pytest.mark.parametrize("role", ["api", "worker", "owner"])
    def test_worker_reads_no_password_hashes(self, house: House, role: str) -> None:
        for columns in ("password_hash", "email", "id", ""):
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                _raw(house.worker, role, f'SELECT {columns} FROM "user"')

    def test_worker_moves_no_conversation_to_somebody_else(self, house: House) -> None:
        for statement in (
            "UPDATE conversation SET user_id = 2",
            "UPDATE message SET user_id = 2",
            "DELETE FROM conversation",
            "TRUNCATE message",
        ):
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                _raw(house.worker, "worker", statement)

    def test_neither_becomes_the_other_nor_the_owner(self, house: House) -> None:
        owner = house.owner("SELECT current_user")[0][0]
        for url, roles in ((house.api, ("chatkeep_worker", owner)), (house.worker, ("chatkeep_api", owner))):
            for role in roles:
                with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                    _raw(url, "owner", f"SET ROLE {role}")

    def test_exactly_these(self, house: House) -> None:
        granted = house.owner(
            "SELECT grantee::text, table_name::text, privilege_type::text FROM information_schema.role_table_grants "
            "WHERE grantee LIKE 'chatkeep\\_%%' ORDER BY 1, 2, 3"
        )
        columns = house.owner(
            "SELECT grantee::text, table_name::text, column_name::text FROM information_schema.role_column_grants g "
            "WHERE grantee LIKE 'chatkeep\\_%%' AND privilege_type = 'UPDATE' AND table_name IN ('conversation', 'sign_in') "
            "ORDER BY 1, 2, 3"
        )
        expected = {
            "chatkeep_api": {
                "user": "SELECT INSERT",
                "sign_in": "SELECT INSERT DELETE",
                "conversation": "SELECT",
                "message": "SELECT",
                "shard": "SELECT INSERT",
            },
            "chatkeep_worker": {
                "conversation": "SELECT INSERT",
                "message": "SELECT INSERT DELETE",
                "dead_letter": "SELECT INSERT UPDATE DELETE",
                "shard": "SELECT INSERT UPDATE",
            },
        }
        assert granted == sorted(
            (role, table, word) for role, of in expected.items() for table, words in of.items() for word in words.split()
        )
        assert columns == [
            *(("chatkeep_api", "sign_in", name) for name in ("expires_at", "renewals", "renewed_at", "token_hash")),
            *(("chatkeep_worker", "conversation", name) for name in ("deleted_at", "title", "updated_at")),
        ]


class TestSchema:
    def test_every_table_is_protected(self, house: House) -> None:
        """A new table has to be decided upon; `shard` has nobody's data."""
        found = house.owner(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace "
            "AND relrowsecurity AND relforcerowsecurity"
        )
        assert {name for (name,) in found} == set(Table.metadata.tables) - {"shard"}

    def test_roles_cannot_log_in_and_are_held_to_policies(self, house: House) -> None:
        found = house.owner(
            "SELECT rolname, rolcanlogin OR rolsuper OR rolbypassrls OR rolcreaterole FROM pg_roles "
            "WHERE rolname LIKE 'chatkeep\\_%%' ORDER BY 1"
        )
        assert found == ([] if house.kind == "plain" else [("chatkeep_api", False), ("chatkeep_worker", False)])

    def test_one_login_changes_into_the_roles(self, house: House) -> None:
        with read(user=ANN) as connection:
            assert _all(connection, "SELECT current_user") == [("chatkeep" if house.kind == "plain" else "chatkeep_api",)]
        with house.as_worker(), transaction(seconds=10, role="worker") as connection:
            assert _all(connection, "SELECT current_user") == [("chatkeep" if house.kind == "plain" else "chatkeep_worker",)]

    @only("hosted", "superuser", "plain")
    def test_tables_in_the_schema_of_the_login(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        """`"$user"` in the search path means somebody else after the change of roles."""
        with _new_database(house.owner_url) as url:
            _by_hand(url, "CREATE SCHEMA AUTHORIZATION CURRENT_USER")
            monkeypatch.setenv("DATABASE_URL", url)
            schema.upgrade(url)  # after which the settings are read again
            made = accounts.create_account("eve@example.org", "x", 10)
            assert made is not None
            assert accounts.get_account(made.id, 10) == made
            assert committed.list_conversations(made.id, None, (), 10) == []
            assert _by_hand(url, 'SELECT email FROM chatkeep."user"') == [("eve@example.org",)]


class TestWithoutFilters:
    """The build in which somebody has taken every `user_id` filter out of the queries."""

    def test_nothing_leaks(self, house: House, filterless: Filterless) -> None:
        seen = _look_everywhere(filterless, BOB, 10, 11, "k:a", "created")
        assert seen == _look_everywhere(filterless, BOB, 999, 9, "k:none", "none")
        assert _look_everywhere(filterless, ANN, 10, 11, "k:a", "created") != seen

    def test_it_would_without_policies(self, house: House, filterless: Filterless) -> None:
        """That the build is what it says, and the test sharp."""
        as_worker = {
            "read_rows": _read_as_worker,
            "transaction": lambda **_: transaction(seconds=10, role="worker"),
        }
        with house.as_worker(), contextlib.ExitStack() as patched:
            for module in (filterless.committed, filterless.loading):
                patched.enter_context(
                    mock.patch.multiple(module, **{name: value for name, value in as_worker.items() if hasattr(module, name)})
                )
            seen = _look_everywhere(filterless, BOB, 10, 11, "k:a", "created")
        assert all(answer not in (None, (), []) for answer in seen.values()), seen

    @pytest.mark.anyio
    async def test_nothing_leaks_through_the_whole_read(
        self, house: House, filterless: Filterless, settings: Settings, redis: Redis, log: PendingLog
    ) -> None:
        """What a request does, in each state that a conversation can be in."""
        conversation = (await log.create(ANN, "a title", key=client_key("c"))).conversation.id
        await log.append(ANN, conversation, "user", "between us", key=client_key("m"))
        with (
            mock.patch.object(worker.pending, "loading", filterless.loading),
            mock.patch.object(api.history, "committed", filterless.committed),
        ):
            for step in ("pending", "committed", "forgotten"):
                if step == "committed":
                    with house.as_worker():
                        flush_all(redis, settings)
                if step == "forgotten":
                    redis.flushall()
                for page in (Page(limit=10), Page(limit=10, before=1 << 50), Page(limit=10, after=0)):
                    with pytest.raises(NotFound):
                        await read_history(log, BOB, conversation, page)
                with pytest.raises(NotFound):
                    await log.append(BOB, conversation, "user", "let me in")
                assert {item.id for item in (await list_conversations(log, BOB, 10, None)).items} == {20}
            assert len((await read_history(log, ANN, conversation, Page(limit=10))).messages) == 1


def _read_as_worker(statement: Any, values: Any, **_: object) -> Any:
    with transaction(seconds=10, role="worker") as connection:
        return connection.execute(statement, values).all()


def _look_everywhere(build: Filterless, user: int, conversation: int, message: int, key: str, created: str) -> dict[str, object]:
    """What each function of the build answers this user."""
    page: dict[str, Any] = {"look_beyond": True}
    return {
        "load_conversation": build.loading.load_conversation(conversation, user, 10, 10),
        "find_messages": list(build.loading.find_messages(conversation, user, [message], 10)),
        "find_retry_keys": build.loading.find_retry_keys(conversation, user, [key], 10),
        "load_created_keys": [pair for pair in build.loading.load_created_keys(user, 10)[0] if pair[0] == created],
        "find_created_key": build.loading.find_created_key(user, created, 10),
        "read_conversation": build.committed.read_conversation(user, conversation),
        "read_page before": build.committed.read_page(user, conversation, "before", None, None, 9, **page).messages,
        "read_page after": build.committed.read_page(user, conversation, "after", None, None, 9, **page).messages,
        "read_page beyond": build.committed.read_page(user, conversation, "after", 1 << 50, None, 9, **page).beyond or None,
        "list": [one for one in build.committed.list_conversations(user, None, (), 99) if one.id == conversation],
    }


# --- the build without filters -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filterless:
    """`worker.loading` and `worker.committed`, made again with `text()` taking every condition on `user_id` out."""

    loading: ModuleType
    committed: ModuleType


@pytest.fixture(scope="module")
def filterless() -> Filterless:
    taken_out: list[str] = []

    def without_filter(statement: str) -> Any:
        stripped = re.sub(r"\buser_id = :user AND |\s+AND user_id = :user\b", lambda found: taken_out.append(found[0]) or "", statement)
        assert "= :user" not in stripped, statement
        return text(stripped)

    with mock.patch.object(sqlalchemy, "text", without_filter):
        build = Filterless(_again(loading), _again(committed))
        for module in (build.loading, build.committed):
            module.text = without_filter  # type: ignore[attr-defined]  # for what it composes later
    assert len(taken_out) >= 5, "there were some to be taken out"
    return build


def _again(module: ModuleType) -> ModuleType:
    """A second copy of a module, which nobody else imports."""
    assert module.__spec__ is not None
    assert module.__spec__.loader is not None
    copy = importlib.util.module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(copy)
    return copy


# --- the installations -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Login:
    """Of somebody else on the server of an installation."""

    name: str
    url: str


@dataclass(frozen=True)
class Installation:
    """A database, and who opens it as whom. Roles belong to a server, so some kinds have a server of their own."""

    kind: str
    owner_url: str
    api: str
    worker: str

    def owner(self, statement: str, *values: object) -> list[Any]:
        """What the owner sees and does, past the product."""
        return _by_hand(self.owner_url, statement, *values)

    def snapshot(self) -> dict[str, list[Any]]:
        """Every row."""
        return {table: self.owner(f'SELECT * FROM "{table}" ORDER BY 1, 2') for table in TABLES}

    @contextlib.contextmanager
    def login(self, options: str) -> Iterator[Login]:
        """One more."""
        name, word = f"test_{secrets.token_hex(6)}", secrets.token_hex(8)
        self.owner(f"CREATE ROLE {name} LOGIN PASSWORD '{word}' {options}")
        try:
            yield Login(name, re.sub(r"//[^@]*@", f"//{name}:{word}@", self.owner_url))
        finally:
            database.dispose()
            self.owner(f"DROP ROLE {name}")


@dataclass(frozen=True)
class House(Installation):
    """An installation with two users who have a conversation each, with two messages; and one dead letter."""

    settings: Settings

    @contextlib.contextmanager
    def using(self, url: str) -> Iterator[None]:
        """A process with this login."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.settings, "database_url", SecretStr(url))
            yield

    def as_worker(self) -> contextlib.AbstractContextManager[None]:
        """A worker's process."""
        return self.using(self.worker)


_FURNITURE = """
    TRUNCATE "user", sign_in, conversation, message, dead_letter, shard RESTART IDENTITY;
    INSERT INTO "user" (id, email, password_hash) OVERRIDING SYSTEM VALUE
        VALUES (1, 'ann@example.org', 'x'), (2, 'bob@example.org', 'x');
    INSERT INTO sign_in (id, user_id, token_hash, expires_at)
        SELECT 'of ' || id, id, 'x', now() + interval '1 day' FROM "user";
    SELECT setval(pg_get_serial_sequence('"user"', 'id'), 1000);
    INSERT INTO conversation (id, user_id, created_at, updated_at, idempotency_key, request_hash)
        VALUES (10, 1, now(), now(), 'created', 'hash'), (20, 2, now(), now(), NULL, NULL);
    INSERT INTO message (conversation_id, id, user_id, role, content, created_at, status, idempotency_key)
        SELECT c, c + n, c / 10, 'user', 'x', now(), 'complete', CASE WHEN n = 1 AND c = 10 THEN 'k:a' END
        FROM (VALUES (10), (20)) AS of (c), generate_series(1, 2) n;
    INSERT INTO dead_letter (entry_id, shard, reason, error, entry) VALUES ('1', 1, 'malformed', '', '{}');
    INSERT INTO shard (number, shards) VALUES (1, 16);
"""


class _Plain(EmbeddedPostgres):
    rights = "CREATEDB"


class _Superuser(EmbeddedPostgres):
    rights = "SUPERUSER"


@pytest.fixture(scope="module", params=["hosted", "superuser", "plain", "three"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def installation(kind: str, postgres: EmbeddedPostgres) -> Iterator[Installation]:
    with contextlib.ExitStack() as stack:
        server = postgres
        if kind in ("plain", "superuser"):
            directory = Path(stack.enter_context(schema.state_directory()))
            server = (_Plain if kind == "plain" else _Superuser)(directory, durable=False, start_seconds=60)
            stack.callback(server.destroy)
            server.start()
        owner_url = stack.enter_context(_new_database(server.url))
        schema.upgrade(owner_url)
        made = Installation(kind, owner_url, owner_url, owner_url)
        if kind == "three":
            logins = [stack.enter_context(made.login(f"IN ROLE chatkeep_{role}")).url for role in ("api", "worker")]
            made = Installation(kind, owner_url, *logins)
        yield made


@contextlib.contextmanager
def _new_database(beside: str) -> Iterator[str]:
    name = f"house_{secrets.token_hex(6)}"
    _by_hand(beside, f"CREATE DATABASE {name}")
    yield f"{beside.rsplit('/', 1)[0]}/{name}"
    database.dispose()
    _by_hand(beside, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database_url(installation: Installation) -> str:
    """In the place of the usual one: what the API's process has."""
    installation.owner(_FURNITURE)
    return installation.api


@pytest.fixture
def house(installation: Installation, settings: Settings) -> Iterator[House]:
    yield House(**vars(installation), settings=settings)
    database.dispose()


@pytest.fixture
def one_connection(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "postgres_pool_size", 1)
    database.dispose()


# --- helpers -----------------------------------------------------------------------------------------------------------------------------


def _all(connection: Connection, statement: str, **values: object) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in connection.execute(text(statement), values)]


def _visible(table: str, seconds: float = 10, **identity: Any) -> int:
    """How many rows can be seen; none where it is not permitted to look."""
    try:
        with transaction(seconds=seconds, **identity) as connection:
            return int(connection.execute(text(f'SELECT count(*) FROM "{table}"')).scalar_one())
    except PostgresUnavailable as exc:
        _assert_not_permitted(exc)
        return 0


def _rows_written(statement: str, **identity: Any) -> int:
    try:
        with transaction(seconds=10, **identity) as connection:
            return int(connection.execute(text(statement)).rowcount)
    except PostgresUnavailable as exc:
        _assert_not_permitted(exc)
        return 0


def _assert_not_permitted(exc: PostgresUnavailable) -> None:
    assert exc.__cause__ is not None
    assert database.describe_error(exc.__cause__) == "InsufficientPrivilege 42501"


def _by_hand(url: str, statement: str, *values: object) -> list[Any]:
    """As whoever owns the tables works with psql."""
    with contextlib.closing(psycopg2.connect(url, connect_timeout=10, options="-c chatkeep.role=owner")) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []


def _raw(url: str, role: str, statement: str) -> None:
    """SQL of an attacker's choice, who says to be whoever there is."""
    options = f"-c chatkeep.role={role} -c chatkeep.user_id=1"
    with contextlib.closing(psycopg2.connect(url, options=options)) as connection, connection.cursor() as cursor:
        cursor.execute(statement)


def _entry(number: int, kind: str, body: bytes, x: str = "") -> RawEntry:
    moment = b"1800000000000000"
    return RawEntry.of(f"{number}-0".encode(), {b"k": kind.encode(), b"t": moment, b"b": body, b"x": x.encode(), b"a": b""})


def _in_threads(works: Sequence[Callable[[], None]]) -> list[BaseException]:
    """Runs all at once; what was raised."""
    failed: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:  # noqa: BLE001 - the test shows it
            failed.append(exc)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed
