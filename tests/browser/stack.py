"""All of Chatkeep as processes of its own, which a test can kill, freeze and bring back: `Stack`."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import httpx2
import psutil
import psycopg2
from psycopg2.extras import execute_values

from tests import schema
from tests.browser.model import Model
from worker import keys
from worker.codec import to_microseconds
from worker.embedded import EmbeddedPostgres, EmbeddedValkey, free_port
from worker.processes import Claim, spawn
from worker.settings import Settings

READY_SECONDS = 60.0
SHARDS = 16


class Program:
    """One process of ours."""

    def __init__(self, name: str, *module: str, home: Path, claim: Claim, env: dict[str, str]) -> None:
        self._home = home
        self.log = home / f"{name}.log"
        self._argv = [sys.executable, "-X", claim.marker, "-m", *module]
        self._claim = claim
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; it dies with the tests."""
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = spawn(self._argv, claim=self._claim, output=output, env=self._env, directory=self._home)
        finally:
            os.close(output)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)


class Stack:
    """Postgres, Valkey, the API, a worker with its beat, and the model."""

    def __init__(self, home: Path) -> None:
        self._claim = Claim(home)
        self._home = home
        self.model = Model()
        self.postgres = EmbeddedPostgres(home, durable=False)
        self.valkey = EmbeddedValkey(home)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts everything and waits until it is ready."""
        self._claim.take()
        self.model.start()
        self.postgres.start()
        self.valkey.start()
        schema.upgrade(self.postgres.url)
        env = self._environment()
        common = {"home": self._home, "claim": self._claim, "env": env}
        listen = ("--host", "127.0.0.1", "--port", str(self.port), "--timeout-graceful-shutdown", "1", "--no-access-log")
        self.api = Program("api", "uvicorn", "api.app:app", *listen, **common)
        celery = ("celery", "--quiet", "-A", "worker.app")
        self.worker = Program("worker", *celery, "worker", "--pool=solo", "--without-gossip", "--without-mingle", **common)
        self.beat = Program("beat", *celery, "beat", **common)
        for program in (self.api, self.worker, self.beat):
            program.start()
        self.wait_until_ready()

    def stop(self) -> None:
        """Ends everything. Nothing is kept, so nothing is asked politely."""
        for name in ("beat", "worker", "api"):
            if program := getattr(self, name, None):
                program.kill()
        self.valkey.kill()
        self.postgres.kill()
        self.model.stop()
        self._claim.release()

    def wait_until_ready(self) -> None:
        """Writes are acknowledged, and Postgres is there."""
        deadline = time.monotonic() + READY_SECONDS
        with httpx2.Client(base_url=self.url, timeout=3, verify=False, trust_env=False) as client:
            while (said := _health(client)) != "ok":
                assert time.monotonic() < deadline, f"not ready: {said}\n{self.api.log.read_text()[-2000:]}"
                time.sleep(0.05)

    @contextmanager
    def postgres_frozen(self) -> Iterator[None]:
        """Postgres takes connections and answers nothing, as behind a cut that nobody has noticed."""
        family = _family(self.postgres.pid)
        for process in family:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in reversed(family):
                process.send_signal(signal.SIGCONT)

    def store(self, user_id: int, title: str, messages: Sequence[tuple[datetime, str, str]]) -> int:
        """Puts a conversation of earlier days (time, role, content) straight into Postgres, as if it had been committed then; its id."""
        shard = keys.shard_of_user(user_id, SHARDS)
        first, last = messages[0][0], messages[-1][0]
        conversation = _id_at(first - timedelta(seconds=1), shard)
        rows = [(conversation, _id_at(at, shard), user_id, role, content, at, "complete") for at, role, content in messages]
        with closing(psycopg2.connect(self.postgres.url, connect_timeout=10)) as connection, connection, connection.cursor() as cursor:
            columns = "(id, user_id, title, created_at, updated_at)"
            cursor.execute(f"INSERT INTO conversation {columns} VALUES (%s, %s, %s, %s, %s)", (conversation, user_id, title, first, last))
            columns = "(conversation_id, id, user_id, role, content, created_at, status)"
            execute_values(cursor, f"INSERT INTO message {columns} VALUES %s", rows, page_size=1000)
        return conversation

    def _environment(self) -> dict[str, str]:
        ours = {name.upper() for name in Settings.model_fields}
        env = {name: value for name, value in os.environ.items() if name.upper() not in ours}
        return env | {
            "DATABASE_URL": self.postgres.url,
            "REDIS_URL": self.valkey.url,
            "SHARDS": str(SHARDS),
            "JWT_SECRET": secrets.token_urlsafe(48),
            "LLM_BASE_URL": self.model.url,
            "LLM_MODEL": "test",
            "PYTHONPATH": str(schema.ROOT),  # they run elsewhere, so that nobody's `.env` is read
            "PYTHONUNBUFFERED": "1",
        }


def _id_at(moment: datetime, shard: int) -> int:
    return keys.first_id_at(to_microseconds(moment), shard)


def _health(client: httpx2.Client) -> str:
    try:
        return str(client.get("/readyz").json().get("status"))
    except (httpx2.HTTPError, ValueError) as exc:  # not there yet; the caller has the deadline
        return type(exc).__name__


def _family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]
