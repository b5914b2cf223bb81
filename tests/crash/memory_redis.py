"""A Redis in this process, for the model: a dictionary, a clock that the model sets, and the real scripts in a real Lua 5.1.

It knows the commands that `worker/` uses and no other: an unknown one raises, so that the model never passes by ignoring something.
`test_stand_ins.py` runs the same random calls over it and over a real Valkey, and compares answers and keys.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import lupa.lua51 as lupa

Value = Any
"""bytes (a string), dict (a hash), `Stream`, or `Ranks` (a sorted set)."""


class CommandError(Exception):
    """What Redis answers with a minus sign."""


@dataclass(slots=True)
class Stream:
    """Entries by id, in order; only the first half of an id is ever used here (the second is 0)."""

    ids: list[int] = field(default_factory=list)
    entries: dict[int, list[bytes]] = field(default_factory=dict)
    last: int = 0


class Ranks(dict[bytes, float]):
    """A sorted set."""


class MemoryRedis:
    """One server. `now` is its clock in Unix microseconds."""

    def __init__(self, now: int) -> None:
        self.now = now
        self.keys: dict[bytes, Value] = {}
        self.expiry: dict[bytes, int] = {}
        """When a key ends, in microseconds."""
        self._redis = _table({b"call": self._call, b"pcall": self._pcall})

    def wipe(self) -> None:
        """FLUSHALL, or a lost disk."""
        self.keys.clear()
        self.expiry.clear()

    def execute(self, *command: Any) -> Any:
        """One command, as a client sends it; raises `CommandError`."""
        name, *arguments = (_bytes(part) for part in command)
        return _COMMANDS[name.upper()](self, *arguments)

    def transaction(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """The commands between MULTI and EXEC, and EXEC's answer; raises the first error in it, as `AsyncScripts.transaction` does."""
        answers: list[Any] = []
        for command in commands:
            try:
                answers.append(self.execute(*command))
            except CommandError as exc:
                answers.append(exc)
        if failed := [answer for answer in answers if isinstance(answer, CommandError)]:
            raise failed[0]
        return answers

    def script(self, source: str, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """EVAL."""
        names, values = _table([_bytes(key) for key in keys]), _table([_bytes(value) for value in arguments])
        return _from_lua(_function(source)(names, values, self._redis))

    def get(self, key: bytes) -> Value | None:
        """What is there, unless it has expired."""
        ends = self.expiry.get(key)
        if ends is not None and ends <= self.now:
            del self.keys[key], self.expiry[key]
        return self.keys.get(key)

    def snapshot(self) -> dict[bytes, tuple[Value, bool]]:
        """Every key with its value and whether it expires."""
        return {key: (self.get(key), key in self.expiry) for key in sorted(self.keys) if self.get(key) is not None}

    def _call(self, *command: Any) -> Any:
        return _to_lua(_COMMANDS[command[0].upper()](self, *(_bytes(part) for part in command[1:])))

    def _pcall(self, *command: Any) -> Any:
        try:
            return self._call(*command)
        except CommandError as exc:
            return _table({b"err": str(exc).encode()})

    def put(self, key: bytes, value: Value) -> None:
        """Sets a value and forgets its expiry."""
        self.keys[key] = value
        self.expiry.pop(key, None)

    def made(self, key: bytes, kind: Callable[[], Value]) -> Value:
        """What is there, or a new one."""
        value = self.get(key)
        if value is None:
            value = self.keys[key] = kind()
        return value

    def drop_if_empty(self, key: bytes, value: Value) -> None:
        """An empty hash or sorted set does not exist (an empty stream does)."""
        if not value:
            self.remove(key)

    def remove(self, key: bytes) -> int:
        """DEL of one key."""
        found = self.get(key) is not None
        self.keys.pop(key, None)
        self.expiry.pop(key, None)
        return int(found)


_lua = lupa.LuaRuntime(encoding=None, register_eval=False)
_table = _lua.table_from
_Table = type(_table([]))


@lru_cache
def _function(source: str) -> Any:
    """A script, compiled once; as in Redis, it keeps nothing between calls."""
    return _lua.execute(b"return function(KEYS, ARGV, redis)\n" + source.encode() + b"\nend")


def _to_lua(answer: Any) -> Any:
    if answer is None:
        return False
    if isinstance(answer, list):
        return _table([_to_lua(part) for part in answer])
    if isinstance(answer, str):
        return _table({b"ok": answer.encode()})
    return answer


def _from_lua(answer: Any) -> Any:
    if isinstance(answer, _Table):
        found = []
        for i in range(1, len(answer) + 1):
            if answer[i] is None:
                break
            found.append(_from_lua(answer[i]))
        return found
    if answer is None or answer is False:
        return None
    return 1 if answer is True else int(answer) if isinstance(answer, float) else answer


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, float):
        return b"%.17g" % value
    return str(value).encode()


# Strings and keys


def _get(redis: MemoryRedis, key: bytes) -> bytes | None:
    value = redis.get(key)
    assert value is None or isinstance(value, bytes)
    return value


def _set(redis: MemoryRedis, key: bytes, value: bytes, *options: bytes) -> str | None:
    words = [option.upper() for option in options]
    if b"NX" in words and redis.get(key) is not None:
        return None
    redis.put(key, value)
    if b"PX" in words:
        redis.expiry[key] = redis.now + int(options[words.index(b"PX") + 1]) * 1000
    return "OK"


def _mget(redis: MemoryRedis, *keys: bytes) -> list[bytes | None]:
    return [_get(redis, key) for key in keys]


def _mset(redis: MemoryRedis, *pairs: bytes) -> str:
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        redis.put(key, value)
    return "OK"


def _del(redis: MemoryRedis, *keys: bytes) -> int:
    return sum(redis.remove(key) for key in keys)


def _exists(redis: MemoryRedis, *keys: bytes) -> int:
    return sum(redis.get(key) is not None for key in keys)


def _incrby(redis: MemoryRedis, key: bytes, amount: bytes) -> int:
    value = int(_get(redis, key) or 0) + int(amount)
    redis.get(key)
    redis.keys[key] = b"%d" % value
    return value


def _decrby(redis: MemoryRedis, key: bytes, amount: bytes) -> int:
    return _incrby(redis, key, b"%d" % -int(amount))


def _pexpire(redis: MemoryRedis, key: bytes, milliseconds: bytes) -> int:
    if redis.get(key) is None:
        return 0
    redis.expiry[key] = redis.now + int(milliseconds) * 1000
    return 1


def _expire(redis: MemoryRedis, key: bytes, seconds: bytes) -> int:
    return _pexpire(redis, key, b"%d" % (int(seconds) * 1000))


def _persist(redis: MemoryRedis, key: bytes) -> int:
    return int(redis.get(key) is not None and redis.expiry.pop(key, None) is not None)


def _pttl(redis: MemoryRedis, key: bytes) -> int:
    if redis.get(key) is None:
        return -2
    return (redis.expiry[key] - redis.now) // 1000 if key in redis.expiry else -1


def _time(redis: MemoryRedis) -> list[bytes]:
    return [b"%d" % (redis.now // 1_000_000), b"%d" % (redis.now % 1_000_000)]


# Hashes


def _hset(redis: MemoryRedis, key: bytes, *pairs: bytes) -> int:
    held = redis.made(key, dict)
    before = len(held)
    held.update(zip(pairs[::2], pairs[1::2], strict=True))
    return len(held) - before


def _hsetnx(redis: MemoryRedis, key: bytes, name: bytes, value: bytes) -> int:
    held = redis.made(key, dict)
    if name in held:
        return 0
    held[name] = value
    return 1


def _hexists(redis: MemoryRedis, key: bytes, name: bytes) -> int:
    return int(name in (redis.get(key) or {}))


def _hget(redis: MemoryRedis, key: bytes, name: bytes) -> bytes | None:
    return (redis.get(key) or {}).get(name)


def _hmget(redis: MemoryRedis, key: bytes, *names: bytes) -> list[bytes | None]:
    held = redis.get(key) or {}
    return [held.get(name) for name in names]


def _hdel(redis: MemoryRedis, key: bytes, *names: bytes) -> int:
    held = redis.get(key) or {}
    gone = sum(held.pop(name, None) is not None for name in names)
    redis.drop_if_empty(key, held)
    return gone


def _hincrby(redis: MemoryRedis, key: bytes, name: bytes, amount: bytes) -> int:
    held = redis.made(key, dict)
    held[name] = b"%d" % (int(held.get(name, 0)) + int(amount))
    return int(held[name])


# Sorted sets


def _zadd(redis: MemoryRedis, key: bytes, *pairs: bytes) -> int:
    ranks = redis.made(key, Ranks)
    before = len(ranks)
    ranks.update({member: float(score) for score, member in zip(pairs[::2], pairs[1::2], strict=True)})
    return len(ranks) - before


def _zrem(redis: MemoryRedis, key: bytes, *members: bytes) -> int:
    ranks = redis.get(key) or {}
    gone = sum(ranks.pop(member, None) is not None for member in members)
    redis.drop_if_empty(key, ranks)
    return gone


def _zrange(redis: MemoryRedis, key: bytes, start: bytes, stop: bytes) -> list[bytes]:
    assert (start, stop) == (b"0", b"-1")
    ranks = redis.get(key) or {}
    return sorted(ranks, key=lambda member: (ranks[member], member))


# Streams


def _xadd(redis: MemoryRedis, key: bytes, entry_id: bytes, *fields: bytes) -> bytes:
    number = _number(entry_id)
    stream: Stream | None = redis.get(key)
    if number <= (stream.last if stream else 0):
        raise CommandError("ERR The ID specified in XADD is equal or smaller than the target stream top item")
    stream = redis.made(key, Stream)
    stream.ids.append(number)
    stream.entries[number] = list(fields)
    stream.last = number
    return b"%d-0" % number


def _xrange(redis: MemoryRedis, key: bytes, start: bytes, stop: bytes, *count: bytes) -> list[Any]:
    return _range(redis.get(key), start, stop, count, backwards=False)


def _xrevrange(redis: MemoryRedis, key: bytes, start: bytes, stop: bytes, *count: bytes) -> list[Any]:
    return _range(redis.get(key), stop, start, count, backwards=True)


def _range(stream: Stream | None, low: bytes, high: bytes, count: Sequence[bytes], *, backwards: bool) -> list[Any]:
    if stream is None:
        return []
    ids = stream.ids
    first = 0 if low == b"-" else bisect.bisect_right(ids, _number(low[1:])) if low[:1] == b"(" else bisect.bisect_left(ids, _number(low))
    last = (
        len(ids)
        if high == b"+"
        else bisect.bisect_left(ids, _number(high[1:]))
        if high[:1] == b"("
        else bisect.bisect_right(ids, _number(high))
    )
    found = ids[first:last]
    if backwards:
        found.reverse()
    return [[b"%d-0" % number, list(stream.entries[number])] for number in found[: int(count[1]) if count else None]]


def _xdel(redis: MemoryRedis, key: bytes, *ids: bytes) -> int:
    stream: Stream | None = redis.get(key)
    if stream is None:
        return 0
    gone = 0
    for entry_id in ids:
        number = _number(entry_id)
        if stream.entries.pop(number, None) is not None:
            stream.ids.remove(number)
            gone += 1
    return gone


def _xtrim(redis: MemoryRedis, key: bytes, how: bytes, exactly: bytes, limit: bytes) -> int:
    assert exactly == b"="
    stream: Stream | None = redis.get(key)
    if stream is None:
        return 0
    over = len(stream.ids) - int(limit) if how.upper() == b"MAXLEN" else bisect.bisect_left(stream.ids, _number(limit))
    gone, stream.ids = stream.ids[: max(0, over)], stream.ids[max(0, over) :]
    for number in gone:
        del stream.entries[number]
    return len(gone)


def _xlen(redis: MemoryRedis, key: bytes) -> int:
    stream = redis.get(key)
    return len(stream.ids) if stream else 0


def _xinfo(redis: MemoryRedis, what: bytes, key: bytes) -> list[Any]:
    assert what.upper() == b"STREAM"
    stream = redis.get(key)
    if stream is None:
        raise CommandError("ERR no such key")
    return [b"length", len(stream.ids), b"last-generated-id", b"%d-0" % stream.last]


@lru_cache(maxsize=4096)
def _number(entry_id: bytes) -> int:
    milliseconds, _, rest = entry_id.partition(b"-")
    assert rest in (b"", b"0")
    return int(milliseconds)


_COMMANDS: dict[bytes, Callable[..., Any]] = {
    name.removeprefix("_").upper().encode(): function
    for name, function in list(globals().items())
    if name in {
        *("_get", "_mget", "_set", "_mset", "_del", "_exists", "_incrby", "_decrby", "_expire", "_pexpire", "_persist", "_pttl", "_time"),
        *("_hset", "_hsetnx", "_hexists", "_hget", "_hmget", "_hdel", "_hincrby", "_zadd", "_zrem", "_zrange"),
        *("_xadd", "_xrange", "_xrevrange", "_xdel", "_xtrim", "_xlen", "_xinfo"),
    }
}  # fmt: skip
