"""Postgres: one way to name it, one way to open a transaction on it, and a bound on every wait for it.

    rows = read_rows(statement, values, user=user_id)                 # one statement, one round trip; sees what is this user's
    with read(user=user_id) as connection:                            # SQLAlchemy's Connection
        connection.execute(...)
    with transaction(seconds=30, role="worker") as connection:        # commits at the end
        with raw_cursor(connection) as cursor:                        # the same transaction, without SQLAlchemy
            cursor.execute(...)

Leaving the block commits; an exception rolls back. The body never commits, and never swallows a failed statement without a
savepoint. What comes out of the block:

- `PostgresUnavailable`: away, frozen, overloaded, locked, asleep, restarting, read-only, not migrated, not permitted; or cut off
  **during the commit, and then the outcome is unknown**. Repeat the whole unit, which therefore has to be idempotent.
- SQLAlchemy's or psycopg2's `IntegrityError` and `DataError`: Postgres refuses the data. The caller's to decide.
- Anything else is a bug.

The last two leave without the server's text, which quotes the row (`DETAIL: Key (email)=(...)`); class, SQLSTATE and `diag` stay.

**Whose rows.** Each transaction says in its first statement on whose behalf it runs: for `user` (the API), for whoever signs in with
`email`, or as the `worker`, who writes everybody's history. Row-level security (migrations/, `row_level_security`) holds it to that,
whatever its queries ask for; a transaction that says nothing sees no row and writes none. The same statement puts the privileges of
the login role down, to those of `chatkeep_api` or `chatkeep_worker`, wherever the migration could make these two. So it holds for a
login that row-level security does not apply to as well: a superuser, or Neon's default role, which has BYPASSRLS. Where such a login
has no role to change into, `transaction` refuses rather than to run without. All of it is transaction-local: the pooled connection
remembers nothing, and where nothing has begun, so that it would be without effect, `transaction` refuses too.

It is the second line, behind the `user_id` in every query. It stops a query that forgets it, an id that was not checked, an injected
`OR true` or `UNION SELECT`. It does not stop SQL of an attacker's choice, which can say `set_config` as we do. Against that there are
only privileges, and only with a login for the API that is a member of `chatkeep_api` and of nothing else: then it writes no history,
reads no dead letter, and changes no account; the worker's login reads no account.

**The deadline.** A frozen Postgres (SIGSTOP, a stuck disk or hypervisor) answers nothing while its kernel goes on acknowledging:
`statement_timeout` is frozen with it, keepalives see a living peer, and psycopg2 waits for ever inside libpq. psycopg2's wait
callbacks would help too, but not with COPY, by which messages once got in. So each transaction has a deadline on our side. Every
connection tells the deadline of its thread about itself before it sends anything (`_Connection.cursor`), which covers SQLAlchemy's first
questions to a new server too; the deadline keeps a duplicate of the socket, and one watchdog thread shuts that down when time is over. The
call that was waiting fails at once with OperationalError, and the connection never goes back to the pool. The duplicate is ours, so
a number that the kernel has given to another file meanwhile is never touched. Connecting has no socket that we could see: it runs in
a thread of its own which is abandoned when time is over, and which libpq's `connect_timeout` ends (a name server that does not
answer included).

**The pool** belongs to a process. A forked child makes its own and closes its copies of the parent's sockets, without a word to
the server on them. The settings of a transaction are transaction-local, so that PgBouncer in transaction mode (Neon's `-pooler`)
carries all of it. Nothing polls, so an idle Neon falls asleep.

**Plans** are the only session state. To parse and plan the settings and a page took Postgres longer than to find the page, so a read
has both prepared with the first use of a connection, in the same message (`_planned_once`). Only where the connection leads straight to a
process of the server, which then is nobody else's: a pooler gives a process number of its own making at the start, and behind it reads
are said in full.

**Round trips.** On the way to a database in another region each is a millisecond or more, and on this machine 0.1 ms. psycopg2 sends
its BEGIN by itself, so ours goes with the settings, and psycopg2 is told to stay out of it (its `autocommit`). A read of one statement
goes with them too: what comes in one message is one transaction, without BEGIN and COMMIT. Nobody asks a pooled connection whether it
still works: if the server has ended it while it lay in the pool, the first thing said fails without having done anything, and is said
again on another. (One that was cut off in silence would not have answered a question either.)
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import unquote

import psycopg2
import psycopg2.extensions
import structlog
from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import Connection, Engine, NullPool, TextClause, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import PoolProxiedConnection

from worker.errors import ConfigurationError, PostgresUnavailable
from worker.settings import get_settings

log = structlog.get_logger(__name__)

LOCK_TIMEOUT_MS = 2_000
IDLE_IN_TRANSACTION_MS = 15_000
"""A stalled process gives its locks back after this; a flush reads Redis inside its transaction, at most 2 s."""

POOL_RECYCLE_SECONDS = 240
"""Below the five minutes after which Neon puts an idle database to sleep, and its connections with it."""

MIGRATION_SECONDS = 3_600.0
MIGRATION_WAKE_SECONDS = 30.0

_CONNECT = {
    "connect_timeout": 5,  # per address; the deadline bounds the whole
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # a cut network, which the deadline of a flush would notice after 30 s only
    "client_encoding": "utf8",
    "fallback_application_name": "chatkeep",
}
"""What libpq is told unless the URL says otherwise. No `options`: a transaction pooler refuses them."""

Role: TypeAlias = Literal["api", "worker"]

_T = TypeVar("_T")
_P = TypeVar("_P", Connection, PoolProxiedConnection)


# --- naming it ------------------------------------------------------------------------------------------------------------------


def sqlalchemy_url(raw: str, *, name: str = "DATABASE_URL") -> URL:
    """Any usual spelling of a Postgres address as one that SQLAlchemy opens with psycopg2. Errors never show the password."""
    copied = re.sub(r"^psql\s+", "", raw.strip()).strip("'\" ")  # Neon's console offers `psql 'postgresql://...'`
    try:
        url = make_url(copied)
    except (ArgumentError, ValueError):
        raise ConfigurationError(f"{name} is not a database URL: {_EXPECTED}") from None
    if url.drivername.lower().split("+")[0] not in ("postgres", "postgresql"):
        raise ConfigurationError(f"{name} must begin with postgresql:// (not {url.drivername}://)")
    for option in url.query:
        _refuse_unknown(option, name)
    host = unquote(url.host) if url.host and url.host.lower().startswith("%2f") else url.host  # libpq's spelling of a socket
    return url.set(drivername="postgresql+psycopg2", host=host)


_EXPECTED = "expected postgresql://user:password@host:port/database, with %-escapes for / @ : % in the password"


def _refuse_unknown(option: str, name: str) -> None:
    try:
        psycopg2.extensions.make_dsn(**{option: "1"})
    except psycopg2.ProgrammingError:
        raise ConfigurationError(f"{name} has an option that Postgres's client library does not know: {option}") from None


class _MigrationSettings(BaseSettings):
    """The two settings that a migration needs; it runs where no other is set."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr | None = None
    database_url_unpooled: SecretStr | None = None


def migration_url() -> URL:
    """The direct connection for migrations, or the usual one where no direct one is set."""
    settings = _MigrationSettings()
    if settings.database_url_unpooled is not None:
        return sqlalchemy_url(settings.database_url_unpooled.get_secret_value(), name="DATABASE_URL_UNPOOLED")
    if settings.database_url is not None:
        return sqlalchemy_url(settings.database_url.get_secret_value())
    raise ConfigurationError("DATABASE_URL: Field required (set it in the environment or .env)")


# --- a transaction --------------------------------------------------------------------------------------------------------------


@contextmanager
def transaction(
    *,
    seconds: float,
    lock_timeout_ms: int = LOCK_TIMEOUT_MS,
    wake_seconds: float = 0.0,
    read_only: bool = False,
    role: Role = "api",
    user: int | None = None,
    email: str | None = None,
    outside: tuple[str, str] | None = None,
) -> Iterator[Connection]:
    """A fresh READ COMMITTED transaction that is over, one way or the other, after `seconds`, connecting included.

    It sees what is `user`'s, and the account with this `email` or `outside` identity (issuer, subject); as the `worker`, all history and no
    account. With `wake_seconds`, a database that cannot be reached is asked again for that long: for callers who can wait for Neon to wake.
    """
    postgres = _postgres()
    with _translated(), deadline(seconds) as limit, postgres.slot(limit):
        local = _local_settings(limit, lock_timeout_ms, read_only) | _identity(role, user, email, outside)
        connection, _ = _repeated(
            lambda: _say_first(postgres.engine.connect, _BEGIN + _SET_LOCAL, local), until=time.monotonic() + wake_seconds, limit=limit
        )
        try:
            connection.begin()  # says nothing; else SQLAlchemy would have nothing to commit where the body uses only a raw cursor
            yield connection
            _commit(connection)
        except BaseException as exc:
            lost = connection.invalidated and isinstance(exc, SQLAlchemyError)
            _roll_back(connection)
            if lost:
                raise PostgresUnavailable from exc
            raise
        finally:
            _give_back(connection, limit)


@contextmanager
def read(
    seconds: float | None = None, *, user: int | None = None, email: str | None = None, outside: tuple[str, str] | None = None
) -> Iterator[Connection]:
    """A transaction for what the API reads of one user: it cannot write, and it walks indexes only.

    It begins when it is entered: enter it after Redis has answered, or a flush hides a message.
    """
    limit = get_settings().postgres_timeout_seconds if seconds is None else seconds
    with transaction(seconds=limit, read_only=True, user=user, email=email, outside=outside) as connection:
        yield connection


def read_rows(statement: TextClause, values: Mapping[str, Any], *, user: int, seconds: float | None = None) -> list[Any]:
    """The rows of one such read, in one round trip."""
    postgres = _postgres()
    with _translated(), deadline(get_settings().postgres_timeout_seconds if seconds is None else seconds) as limit, postgres.slot(limit):
        local = _local_settings(limit, LOCK_TIMEOUT_MS, True) | _identity("api", user, None, None)
        connection, cursor = _say_first(postgres.engine.raw_connection, statement, {**local, **values})
        try:
            return list(cursor.fetchall())
        finally:
            cursor.close()
            _give_back(connection, limit)


@lru_cache
def _driver_sql(statement: TextClause) -> str:
    """In psycopg2's spelling. SQLAlchemy takes as long for one statement as Postgres."""
    return str(statement.compile(dialect=_postgres().engine.dialect))


@contextmanager
def raw_cursor(connection: Connection) -> Iterator[DBAPICursor]:
    """psycopg2's own cursor in the same transaction: for a flush, whose statements are long and its own."""
    cursor = connection.connection.cursor()
    try:
        yield cursor
    finally:
        cursor.close()


def _planned_once(statement: TextClause, raw: Any) -> str:
    """What says the settings and the statement, so that the server plans both once for each connection."""
    sql = _driver_sql(statement)
    if raw.planned is None:
        raw.planned = set()
        with raw.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            raw.is_direct = cursor.fetchone()[0] == raw.info.backend_pid
    if not raw.is_direct:
        return f"{_SET_LOCAL};{sql}"
    said = []
    for one in (_SET_LOCAL, sql):  # the role first: a plan is made for one
        prepare, execute = _prepared(one)
        said += [execute] if one in raw.planned else [prepare, execute]
        raw.planned.add(one)
    return ";".join(said)


@lru_cache
def _prepared(sql: str) -> tuple[str, str]:
    """PREPARE and EXECUTE of it, both in psycopg2's spelling."""
    names = list(dict.fromkeys(_NAMED.findall(sql)))
    name = "chatkeep_" + hashlib.sha256(sql.encode()).hexdigest()[:16]
    numbered = _NAMED.sub(lambda found: f"${names.index(found[1]) + 1}", sql)
    given = ", ".join(f"%({one})s" for one in names)
    return f"PREPARE {name} AS {numbered}", f"EXECUTE {name}" + (f"({given})" if given else "")


_NAMED = re.compile(r"%\((\w+)\)s")


def _say_first(open_: Callable[[], _P], statement: str | TextClause, values: Mapping[str, Any]) -> tuple[_P, Any]:
    """Says the first thing of a transaction on a pooled connection; the connection, and the cursor with the answer.

    On another one if the server has ended it meanwhile, or has a plan of before a migration: nothing has been done then. The pool gives
    each stale one once.
    """
    while True:
        connection = open_()
        raw = _raw(connection)
        stale, raw.used = raw.used, True
        try:
            raw.autocommit = True
            said = statement if isinstance(statement, str) else _planned_once(statement, raw)
            cursor = raw.cursor()
            cursor.execute(said, values)
            if said.startswith(_BEGIN) and raw.get_transaction_status() != psycopg2.extensions.TRANSACTION_STATUS_INTRANS:
                raise RuntimeError("a transaction's settings need a transaction, and none has begun")
        except BaseException as exc:
            stale &= isinstance(exc, psycopg2.Error) and (raw.closed != 0 or isinstance(exc, _PLAN_IS_GONE))
            connection.invalidate()
            connection.close()
            if isinstance(exc, psycopg2.errors.DivisionByZero):
                _say_not_confined()
                raise PostgresUnavailable from exc
            if not stale:
                raise
        else:
            return connection, cursor


_PLAN_IS_GONE = (
    psycopg2.errors.FeatureNotSupported,  # "cached plan must not change result type"
    psycopg2.errors.InvalidSqlStatementName,
)


def _raw(connection: Connection | PoolProxiedConnection) -> Any:
    return (connection.connection if isinstance(connection, Connection) else connection).driver_connection


@lru_cache
def _say_not_confined() -> None:
    """Once in a process."""
    log.error(
        "row-level security does not apply to the role in DATABASE_URL, so nothing is read or written",
        hint="alembic upgrade head; or else this role is a superuser or has BYPASSRLS, and is no member of chatkeep_api or chatkeep_worker",
    )


_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED; "
_SET_LOCAL = """
    SELECT 1 / coalesce(
               CASE WHEN CASE WHEN pg_has_role(to_regrole(%(role_name)s), 'MEMBER') THEN
                         set_config('search_path', replace(current_setting('search_path'), '"$user"', quote_ident(session_user)), true)
                         || set_config('role', %(role_name)s, true) ELSE '' END IS NOT NULL
                    THEN row_security_active('message') AND row_security_active('conversation') END, false)::int,
           set_config('chatkeep.role', %(role)s, true), set_config('chatkeep.user_id', %(as_user)s, true),
           set_config('chatkeep.email', %(as_email)s, true),
           set_config('chatkeep.issuer', %(as_issuer)s, true), set_config('chatkeep.subject', %(as_subject)s, true),
           set_config('statement_timeout', %(statement_timeout)s, true), set_config('lock_timeout', %(lock_timeout)s, true),
           set_config('idle_in_transaction_session_timeout', %(idle)s, true), set_config('timezone', 'UTC', true),
           set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on'
                      ELSE current_setting('synchronous_commit') END, true),
           CASE WHEN %(read_only)s THEN ROW(
               set_config('transaction_read_only', 'on', true), set_config('jit', 'off', true), set_config('enable_seqscan', 'off', true),
               set_config('enable_bitmapscan', 'off', true), set_config('enable_sort', 'off', true),
               set_config('plan_cache_mode', 'force_generic_plan', true))::text END
"""
"""Where row-level security does not hold from here on, it divides by zero, and nothing that was said with it is done.

`"$user"` in the search path goes on meaning the login, whose schema may hold the tables.

`synchronous_commit=off` would lose what a commit has promised, and the log has forgotten by then.

Each of our reads walks one index and stops at its page; on tables that were never analyzed the planner was seen to collect a whole
conversation of 30,000 messages and sort it instead. So in a read it has no other way, whatever its statistics say,
and one plan serves for all values.
"""


def _local_settings(limit: Deadline, lock_timeout_ms: int, read_only: bool) -> dict[str, Any]:
    """The server gives up a little before we do: then the connection is still good and the error says more."""
    return {
        "statement_timeout": str(max(1, int(limit.remaining() * 900))),
        "lock_timeout": str(lock_timeout_ms),
        "idle": str(IDLE_IN_TRANSACTION_MS),
        "read_only": read_only,
    }


def _identity(role: Role, user: int | None, email: str | None, outside: tuple[str, str] | None) -> dict[str, Any]:
    """An empty setting is nobody, and so is one that a transaction of the past has left behind: Postgres forgets it to ''."""
    issuer, subject = outside or ("", "")
    named = {"as_user": "" if user is None else str(user), "as_email": email or "", "as_issuer": issuer, "as_subject": subject}
    return named | {"role": role, "role_name": f"chatkeep_{role}"}


def _commit(connection: Connection) -> None:
    """Commits, and refuses what Postgres would silently make a rollback: psycopg2 reports no error for that."""
    if connection.invalidated:
        raise PostgresUnavailable
    raw: Any = connection.connection.driver_connection
    status = raw.info.transaction_status
    if status in (psycopg2.extensions.TRANSACTION_STATUS_INERROR, psycopg2.extensions.TRANSACTION_STATUS_IDLE):
        raise RuntimeError("the body of a transaction swallowed a failed statement, or ended the transaction itself")
    connection.commit()


def _roll_back(connection: Connection) -> None:
    """Never raises: what led here matters more."""
    try:
        connection.rollback()
    except (psycopg2.Error, SQLAlchemyError):
        connection.invalidate()


def _give_back(connection: Connection | PoolProxiedConnection, limit: Deadline) -> None:
    """To the pool, unless the deadline has fired: after `release` it no longer can."""
    if limit.release():
        connection.invalidate()
    connection.close()


def _repeated(open_: Callable[[], _T], *, until: float, limit: Deadline) -> _T:
    """The same again while Postgres is away, with growing, jittered pauses: nothing has been sent that could have had an effect."""
    for attempt in itertools.count():
        try:
            return open_()
        except (psycopg2.Error, SQLAlchemyError) as exc:
            pause = min(2.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.5)  # noqa: S311 - not a secret
            if not _is_outage(exc) or time.monotonic() + pause > min(until, limit.at):
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")


# --- errors ---------------------------------------------------------------------------------------------------------------------


def describe_error(exc: BaseException) -> str:
    """Class and SQLSTATE, never data: for logs and for `dead_letter.error`."""
    origin = _origin(exc)
    sqlstate = getattr(origin, "pgcode", None)
    return type(origin).__name__ + (f" {sqlstate}" if sqlstate else "")


@contextmanager
def _translated() -> Iterator[None]:
    """Driver errors leave here as what a caller can act on, and without data."""
    try:
        yield
    except Exception as exc:
        _forget_data(exc)
        if isinstance(exc, (psycopg2.Error, SQLAlchemyError)) and _is_outage(exc):
            raise PostgresUnavailable from exc
        raise


_OUTAGE_STATES = frozenset({
    "25006",  # read-only: a standby, or a failover that is under way
    "25P03", "25P04",  # idle too long in a transaction: psycopg2 files these under InternalError
    "42P01", "42703",  # no such table or column: `alembic upgrade head` has not run yet
    "42501",  # not permitted, or not by a policy: no verdict on the data, which a flush would bury for it
})  # fmt: skip
"""Beside the drivers' OperationalError, and XX (broken inside; also what proxies send for their own trouble)."""


def _is_outage(exc: BaseException) -> bool:
    origin = _origin(exc)
    sqlstate = getattr(origin, "pgcode", None) or ""
    if sqlstate.startswith("54"):
        return False  # too large or too complex: psycopg2 files it under OperationalError, but it will not pass
    if getattr(exc, "connection_invalidated", False) or sqlstate in _OUTAGE_STATES or sqlstate.startswith("XX"):
        return True
    if type(origin) is psycopg2.DatabaseError:
        return True  # libpq had no word from the server
    return isinstance(origin, (psycopg2.OperationalError, psycopg2.InterfaceError, PoolTimeoutError))


def _origin(exc: BaseException) -> BaseException:
    return exc.orig if isinstance(exc, DBAPIError) and exc.orig is not None else exc


def _forget_data(exc: BaseException) -> None:
    """The server's text quotes rows; it must not reach a log by way of a traceback. `diag` stays for the caller."""
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, (psycopg2.Error, DBAPIError)):
            seen.args = (_without_data(_origin(seen)),)
        seen = seen.__cause__ or seen.__context__


def _without_data(origin: BaseException) -> str:
    """What happened to a connection names no row; of what happened to a statement, only the first line of an outage does not."""
    if not isinstance(origin, (psycopg2.OperationalError, psycopg2.InterfaceError)):
        return describe_error(origin)
    detail = str(origin) if origin.pgcode is None else origin.diag.message_primary or ""
    return f"{describe_error(origin)}: {' '.join(detail.split())}"


# --- the engine -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Postgres:
    """An engine, and as many slots as it has connections: waiting for one is inside the deadline, which the pool's own is not."""

    engine: Engine
    slots: threading.BoundedSemaphore

    @contextmanager
    def slot(self, limit: Deadline) -> Iterator[None]:
        if not self.slots.acquire(timeout=limit.remaining()):
            raise PostgresUnavailable
        try:
            yield
        finally:
            self.slots.release()


_engines: dict[tuple[int, str], _Postgres] = {}
_engines_lock = threading.Lock()


def engine() -> Engine:
    """This process's engine for `DATABASE_URL`. Prefer `transaction`: only that is bounded and translated."""
    return _postgres().engine


def dispose() -> None:
    """Closes this process's pooled connections: at the end of a process, or between tests."""
    with _engines_lock:
        for postgres in _engines.values():
            postgres.engine.dispose()
        _engines.clear()


def _postgres() -> _Postgres:
    settings = get_settings()
    url, size = settings.database_url.get_secret_value(), settings.postgres_pool_size
    key = (os.getpid(), url)
    with _engines_lock:
        if key not in _engines:
            made = _make_engine(
                sqlalchemy_url(url),
                pool_size=size,
                max_overflow=0,
                pool_recycle=POOL_RECYCLE_SECONDS,
                pool_use_lifo=True,
            )
            _engines[key] = _Postgres(made, threading.BoundedSemaphore(size))
        return _engines[key]


def _make_engine(url: URL, **options: Any) -> Engine:
    """No isolation level: psycopg2 would make it session state where the BEGIN is ours. hstore would cost a question at each connect."""
    made = create_engine(
        url,
        hide_parameters=True,
        use_native_hstore=False,
        connect_args={"connection_factory": _Connection},
        **options,
    )
    event.listen(made, "do_connect", lambda dialect, record, args, parameters: _connect(args, {**_CONNECT, **parameters}))
    event.listen(made, "checkin", _tidy)
    return made


def _tidy(raw: Any, _: object) -> None:
    """Whoever takes it out of the pool otherwise than `transaction` finds it as psycopg2 makes it. Says nothing to the server."""
    if raw is not None and not raw.closed:
        raw.autocommit = False


@contextmanager
def migration_connection() -> Iterator[Connection]:
    """A connection of its own for Alembic, which begins and commits by itself. Waits for a database that is starting or asleep."""
    made = _make_engine(migration_url(), poolclass=NullPool, isolation_level="READ COMMITTED")
    with deadline(MIGRATION_SECONDS) as limit:
        try:
            connection = _repeated(made.connect, until=time.monotonic() + MIGRATION_WAKE_SECONDS, limit=limit)
        except (psycopg2.Error, SQLAlchemyError) as exc:
            raise PostgresUnavailable(f"The database cannot be reached: {_origin(exc)}".strip()) from exc
        try:
            yield connection
        finally:
            _give_back(connection, limit)


# --- the deadline ---------------------------------------------------------------------------------------------------------------


class Deadline:
    """A moment, and the sockets to shut down at that moment. Lives from `deadline()` to `release`."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds
        self._sockets: dict[Any, socket.socket] = {}
        self._lock = threading.Lock()
        self._fired = False
        self._released = False

    def remaining(self) -> float:
        return max(0.0, self.at - time.monotonic())

    def watch(self, raw: Any) -> None:
        """Also this connection ends with the deadline."""
        with self._lock:
            if self._fired:
                raise psycopg2.OperationalError("the deadline of this transaction has passed")
            if not self._released and raw not in self._sockets:
                # The family is of no consequence to shutdown().
                self._sockets[raw] = socket.fromfd(raw.fileno(), socket.AF_INET, socket.SOCK_STREAM)

    def fire(self) -> None:
        with self._lock:
            if self._released:
                return
            self._fired = True
            for duplicate in self._sockets.values():
                with suppress(OSError):
                    duplicate.shutdown(socket.SHUT_RDWR)

    def release(self) -> bool:
        """Whether it has fired; if not, it never will."""
        with self._lock:
            self._released = True
            self.close_duplicates()
            return self._fired

    def close_duplicates(self) -> None:
        for duplicate in self._sockets.values():
            duplicate.close()
        self._sockets.clear()


@contextmanager
def deadline(seconds: float) -> Iterator[Deadline]:
    """Bounds everything that this thread says to Postgres inside the block, connecting included."""
    limit, outer = Deadline(seconds), getattr(_thread, "deadline", None)
    _thread.deadline = limit
    _watchdog.add(limit)
    try:
        yield limit
    finally:
        _watchdog.remove(limit)
        limit.release()
        _thread.deadline = outer


class _Watchdog:
    """One daemon thread for all deadlines of a process, started with the first."""

    def __init__(self) -> None:
        self.limits: set[Deadline] = set()
        self._changed = threading.Condition()
        self._wakes_at = float("-inf")
        self._thread: threading.Thread | None = None

    def add(self, limit: Deadline) -> None:
        with self._changed:
            self.limits.add(limit)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="postgres-deadlines", daemon=True)
                self._thread.start()
            elif limit.at < self._wakes_at:
                self._changed.notify()

    def remove(self, limit: Deadline) -> None:
        with self._changed:
            self.limits.discard(limit)

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for limit in [limit for limit in self.limits if limit.at <= now]:
                    self.limits.discard(limit)
                    limit.fire()
                self._wakes_at = min((limit.at for limit in self.limits), default=float("inf"))
                self._changed.wait(None if self._wakes_at == float("inf") else self._wakes_at - now)


_thread = threading.local()
_watchdog = _Watchdog()
_connections: weakref.WeakSet[Any] = weakref.WeakSet()


class _Connection(psycopg2.extensions.connection):  # type: ignore[misc]  # psycopg2 has no types
    """Before it says anything to the server, it tells the deadline of its thread about itself.

    Where psycopg2 was told to stay out of transactions (`autocommit`), it would ignore these two.
    """

    def __init__(self, *args: Any, **parameters: Any) -> None:
        super().__init__(*args, **parameters)
        self.used = False
        self.planned: set[str] | None = None
        """What the server has a plan of; None until it was asked whose connection this is."""
        self.is_direct = False
        _connections.add(self)

    def commit(self) -> None:
        self._end("COMMIT", super().commit)

    def rollback(self) -> None:
        self._end("ROLLBACK", super().rollback)

    def _end(self, word: str, ordinarily: Callable[[], None]) -> None:
        if self.closed or not self.autocommit:
            ordinarily()
        elif self.get_transaction_status() != psycopg2.extensions.TRANSACTION_STATUS_IDLE:
            with self.cursor() as cursor:
                cursor.execute(word)

    def cursor(self, *args: Any, **parameters: Any) -> Any:
        limit = getattr(_thread, "deadline", None)
        if limit is not None:
            limit.watch(self)
        return super().cursor(*args, **parameters)


CONNECTS_MAX = 64
"""At once and in one process. One that was abandoned counts until libpq gives it up."""

_connecting = threading.BoundedSemaphore(CONNECTS_MAX)


def _connect(args: Any, parameters: dict[str, Any]) -> Any:
    """psycopg2.connect in a thread of its own: name servers and a list of addresses may take longer than this thread has."""
    limit: Deadline | None = getattr(_thread, "deadline", None)
    answer: Future[Any] = Future()
    if not _connecting.acquire(timeout=limit.remaining() if limit else None):
        raise psycopg2.OperationalError("too many connections are still being made")
    threading.Thread(target=_connect_for, args=(answer, args, parameters), name="postgres-connect", daemon=True).start()
    try:
        return answer.result(limit.remaining() if limit else None)
    except FutureTimeoutError:
        if answer.cancel():
            raise psycopg2.OperationalError("no connection before the deadline") from None
        return answer.result()  # it came at this very moment


def _connect_for(answer: Future[Any], args: Any, parameters: dict[str, Any]) -> None:
    try:
        raw = psycopg2.connect(*args, **parameters)
    except BaseException as exc:  # noqa: BLE001 - it is raised in the thread that waits for it
        if answer.set_running_or_notify_cancel():
            answer.set_exception(exc)
    else:
        if answer.set_running_or_notify_cancel():
            answer.set_result(raw)
        else:
            raw.close()
    finally:
        _connecting.release()


def _forget_parent() -> None:
    """In a forked child: nothing of the parent's is used, and none of its sockets stays open here.

    A number that libpq still believes in is pointed at /dev/null rather than closed, so that it never becomes another file's.
    """
    global _engines, _engines_lock, _watchdog, _connecting, _thread
    nowhere = os.open(os.devnull, os.O_RDWR)
    for raw in list(_connections):
        with suppress(psycopg2.Error, OSError):
            os.dup2(nowhere, raw.fileno(), inheritable=False)
    os.close(nowhere)
    for limit in _watchdog.limits:
        limit.close_duplicates()
    _engines, _engines_lock, _watchdog, _thread = {}, threading.Lock(), _Watchdog(), threading.local()
    _connecting = threading.BoundedSemaphore(CONNECTS_MAX)
    _connections.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
