"""`python -m api` as a person runs it: one command, everything up, everything back after a crash, nothing left at the end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import psycopg2
import pytest

from tests import schema
from worker.embedded import free_port
from worker.settings import Settings

START_SECONDS = 90.0
PASSWORD = "correct horse battery staple"

# As `python -m api`, but blind to a developer's `.env`.
LAUNCH = "import sys; from api import __main__ as runner; runner.RunnerSettings.model_config['env_file'] = None; sys.exit(runner.main())"

pytestmark = pytest.mark.timeout(300)


class Run:
    """One `make run`, and what it has printed."""

    def __init__(self, home: Path, *arguments: str, **environment: str) -> None:
        env = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
        env |= {"CHATKEEP_HOME": str(home), "PYTHONPATH": str(schema.ROOT)} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            env=env,
            cwd=schema.ROOT,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_until_ready(self) -> Run:
        until(lambda: any("Ctrl-C ends it" in line for line in self.lines) or not self.runs, START_SECONDS)
        assert self.runs, self.output
        return self

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self._reader.join(timeout=20)  # the pipe is open for as long as any process of the run lives
        assert not self._reader.is_alive()
        return code

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def url(self, label: str) -> str:
        found = re.search(rf"^  {label} +(http://127\.0\.0\.1:\d+/)", self.output, re.MULTILINE)
        assert found, self.output
        return found[1]

    def flower_login(self) -> tuple[str, str]:
        found = re.search(r"user (\S+), password (\S+)\)", self.output)
        assert found, self.output
        return found[1], found[2]

    def api(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url("Chat"), timeout=15)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
        self.process.stdout.close()


@pytest.fixture
def home() -> Iterator[Path]:
    """A state directory; whatever still runs in it is killed."""
    with schema.state_directory() as directory:
        yield Path(directory)
        for process in processes_of(Path(directory)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def launch(home: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run in the state directory, on ports that no other one uses."""
    runs: list[Run] = []
    ports = ("--port", str(free_port()), "--flower-port", str(free_port()))

    def start(*arguments: str, **environment: str) -> Run:
        runs.append(run := Run(home, *(arguments or ports), **environment))
        return run

    yield start
    for run in runs:
        if run.runs:
            run.end(signal.SIGKILL)


def test_one_command_brings_up_everything_and_sigterm_takes_it_down(home: Path, launch: Callable[..., Run]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = launch("--port", str(port), "--flower-port", str(free_port())).wait_until_ready()
    assert f"Port {port} is taken, so api listens on" in run.output
    assert str(port) not in run.url("Chat")

    with run.api() as api:
        assert api.get("/").status_code == 200
        assert api.get("/docs").status_code == 200
        assert api.get("/readyz").json()["status"] == "ok"
        conversation = talk(api, "ann@example.org", "hello")
        until(lambda: states(api, conversation) == {"committed"}, 30)

    assert httpx2.get(run.url("Flower"), timeout=15).status_code == 401
    assert httpx2.get(run.url("Flower"), timeout=15, auth=run.flower_login(), follow_redirects=True).status_code == 200

    listening = {c.laddr.ip for process in processes_of(home) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    secrets = [run.flower_login()[1], *(path.read_text().strip() for path in home.rglob("*") if path.name in ("password", "jwt.secret"))]
    commands = [" ".join(process.cmdline()) for process in (psutil.Process(run.process.pid), *processes_of(home))]
    assert not [secret for secret in secrets for command in commands if secret in command]
    for path in (*home.glob("*.secret"), *home.glob("*.password"), *home.glob("*/password")):
        assert path.stat().st_mode & 0o077 == 0

    second = launch()
    assert second.process.wait(timeout=30) == 1
    until(lambda: second.output != "", 5)
    assert f"is in use by a running Chatkeep (process {run.process.pid})" in second.output
    assert "Traceback" not in second.output

    assert run.end() == 0
    assert processes_of(home) == []
    assert "Traceback" not in run.output


def test_kill_9_of_any_process_and_of_all_loses_nothing(home: Path, launch: Callable[..., Run]) -> None:
    run = launch().wait_until_ready()
    login = run.flower_login()
    with run.api() as api:
        conversation = talk(api, "bob@example.org", "before")
        servers = (f"valkey-server {home}/valkey/", f"valkey-server {home}/broker/", "postgres -D")
        for victim in ("uvicorn", "worker.app worker", "worker.app beat", "worker.app flower", *servers):
            old = only(home, victim)
            old.kill()
            until(lambda victim=victim, old=old: only(home, victim) not in (None, old), 30)
        until(lambda: answer(api, "/readyz") == 200, 30)
        say(api, conversation, "between")
        until(lambda: states(api, conversation) == {"committed"}, 60)
        say(api, conversation, "pending, perhaps")
        token = api.headers["Authorization"]
    everything = [psutil.Process(run.process.pid), *processes_of(home)]
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):  # a child of one that was killed before it
            process.kill()
    run.process.wait(timeout=10)

    again = launch().wait_until_ready()
    assert again.flower_login() == login
    with again.api() as api:
        api.headers["Authorization"] = token  # the same secret signs
        until(lambda: states(api, conversation) == {"committed"}, 60)
        assert contents(api, conversation) == ["before", "between", "pending, perhaps"]
    assert again.end(signal.SIGINT) == 0
    assert processes_of(home) == []


def test_given_servers_are_used_and_none_is_started(home: Path, launch: Callable[..., Run], database_url: str, redis_url: str) -> None:
    secret = "0123456789-abcdefghijklmnopqrstuvwxyz"
    run = launch(DATABASE_URL=database_url, REDIS_URL=redis_url, JWT_SECRET=secret, FLOWER_BASIC_AUTH="me:mine").wait_until_ready()
    assert {path.name for path in home.iterdir()} == {"id", "owner.lock", "processes.lock"}
    assert "as in FLOWER_BASIC_AUTH" in run.output
    assert httpx2.get(run.url("Flower"), timeout=15, auth=("me", "mine"), follow_redirects=True).status_code == 200
    with run.api() as api:
        talk(api, "eve@example.org", "hello")
    with contextlib.closing(psycopg2.connect(database_url, connect_timeout=5)) as connection, connection.cursor() as cursor:
        cursor.execute('SELECT email FROM "user"')
        assert cursor.fetchall() == [("eve@example.org",)]
    assert run.end() == 0


def test_migration_that_fails_is_a_message(launch: Callable[..., Run], redis_url: str) -> None:
    run = launch(DATABASE_URL="mysql://someone:secret-word@127.0.0.1/chatkeep", REDIS_URL=redis_url)
    assert run.process.wait(timeout=60) == 1
    until(lambda: "could not be brought up to date" in run.output, 5)
    assert "must begin with postgresql://" in run.output
    assert "Traceback" not in run.output
    assert "secret-word" not in run.output


def test_ctrl_c_during_the_start_leaves_nothing(home: Path, launch: Callable[..., Run]) -> None:
    run = launch()
    until((home / "postgres" / "location").exists, 30)
    assert run.end(signal.SIGINT) == 0
    assert processes_of(home) == []


def talk(api: httpx2.Client, email: str, content: str) -> int:
    """Sign up, log in, say something in a new conversation; its id."""
    api.post("/api/auth/register", json={"email": email, "password": PASSWORD}).raise_for_status()
    token = api.post("/api/auth/token", data={"username": email, "password": PASSWORD}).raise_for_status().json()
    api.headers["Authorization"] = f"Bearer {token['access_token']}"
    conversation = int(api.post("/api/conversations/", json={}).raise_for_status().json()["id"])
    say(api, conversation, content)
    return conversation


def say(api: httpx2.Client, conversation: int, content: str) -> None:
    api.post(f"/api/conversations/{conversation}/messages", json={"role": "user", "content": content}).raise_for_status()


def contents(api: httpx2.Client, conversation: int) -> list[str]:
    return [message["content"] for message in messages(api, conversation)]


def states(api: httpx2.Client, conversation: int) -> set[str]:
    return {message["state"] for message in messages(api, conversation)}


def messages(api: httpx2.Client, conversation: int) -> list[dict[str, str]]:
    items: list[dict[str, str]] = api.get(f"/api/conversations/{conversation}/messages").raise_for_status().json()["items"]
    return items


def answer(api: httpx2.Client, path: str) -> int:
    try:
        return api.get(path).status_code
    except httpx2.HTTPError:
        return 0


def processes_of(home: Path) -> list[psutil.Process]:
    """What runs for this state directory, the runner itself excepted."""
    markers = {path.read_text().strip() for path in (*home.glob("id"), *home.glob("*/id"))}
    running = [process for process in psutil.process_iter(["cmdline", "status"]) if process.info["status"] != psutil.STATUS_ZOMBIE]
    return [process for process in running if any(marker in " ".join(process.info["cmdline"] or []) for marker in markers)]


def only(home: Path, program: str) -> psutil.Process | None:
    """The one whose parent is not such a process itself (a worker's pool has the same command line)."""
    found = [process for process in processes_of(home) if program in " ".join(process.info["cmdline"])]
    pids = {process.pid for process in found}
    with contextlib.suppress(psutil.NoSuchProcess):
        found = [process for process in found if process.ppid() not in pids]
    return found[0] if found else None


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
