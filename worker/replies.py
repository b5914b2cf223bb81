"""The reply that is being written, as a stream of events in Redis that any API process can follow, stop, or finish for a dead one.

It is not history: what counts is the assistant's message, which is appended to the pending log like any other when the reply ends. Until
then the stream does not expire, so that whatever a process had streamed when it died can still be stored; after its last event it stays a
minute for late readers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import orjson
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError

from worker import keys
from worker.multiplexed import Argument
from worker.pending import TURN_LEASE_MS
from worker.scripts import AsyncScripts, translate
from worker.settings import Settings

EventName: TypeAlias = Literal["user_message", "delta", "assistant_message", "error"]
Outcome: TypeAlias = Literal["OK", "STOP", "LOST"]
LINGER_MS = 60_000
_STOP_MS = 60_000
_PAGE = 500


@dataclass(frozen=True, slots=True)
class Event:
    """One event; `data` is JSON, `id` is `<user message's id>-<n>`."""

    id: str
    name: str
    data: bytes
    last: bool
    """Nothing comes after it."""

    @property
    def question_id(self) -> int:
        """The user's message that the reply is to."""
        return int(self.id.partition("-")[0])


@dataclass(frozen=True, slots=True)
class Running:
    """What a read found: whether somebody holds the turn, whether the reply has ended (or there is none), and the events asked for."""

    held: bool
    ended: bool
    events: tuple[Event, ...]

    @property
    def abandoned(self) -> bool:
        """Its writer died: there is a beginning, no end, and nobody holds the turn."""
        return not self.held and not self.ended


@dataclass(slots=True)
class Writer:
    """The one who writes a reply; made by `ReplyStreams.begin`."""

    user_id: int
    conversation_id: int
    token: str
    question_id: int
    next: int = 1


class ReplyStreams:
    """Writes and reads the replies of all conversations. Every method raises `RedisUnavailable`."""

    def __init__(self, client: AsyncRedis, settings: Settings) -> None:
        self._client = client
        self._shards = settings.shards
        self._scripts = AsyncScripts(client, settings.redis_timeout_seconds)

    async def begin(self, writer: Writer, user_message: bytes, *, drop_abandoned: bool = False) -> Literal["OK", "LOST", "ABANDONED"]:
        """Begins a reply with its first event, for whoever holds the turn."""
        whom = f"{writer.conversation_id}:{writer.user_id}"
        arguments: list[Argument] = [writer.token, TURN_LEASE_MS, whom, writer.question_id, user_message, int(drop_abandoned)]
        answer = await self._scripts.run("reply_begin", self._keys(writer.user_id, writer.conversation_id), arguments)
        if answer[0] == b"OK":
            writer.next = int(answer[1]) + 1
            return "OK"
        return "LOST" if answer[0] == b"LOST" else "ABANDONED"

    async def add(self, writer: Writer, name: EventName, data: bytes, *, last: bool = False) -> Outcome:
        """Adds an event and keeps the turn; the last event ends it. Safe to repeat: the number only moves on when Redis has answered."""
        outcome = await self._add(writer, f"{writer.question_id}-{writer.next}", name, data, last)
        writer.next += 1
        return outcome

    async def keep(self, writer: Writer) -> Outcome:
        """Keeps the turn while there is nothing to add."""
        return await self._add(writer, "", "", b"", last=False)

    async def read(self, conversation_id: int, after: str = "", count: int = _PAGE) -> Running:
        """The events after `after` ('' for all), at most `count`."""
        shard = keys.shard_of_id(conversation_id)
        reply, turn = keys.reply(shard, conversation_id), keys.turn(shard, conversation_id)
        held, ended, entries = await self._scripts.run("reply_read", [reply, turn], [after, count])
        events = tuple(Event(entry_id.decode(), fields[1].decode(), fields[3], fields[5] == b"1") for entry_id, fields in entries)
        return Running(bool(held), bool(ended), events)

    async def stop(self, conversation_id: int) -> bool:
        """Asks the writer, wherever it runs, to stop; False if nothing is running."""
        shard = keys.shard_of_id(conversation_id)
        turn, stop = keys.turn(shard, conversation_id), keys.stop(shard, conversation_id)
        return bool(await self._scripts.run("reply_stop", [turn, stop], [_STOP_MS]))

    async def close_abandoned(self, user_id: int, conversation_id: int, name: EventName | None, data: bytes = b"") -> bool:
        """Ends a reply whose writer is gone; without an event (the conversation is gone too), drops it."""
        arguments: list[Argument] = [f"{conversation_id}:{user_id}", name or "", data, LINGER_MS]
        return bool(await self._scripts.run("reply_close", self._keys(user_id, conversation_id), arguments))

    async def begun(self) -> list[tuple[int, int]]:
        """(user, conversation) of every reply, of any process, that has begun and not ended."""
        try:
            async with self._client.pipeline(transaction=False) as pipeline:
                for shard in range(self._shards):
                    pipeline.hkeys(keys.turns(shard))
                answers: list[list[bytes]] = await pipeline.execute()
        except RedisError as exc:
            raise translate(exc) from exc
        pairs = [member.decode().partition(":") for members in answers for member in members]
        return [(int(user), int(conversation)) for conversation, _, user in pairs]

    async def close(self) -> None:
        """Waits for what is under way."""
        await self._scripts.close()

    async def _add(self, writer: Writer, event_id: str, name: str, data: bytes, last: bool) -> Outcome:
        whom = f"{writer.conversation_id}:{writer.user_id}"
        arguments: list[Argument] = [writer.token, TURN_LEASE_MS, whom, event_id, name, data, LINGER_MS, int(last)]
        answer: bytes = await self._scripts.run("reply_add", self._keys(writer.user_id, writer.conversation_id), arguments)
        return "OK" if answer == b"OK" else "STOP" if answer == b"STOP" else "LOST"

    @staticmethod
    def _keys(user_id: int, conversation_id: int) -> list[str]:
        shard = keys.shard_of_id(conversation_id)
        return [
            keys.reply(shard, conversation_id),
            keys.turn(shard, conversation_id),
            keys.stop(shard, conversation_id),
            keys.turns(shard),
            keys.events(shard, user_id),
        ]


def text_of(events: tuple[Event, ...]) -> str:
    """The text that these events carry."""
    return "".join(orjson.loads(event.data)["text"] for event in events if event.name == "delta")
