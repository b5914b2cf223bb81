"""Runs the Lua scripts of `worker/lua/`: asynchronously for the API, synchronously for the worker. And transactions, for the API's reads.

The API's calls share one connection (`worker/multiplexed.py`), those of one turn of the event loop one write: under load that is one
write and one read of the socket for many appends, and one fsync for all of them.

A call is never repeated after a lost reply, because the outcome is unknown; only NOSCRIPT, which is an answer, is. redis-py's own retries
are off (`worker/redis.py`): left on, one lost reply was seen to run a script four times.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import structlog
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import NoScriptError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError

from worker import crashpoints, keys
from worker.codec import ENTRY_OVERHEAD_BYTES
from worker.errors import BacklogFull, ChatkeepError, NotDurable, RedisUnavailable, TooSlow
from worker.multiplexed import Answered, Argument, Command, Multiplexed, Packed, PackedCommands, pack, pack_command
from worker.redis import HEALTH_CHECK_SECONDS
from worker.settings import SHARD_SLOTS

log = structlog.get_logger(__name__)

_FOLDER = Path(__file__).parent / "lua"
SEND_AT = 8
"""Calls that do not wait for the end of the turn of the event loop: Redis fsyncs them while this process goes on with the others. With 16
clients they would else take turns, each waiting for the other: 1.24 times the dict's throughput instead of 1.13."""
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
    crashpoints.visit("before:" + name)
    try:
        try:
            answer = client.evalsha(chosen.sha, len(script_keys), *script_keys, *arguments)
        except NoScriptError:
            answer = client.eval(chosen.source, len(script_keys), *script_keys, *arguments)
    except RedisError as exc:
        raise translate(exc) from exc
    crashpoints.visit("after:" + name)
    return answer


def run_all(client: Redis, name: str, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]) -> list[Any]:
    """Runs a script for each of these keys and arguments, in one round trip; raises as `run` does, and then any of them may have run."""
    chosen = script(name)
    crashpoints.visit("before:" + name)
    try:
        pipeline = client.pipeline(transaction=False)
        for script_keys, arguments in calls:
            pipeline.evalsha(chosen.sha, len(script_keys), *script_keys, *arguments)
        answers: list[Any] = pipeline.execute(raise_on_error=False)
        for i, (script_keys, arguments) in enumerate(calls):
            if isinstance(answers[i], NoScriptError):
                answers[i] = client.eval(chosen.source, len(script_keys), *script_keys, *arguments)
            elif isinstance(answers[i], RedisError):
                raise answers[i]
    except RedisError as exc:
        raise translate(exc) from exc
    crashpoints.visit("after:" + name)
    return answers


def translate(exc: BaseException) -> ChatkeepError:
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
    name: str
    keys: int
    count: int
    """Of keys and arguments."""
    rest: bytes
    """They, packed."""
    answer: asyncio.Future[Any] = field(repr=False)

    def wire(self, *, with_source: bool = False) -> bytes:
        return _head(self.name, self.keys, self.count, with_source) + self.rest


@lru_cache(512)
def _head(name: str, keys: int, count: int, with_source: bool) -> bytes:
    """What a call begins with."""
    chosen = script(name)
    command = ("EVAL", chosen.source, keys) if with_source else ("EVALSHA", chosen.sha, keys)
    return b"*%d\r\n%b" % (len(command) + count, pack(command))


@dataclass(slots=True)
class _Transaction:
    """Commands between MULTI and EXEC. The answers before EXEC's only say whether a command was queued."""

    commands: Sequence[Command]
    answer: asyncio.Future[Any] = field(repr=False)
    refused: Exception | None = None
    """The first that was not queued, and why: EXEC will only say that there was one."""

    def wire(self) -> bytes:
        commands = self.commands if isinstance(self.commands, PackedCommands) else PackedCommands(self.commands)
        return b"".join((_MULTI, commands.wire, _EXEC))

    def queued(self, answer: Any) -> None:
        if self.refused is None and isinstance(answer, Exception):
            self.refused = answer

    def result(self, answer: Any) -> Any:
        """The answers out of EXEC's, or the error that is among them: it stands where the data would, and must not be taken for it."""
        if self.refused is not None or isinstance(answer, Exception):
            return self.refused or answer
        if not isinstance(answer, list):
            return ResponseError("EXECABORT")
        return next((part for part in answer if isinstance(part, Exception)), answer)


_MULTI, _EXEC = pack_command(("MULTI",)), pack_command(("EXEC",))


class AsyncScripts:
    """Runs scripts and transactions on a connection of its own, opened when it is first needed; those of one turn of the event loop in one
    write."""

    def __init__(self, client: AsyncRedis, timeout_seconds: float) -> None:
        self._client = client
        self._timeout_seconds = timeout_seconds
        self._connection: Multiplexed | None = None
        self._opening: asyncio.Task[None] | None = None
        self._unsent: list[_Call | _Transaction] = []
        self._sent: set[asyncio.Future[Any]] = set()

    def run(
        self, name: str, script_keys: Sequence[Argument], arguments: Sequence[Argument], *, until: float = math.inf
    ) -> Coroutine[Any, Any, Any]:
        """Runs a script and returns its raw answer. (Keys that are `Packed` are not packed again.)

        Raises `RedisUnavailable` after `timeout_seconds` at the latest, and `TooSlow` at `until` (by the loop's clock); the script may
        still run then. Cancelling the caller does not stop the script either: it only stops waiting.
        """
        keys_wire = script_keys.wire if isinstance(script_keys, Packed) else pack(script_keys)
        count = len(script_keys)
        future = asyncio.get_running_loop().create_future()
        return self._answer(name, _Call(name, count, count + len(arguments), keys_wire + pack(arguments), future), until)

    async def transaction(self, name: str, commands: Sequence[Command]) -> list[Any]:
        """Runs plain commands as one step and returns their answers; `name` is what crash points call it. Raises as `run` does.

        For long answers: of those that a script gives, each part is made into a Lua value and back.
        """
        call = _Transaction(commands, asyncio.get_running_loop().create_future())
        answers: list[Any] = await self._answer(name, call)
        return answers

    async def _answer(self, name: str, call: _Call | _Transaction, until: float = math.inf) -> Any:
        crashpoints.visit("before:" + name)
        loop = call.answer.get_loop()
        self._unsent.append(call)
        if not self._sent or len(self._unsent) >= SEND_AT:  # while Redis has nothing to do, there is no company worth waiting for
            self._send()
        elif len(self._unsent) == 1:
            loop.call_soon(self._send)
        last = loop.time() + self._timeout_seconds
        # One timer for both: with `asyncio.timeout`, which has to watch the task, each takes 6 µs instead of 2.
        timer = loop.call_at(last, self._lost, call) if last <= until else loop.call_at(until, _settle, call.answer, TooSlow())
        try:
            answer = await call.answer
        finally:
            timer.cancel()
        crashpoints.visit("after:" + name)
        return answer

    async def close(self) -> None:
        """Waits for what is under way (each has its own time-out), then closes the connection."""
        if self._opening is not None:
            await asyncio.wait({self._opening}, timeout=self._timeout_seconds)
        if self._opening is not None:
            self._opening.cancel()
        if self._sent:
            await asyncio.wait(self._sent, timeout=self._timeout_seconds)
        if self._connection is not None:
            self._connection.abort()

    def _lost(self, call: _Call | _Transaction) -> None:
        """The server has had its time."""
        if call.answer in self._sent and self._connection is not None:  # answers come in order: nobody behind it would get his in time
            self._connection.abort()
        _settle(call.answer, TimeoutError())

    def _send(self) -> None:
        connection = self._connection
        if connection is not None and not connection.lost and connection.idle_seconds < HEALTH_CHECK_SECONDS:
            self._send_on(connection)
        elif self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())

    def _send_on(self, connection: Multiplexed) -> None:
        calls = [call for call in self._unsent if not call.answer.done()]  # the others were given up before anything was sent
        self._unsent = []
        if not calls:
            return
        self._sent.update(call.answer for call in calls)
        commands, answered = [], list[Answered]()
        for call in calls:
            commands.append(call.wire())
            if isinstance(call, _Call):
                answered.append(partial(self._answered, connection, call))
            else:
                answered += (*(call.queued,) * (1 + len(call.commands)), partial(self._executed, call))
        connection.send(b"".join(commands), answered)

    def _answered(self, connection: Multiplexed, call: _Call, answer: Any) -> None:
        if isinstance(answer, ResponseError) and str(answer).startswith("NOSCRIPT"):
            # Redis was restarted: EVAL brings the source along, and the server remembers it.
            connection.send(call.wire(with_source=True), [partial(self._answered, connection, call)])
            return
        self._sent.discard(call.answer)
        _settle(call.answer, answer)

    def _executed(self, call: _Transaction, answer: Any) -> None:
        self._sent.discard(call.answer)
        _settle(call.answer, call.result(answer))

    async def _open(self) -> None:
        """Finds out whether a connection that was idle still works, or opens another; then sends what has gathered."""
        try:
            kept = self._connection
            if kept is None or kept.lost or not await kept.ping(self._timeout_seconds):
                if kept is not None:
                    kept.abort()
                self._connection = kept = await Multiplexed.open(self._client)
            self._send_on(kept)
        except (RedisError, OSError, asyncio.CancelledError) as exc:  # the last: `close` has waited long enough
            calls, self._unsent = self._unsent, []
            for call in calls:
                _settle(call.answer, exc)
        finally:
            self._opening = None


def _settle(answer: asyncio.Future[Any], value: Any) -> None:
    if answer.done():  # the caller gave up
        return
    if isinstance(value, BaseException):
        if not isinstance(value, ChatkeepError):
            value, cause = translate(value), value
            value.__cause__ = cause
        answer.set_exception(value)
    else:
        answer.set_result(value)
