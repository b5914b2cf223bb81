"""A turn: a user's message, and the reply to it, which no client's connection owns.

The user's message is acknowledged first and takes the conversation's turn in the same step (a second turn meanwhile: `TurnRunning`). The
reply is then written by a task of this process. What it has so far lies in a stream in Redis, for whoever follows; at its end it is
appended like any other message, under a retry key made of the user message's id: one message has one reply, however often it is tried.
If the process dies, the turn's lease runs out; the same call with the same Idempotency-Key then tries the reply again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

import orjson
import structlog

from api.dependencies import Page
from api.errors import describe_problem
from api.history import read_history
from api.metrics import ACCEPTED
from api.replies import Responder, Turn
from worker.codec import Status, Stored
from worker.errors import ChatkeepError, NotFound, ReplyFailed, TryAgainLater
from worker.pending import TURN_LEASE_MS, Appended, PendingLog, client_key, reply_key
from worker.replies import Event, ReplyStreams

log = structlog.get_logger(__name__)

CONTEXT_MESSAGES = 50
"""How much of the conversation the model is given."""
COALESCE_SECONDS = 0.03
"""Text goes to the stream at most this often: each event costs Redis an fsync."""
POLL_SECONDS = 0.03
HEARTBEAT_SECONDS = 10.0
_STORE_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Begun:
    """A turn whose user message is acknowledged. `reply` gives the assistant's message, now or when it is written."""

    user: Appended
    reply: asyncio.Future[Appended]
    replayed: bool


@dataclass(slots=True)
class _Writing:
    """A reply on its way."""

    user_id: int
    conversation_id: int
    token: str
    question: Stored
    text: str = ""
    streamed: int = 0


class Turns:
    """Runs the turns of this process; `close` waits for them."""

    def __init__(self, pending: PendingLog, streams: ReplyStreams, responder: Responder) -> None:
        self._log = pending
        self._streams = streams
        self._responder = responder
        self._tasks: set[asyncio.Task[Appended]] = set()

    async def begin(self, user_id: int, conversation_id: int, text: str, key: str | None) -> Begun:
        """Stores the user's message and starts the reply; a known key gives the first turn again. Raises as `PendingLog.append` does."""
        token = secrets.token_hex(16)
        asked = await self._log.append(user_id, conversation_id, "user", text, key=client_key(key) if key else None, turn=token)
        if not asked.replayed:
            ACCEPTED.inc()
        if asked.reply_id is not None:
            answered: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
            answered.set_result(await self._stored_reply(user_id, conversation_id, asked.reply_id))
            return Begun(asked, answered, replayed=True)
        writing = _Writing(user_id, conversation_id, token, asked.message)
        await self._add(writing, "user_message", asked.message.public(asked.committed), begin=True)
        task = asyncio.get_running_loop().create_task(self._write(writing))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return Begun(asked, task, replayed=False)

    async def follow(self, conversation_id: int, after: str) -> AsyncIterator[Event | None]:
        """The events of the running reply after `after`, until its last one; None now and then, so that a connection stays alive."""
        quiet = 0.0
        while True:
            running, events = await self._streams.read(conversation_id, after)
            for event in events:
                yield event
                after = event.id
                if event.last:
                    return
            if events:
                quiet = 0.0
            elif not running:
                return
            await asyncio.sleep(POLL_SECONDS)
            quiet += POLL_SECONDS
            if quiet >= HEARTBEAT_SECONDS:
                quiet = 0.0
                yield None

    async def close(self, grace_seconds: float) -> None:
        """Lets running replies end; those that take longer are given up (their lease runs out)."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_seconds)
        for task in self._tasks:
            task.cancel()

    def _done(self, task: asyncio.Task[Appended]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()):  # nobody may be waiting for it any more
            log.info("turn ended without a reply", error=type(exc).__name__)

    async def _write(self, writing: _Writing) -> Appended:
        keeper = asyncio.get_running_loop().create_task(self._keep(writing))
        try:
            status = await self._generate(writing)
            reply = await self._store(writing, status)
            await self._add(writing, "assistant_message", reply.message.public(reply.committed))
            return reply
        except ChatkeepError as exc:
            await self._add(writing, "error", orjson.dumps(describe_problem(exc)))
            raise
        finally:
            keeper.cancel()
            await self._end(writing)

    async def _generate(self, writing: _Writing) -> Status:
        """Collects the reply and streams it on; 'incomplete' if the model failed in the middle. Raises `ReplyFailed` if it gave nothing."""
        failure: ReplyFailed | None = None
        loop = asyncio.get_running_loop()
        sent_at = 0.0
        try:
            async for piece in self._responder.stream(await self._context(writing)):
                writing.text += piece
                if loop.time() - sent_at >= COALESCE_SECONDS:
                    await self._stream_on(writing)
                    sent_at = loop.time()
        except ReplyFailed as exc:
            failure = exc
        if not writing.text.strip():
            raise failure or ReplyFailed()
        await self._stream_on(writing)
        return "incomplete" if failure else "complete"

    async def _context(self, writing: _Writing) -> list[Turn]:
        """The latest messages up to the question."""
        page = Page(limit=CONTEXT_MESSAGES, before=writing.question.id + 1)
        messages = (await read_history(self._log, writing.user_id, writing.conversation_id, page)).messages
        return [Turn(body["role"], body["content"]) for body in (orjson.loads(message.body) for message in messages)]

    async def _stream_on(self, writing: _Writing) -> None:
        fresh = writing.text[writing.streamed :]
        if fresh:
            await self._add(writing, "delta", orjson.dumps({"text": fresh}))
            writing.streamed = len(writing.text)

    async def _store(self, writing: _Writing, status: Status) -> Appended:
        """Appends the reply, again and again for a while: it is worth more than an append that is safe to repeat."""
        for attempt in range(_STORE_ATTEMPTS):
            try:
                reply = await self._log.append(
                    writing.user_id,
                    writing.conversation_id,
                    "assistant",
                    writing.text,
                    status=status,
                    key=reply_key(writing.question.id),
                )
                ACCEPTED.inc(not reply.replayed)
                return reply
            except TryAgainLater:
                if attempt == _STORE_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(0.25 * (attempt + 1))
        raise AssertionError("unreachable")

    async def _keep(self, writing: _Writing) -> None:
        """Prolongs the lease while the model is silent."""
        while True:
            await asyncio.sleep(TURN_LEASE_MS / 3000)
            try:
                await self._log.keep_turn(writing.user_id, writing.conversation_id, writing.token)
            except TryAgainLater as exc:
                log.info("turn not prolonged", error=type(exc).__name__)

    async def _add(self, writing: _Writing, name: str, data: bytes, *, begin: bool = False) -> None:
        """Streams an event, for those who follow; the reply itself does not depend on it."""
        try:
            await self._streams.add(writing.conversation_id, writing.token, name, data, begin=begin)  # type: ignore[arg-type]
        except TryAgainLater as exc:
            log.info("reply event not streamed", error=type(exc).__name__)

    async def _end(self, writing: _Writing) -> None:
        try:
            await self._log.end_turn(writing.user_id, writing.conversation_id, writing.token)
        except (TryAgainLater, NotFound) as exc:
            log.info("turn not ended, its lease runs out", error=type(exc).__name__)

    async def _stored_reply(self, user_id: int, conversation_id: int, reply_id: int) -> Appended:
        page = await read_history(self._log, user_id, conversation_id, Page(limit=1, before=reply_id + 1))
        return Appended(page.messages[-1], page.committed, replayed=True)
