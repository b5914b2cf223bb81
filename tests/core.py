"""Helpers for tests of the core: look at both stores from outside, and drive the real functions step by step."""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar
from unittest import mock

import orjson
import psycopg2
from redis import Redis

from api.dependencies import Page
from api.history import read_history
from worker import backlog, flush, keys
from worker.codec import conversation_body, message_body
from worker.flush import Report, flush_shard
from worker.pending import PendingLog
from worker.settings import Settings, get_settings

T = TypeVar("T")


# What is in the stores


_administrators: dict[str, Any] = {}


def administer(url: str, statement: str, values: Sequence[Any] = ()) -> list[Any]:
    """One statement past all of the product's code, and its rows."""
    connection = _administrators.get(url)
    if connection is None or connection.closed:
        connection = _administrators[url] = psycopg2.connect(url, connect_timeout=10, options="-c statement_timeout=30000")
        connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(statement, values)
        return cursor.fetchall() if cursor.description else []


def dismiss_administrators() -> None:
    """Closes the connections of `administer`."""
    while _administrators:
        _administrators.popitem()[1].close()


def ask(statement: str, *values: Any) -> list[Any]:
    """The rows of a statement (or what it changes) in this test's database."""
    return administer(get_settings().database_url.get_secret_value(), statement, values)


def make_user(email: str | None = None) -> int:
    """A user's row; its id."""
    [(number,)] = ask(
        'INSERT INTO "user" (email, password_hash) VALUES (%s, %s) RETURNING id', email or f"{secrets.token_hex(6)}@example.org", "x"
    )
    return int(number)


def contents(conversation: int) -> list[str]:
    """What Postgres has of a conversation, in the order of ids."""
    return [row[0] for row in ask("SELECT content FROM message WHERE conversation_id = %s ORDER BY id", conversation)]


def dead_letters() -> list[str]:
    """The reasons, in the order of the log."""
    return [row[0] for row in ask("SELECT reason FROM dead_letter ORDER BY id")]


async def shown(log: PendingLog, user: int, conversation: int, **page: int) -> list[str]:
    """What a reader sees now, in the order in which it is shown."""
    found = await read_history(log, user, conversation, Page(**({"limit": 200} | page)))
    ids = [message.id for message in found.messages]
    assert ids == sorted(set(ids)), "out of order, or twice"
    return [text(message.body) for message in found.messages]


def text(body: bytes) -> str:
    return str(orjson.loads(body)["content"])


def fetched(redis: Redis, shard: int, entries_max: int = 5000, bytes_max: int = 1 << 25) -> list[backlog.RawEntry]:
    """What a flush would read of a shard's log."""
    return [entry for part in backlog.fetch(redis, [shard], entries_max, bytes_max, {}) for entry in part[shard]]


def flush_all(redis: Redis, settings: Settings) -> list[Report]:
    """Flushes every shard until nothing is pending."""
    return [flush_shard(redis, settings, shard) for shard in range(settings.shards)]


def assert_clean(redis: Redis, settings: Settings) -> None:
    """Nothing is pending and nothing says so: logs empty, no bytes counted, everything of conversations and users on its way out."""
    for one in backlog.look(redis, settings.shards):
        assert (one.entries, one.bytes) == (0, 0), one
    for name in (key.decode() for key in redis.scan_iter("ck:*", count=1000)):
        match = re.fullmatch(r"ck:\{s\d\d\}:(\w+)(?::(\d+))?", name)
        kind = match[1] if match else name
        if kind == "c":
            assert redis.hget(name, "l") in (b"0", None), f"{name} is still pending"
        if kind in ("c", "m", "k", "n", "mm", "cd", "load", "loadu", "seed", "turn", "wake"):
            assert redis.pttl(name) != -1, f"{name} never expires"
        assert kind not in ("u", "users"), f"{name}: a user still has something pending"


def forget(redis: Redis, user: int, conversation: int, settings: Settings) -> bool:
    """What expiry may do at any moment: drops what has an expiry of a conversation and its user; False if there was nothing to drop."""
    shard = keys.shard_of_user(user, settings.shards)
    names = keys.of_conversation(shard, conversation)
    gone = [name for name in (*names, keys.created_keys(shard, user)) if redis.pttl(name) >= 0]
    return bool(gone and redis.delete(*gone))


# What somebody plants in the log


def plant(
    redis: Redis, shard: int, entry_id: str = "*", *, k: Any = "m", t: Any = 1_800_000_000_000_000, b: Any = b"", x: Any = "", **more: Any
) -> bytes:
    """An entry put straight into the log; its id."""
    return redis.xadd(keys.log(shard), {"k": k, "t": t, "b": b, "x": x, "a": "", **more}, id=entry_id)


def message_entry(user: int, conversation: int, content: str = "planted", role: str = "user", status: str = "complete") -> bytes:
    return message_body(conversation, user, role, content, status)


def conversation_entry(user: int, conversation: int, title: str | None = None) -> bytes:
    return conversation_body(conversation, user, title)


# Step by step


class Killed(BaseException):
    """What kill -9 is to the code that it strikes: nothing more is done, and the server ends the transaction."""


class Flusher:
    """A real flush in a thread of its own that stops before each of its steps (see `gates`) until it is told to go on."""

    STEPS = ("wake", "lock", "fetch", "persist", "commit", "trim")
    _of_thread = threading.local()

    def __init__(self, work: Callable[[], Any], stops: tuple[str, ...] = STEPS) -> None:
        self._work = work
        self._stops = stops
        self._orders: SimpleQueue[bool] = SimpleQueue()
        self._arrivals: SimpleQueue[str | None] = SimpleQueue()
        self.at: str | None = ""
        self.result: Any = None
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    @classmethod
    def gate(cls, step: str) -> None:
        """The thread of a flusher waits here before this step; any other passes."""
        flusher: Flusher | None = getattr(cls._of_thread, "flusher", None)
        if flusher is not None and step in flusher._stops:
            flusher._arrivals.put(step)
            if not flusher._orders.get():
                raise Killed()

    def step(self) -> str | None:
        """Does the step that it stands before; answers the next one, or None at the end."""
        if self.at is not None:
            self._orders.put(True)
            self._wait()
        return self.at

    def until(self, step: str) -> None:
        """Does everything before this step."""
        while self.at not in (step, None):
            self.step()
        assert self.at == step, f"it never came to {step}"

    def finish(self) -> Any:
        """Does all the rest, and answers what the flush answered."""
        while self.at is not None:
            self.step()
        if self.failure is not None:
            raise self.failure
        return self.result

    def kill(self) -> None:
        """It ends here, before the step that it stands before."""
        if self.at is not None:
            self._orders.put(False)
            self._wait()

    def _wait(self) -> None:
        self.at = self._arrivals.get(timeout=30)

    def _run(self) -> None:
        self._of_thread.flusher = self
        try:
            self.result = self._work()
        except BaseException as exc:  # noqa: BLE001 - the test asks for it
            self.failure = exc
        finally:
            self._arrivals.put(None)


@contextmanager
def gates() -> Iterator[None]:
    """The steps of a flush become places where a `Flusher` stops. Nothing else is changed."""

    def gated(step: str, function: Callable[..., T], after: str = "") -> Callable[..., T]:
        def call(*arguments: Any, **named: Any) -> T:
            Flusher.gate(step)
            result = function(*arguments, **named)
            if after:
                Flusher.gate(after)
            return result

        return call

    with (
        mock.patch.object(backlog, "clear_wakes", gated("wake", backlog.clear_wakes)),
        mock.patch.object(flush, "try_lock", gated("lock", flush.try_lock)),
        mock.patch.object(backlog, "fetch", gated("fetch", backlog.fetch)),
        mock.patch.object(flush, "persist_batch", gated("persist", flush.persist_batch, after="commit")),
        mock.patch.object(backlog, "trim", gated("trim", backlog.trim)),
    ):
        yield


class Halves:
    """Runs a coroutine of the API up to where it asks Postgres, and later to its end: what is between is the test's.

    `threads` stands in for the log's; only work of the coroutine's own task is held up, before it begins and after it is done.
    """

    def __init__(self, log: PendingLog) -> None:
        self._log = log
        self._run = log.threads.run
        self._held: dict[asyncio.Task[Any], tuple[asyncio.Event, asyncio.Event]] = {}
        log.threads.run = self._gated  # type: ignore[method-assign]

    async def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begins, and goes on until Postgres is about to be asked (or it is done without)."""
        task = asyncio.get_running_loop().create_task(work)
        self._held[task] = asyncio.Event(), asyncio.Event()
        await self._arrive(task)
        return task

    async def step(self, task: asyncio.Task[Any]) -> None:
        """Asks Postgres; the next step is everything after."""
        self._held[task][1].set()
        await self._arrive(task)

    async def finish(self, task: asyncio.Task[T]) -> T:
        while not task.done():
            await self.step(task)
        return await task

    async def _arrive(self, task: asyncio.Task[Any]) -> None:
        arrived = asyncio.get_running_loop().create_task(self._held[task][0].wait())
        await asyncio.wait({task, arrived}, return_when=asyncio.FIRST_COMPLETED, timeout=30)
        arrived.cancel()
        self._held[task][0].clear()

    async def _gated(self, work: Callable[[], T]) -> T:
        task = asyncio.current_task()
        if task not in self._held:
            return await self._run(work)
        await self._hold(task)
        result = await self._run(work)
        await self._hold(task)
        return result

    async def _hold(self, task: asyncio.Task[Any]) -> None:
        arrived, go_on = self._held[task]
        arrived.set()
        await go_on.wait()
        go_on.clear()
