"""Processes that never outlive their owner, and directories that never have two.

A directory that a server lives in (its data) or that a runner lives in (its children) is claimed:

| file | who holds it locked | says |
| --- | --- | --- |
| `owner.lock` | the one process that starts and stops things here; not inherited | a second owner is refused |
| `processes.lock` | every process started here, and what those fork: they inherit the descriptor | somebody still has the files open |
| `id` | nobody | a random name that stands in the command line of each of these processes, by which they are found again |

A lock goes with its holder, also by kill -9, so none is ever stale. When an owner is killed, the kernel kills its processes on Linux;
elsewhere, or if one is left, the next owner finds them by their marker and kills them, and goes on only when `processes.lock` is free:
two servers never open one data directory. They are killed rather than asked, because a frozen process answers no other signal, and
because losing nothing through it is what everything here promises anyway.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import psutil  # type: ignore[import-untyped]  # it ships no types

from worker.errors import ConfigurationError

LEFTOVER_SECONDS = 1.0
"""How long what a dead owner left behind may take to end by itself: the kernel kills it, or it sees that its parent is gone."""
KILLED_SECONDS = 15.0
"""How long killed processes may take to be gone: the kernel has to free their memory first."""

_PROGRAMS = ("postgres", "initdb", "valkey-server", "python")

# The death signal is lost when a process changes its user, so the user is changed first; and the parent may have died before the
# call, so it is looked at afterwards. `exec` keeps the setting. A small program rather than a `preexec_fn`, which may deadlock
# between fork and exec in a process with threads.
_TETHER = """
import ctypes, os, sys
PR_SET_PDEATHSIG, SIGKILL = 1, 9
parent, uid, gid = map(int, sys.argv[1:4])
if uid >= 0:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != parent:
    sys.exit("the process that started this one is gone")
os.execv(sys.argv[4], sys.argv[4:])
"""

# The kernel sends the signal when the parent *thread* ends, so every server is started from one thread that stays.
_SPAWNER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


class Identity(TypedDict, total=False):
    """Keywords of `subprocess` that change the user."""

    user: int
    group: int
    extra_groups: list[str | int]


class Claim:
    """Sole use of a directory, by one owner and by no process that an earlier owner left behind."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._owner: int | None = None

    @property
    def marker(self) -> str:
        """The name by which this directory's processes are known; made once."""
        return kept_secret(self._directory / "id", lambda: f"chatkeep-{secrets.token_hex(8)}")

    def take(self) -> None:
        """Become the owner and end what an earlier one left running; `ConfigurationError` while there is another owner."""
        if self._owner is None:
            self._owner = self._lock_as_owner()
        if not self._is_idle(within=LEFTOVER_SECONDS):
            self.kill_processes()

    def release(self) -> None:
        """Let the next owner in."""
        if self._owner is not None:
            os.close(self._owner)
            self._owner = None

    @contextlib.contextmanager
    def inherited(self) -> Iterator[int]:
        """A descriptor to hand to a process that is started here (`pass_fds`), which keeps the directory in use while it lives."""
        descriptor = _open_lock(self._directory / "processes.lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield descriptor
        finally:
            os.close(descriptor)

    def kill_processes(self) -> None:
        """Kill every process that was started here, and return when the last one is gone."""
        deadline = time.monotonic() + KILLED_SECONDS
        while True:
            for process in _marked(self.marker):
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself in this instant
                    process.kill()
            if self._is_idle(within=0.1):
                return
            if time.monotonic() > deadline:
                raise ConfigurationError(f"A process that uses {self._directory} does not end; its command line has '{self.marker}'.")

    def _is_idle(self, within: float) -> bool:
        deadline = time.monotonic() + within
        descriptor = _open_lock(self._directory / "processes.lock")
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        return False
                    time.sleep(0.02)
                else:
                    return True
        finally:
            os.close(descriptor)

    def _lock_as_owner(self) -> int:
        descriptor = _open_lock(self._directory / "owner.lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ConfigurationError(
                f"{self._directory} is in use by a running Chatkeep (process {owner}). "
                "Stop it first, or set CHATKEEP_HOME to another directory."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        return descriptor


def _tethered(argv: Sequence[str], user: pwd.struct_passwd | None) -> list[str]:
    """The command that runs `argv` as `user` and, on Linux, is killed when the thread that started it ends."""
    if sys.platform != "linux":
        return list(argv)
    uid, gid = (user.pw_uid, user.pw_gid) if user else (-1, -1)
    head = [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), str(uid), str(gid)]
    return [*head, *argv]


def spawn(
    argv: Sequence[str],
    *,
    claim: Claim,
    output: int,
    env: Mapping[str, str],
    directory: Path = Path("/"),
    user: pwd.struct_passwd | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, tethered to this process and holding the claim's lock."""
    as_user = as_other(None if sys.platform == "linux" else user)  # on Linux the tether changes the user

    def start(lock: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603  # no shell, and the command is ours
            _tethered(argv, user),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=directory,
            env=dict(env),
            pass_fds=(lock,),
            start_new_session=True,
            **as_user,
        )

    with claim.inherited() as lock:
        return _SPAWNER.submit(start, lock).result()


def as_other(user: pwd.struct_passwd | None) -> Identity:
    """What `subprocess` needs to run a short command as `user`."""
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def kept_secret(path: Path, make: Callable[[], str]) -> str:
    """What `path` says, made at the first call: whole or not at all, and for its owner's eyes only."""
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(make() + "\n")
            file.flush()
            os.fsync(descriptor)
        draft.replace(path)
        return path.read_text(encoding="ascii").strip()


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _marked(marker: str) -> list[psutil.Process]:
    """The running processes with this marker in their command line. PostgreSQL's keep it in their titles (`cluster_name`)."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command: list[str] = process.info["cmdline"] or []
        if process.pid != os.getpid() and any(marker in part for part in command) and _program(command).startswith(_PROGRAMS):
            found.append(process)
    return found


def _program(command: list[str]) -> str:
    return Path(command[0]).name.lower()
