"""Chatkeep as an operator runs it: real processes, each by its command, on servers that can be killed and frozen one by one.

    with Installation() as chatkeep:
        chatkeep.start("api", "worker", "beat")
        ann = sign_up(chatkeep.api.url, "ann@example.org")
        chatkeep.worker.kill()

Whatever is started here ends with the test run, also when that is killed (`worker/processes.py`), and nothing of a developer's `.env`
reaches it: the processes do not run in the repository's directory.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import psutil
import psycopg2
import redis

from api.tokens import Tokens
from tests import schema
from tests.people import Person, browser, until
from worker import keys
from worker.embedded import EmbeddedPostgres, EmbeddedValkey, free_port
from worker.processes import Claim, spawn
from worker.settings import Settings

START_SECONDS = 60.0
SHARDS = 16
OPERATOR = ("operator", "flower-password-of-the-tests")


class Process:
    """One process, its children included, and all that it has printed since it was first started."""

    def __init__(
        self, name: str, *module: str, claim: Claim, directory: Path, env: Mapping[str, str], ready: Callable[[Process], bool]
    ) -> None:
        self.name = name
        self._argv = [sys.executable, "-X", claim.marker, "-m", *module]
        self._claim = claim
        self._directory = directory
        self._env = dict(env)
        self._ready = ready
        self._process: subprocess.Popen[bytes] | None = None
        self.log = directory / f"{name}.log"
        self._said_before = 0

    def start(self) -> None:
        """Starts it; `wait` says when it is ready."""
        self._said_before = len(self.said)
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = spawn(self._argv, claim=self._claim, output=output, env=self._env, directory=self._directory)
        finally:
            os.close(output)

    def wait(self) -> None:
        """Returns when it does its work."""
        until(lambda: not self.is_running or self._ready(self), f"{self.name} is ready", START_SECONDS)
        assert self.is_running, f"{self.name} ended: {self.said_now[-2000:]}"

    def exit_code(self) -> int:
        """Waits for its end."""
        assert self._process is not None
        return self._process.wait(START_SECONDS)

    def kill(self) -> None:
        """kill -9, of it and of all of its children at once."""
        if self._process is not None:
            _signal(self.family(), signal.SIGKILL)
            self._process.wait(START_SECONDS)
            self._process = None

    def kill_children(self) -> None:
        """kill -9, but not of the process itself."""
        _signal(self.family()[1:], signal.SIGKILL)

    def family(self) -> list[psutil.Process]:
        """It and its children."""
        if not self.is_running or self._process is None:
            return []
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP, and SIGCONT at the end."""
        with frozen(self.family()):
            yield

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def said(self) -> str:
        """Its standard output and error."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def said_now(self) -> str:
        """The same since its last start."""
        return self.said[self._said_before :]


class Api(Process):
    """`uvicorn api.app:app`."""

    def __init__(self, name: str, claim: Claim, directory: Path, env: Mapping[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        module = ("uvicorn", "api.app:app", "--port", str(self.port), "--timeout-graceful-shutdown", "10")
        super().__init__(name, *module, claim=claim, directory=directory, env=env, ready=lambda _: answers(self.url + "/livez"))


class Installation:
    """Two stores, a broker of its own, and the processes that are started on them."""

    def __init__(self, *, durable: bool = False, **settings: str) -> None:
        """`settings`: what is set for all processes, beside what they need; `durable`: Postgres fsyncs, as it should outside of tests."""
        self._stack = ExitStack()
        self._durable = durable
        self._chosen = settings

    def __enter__(self) -> Installation:
        self._directory = Path(self._stack.enter_context(schema.state_directory()))
        self.postgres = EmbeddedPostgres(self._directory / "log", durable=self._durable, start_seconds=START_SECONDS)
        self.valkey = EmbeddedValkey(self._directory / "log", start_seconds=START_SECONDS)
        self.broker = EmbeddedValkey(self._directory / "broker", start_seconds=START_SECONDS)
        try:
            for server in (self.postgres, self.valkey, self.broker):
                self._stack.callback(server.destroy)
                server.start()
            self._make_processes()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
        self._claim.kill_processes()
        self._claim.release()
        self._stack.close()

    def _make_processes(self) -> None:
        run = self._directory / "run"
        run.mkdir()
        self._claim = Claim(run)
        self._claim.take()
        self.model = self._stack.enter_context(slow_model())
        self.secret = secrets.token_urlsafe(48)
        self.env = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
        self.env |= {
            **{"PYTHONPATH": str(schema.ROOT), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "C_FORCE_ROOT": "1"},
            **{"DATABASE_URL": self.postgres.url, "REDIS_URL": self.valkey.url, "CELERY_BROKER_URL": self.broker.url},
            **{"JWT_SECRET": self.secret, "SHARDS": str(SHARDS), "FLUSH_INTERVAL_MS": "50"},
            "FLOWER_BASIC_AUTH": ":".join(OPERATOR),
            **self._chosen,
        }
        with_model = self.env | {"LLM_BASE_URL": self.model.url, "LLM_MODEL": "slow", "LLM_API_KEY": "none"}
        self.api = Api("api", self._claim, run, self.env)
        self.other_api = Api("other_api", self._claim, run, with_model)
        self.migration = self.process("migration", "alembic", "-c", str(schema.ROOT / "alembic.ini"), "upgrade", "head")
        self.worker = self.celery("worker", "worker", ready=lambda worker: " ready." in worker.said_now)
        self.beat = self.celery("beat", "beat", ready=lambda beat: "LocalTime" in beat.said_now)
        self.flower_url = f"http://127.0.0.1:{free_port()}"
        port = self.flower_url.rsplit(":", 1)[1]
        options = ("--address=127.0.0.1", f"--port={port}", "--read-only")
        self.flower = self.celery("flower", "flower", *options, ready=lambda _: answers(self.flower_url + "/healthcheck"))
        started = (self.api, self.other_api, self.worker, self.beat, self.flower)
        self.processes: dict[str, Process] = {process.name: process for process in started}

    def process(self, name: str, *module: str, ready: Callable[[Process], bool] = lambda _: True, **env: str) -> Process:
        """Any other command, with these settings changed."""
        return Process(name, *module, claim=self._claim, directory=self._directory / "run", env=self.env | env, ready=ready)

    def celery(self, name: str, *command: str, ready: Callable[[Process], bool], **env: str) -> Process:
        """One of Celery's."""
        return self.process(name, "celery", "-A", "worker.app", *command, ready=ready, **env)

    def migrate(self) -> None:
        """`alembic upgrade head`."""
        self.migration.start()
        assert self.migration.exit_code() == 0, self.migration.said

    def start(self, *names: str) -> None:
        """Starts these processes (all, if none is named) and returns when they are ready."""
        chosen = [self.processes[name] for name in names] or list(self.processes.values())
        for process in chosen:
            if not process.is_running:
                process.start()
        for process in chosen:
            process.wait()

    def heal(self) -> None:
        """What every test needs runs again, whatever the test before has broken, and nothing is left to be flushed."""
        for server in (self.postgres, self.valkey, self.broker):
            server.start()
        self.start("api", "worker", "beat")
        until(lambda: all(answers(api.url + "/readyz") for api in (self.api, self.other_api) if api.is_running), "they can acknowledge")
        self.drain()

    def drain(self, seconds: float = 30.0) -> None:
        """Returns when everything is committed."""
        until(lambda: self.pending() == 0, "everything is committed", seconds)

    def pending(self) -> int:
        """Entries that Postgres does not know."""
        with self.redis() as client:
            return sum(client.xlen(keys.log(shard)) for shard in range(SHARDS))

    @contextmanager
    def redis(self, server: EmbeddedValkey | None = None) -> Iterator[redis.Redis]:
        """A look into the log's server, or the broker's, from outside."""
        with closing(redis.Redis.from_url((server or self.valkey).url, socket_timeout=10, socket_connect_timeout=5)) as client:
            yield client

    @contextmanager
    def database(self) -> Iterator[Any]:
        """A cursor in a transaction of the test's own, which is rolled back."""
        with closing(psycopg2.connect(self.postgres.url, connect_timeout=5)) as connection, connection.cursor() as cursor:
            yield cursor

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """What Postgres says, from outside."""
        with self.database() as cursor:
            cursor.execute(statement, values)
            return list(cursor.fetchall())

    def person(self, user_id: int) -> Person:
        """A new user with this id: in the shard of the test's choice."""
        with closing(psycopg2.connect(self.postgres.url, connect_timeout=5)) as connection, connection, connection.cursor() as cursor:
            cursor.execute(
                'INSERT INTO "user" (id, email, password_hash) OVERRIDING SYSTEM VALUE VALUES (%s, %s, %s) ON CONFLICT DO NOTHING',
                (user_id, f"{user_id}@example.org", "x"),
            )
        return Person(self.api.url, user_id, Tokens(self.secret, 3600).issue(user_id))

    def browser(self, *login: str) -> httpx2.Client:
        """Flower, as somebody who signs in like this."""
        client = browser(self.flower_url)
        client.auth = httpx2.BasicAuth(*login) if login else None
        return client


@contextmanager
def frozen(processes: list[psutil.Process]) -> Iterator[None]:
    """These answer nothing, while their kernel goes on to acknowledge."""
    _signal(processes, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(processes, signal.SIGCONT)


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    """To those that are still there: a child may have ended meanwhile, or because the one before it was told."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def frozen_server(server: EmbeddedPostgres | EmbeddedValkey) -> AbstractContextManager[None]:
    """The same for a server with all of its children."""
    main = psutil.Process(server.pid)
    return frozen([main, *main.children(recursive=True)])


def answers(url: str) -> bool:
    """Whether somebody answers 200 here."""
    try:
        with browser("") as http:
            return http.get(url, timeout=3).status_code == 200
    except httpx2.TransportError:
        return False


class SlowModel:
    """A server that speaks OpenAI's chat completions, and stops after its first words until it is told to go on."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def reset(self) -> None:
        """Waits again from the next call on."""
        self.asked.clear()
        self.go_on.clear()


@contextmanager
def slow_model() -> Iterator[SlowModel]:
    """A `SlowModel` that runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                self._say({"content": "Once "})
                model.asked.set()
                model.go_on.wait(START_SECONDS)
                self._say({"content": "upon a time."}, "stop")
                self.wfile.write(b"data: [DONE]\n\n")
            except (BrokenPipeError, ConnectionResetError):  # who asked was killed: that is what the test is about
                return

        def _say(self, delta: dict[str, str], finish: str | None = None) -> None:
            chunk = {
                **{"id": "1", "object": "chat.completion.chunk", "created": int(time.time()), "model": "slow"},
                "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
            }
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            """Not on the tests' screen."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    model = SlowModel(f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, name="model", daemon=True).start()
    try:
        yield model
    finally:
        model.go_on.set()
        server.shutdown()
        server.server_close()
