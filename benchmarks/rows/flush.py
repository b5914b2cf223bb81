"""Rows 10–13 and 15: how fast a backlog gets into PostgreSQL, what it costs, and how long one message waits."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass

from benchmarks import machine
from benchmarks.figures import Figure, at_least, at_most, median, ratios
from benchmarks.load import Load, percentile
from benchmarks.stand import Stand

MANY = 16
IDLE_RATE = 20.0
BUSY_SHARE = 0.7
_COLUMNS = "conversation_id, id, user_id, role, content, created_at, status, idempotency_key"


@dataclass(frozen=True, slots=True)
class Flushed:
    """One backlog that was flushed."""

    rate: float
    worker_us: float
    postgres_us: float


def flush(stand: Stand) -> list[Figure]:
    """10, 11, 15: a backlog, and one worker as it is started, with a child for each core; rows a second against COPY of the same rows. Then
    a worker with one child, and two such workers."""
    ours, copied, double, usual = [], [], [], []
    for _ in range(stand.plan.few_rounds):
        usual.append(flush_backlog(stand, stand.plan.backlog, []))
        since = stand.chatkeep.now()
        with stand.chatkeep.workers("one") as pids:
            ours.append(flush_backlog(stand, stand.plan.backlog, pids))
            copied.append(copy(stand, since))
        with stand.chatkeep.workers("one", "two") as pids:
            double.append(flush_backlog(stand, stand.plan.small_backlog, pids))
    rows = [one.rate for one in ours]
    raw = {
        "Chatkeep, rows/s": median(rows),
        "COPY, rows/s": median(copied),
        "PostgreSQL, µs a row": median([one.postgres_us for one in ours]),
    }
    two = [one.rate for one in double]
    bar = at_least(0.6, 0.75)
    return [
        Figure(
            "10",
            "flush, one worker as it is started: rows a second against COPY",
            "×",
            ratios([one.rate for one in usual], copied),
            bar,
            {"Chatkeep, rows/s": median([one.rate for one in usual])},
        ),
        Figure("10", "flush, one worker with a single child: rows a second against COPY", "×", ratios(rows, copied), bar, raw),
        Figure("11", "worker's own CPU for a message", "µs", tuple(one.worker_us for one in ours), at_most(15, 8)),
        Figure("15", "flush, 2 workers with one child each against 1", "×", ratios(two, rows), None, {"2 workers, rows/s": median(two)}),
    ]


def flush_backlog(stand: Stand, count: int, workers: list[int]) -> Flushed:
    """Builds a backlog while flushes are held, then has it flushed."""
    stand.chatkeep.drain()
    stand.chatkeep.fill(count)
    stand.checkpoint()

    def once() -> Flushed:
        worker, postgres, started = machine.cpu_seconds(workers), stand.postgres_cpu(), time.perf_counter()
        stand.chatkeep.release()
        stand.chatkeep.drain()
        seconds = time.perf_counter() - started
        worker, postgres = machine.cpu_seconds(workers) - worker, stand.postgres_cpu() - postgres
        return Flushed(count / seconds, worker * 1e6 / count, postgres * 1e6 / count)

    return stand.quietly(once, attempts=1)


def copy(stand: Stand, since: int) -> float:
    """Rows a second of one COPY of what was committed since, into a copy of the table with the same indexes, keys and parents."""
    text = io.BytesIO()
    with stand.connection() as connection, connection.cursor() as cursor:
        first = stand.chatkeep.first_id(since)
        cursor.copy_expert(f"COPY (SELECT {_COLUMNS} FROM message WHERE id >= {first}) TO STDOUT", text)
        parents = io.BytesIO()
        cursor.copy_expert("COPY conversation TO STDOUT", parents)
    with stand.connection("copied") as connection, connection.cursor() as cursor:
        cursor.execute("TRUNCATE message, conversation")
        parents.seek(0)
        cursor.copy_expert("COPY conversation FROM STDIN", parents)
        stand.checkpoint()

        def once() -> float:
            cursor.execute("TRUNCATE message")
            text.seek(0)
            started = time.perf_counter()
            cursor.copy_expert(f"COPY message ({_COLUMNS}) FROM STDIN", text)
            return float(cursor.rowcount / (time.perf_counter() - started))

        return stand.quietly(once)


def lag(stand: Stand) -> list[Figure]:
    """12: from acknowledgement to commit, at 20 messages a second and at 70 % of what 16 connections can send."""
    idle = lags_at(stand, IDLE_RATE, stand.plan.lag_seconds, connections=4)
    highest = stand.append(stand.chatkeep.system, MANY, stand.plan.seconds).served.rate
    busy = lags_at(stand, BUSY_SHARE * highest, stand.plan.lag_seconds, connections=MANY)
    raw = {"idle p50, ms": percentile(idle, 0.5)}
    more = {"busy p50, ms": percentile(busy, 0.5), "at, /s": BUSY_SHARE * highest, "messages": len(busy)}
    return [
        Figure("12", "lag, acknowledgement to commit, idle: p99", "ms", (percentile(idle, 0.99),), at_most(250, 120), raw),
        Figure("12", "lag, acknowledgement to commit, at 70 %: p99", "ms", (percentile(busy, 0.99),), at_most(1000, 400), more),
    ]


def lags_at(stand: Stand, rate: float, seconds: float, connections: int) -> list[float]:
    """The lag of every message that was appended at this rate."""
    system = stand.chatkeep.system

    def once() -> list[float]:
        since = stand.chatkeep.now()
        stand.run_load(Load(system.ports, stand.appends(system), connections, seconds, 201, 0.0, rate))
        stand.chatkeep.drain()
        return stand.chatkeep.lags(since)

    return stand.quietly(once)


def memory(stand: Stand) -> list[Figure]:
    """13: what Redis needs for one pending message of 200 characters: in the log and in its conversation, with all that hangs on both."""
    chatkeep = stand.chatkeep
    chatkeep.drain()
    before = chatkeep.used_memory()
    chatkeep.fill(stand.plan.held)
    used = (chatkeep.used_memory() - before) / stand.plan.held
    chatkeep.release()
    chatkeep.drain()
    return [Figure("13", "Redis memory for a pending message of 200 bytes", "B", (used,), at_most(900, 500))]


def two_apis(stand: Stand) -> list[Figure]:
    """15: 16 connections spread over two API processes, against all of them at one."""
    system = stand.chatkeep.system
    first = system.ports
    stand.chatkeep.begin_api("api-two")()
    single, double = [], []
    try:
        for _ in range(stand.plan.few_rounds):
            single.append(stand.append(system, MANY, stand.plan.seconds).served.rate)
            system.ports = (*first, stand.chatkeep.ports["api-two"])
            double.append(stand.append(system, MANY, stand.plan.seconds).served.rate)
            system.ports = first
    finally:
        system.ports = first
        stand.chatkeep.stop_process("api-two")
    raw = {"1 API, /s": median(single), "2 APIs, /s": median(double)}
    return [Figure("15", "append, 2 API processes against 1", "×", ratios(double, single), None, raw)]


def shards_apart(stand: Stand) -> list[Figure]:
    """15: one worker with one child; the lag of the other shards' messages while one shard has a backlog."""
    chatkeep = stand.chatkeep
    with chatkeep.workers("one"):
        busy, *quiet = chatkeep.shards
        chatkeep.fill(stand.plan.small_backlog, [busy])
        for shard in quiet:  # only the full one waits for its release
            chatkeep.unhold(shard)
        requests = stand.appends(chatkeep.system, whose=lambda user: chatkeep.shard_of(user) != busy)
        since = chatkeep.now()
        chatkeep.release([busy])
        stand.run_load(Load(chatkeep.system.ports, requests, 4, max(1.0, stand.plan.lag_seconds / 4), 201, 0.0, IDLE_RATE))
        chatkeep.drain()
        lags = chatkeep.lags(since)
    raw = {"p50, ms": percentile(lags, 0.5)}
    what = f"lag of quiet shards while one shard has a backlog of {stand.plan.small_backlog:,}, one worker process: p99"
    return [Figure("15", what, "ms", (percentile(lags, 0.99),), at_most(1000), raw)]
