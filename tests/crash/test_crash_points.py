"""The sweep: a process killed at every named point, and every link losing a request and a reply; then the checker judges.

Two kinds of names: those that stand in the code (`crashpoints.visit("flush:locked")`), and `before:` and `after:` each Lua script
and each transaction. Who comes to the point next dies there; a point that nobody comes to is a failure. The core of the path is gone
through twice more: with requests being lost on a link of the same process at the same time, and with replies. Some places have to be
brought about (`HOW`).
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import schema
from tests.crash.checker import Violation
from tests.crash.faults import FAULTS
from tests.crash.nemesis import Run
from tests.crash.test_nemesis import SEED
from worker import crashpoints

VISIT_SECONDS = 60.0
"""On a slow machine; in general it takes one or two."""
NAMED = (
    *("append:validated", "append:before_answer", "wakeup:before_send", "wakeup:sent", "task:begun", "task:done"),
    *("flush:begun", "flush:locked", "flush:fetched", "flush:half_written", "flush:before_commit", "flush:committed"),
)
SCRIPTS = (
    *("append", "create", "rename", "delete", "reserve", "trim", "ask", "reply_begin", "reply_add"),
    *("load", "load_user", "seed_begin", "seed", "lease", "touch", "reply_close"),
)
TRANSACTIONS = ("read",)
NOT_SWEPT = {
    "remember": "needs 10,000 retry keys in one conversation; the model has it",
    "turn": "gives a lease back early, or prolongs it; without it the lease runs out",
    "reply_read": "reads the stream of a reply, which is no history",
    "reply_stop": "sets a mark for a writer, who may be gone",
    "events_open": "tells open pages what happened, which is no history",
    "forget": "ends a lease",
    "end_sign_ins": "ends sign-ins, not histories",
}
CORE = (
    *("append:validated", "before:append", "after:append", "append:before_answer", "before:create", "after:create"),
    *("flush:locked", "flush:fetched", "flush:half_written", "flush:before_commit", "flush:committed", "before:trim", "after:trim"),
)
LINKS = tuple(f"{who}-{what}" for who in ("api", "worker") for what in ("valkey", "postgres", "broker"))
_OF_WORKER = ("flush", "task", "trim", "ask")


class Sweep(Run):
    """A run whose troubles are the crash points, one after the other."""

    def __init__(self, home: Path, seed: int) -> None:
        self.lines: list[str] = []
        super().__init__(home, seed, self.lines.append, clients=18)
        self.report.left_out = {}  # no fault is chosen here
        self.orders = self.cluster.crash_orders = home / "orders"
        self.orders.mkdir(parents=True)
        self.visited: list[str] = []

    async def trouble(self, until: float, script: Sequence[str], clients: asyncio.Task[None]) -> None:
        """In place of the faults."""
        # Before a reply's first text: that leaves one which somebody has to end when its lease is over, in 15 s. Both deaths around its end
        # are ordered at once, because any number of processes may be about to end it, and at the first visit, as there may be no second.
        await self._killed_at("before:reply_add", visits=1)
        late = asyncio.gather(self._killed_at("before:reply_close", visits=1), self._killed_at("after:reply_close", visits=1))
        for point in _alternating([point for point in _points() if "reply_close" not in point]):
            await self._killed_at(point)
        for link, direction in itertools.product(LINKS, ("requests", "replies")):
            await self._lost_on(link, direction, 3)
        await self._settle("after the links")
        for direction in ("requests", "replies"):
            for point in _alternating(CORE):
                who = "worker" if _is_workers(point) else "api"
                link = self.chance.choice([f"{who}-valkey", f"{who}-postgres"])
                await asyncio.gather(self._killed_at(point, direction), self._lost_on(link, direction, 2))
        await late

    async def _killed_at(self, point: str, note: str = "", visits: int | None = None) -> None:
        """Orders a death there, at this visit, and waits for it."""
        path = crashpoints.order(self.orders, point)
        fresh = path.with_suffix(".new")
        fresh.write_text(str(visits or self.chance.choice((1, 1, 2))))
        fresh.rename(path)
        self.history.event("ordered", point=point, note=note)
        bring_about = HOW.get(point.partition(":")[2])
        if not await self._gone(path, 0.0 if bring_about else VISIT_SECONDS) and bring_about:
            for _ in range(4):
                await bring_about(self)
                if await self._gone(path, VISIT_SECONDS / 6):
                    break
        if path.exists():
            path.unlink()
            self._violate(13, f"nobody came to {point} {note}")
            return
        self.visited.append(point)
        self.cluster.kills["at a point"] = self.cluster.kills.get("at a point", 0) + 1

    async def _gone(self, path: Path, seconds: float) -> bool:
        until = asyncio.get_running_loop().time() + seconds
        while path.exists() and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.02)
        return not path.exists()

    async def _lost_on(self, name: str, direction: str, count: int) -> None:
        """So many pieces swallowed on a link, each with its connection."""
        link = self.cluster.links[name]
        before = link.lost
        link.lose_next = count
        await link.set(f"lose-{direction}")
        until = asyncio.get_running_loop().time() + VISIT_SECONDS
        while link.mode != "pass" and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.02)
        await link.set("pass")
        if link.lost - before < count:
            self._violate(13, f"nothing went over {name}, so no {direction} could be lost")
        link.lose_next = 0


async def _emptied(run: Any) -> None:
    """Redis knows nothing any more: everything has to be loaded, and the clocks seeded."""
    await FAULTS["cache-emptied"](run, 1.0)


async def _idle(run: Any) -> None:
    """Longer than half of a copy's time."""
    async with run.workload.paused():
        await asyncio.sleep(2.5)


async def _unasked(run: Any) -> None:
    """The API's wake-ups do not arrive, so that the sweep has to ask for flushes."""
    link = run.cluster.links["api-broker"]
    await link.set("refuse")
    await asyncio.sleep(4.0)
    await link.set("pass")


HOW = {**dict.fromkeys(("load", "load_user", "seed_begin", "seed", "lease"), _emptied), "touch": _idle, "ask": _unasked}


def _points() -> tuple[str, ...]:
    return NAMED + tuple(f"{when}:{name}" for name in SCRIPTS + TRANSACTIONS for when in ("before", "after"))


def _is_workers(point: str) -> bool:
    return any(part in _OF_WORKER for part in point.split(":"))


def _alternating(points: Sequence[str]) -> list[str]:
    """API and worker in turn, so that the one is back while the other is at it."""
    workers, others = [point for point in points if _is_workers(point)], [point for point in points if not _is_workers(point)]
    return [point for pair in itertools.zip_longest(others, workers) for point in pair if point]


def test_every_point_in_the_code_is_swept() -> None:
    files = [*schema.ROOT.glob("api/*.py"), *schema.ROOT.glob("worker/*.py")]
    named = [name for path in files for name in re.findall(r'crashpoints\.visit\("(\w+:\w+)"\)', path.read_text())]
    assert sorted(named) == sorted(NAMED)
    transactions = [name for path in files for name in re.findall(r'\.transaction\("(\w+)"', path.read_text())]
    assert sorted(transactions) == sorted(TRANSACTIONS)
    scripts = {path.stem for path in schema.ROOT.glob("worker/lua/*.lua")} - {"common"}
    assert scripts == {*SCRIPTS, *NOT_SWEPT}
    assert set(CORE) <= set(_points())


@pytest.mark.timeout(900)
def test_promise_survives_a_death_at_every_point(capsys: pytest.CaptureFixture[str]) -> None:
    with schema.state_directory() as directory:
        sweep = Sweep(Path(directory) / "run", SEED)
        report = asyncio.run(sweep.go(0.0))
    with capsys.disabled():
        print(f"\n{len(sweep.visited)} deaths at {len(set(sweep.visited))} points; {report.summary()}")
    assert not report.violations, "\n".join([*sweep.lines, report.summary()])
    assert set(sweep.visited) == set(_points())


def test_a_point_that_nobody_comes_to_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.crash.test_crash_points.VISIT_SECONDS", 0.1)
    sweep = Sweep(tmp_path / "run", 1)
    asyncio.run(sweep._killed_at("flush:nowhere"))
    assert sweep.report.violations == [Violation(13, "nobody came to flush:nowhere ")]
