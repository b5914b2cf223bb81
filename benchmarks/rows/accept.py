"""Rows 1–5: how fast a message is accepted, against what would be used instead."""

from __future__ import annotations

from collections import defaultdict

from benchmarks.chatkeep import System
from benchmarks.figures import Figure, at_least, at_most, median, ratios
from benchmarks.proxy import Proxy
from benchmarks.stand import Accepted, Stand, rotated

MANY = 16
FAR = "best direct, far"
Phases = dict[str, list[Accepted]]


def appends_many(stand: Stand) -> list[Figure]:
    """1, 3, 4, 4b: 16 connections; throughput, p99, and what PostgreSQL works for one message."""
    phases = _interleaved(stand, [*stand.yardsticks.values(), stand.chatkeep.system], MANY, stand.plan.seconds, stand.plan.rounds)
    rate = {name: [one.served.rate for one in phase] for name, phase in phases.items()}
    p99 = {name: [one.served.p99 for one in phase] for name, phase in phases.items()}
    cpu = {name: [one.postgres_us for one in phase] for name, phase in phases.items()}
    rates = {f"{name}, /s": median(values) for name, values in rate.items()}
    worst = {f"{name} p99, ms": median(values) for name, values in p99.items()}
    work = {f"{name}, µs": median(cpu[name]) for name in ("Chatkeep", "direct", "best direct")}

    def throughput(than: str) -> tuple[float, ...]:
        return ratios(rate["Chatkeep"], rate[than])

    def tail(than: str) -> tuple[float, ...]:
        return ratios(p99["Chatkeep"], p99[than])

    return [
        Figure("1", "append, 16 connections: throughput against dict", "×", throughput("dict"), at_least(1.5, 2.5), rates),
        Figure("3", "append, 16 connections: p99 against dict", "×", tail("dict"), at_most(1.7, 1.0), worst),
        Figure("4", "append against direct: throughput", "×", throughput("direct"), at_least(15, 30)),
        Figure("4", "append against direct: p99", "×", tail("direct"), at_most(0.15)),
        Figure("4b", "append against best direct: throughput", "×", throughput("best direct"), at_least(2.0, 3.5)),
        Figure("4b", "append against best direct: p99", "×", tail("best direct"), at_most(1.0, 0.6)),
        Figure(
            "4b",
            "PostgreSQL's CPU for a message, against best direct",
            "×",
            ratios(cpu["Chatkeep"], [max(one, 0.1) for one in cpu["best direct"]]),
            at_most(0.3, 0.15),
            work,
        ),
        Figure("4b", "append against bare, the emptiest API there is: throughput", "×", throughput("bare")),
    ]


def appends_one(stand: Stand) -> list[Figure]:
    """2: one connection; p50."""
    systems = [stand.yardsticks[name] for name in ("in_memory", "best_direct")] + [stand.chatkeep.system]
    phases = _interleaved(stand, systems, 1, stand.plan.short_seconds, stand.plan.rounds)
    p50 = {name: [one.served.p50 for one in phase] for name, phase in phases.items()}
    raw = {f"{name} p50, ms": median(values) for name, values in p50.items()}
    return [
        Figure("2", "append, 1 connection: p50 against dict", "×", ratios(p50["Chatkeep"], p50["dict"]), at_most(1.7, 1.3), raw),
        Figure("2", "append, 1 connection: p50 against best direct", "×", ratios(p50["Chatkeep"], p50["best direct"])),
    ]


def appends_far(stand: Stand) -> list[Figure]:
    """4c: the way to PostgreSQL takes 10 and 30 ms, there and back, for both; p50 at one connection."""
    figures = []
    with Proxy(stand.postgres.port) as proxy:
        far = {name: stand.url_of(name).replace(f":{stand.postgres.port}/", f":{proxy.port}/") for name in ("best", "chatkeep")}
        chatkeep, own = stand.chatkeep, {"DATABASE_URL": far["chatkeep"]}
        waits = [stand.start_yardstick(FAR, far["best"], module="best_direct"), chatkeep.begin_api("api-far", own)]
        with chatkeep.workers("worker-far", own=own):
            for wait in waits:
                wait()
            systems = [stand.yardsticks[FAR], System("Chatkeep", (chatkeep.ports["api-far"],), chatkeep.system.conversations)]
            for milliseconds, bar in ((10, 0.1), (30, 0.04)):
                proxy.delay_seconds = milliseconds / 2000
                phases = _interleaved(stand, systems, 1, stand.plan.short_seconds, stand.plan.few_rounds)
                p50 = {name: [one.served.p50 for one in phase] for name, phase in phases.items()}
                raw = {f"{name} p50, ms": median(values) for name, values in p50.items()}
                what = f"append, PostgreSQL {milliseconds} ms away: p50 against best direct"
                figures.append(Figure("4c", what, "×", ratios(p50["Chatkeep"], p50[FAR]), at_most(bar), raw))
            chatkeep.drain()
        for name in (FAR, "api-far", "worker-far"):
            chatkeep.stop_process(name)
        del stand.yardsticks[FAR]
    return figures


def appends_frozen(stand: Stand) -> list[Figure]:
    """5: every process of PostgreSQL is stopped (SIGSTOP); p99 against the same a moment before."""
    system = stand.chatkeep.system
    before, frozen = [], []
    for _ in range(stand.plan.few_rounds):
        before.append(stand.append(system, MANY, stand.plan.seconds).served)
        frozen.append(stand.append_frozen(MANY, stand.plan.seconds))
        stand.chatkeep.drain()
    raw = {
        "before p99, ms": median([one.p99 for one in before]),
        "frozen p99, ms": median([one.p99 for one in frozen]),
        "before, /s": median([one.rate for one in before]),
        "frozen, /s": median([one.rate for one in frozen]),
    }
    values = ratios([one.p99 for one in frozen], [one.p99 for one in before])
    return [Figure("5", "append while PostgreSQL is frozen: p99 against before", "×", values, at_most(1.2, 1.0), raw)]


def appends_keyed(stand: Stand) -> list[Figure]:
    """keyed: each message with an Idempotency-Key of its own, against none, and against best direct with one."""
    systems = [stand.yardsticks["best_direct"], stand.chatkeep.system]
    plain = _interleaved(stand, systems[1:], MANY, stand.plan.seconds, stand.plan.few_rounds)["Chatkeep"]
    keyed = _interleaved(stand, systems, MANY, stand.plan.seconds, stand.plan.few_rounds, key=True)
    ours, best = [one.served.rate for one in keyed["Chatkeep"]], [one.served.rate for one in keyed["best direct"]]
    without = [one.served.rate for one in plain]
    raw = {"without, /s": median(without), "with, /s": median(ours), "best direct with, /s": median(best)}
    return [
        Figure("keyed", "append with a retry key: throughput against without", "×", ratios(ours, without), None, raw),
        Figure("keyed", "append with a retry key: throughput against best direct", "×", ratios(ours, best)),
    ]


def broker_apart(stand: Stand) -> list[Figure]:
    """broker: Celery on a second Valkey that keeps nothing on disk, against one Valkey for everything."""
    rates: dict[str, list[float]] = defaultdict(list)
    tails: dict[str, list[float]] = defaultdict(list)
    for _ in range(stand.plan.few_rounds):
        for name, server in (("one Valkey", stand.valkey), ("two Valkeys", stand.broker)):
            stand.chatkeep.restart(broker_url=server.url)
            served = stand.append(stand.chatkeep.system, MANY, stand.plan.seconds).served
            rates[name].append(served.rate)
            tails[name].append(served.p99)
    raw = {f"{name}, /s": median(values) for name, values in rates.items()}
    raw |= {f"{name} p99, ms": median(values) for name, values in tails.items()}
    return [
        Figure(
            "broker",
            "append, broker on a Valkey of its own: throughput against one for both",
            "×",
            ratios(rates["two Valkeys"], rates["one Valkey"]),
        ),
        Figure(
            "broker",
            "append, broker on a Valkey of its own: p99 against one for both",
            "×",
            ratios(tails["two Valkeys"], tails["one Valkey"]),
            None,
            raw,
        ),
    ]


def _interleaved(stand: Stand, systems: list[System], connections: int, seconds: float, rounds: int, *, key: bool = False) -> Phases:
    phases: Phases = defaultdict(list)
    stand.checkpoint()
    for round_ in range(rounds):
        for system in rotated(systems, round_):
            phases[system.name].append(stand.append(system, connections, seconds, key=key))
    return phases
