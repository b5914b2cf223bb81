"""The pending log: how a message becomes pending, and how it is read while it is. How it leaves is in `worker/backlog.py`.

    accepted by the API ──append──▶ pending ──flush: fetch, persist, COMMIT──▶ committed ──trim──▶ only in Postgres, its copy may expire

Who does what, and what a crash leaves:

- `PendingLog` (asynchronous, API) appends and reads. One script is one step: before it nothing happened, after it everything is in the
  append-only file, fsynced before the answer left. A lost answer is repeated with the same retry key and finds the first one.
- `fetch` and `trim` (synchronous, worker) stand on both sides of the commit: `worker/backlog.py` says what a crash between them leaves.
- A conversation that Redis does not know is loaded from Postgres under a lease. While any of it is pending none of its keys expires, so
  an unknown conversation has nothing pending.
- What is read from Postgres is installed only if a token is still in Redis that was put there before: an emptied Redis has none.

The keys are described in `worker/keys.py`. Raw answers of Redis do not leave this file.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from typing import Any, Literal, NamedTuple, TypeVar

import structlog
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError

from worker import keys, loading
from worker.codec import (
    CachedMessages,
    Role,
    Status,
    Stored,
    auto_title,
    conversation_body,
    message_body,
    request_hash,
)
from worker.errors import (
    BacklogFull,
    ChatkeepError,
    KeyReused,
    NotFound,
    RedisUnavailable,
    TooManyConversations,
    TooManyMessages,
    TooSlow,
    TurnRunning,
    UserBacklogFull,
)
from worker.loading import ConversationState
from worker.multiplexed import Argument, Command, Packed, PackedCommands
from worker.redis import MEMORY_FULL
from worker.scripts import AsyncScripts, translate
from worker.settings import Settings
from worker.threads import DatabaseThreads

T = TypeVar("T")
log = structlog.get_logger(__name__)

WAKE_LEASE_MS = 3000
"""How long a flush that was asked for may stay away before the next append or sweep asks again (its task may be lost)."""
TURN_LEASE_MS = 15_000
LOAD_LEASE_MS = 2500
"""Longer than a load (or a seed) may take (`postgres_timeout_seconds`): a loader that is later than this finds its lease gone."""
ANSWER_WITHIN_SECONDS = 1.9
"""Whatever cannot be answered in 2 s is refused."""
MESSAGES_PER_CALL_MAX = 100
"""Messages that come together. The script that appends them keeps everybody else waiting for 27 µs each."""
EXTRA_TTL_SECONDS = 60
"""What hangs on a conversation outlives it, so that a known conversation never lacks its messages."""
CLOCK_AHEAD_MS = 366 * 86_400_000
"""An id in the log that is further ahead of the server's clock (and not known to Postgres) was given by no append."""
OWNERS_MAX = 20_000
"""Conversations of which a process remembers whose they are: 2 MB."""


KEYS_KEPT = 2048
"""Conversations of which a process remembers the names of their keys, packed: those that were written to last, and read last. 8 MB. To put
them together took as long as everything else that is packed for a call."""


class Draft(NamedTuple):
    """A message as it is sent."""

    role: Role
    content: str
    status: Status = "complete"


class Appended(NamedTuple):
    """An acknowledged message. `committed`: the highest id that is in Postgres, or 0 where the message is higher in any case. `replayed`: a
    retry, this is the first answer. `reply_id`: the reply that it already has, if any."""

    message: Stored
    committed: int
    replayed: bool
    reply_id: int | None = None


@dataclass(frozen=True, slots=True)
class Created:
    """An acknowledged new conversation, as it was at first."""

    conversation: ConversationState
    replayed: bool


class CachedPage(NamedTuple):
    """What Redis knows of a conversation and of one page, at one instant.

    `messages` are the nearest to the asked-for end: newest first for 'before', oldest first for 'after'. For 'after', `first_id` is the
    oldest cached message, below which only Postgres knows; `whole` says that there is nothing below it.
    """

    conversation: ConversationState
    messages: CachedMessages
    first_id: int | None
    last_id: int
    whole: bool
    committed: int


class PendingLog:
    """The API's side of the log. One for a process; `start` before use, `close` after."""

    def __init__(
        self, client: AsyncRedis, settings: Settings, wake: Callable[[int], None], check_durability: Callable[[], None] = lambda: None
    ) -> None:
        self._client = client
        self._settings = settings
        self._wake = wake
        self._check_durability = check_durability
        self._scripts = AsyncScripts(client, settings.redis_timeout_seconds)
        self.threads = DatabaseThreads(settings.postgres_pool_size, settings.postgres_timeout_seconds)
        self._seconds = settings.postgres_timeout_seconds
        self._backlog = _Backlog(client, settings)
        self._owners: dict[int, int] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begins to watch the backlog of the other shards."""
        self._spawn(self._backlog.watch())

    async def close(self) -> None:
        """Ends the background work; what was sent to Redis is waited for (it has its time-out)."""
        while self._background:  # what is cancelled may leave something to be cleared away
            for task in self._background:
                task.cancel()
            await asyncio.gather(*self._background, return_exceptions=True)
        await self._scripts.close()
        self.threads.close()

    # Writes

    async def append(
        self,
        user_id: int,
        conversation_id: int,
        role: Role,
        content: str,
        *,
        status: Status = "complete",
        key: str | None = None,
        turn: str | None = None,
        counted: bool = True,
    ) -> Appended:
        """Appends a message; returns when it is fsynced. Takes and raises what `append_all` does."""
        draft = Draft(role, content, status)
        return (await self.append_all(user_id, conversation_id, (draft,), key=key, turn=turn, counted=counted))[0]

    async def append_all(
        self,
        user_id: int,
        conversation_id: int,
        drafts: Sequence[Draft],
        *,
        key: str | None = None,
        turn: str | None = None,
        counted: bool = True,
    ) -> list[Appended]:
        """Appends messages (1 to `MESSAGES_PER_CALL_MAX`) in their order, all or none; returns when they are fsynced.

        `key` is a retry key as it is stored (`client_key` or `reply_key` made it). `turn`: a new token to take the turn with.
        A reply is not `counted`: what it answers was.
        Raises `NotFound`, `KeyReused`, `TurnRunning`, `TooManyMessages`, `BacklogFull`, `NotDurable`,
        `RedisUnavailable` (the outcome is unknown), `PostgresUnavailable` (only for a conversation that Redis does not know).
        """
        shard = self._shard(user_id, conversation_id)
        script_keys = self._append_keys(shard, user_id, conversation_id)
        bodies: list[bytes] = []
        messages: list[Argument] = []
        asked = title = ""
        for i, (role, content, status) in enumerate(drafts):
            body = message_body(conversation_id, user_id, role, content, status)
            bodies.append(body)
            messages += (body, nth_key(key, i), request_hash(role, status, content)) if key else (body, "", "")
            if role == "user" and not title:
                title = auto_title(content)
        until = asyncio.get_running_loop().time() + ANSWER_WITHIN_SECONDS

        def ask() -> Awaitable[Any]:
            return self._scripts.run(
                "append",
                script_keys,
                (
                    *(shard, user_id, conversation_id, title, self._backlog.limit(shard), WAKE_LEASE_MS, asked, turn or "", TURN_LEASE_MS),
                    self._settings.pending_bytes_per_user_max,
                    self._settings.messages_per_minute_max if counted else 0,
                    nth_key(key, len(drafts)) if key else "",
                    *messages,
                ),
                until=until,
            )

        async def otherwise(answer: Any) -> list[Appended] | None:
            nonlocal asked
            if answer[0] == b"REPLAY":
                return await self._replayed(user_id, conversation_id, answer)
            if answer[0] == b"TOO_MANY":
                raise TooManyMessages(ceil(answer[1] / 1000))
            if answer[0] == b"ASK_KEY" and key:
                asked = await self._ask_key(shard, conversation_id, user_id, key)
            else:
                await self._prepare(answer[0], shard, user_id, conversation_id)
                asked = ""  # what was found may be forgotten with the conversation
            return None

        self._check_durability()
        answer, appended = await ask(), None
        if answer[0] != b"OK":  # seldom; then there are several calls, which have one time together (7 µs, as much as the rest of this)
            async with in_time(until):
                while answer[0] != b"OK" and (appended := await otherwise(answer)) is None:
                    answer = await ask()
        if appended is None:
            _, moment, woken, *ids = answer
            self._woken(shard, woken)
            appended = [Appended(Stored(int(number), int(moment), body), 0, False) for number, body in zip(ids, bodies, strict=True)]
        self._check_durability()
        return appended

    async def create(self, user_id: int, title: str | None, *, key: str | None = None) -> Created:
        """Appends a new conversation; raises as `append` does, and `TooManyConversations`. A known key answers what was created first."""
        shard = keys.shard_of_user(user_id, self._settings.shards)
        digest = request_hash("conversation", "\x00" if title is None else title)
        reserved: int | None = None
        asked, token = "", secrets.token_hex(8)

        async def attempt() -> Created | None:
            nonlocal reserved, asked
            if reserved is None:
                answer = await self._scripts.run("reserve", [keys.clock(shard)], [shard])
                if answer[0] != b"OK":
                    await self._prepare(answer[0], shard, user_id, None)
                    return None
                reserved = int(answer[1])
            answer = await self._scripts.run(
                "create",
                [
                    *self._log_keys(shard),
                    keys.conversation(shard, reserved),
                    keys.changed(shard, user_id),
                    keys.created_keys(shard, user_id),
                    keys.events(shard, user_id),
                    keys.users(shard),
                    keys.committed(shard),
                    keys.conversations_of_day(shard, user_id),
                ],
                [
                    *(shard, user_id, reserved, conversation_body(reserved, user_id, title), key or "", digest, title or ""),
                    *(self._backlog.limit(shard), WAKE_LEASE_MS, asked, self._settings.pending_bytes_per_user_max, token),
                    self._settings.conversations_per_day_max,
                ],
            )
            if answer[0] in (b"OK", b"REPLAY"):
                if answer[0] == b"OK":
                    self._woken(shard, answer[3])
                created = ConversationState(int(answer[1]), user_id, title, int(answer[2]), int(answer[2]))
                return Created(created, replayed=answer[0] == b"REPLAY")
            if answer[0] == b"TOO_MANY":
                raise TooManyConversations(ceil(answer[1] / 1000))
            if answer[0] == b"ASK_KEY" and key:
                asked = await self._load_created_keys(shard, user_id, key)
            elif answer[0] == b"TAKEN":
                reserved = None
            else:
                await self._prepare(answer[0], shard, user_id, None)
            return None

        return await self._until_done(attempt)

    async def rename(self, user_id: int, conversation_id: int, title: str) -> ConversationState:
        """Appends a new title; raises as `append` does."""
        shard = self._shard(user_id, conversation_id)
        body = conversation_body(conversation_id, user_id, title)
        script_keys = [
            *self._log_keys(shard),
            *keys.of_conversation(shard, conversation_id),
            keys.changed(shard, user_id),
            keys.events(shard, user_id),
            keys.users(shard),
        ]

        async def attempt() -> ConversationState | None:
            arguments: list[Argument] = [shard, user_id, conversation_id, body, title, self._backlog.limit(shard), WAKE_LEASE_MS]
            arguments.append(self._settings.pending_bytes_per_user_max)
            answer = await self._scripts.run("rename", script_keys, arguments)
            if answer[0] == b"OK":
                self._woken(shard, answer[3])
                return ConversationState(conversation_id, user_id, title, int(answer[1]), int(answer[2]))
            await self._prepare(answer[0], shard, user_id, conversation_id)
            return None

        return await self._until_done(attempt)

    async def delete(self, user_id: int, conversation_id: int) -> None:
        """Appends a deletion; from its acknowledgement on nobody finds the conversation. Raises as `append` does."""
        shard = self._shard(user_id, conversation_id)
        body = conversation_body(conversation_id, user_id)
        script_keys = [
            *self._log_keys(shard),
            *keys.of_conversation(shard, conversation_id),
            keys.changed(shard, user_id),
            keys.turn(shard, conversation_id),
            keys.events(shard, user_id),
            keys.users(shard),
        ]

        async def attempt() -> bool | None:
            answer = await self._scripts.run("delete", script_keys, [shard, user_id, conversation_id, body, WAKE_LEASE_MS])
            if answer[0] == b"OK":
                self._woken(shard, answer[1])
                return True
            await self._prepare(answer[0], shard, user_id, conversation_id)
            return None

        await self._until_done(attempt)

    async def keep_turn(self, user_id: int, conversation_id: int, token: str) -> bool:
        """Prolongs the lease on a turn; False if it is no longer the caller's."""
        return await self._turn(user_id, conversation_id, token, TURN_LEASE_MS)

    async def end_turn(self, user_id: int, conversation_id: int, token: str) -> bool:
        """Gives the turn back; False if it was no longer the caller's."""
        return await self._turn(user_id, conversation_id, token, 0)

    # Reads

    async def read(
        self, user_id: int, conversation_id: int, direction: Literal["before", "after"] | None, from_id: int | None, count: int
    ) -> CachedPage | None:
        """What Redis knows; None if it knows no such conversation of this user (then Postgres is to be asked: nothing of it is pending).

        Raises `NotFound` for a deleted one, and `RedisUnavailable`.

        One transaction and no script: 51 messages through Lua took Valkey 125 µs, by themselves they take 25. But a transaction cannot look
        whose they are before it reads them, and a stranger must not find out by how long that takes, nor have us carry megabytes about. So
        messages are read only for whom the conversation has been seen to belong to. It never changes hands.
        """
        shard = self._shard(user_id, conversation_id)
        while True:
            theirs = self._owners.get(conversation_id) == user_id
            asked = _read_commands(shard, conversation_id, *((direction, from_id, count) if theirs else (None, None, 0)))
            known, ttl, mark, *found = await self._scripts.transaction("read", asked)
            if known[0] != b"%d" % user_id:  # also somebody else's: nobody may learn which ids there are, not even while Postgres is away
                return None
            if known[1] == b"1":
                raise NotFound()
            if not theirs:
                self._note_owner(user_id, conversation_id)
            if theirs or direction is None:
                break
        if 0 < ttl < self._settings.cache_ttl_seconds * 500:  # half of it is gone: a use prolongs it, but not every read should be a write
            self._spawn(self._touch(keys.of_conversation(shard, conversation_id)))
        _, _, title, created, updated, last_id, whole, last_pending = known
        messages, oldest = (*found, [], [])[:2]
        return CachedPage(
            ConversationState(conversation_id, user_id, title.decode() or None, int(created), int(updated)),
            CachedMessages(messages),
            first_id=CachedMessages(oldest)[0].id if oldest else None,
            last_id=int(last_id),
            whole=whole == b"1",
            # Of a clean conversation everything is committed, also when the shard's own mark was lost with the rest of a wiped Redis.
            committed=int(last_id if last_pending == b"0" else mark or 0),
        )

    def load_soon(self, user_id: int, conversation_id: int) -> None:
        """Installs a conversation that Postgres has just been seen to have for this user, so that the next read finds it in Redis."""
        self._note_owner(user_id, conversation_id)
        self._spawn(self._load(self._shard(user_id, conversation_id), user_id, conversation_id))

    async def changed(self, user_id: int) -> dict[int, ConversationState | None]:
        """The user's conversations with pending entries as they are now; None for a deleted one."""
        shard = keys.shard_of_user(user_id, self._settings.shards)
        try:
            async with asyncio.timeout(self._settings.redis_timeout_seconds):
                members: Any = await self._client.zrange(keys.changed(shard, user_id), 0, -1)
                ids = [int(member) for member in members]
                if not ids:
                    return {}
                async with self._client.pipeline(transaction=False) as pipeline:
                    for number in ids:
                        pipeline.hmget(keys.conversation(shard, number), "u", "t", "s", "a", "d")
                    rows = await pipeline.execute()
        except TimeoutError as exc:
            raise RedisUnavailable() from exc
        except RedisError as exc:
            raise translate(exc) from exc
        return {number: _state(number, user_id, row) for number, row in zip(ids, rows, strict=True) if row[0] == b"%d" % user_id}

    # What stands behind them

    async def _until_done(self, attempt: Callable[[], Awaitable[T | None]]) -> T:
        self._check_durability()
        async with in_time():
            while (result := await attempt()) is None:
                pass
        self._check_durability()  # the write may have opened a connection to a server that came back with other settings
        return result

    async def _prepare(self, answer: bytes, shard: int, user_id: int, conversation_id: int | None) -> None:
        """Does what a script's answer asks for, so that it can be run again; raises if there is nothing to be done."""
        if answer == b"NOT_FOUND":
            raise NotFound()
        if answer == b"KEY_REUSED":
            raise KeyReused()
        if answer == b"TURN_RUNNING":
            raise TurnRunning()
        if answer == b"FULL":
            raise BacklogFull()
        if answer == b"USER_FULL":
            raise UserBacklogFull()
        if answer == b"NEED_SEED":
            await self._seed(shard)
        elif answer == b"UNKNOWN" and conversation_id is not None:
            await self._load(shard, user_id, conversation_id)
        else:
            raise RuntimeError(f"a script answered {answer!r}")

    async def _seed(self, shard: int) -> None:
        """Gives a shard its clock back. If it comes too late it does nothing: whoever needs the clock looks again."""
        token = await self._scripts.run("seed_begin", [keys.seeding(shard)], [secrets.token_hex(8), LOAD_LEASE_MS])
        highest = await self.threads.run(partial(loading.highest_id, shard, self._settings.shards, self._seconds))
        script_keys = [keys.clock(shard), keys.committed(shard), keys.log(shard), keys.seeding(shard)]
        answer = await self._scripts.run("seed", script_keys, [token, highest, CLOCK_AHEAD_MS])
        if answer[0] == b"OK":
            log.warning("shard clock seeded", shard=shard, highest_id=highest)

    async def _load(self, shard: int, user_id: int, conversation_id: int) -> None:
        """Installs a conversation from Postgres, or waits a little for whoever is at it; raises `NotFound` if this user has none such."""
        async with self._lease(keys.loading(shard, conversation_id)) as token:
            if token is None:
                return
            work = partial(loading.load_conversation, conversation_id, user_id, self._settings.cache_messages_max, self._seconds)
            loaded = await self.threads.run(work)
            if loaded is None:
                raise NotFound()
            ttl = self._settings.cache_ttl_seconds
            state = loaded.state
            arguments: list[Argument] = [token, ttl, ttl + EXTRA_TTL_SECONDS, user_id, state.title or "", state.created, state.updated]
            arguments += [loaded.messages[-1].id if loaded.messages else 0, int(loaded.whole), int(loaded.all_keys), int(loaded.deleted)]
            arguments.append(len(loaded.messages))
            for message in loaded.messages:
                arguments += [message.id, message.microseconds, message.body]
            for pair in loaded.retry_keys:
                arguments += pair
            lease = keys.loading(shard, conversation_id)
            await self._scripts.run("load", [*keys.of_conversation(shard, conversation_id), lease], arguments)

    async def _load_created_keys(self, shard: int, user_id: int, key: str) -> str:
        """Answers '1' if Redis has now what Postgres knows of the key, '' if it is to be looked at again."""
        async with self._lease(keys.loading_user(shard, user_id)) as token:
            if token is None:
                return ""
            pairs, complete = await self.threads.run(partial(loading.load_created_keys, user_id, self._seconds))
            if not complete and key not in dict(pairs):
                found = await self.threads.run(partial(loading.find_created_key, user_id, key, self._seconds))
                pairs = pairs if found is None else (*pairs, found)
            ttl = self._settings.cache_ttl_seconds + EXTRA_TTL_SECONDS
            arguments: list[Argument] = [token, ttl, int(complete)]
            for pair in pairs:
                arguments += pair
            script_keys = [keys.created_keys(shard, user_id), keys.loading_user(shard, user_id), keys.changed(shard, user_id)]
            answer = await self._scripts.run("load_user", script_keys, arguments)
        return token if answer[0] == b"OK" else ""

    async def _ask_key(self, shard: int, conversation_id: int, user_id: int, key: str) -> str:
        """Answers a token if Redis has now what Postgres knows of the key (it counts only as long as Redis has it), else ''."""
        lease = keys.loading(shard, conversation_id)
        async with self._lease(lease) as token:
            if token is None:
                return ""
            nth_keys = [nth_key(key, n) for n in range(MESSAGES_PER_CALL_MAX)]  # if the first is known, the others have to be
            pairs = await self.threads.run(partial(loading.find_retry_keys, conversation_id, user_id, nth_keys, self._seconds))
            conversation, _, retry_keys = keys.of_conversation(shard, conversation_id)
            arguments = [token, *(part for pair in pairs for part in pair)]
            answer = await self._scripts.run("remember", [conversation, retry_keys, lease], arguments)
        return token if answer[0] == b"OK" else ""

    async def _replayed(self, user_id: int, conversation_id: int, answer: Sequence[Any]) -> list[Appended]:
        """What a retry is answered: the first answer again, of messages that may have left the cache since."""
        _, committed, reply, *found = answer
        cached = zip(found[::2], found[1::2], strict=True)
        stored = {int(number): CachedMessages(entries)[0] if entries else None for number, entries in cached}
        if gone := [number for number, message in stored.items() if message is None]:
            read = await self.threads.run(partial(loading.find_messages, conversation_id, user_id, gone, self._seconds))
            stored |= {message.id: message for message in read}
        if None in stored.values():
            raise NotFound()
        reply_id = int(reply) if reply else None
        return [Appended(message, int(committed), replayed=True, reply_id=reply_id) for message in stored.values() if message]

    async def _turn(self, user_id: int, conversation_id: int, token: str, lease_ms: int) -> bool:
        shard = self._shard(user_id, conversation_id)
        return bool(await self._scripts.run("turn", [keys.turn(shard, conversation_id)], [token, lease_ms]))

    async def _touch(self, script_keys: Sequence[str]) -> None:
        ttl = self._settings.cache_ttl_seconds
        await self._scripts.run("touch", script_keys, [ttl, ttl + EXTRA_TTL_SECONDS])

    @asynccontextmanager
    async def _lease(self, key: str) -> AsyncIterator[str | None]:
        """A lease that only one loader holds; None (after a short wait) if another does."""
        token = secrets.token_hex(8)
        if not await self._scripts.run("lease", [key], [token, LOAD_LEASE_MS]):
            await asyncio.sleep(0.02)
            yield None
            return
        try:
            yield token
        except BaseException:  # a caller who hangs up (cancelled) must not keep the next ones waiting either
            self._spawn(self._scripts.run("turn", [key], [token, 0]))  # the same "end it if it is mine"
            raise

    def _note_owner(self, user_id: int, conversation_id: int) -> None:
        if len(self._owners) >= OWNERS_MAX:
            self._owners.clear()
        self._owners[conversation_id] = user_id

    def _shard(self, user_id: int, conversation_id: int) -> int:
        shard = keys.shard_of_user(user_id, self._settings.shards)
        if keys.shard_of_id(conversation_id) != shard:
            raise NotFound()
        return shard

    @staticmethod
    @lru_cache
    def _log_keys(shard: int) -> tuple[str, ...]:
        return (keys.log(shard), keys.clock(shard), keys.backlog_bytes(shard), keys.wake(shard))

    @classmethod
    @lru_cache(KEYS_KEPT)
    def _append_keys(cls, shard: int, user_id: int, conversation_id: int) -> Packed:
        return Packed(
            (
                *cls._log_keys(shard),
                *keys.of_conversation(shard, conversation_id),
                keys.changed(shard, user_id),
                keys.committed(shard),
                keys.turn(shard, conversation_id),
                keys.events(shard, user_id),
                keys.users(shard),
                keys.messages_of_minute(shard, user_id),
            )
        )

    def _woken(self, shard: int, asked: int) -> None:
        if asked:
            self._wake(shard)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(_quietly(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)


class _Backlog:
    """How much the shards hold. A script sees its own shard exactly; the others are as they were a moment ago."""

    def __init__(self, client: AsyncRedis, settings: Settings) -> None:
        self._client = client
        self._max = self._settings_max = settings.pending_bytes_max
        self._bytes = [0] * settings.shards

    def limit(self, shard: int) -> int:
        """What this shard may hold now, in bytes."""
        return self._max - (sum(self._bytes) - self._bytes[shard])

    async def watch(self) -> None:
        """Looks every half second; keeps the last figures while Redis is away (then nothing is appended either)."""
        while True:
            try:
                await self.look()
            except (RedisError, OSError) as exc:
                log.warning("backlog unknown", error=type(exc).__name__)
            await asyncio.sleep(0.5)

    async def look(self) -> None:
        """Takes the figures."""
        async with self._client.pipeline(transaction=False) as pipeline:
            for shard in range(len(self._bytes)):
                pipeline.get(keys.backlog_bytes(shard))
            pipeline.info("memory")
            *sizes, memory = await pipeline.execute()
        self._bytes = [int(size or 0) for size in sizes]
        self._max = self._settings_max
        if memory.get("maxmemory"):
            room = int(memory["maxmemory"] * MEMORY_FULL) - memory["used_memory"]
            self._max = min(self._max, sum(self._bytes) + room)


@asynccontextmanager
async def in_time(until: float | None = None) -> AsyncIterator[None]:
    """Raises `TooSlow` when a caller would wait for longer than he should; `until` is for one who has waited already (the loop's clock).

    Each call to a store has a shorter time-out of its own, but there may be several.
    """
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + ANSWER_WITHIN_SECONDS if until is None else until):
            yield
    except TimeoutError as exc:
        raise TooSlow() from exc


async def _quietly(work: Awaitable[None]) -> None:
    """Background work serves later requests; when it fails, they do it themselves and report it."""
    try:
        await work
    except ChatkeepError as exc:
        log.info("background work failed", error=type(exc).__name__)


def client_key(key: str) -> str:
    """How a client's Idempotency-Key is stored; it can never meet a reply's."""
    return "k:" + key


def nth_key(key: str, n: int) -> str:
    """The retry key of one of several messages that came with a key, counted from 0; it can never meet another call's."""
    return f"{n}:{key}" if n else key


def reply_key(user_message_id: int) -> str:
    """The retry key of a reply: one message has one reply, whoever writes it."""
    return f"r:{user_message_id}"


@lru_cache(KEYS_KEPT)
def _read_commands(
    shard: int, conversation_id: int, direction: Literal["before", "after"] | None, from_id: int | None, count: int
) -> PackedCommands:
    """What a conversation is like, and the page; for 'after' also the oldest cached message: where the page begins depends on that."""
    state, messages = keys.conversation(shard, conversation_id), keys.messages(shard, conversation_id)
    commands: list[Command] = [("HMGET", state, "u", "d", "t", "s", "a", "m", "w", "l"), ("PTTL", state), ("GET", keys.committed(shard))]
    if direction == "before":
        commands += [("XREVRANGE", messages, "+" if from_id is None else f"({from_id}-0", "-", "COUNT", count)]
    elif direction == "after":
        commands += [("XRANGE", messages, f"({from_id}-0", "+", "COUNT", count), ("XRANGE", messages, "-", "+", "COUNT", 1)]
    return PackedCommands(commands)


def _state(number: int, user_id: int, row: Sequence[Any]) -> ConversationState | None:
    if row[4] == b"1":
        return None
    return ConversationState(number, user_id, row[1].decode() or None, int(row[2]), int(row[3]))
