"""The reply that is being written, as a stream of events in Redis that any API process can follow.

It is not history: what counts is the assistant's message, which is appended to the pending log like any other when the reply ends. The
stream only lets readers follow, from where they left off, and lives for a minute after its last event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from redis.asyncio import Redis as AsyncRedis

from worker import keys
from worker.pending import TURN_LEASE_MS
from worker.scripts import Argument, AsyncScripts
from worker.settings import Settings

EventName: TypeAlias = Literal["user_message", "delta", "assistant_message", "error"]
LINGER_MS = 60_000
"""For late readers; longer than a turn's lease, so that what a dead process had streamed can still be stored."""
_PAGE = 500


@dataclass(frozen=True, slots=True)
class Event:
    """One event; `data` is JSON."""

    id: str
    name: str
    data: bytes

    @property
    def last(self) -> bool:
        """Nothing comes after it."""
        return self.name in ("assistant_message", "error")


class ReplyStreams:
    """Writes and reads the replies of all conversations."""

    def __init__(self, client: AsyncRedis, settings: Settings) -> None:
        self._scripts = AsyncScripts(client, settings.redis_timeout_seconds)

    async def add(self, conversation_id: int, token: str, name: EventName, data: bytes, *, begin: bool = False) -> bool:
        """Adds an event and prolongs the turn; False if the turn (`token`) is no longer the caller's. Raises `RedisUnavailable`."""
        arguments: list[Argument] = [token, TURN_LEASE_MS, LINGER_MS, int(begin), name, data]
        return bool(await self._scripts.run("reply_add", self._keys(conversation_id), arguments))

    async def read(self, conversation_id: int, after: str) -> tuple[bool, list[Event]]:
        """Whether the turn is running, and the events after `after` ('' for all). Raises `RedisUnavailable`."""
        running, entries = await self._scripts.run("reply_read", self._keys(conversation_id), [after, _PAGE])
        return bool(running), [Event(entry_id.decode(), fields[1].decode(), fields[3]) for entry_id, fields in entries]

    async def close(self) -> None:
        """Waits for what is under way."""
        await self._scripts.close()

    @staticmethod
    def _keys(conversation_id: int) -> list[str]:
        shard = keys.shard_of_id(conversation_id)
        return [keys.reply(shard, conversation_id), keys.turn(shard, conversation_id)]
