"""The stand: everything that is measured, side by side on one machine, on servers of its own.

| process | is |
| --- | --- |
| PostgreSQL | fully durable (fsync, synchronous commit); a database for each system |
| Valkey | append-only file, fsynced always; Chatkeep's log and cache |
| broker | a second Valkey, for Celery, that keeps nothing, as in `make run` |
| api, worker, beat | Chatkeep (`benchmarks/chatkeep.py`) |
| bare, dict, direct, best direct | the yardsticks (`benchmarks/yardsticks`): one uvicorn each, idle while another one is measured |

All of it lives in one directory and is killed with the process that started it; at the end only logs are left.
"""

from __future__ import annotations

import secrets
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil  # type: ignore[import-untyped]  # it ships no types
import psycopg2

from api.tokens import Tokens
from benchmarks import machine
from benchmarks.chatkeep import Chatkeep, System
from benchmarks.figures import Plan
from benchmarks.load import ROOT, RUNNERS, Load, Probe, Served, request, sentence
from benchmarks.processes import Processes, answers
from worker.embedded import EmbeddedBroker, EmbeddedPostgres, EmbeddedValkey, free_port

T = TypeVar("T")

POSTGRES = {
    "track_commit_timestamp": "on",  # the lag of each message, from outside
    "max_connections": "200",
    "max_wal_size": "16GB",  # no checkpoint within a timed phase, for nobody
    "checkpoint_timeout": "1h",
}
YARDSTICKS = {"bare": "direct", "in_memory": "direct", "direct": "direct", "best_direct": "best"}
"""The module of each, and its database."""
LABELS = {"in_memory": "dict", "best_direct": "best direct"}


class Stand:
    """Starts everything at the beginning of a `with` block; see above."""

    def __init__(self, home: Path, plan: Plan, *, durable: bool = True, load: str = "own") -> None:
        self.home = home
        self.plan = plan
        self.noise: list[float] = []
        self._runner = RUNNERS[load]
        self._secret = secrets.token_urlsafe(48)
        tokens = Tokens(self._secret, 86_400)
        self._headers = {user: {"Authorization": f"Bearer {tokens.issue(user)}"} for user in range(1, plan.users + 1)}
        self._exits = ExitStack()
        self.processes = Processes(home, self._secret)
        self.postgres = EmbeddedPostgres(home, durable=durable, settings=POSTGRES)
        self.valkey = EmbeddedValkey(home, durable=durable)
        self.broker = EmbeddedBroker(home)
        self.yardsticks: dict[str, System] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._exits.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def _start(self) -> None:
        self._exits.enter_context(self.processes)
        for server in (self.postgres, self.valkey, self.broker):
            if (self.home / server.name).exists():  # a run that was killed
                server.destroy()
            server.start()
            self._exits.callback(server.destroy)
        self._exits.callback(self.processes.stop_all)
        self.query("CREATE DATABASE direct")
        self._migrate("chatkeep")
        for name in ("best", "copied"):
            self.add_database(name)
        self.chatkeep = self._exits.enter_context(
            Chatkeep(self.processes, self.url_of("chatkeep"), self.valkey.url, self.broker.url, self._secret)
        )
        starting = [self.start_yardstick(name, self.url_of(database)) for name, database in YARDSTICKS.items()]
        self.chatkeep.start()
        for wait in starting:
            wait()
        self.fill_conversations(self.chatkeep.system)

    def start_yardstick(self, name: str, database_url: str, module: str | None = None) -> Callable[[], None]:
        """Starts one; what it answers waits until it is ready, with conversations in it."""
        port = free_port()
        process = self.processes.serve(name, {"YARDSTICK_DATABASE_URL": database_url}, f"benchmarks.yardsticks.{module or name}:app", port)
        system = self.yardsticks[name] = System(LABELS.get(name, name), (port,))

        def wait() -> None:
            process.until(lambda: answers(port, "/openapi.json"), "an answer")
            if name == "bare":
                system.conversations = [(user, user) for user in self._headers]
            else:
                self.fill_conversations(system)

        return wait

    # Postgres

    def url_of(self, database: str) -> str:
        return self.postgres.url.rsplit("/", 1)[0] + "/" + database

    @contextmanager
    def connection(self, database: str = "chatkeep") -> Iterator[Any]:
        """A psycopg2 connection in autocommit."""
        with closing(psycopg2.connect(self.url_of(database), connect_timeout=10)) as connection:
            connection.autocommit = True
            yield connection

    def query(self, statement: str, *values: object, database: str = "chatkeep") -> list[tuple[Any, ...]]:
        """What Postgres says."""
        with self.connection(database) as connection, connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def add_database(self, name: str) -> None:
        """One more with Chatkeep's tables, and the users of the stand."""
        self.query(f"CREATE DATABASE {name}")
        self._migrate(name)

    def _migrate(self, database: str) -> None:
        own = {"DATABASE_URL": self.url_of(database), "DATABASE_URL_UNPOOLED": self.url_of(database)}
        self.processes.finish(f"migrate-{database}", own, "alembic", "-c", str(ROOT / "alembic.ini"), "upgrade", "head")
        self.query(  # nobody signs in with a password here
            'INSERT INTO "user" (id, email, password_hash) OVERRIDING SYSTEM VALUE '
            "SELECT n, 'user' || n || '@example.org', 'x' FROM generate_series(1, %s) n",
            self.plan.users,
            database=database,
        )

    def move_to(self, database: str) -> None:
        """Chatkeep again on another database, with an empty Redis and new conversations."""
        self.chatkeep.restart(database_url=self.url_of(database))
        self.fill_conversations(self.chatkeep.system)
        self.chatkeep.drain()

    def checkpoint(self) -> None:
        """So that no phase pays for the pages that another one has touched."""
        self.query("CHECKPOINT")

    @contextmanager
    def frozen_postgres(self) -> Iterator[None]:
        """Stops (SIGSTOP) every process of PostgreSQL."""
        root = psutil.Process(self.postgres.pid)
        family = [root, *root.children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in family:
                process.send_signal(signal.SIGCONT)

    def postgres_cpu(self) -> float:
        return machine.cpu_seconds([self.postgres.pid])

    # Requests

    def headers(self, user_id: int) -> dict[str, str]:
        return self._headers[user_id]

    def appends(self, system: System, *, key: bool = False, whose: Callable[[int], bool] = lambda user: True) -> tuple[bytes, ...]:
        """One message of 200 characters for each conversation (of these users), questions and answers in turn."""
        return tuple(
            request(
                "POST",
                f"/api/conversations/{conversation}/messages",
                self.headers(user),
                {"role": "assistant" if i % 2 else "user", "content": sentence(i)},
                key=key,
            )
            for i, (user, conversation) in enumerate(system.conversations)
            if whose(user)
        )

    def histories(self, conversations: Iterable[tuple[int, int]], query: str = "") -> tuple[bytes, ...]:
        """The latest 50 messages of each of these."""
        return tuple(
            request("GET", f"/api/conversations/{conversation}/messages{query}", self.headers(user)) for user, conversation in conversations
        )

    def fill_conversations(self, system: System) -> None:
        """New conversations of all users, made over HTTP."""
        with Probe(system.ports[0]) as probe:
            system.conversations = []
            for i in range(self.plan.conversations):
                user = 1 + i % self.plan.users
                made = probe.ask("POST", "/api/conversations/", 201, self.headers(user), {"title": f"number {i}"})
                system.conversations.append((user, made["id"]))

    def quietly(self, work: Callable[[], T], attempts: int = 2) -> T:
        """Does something that is timed, and again if others were too busy meanwhile; notes how busy they were."""
        for attempt in range(1, attempts + 1):
            if not self.plan.is_tiny:
                machine.wait_until_quiet(5.0)
            with machine.listen() as noise:
                result = work()
            if noise.share < machine.NOISY or self.plan.is_tiny or attempt == attempts:
                break
        self.noise.append(noise.share)
        return result

    def run_load(self, load: Load) -> Served:
        """Runs a load; for use within `quietly`."""
        return self._runner(load)

    def load(self, load: Load) -> Served:
        """Runs a load, quietly."""
        return self.quietly(lambda: self.run_load(load))

    def append(self, system: System, connections: int, seconds: float, *, key: bool = False, rate: float | None = None) -> Accepted:
        """Appends for some seconds; Chatkeep's are then waited for, until all are in Postgres."""
        load = Load(system.ports, self.appends(system, key=key), connections, seconds, 201, self.plan.warm_seconds, rate)

        def once() -> Accepted:
            cpu = self.postgres_cpu()
            served = self.run_load(load)
            if system.name == self.chatkeep.system.name:
                self.chatkeep.drain()
            return Accepted(served, (self.postgres_cpu() - cpu) * 1e6 / served.all_requests)

        return self.quietly(once)

    def append_frozen(self, connections: int, seconds: float) -> Served:
        """Appends to Chatkeep while PostgreSQL stands still."""
        load = Load(self.chatkeep.system.ports, self.appends(self.chatkeep.system), connections, seconds, 201, self.plan.warm_seconds)

        def once() -> Served:
            with self.frozen_postgres():
                return self.run_load(load)

        return self.quietly(once, attempts=1)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a phase of appends came to."""

    served: Served
    postgres_us: float
    """CPU that all of PostgreSQL used for one message, until it was committed."""


def rotated(systems: Sequence[System], round_: int) -> list[System]:
    """Each round begins with another one."""
    start = round_ % len(systems)
    return [*systems[start:], *systems[:start]]
