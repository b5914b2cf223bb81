"""Rows 6–9: how fast a history and a list are read, hot and cold, near and deep."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from benchmarks.figures import Figure, at_least, at_most, median, ratios
from benchmarks.load import Load, Probe, percentile, request
from benchmarks.planting import Planted, plant
from benchmarks.stand import Stand, rotated

MANY = 16
HOT = 32
HOT_MESSAGES = 60
PAGE = 50
COLD_RATE = 50.0
"""Cold reads a second: each is over, with what it leaves to be done behind it, before the next one begins."""
SQL = (
    "SELECT id, role, content, created_at, status FROM message WHERE user_id = %(user)s "
    "AND (conversation_id, id) < (%(conversation)s, 9223372036854775807) AND (conversation_id, id) > (%(conversation)s, 0) "
    "ORDER BY conversation_id DESC, id DESC LIMIT 50"
)


def history_hot(stand: Stand) -> list[Figure]:
    """6: the latest 50 messages of conversations that were just written to; throughput."""
    systems = [stand.yardsticks["in_memory"], stand.yardsticks["best_direct"], stand.chatkeep.system]
    reads = {}
    for system in systems:
        requests = stand.appends(system)[:HOT]
        stand.load(Load(system.ports, requests, MANY, 120.0, 201, count=len(requests) * HOT_MESSAGES))
        reads[system.name] = stand.histories(system.conversations[:HOT])
        with Probe(system.ports[0]) as probe:
            _expect(probe, reads[system.name][0], PAGE)
    stand.chatkeep.drain()
    rate: dict[str, list[float]] = {system.name: [] for system in systems}
    for round_ in range(stand.plan.few_rounds):
        for system in rotated(systems, round_):
            rate[system.name].append(stand.load(Load(system.ports, reads[system.name], MANY, stand.plan.seconds)).rate)
    raw = {f"{name}, /s": median(values) for name, values in rate.items()}
    return [
        Figure("6", "history, last 50, hot: throughput against dict", "×", ratios(rate["Chatkeep"], rate["dict"]), at_least(1.0, 1.5), raw),
        Figure("6", "history, last 50, hot: throughput against best direct", "×", ratios(rate["Chatkeep"], rate["best direct"])),
    ]


def history_cold(stand: Stand) -> list[Figure]:
    """7: conversations that Redis does not know; p50 over that of the SQL query alone, at the same pace."""
    planted = plant(stand, "chatkeep", user=1, conversations=stand.plan.reads, messages=60)
    ours, alone = [], []
    for _ in range(stand.plan.few_rounds):
        alone.append(sql_alone(stand, planted, "chatkeep"))
        ours.append(read_cold(stand, planted))
    raw = {"Chatkeep p50, ms": median(ours), "SQL p50, ms": median(alone)}
    over = tuple(our - sql for our, sql in zip(ours, alone, strict=True))
    return [Figure("7", "history, last 50, cold: p50 over SQL alone", "ms", over, at_most(1.5, 0.8), raw)]


def read_cold(stand: Stand, planted: Planted) -> float:
    """The p50 of the first page of conversations that nobody has read before, in milliseconds."""
    requests = stand.histories(planted.pairs)
    load = Load(stand.chatkeep.system.ports, requests, 1, 120.0, count=len(requests), rate=COLD_RATE)

    def once() -> float:
        time.sleep(0.3)  # what the last round has left to the background
        stand.chatkeep.forget(planted.pairs)
        return stand.run_load(load).p50

    return stand.quietly(once)


def sql_alone(stand: Stand, planted: Planted, database: str) -> float:
    """The p50 of the query, through psycopg2, with its rows fetched, in milliseconds."""
    times = []
    with stand.connection(database) as connection, connection.cursor() as cursor:
        for user, conversation in planted.pairs:
            time.sleep(1 / COLD_RATE)
            started = time.perf_counter()
            cursor.execute(SQL, {"user": user, "conversation": conversation})
            rows = cursor.fetchall()
            times.append((time.perf_counter() - started) * 1000)
            if len(rows) != PAGE:
                raise RuntimeError(f"{len(rows)} rows")
    return percentile(times, 0.5)


def history_deep(stand: Stand) -> list[Figure]:
    """8: the 1,000th page of 50 against the first, of a conversation that Redis does not know; and the first when it does."""
    planted = plant(stand, "chatkeep", user=2, conversations=1, messages=stand.plan.deep)
    [(user, conversation)] = planted.pairs
    path = f"/api/conversations/{conversation}/messages"
    depth = min(1000, stand.plan.deep // PAGE) - 1
    deep = request("GET", f"{path}?before={planted.message_ids[-depth * PAGE]}", stand.headers(user))
    first = request("GET", path, stand.headers(user))
    times: dict[str, list[float]] = {"first": [], "deep": [], "hot": []}

    def forget() -> None:
        _wait(lambda: stand.chatkeep.knows(user, conversation))  # the last read has it loaded behind itself
        stand.chatkeep.forget(planted.pairs)

    with Probe(stand.chatkeep.system.ports[0]) as probe:
        _expect(probe, first, PAGE)
        for _ in range(stand.plan.reads):
            for name, one in (("first", first), ("deep", deep)):
                forget()
                times[name].append(_expect(probe, one, PAGE))
        _wait(lambda: stand.chatkeep.knows(user, conversation))
        times["hot"] = [_expect(probe, first, PAGE) for _ in range(stand.plan.reads)]
    raw = {f"{name} page p50, ms": percentile(values, 0.5) for name, values in times.items()}
    thirds = [slice(i, None, 3) for i in range(3)]
    values = tuple(percentile(times["deep"][part], 0.5) / percentile(times["first"][part], 0.5) for part in thirds)
    return [Figure("8", "history: page 1,000 against page 1, of 100,000 messages", "×", values, at_most(1.2, 1.0), raw)]


def conversation_list(stand: Stand) -> list[Figure]:
    """9: a user's 10,000 conversations; last page of 20 against first. Hot: 20 of them have pending messages, to be merged in."""
    user = 3
    planted = plant(stand, "chatkeep", user=user, conversations=stand.plan.listed, messages=1)
    figures = []
    with Probe(stand.chatkeep.system.ports[0]) as probe:
        for state in ("cold", "hot"):
            if state == "hot":
                stand.chatkeep.hold(20_000)
                for _, conversation in planted.pairs[:20]:
                    path = f"/api/conversations/{conversation}/messages"
                    probe.ask("POST", path, 201, stand.headers(user), {"role": "user", "content": "hello"})
            first = request("GET", "/api/conversations/?limit=20", stand.headers(user))
            last = request("GET", f"/api/conversations/?limit=20&cursor={_last_cursor(stand, probe, user)}", stand.headers(user))
            times: dict[str, list[float]] = {"first": [], "last": []}
            for _ in range(stand.plan.reads):
                times["first"].append(_expect(probe, first, 20))
                times["last"].append(_expect(probe, last, 20))
            raw = {f"{name} page p50, ms": percentile(values, 0.5) for name, values in times.items()}
            thirds = [slice(i, None, 3) for i in range(3)]
            values = tuple(percentile(times["last"][part], 0.5) / percentile(times["first"][part], 0.5) for part in thirds)
            what = f"list of 10,000 conversations, {state}: last page against first"
            figures.append(Figure("9", what, "×", values, at_most(1.3), raw))
    stand.chatkeep.release()
    stand.chatkeep.drain()
    return figures


def _last_cursor(stand: Stand, probe: Probe, user: int) -> str:
    """The cursor of the last 20 of the list."""
    cursor = before = older = ""
    while True:
        page = probe.ask("GET", f"/api/conversations/?limit=20{cursor}", 200, stand.headers(user))
        if page["next_cursor"] is None:
            return before if len(page["items"]) == 20 else older
        older, before = before, page["next_cursor"]
        cursor = f"&cursor={before}"


def _expect(probe: Probe, data: bytes, items: int) -> float:
    """Milliseconds of a read that answers so many items."""
    status, body = probe.send(data)
    if status != 200 or len(json.loads(body)["items"]) != items:
        raise RuntimeError(f"{status} {body[:300]!r}")
    return probe.milliseconds


def _wait(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("what a read leaves to the background did not happen")
        time.sleep(0.002)
