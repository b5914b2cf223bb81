"""Redis or Valkey: the clients, and whether the server keeps what it acknowledges.

redis-py 8 repeats a command up to ten times after a lost reply. Here nothing is repeated (`_NO_RETRY`): a script whose reply was lost may
have run, and only a retry key tells. A connection that the server has closed is noticed when it is taken from the pool and opened again.
It also sends with `asyncio.wait_for`, which on Python 3.11 loses a cancellation that arrives at that moment (of 3,000 tasks that were
cancelled at random while they sent PINGs, 1,057 went on): a task that is stopped, and a deadline, could be overheard. `_Cancellable` sends
without it.

`DurabilityMonitor` looks at the server every `REFRESH_SECONDS`, and at each new connection before its first command: a server that came
back with other settings cannot be written to without having been looked at.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from redis import BlockingConnectionPool, Redis
from redis.asyncio import BlockingConnectionPool as AsyncBlockingConnectionPool
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from worker.errors import ConfigurationError, NotDurable, RedisUnavailable
from worker.settings import Settings

T = TypeVar("T")

REFRESH_SECONDS = 2.0
STALE_SECONDS = 3 * REFRESH_SECONDS
"""An answer older than this proves nothing."""
CONNECTIONS_MAX = 64
HEALTH_CHECK_SECONDS = 15
"""A connection that was idle longer is asked before it is used: one that was cut silently then fails before a write is on its way."""

MEMORY_FULL = 0.9
"""Of Redis's `maxmemory`: what is above belongs to those who make room. At the limit itself no flush can be asked for (a wake-up and a
task are writes), so a log that has filled it would never get shorter."""

_NO_RETRY = 0
log = structlog.get_logger(__name__)


def connect(
    settings: Settings, *, name: str = "chatkeep-api", timeout_seconds: float | None = None, monitor: DurabilityMonitor | None = None
) -> AsyncRedis:
    """An asynchronous client; with `monitor`, each new connection is looked at before it is used. Nothing connects yet."""
    options = _options(settings, name, timeout_seconds) | {"retry": AsyncRetry(NoBackoff(), _NO_RETRY)}
    if monitor is not None:
        options["redis_connect_func"] = monitor.inspect
    pool = _pool(AsyncBlockingConnectionPool.from_url, settings, options)
    pool.connection_class = type("Connection", (_Cancellable, pool.connection_class), {})
    return AsyncRedis.from_pool(pool)


def connect_sync(settings: Settings, *, name: str = "chatkeep-worker", timeout_seconds: float | None = None) -> Redis:
    """A synchronous client. One for each process, opened after a fork."""
    options = _options(settings, name, timeout_seconds) | {"retry": Retry(NoBackoff(), _NO_RETRY)}
    return Redis.from_pool(_pool(BlockingConnectionPool.from_url, settings, options))


def _options(settings: Settings, name: str, timeout_seconds: float | None) -> dict[str, Any]:
    seconds = timeout_seconds or settings.redis_timeout_seconds
    return {
        "socket_timeout": seconds,
        "socket_connect_timeout": seconds,
        "timeout": seconds,  # for a free connection
        "max_connections": CONNECTIONS_MAX,
        "socket_keepalive": True,
        "health_check_interval": HEALTH_CHECK_SECONDS,
        "decode_responses": False,
        "protocol": 2,  # with 3, redis-py asks for notifications that neither Valkey nor Redis 6.2 knows
        "client_name": name,
    }


def _pool(from_url: Callable[..., Any], settings: Settings, options: dict[str, Any]) -> Any:
    url = settings.redis_url.get_secret_value()
    if url.startswith("unix://"):
        options.pop("socket_keepalive")
    try:
        pool = from_url(url, **options)
        pool.connection_class(**pool.connection_kwargs)  # does not connect; an option that it does not know fails here
    except (ValueError, TypeError):
        message = "REDIS_URL is not a Redis address: expected redis://:password@host:6379/0, rediss://… or unix:///path/to/socket"
        raise ConfigurationError(message) from None
    return pool


async def answered(asked: Awaitable[T], seconds: float) -> T:
    """Redis's answer to a plain command; raises `RedisUnavailable` where there is none in time."""
    try:
        async with asyncio.timeout(seconds):
            return await asked
    except (TimeoutError, OSError, RedisError) as exc:
        raise RedisUnavailable() from exc


class _Cancellable(AbstractConnection):
    """Put before redis-py's connection classes; see above. Its own time-out bounds the same: connecting, a health check and sending."""

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        seconds, self.socket_timeout = self.socket_timeout, None  # with None, redis-py sends without wait_for
        try:
            async with asyncio.timeout(seconds):
                await super().send_packed_command(command, check_health)
        except TimeoutError:
            await self.disconnect(nowait=True)
            raise RedisTimeoutError("Timeout writing to socket") from None
        except RuntimeError as exc:  # uvloop's word for a transport that is closed
            await self.disconnect(nowait=True)
            raise RedisConnectionError("Connection closed while writing to it") from exc
        finally:
            self.socket_timeout = seconds


# Durability


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that has to be so; `detail` says what is not, and what to do."""

    name: str
    ok: bool
    detail: str | None = None


KEEPS_WRITES = ("append_only_file", "fsync_always", "no_eviction")
"""Without these an acknowledged write can be lost. (Out of memory, Redis refuses by itself.)"""
CHECKS = ("redis", *KEEPS_WRITES, "memory")

_QUESTIONS = (
    ("CONFIG", "GET", "appendonly"),
    ("CONFIG", "GET", "appendfsync"),
    ("CONFIG", "GET", "no-appendfsync-on-rewrite"),
    ("CONFIG", "GET", "maxmemory-policy"),
    ("CONFIG", "GET", "maxmemory"),
    ("INFO", "persistence"),
    ("INFO", "memory"),
    ("INFO", "replication"),
)
"""One parameter each: Redis 6.2 takes no more at once."""


async def durability(client: AsyncRedis, settings: Settings) -> tuple[Check, ...]:
    """Asks the server; a server that does not answer in time is an answer too (the first check fails)."""
    try:
        async with asyncio.timeout(settings.redis_timeout_seconds):
            connection: AbstractConnection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py's decorator hides the type
            try:
                return judge(await _ask(connection))
            except BaseException:  # half of the answers may still be on their way
                await connection.disconnect(nowait=True)
                raise
            finally:
                await client.connection_pool.release(connection)
    except (TimeoutError, OSError, RedisError) as exc:
        return unreachable(exc)


def judge(answers: list[Any]) -> tuple[Check, ...]:
    """What the server's answers mean."""
    told: dict[str, str] = {}
    for question, answer in zip(_QUESTIONS, answers, strict=True):
        if not isinstance(answer, ResponseError):
            told.update(_pairs(answer) if question[0] == "CONFIG" else _info(answer))
    return (_role(told), _append_only(told), _fsync(told), _eviction(told), _memory(told))


def unreachable(exc: BaseException) -> tuple[Check, ...]:
    """What is known of a server that does not answer."""
    why = "wrong user name or password" if isinstance(exc, AuthenticationError) else f"no answer ({type(exc).__name__})"
    return Check("redis", False, why), *(Check(name, False, "not known: Redis does not answer") for name in CHECKS[1:])


async def _ask(connection: AbstractConnection) -> list[Any]:
    await connection.send_packed_command(connection.pack_commands(_QUESTIONS), check_health=False)
    return [await _answer(connection) for _ in _QUESTIONS]


async def _answer(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response(disconnect_on_error=False)
    except ResponseError as exc:  # a managed Redis may not allow CONFIG
        if str(exc).startswith("LOADING"):
            raise
        return exc


def _role(told: Mapping[str, str]) -> Check:
    if told.get("loading", "0") != "0":
        return Check("redis", False, "Redis is still loading its append-only file")
    if told.get("role", "master") != "master":
        return Check("redis", False, "REDIS_URL leads to a replica; it must be the primary")
    return Check("redis", True)


def _append_only(told: Mapping[str, str]) -> Check:
    if told.get("appendonly", "yes" if told.get("aof_enabled") == "1" else "no") != "yes":
        return Check("append_only_file", False, "set appendonly to yes")
    if told.get("aof_last_write_status", "ok") != "ok":
        return Check("append_only_file", False, "the last write to the append-only file failed: is the disk full?")
    return Check("append_only_file", True)


def _fsync(told: Mapping[str, str]) -> Check:
    if "appendfsync" not in told:
        return Check("fsync_always", False, "not known: this Redis does not answer CONFIG GET")
    if told["appendfsync"] != "always":
        return Check("fsync_always", False, "set appendfsync to always")
    if told.get("no-appendfsync-on-rewrite", "no") != "no":
        return Check("fsync_always", False, "set no-appendfsync-on-rewrite to no")
    return Check("fsync_always", True)


def _eviction(told: Mapping[str, str]) -> Check:
    policy = told.get("maxmemory-policy", told.get("maxmemory_policy", "not known"))
    return Check("no_eviction", True) if policy == "noeviction" else Check("no_eviction", False, "set maxmemory-policy to noeviction")


def _memory(told: Mapping[str, str]) -> Check:
    limit, used = (_number(told.get(name, "")) for name in ("maxmemory", "used_memory"))
    if 0 < limit * MEMORY_FULL <= used:
        return Check("memory", False, f"Redis holds {MEMORY_FULL:.0%} of its maxmemory, and nothing more is accepted; is anything flushed?")
    return Check("memory", True)


def _pairs(answer: Any) -> dict[str, str]:
    flat = [part for pair in answer.items() for part in pair] if isinstance(answer, dict) else list(answer)
    return dict(zip(map(_text, flat[::2]), map(_text, flat[1::2]), strict=True))


def _info(answer: Any) -> dict[str, str]:
    return dict(line.split(":", 1) for line in _text(answer).splitlines() if ":" in line and not line.startswith("#"))


def _number(value: str) -> int:
    return int(value) if value.isascii() and value.isdigit() else 0


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


class DurabilityMonitor:
    """Knows whether Redis keeps what it acknowledges, and says so without asking: `check` is called around every write."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._checks: tuple[Check, ...] = ()
        self._failed: dict[str, Check] = {}
        self._looked_at = float("-inf")
        self._client: AsyncRedis | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._looking = asyncio.Lock()

    @property
    def unsafe(self) -> bool:
        """Whether the operator accepts a Redis that can lose acknowledged writes."""
        return self._settings.unsafe_durability

    async def start(self, client: AsyncRedis) -> None:
        """Looks once, and then again and again until `close`."""
        await self.refresh_from(client)
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def refresh_from(self, client: AsyncRedis) -> tuple[Check, ...]:
        """Looks once, through this client from now on."""
        self._client = client
        return await self.refresh()

    async def close(self) -> None:
        """Stops looking; a look that is under way has its time-out."""
        self._closing.set()
        if self._task is not None:
            await self._task

    def check(self) -> None:
        """Raises `RedisUnavailable` or `NotDurable` unless a recent look found everything in order.

        Call it before a write, and again before the acknowledgement: the write may have opened a connection to a server that came back
        with other settings.
        """
        if self._clock() - self._looked_at > STALE_SECONDS or not self._checks:
            raise RedisUnavailable()
        if not self._failed:
            return
        if "redis" in self._failed:
            raise RedisUnavailable()
        if not self.unsafe and (lost := [self._failed[name] for name in KEEPS_WRITES if name in self._failed]):
            raise NotDurable(f"Redis could lose what it acknowledges ({lost[0].name}: {lost[0].detail}), so nothing is accepted.")

    async def refresh(self, max_age_seconds: float = 0.0) -> tuple[Check, ...]:
        """The checks, not older than this; concurrent callers share one look."""
        asked_at = self._clock()
        async with self._looking:
            if self._client is None:
                raise RuntimeError("the monitor has not been started")
            if self._looked_at < asked_at - max_age_seconds:
                self._note(await durability(self._client, self._settings))
            return self._checks

    async def inspect(self, connection: AbstractConnection) -> None:
        """Opens a new connection for redis-py (`redis_connect_func`), and looks at the server through it."""
        await connection.on_connect()
        self._note(judge(await _ask(connection)))

    def _note(self, checks: tuple[Check, ...]) -> None:
        before = list(self._failed)
        self._checks, self._looked_at = checks, self._clock()
        self._failed = {check.name: check for check in checks if not check.ok}
        if before != list(self._failed):
            log.warning("redis checks changed", failed=list(self._failed), unsafe=self.unsafe)

    async def _watch(self) -> None:
        while True:
            try:
                async with asyncio.timeout(REFRESH_SECONDS):
                    await self._closing.wait()
                return
            except TimeoutError:
                await self.refresh()
