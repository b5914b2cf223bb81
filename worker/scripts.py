"""Runs the Lua scripts of `worker/lua/`: asynchronously for the API, synchronously for the worker.

The API's calls of one turn of the event loop share one pipeline: under load that is one write and one read of the socket for many
appends, and one fsync for all of them (a prototype did 1.2 times the throughput of one call each).

A call is never repeated after a lost reply, because the outcome is unknown; only NOSCRIPT, which is an answer, is. redis-py's own retries
are off (`worker/redis.py`): left on, one lost reply was seen to run a script four times.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import structlog
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import NoScriptError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError

from worker import keys
from worker.codec import ENTRY_OVERHEAD_BYTES
from worker.errors import BacklogFull, ChatkeepError, NotDurable, RedisUnavailable
from worker.settings import SHARD_SLOTS

log = structlog.get_logger(__name__)

Argument = str | bytes | int | float
_FOLDER = Path(__file__).parent / "lua"
LONGEST_LEASE_MS = 60_000
EVENTS_KEPT = 1000
"""Of a user's event stream, about."""
_CONSTANTS = (
    f"local EPOCH, TICK, SLOTS = {keys.EPOCH_MICROSECONDS}, {keys.TICK_MICROSECONDS}, {SHARD_SLOTS}\n"
    f"local OVERHEAD, LONGEST_LEASE_MS, EVENTS_KEPT = {ENTRY_OVERHEAD_BYTES}, {LONGEST_LEASE_MS}, {EVENTS_KEPT}\n"
)


@dataclass(frozen=True, slots=True)
class Script:
    """One Lua script with what is put before it."""

    source: str
    sha: str


@lru_cache
def script(name: str) -> Script:
    """The script `lua/<name>.lua`."""
    source = _CONSTANTS + (_FOLDER / "common.lua").read_text() + (_FOLDER / f"{name}.lua").read_text()
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def run(client: Redis, name: str, script_keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
    """Runs a script and returns its raw answer; raises a `ChatkeepError` for anything that went wrong."""
    chosen = script(name)
    try:
        try:
            return client.evalsha(chosen.sha, len(script_keys), *script_keys, *arguments)
        except NoScriptError:
            return client.eval(chosen.source, len(script_keys), *script_keys, *arguments)
    except RedisError as exc:
        raise translate(exc) from exc


def translate(exc: Exception) -> ChatkeepError:
    """A driver's error in our words. Whatever Redis refuses to do because it could not keep it is `NotDurable`, not an outage."""
    text = str(exc)  # an error that a script met in a command has the script's words before it
    if isinstance(exc, OutOfMemoryError) or "OOM command not allowed" in text:
        return BacklogFull("Redis is out of memory; nothing more is accepted until it has some again.")
    refused = "READONLY" if isinstance(exc, ReadOnlyError) else next((code for code in _REFUSALS if code in text), None)
    if refused and isinstance(exc, ResponseError):
        return NotDurable(f"Redis refuses writes ({refused}).")
    if isinstance(exc, ResponseError) and not text.startswith(_PASSING):
        # It will again: a bug of ours, a right that is missing, a damaged key.
        log.error("redis refused a command", code=text.partition(" ")[0])
    return RedisUnavailable()


_REFUSALS = ("MISCONF", "READONLY", "NOREPLICAS")
_PASSING = ("LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")


@dataclass(slots=True)
class _Call:
    command: tuple[Argument, ...]
    name: str
    answer: asyncio.Future[Any] = field(repr=False)


class AsyncScripts:
    """Runs scripts on an asynchronous client, those of one turn of the event loop in one pipeline."""

    def __init__(self, client: AsyncRedis, timeout_seconds: float) -> None:
        self._client = client
        self._timeout_seconds = timeout_seconds
        self._waiting: list[_Call] = []
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, name: str, script_keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Runs a script and returns its raw answer.

        Raises `RedisUnavailable` after `timeout_seconds` at the latest; the script may still run then. Cancelling the caller does not
        stop the script either: it only stops waiting.
        """
        loop = asyncio.get_running_loop()
        call = _Call(("EVALSHA", script(name).sha, len(script_keys), *script_keys, *arguments), name, loop.create_future())
        if not self._waiting:
            loop.call_soon(self._send)
        self._waiting.append(call)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await call.answer
        except TimeoutError as exc:
            raise RedisUnavailable() from exc

    async def close(self) -> None:
        """Waits for what is under way (each has its own time-out)."""
        await asyncio.gather(*self._running, return_exceptions=True)

    def _send(self) -> None:
        calls, self._waiting = self._waiting, []
        task = asyncio.get_running_loop().create_task(self._execute(calls))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _execute(self, calls: list[_Call]) -> None:
        try:
            answers = await self._pipeline([call.command for call in calls])
            unknown = [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
            if unknown:  # Redis was restarted: EVAL brings the source along, and the server remembers it
                again = await self._pipeline([("EVAL", script(calls[i].name).source, *calls[i].command[2:]) for i in unknown])
                for i, answer in zip(unknown, again, strict=True):
                    answers[i] = answer
        except (RedisError, OSError) as exc:
            answers = [exc] * len(calls)
        for call, answer in zip(calls, answers, strict=True):
            _settle(call.answer, answer)

    async def _pipeline(self, commands: list[tuple[Argument, ...]]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return await pipeline.execute(raise_on_error=False)


def _settle(answer: asyncio.Future[Any], value: Any) -> None:
    if answer.done():  # the caller gave up
        return
    if isinstance(value, Exception):
        error = translate(value)
        error.__cause__ = value
        answer.set_exception(error)
    else:
        answer.set_result(value)
