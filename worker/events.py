"""What happens to a user's conversations, for the user's open pages: other tabs and devices see it without reloading.

The scripts that change something write to a stream for each user, but only while somebody reads it (the stream exists), so that a chatbot's
back end pays one EXISTS for it. It is a notice board, not history: bounded, and gone two minutes after its last reader. A reader who cannot
go on where it left off is told so (`resync`) and reads the lists again.

One task of a process reads for all of its readers, with one XREAD a shard.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import orjson
import structlog
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError

from worker import keys
from worker.codec import Stored, rfc3339
from worker.scripts import AsyncScripts
from worker.settings import Settings

log = structlog.get_logger(__name__)

LIFETIME_MS = 120_000
REFRESH_SECONDS = 30.0
POLL_SECONDS = 0.15
HEARTBEAT_SECONDS = 10.0
WAITING_MAX = 1000
"""Events that wait for a slow reader; a slower one has to read the lists again."""
_COUNT = 200


@dataclass(frozen=True, slots=True)
class UserEvent:
    """One event; `data` is JSON."""

    id: str
    name: str
    data: bytes


@dataclass(slots=True)
class _User:
    """The readers of one user in this process, and how far this process has read."""

    after: str
    readers: set[asyncio.Queue[UserEvent | None]] = field(default_factory=set)

    def tell(self, event: UserEvent) -> None:
        for reader in self.readers:
            _offer(reader, event)


class EventHub:
    """The event streams of this process's users; `start` before use, `close` after."""

    def __init__(self, client: AsyncRedis, settings: Settings) -> None:
        self._client = client
        self._settings = settings
        self._scripts = AsyncScripts(client, settings.redis_timeout_seconds)
        self._users: dict[int, _User] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to read."""
        self._task = asyncio.get_running_loop().create_task(self._read())

    async def close(self) -> None:
        """Ends all streams."""
        if self._task:
            self._task.cancel()
        for user in self._users.values():
            for reader in user.readers:
                _offer(reader, None)
        await self._scripts.close()

    async def subscribe(self, user_id: int, after: str) -> AsyncIterator[UserEvent | None]:
        """A user's events from `after` on ('' for now on); None now and then. Ends for a slow reader. Raises `RedisUnavailable`."""
        start, resumed = await self._scripts.run("events_open", [self._key(user_id)], [LIFETIME_MS, after])
        reader: asyncio.Queue[UserEvent | None] = asyncio.Queue(WAITING_MAX)
        user = self._users.setdefault(user_id, _User(start.decode()))
        if _order(start.decode()) < _order(user.after):
            user.after = start.decode()  # read again from where the newcomer left off; the others skip what they have had
        user.readers.add(reader)
        seen = start.decode()
        try:
            if not resumed:
                yield UserEvent(seen, "resync", b"{}")
            while True:
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        event = await reader.get()
                except TimeoutError:
                    yield None
                    continue
                if event is None:
                    return
                if _order(event.id) > _order(seen):
                    seen = event.id
                    yield event
        finally:
            user.readers.discard(reader)
            if not user.readers and self._users.get(user_id) is user:
                del self._users[user_id]

    async def _read(self) -> None:
        refreshed = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if not self._users:
                continue
            now = asyncio.get_running_loop().time()
            refresh = now - refreshed > REFRESH_SECONDS
            try:
                await self._poll(refresh=refresh)
            except (RedisError, OSError) as exc:
                log.info("events not read", error=type(exc).__name__)
                continue
            refreshed = now if refresh else refreshed

    async def _poll(self, *, refresh: bool) -> None:
        shards: dict[int, list[int]] = defaultdict(list)
        asked = {user_id: user.after for user_id, user in self._users.items()}
        for user_id in asked:
            shards[keys.shard_of_user(user_id, self._settings.shards)].append(user_id)
        async with self._client.pipeline(transaction=False) as pipeline:
            for users in shards.values():
                streams = {self._key(user_id): asked[user_id] for user_id in users}
                pipeline.xread(streams, count=_COUNT)  # type: ignore[arg-type]  # invariant dict
            answers = await pipeline.execute()
            if refresh:
                for name in map(self._key, self._users):
                    pipeline.pexpire(name, LIFETIME_MS)
                await pipeline.execute()
        by_key = {self._key(user_id).encode(): user_id for user_id in asked}
        found = [(by_key[key], entries) for answer in answers for key, entries in answer or ()]
        overtaken = await self._overtaken([user_id for user_id, entries in found if len(entries) == _COUNT])
        for user_id, entries in found:
            user = self._users.get(user_id)
            if user is None or user.after != asked[user_id]:  # a newcomer has to begin before these
                continue
            if user_id in overtaken:
                user.after = overtaken[user_id]
                user.tell(UserEvent(user.after, "resync", b"{}"))
            else:
                self._deliver(user_id, entries)

    async def _overtaken(self, user_ids: list[int]) -> dict[int, str]:
        """Those who may have missed something, because so much was written that the stream no longer goes back to where they are; and its
        end."""
        if not user_ids:
            return {}
        async with self._client.pipeline(transaction=False) as pipeline:
            for name in map(self._key, user_ids):
                pipeline.xrange(name, "-", "+", 1)
                pipeline.xrevrange(name, "+", "-", 1)
            answers = await pipeline.execute()
        found = {}
        for user_id, oldest, newest in zip(user_ids, answers[::2], answers[1::2], strict=True):
            user = self._users.get(user_id)
            if user and oldest and newest and _order(oldest[0][0].decode()) > _order(user.after):
                found[user_id] = newest[0][0].decode()
        return found

    def _deliver(self, user_id: int, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        user = self._users[user_id]
        for entry_id, fields in entries:
            user.after = entry_id.decode()
            event = _event(user_id, user.after, fields)
            if event is not None:
                user.tell(event)

    def _key(self, user_id: int) -> str:
        return keys.events(keys.shard_of_user(user_id, self._settings.shards), user_id)


def _offer(reader: asyncio.Queue[UserEvent | None], event: UserEvent | None) -> None:
    """Never waits: a reader that has fallen behind is ended, and comes back with a Last-Event-ID."""
    if reader.full():
        reader.get_nowait()
        event = None
    reader.put_nowait(event)


def _event(user_id: int, entry_id: str, fields: dict[bytes, bytes]) -> UserEvent | None:
    name, a, b, c, d = (fields[field] for field in (b"e", b"a", b"b", b"c", b"d"))
    if name == b"message":
        return UserEvent(entry_id, "message", Stored(int(a), int(b), c).public(0))
    if name == b"conversation":
        state = {"id": int(a), "user_id": user_id, "title": b.decode() or None}
        return UserEvent(entry_id, "conversation", orjson.dumps(state | {"created_at": rfc3339(int(c)), "updated_at": rfc3339(int(d))}))
    if name == b"conversation_deleted":
        return UserEvent(entry_id, "conversation_deleted", orjson.dumps({"id": int(a)}))
    if name == b"committed":
        return UserEvent(entry_id, "committed", orjson.dumps({"conversation_id": int(a), "up_to": int(b)}))
    if name == b"reply":
        return UserEvent(entry_id, "reply", orjson.dumps({"conversation_id": int(a), "running": b == b"1"}))
    return None


def _order(event_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = event_id.partition("-")
    return int(milliseconds), int(sequence or 0)
