"""What the nemesis does to a cluster. Each fault is a function that breaks something, waits, and mends it again.

A fault gets the run (`nemesis.Run`) and how long it may last; whatever it breaks it mends before it returns, also when it is cancelled.
`NEEDS` says what a fault cannot do without; on a machine that has not got it the fault is left out, and the report says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import psycopg2
import redis

from tests.crash.cluster import SHARDS, Part, Program, Server, TracedValkey, clock_library
from worker import keys
from worker.codec import message_body
from worker.errors import ConfigurationError
from worker.redis import REFRESH_SECONDS

if TYPE_CHECKING:
    from tests.crash.nemesis import Run

Fault = Callable[["Run", float], Awaitable[None]]
FAULTS: dict[str, Fault] = {}
NEEDS: dict[str, str] = {}
"""Fault: 'strace' or 'libfaketime'."""


def fault(name: str, needs: str = "") -> Callable[[Fault], Fault]:
    """Registers a fault."""

    def register(function: Fault) -> Fault:
        FAULTS[name] = function
        if needs:
            NEEDS[name] = needs
        return function

    return register


def available() -> tuple[list[str], dict[str, str]]:
    """The faults that this machine can do, and those that it cannot with what they lack."""
    lacks = {"strace": not can_trace(), "libfaketime": clock_library() is None}
    missing = {name: need for name, need in NEEDS.items() if lacks[need]}
    return [name for name in FAULTS if name not in missing], missing


def can_trace() -> bool:
    """Whether strace is there and may trace its own child."""
    strace = shutil.which("strace")
    if strace is None:
        return False
    return subprocess.run([strace, "-qq", "-e", "trace=none", "true"], capture_output=True, timeout=20, check=False).returncode == 0


# Killed


def _killer(kind: str, which: str) -> Fault:
    async def kill(run: Run, seconds: float) -> None:
        part = run.chance.choice(run.cluster.of(kind))
        if which == "first":
            run.cluster.kill([pid] if (pid := _first(part)) else [], part.kind)
        else:
            run.cluster.kill(part.children()[:1], f"{part.kind} child")
        await asyncio.sleep(min(seconds, 1.0))

    return kill


for _kind in ("api", "worker", "beat", "valkey", "broker"):
    fault(f"kill-{_kind}")(_killer(_kind, "first"))
fault("kill-worker-child")(_killer("worker", "child"))


@fault("kill-postgres")
async def _kill_postgres(run: Run, seconds: float) -> None:
    """An immediate stop, then a while without it; it recovers when it is started again."""
    part = run.cluster.of("postgres")[0]
    part.wanted = False
    try:
        pids = part.pids()
        if run.chance.random() < 0.7:
            run.cluster.kill(pids, "postgres")
        elif pids:
            os.kill(pids[0], signal.SIGQUIT)  # "immediate": no checkpoint, recovery at the next start; not counted as a kill
        await asyncio.sleep(seconds * run.chance.random())
    finally:
        part.wanted = True


@fault("kill-backend")
async def _kill_backend(run: Run, seconds: float) -> None:
    """One backend is killed, so all of Postgres starts again."""
    part = run.cluster.of("postgres")[0]
    backends = [pid for pid in part.children() if " chatkeep 127.0.0.1" in _title(pid)]
    if backends:
        run.cluster.kill([run.chance.choice(backends)], "postgres backend")
    await asyncio.sleep(min(seconds, 1.5))


@fault("end-backends")
async def _end_backends(run: Run, seconds: float) -> None:
    """`pg_terminate_backend` for each connection, one by one."""
    for pid in await asyncio.to_thread(_backends, run):
        await asyncio.to_thread(_terminate, run, pid)
        await asyncio.sleep(min(0.2, seconds / 10))


STORM: tuple[tuple[str, float, int], ...] = (
    ("worker child", 0.7, 45),
    ("valkey", 0.5, 25),
    ("postgres backend", 1.0, 10),
    ("broker", 0.5, 4),
    ("api", 4.0, 6),
    ("worker", 6.0, 5),
    ("beat", 6.0, 2),
    ("postgres", 3.0, 3),
)
"""What a storm kills, how old it has to be by then (so that it had recovered and was at work), and how often it is chosen."""
STORM_SECONDS = 15.0


@fault("kill-storm")
async def _kill_storm(run: Run, seconds: float) -> None:
    """One process after another, of every kind; the cheap ones more often."""
    until = time.monotonic() + STORM_SECONDS
    kinds, ages, weights = zip(*STORM, strict=True)
    while time.monotonic() < until:
        kind = run.chance.choices(kinds, weights)[0]
        victims = [pids for pids in _victims(run, kind) if _age(pids[0]) > ages[kinds.index(kind)]]
        if victims:
            run.cluster.kill(run.chance.choice(victims), kind)
        await asyncio.sleep(run.chance.uniform(0.02, 0.25))


def _victims(run: Run, kind: str) -> list[list[int]]:
    """The processes of a kind that are there; each as the pids that die together."""
    if kind == "worker child":
        return [[pid] for part in run.cluster.of("worker") for pid in part.children()]
    if kind == "postgres backend":
        return [[pid] for pid in run.cluster.of("postgres")[0].children() if " chatkeep 127.0.0.1" in _title(pid)]
    found = [part.pids() for part in run.cluster.of(kind)]
    return [pids if kind == "postgres" else pids[:1] for pids in found if pids]


def _age(pid: int) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        return time.time() - psutil.Process(pid).create_time()
    return 0.0


# Frozen


def _freezer(kind: str) -> Fault:
    async def freeze(run: Run, seconds: float) -> None:
        part = run.chance.choice(run.cluster.of(kind))
        part.stopped = True
        stopped = run.cluster.freeze(part.pids())
        try:
            await asyncio.sleep(seconds)
        finally:
            run.cluster.thaw(stopped)
            part.stopped = False

    return freeze


for _kind in ("api", "worker", "beat", "valkey", "broker", "postgres"):
    fault(f"freeze-{_kind}")(_freezer(_kind))


@fault("freeze-worker-child")
async def _freeze_child(run: Run, seconds: float) -> None:
    """The child that flushes stands still, with whatever it holds; its main process does not."""
    children = [pid for part in run.cluster.of("worker") for pid in part.children()]
    stopped = run.cluster.freeze([run.chance.choice(children)] if children else [])
    try:
        await asyncio.sleep(seconds)
    finally:
        run.cluster.thaw(stopped)


@fault("freeze-backend")
async def _freeze_backend(run: Run, seconds: float) -> None:
    """One backend of Postgres stands still, perhaps with a shard's lock."""
    backends = [pid for pid in run.cluster.of("postgres")[0].children() if " chatkeep 127.0.0.1" in _title(pid)]
    stopped = run.cluster.freeze([run.chance.choice(backends)] if backends else [])
    try:
        await asyncio.sleep(seconds)
    finally:
        run.cluster.thaw(stopped)


# Links


def _link_fault(link: str, mode: str) -> Fault:
    async def cut(run: Run, seconds: float) -> None:
        chosen = run.cluster.links[link]
        chosen.loss = run.chance.uniform(0.02, 0.4)
        chosen.delay = run.chance.uniform(0.05, 1.0)
        await chosen.set(mode)
        try:
            await asyncio.sleep(seconds)
        finally:
            await chosen.set("pass")

    return cut


LINKS = tuple(f"{who}-{what}" for who in ("api", "worker") for what in ("valkey", "postgres", "broker"))
LINK_FAULTS = (
    *("refuse", "reset", "silent", "silent-requests", "silent-replies", "lose-requests", "lose-replies", "slow", "slice", "flap"),
)
for _link in LINKS:
    for _mode in LINK_FAULTS:
        fault(f"{_link}:{_mode}")(_link_fault(_link, _mode))


# Valkey's disk


@fault("valkey-fsync-kill", needs="strace")
async def _fsync_kill(run: Run, seconds: float) -> None:
    """Valkey is killed at its n-th fsync: between what it has written and what it may acknowledge."""
    await _power_loss(run, seconds, at_fsync=True)


@fault("valkey-power-loss", needs="strace")
async def _power(run: Run, seconds: float) -> None:
    """The machine loses its power: what was not fsynced may be gone, in part or altogether."""
    await _power_loss(run, seconds, at_fsync=run.chance.random() < 0.5)


async def _power_loss(run: Run, seconds: float, *, at_fsync: bool) -> None:
    part, valkey = run.cluster.store("valkey"), run.cluster.valkey
    log = run.cluster.home / "strace.out"
    path = valkey.append_only_file
    options = ["-e", "trace=write,fdatasync,fsync", "-P", str(path), "-o", str(log)]
    if at_fsync:
        options += ["-e", f"inject=fdatasync,fsync:signal=SIGKILL:when={run.chance.randint(1, 60)}"]
    async with _traced(run, part, valkey, tuple(options)):
        until = time.monotonic() + min(max(seconds, 1.0), 4.0)
        while time.monotonic() < until and part.pid is not None:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(_kill_now, run, part)
        cut = _unsynced(log) if path == valkey.append_only_file else 0
        if cut:
            size = path.stat().st_size
            keep = size - run.chance.choice((cut, run.chance.randint(0, cut)))
            os.truncate(path, keep)
        run.history.event("power loss", unsynced=cut)


@fault("valkey-disk-full", needs="strace")
async def _disk_full(run: Run, seconds: float) -> None:
    """The append-only file cannot grow: Valkey ends itself, and again when it is started."""
    part, valkey = run.cluster.store("valkey"), run.cluster.valkey
    path = valkey.append_only_file
    injected = f"inject=write:error=ENOSPC:when={run.chance.randint(1, 200)}+"
    log = run.cluster.home / "strace.out"
    async with _traced(run, part, valkey, ("-e", "trace=write", "-P", str(path), "-e", injected, "-o", str(log))):
        await asyncio.sleep(seconds)


@contextlib.asynccontextmanager
async def _traced(run: Run, part: Server, valkey: TracedValkey, options: tuple[str, ...]) -> AsyncIterator[None]:
    """Valkey killed and started again under strace; at the end killed, and started without."""
    part.wanted = False
    try:
        await asyncio.to_thread(_kill_now, run, part)
        valkey.tracing = options
        try:
            with contextlib.suppress(ConfigurationError):  # what is injected may strike before it is ready: also a way to die
                await asyncio.to_thread(part.start)
            yield
        finally:
            await asyncio.to_thread(_kill_now, run, part)
            valkey.tracing = ()
    finally:
        part.wanted = True


def _kill_now(run: Run, part: Server) -> None:
    """Kills the server itself first: strace, killed before it, would let go of it."""
    run.cluster.kill(part.pids()[:1], "valkey")
    part.end()


def _unsynced(log: Path) -> int:
    """How many bytes strace saw written after the last fsync that came to its end."""
    pending: dict[str, str] = {}
    size = 0
    with log.open(errors="replace") as file:
        for line in file:
            found = re.match(r"(\d+)\s+(?:<\.\.\. )?(write|fdatasync|fsync)(.*)$", line)
            if not found:
                continue
            pid, call, rest = found.groups()
            answer = re.search(r"= (-?\d+)", rest)
            if "<unfinished" in rest or answer is None:
                pending[pid] = call
            elif call == "write":
                size += max(0, int(answer[1]))
            elif int(answer[1]) == 0:
                size = 0
    return size


@fault("valkey-not-durable")
async def _not_durable(run: Run, seconds: float) -> None:
    """Somebody turns off what the promise rests on: nothing may be acknowledged once it is noticed."""
    setting, wrong, right = run.chance.choice(
        [("appendfsync", "everysec", "always"), ("appendonly", "no", "yes"), ("maxmemory-policy", "allkeys-lru", "noeviction")]
    )
    if not await asyncio.to_thread(_configure, run, setting, wrong):
        return
    noticed = time.monotonic() + REFRESH_SECONDS + 2.0
    try:
        await asyncio.sleep(max(seconds, REFRESH_SECONDS + 3.5))
    finally:
        run.dishonest.append((noticed, time.monotonic()))
        while not await asyncio.to_thread(_configure, run, setting, right):
            await asyncio.sleep(0.1)
        await _rewritten(run)


async def _rewritten(run: Run) -> None:
    """An append-only file that was turned on again is whole when its first rewrite has ended."""
    for _ in range(200):
        with contextlib.suppress(redis.RedisError), run.cluster.redis() as client:
            told = await asyncio.to_thread(client.info, "persistence")
            if not told["aof_rewrite_in_progress"] and not told["aof_rewrite_scheduled"]:
                return
        await asyncio.sleep(0.1)


@fault("valkey-memory-full")
async def _memory_full(run: Run, seconds: float) -> None:
    """Memory at its limit: writes are refused, reads and flushes go on."""
    with contextlib.suppress(redis.RedisError), run.cluster.redis() as client:
        used = (await asyncio.to_thread(client.info, "memory"))["used_memory"]
        await asyncio.to_thread(client.config_set, "maxmemory", used + run.chance.choice([0, 100_000, 1_000_000]))
    try:
        await asyncio.sleep(seconds)
    finally:
        while not await asyncio.to_thread(_configure, run, "maxmemory", "0"):
            await asyncio.sleep(0.1)


@fault("valkey-rewrite")
async def _rewrite(run: Run, seconds: float) -> None:
    """The append-only file is rewritten, and Valkey perhaps killed meanwhile."""
    with contextlib.suppress(redis.RedisError), run.cluster.redis() as client:
        await asyncio.to_thread(client.bgrewriteaof)
    await asyncio.sleep(run.chance.uniform(0, min(seconds, 1.0)))
    if run.chance.random() < 0.5:
        run.cluster.kill(run.cluster.of("valkey")[0].pids(), "valkey")


@fault("scripts-forgotten")
async def _script_flush(run: Run, seconds: float) -> None:
    """Valkey forgets its scripts."""
    with contextlib.suppress(redis.RedisError), run.cluster.redis() as client:
        await asyncio.to_thread(client.script_flush)


# What is in the stores


@fault("broker-emptied")
async def _empty_broker(run: Run, seconds: float) -> None:
    """Every Celery message is gone."""
    with contextlib.suppress(redis.RedisError), run.cluster.redis(run.cluster.broker) as client:
        await asyncio.to_thread(client.flushall)


_EMPTY_IF_DRAINED = """
for i = 1, #KEYS do if redis.call('XLEN', KEYS[i]) > 0 then return 0 end end
redis.call('FLUSHALL')
return 1
"""


@fault("cache-emptied")
async def _empty_cache(run: Run, seconds: float) -> None:
    """Valkey loses everything, once nothing is pending."""
    async with run.workload.paused():
        for _ in range(100):
            with contextlib.suppress(redis.RedisError), run.cluster.redis() as client:
                logs = [keys.log(shard) for shard in range(SHARDS)]
                if await asyncio.to_thread(client.eval, _EMPTY_IF_DRAINED, len(logs), *logs):
                    run.history.event("cache emptied")
                    return
            await asyncio.sleep(0.1)


@fault("poison")
async def _poison(run: Run, seconds: float) -> None:
    """Entries that no append wrote, put straight into the log."""
    for _ in range(run.chance.randint(1, 3)):
        with contextlib.suppress(redis.RedisError), run.cluster.redis() as client:
            await asyncio.to_thread(_plant, run, client)


def _plant(run: Run, client: redis.Redis) -> None:
    chance = run.chance
    shard = keys.shard_of_user(chance.choice(run.workload.people).id, SHARDS)
    nobodys = message_body(chance.randrange(1 << 40) * 64 + shard, 1 << 40, "user", "poison", "complete")
    body = chance.choice([b"", b"{", b"\xff\xfe", b'{"conversation_id": "x"}', nobodys, b"[" * 50_000])
    fields = {"k": chance.choice(["m", "c", "r", "d", "?"]), "u": "1", "t": str(int(time.time() * 1e6)), "b": body, "x": "", "a": ""}
    for name in chance.sample(sorted(fields), chance.choice([0, 0, 1, 3])):
        del fields[name]
    fields = fields or {"?": ""}
    with contextlib.suppress(redis.ResponseError):  # somebody appended a higher id in between
        now = time.time()
        number = keys.first_id_at(int(now * 1e6) + chance.choice([0, 20_000]), shard)
        entry = client.xadd(keys.log(shard), fields, id=f"{number}-0")  # type: ignore[arg-type]
        run.poison.add(entry.decode())


# Clocks


def _clock_fault(kind: str) -> Fault:
    async def shift(run: Run, seconds: float) -> None:
        part = run.chance.choice(run.cluster.of(kind))
        offset = run.chance.choice(("-3600s", "+3600s"))
        extra = {"LD_PRELOAD": clock_library() or "", "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "1"}
        _shift(part, extra)
        run.workload.clock_off_until = float("inf") if kind == "api" else run.workload.clock_off_until
        run.cluster.kill(part.pids()[:1], part.kind)
        try:
            await asyncio.sleep(max(seconds, 4.0))
        finally:
            _shift(part, {})
            run.cluster.kill(part.pids()[:1], part.kind)
            run.workload.clock_off_until = time.monotonic() + 1.0 if kind == "api" else run.workload.clock_off_until

    return shift


def _shift(part: Part, extra: dict[str, str]) -> None:
    if isinstance(part, Program):
        part.extra = extra
    elif isinstance(part, Server) and isinstance(part.server, TracedValkey):
        part.server.environment = extra


for _kind in ("api", "worker", "beat", "valkey"):
    fault(f"clock-{_kind}", needs="libfaketime")(_clock_fault(_kind))


# Helpers


def _first(part: Part) -> int | None:
    pids = part.pids()
    return pids[0] if pids else None


def _title(pid: int) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def _backends(run: Run) -> list[int]:
    with contextlib.suppress(psycopg2.Error), run.cluster.cursor() as cursor:
        cursor.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()")
        return [row[0] for row in cursor.fetchall()]
    return []


def _terminate(run: Run, pid: int) -> None:
    with contextlib.suppress(psycopg2.Error), run.cluster.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", (pid,))


def _configure(run: Run, name: str, value: str) -> bool:
    with contextlib.suppress(redis.RedisError), run.cluster.redis() as client:
        client.config_set(name, value)
        return True
    return False
