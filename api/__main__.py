"""`python -m api` (what `make run` calls): everything on this machine, on servers of its own, with no setting at all.

It starts PostgreSQL and two Valkeys, the second one for Celery (each only where `DATABASE_URL` or `REDIS_URL` is not set), migrates, then
runs a worker, beat, Flower and the API, until Ctrl-C or SIGTERM. What it keeps is in `CHATKEEP_HOME`, by default `.chatkeep` beside this
package:

    postgres/  valkey/     the servers and their data (`worker/embedded.py`)
    broker/                Celery's, without any
    jwt.secret             made at the first start where `JWT_SECRET` is not set
    flower.password        the same for `FLOWER_BASIC_AUTH`
    owner.lock  processes.lock  id     one runner at a time, and nothing left over from a dead one (`worker/processes.py`)
"""

from __future__ import annotations

import argparse
import asyncio
import http
import http.client
import io
import os
import secrets
import signal
import sys
import time
from pathlib import Path

from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from rich.markup import escape

from api.supervisor import Board, Program, Server, Supervisor
from worker.embedded import EmbeddedBroker, EmbeddedPostgres, EmbeddedValkey, make_private, port_is_free
from worker.errors import ConfigurationError
from worker.processes import Claim, kept_secret

ROOT = Path(__file__).resolve().parent.parent
MIGRATION_SECONDS = 600.0
READY_SECONDS = 60.0
API_PATIENCE_SECONDS = 15.0
"""More than uvicorn's own 10 s for open streams."""
WORKER_PATIENCE_SECONDS = 20.0
"""A running flush is let through; a killed one loses nothing, it is only done again."""
PATIENCE_SECONDS = 5.0


class RunnerSettings(BaseSettings):
    """What decides which servers are started; the processes read all other settings themselves."""

    model_config = SettingsConfigDict(env_file=ROOT / ".env", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    chatkeep_home: Path = ROOT / ".chatkeep"
    database_url: SecretStr | None = None
    redis_url: SecretStr | None = None
    celery_broker_url: SecretStr | None = None
    jwt_secret: SecretStr | None = None
    flower_basic_auth: SecretStr | None = None


class Runner:
    """One run, from the first server to the last."""

    def __init__(self, settings: RunnerSettings, *, port: int, flower_port: int) -> None:
        self._settings = settings
        self._home = (ROOT / settings.chatkeep_home.expanduser()).absolute()
        self._ports = {"api": port, "flower": flower_port}
        self._stop = asyncio.Event()
        self._board = Board(gone=self._stop.set)
        self._supervisor = Supervisor(self._board)
        self._claim = Claim(self._home)
        self._interrupted = 0
        self._postgres: EmbeddedPostgres | None = None

    async def run(self) -> None:
        """Start everything, wait to be told to stop, end everything."""
        make_private(self._home, passable=True)
        self._claim.take()
        try:
            self._listen_for_signals()
            running = asyncio.create_task(self._bring_up())
            told = asyncio.create_task(self._stop.wait())
            await asyncio.wait({running, told}, return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            if running.done():
                running.result()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        finally:
            self._board.show("[bold]Stopping[/bold] (Ctrl-C again: at once)")
            await self._supervisor.end()
            self._claim.release()

    async def _bring_up(self) -> None:
        env = os.environ | await self._start_servers()
        migration = self._program("migrate", "alembic", "upgrade", "head", env=env, patience=PATIENCE_SECONDS)
        await self._migrate(migration)
        await self._start_programs(env)
        await self._announce()
        await self._supervisor.failed()

    async def _start_servers(self) -> dict[str, str]:
        """Start the servers that are not given; answers with the environment of all other processes."""
        given, say = self._settings, self._board.say
        self._postgres = postgres = None if given.database_url else EmbeddedPostgres(self._home)
        valkey = None if given.redis_url else EmbeddedValkey(self._home)
        broker = None if given.redis_url or given.celery_broker_url else EmbeddedBroker(self._home)
        await self._supervisor.start(*(Server(server, say) for server in (postgres, valkey, broker) if server is not None))
        jwt_secret = _plain(given.jwt_secret) or kept_secret(self._home / "jwt.secret", lambda: secrets.token_urlsafe(48))
        env = {"JWT_SECRET": jwt_secret, "PYTHONUNBUFFERED": "1"}
        # Both, so that a DATABASE_URL_UNPOOLED from elsewhere never has the migrations run on another database.
        env |= {"DATABASE_URL": postgres.url, "DATABASE_URL_UNPOOLED": postgres.url} if postgres else {}
        env |= {"REDIS_URL": valkey.url} if valkey else {}
        env |= {"CELERY_BROKER_URL": broker.url} if broker else {}
        return env

    async def _migrate(self, migration: Program) -> None:
        try:
            await migration.start()
            code = await migration.exit_code(MIGRATION_SECONDS)
        finally:
            await migration.end()
        if code != 0:
            raise ConfigurationError("The database could not be brought up to date; the reason stands above.")

    async def _start_programs(self, env: dict[str, str]) -> None:
        for name in self._ports:
            self._ports[name] = self._free_port(name)
        celery = ("celery", "--quiet", "-A", "worker.app")
        worker = self._program(
            "worker", *celery, "worker", "--without-gossip", "--without-mingle", env=env, patience=WORKER_PATIENCE_SECONDS
        )
        beat = self._program("beat", *celery, "beat", env=env, patience=PATIENCE_SECONDS)
        flower = self._program(
            "flower",
            *(*celery, "flower", "--address=127.0.0.1", f"--port={self._ports['flower']}", "--read-only", "--logging=error"),
            env=env | {"FLOWER_BASIC_AUTH": self._flower_login()},
            patience=PATIENCE_SECONDS,
        )
        api = self._program(
            "api",
            *("uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(self._ports["api"])),
            *("--timeout-graceful-shutdown", "10", "--no-access-log"),
            env=env,
            patience=API_PATIENCE_SECONDS,
        )
        for part in (worker, beat, flower, api):
            await self._supervisor.start(part)

    async def _announce(self) -> None:
        api, flower = (f"http://127.0.0.1:{self._ports[name]}" for name in ("api", "flower"))
        answers = await asyncio.gather(_ready(self._ports["api"], "/readyz"), _ready(self._ports["flower"], "/healthcheck"))
        for name, answer in zip(("API", "Flower"), answers, strict=True):
            if answer is not None:
                self._board.show(f"[bold red]{name} is not ready after {READY_SECONDS:.0f} s:[/bold red] {escape(answer)}")
        user, _, password = self._flower_login().partition(":")
        login = (
            "as in FLOWER_BASIC_AUTH" if self._settings.flower_basic_auth else f"user [bold]{user}[/bold], password [bold]{password}[/bold]"
        )
        self._board.show(
            f"\n[bold green]Chatkeep is running.[/bold green]\n"
            f"  Chat      {api}/\n"
            f"  API docs  {api}/docs\n"
            f"  Flower    {flower}/  ({login})\n"
            f"  Data      {escape(self._where())}\n"
            f"Ctrl-C ends it; the next start finds everything again.\n"
        )

    def _where(self) -> str:
        if self._postgres is None or self._home.resolve() in self._postgres.data.parents:
            return str(self._home)
        return f"{self._home}, PostgreSQL's in {self._postgres.data}"

    def _program(self, name: str, *module: str, env: dict[str, str], patience: float) -> Program:
        # `-X` carries the marker by which a later run finds what this one may leave behind; Python itself ignores it.
        argv = [sys.executable, "-X", self._claim.marker, "-m", *module]
        return Program(name, argv, env=env, directory=ROOT, claim=self._claim, say=self._board.say, patience=patience)

    def _flower_login(self) -> str:
        given = _plain(self._settings.flower_basic_auth)
        return given or "chatkeep:" + kept_secret(self._home / "flower.password", lambda: secrets.token_urlsafe(18))

    def _free_port(self, name: str) -> int:
        wanted = self._ports[name]
        others = {port for other, port in self._ports.items() if other != name}
        for port in range(wanted, min(wanted + 100, 65_536)):
            if port not in others and port_is_free(port):
                if port != wanted:
                    self._board.show(f"Port {wanted} is taken, so {name} listens on [bold]{port}[/bold].")
                return port
        raise ConfigurationError(f"No port from {wanted} to {wanted + 99} is free for {name}.")

    def _listen_for_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._told_to_stop, number)

    def _told_to_stop(self, number: signal.Signals) -> None:
        # Only a second Ctrl-C is impatience: `make` passes a SIGTERM on to a process that may have had it already.
        self._interrupted += number == signal.SIGINT
        if self._stop.is_set() and self._interrupted > 1:
            self._supervisor.kill()
        self._stop.set()


async def _ready(port: int, path: str) -> str | None:
    """Ask until the answer is 200 (then None) or time is over (then the last answer)."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        status, text = await asyncio.to_thread(_ask, port, path)
        if status == http.HTTPStatus.OK:
            return None
        if time.monotonic() > deadline:
            return f"{status or 'no answer'}: {text}"
        await asyncio.sleep(0.1)


def _ask(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as exc:  # not there yet; `_ready` has the deadline
        return 0, str(exc)
    finally:
        connection.close()


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m api", description="Run all of Chatkeep on this machine.")
    parser.add_argument("--port", type=int, default=8000, help="for the API; the next free one is taken (default: 8000)")
    parser.add_argument("--flower-port", type=int, default=5555, help="for Flower; the next free one is taken (default: 5555)")
    given = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a log line that the terminal's encoding lacks is no reason to stop
    try:
        settings = RunnerSettings()

        async def run() -> None:
            await Runner(settings, port=given.port, flower_port=given.flower_port).run()

        asyncio.run(run())
    except ValidationError as exc:
        sys.exit("; ".join(f"{error['loc'][0]}: {error['msg']}" for error in exc.errors()))
    except (ConfigurationError, OSError) as exc:  # a directory that cannot be written, a disk that is full
        sys.exit(f"Chatkeep cannot run: {exc}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
