"""Chatkeep as an operator runs it, every process by itself, and every link between two of them one that can be cut.

    2 API processes ──▶ api→valkey, api→postgres, api→broker
    2 workers       ──▶ worker→valkey, worker→postgres, worker→broker      (each with one child)
    beat            ──▶ worker→broker
    Valkey (the pending log), Postgres with fsync on, and a second Valkey for the broker

Everything is tethered to this process and carries a marker in its command line, so nothing outlives the run, not even when that is killed
(`worker/processes.py`). A *keeper* starts what has died again after a moment, as any supervisor would; it starts nothing else, so that
whatever is alive and does nothing has to recover by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from types import MappingProxyType
from typing import Any

import psutil
import psycopg2
import redis

from tests import schema
from tests.crash.http import ask
from tests.crash.proxy import Link
from worker.embedded import EmbeddedPostgres, EmbeddedValkey, free_port
from worker.errors import ConfigurationError
from worker.processes import Claim, spawn

SHARDS = 16
READY_SECONDS = 60.0
LIBRARIES = ("lib/*/faketime/libfaketime.so.1", "local/lib/faketime/libfaketime.so.1")
SETTINGS = {
    "CACHE_TTL_SECONDS": "4",
    "FLUSH_BATCH_MAX": "200",
    "SHARDS": str(SHARDS),
    "FLUSH_TIMEOUT_SECONDS": "8",
    "LOG_LEVEL": "INFO",
    "MESSAGES_PER_MINUTE_MAX": "1000000000",
    "CONVERSATIONS_PER_DAY_MAX": "1000000000",
    "ACCESS_TOKEN_SECONDS": "2592000",
}
"""Small enough that a run reaches the limits: copies expire, batches fill. What a user may do is counted, but without an end, and the
workload signs in once for a run of hours."""


class TracedValkey(EmbeddedValkey):
    """A Valkey that runs under strace while `tracing` holds strace's options: it can be killed at a system call, or given errors."""

    tracing: tuple[str, ...] = ()
    environment: Mapping[str, str] = MappingProxyType({})

    def _command(self) -> list[str]:
        command = super()._command()
        if self.environment:
            command = ["/usr/bin/env", *(f"{name}={value}" for name, value in self.environment.items()), *command]
        return [str(shutil.which("strace")), "-f", "-qq", "-s0", *self.tracing, *command] if self.tracing else command

    @property
    def append_only_file(self) -> Path:
        """The file that is being appended to."""
        files = sorted((self._home / "data" / "appendonlydir").glob("*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))
        return files[-1]


class Broker(TracedValkey):
    """The second Valkey."""

    name = "broker"


class Part:
    """One thing that runs and is kept running. `deaths` counts the times that it was found dead."""

    name: str
    kind: str

    def __init__(self) -> None:
        self.deaths = 0
        self.wanted = True
        self.stopped = False

    def start(self) -> None:
        raise NotImplementedError

    @property
    def pid(self) -> int | None:
        """While it runs."""
        raise NotImplementedError

    def pids(self) -> list[int]:
        """All of its processes, the first one first."""
        if self.pid is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            return [process.pid, *(child.pid for child in process.children(recursive=True))]
        return []

    def children(self) -> list[int]:
        """All but the first."""
        return self.pids()[1:]


class Program(Part):
    """One of our own processes."""

    def __init__(self, name: str, kind: str, argv: list[str], env: dict[str, str], claim: Claim, log: Path) -> None:
        super().__init__()
        self.name = name
        self.kind = kind
        self.env = env
        self.extra: dict[str, str] = {}
        """More environment, for the next start."""
        self.log = log
        self._argv = argv
        self._claim = claim
        self._process: Popen[bytes] | None = None

    def start(self) -> None:
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            # Not in the repository: a developer's `.env` is not this run's.
            self._process = spawn(self._argv, claim=self._claim, output=output, env=self.env | self.extra, directory=self.log.parent)
        finally:
            os.close(output)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def code(self) -> int | None:
        """How it ended."""
        return self._process.returncode if self._process is not None else None


class Server(Part):
    """A store."""

    def __init__(self, server: EmbeddedPostgres | TracedValkey, kind: str) -> None:
        super().__init__()
        self.name = self.kind = kind
        self.server = server
        self._turn = threading.Lock()

    def start(self) -> None:
        with self._turn:
            self.server.start()

    def end(self) -> None:
        """SIGKILL for all of it; waits for a start that is under way."""
        with self._turn:
            self.server.kill()

    @property
    def pid(self) -> int | None:
        return self.server.pid if self.server.is_running else None

    def pids(self) -> list[int]:
        """Without strace, where that is in front."""
        found = super().pids()
        return found[1:] if isinstance(self.server, TracedValkey) and self.server.tracing else found


@dataclass
class Cluster:
    """All of it. `chance` is the run's source of randomness."""

    home: Path
    chance: random.Random
    event: Callable[..., None]
    apis: int = 2
    workers: int = 2
    crash_orders: Path | None = None
    """Where our own processes look for orders to kill themselves (`worker/crashpoints.py`)."""
    parts: list[Part] = field(default_factory=list)
    links: dict[str, Link] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    kills: dict[str, int] = field(default_factory=dict)
    _keepers: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self._claim = Claim(self.home)
        self.valkey = TracedValkey(self.home)
        self.broker = Broker(self.home)
        self.postgres = EmbeddedPostgres(self.home, settings={"max_connections": "100", "log_min_messages": "log"})

    async def start(self) -> None:
        """Starts the stores, the links, and then the processes; returns when the API can acknowledge."""
        self._claim.take()
        servers = [Server(self.valkey, "valkey"), Server(self.broker, "broker"), Server(self.postgres, "postgres")]
        self.parts = [*servers]
        await asyncio.gather(*(asyncio.to_thread(server.start) for server in servers))
        schema_env = {"DATABASE_URL": self.postgres.url}
        await asyncio.to_thread(schema.upgrade, schema_env["DATABASE_URL"])
        for who in ("api", "worker"):
            for what, server in (("valkey", self.valkey), ("postgres", self.postgres), ("broker", self.broker)):
                link = self.links[f"{who}-{what}"] = Link(f"{who}-{what}", lambda server=server: server.port, self.chance)  # type: ignore[misc]
                await link.start()
        self.api_ports = [free_port() for _ in range(self.apis)]
        self._make_programs()
        for part in self.parts:
            if isinstance(part, Program):
                part.start()
        self._keepers = [asyncio.create_task(self._keep(part)) for part in self.parts]
        if wrong := await self.until_ready(READY_SECONDS):
            raise RuntimeError(f"not ready {READY_SECONDS:.0f} s after the start: {wrong}")

    async def end(self) -> None:
        """Ends everything, by force: ending in good order is not what is tested here."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for pid in [pid for part in self.parts for pid in part.pids()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        await asyncio.to_thread(self._claim.kill_processes)
        for link in self.links.values():
            await link.close()
        for server in (self.valkey, self.broker, self.postgres):
            await asyncio.to_thread(server.kill)
        await asyncio.to_thread(self.postgres.destroy)
        self._claim.release()

    def _make_programs(self) -> None:
        secret = secrets.token_urlsafe(48)
        marked = [sys.executable, "-X", self._claim.marker, "-m"]
        celery = [*marked, "celery", "--quiet", "-A", "worker.app"]
        for i, port in enumerate(self.api_ports):
            uvicorn = [*marked, "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
            self._add(f"api{i}", "api", uvicorn, secret)
        for i in range(self.workers):
            options = ["worker", "--concurrency", "1", "--without-gossip", "--without-mingle", "--hostname", f"w{i}@%h"]
            self._add(f"worker{i}", "worker", [*celery, *options], secret)
        self._add("beat", "beat", [*celery, "beat"], secret)

    def _add(self, name: str, kind: str, argv: list[str], secret: str) -> None:
        who = "api" if kind == "api" else "worker"
        ports = {what: self.links[f"{who}-{what}"].port for what in ("valkey", "postgres", "broker")}
        env = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TZ", "TMPDIR")}
        env |= SETTINGS | {
            "PYTHONPATH": str(schema.ROOT),
            "PYTHONUNBUFFERED": "1",
            "JWT_SECRET": secret,
            "DATABASE_URL": _through(self.postgres.url, ports["postgres"]),
            "REDIS_URL": _through(self.valkey.url, ports["valkey"]),
            "CELERY_BROKER_URL": _through(self.broker.url, ports["broker"]),
        }
        program = Program(name, kind, argv, env, self._claim, self.home / f"{name}.log")
        if self.crash_orders:
            program.env["CHATKEEP_CRASH_ORDERS"] = str(self.crash_orders)
        self.parts.append(program)

    # Keeping it alive

    async def _keep(self, part: Part) -> None:
        while True:
            await asyncio.sleep(0.05)
            if part.pid is not None or not part.wanted:
                continue
            part.deaths += 1
            self.event("died", part=part.name, code=getattr(part, "code", None))
            await asyncio.sleep(self.chance.uniform(0.0, 0.6))
            if part.pid is not None or not part.wanted:
                continue
            await self._start_again(part)

    async def _start_again(self, part: Part) -> None:
        """Tries for a while: what is being started may be killed as well."""
        deadline = time.monotonic() + READY_SECONDS
        while part.pid is None and part.wanted:
            try:
                await asyncio.to_thread(part.start)
            except ConfigurationError as exc:
                if time.monotonic() > deadline:
                    self.troubles.append(f"{part.name} cannot be started again: {exc}"[:2000])
                    return
                await asyncio.sleep(0.2)

    async def until_ready(self, seconds: float) -> str:
        """Waits until everything lives and every API process can acknowledge; says what does not, or ''."""
        deadline = time.monotonic() + seconds
        while True:
            dead = [part.name for part in self.parts if part.pid is None]
            answers = await asyncio.gather(*(ask(port, "/readyz") for port in self.api_ports))
            unready = [
                f"api{i}" for i, answer in enumerate(answers) if answer is None or answer.status != 200 or answer.json()["status"] != "ok"
            ]
            if not dead and not unready:
                return ""
            if time.monotonic() > deadline:
                return f"not running: {dead}, not ready: {unready}"
            await asyncio.sleep(0.1)

    async def until_drained(self, seconds: float) -> str:
        """Waits until nothing is pending; says what is left, or ''."""
        deadline = time.monotonic() + seconds
        while True:
            left = await asyncio.to_thread(self.pending)
            if left == 0:
                return ""
            if time.monotonic() > deadline:
                return "the log cannot be looked at" if left is None else f"{left} entries are pending"
            await asyncio.sleep(0.1)

    def pending(self) -> int | None:
        """Entries of the log; None if Valkey does not answer."""
        with contextlib.suppress(redis.RedisError), self.redis() as client:
            return sum(client.xlen(f"ck:{{s{shard:02d}}}:log") for shard in range(SHARDS))
        return None

    @contextlib.contextmanager
    def redis(self, server: EmbeddedValkey | None = None) -> Any:
        """A connection of the harness's own, past the links."""
        client = redis.Redis.from_url((server or self.valkey).url, socket_timeout=5, socket_connect_timeout=3)
        try:
            yield client
        finally:
            client.close()

    @contextlib.contextmanager
    def cursor(self) -> Any:
        """The same for Postgres; commits every statement."""
        connection = psycopg2.connect(self.postgres.url, connect_timeout=5, options="-c statement_timeout=60000")
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    # Hitting it

    def of(self, kind: str) -> list[Part]:
        """The parts of a kind."""
        return [part for part in self.parts if part.kind == kind]

    def store(self, name: str) -> Server:
        """One of the three servers."""
        return next(part for part in self.parts if isinstance(part, Server) and part.name == name)

    def kill(self, pids: Iterable[int], what: str) -> None:
        """SIGKILL; all of these count as one kill."""
        if sum(_send(pid, signal.SIGKILL) for pid in pids):
            self.kills[what] = self.kills.get(what, 0) + 1

    def freeze(self, pids: Iterable[int]) -> list[int]:
        """SIGSTOP; answers with those that it reached."""
        return [pid for pid in pids if _send(pid, signal.SIGSTOP)]

    def thaw(self, pids: Iterable[int]) -> None:
        """SIGCONT."""
        for pid in pids:
            _send(pid, signal.SIGCONT)

    def logs(self) -> list[Path]:
        """Everything that the processes and the servers have printed."""
        return [path for path in self.home.rglob("*.log*") if path.is_file()]


def clock_library() -> str | None:
    """libfaketime, where it is installed (or where CHATKEEP_FAKETIME says)."""
    given = os.environ.get("CHATKEEP_FAKETIME")
    found = [given] if given else [str(path) for pattern in LIBRARIES for path in Path("/usr").glob(pattern)]
    return found[0] if found and Path(found[0]).exists() else None


def _send(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _through(url: str, port: int) -> str:
    head, _, tail = url.rpartition("@127.0.0.1:")
    return f"{head}@127.0.0.1:{port}/{tail.partition('/')[2]}"
