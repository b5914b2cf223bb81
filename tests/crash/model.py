"""The whole of Chatkeep in one thread: the real API and worker code over stand-ins of both stores, every step of which a schedule orders.

A call of a client, a flush, and what an API process does in the background are *actors*: greenlets that run the product's own functions.
Whatever such a function sends to a store is a *step*: the actor stops before it, and goes on when the schedule says so, with a *fate*:

    it works · its request is lost · its reply is lost · it arrives only later, when the caller has given up ·
    the process is killed before it · the process is killed after it

Between steps anything may happen: time passes (leases and cached copies run out, a stalled transaction is ended by the server), Postgres
stops at once, its clients' transactions with it, the cache is emptied when nothing is pending, Redis's clock jumps.

`World.finish` lets everything work again, runs what is left, flushes, reads it all, and hands the history to the checker: the same checker
that judges the real processes (`checker.py`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from enum import Enum, auto
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import greenlet
import orjson
from pydantic import SecretStr

import worker.backlog
import worker.committed
import worker.flush
import worker.loading
import worker.pending
import worker.persist
from api import history as reads
from api.schemas import Page
from tests.crash import memory_postgres
from tests.crash.checker import ConversationRow, Final, MessageRow, Violation, check
from tests.crash.history import History, Listed, Operation, digest, items
from tests.crash.memory_postgres import MemoryPostgres
from tests.crash.memory_redis import MemoryRedis
from worker import keys, scripts
from worker.codec import rfc3339
from worker.errors import Never, NotFound, RedisUnavailable, TooSlow, TryAgainLater
from worker.pending import Appended, Draft, PendingLog, client_key
from worker.settings import Settings

START = keys.EPOCH_MICROSECONDS + 10**13
STEP_MICROSECONDS = 4
"""Less than a tick: several ids fall into one."""
STEPS_MAX = 5000
"""Of a schedule; few take more than 500. More only come from somebody who tries something again and again."""
SETTINGS = {
    "database_url": SecretStr("postgresql://nowhere/x"),
    "redis_url": SecretStr("redis://nowhere"),
    "jwt_secret": SecretStr("the model signs nothing, but it says so at length"),
    "cache_ttl_seconds": 20,
    "cache_messages_max": 2,
    "flush_batch_max": 3,
    "shards": 2,
}


INTERLEAVINGS: set[int] = set()
"""Every order of steps that was ever run, up to a step that one took while another stood in the middle of its work; each counted once."""


class Fate(Enum):
    """What becomes of a step."""

    WORKS = auto()
    REQUEST_LOST = auto()
    REPLY_LOST = auto()
    LATE = auto()
    KILLED_BEFORE = auto()
    KILLED_AFTER = auto()


class Killed(BaseException):
    """Unwinds a killed process; whatever it still tries to do has no effect."""


class Actor:
    """Something that runs. `about` names the step that it stands before."""

    def __init__(self, world: World, name: str, work: Callable[[], Any]) -> None:
        self.name = name
        self.world = world
        self.about = ""
        self.dead = False
        self.deadlines: list[float] = []
        self._greenlet = greenlet.greenlet(work, parent=world.scheduler)
        self._greenlet.actor = self

    def advance(self, fate: Fate = Fate.WORKS) -> None:
        """Does the step that it stands before (at first: none), and goes on to the next."""
        self._greenlet.switch(fate)

    @property
    def done(self) -> bool:
        return bool(self._greenlet.dead)


class World:
    """Two stores, and the processes that use them."""

    def __init__(self, **changed: Any) -> None:
        self.settings = Settings.model_construct(**_all_settings() | changed)
        self.scheduler = greenlet.getcurrent()
        self.seconds = 1000.0
        self.redis = MemoryRedis(START)
        self.postgres = MemoryPostgres(self.step, lambda: self.seconds)
        self.actors: list[Actor] = []
        self.history = History(clock=lambda: self.seconds)
        self.steps = 0
        self._order = 0
        self.poison: set[str] = set()
        self.log = PendingLog(_AsyncClient(self), self.settings, wake=lambda shard: None)  # type: ignore[arg-type]
        self.log._scripts = _Scripts(self)  # type: ignore[assignment]
        self.log.threads = _Threads()  # type: ignore[assignment]
        self._client: Any = _SyncClient(self)
        self._said = 0

    # Actors and steps

    def step(self, about: str, effect: Callable[[], Any], lost: type[Exception]) -> Any:
        """Called by an actor for everything that leaves its process."""
        actor: Actor = greenlet.getcurrent().actor
        if actor.dead:
            raise Killed
        actor.about = about
        fate = greenlet.getcurrent().parent.switch()
        if actor.deadlines and self.seconds > min(actor.deadlines):
            raise TimeoutError
        if fate is Fate.KILLED_BEFORE:
            actor.dead = True
            raise Killed
        if fate is Fate.REQUEST_LOST:
            raise lost
        if fate is Fate.LATE:
            self._later(about, effect)
            raise lost
        answer = effect()
        if fate is Fate.KILLED_AFTER:
            actor.dead = True
            raise Killed
        if fate is Fate.REPLY_LOST:
            raise lost
        return answer

    def start(self, name: str, work: Callable[[], Any]) -> None:
        """A new actor, which has not done anything yet."""

        def run(_: Fate) -> None:
            with suppress(Killed, TryAgainLater):
                work()

        self.actors.append(Actor(self, name, run))

    def advance(self, actor: Actor, fate: Fate = Fate.WORKS) -> None:
        """One step of one actor."""
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise AssertionError(f"[13] never ends: {actor.name} ({actor.about}) after {self.steps} steps")
        self._order = hash((self._order, actor.name, actor.about, fate))
        if len(self.actors) > 1:
            INTERLEAVINGS.add(self._order)
        self.pass_time(STEP_MICROSECONDS / 1e6)
        actor.advance(fate)
        if actor.done:
            self.actors.remove(actor)

    def _later(self, about: str, effect: Callable[[], Any]) -> None:
        """What was sent, and arrives when nobody waits for it any more."""

        def arrive() -> None:
            self.step("late " + about, effect, RedisUnavailable)

        self.start("network", arrive)

    # What may happen between steps

    def pass_time(self, seconds: float) -> None:
        """Time goes by for everybody."""
        self.seconds += seconds
        self.redis.now += round(seconds * 1e6)
        if seconds >= 1:
            self.postgres.end_transactions(memory_postgres.IDLE_SECONDS)

    def turn_clock(self, seconds: float) -> None:
        """Redis's clock jumps; monotonic time does not."""
        self.redis.now += round(seconds * 1e6)

    def empty_cache(self) -> bool:
        """Redis loses everything, but only when nothing is pending: that is what the promise allows."""
        if any(self.redis.execute("XLEN", keys.log(shard)) for shard in range(self.settings.shards)):
            return False
        self.redis.wipe()
        return True

    def plant_poison(self, shard: int) -> None:
        """An entry that no append wrote, put straight into the log, and counted like any other."""
        stream = self.redis.get(keys.log(shard).encode())
        number = max(stream.last + keys.SHARD_SLOTS if stream else 0, keys.first_id_at(self.redis.now, shard))
        raw = worker.backlog.RawEntry.of(b"%d-0" % number, {b"k": b"m", b"t": b"1", b"b": b"{", b"x": b"", b"a": b""})
        flat = [part for pair in raw.fields.items() for part in pair]
        self.redis.execute("XADD", keys.log(shard), raw.id, *flat)
        self.redis.execute("INCRBY", keys.backlog_bytes(shard), raw.size)
        self.poison.add(raw.id.decode())

    # What clients do

    def say(self) -> str:
        """A text that was never said before."""
        self._said += 1
        return f"text {self._said}\t\\ü"

    def create(self, user: int, title: str | None, key: str) -> None:
        operation = self.history.invoke("create", user, key=key, title=digest(title) if title else "")

        def done(created: Any) -> dict[str, Any]:
            return {"conversation": created.conversation.id, "replayed": created.replayed}

        self._client_call(operation, self.log.create(user, title, key=client_key(key) if key else None), done)

    def append(self, user: int, conversation: int, key: str, *drafts: Draft) -> None:
        (text, role), *also = [(digest(draft.content), draft.role) for draft in drafts]
        operation = self.history.invoke("append", user, conversation=conversation, key=key, text=text, role=role, also=also)

        def done(appended: list[Appended]) -> dict[str, Any]:
            return {"messages": items(_message(one.message, one.committed) for one in appended), "replayed": appended[0].replayed}

        self._client_call(operation, self.log.append_all(user, conversation, drafts, key=client_key(key) if key else None), done)

    def rename(self, user: int, conversation: int, title: str) -> None:
        operation = self.history.invoke("rename", user, conversation=conversation, title=digest(title))
        self._client_call(operation, self.log.rename(user, conversation, title), lambda _: {})

    def delete(self, user: int, conversation: int) -> None:
        operation = self.history.invoke("delete", user, conversation=conversation)
        self._client_call(operation, self.log.delete(user, conversation), lambda _: {})

    def page(self, user: int, conversation: int, before: int | None, after: int | None, limit: int) -> None:
        operation = self.history.invoke("page", user, conversation=conversation, before=before, after=after, limit=limit)

        def done(page: reads.HistoryPage) -> dict[str, Any]:
            return {
                "messages": items(_message(message, page.committed) for message in page.messages),
                "has_older": page.has_older,
                "has_newer": page.has_newer,
            }

        self._client_call(operation, reads.read_history(self.log, user, conversation, Page(limit, before, after)), done)

    def list_all(self, user: int) -> None:
        operation = self.history.invoke("list", user, limit=100)

        def done(page: reads.ConversationList) -> dict[str, Any]:
            listed = [Listed(one.id, digest(one.title) if one.title else "", rfc3339(one.updated)) for one in page.items]
            return {"conversations": listed, "more": page.next_cursor or ""}

        self._client_call(operation, reads.list_conversations(self.log, user, 100, None), done)

    def probe(self, user: int, conversation: int) -> None:
        """Another user's, appended to and read."""
        for name, call in (
            ("append", self.log.append(user, conversation, "user", self.say())),
            ("page", reads.read_history(self.log, user, conversation, Page(10, None, None))),
        ):
            self._client_call(self.history.invoke("probe", user, conversation=conversation, title=name), call, lambda _: {})

    def flush(self, *shards: int) -> None:
        self.start(f"flush {shards}", lambda: worker.flush.flush_shards(self._client, self.settings, shards))

    def _client_call(self, operation: Operation, call: Coroutine[Any, Any, Any], done: Callable[[Any], dict[str, Any]]) -> None:
        def run() -> None:
            try:
                answer = _result(call)
            except NotFound:
                self.history.end(operation, "fail", status=404)
            except Never:
                self.history.end(operation, "fail", status=422)
            except (TryAgainLater, TimeoutError):
                self.history.end(operation, "info", status=503)
            else:
                self.history.end(operation, "ok", **done(answer))

        self.start(f"{operation.kind} {operation.op}", run)

    # The end

    def settle(self) -> None:
        """Everything works; whoever is there goes on, one step each, until nobody is left."""
        self.postgres.up = True
        for _ in range(3000):
            if not self.actors:
                return
            for actor in list(self.actors):
                self.advance(actor)
        raise AssertionError("[13] some of these never end: " + ", ".join(f"{actor.name} ({actor.about})" for actor in self.actors))

    def finish(self) -> list[Violation]:
        """Lets everything come to its end, reads it all, and judges."""
        self.settle()
        self.pass_time(60)  # every lease is over
        for _ in range(200):
            if not self._pending():
                break
            for shard in range(self.settings.shards):
                self.flush(shard)
            self.settle()
        conversations = {one.conversation: one.user for one in self.history.operations if one.kind == "create" and one.outcome == "ok"}
        for number, user in conversations.items():
            self.page(user, number, None, None, 200)
            self.page(user, number, None, 1, 200)
        for user in set(conversations.values()):
            self.list_all(user)
        self.settle()
        return check(self.history.operations, self.final())

    def final(self) -> Final:
        """The state at the end."""
        tables = self.postgres.tables
        return Final(
            conversations=[
                ConversationRow(
                    row["id"],
                    row["user_id"],
                    digest(row["title"]) if row["title"] else "",
                    row["deleted_at"] is not None,
                    row["idempotency_key"],
                )
                for row in tables["conversation"].values()
            ],
            messages=[
                MessageRow(
                    *(row["conversation_id"], row["id"], row["user_id"], row["role"], digest(row["content"])),
                    *(row["status"], row["idempotency_key"]),
                )
                for row in tables["message"].values()
            ],
            dead_letters=[row["entry_id"] for row in tables["dead_letter"].values()],
            poison=self.poison,
            log_entries=self._pending(),
            log_bytes=sum(int(self.redis.execute("GET", keys.backlog_bytes(shard)) or 0) for shard in range(self.settings.shards)),
            lasting_keys=[
                key.decode()
                for key, (_, expires) in self.redis.snapshot().items()
                if not expires and key.rsplit(b":", 1)[1] not in _LASTING
            ],
        )

    def _pending(self) -> int:
        return sum(self.redis.execute("XLEN", keys.log(shard)) for shard in range(self.settings.shards))


_LASTING = (b"log", b"clock", b"committed", b"bytes", b"stats", b"shards")


@contextmanager
def installed() -> Iterator[None]:
    """The stand-ins in the places where the product looks for the real ones."""
    with (
        mock.patch.object(worker.flush, "transaction", _current("transaction")),
        mock.patch.object(worker.flush, "raw_cursor", memory_postgres.raw_cursor),
        mock.patch.object(worker.loading, "transaction", _current("transaction")),
        mock.patch.object(worker.loading, "read_rows", _current("read_rows")),
        mock.patch.object(worker.persist, "INSERT_CHARS_MAX", 2),  # so that several statements insert the messages of some batches
        mock.patch.object(worker.committed, "read_rows", _current("read_rows")),
        mock.patch.object(worker.persist, "execute_values", memory_postgres.execute_values),
        mock.patch.object(worker.pending, "asyncio", _Asyncio),
        mock.patch.object(worker.flush, "log", _Silence()),
        mock.patch.object(worker.pending, "log", _Silence()),
    ):
        yield


def _current(name: str) -> Callable[..., Any]:
    """The Postgres of the world whose actor asks."""

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(_actor().world.postgres, name)(*arguments, **options)

    return call


def _actor() -> Actor:
    actor: Actor = greenlet.getcurrent().actor
    return actor


def _result(call: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine whose every await is a step."""
    try:
        call.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("something waited for a real event loop")


def _message(stored: Any, committed: int) -> dict[str, Any]:
    message: dict[str, Any] = orjson.loads(stored.public(committed))
    return message


def _all_settings() -> dict[str, Any]:
    return {name: field.default for name, field in Settings.model_fields.items() if not field.is_required()} | SETTINGS


# In the places of the product's clients


class _Scripts:
    """In the place of `AsyncScripts`."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def run(self, name: str, script_keys: Sequence[str], arguments: Sequence[Any], *, until: float = math.inf) -> Any:
        world = self._world
        try:
            async with _Asyncio.timeout_at(until):
                return world.step(name, lambda: world.redis.script(scripts.script(name).source, script_keys, arguments), RedisUnavailable)
        except TimeoutError:
            raise TooSlow() from None

    async def transaction(self, name: str, commands: Sequence[Sequence[Any]]) -> Any:
        return self._world.step(name, lambda: self._world.redis.transaction(commands), RedisUnavailable)


class _AsyncClient:
    """In the place of redis-py's asynchronous client, as far as `PendingLog` uses it by itself."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def set(self, key: str, value: str, *, nx: bool, px: int) -> Any:
        return self._run("SET", key, value, "NX", "PX", px)

    async def zrange(self, key: str, start: int, stop: int) -> Any:
        return self._run("ZRANGE", key, start, stop)

    def pipeline(self, *, transaction: bool) -> _Pipeline:
        return _Pipeline(self._run)

    def _run(self, *command: Any) -> Any:
        return self._world.step(command[0], lambda: self._world.redis.execute(*command), RedisUnavailable)


class _Pipeline:
    """Commands that are collected; each is a step when they run, as others' may come between."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._commands: list[tuple[Any, ...]] = []

    async def __aenter__(self) -> _Pipeline:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def hmget(self, *command: Any) -> None:
        self._commands.append(("HMGET", *command))

    async def execute(self) -> list[Any]:
        return [self._run(*command) for command in self._commands]


class _SyncClient:
    """In the place of redis-py's synchronous client, for the worker."""

    def __init__(self, world: World) -> None:
        self._world = world

    def evalsha(self, sha: str, count: int, *rest: Any) -> Any:
        name, source = _scripts_by_sha()[sha]
        return self._step(name, lambda: self._world.redis.script(source, rest[:count], rest[count:]))

    def eval(self, source: str, count: int, *rest: Any) -> Any:
        raise AssertionError("every script is known by its hash")

    def execute_command(self, *command: Any) -> Any:
        return self._step(command[0], lambda: self._world.redis.execute(*command))

    def pipeline(self, *, transaction: bool) -> Any:
        return _SyncPipeline(self)

    def _step(self, about: str, effect: Callable[[], Any]) -> Any:
        return self._world.step(about, effect, RedisUnavailable)


class _SyncPipeline:
    """Commands that are collected; each is a step when they run: others' may come between, and a connection be cut."""

    def __init__(self, client: _SyncClient) -> None:
        self._client = client
        self._commands: list[Callable[[], Any]] = []

    def __enter__(self) -> _SyncPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def delete(self, *names: str) -> None:
        self.execute_command("DEL", *names)

    def xlen(self, name: str) -> None:
        self.execute_command("XLEN", name)

    def execute_command(self, *command: Any) -> None:
        self._commands.append(lambda: self._client.execute_command(*command))

    def evalsha(self, *command: Any) -> None:
        self._commands.append(lambda: self._client.evalsha(*command))

    def hincrby(self, *_: Any) -> None:
        """The worker's counts for /metrics: not a step."""

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        return [run() for run in self._commands]


@lru_cache
def _scripts_by_sha() -> dict[str, tuple[str, str]]:
    folder = Path(scripts.__file__).parent / "lua"
    names = [path.stem for path in folder.glob("*.lua") if path.stem != "common"]
    return {scripts.script(name).sha: (name, scripts.script(name).source) for name in names}


class _Threads:
    """In the place of `DatabaseThreads`."""

    async def run(self, work: Callable[[], Any]) -> Any:
        return work()


class _Task:
    def add_done_callback(self, _: Callable[..., None]) -> None:
        pass


class _Loop:
    def time(self) -> float:
        return _actor().world.seconds

    def create_task(self, work: Coroutine[Any, Any, Any]) -> Any:
        actor = _actor()
        if actor.dead:
            work.close()
            raise Killed
        actor.world.start("background", lambda: _result(work))
        return _Task()


class _Asyncio:
    """In the place of `asyncio` in `worker.pending`: virtual time, and actors for tasks."""

    Task = asyncio.Task

    @staticmethod
    @asynccontextmanager
    async def timeout_at(moment: float) -> AsyncIterator[None]:
        actor = _actor()
        actor.deadlines.append(moment)
        try:
            yield
        finally:
            actor.deadlines.pop()

    @classmethod
    def timeout(cls, seconds: float) -> AbstractAsyncContextManager[None]:
        return cls.timeout_at(_actor().world.seconds + seconds)

    @staticmethod
    async def sleep(seconds: float) -> None:
        world = _actor().world
        world.step("sleep", lambda: world.pass_time(seconds), RedisUnavailable)

    @staticmethod
    def get_running_loop() -> _Loop:
        return _Loop()


class _Silence:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None
