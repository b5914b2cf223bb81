"""The model's two stores against the real ones: the same random calls, one after the other, give the same answers and leave the same keys.

What a crash leaves is the model's own business; that its stores answer as Valkey and Postgres do is not, and is checked here. Ids and times
differ, so both sides are told in ordinals: the first id that an answer shows is 1, the next 2, and so on.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest import mock

import pytest
from redis import Redis

import worker.flush
import worker.loading
import worker.persist
from api.history import list_conversations, read_conversation, read_history
from api.schemas import Page
from tests import core
from tests.crash import model
from tests.crash.memory_redis import Stream
from tests.crash.model import World
from worker.codec import Role, Stored
from worker.database import dispose
from worker.errors import ChatkeepError
from worker.flush import flush_shard
from worker.pending import Draft, PendingLog, client_key
from worker.redis import connect, connect_sync
from worker.settings import Settings

CALLS = 400
SHARDS = 2


class Side(Protocol):
    """One of the two."""

    log: PendingLog

    async def ask(self, call: Coroutine[Any, Any, Any]) -> Any: ...
    async def flush(self, shard: int) -> Any: ...
    def keys(self) -> dict[str, tuple[bool, int]]: ...
    def expire_all(self) -> None: ...
    def wipe(self) -> None: ...


class Modelled:
    """Over the stand-ins."""

    def __init__(self) -> None:
        self.world = World()
        self.log = self.world.log

    async def ask(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self._run(lambda: model._result(call))

    async def flush(self, shard: int) -> Any:
        report = self._run(lambda: flush_shard(self.world._client, self.world.settings, shard))
        return report.entries, report.messages, report.dead_letters

    def _run(self, work: Callable[[], Any]) -> Any:
        answers: list[Any] = []

        def run() -> None:
            try:
                answers.append(work())
            except ChatkeepError as exc:
                answers.append(exc)

        self.world.start("call", run)
        self.world.settle()
        self.world.pass_time(0.001)  # as it does for the real ones: a shard that gave several ids at once would be ahead of the others
        if isinstance(answers[0], ChatkeepError):
            raise answers[0]
        return answers[0]

    def keys(self) -> dict[str, tuple[bool, int]]:
        found = self.world.redis.snapshot()
        return {name.decode(): (expires, _size(value)) for name, (value, expires) in found.items()}

    def expire_all(self) -> None:
        for key in list(self.world.redis.expiry):
            self.world.redis.remove(key)

    def wipe(self) -> None:
        self.world.redis.wipe()


def _size(value: Any) -> int:
    return len(value.ids) if isinstance(value, Stream) else len(value) if isinstance(value, dict) else 1


class Real:
    """Over Valkey and Postgres."""

    def __init__(self, settings: Settings, client: Redis, log: PendingLog) -> None:
        self._settings, self._client, self.log = settings, client, log

    async def ask(self, call: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await call
        finally:
            while self.log._background:
                await asyncio.gather(*self.log._background, return_exceptions=True)
                await asyncio.sleep(0)

    async def flush(self, shard: int) -> Any:
        report = await asyncio.to_thread(flush_shard, self._client, self._settings, shard)
        return report.entries, report.messages, report.dead_letters

    def keys(self) -> dict[str, tuple[bool, int]]:
        sizes = {b"stream": self._client.xlen, b"hash": self._client.hlen, b"zset": self._client.zcard, b"string": lambda _: 1}
        names = sorted(self._client.scan_iter("ck:{*", count=1000))
        return {name.decode(): (self._client.pttl(name) >= 0, sizes[self._client.type(name)](name)) for name in names}

    def expire_all(self) -> None:
        for name in list(self._client.scan_iter("ck:{*", count=1000)):
            if self._client.pttl(name) >= 0:
                self._client.delete(name)

    def wipe(self) -> None:
        self._client.flushall()


@dataclass
class Teller:
    """Goes through the calls on one side, and tells what came of them."""

    side: Side
    users: list[int]
    told: list[str] = field(default_factory=list)
    ordinals: dict[int, int] = field(default_factory=dict)
    conversations: list[tuple[int, int]] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)

    async def go(self, chance: random.Random) -> list[str]:
        """All calls; `chance` is in the same state on both sides."""
        for _ in range(CALLS):
            name = chance.choices([name for name, _ in _CALLS], [weight for _, weight in _CALLS])[0]
            dice = [chance.random() for _ in range(5)]
            try:
                answer = await self._do(name, dice)
            except ChatkeepError as exc:
                answer = type(exc).__name__
            self.told.append(f"{name}: {answer}")
        self.told += [f"{self._named(name)}: {what}" for name, what in sorted(self.side.keys().items()) if not name.endswith(_VOLATILE)]
        return self.told

    async def _do(self, name: str, dice: list[float]) -> Any:
        call: Callable[[list[float]], Awaitable[Any]] = getattr(self, "_" + name)
        return await call(dice) if name == "create" or self.conversations else None

    async def _create(self, dice: list[float]) -> Any:
        key = client_key(f"c{int(dice[1] * 6)}") if dice[2] < 0.5 else None
        user = self.users[int(dice[0] * len(self.users))]
        made = await self.side.ask(self.side.log.create(user, "titled" if dice[3] < 0.5 and key is None else None, key=key))
        if not made.replayed:
            self.conversations.append((user, made.conversation.id))
        return self._ordinal(made.conversation.id), made.conversation.title, made.replayed

    async def _append(self, dice: list[float]) -> Any:
        user, conversation = self._pick(dice[0])
        which = int(dice[1] * 5)
        key = client_key(f"m{which}") if dice[2] < 0.5 else None
        text = f"t\t\\{which}" + ("again" if key and dice[3] < 0.1 else "")
        role: Role = "user" if (which % 2 == 0 if dice[4] < 0.8 else dice[4] < 0.9) else "assistant"
        count = which % 3 + 1 if dice[3] < 0.8 else int(dice[3] * 30) % 3 + 1  # a key meets its own list again, and others
        drafts = [Draft(role, text), Draft("assistant", text + " 2"), Draft("user", text + " 3")][:count]
        appended = await self.side.ask(self.side.log.append_all(user, conversation, drafts, key=key))
        self.messages += [one.message.id for one in appended]
        return [(self._message(one.message), one.committed >= one.message.id, one.replayed) for one in appended]

    async def _rename(self, dice: list[float]) -> Any:
        state = await self.side.ask(self.side.log.rename(*self._pick(dice[0]), f"named {dice[1]:.3f}"))
        return self._ordinal(state.id), state.title

    async def _delete(self, dice: list[float]) -> Any:
        return await self.side.ask(self.side.log.delete(*self._pick(dice[0])))

    async def _page(self, dice: list[float]) -> Any:
        mark = self.messages[int(dice[1] * len(self.messages))] if self.messages else 1
        page = Page(int(dice[2] * 6) + 1, mark if dice[3] < 0.3 else None, mark if dice[3] > 0.7 else None)
        found = await self.side.ask(read_history(self.side.log, *self._pick(dice[0]), page))
        shown = [(self._message(one), one.id <= found.committed) for one in found.messages]
        return shown, found.has_older, found.has_newer, found.conversation.title

    async def _look(self, dice: list[float]) -> Any:
        state = await self.side.ask(read_conversation(self.side.log, *self._pick(dice[0])))
        return self._ordinal(state.id), state.title

    async def _list(self, dice: list[float]) -> Any:
        page = await self.side.ask(list_conversations(self.side.log, self.users[int(dice[0] * len(self.users))], 100, None))
        return [(self._ordinal(one.id), one.title) for one in page.items]

    async def _intrude(self, dice: list[float]) -> Any:
        user, conversation = self._pick(dice[0])
        other = next(one for one in self.users if one != user and one % SHARDS == user % SHARDS)
        return await self.side.ask(self.side.log.append(other, conversation, "user", "mine"))

    async def _flush(self, dice: list[float]) -> Any:
        return await self.side.flush(int(dice[0] * SHARDS))

    async def _expire(self, dice: list[float]) -> None:
        self.side.expire_all()

    async def _wipe(self, dice: list[float]) -> None:
        for shard in range(SHARDS):
            await self.side.flush(shard)
        self.side.wipe()

    def _pick(self, die: float) -> tuple[int, int]:
        recent = self.conversations[-6:]
        return recent[int(die * len(recent))]

    def _message(self, message: Stored) -> tuple[int, str]:
        return self._ordinal(message.id), re.sub(rb'"(id|conversation_id|created_at)":[^,]*', b"", message.body).decode()

    def _ordinal(self, number: int) -> int:
        return self.ordinals.setdefault(number, len(self.ordinals) + 1)

    def _named(self, key: str) -> str:
        return re.sub(r":(\d{6,})", lambda found: f":#{self._ordinal(int(found[1]))}", key)


_CALLS = (
    *(("create", 4), ("append", 30), ("rename", 4), ("delete", 1), ("page", 20), ("look", 4), ("list", 5), ("intrude", 2)),
    *(("flush", 20), ("expire", 4), ("wipe", 1)),
)
_VOLATILE = (":wake", ":load", ":turns")
"""Leases, which run out by the clock."""


@pytest.fixture
def small() -> Any:
    """Limits that so few calls reach; and one that a busy machine would reach on the real side alone."""
    with (
        mock.patch.object(worker.loading, "RETRY_KEYS_MAX", 2),
        mock.patch.object(worker.persist, "INSERT_CHARS_MAX", 1),
        mock.patch.object(worker.flush, "FLUSH_LOOP_SECONDS", 60),
    ):
        yield


@pytest.mark.parametrize("seed", range(3))
def test_stand_ins_do_as_the_real_stores_do(settings: Settings, monkeypatch: pytest.MonkeyPatch, small: None, seed: int) -> None:
    users = [core.make_user() for _ in range(4)]
    for name, value in model.SETTINGS.items():
        if name not in ("database_url", "redis_url", "jwt_secret"):
            monkeypatch.setattr(settings, name, 3600 if name == "cache_ttl_seconds" else value)

    async def really() -> list[str]:
        client, sync = connect(settings), connect_sync(settings)
        log = PendingLog(client, settings, wake=lambda shard: None)
        try:
            return await Teller(Real(settings, sync, log), users).go(random.Random(seed))
        finally:
            await log.close()
            await client.aclose()
            sync.close()

    try:
        real = asyncio.run(really())
    finally:
        dispose()
        core.dismiss_administrators()
    with model.installed(), mock.patch.dict(model.SETTINGS, {"cache_ttl_seconds": 3600}):
        modelled = asyncio.run(Teller(Modelled(), users).go(random.Random(seed)))
    assert modelled == real
