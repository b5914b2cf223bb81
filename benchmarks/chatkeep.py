"""Chatkeep in its own processes, as `make run` has them, and what a benchmark does to it: hold flushes, build a backlog, wait, forget."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

import psycopg2
from celery import Celery
from pydantic import SecretStr
from redis import Redis

from benchmarks.processes import Processes, answers
from worker import backlog, keys
from worker.broker import make_app
from worker.embedded import free_port
from worker.redis import connect_sync
from worker.settings import Settings
from worker.wakeups import send_flush

DRAIN_SECONDS = 180.0
_CELERY = ("celery", "--quiet", "-A", "worker.app")
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass
class System:
    """An API that is measured, and what is written to and read from in it."""

    name: str
    ports: tuple[int, ...]
    conversations: list[tuple[int, int]] = field(default_factory=list)
    """(user id, conversation id)"""


UNHINDERED = {"MESSAGES_PER_MINUTE_MAX": "1000000000", "CONVERSATIONS_PER_DAY_MAX": "1000000000"}
"""One user of a benchmark writes more than a person may; 0 would spare the counting too, and be measured as faster than it is."""


class Chatkeep:
    """The product: one uvicorn, one Celery worker with its default children, one beat; more when they are named."""

    def __init__(self, processes: Processes, database_url: str, redis_url: str, broker_url: str, jwt_secret: str) -> None:
        self._processes = processes
        self._broker_url = broker_url
        self._workers: dict[str, int] = {}
        self.database_url = database_url
        self.settings = Settings(
            _env_file=None, database_url=SecretStr(database_url), redis_url=SecretStr(redis_url), jwt_secret=SecretStr(jwt_secret)
        )
        self.system = System("Chatkeep", ())
        self.ports: dict[str, int] = {}
        self.redis: Redis = connect_sync(self.settings, name="benchmark")
        self.celery: Celery = self._make_app()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.redis.close()
        self.celery.close()

    # Processes

    def start(self) -> None:
        """API, worker and beat."""
        waits = [self.begin_api("api"), self.begin_worker("worker")]
        self._processes.run("beat", self._environment(), *_CELERY, "beat")
        for wait in waits:
            wait()
        self.system.ports = (self.ports["api"],)

    def stop(self) -> None:
        for name in (*self._workers, "api", "beat"):
            self._processes.stop(name)
        self._workers.clear()

    def _make_app(self) -> Celery:
        return make_app(self.settings.model_copy(update={"celery_broker_url": SecretStr(self._broker_url)}))

    def restart(self, *, database_url: str | None = None, broker_url: str | None = None) -> None:
        """Everything again, on another database or with another broker; on another database with an empty Redis."""
        self.drain()
        self.stop()
        self._broker_url = broker_url or self._broker_url
        self.celery.close()
        self.celery = self._make_app()
        if database_url is not None:
            self.database_url = database_url
            self.redis.flushall()
        self.start()

    def begin_api(self, name: str, own: Mapping[str, str] = _NOTHING) -> Callable[[], None]:
        """Starts one more API process, on `ports[name]`; what it answers waits until it is ready."""
        port = self.ports[name] = free_port()
        process = self._processes.serve(name, {**self._environment(), **own}, "api.app:app", port)
        return lambda: process.until(lambda: answers(port, "/readyz"), "readiness")

    def begin_worker(self, name: str, children: int | None = None, own: Mapping[str, str] = _NOTHING) -> Callable[[], None]:
        """Starts a worker, with as many children as there are cores unless told otherwise; what it answers waits until it is ready."""
        options = [f"--hostname={name}@stand", *([f"--concurrency={children}"] if children else [])]
        env = {**self._environment(), **own}
        process = self._processes.run(name, env, *_CELERY, "worker", "--without-gossip", "--without-mingle", *options)
        self._workers[name] = process.pid
        return lambda: process.until(lambda: bool(self.celery.control.ping([f"{name}@stand"], timeout=0.5)), "an answer to a ping")

    @contextmanager
    def workers(self, *names: str, own: Mapping[str, str] = _NOTHING) -> Iterator[list[int]]:
        """Only these workers take tasks, each with one child (started when it is first named, and kept); gives their process ids."""
        self.drain()
        for wait in [self.begin_worker(name, 1, own) for name in names if name not in self._workers]:
            wait()
        self._take_tasks(names)
        try:
            yield [self._workers[name] for name in names]
        finally:
            self._take_tasks(["worker"])

    def stop_process(self, name: str) -> None:
        self._workers.pop(name, None)
        self._processes.stop(name)

    def _take_tasks(self, names: Sequence[str]) -> None:
        control = self.celery.control
        for name in self._workers:
            order = control.add_consumer if name in names else control.cancel_consumer
            if not order("celery", destination=[f"{name}@stand"], reply=True, timeout=10.0):
                raise RuntimeError(f"{name} does not listen")

    def _environment(self) -> dict[str, str]:
        stores = {"DATABASE_URL": self.database_url, "REDIS_URL": self.settings.redis_url.get_secret_value()}
        return {**stores, "CELERY_BROKER_URL": self._broker_url, **UNHINDERED}

    # The log

    @property
    def shards(self) -> range:
        return range(self.settings.shards)

    def shard_of(self, user: int) -> int:
        return keys.shard_of_user(user, self.settings.shards)

    def hold(self, milliseconds: int = 55_000) -> None:
        """Nobody asks for a flush for this long: a backlog can be built."""
        for shard in self.shards:
            backlog.hold_flushes(self.redis, shard, milliseconds)

    def unhold(self, shard: int) -> None:
        """Whoever appends next to this shard asks for its flush."""
        backlog.clear_wakes(self.redis, [shard])

    def release(self, shards: Sequence[int] | None = None) -> None:
        """Asks for a flush of each shard now."""
        for shard in self.shards if shards is None else shards:
            if not send_flush(self.celery, shard):
                raise RuntimeError("the broker did not take a task")

    def pending(self, shards: Sequence[int] | None = None) -> int:
        """Entries that Postgres does not have yet."""
        with self.redis.pipeline(transaction=False) as pipeline:
            for shard in self.shards if shards is None else shards:
                pipeline.xlen(keys.log(shard))
            return sum(pipeline.execute())

    def drain(self, shards: Sequence[int] | None = None) -> None:
        """Waits until nothing is pending."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while self.pending(shards):
            if time.monotonic() > deadline:
                raise RuntimeError(f"still {self.pending(shards)} pending entries after {DRAIN_SECONDS:.0f} s")
            time.sleep(0.01)

    def fill(self, count: int, shards: Sequence[int] | None = None) -> None:
        """Appends a backlog through the product's own function (not over HTTP), in a process of its own, while flushes are held."""
        chosen = [pair for pair in self.system.conversations if shards is None or self.shard_of(pair[0]) in shards]
        if not chosen:
            raise RuntimeError("no conversation in these shards")
        self.hold()
        plan = ",".join(f"{user}:{conversation}" for user, conversation in chosen)
        name = f"fill-{secrets.token_hex(3)}"
        self._processes.finish(name, self._environment(), "benchmarks.fill", str(count), plan, seconds=DRAIN_SECONDS)
        if self.pending(shards) < count:
            raise RuntimeError("somebody has flushed the backlog that was to be built")

    # What there is

    def forget(self, conversations: Iterable[tuple[int, int]]) -> None:
        """What expiry does to clean conversations, now."""
        names = []
        for user, conversation in conversations:
            shard = self.shard_of(user)
            names += keys.of_conversation(shard, conversation)
        self.redis.delete(*names)

    def knows(self, user: int, conversation: int) -> bool:
        """Whether Redis has it."""
        return bool(self.redis.exists(keys.conversation(self.shard_of(user), conversation)))

    def used_memory(self) -> int:
        """Bytes, after a moment in which what connections needed is given back."""
        time.sleep(0.5)
        return int(self.redis.info("memory")["used_memory"])

    def now(self) -> int:
        """Microseconds, by the clock that numbers messages."""
        seconds, microseconds = self.redis.time()
        return int(seconds) * 1_000_000 + int(microseconds)

    @staticmethod
    def first_id(since: int) -> int:
        """Messages that were accepted from this time on (microseconds) have this id or a higher one."""
        return keys.first_id_at(since, 0)

    def lags(self, since: int) -> list[float]:
        """Milliseconds from acknowledgement to commit of all messages since (microseconds), as PostgreSQL noted its commits."""
        with closing(psycopg2.connect(self.database_url, connect_timeout=10)) as connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin) - created_at) * 1000 FROM message WHERE id >= %s",
                (self.first_id(since),),
            )
            return [float(row[0]) for row in cursor.fetchall()]
