"""The nemesis: real processes, a workload, and faults that a seed chooses; then everything is mended, and the checker judges.

A run is a sequence of *rounds* of a few minutes. In a round faults follow one another (mostly one at a time, sometimes two or three that
overlap). Every few faults, and at the end, comes a gate: all is mended, and within the bounds below everything has to be running, ready
and drained by itself. After the last gate of a round the whole state is read, through the API and past it, and judged together with all
that the clients saw. The next round begins with new conversations and an empty history, so a run can be as long as one likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from tests.crash.checker import ConversationRow, Final, MessageRow, Violation, check
from tests.crash.cluster import SHARDS, Cluster
from tests.crash.faults import FAULTS, available
from tests.crash.history import History, digest
from tests.crash.http import ask
from tests.crash.workload import Conversation, Workload, _Session

READY_SECONDS = 60.0
"""After everything is mended. A worker that was cut off silently is back after 51 s at the latest (kombu's own checks)."""
DRAIN_SECONDS = 60.0
TURN_SECONDS = 60.0
HANG_SECONDS = 2.0
"""A call without an answer is no hang if its process was dead or frozen within this of it."""
ROUND_SECONDS = 240.0
GATE_SECONDS = 20.0
"""Between two gates, about."""
MEMORY_SPARE_BYTES = 1 << 20

QUICK = (
    *("valkey-fsync-kill", "valkey-power-loss", "kill-storm", "freeze-worker-child", "freeze-postgres", "cache-emptied", "poison"),
    *("broker-emptied", "api-valkey:lose-replies", "api-valkey:lose-requests", "worker-valkey:lose-replies"),
    *("worker-postgres:lose-replies", "valkey-not-durable", "valkey-power-loss"),
)
"""What a minute has to hold: one of each kind, the dangerous ones first."""


@dataclass
class Report:
    """What a run came to."""

    seed: int
    seconds: float = 0.0
    rounds: int = 0
    operations: int = 0
    acknowledged: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    longest_write: float = 0.0
    slowest_drain: float = 0.0
    violations: list[Violation] = field(default_factory=list)

    def summary(self) -> str:
        """For a person, and for the README's table."""
        kills = sum(self.kills.values())
        lines = [
            f"seed {self.seed}: {self.seconds / 60:.1f} min, {self.rounds} rounds, {sum(self.faults.values())} faults, {kills} kills, "
            f"{self.operations} calls ({', '.join(f'{count} {name}' for name, count in sorted(self.outcomes.items()))}), "
            f"{self.acknowledged} acknowledged messages",
            f"longest answered write {self.longest_write:.2f} s, slowest drain {self.slowest_drain:.1f} s",
            "kills: " + (", ".join(f"{name} {count}" for name, count in sorted(self.kills.items())) or "none"),
        ]
        if self.left_out:
            lines.append("left out here: " + ", ".join(f"{name} (needs {need})" for name, need in sorted(self.left_out.items())))
        lines.append(f"{len(self.violations)} violations" if self.violations else "no violation")
        return "\n".join([*lines, *map(str, self.violations[:20])])


class Run:
    """One run on one cluster."""

    def __init__(self, home: Path, seed: int, say: Callable[[str], None], faults: Sequence[str] = (), clients: int = 12) -> None:
        self.chance = random.Random(seed)
        self.home = home
        self.report = Report(seed)
        self.poison: set[str] = set()
        self.dishonest: list[tuple[float, float]] = []
        """Times at which nothing may be acknowledged."""
        self.mark = f"zq{seed:x}x{self.chance.getrandbits(32):08x}"
        self.history = History()
        can, missing = available()
        self.faults = [name for name in can if not faults or name in faults]
        self.report.left_out = {name: need for name, need in missing.items() if not faults or name in faults}
        self._say = say
        self._clients = clients
        self._down: dict[int, list[tuple[float, float]]] = {}
        self._dead_letters: set[str] = set()
        self.cluster = Cluster(home, self.chance, self._event)

    async def go(self, minutes: float, script: Sequence[str] = ()) -> Report:
        """Runs for so long, or through a script of faults; always ends with a judgement."""
        started = time.monotonic()
        try:
            await self.cluster.start()
            self._say(f"seed {self.report.seed}: started in {time.monotonic() - started:.1f} s; {len(self.faults)} kinds of faults")
            await self._begin_people()
            until = time.monotonic() + minutes * 60
            while not self.report.violations and (time.monotonic() < until or not self.report.rounds):
                await self._round(min(until, time.monotonic() + ROUND_SECONDS), script)
        finally:
            await self.cluster.end()
        self.report.kills = Counter(self.cluster.kills)
        self.report.seconds = time.monotonic() - started
        return self.report

    def _event(self, name: str, **fields: Any) -> None:
        self.history.event(name, **fields)

    async def _begin_people(self) -> None:
        self.workload = Workload(self.history, self.cluster.api_ports, self.mark, self.chance)
        await self.workload.sign_up(6)
        await self._settle("at the start")
        self._base_memory = await asyncio.to_thread(self._lasting_memory)

    # A round

    async def _round(self, until: float, script: Sequence[str]) -> None:
        self.report.rounds += 1
        self.history = History(self.home / f"history-{self.report.rounds}.jsonl")
        self.workload.history = self.history
        for person in self.workload.people:
            person.conversations, person.again, person.created = [], [], []
        watch = asyncio.create_task(self._watch())
        clients = asyncio.create_task(self.workload.run(self._clients))
        try:
            await self.trouble(until, script, clients)
            async with self.workload.paused():
                pass
        finally:
            clients.cancel()
            watch.cancel()
            results = await asyncio.gather(clients, watch, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result
        final = await self._look()
        self._judge(final)

    async def trouble(self, until: float, script: Sequence[str], clients: asyncio.Task[None]) -> None:
        planned = list(script)
        last_gate = time.monotonic()
        await asyncio.sleep(1.0)
        while not clients.done() and (planned if script else time.monotonic() < until):
            names = [planned.pop(0)] if planned else self._choose()
            await self._strike([name for name in names if name in self.faults])
            await asyncio.sleep(self.chance.uniform(0.1, 0.8))
            if time.monotonic() > last_gate + GATE_SECONDS:
                self._progress()
                await self._settle(f"after {', '.join(names)}")
                last_gate = time.monotonic()
            if self.cluster.troubles or self.workload.faulty or self.report.violations:
                return

    def _choose(self) -> list[str]:
        """Mostly one; never two that meddle with one store's own process."""
        count = self.chance.choices((1, 2, 3), (70, 25, 5))[0]
        names: list[str] = []
        for _ in range(count):
            name = self.chance.choice(_balanced(self.faults, self.chance))
            if all(_subject(name) != _subject(other) for other in names):
                names.append(name)
        return names

    async def _strike(self, names: Sequence[str]) -> None:
        for name in names:
            self.report.faults[name] += 1
        seconds = min(self.chance.expovariate(1 / 1.5) + 0.3, 12.0)
        self.history.event("faults", names=list(names), seconds=seconds)
        await asyncio.gather(*(FAULTS[name](self, seconds * self.chance.uniform(0.5, 1.0)) for name in names))

    def _progress(self) -> None:
        kills = sum(self.cluster.kills.values())
        self._say(
            f"{sum(self.report.faults.values())} faults, {kills} kills, {len(self.history.operations)} calls in this round, "
            f"{self.workload.acknowledged} acknowledged"
        )

    async def _watch(self) -> None:
        """Notes when an API process was not there, which excuses a call without an answer."""
        ports = {f"api{i}": port for i, port in enumerate(self.cluster.api_ports)}
        while True:
            now = time.monotonic()
            for part in self.cluster.of("api"):
                if part.pid is None or part.stopped:
                    self._down.setdefault(ports[part.name], []).append((now - 0.2, now + 0.2))
            await asyncio.sleep(0.1)

    async def _settle(self, when: str) -> None:
        """A gate: with everything mended, everything works again by itself."""
        started = time.monotonic()
        if wrong := await self.cluster.until_ready(READY_SECONDS):
            self._violate(13, f"{when}: not ready again after {READY_SECONDS:.0f} s ({wrong})")
            return
        async with self.workload.paused():
            if wrong := await self.cluster.until_drained(DRAIN_SECONDS):
                self._violate(13, f"{when}: not drained after {DRAIN_SECONDS:.0f} s ({wrong})")
        self.report.slowest_drain = max(self.report.slowest_drain, time.monotonic() - started)

    def _violate(self, invariant: int, what: str) -> None:
        self.report.violations.append(Violation(invariant, what))

    # The end of a round

    async def _look(self) -> Final:
        """Everything at rest: first what the clients see, then what is stored."""
        await self._settle("at the end")
        if self.report.violations:
            return Final()
        if not await self._turns_ended():
            self._violate(13, f"at the end: a reply was neither finished nor given up within {TURN_SECONDS:.0f} s")
        await self._settle("after the last reply")
        await self._read_everything()
        final = await asyncio.to_thread(self._stored)
        final.troubles += await self._leaks()
        return final

    async def _turns_ended(self) -> bool:
        """A reply whose writer died is ended by somebody when its lease is over."""
        deadline = time.monotonic() + TURN_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(redis.RedisError), self.cluster.redis() as client:
                if not any(client.hlen(f"ck:{{s{shard:02d}}}:turns") for shard in range(SHARDS)):
                    return True
            await asyncio.sleep(0.2)
        return False

    async def _read_everything(self) -> None:
        for person in self.workload.people:
            sessions = [_Session(self.workload, port, person, self.chance) for port in self.cluster.api_ports]
            for conversation in [one for one in person.conversations if not one.deleted]:
                await _walk(sessions[0], conversation, backwards=True)
                await _walk(sessions[1], conversation, backwards=False)
            for session in sessions:
                await session.list_all()
                session._client.close()

    def _stored(self) -> Final:
        final = Final(poison=set(self.poison))
        with self.cluster.cursor() as cursor:
            cursor.execute("SELECT id, user_id, title, deleted_at IS NOT NULL, idempotency_key FROM conversation")
            final.conversations = [ConversationRow(row[0], row[1], digest(row[2]) if row[2] else "", row[3], row[4]) for row in cursor]
            cursor.execute("SELECT conversation_id, id, user_id, role, content, status, idempotency_key FROM message")
            final.messages = [MessageRow(*row[:4], digest(row[4]), *row[5:]) for row in cursor]
            cursor.execute("SELECT entry_id FROM dead_letter")
            final.dead_letters = [row[0] for row in cursor]
            final.troubles += _deep(cursor, self.report.rounds)
        with self.cluster.redis() as client:
            final.log_entries = sum(client.xlen(f"ck:{{s{shard:02d}}}:log") for shard in range(SHARDS))
            final.log_bytes = sum(int(client.get(f"ck:{{s{shard:02d}}}:bytes") or 0) for shard in range(SHARDS))
            final.lasting_keys = [
                key.decode()
                for key in client.scan_iter("ck:*", count=1000)
                if client.pttl(key) == -1 and key.rsplit(b":", 1)[1] not in _LASTING
            ]
        memory = self._lasting_memory()
        if memory > self._base_memory * 1.05 + MEMORY_SPARE_BYTES:
            final.troubles.append(Violation(11, f"Valkey holds {memory} bytes without its copies; at the start it was {self._base_memory}"))
        return final

    def _lasting_memory(self) -> int:
        """What Valkey holds when all that expires is gone (deleted here: nobody waits for it)."""
        with self.cluster.redis() as client:
            for key in client.scan_iter("ck:*", count=1000):
                if client.pttl(key) > 0:
                    client.delete(key)
            client.script_flush()
            client.memory_purge()
            return int(client.info("memory")["used_memory_dataset"])

    async def _leaks(self) -> list[Violation]:
        """Texts, addresses and tokens of this run in anything that was printed or counted."""
        secrets = re.compile(re.escape(self.mark).encode() + rb"|eyJ[\w-]{10,}\.[\w-]{10,}\.")
        found = []
        for path in self.cluster.logs():
            if hit := secrets.search(await asyncio.to_thread(path.read_bytes)):
                found.append(Violation(7, f"{path.name} holds what a client sent: {hit[0][:12]!r}…"))
        for port in self.cluster.api_ports:
            answer = await ask(port, "/metrics")
            if answer is not None and secrets.search(answer.body):
                found.append(Violation(7, "/metrics holds what a client sent"))
        return found

    def _judge(self, final: Final) -> None:
        operations = self.history.operations
        self.report.operations += len(operations)
        self.report.acknowledged = self.workload.acknowledged
        self.report.longest_write = max(self.report.longest_write, self.workload.longest)
        self.report.outcomes.update(one.outcome for one in operations)
        self.report.violations += [Violation(13, trouble) for trouble in self.cluster.troubles]
        self.report.violations += [Violation(12, what) for what in self.workload.faulty]
        self.report.violations += self._hangs()
        self.report.violations += self._dishonesty()
        if final.conversations or final.messages:
            earlier = self._earlier
            final.conversations = [row for row in final.conversations if row.id not in earlier]
            final.messages = [row for row in final.messages if row.conversation not in earlier]
            self._earlier = earlier | {row.id for row in final.conversations}
            self.report.violations += check(operations, final, earlier)
        elif not self.report.violations:
            self.report.violations += check(operations, None)
        self.history.close()

    _earlier: frozenset[int] = frozenset()

    def _hangs(self) -> list[Violation]:
        found = []
        for operation, began, port in self.workload.hangs:
            ended = operation.ended or began
            if not any(start < ended and end > began - HANG_SECONDS for start, end in self._down.get(port, [])):
                found.append(Violation(12, f"op {operation.op}: {operation.kind} had no answer for {ended - began:.0f} s"))
        self.workload.hangs.clear()
        return found

    def _dishonesty(self) -> list[Violation]:
        writes = ("append", "turn", "create", "rename", "delete")
        return [
            Violation(12, f"op {one.op}: {one.kind} was acknowledged while it could not be kept")
            for one in self.history.operations
            if one.kind in writes and one.outcome == "ok" and not one.replayed
            for start, end in self.dishonest
            if start < one.started and (one.ended or end) < end
        ]


_LASTING = (b"log", b"clock", b"committed", b"bytes", b"stats", b"shards", b"workers")


def _deep(cursor: Any, round_number: int) -> list[Violation]:
    """What Postgres itself can say about its rows."""
    questions = {
        "messages in no conversation of their user": "SELECT count(*) FROM message m WHERE NOT EXISTS "
        "(SELECT FROM conversation c WHERE (c.id, c.user_id) = (m.conversation_id, m.user_id))",
        "messages of deleted conversations": "SELECT count(*) FROM message m JOIN conversation c ON c.id = m.conversation_id "
        "WHERE c.deleted_at IS NOT NULL",
        "ids above what their shard has noted": "SELECT count(*) FROM message m JOIN shard s ON s.number = m.id % 64 "
        "WHERE m.id > s.last_id",
        "replies without the message they reply to": "SELECT count(*) FROM message r WHERE r.idempotency_key LIKE 'r:%' AND NOT EXISTS "
        "(SELECT FROM message m WHERE m.conversation_id = r.conversation_id AND m.id = substr(r.idempotency_key, 3)::bigint)",
    }
    found = []
    for what, question in questions.items():
        cursor.execute(question)
        count = cursor.fetchone()[0]
        if count:
            found.append(Violation(10, f"{count} {what} (round {round_number})"))
    return found


async def _walk(session: _Session, conversation: Conversation, *, backwards: bool) -> None:
    """All of a conversation, page by page; a page that fails is asked for again."""
    mark: int | None = None if backwards else 1
    failures = 0
    while failures < 20:
        page = await (session._page(conversation, mark, None, 200) if backwards else session._page(conversation, None, mark, 97))
        if page is None:
            failures += 1
            await asyncio.sleep(0.2)
            continue
        if not page.messages or not (page.has_older if backwards else page.has_newer):
            return
        mark = page.messages[0].id if backwards else page.messages[-1].id


def _subject(name: str) -> str:
    """Whose process, or which link, a fault is about; two faults of one subject never overlap."""
    if ":" in name:
        return name.split(":")[0]
    for store in ("valkey", "broker", "postgres"):
        if store in name:
            return store
    return {
        "cache-emptied": "valkey",
        "poison": "poison",
        "kill-backend": "postgres",
        "freeze-backend": "postgres",
        "end-backends": "postgres",
    }.get(name, name.split("-", 1)[-1])


def _balanced(names: Sequence[str], chance: random.Random) -> list[str]:
    """The links' many faults together are as likely as a third of the others."""
    links = [name for name in names if ":" in name]
    others = [name for name in names if ":" not in name]
    return (links if chance.random() < 0.25 else others) or list(names)
