"""The API behind a real uvicorn in a thread, on a database and an emptied Valkey of its own, for as long as a module's tests run.

No worker runs: a test decides when its entries are flushed (`flush`), and when their copies leave the cache (`forget`). The model is the
test's own (`Model.play`); whatever else is there is what runs in production.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import psycopg2
import pytest
import redis
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.replies import OfflineResponder, Turn
from tests import core
from tests.people import ANSWER_SECONDS, Person, browser, until
from worker import keys
from worker.database import dispose
from worker.embedded import EmbeddedPostgres, EmbeddedValkey
from worker.flush import Report, flush_shard
from worker.redis import connect_sync
from worker.settings import Settings, get_settings

PATIENT = {"REDIS_TIMEOUT_SECONDS": "10"}
"""A disk that takes two seconds for an fsync has made a test fail that had nothing to do with time; those that have set their own."""

Play = Callable[[Sequence[Turn]], AsyncGenerator[str, None]]


class Model:
    """A model that says what the test wants; by itself it is the offline responder."""

    def __init__(self) -> None:
        self._offline = OfflineResponder()
        self.play: Play = self._offline.stream

    def stream(self, turns: Sequence[Turn]) -> AsyncGenerator[str, None]:
        """See `Responder.stream`."""
        return self.play(turns)

    async def close(self) -> None:
        """There is nothing to let go of."""

    def reset(self) -> None:
        """The offline responder again."""
        self.play = self._offline.stream


class Gate:
    """Holds a reply between two pieces until the test opens it."""

    def __init__(self, *before: str, after: Sequence[str] = ("done.",)) -> None:
        self._before, self._after = before, after
        self.reached = threading.Event()
        self.opened = threading.Event()

    async def play(self, turns: Sequence[Turn]) -> AsyncGenerator[str, None]:
        """For `Model.play`."""
        for piece in self._before:
            yield piece
        self.reached.set()
        deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS
        while not self.opened.is_set():
            assert asyncio.get_running_loop().time() < deadline, "the test never opened its gate"
            await asyncio.sleep(0.005)
        for piece in self._after:
            yield piece


class House:
    """The running API, and what stands behind it."""

    def __init__(self, settings: Settings, app: FastAPI, url: str, model: Model, client: redis.Redis) -> None:
        self.settings = settings
        self.app = app
        self.url = url
        self.model = model
        self.redis = client
        self.http = browser(url)
        self._user_ids = itertools.count(1001)

    def person(self, user_id: int | None = None) -> Person:
        """A new user, without the work of a password. With `user_id`, in the shard of the test's choice."""
        number = next(self._user_ids) if user_id is None else user_id
        self.query(
            'INSERT INTO "user" (id, email, password_hash) OVERRIDING SYSTEM VALUE VALUES (%s, %s, %s)',
            number,
            f"{secrets.token_hex(8)}@example.org",
            "x",
        )
        return Person(self.url, number, self.app.state.tokens.issue(number))

    def query(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        """What Postgres says, from outside."""
        url = self.settings.database_url.get_secret_value()
        with closing(psycopg2.connect(url, connect_timeout=5)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement, values)
                return cursor.fetchall() if cursor.description else []

    def flush(self, *people: Person) -> list[Report]:
        """Commits what these people have pending."""
        shards = {keys.shard_of_user(person.id, self.settings.shards) for person in people}
        return [flush_shard(self.redis, self.settings, shard) for shard in sorted(shards)]

    @contextmanager
    def flushing(self, person: Person) -> Iterator[core.Flusher]:
        """A real flush of this person's shard that goes on step by step, as the test says."""
        shard = keys.shard_of_user(person.id, self.settings.shards)
        with core.gates():
            flusher = core.Flusher(lambda: flush_shard(self.redis, self.settings, shard))
            try:
                yield flusher
            finally:
                flusher.finish()

    def flush_all(self) -> None:
        """Commits everything."""
        for shard in range(self.settings.shards):
            flush_shard(self.redis, self.settings, shard)

    def forget(self) -> None:
        """What happens to committed copies when their time is over: all of it at once.

        Twice, because the read before this may be loading one in the background. (Its lease goes too, so it will find itself late.)
        """
        self.flush_all()
        for _ in range(2):
            names = [name for name in self.redis.scan_iter(count=10_000) if self.redis.ttl(name) > 0]
            if names:
                self.redis.delete(*names)
            time.sleep(0.005)

    def wipe(self) -> None:
        """An emptied cache: everything in Redis is gone, after everything was committed."""
        self.flush_all()
        self.redis.flushall()

    def pending(self, person: Person) -> int:
        """Entries of this person's shard that Postgres does not know."""
        return int(self.redis.xlen(keys.log(keys.shard_of_user(person.id, self.settings.shards))))


@contextmanager
def house(postgres: EmbeddedPostgres, template: str, valkey: EmbeddedValkey, **settings: str) -> Iterator[House]:
    """A `House` with these settings."""
    name = f"house_{secrets.token_hex(6)}"
    valkey.start()  # in case another module has killed it
    with _database(postgres, name, template) as database_url, pytest.MonkeyPatch.context() as patch:
        patch.setitem(Settings.model_config, "env_file", None)
        for field in Settings.model_fields:
            patch.delenv(field.upper(), raising=False)
        values = {"DATABASE_URL": database_url, "REDIS_URL": valkey.url, "JWT_SECRET": secrets.token_urlsafe(48), **PATIENT}
        for variable, value in (values | settings).items():
            patch.setenv(variable, value)
        get_settings.cache_clear()
        try:
            with closing(connect_sync(get_settings(), name="test")) as client:
                client.flushall()
                with _serve(get_settings(), client) as served:
                    yield served
        finally:
            dispose()
            get_settings.cache_clear()


@contextmanager
def _serve(settings: Settings, client: redis.Redis) -> Iterator[House]:
    model = Model()
    app = create_app(settings)
    app.state.responder = model
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="uvicorn")
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive(), "uvicorn answers", 30)
            assert server.started, "uvicorn ended at its start"
            yield House(settings, app, f"http://127.0.0.1:{listening.getsockname()[1]}", model, client)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "uvicorn does not end"


@contextmanager
def _database(postgres: EmbeddedPostgres, name: str, template: str) -> Iterator[str]:
    postgres.start()  # in case another module has killed it
    with closing(psycopg2.connect(postgres.url, connect_timeout=10)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
            yield postgres.url.rsplit("/", 1)[0] + "/" + name
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
