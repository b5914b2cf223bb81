"""Transactions on a real Postgres that restarts, freezes, locks, hangs up, or is not there."""

# ruff: noqa: PT012 - that a transaction raises, and rolls back, at its end is the subject here

from __future__ import annotations

import contextlib
import io
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import psycopg2
import psycopg2.errors
import pytest
import sqlalchemy.exc
from sqlalchemy import Connection, text

from worker import database
from worker.database import describe_error, raw_cursor, read, sqlalchemy_url, transaction
from worker.embedded import EmbeddedPostgres
from worker.errors import ConfigurationError, PostgresUnavailable
from worker.settings import Settings, get_settings

T = TypeVar("T")
OUTAGES = "57014 55P03 57P01 57P03 40P01 40001 53100 53200 53300 08006 58030 25006 25P03 42P01 42501 XX000".split()  # noqa: SIM905 - one line
SECRET = "s3cr3t-words"


class TestUrl:
    @pytest.mark.parametrize(
        "raw",
        [
            "postgresql://u:p%40ss@host:5433/db",
            "postgres://u:p%40ss@host:5433/db",
            "postgresql+psycopg2://u:p%40ss@host:5433/db",
            "postgresql+psycopg://u:p%40ss@host:5433/db",
            "POSTGRESQL://u:p%40ss@host:5433/db",
            "  postgresql://u:p%40ss@host:5433/db\n",
            '"postgresql://u:p%40ss@host:5433/db"',
            "psql 'postgresql://u:p%40ss@host:5433/db'",
        ],
    )
    def test_every_spelling_means_psycopg2(self, raw: str) -> None:
        url = sqlalchemy_url(raw)
        assert url.drivername == "postgresql+psycopg2"
        assert (url.username, url.password, url.host, url.port, url.database) == ("u", "p@ss", "host", 5433, "db")

    @pytest.mark.parametrize("pooler", ["", "-pooler"])
    def test_neon_as_copied(self, pooler: str) -> None:
        host = f"ep-cool-darkness-123456{pooler}.us-east-2.aws.neon.tech"
        url = sqlalchemy_url(f"postgresql://alex:AbC123dEf@{host}/dbname?sslmode=require&channel_binding=require")
        assert url.host == host
        assert dict(url.query) == {"sslmode": "require", "channel_binding": "require"}

    def test_sockets(self) -> None:
        assert sqlalchemy_url("postgresql://u@%2Fvar%2Frun%2Fpostgresql/db").host == "/var/run/postgresql"
        assert dict(sqlalchemy_url("postgresql:///db?host=/var/run/postgresql").query) == {"host": "/var/run/postgresql"}

    def test_escaped_password_reaches_the_driver_as_it_is(self) -> None:
        url = sqlalchemy_url("postgresql://u:a%25b%2Fc%3Ad%40e+f%C3%A9@h/db")
        _, parameters = url.get_dialect()().create_connect_args(url)
        assert parameters["password"] == "a%b/c:d@e+fé"

    @pytest.mark.parametrize(
        "raw",
        [
            f"mysql://u:{SECRET}@host/db",
            f"sqlite:///{SECRET}",
            f"jdbc:postgresql://u:{SECRET}@host/db",
            f"u:{SECRET}@host/db",
            f"postgresql://u:{SECRET}/@host:x/db",
            f"postgresql://u:{SECRET}:1@host:port/db",
            f"postgresql://u:{SECRET}@host/db?pgbouncer=true",
            "",
        ],
    )
    def test_wrong_ones_are_refused_without_the_password(self, raw: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            sqlalchemy_url(raw)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        assert "DATABASE_URL" in caught.value.detail

    def test_engine_does_not_show_the_password(self, pool: Settings) -> None:
        assert pool.database_url.get_secret_value().split(":")[2].split("@")[0] not in repr(database.engine())


class TestTransaction:
    def test_commits_at_the_end(self, pool: Settings) -> None:
        with transaction(seconds=10) as connection:
            _add_user(connection)
        assert _count_users() == 1

    def test_exception_rolls_back(self, pool: Settings) -> None:
        with pytest.raises(ZeroDivisionError), transaction(seconds=10) as connection:
            _add_user(connection)
            raise ZeroDivisionError
        assert _count_users() == 0

    def test_interrupt_rolls_back(self, pool: Settings) -> None:
        with pytest.raises(KeyboardInterrupt), transaction(seconds=10) as connection:
            _add_user(connection)
            raise KeyboardInterrupt
        assert _count_users() == 0

    def test_raw_cursor_shares_the_transaction(self, pool: Settings) -> None:
        with transaction(seconds=10) as connection:
            with raw_cursor(connection) as cursor:
                cursor.copy_expert('COPY "user" (email, password_hash) FROM STDIN', io.StringIO("a\tx\nb\ty\n"))
            assert connection.execute(text('SELECT count(*) FROM "user"')).scalar_one() == 2
            assert _count_users() == 0
        assert _count_users() == 2

    def test_what_only_a_raw_cursor_has_done_is_committed_or_rolled_back(self, pool: Settings) -> None:
        """As in a flush: SQLAlchemy has seen no statement then."""
        for number, fails in enumerate((False, True)):
            with (
                pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext(),
                transaction(seconds=10) as connection,
                raw_cursor(connection) as cursor,
            ):
                cursor.execute('INSERT INTO "user" (email, password_hash) VALUES (%s, %s)', (str(number), "x"))
                if fails:
                    raise ZeroDivisionError
            assert _count_users() == 1

    def test_settings_are_local_and_leave_nothing_behind(self, pool: Settings) -> None:
        session = text("SELECT name, setting FROM pg_settings WHERE source IN ('session', 'override') ORDER BY name")
        with database.engine().connect() as connection:
            before = connection.execute(session).all()
        with transaction(seconds=10, lock_timeout_ms=1234) as connection:
            names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "timezone", "transaction_isolation")
            inside = {name: connection.execute(text(f"SHOW {name}")).scalar_one() for name in names}
        assert 8000 <= int(inside.pop("statement_timeout").removesuffix("ms").replace("9s", "9000")) <= 9000
        assert inside == {
            "lock_timeout": "1234ms",
            "idle_in_transaction_session_timeout": "15s",
            "timezone": "UTC",
            "transaction_isolation": "read committed",
        }
        with database.engine().connect() as connection:
            assert connection.execute(session).all() == before

    def test_commit_is_synchronous_where_the_role_says_otherwise(self, pool: Settings) -> None:
        _outside(pool, "ALTER ROLE CURRENT_USER IN DATABASE {database} SET synchronous_commit = off")
        with transaction(seconds=10) as connection:
            assert connection.execute(text("SHOW synchronous_commit")).scalar_one() == "on"

    def test_isolation_is_read_committed_where_the_database_says_otherwise(self, pool: Settings) -> None:
        _outside(pool, "ALTER DATABASE {database} SET default_transaction_isolation = 'repeatable read'")
        with read() as connection:
            assert _count_users(connection) == 0
            with transaction(seconds=10) as other:
                _add_user(other)
            assert _count_users(connection) == 1

    def test_read_cannot_write(self, pool: Settings) -> None:
        with pytest.raises(PostgresUnavailable), read() as connection:
            _add_user(connection)
        assert _count_users() == 0

    def test_swallowed_failure_is_not_taken_for_a_commit(self, pool: Settings) -> None:
        with pytest.raises(RuntimeError, match="swallowed"), transaction(seconds=10) as connection:
            _add_user(connection)
            with contextlib.suppress(sqlalchemy.exc.DataError):
                connection.execute(text("SELECT 1 / 0"))
        assert _count_users() == 0

    def test_body_that_commits_by_itself_is_found_out(self, pool: Settings) -> None:
        with pytest.raises(RuntimeError, match="ended"), transaction(seconds=10) as connection:
            connection.connection.commit()

    def test_failure_under_a_savepoint_may_be_handled(self, pool: Settings) -> None:
        with transaction(seconds=10) as connection:
            _add_user(connection)
            with pytest.raises(sqlalchemy.exc.IntegrityError), connection.begin_nested():
                _add_user(connection)
        assert _count_users() == 1


class TestErrors:
    def test_refused_data_reaches_the_caller_without_the_data(self, pool: Settings) -> None:
        with transaction(seconds=10) as connection:
            _add_user(connection, f"{SECRET}@example.com")
        with pytest.raises(sqlalchemy.exc.IntegrityError) as wrapped, transaction(seconds=10) as connection:
            _add_user(connection, f"{SECRET}@example.com")
        with pytest.raises(psycopg2.errors.UniqueViolation) as raw, transaction(seconds=10) as connection, raw_cursor(connection) as cursor:
            cursor.execute(f"INSERT INTO \"user\" (email, password_hash) VALUES ('{SECRET}@example.com', 'x')")
        for caught in (wrapped, raw):
            assert describe_error(caught.value) == "UniqueViolation 23505"
            assert SECRET not in "".join(traceback.format_exception(caught.value))
        assert raw.value.diag.constraint_name == "uq_user_email"

    def test_copied_line_is_not_quoted(self, pool: Settings) -> None:
        with pytest.raises(psycopg2.DataError) as caught, transaction(seconds=10) as connection, raw_cursor(connection) as cursor:
            cursor.copy_expert('COPY "user" (id, email, password_hash) FROM STDIN', io.StringIO(f"{SECRET}\tx\ty\n"))
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    @pytest.mark.parametrize("through", ["sqlalchemy", "psycopg2"])
    def test_outages(self, pool: Settings, subtests: pytest.Subtests, through: str) -> None:
        for sqlstate in OUTAGES:
            with subtests.test(sqlstate):
                with pytest.raises(PostgresUnavailable) as caught, transaction(seconds=10) as connection:
                    _raise(connection, sqlstate, through)
                assert sqlstate in _reason(caught.value)

    @pytest.mark.parametrize("through", ["sqlalchemy", "psycopg2"])
    def test_what_will_never_pass_is_no_outage(self, pool: Settings, subtests: pytest.Subtests, through: str) -> None:
        for sqlstate in ["22001", "22P05", "23503", "23514", "42601", "54000"]:
            with subtests.test(sqlstate):
                with pytest.raises((psycopg2.Error, sqlalchemy.exc.DBAPIError)) as caught, transaction(seconds=10) as connection:
                    _raise(connection, sqlstate, through)
                assert sqlstate in describe_error(caught.value)

    def test_lock_held_by_somebody_else(self, pool: Settings) -> None:
        with transaction(seconds=10) as holder:
            holder.execute(text("SELECT pg_advisory_xact_lock(7, 7)"))
            started = time.monotonic()
            with pytest.raises(PostgresUnavailable) as caught, transaction(seconds=10, lock_timeout_ms=100) as connection:
                connection.execute(text("SELECT pg_advisory_xact_lock(7, 7)"))
        assert time.monotonic() - started < 5
        assert "55P03" in _reason(caught.value)

    def test_connection_killed_in_the_body(self, pool: Settings) -> None:
        with pytest.raises(PostgresUnavailable), transaction(seconds=10) as connection:
            _add_user(connection)
            _terminate_others(pool)
            _count_users(connection)
        with pytest.raises(PostgresUnavailable), transaction(seconds=10) as connection:
            _add_user(connection)
            _terminate_others(pool)  # the commit is the first to notice
        with pytest.raises(PostgresUnavailable), transaction(seconds=10) as connection:
            _terminate_others(pool)
            with contextlib.suppress(sqlalchemy.exc.OperationalError):
                _count_users(connection)
            _count_users(connection)  # what a swallowed disconnect leads to
        assert _count_users() == 0

    def test_idle_too_long(self, pool: Settings) -> None:
        with pytest.raises(PostgresUnavailable), transaction(seconds=10) as connection:
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 50"))
            time.sleep(0.5)
            with raw_cursor(connection) as cursor:
                cursor.execute("SELECT 1")
        assert _count_users() == 0

    def test_not_migrated(self, postgres: EmbeddedPostgres, pool: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool, "database_url", type(pool.database_url)(postgres.url))
        with pytest.raises(PostgresUnavailable):
            _count_users()


class TestPool:
    def test_stale_connection_is_replaced_unnoticed(self, pool: Settings) -> None:
        for _ in range(2):
            with transaction(seconds=10) as connection:
                _add_user(connection, str(time.monotonic()))
            _terminate_others(pool)
        assert _count_users() == 2

    def test_whoever_takes_a_connection_by_himself_finds_it_as_the_driver_makes_it(self, pool: Settings) -> None:
        assert _count_users() == 0
        with database.engine().connect() as connection:
            connection.execute(text("SET LOCAL chatkeep.role = 'owner'"))
            _add_user(connection)
            connection.rollback()
        assert _count_users() == 0

    def test_many_stale_ones_are_replaced_and_only_these(self, pool: Settings) -> None:
        """None of them is asked before it is used; what is said first may be said again, and nothing else."""
        with contextlib.ExitStack() as at_once:
            for _ in range(3):
                at_once.enter_context(transaction(seconds=10))
        _terminate_others(pool)
        one = text("SELECT 1")
        assert database.read_rows(one, {}, user=1) == [(1,)]
        assert _backends(pool) == 1

    @pytest.mark.parametrize(("used", "closed", "tries"), [(False, 2, 1), (True, 0, 1), (True, 2, 2)])
    def test_only_a_used_one_that_is_closed_counts_as_stale(self, used: bool, closed: int, tries: int) -> None:
        class Broken:
            def __init__(self, used: bool) -> None:
                self.driver_connection, self.used, self.closed = self, used, closed

            def cursor(self) -> None:
                raise psycopg2.OperationalError

            def invalidate(self) -> None: ...
            def close(self) -> None: ...

        opened = [Broken(used=False), Broken(used)]
        with pytest.raises(psycopg2.OperationalError):
            database._say_first(opened.pop, "SELECT 1", {})  # type: ignore[type-var]
        assert 2 - len(opened) == tries

    def test_read_is_planned_once_for_a_connection(self, pool: Settings) -> None:
        statement = text("SELECT :given + 1, custom_plans, generic_plans FROM pg_prepared_statements")
        rows = [database.read_rows(statement, {"given": i}, user=1) for i in range(8)]
        assert [{row[0] for row in one} for one in rows] == [{i + 1} for i in range(8)]
        assert len(rows[-1]) == 2, "the settings and the statement"
        assert (0, 8) in [(custom, generic) for _, custom, generic in rows[-1]]

    def test_behind_a_pooler_nothing_is_left_in_the_session(self, pool: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        """It gives a process number of its own making; the next transaction may have another process of the server."""
        monkeypatch.setattr(database._Connection, "info", SimpleNamespace(backend_pid=-1), raising=False)
        statement = text("SELECT :given + 1, (SELECT count(*) FROM pg_prepared_statements)")
        for given in (1, 2):
            assert database.read_rows(statement, {"given": given}, user=1) == [(given + 1, 0)]

    def test_plan_of_before_a_migration_is_made_anew(self, pool: Settings) -> None:
        _outside(pool, "CREATE TABLE changing (number integer); INSERT INTO changing VALUES (1); GRANT SELECT ON changing TO PUBLIC")
        statement = text("SELECT number FROM changing")
        try:
            assert database.read_rows(statement, {}, user=1) == [(1,)]
            _outside(pool, "ALTER TABLE changing ALTER number TYPE text")
            assert database.read_rows(statement, {}, user=1) == [("1",)]
        finally:
            _outside(pool, "DROP TABLE changing")

    def test_restart_of_postgres_is_unnoticed(self, postgres: EmbeddedPostgres, pool: Settings) -> None:
        assert _count_users() == 0
        postgres.stop()
        with pytest.raises(PostgresUnavailable):
            _count_users()
        postgres.start()
        assert _count_users() == 0

    def test_waits_for_a_connection_no_longer_than_its_deadline(self, pool: Settings) -> None:
        with contextlib.ExitStack() as all_of_them:
            for _ in range(pool.postgres_pool_size):
                all_of_them.enter_context(transaction(seconds=10))
            started = time.monotonic()
            with pytest.raises(PostgresUnavailable), transaction(seconds=0.3):
                pass
            assert 0.2 < time.monotonic() - started < 1
        assert _count_users() == 0

    def test_threads_share_it(self, pool: Settings) -> None:
        failed: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(10):
                    with transaction(seconds=30) as connection:
                        connection.execute(text("SELECT pg_sleep(0.001)"))
            except BaseException as exc:  # noqa: BLE001 - the test raises it
                failed.append(exc)

        threads = [threading.Thread(target=work) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert _backends(pool) <= pool.postgres_pool_size

    def test_many_deadlines_leak_nothing(self, pool: Settings) -> None:
        def expire() -> None:
            with pytest.raises(PostgresUnavailable), transaction(seconds=0.03) as connection:
                connection.execute(text("SELECT pg_sleep(5)"))

        expire()
        before, threads = _open_files(), threading.active_count()
        for _ in range(200):
            expire()
        _until(lambda: threading.active_count() <= threads)
        assert _open_files() <= before
        assert _count_users() == 0

    def test_forked_child_makes_its_own(self, pool: Settings) -> None:
        with transaction(seconds=10) as connection:
            ours = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        number = database.engine().pool._pool.queue[0].dbapi_connection.fileno()  # type: ignore[attr-defined]  # QueuePool's
        theirs, inherited = _in_child(lambda: (_backend_pid(), os.path.sameopenfile(number, os.open(os.devnull, os.O_RDWR))))
        assert theirs not in (0, ours)
        assert inherited, "the child must not hold the parent's socket"
        assert _backend_pid() == ours

    def test_fork_inside_a_transaction_does_not_disturb_it(self, pool: Settings) -> None:
        with transaction(seconds=10) as connection:
            _add_user(connection)
            assert _in_child(_backend_pid)
            assert _count_users(connection) == 1
        assert _count_users() == 1


class TestDeadline:
    """Postgres, frozen with SIGSTOP: it answers nothing, and its kernel goes on acknowledging."""

    def test_pooled_connection(self, postgres: EmbeddedPostgres, pool: Settings) -> None:
        assert _count_users() == 0
        with _frozen(postgres):
            self._expires(lambda connection: None)
        assert _count_users() == 0

    def test_new_connection(self, postgres: EmbeddedPostgres, pool: Settings) -> None:
        with _frozen(postgres):
            self._expires(lambda connection: None)
            self._expires(lambda connection: None)
        assert _count_users() == 0

    def test_in_a_statement(self, postgres: EmbeddedPostgres, pool: Settings) -> None:
        with contextlib.ExitStack() as frozen:

            def body(connection: Connection) -> None:
                frozen.enter_context(_frozen(postgres))
                _add_user(connection)

            self._expires(body)
        assert _count_users() == 0

    def test_in_copy(self, postgres: EmbeddedPostgres, pool: Settings) -> None:
        with contextlib.ExitStack() as frozen:

            def body(connection: Connection) -> None:
                frozen.enter_context(_frozen(postgres))
                with raw_cursor(connection) as cursor:
                    cursor.copy_expert('COPY "user" (email, password_hash) FROM STDIN', io.StringIO("a\tx\n" * 2_000_000))

            self._expires(body)
        assert _count_users() == 0

    def test_in_the_commit_the_outcome_is_unknown(self, postgres: EmbeddedPostgres, pool: Settings) -> None:
        with contextlib.ExitStack() as frozen:

            def body(connection: Connection) -> None:
                _add_user(connection)
                frozen.enter_context(_frozen(postgres))

            self._expires(body)
        assert _count_users() in (0, 1)

    def test_in_the_body_itself(self, pool: Settings) -> None:
        def body(connection: Connection) -> None:
            _add_user(connection)
            time.sleep(1.2)

        self._expires(body)
        assert _count_users() == 0

    def test_just_after_the_commit(self, pool: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        """The answer is known, so it is given; the connection is broken, so it is not used again."""
        commit = database._commit

        def slow(connection: Connection) -> None:
            commit(connection)
            time.sleep(0.5)

        monkeypatch.setattr(database, "_commit", slow)
        monkeypatch.setattr(pool, "postgres_pool_size", 1)
        database.dispose()
        with transaction(seconds=0.3) as connection:
            _add_user(connection)
        monkeypatch.setattr(database, "_commit", commit)
        assert database.engine().pool._pool.queue[0].dbapi_connection is None  # type: ignore[attr-defined]  # QueuePool's
        assert _count_users() == 1

    def test_many_threads_at_once(self, postgres: EmbeddedPostgres, pool: Settings) -> None:
        assert _count_users() == 0
        with _frozen(postgres):
            threads = [threading.Thread(target=self._expires, args=(lambda connection: None,), daemon=True) for _ in range(12)]
            started = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert time.monotonic() - started < 4
        assert _count_users() == 0

    def test_nested_one_does_not_end_the_outer(self, pool: Settings) -> None:
        with transaction(seconds=10) as outer:
            self._expires(lambda inner: _sleep(inner, 5), seconds=0.3)
            _add_user(outer)
        assert _count_users() == 1

    def test_late_watchdog_cannot_touch_a_released_connection(self, pool: Settings) -> None:
        with database.deadline(0.2) as limit, database.engine().connect() as connection:
            connection.execute(text("SELECT 1"))
            assert limit.release() is False
            time.sleep(0.4)
            limit.fire()
            assert _count_users(connection) == 0

    def _expires(self, body: Callable[[Connection], None], seconds: float = 1.0) -> None:
        started = time.monotonic()
        with pytest.raises(PostgresUnavailable), transaction(seconds=seconds) as connection:
            body(connection)
        assert time.monotonic() - started < seconds + 1.5


class TestWake:
    def test_waits_for_a_database_that_starts(self, postgres: EmbeddedPostgres, pool: Settings) -> None:
        postgres.stop()
        starter = threading.Timer(0.7, postgres.start)
        starter.start()
        try:
            with transaction(seconds=60, wake_seconds=30) as connection:
                assert _count_users(connection) == 0
        finally:
            starter.join()

    def test_does_not_wait_for_ever(self, pool: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool, "database_url", type(pool.database_url)("postgresql://u:p@127.0.0.1:1/db"))
        started = time.monotonic()
        with pytest.raises(PostgresUnavailable), transaction(seconds=30, wake_seconds=1):
            pass
        assert time.monotonic() - started < 2

    def test_by_default_fails_at_once(self, pool: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool, "database_url", type(pool.database_url)("postgresql://u:p@127.0.0.1:1/db"))
        started = time.monotonic()
        with pytest.raises(PostgresUnavailable), transaction(seconds=30):
            pass
        assert time.monotonic() - started < 0.5

    def test_refused_data_is_not_repeated(self, pool: Settings) -> None:
        bodies = 0
        with pytest.raises(sqlalchemy.exc.DataError), transaction(seconds=30, wake_seconds=10) as connection:
            bodies += 1
            connection.execute(text("SELECT 1 / 0"))
        assert bodies == 1


class TestNetwork:
    """What the deadline does on TCP with TLS, where the server cannot say goodbye."""

    @pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
    def test_deadline_through_tls(self, pool: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with _TlsFront(pool.database_url.get_secret_value(), tmp_path) as front:
            monkeypatch.setattr(pool, "database_url", type(pool.database_url)(front.url))
            with transaction(seconds=10) as connection:
                raw = connection.connection.driver_connection
                assert raw is not None
                assert raw.info.ssl_in_use
                _add_user(connection)
            front.stalled.set()
            for _ in range(2):  # the pooled connection, then a new one
                started = time.monotonic()
                with pytest.raises(PostgresUnavailable), transaction(seconds=1):
                    pass
                assert time.monotonic() - started < 2
            front.stalled.clear()
            assert _count_users() == 1


class _TlsFront:
    """Speaks TLS in front of the embedded Postgres, which has none; `stalled` makes it carry nothing."""

    def __init__(self, url: str, directory: Path) -> None:
        self._target = sqlalchemy_url(url)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        key, certificate = directory / "key.pem", directory / "certificate.pem"
        subject = ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject], check=True, capture_output=True
        )
        self._context.load_cert_chain(certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = self._target.set(drivername="postgresql", port=port, query={"sslmode": "require"}).render_as_string(hide_password=False)
        self.stalled = threading.Event()

    def __enter__(self) -> _TlsFront:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError), plain:
            plain.recv(8)  # SSLRequest
            self._wait()
            plain.sendall(b"S")
            server = socket.create_connection((self._target.host or "", self._target.port or 0))
            with self._context.wrap_socket(plain, server_side=True) as client, server:
                client.settimeout(0.05)
                server.settimeout(0.05)
                while self._carry(client, server) and self._carry(server, client):
                    pass

    def _carry(self, source: socket.socket, sink: socket.socket) -> bool:
        self._wait()
        try:
            data = source.recv(65536)
        except TimeoutError:
            return True
        sink.sendall(data)
        return bool(data)

    def _wait(self) -> None:
        while self.stalled.is_set():
            time.sleep(0.02)


@pytest.fixture
def pool(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings with a small pool, and nothing left in it at the end. Accounts have no owner here: policies are test_rls.py's subject."""
    monkeypatch.setattr(settings, "postgres_pool_size", 4)
    _outside(settings, 'ALTER TABLE "user" DISABLE ROW LEVEL SECURITY')
    assert get_settings() is settings
    yield settings
    database.dispose()


def _add_user(connection: Connection, email: str = "a@example.com") -> None:
    connection.execute(text("INSERT INTO \"user\" (email, password_hash) VALUES (:email, 'x')"), {"email": email})


def _count_users(connection: Connection | None = None) -> int:
    if connection is None:
        with read() as connection:
            return _count_users(connection)
    return int(connection.execute(text('SELECT count(*) FROM "user"')).scalar_one())


def _sleep(connection: Connection, seconds: float) -> None:
    connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})


def _backend_pid() -> int:
    with transaction(seconds=10) as connection:
        return int(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())


def _raise(connection: Connection, sqlstate: str, through: str) -> None:
    statement = f"DO $$ BEGIN RAISE EXCEPTION 'a test' USING ERRCODE = '{sqlstate}'; END $$"
    if through == "sqlalchemy":
        connection.execute(text(statement))
    else:
        with raw_cursor(connection) as cursor:
            cursor.execute(statement)


def _reason(error: PostgresUnavailable) -> str:
    assert error.__cause__ is not None
    return describe_error(error.__cause__)


def _outside(settings: Settings, statement: str) -> list[tuple[object, ...]]:
    """On a connection of the test's own."""
    url = sqlalchemy_url(settings.database_url.get_secret_value())
    with contextlib.closing(psycopg2.connect(settings.database_url.get_secret_value())) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement.replace("{database}", url.database or ""))
            return list(cursor.fetchall()) if cursor.description else []


def _terminate_others(settings: Settings) -> None:
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    _outside(settings, f"SELECT pg_terminate_backend(pid) {others}")
    _until(lambda: _outside(settings, f"SELECT count(*) {others}") == [(0,)])


def _backends(settings: Settings) -> int:
    return len(_outside(settings, "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"))


@contextlib.contextmanager
def _frozen(postgres: EmbeddedPostgres) -> Iterator[None]:
    """Stops the postmaster first, so that it starts no more children, then all of them.

    It thaws by itself after a while: no other time-out reaches a test that hangs in libpq.
    """
    os.kill(postgres.pid, signal.SIGSTOP)
    family = [postgres.pid, *_children(postgres.pid)]
    _signal_all(family[1:], signal.SIGSTOP)
    thaw = threading.Timer(15, _signal_all, (family, signal.SIGCONT))
    thaw.daemon = True
    thaw.start()
    try:
        yield
    finally:
        thaw.cancel()
        _signal_all(family, signal.SIGCONT)


def _children(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], check=True, capture_output=True, text=True, timeout=10).stdout
    return [int(pid) for pid, ppid in (line.split() for line in listed.splitlines()) if int(ppid) == parent]


def _signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _open_files() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def _until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def _in_child(work: Callable[[], T]) -> T:
    """What `work` returns in a forked child; the child never gets back into pytest."""
    answer, question = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(question, repr(work()).encode())
        except BaseException:  # noqa: BLE001 - the parent shows it
            os.write(question, repr(traceback.format_exc()).encode())
        finally:
            os._exit(0)
    os.close(question)
    try:
        readable, _, _ = select.select([answer], [], [], 20)
        if not readable:
            os.kill(child, signal.SIGKILL)
        assert readable, "the child hangs"
        return eval(os.read(answer, 65536))  # type: ignore[no-any-return]  # our own repr
    finally:
        os.close(answer)
        os.waitpid(child, 0)
