"""A turn: a user's message, and the reply to it, which no client's connection owns.

The user's message is acknowledged first and takes the conversation's turn in the same step (a second turn meanwhile: `TurnRunning`). The
reply is then written by a task of this process. What it has so far lies in a stream in Redis, for whoever follows; at its end it is
appended like any other message, under a retry key made of the user message's id: one message has one reply, however often it is tried.

What ends a reply, and what is kept:

| end | kept |
| --- | --- |
| the model ends | the reply, `complete` |
| the model fails, falls silent or talks too long after some text | that text, `incomplete`; an `error` event says why |
| it fails before any text | nothing; `ReplyFailed`, and the same Idempotency-Key tries again |
| somebody stops it (any process), or this process is told to end | the text so far, `incomplete` |
| this process dies | its lease runs out (15 s); the next turn or reader or any process's `watch` stores what was streamed, `incomplete` |
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import orjson
import structlog

from api.dependencies import Page
from api.errors import describe_problem
from api.history import read_conversation, read_history
from api.metrics import ACCEPTED
from api.replies import Responder, Turn
from worker.codec import Status, Stored
from worker.errors import ChatkeepError, KeyReused, NotFound, ReplyFailed, ReplyStopped, TryAgainLater
from worker.logs import describe
from worker.pending import Appended, PendingLog, client_key, reply_key
from worker.replies import Event, ReplyStreams, Writer, text_of
from worker.settings import Settings

log = structlog.get_logger(__name__)

CONTEXT_MESSAGES = 50
"""How much of the conversation the model is given."""
COALESCE_SECONDS = 0.03
"""Text goes to the stream at most this often: each event costs Redis an fsync."""
KEEP_SECONDS = 0.21
"""A silent writer looks this often whether it is to stop."""
POLL_SECONDS = 0.03
HEARTBEAT_SECONDS = 10.0
WATCH_SECONDS = 3.0
_STORE_ATTEMPTS = 8
_INTERRUPTED = "The reply was interrupted. The history has what was kept of it."
_ALL_EVENTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Begun:
    """A turn whose user message is acknowledged. `reply` gives the assistant's message, now or when it is written."""

    user: Appended
    reply: asyncio.Future[Appended]
    replayed: bool


@dataclass(slots=True)
class _Writing:
    """A reply on its way."""

    writer: Writer
    text: str = ""
    streamed: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)


class Turns:
    """Runs the turns of this process; `start` before use, `close` after."""

    def __init__(self, pending: PendingLog, streams: ReplyStreams, responder: Responder, settings: Settings) -> None:
        self._log = pending
        self._streams = streams
        self._responder = responder
        self._settings = settings
        self._running: dict[asyncio.Task[Appended], _Writing] = {}
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to look for replies that dead processes left behind."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """Lets running replies end for a while, then has them keep what they have."""
        if self._watcher:
            self._watcher.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=self._settings.shutdown_grace_seconds)
        for writing in self._running.values():
            writing.stop.set()
        if self._running:
            await asyncio.wait(self._running, timeout=2 * self._settings.redis_timeout_seconds)
        for task in self._running:
            task.cancel()

    async def begin(self, user_id: int, conversation_id: int, text: str, key: str | None) -> Begun:
        """Stores the user's message and starts the reply; a known key gives the first turn again. Raises as `PendingLog.append` does."""
        if (await self._streams.read(conversation_id, count=1)).abandoned:
            await read_conversation(self._log, user_id, conversation_id)  # whoever finishes it must be its owner
            await self.finish_abandoned(user_id, conversation_id)
        token = secrets.token_hex(16)
        asked = await self._log.append(user_id, conversation_id, "user", text, key=client_key(key) if key else None, turn=token)
        if not asked.replayed:
            ACCEPTED.inc()
        if asked.reply_id is not None:
            answered: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
            answered.set_result(await self._stored_reply(user_id, conversation_id, asked.reply_id))
            return Begun(asked, answered, replayed=True)
        writing = _Writing(Writer(user_id, conversation_id, token, asked.message.id))
        await self._announce(writing, asked)
        task = asyncio.get_running_loop().create_task(self._write(writing))
        self._running[task] = writing
        task.add_done_callback(self._done)
        return Begun(asked, task, replayed=False)

    async def follow(self, user_id: int, conversation_id: int, after: str) -> AsyncIterator[Event | None]:
        """The events of the running reply after `after`, until its last one; None now and then, so that a connection stays alive."""
        quiet = 0.0
        while True:
            found = await self._streams.read(conversation_id, after)
            if found.abandoned and not found.events:
                await self.finish_abandoned(user_id, conversation_id)
                continue
            for event in found.events:
                yield event
                after = event.id
                if event.last:
                    return
            if not found.events and found.ended:
                return
            quiet = 0.0 if found.events else quiet + POLL_SECONDS
            if quiet >= HEARTBEAT_SECONDS:
                quiet = 0.0
                yield None
            await asyncio.sleep(POLL_SECONDS)

    async def is_running(self, conversation_id: int, after: str) -> bool:
        """Whether there is something to follow: a reply without an end, or the rest of one that this reader has seen the beginning of."""
        found = await self._streams.read(conversation_id, after, count=1)
        return not found.ended or bool(after and found.events)

    async def stop(self, conversation_id: int) -> bool:
        """Stops the running reply, whichever process writes it; False if there is none."""
        return await self._streams.stop(conversation_id)

    async def finish_abandoned(self, user_id: int, conversation_id: int) -> None:
        """Stores what a dead process had streamed. Safe from any number of processes: the reply's key lets one of them store it."""
        found = await self._streams.read(conversation_id, count=_ALL_EVENTS)
        if not found.abandoned:
            return
        text, question = text_of(found.events), found.events[0].question_id
        try:
            if not text.strip():
                raise ReplyFailed()
            reply = await self._log.append(
                user_id, conversation_id, "assistant", text, status="incomplete", key=reply_key(question), counted=False
            )
        except NotFound:
            await self._streams.close_abandoned(user_id, conversation_id, None)
        except (ReplyFailed, KeyReused):  # KeyReused: it had stored the whole reply before it died; the history has it
            interrupted = describe_problem(ReplyFailed(_INTERRUPTED))
            await self._streams.close_abandoned(user_id, conversation_id, "error", orjson.dumps(interrupted))
        else:
            await self._streams.close_abandoned(user_id, conversation_id, "assistant_message", reply.message.public(reply.committed))
        log.warning("abandoned reply stored", characters=len(text))

    # Writing

    def _done(self, task: asyncio.Task[Appended]) -> None:
        self._running.pop(task, None)
        if not task.cancelled() and (exc := task.exception()):  # nobody may be waiting for it any more
            log.info("turn ended without a reply", error=type(exc).__name__)

    async def _announce(self, writing: _Writing, asked: Appended) -> None:
        """The first event. Followers need it, the reply does not."""
        writer, data = writing.writer, asked.message.public(asked.committed)
        try:
            if await self._streams.begin(writer, data) == "ABANDONED":  # its lease ran out between our look and our append
                await self._streams.begin(writer, data, drop_abandoned=True)
        except TryAgainLater as exc:
            log.info("reply not announced", error=type(exc).__name__)

    async def _write(self, writing: _Writing) -> Appended:
        pump = asyncio.get_running_loop().create_task(self._pump(writing))
        try:
            failure = await self._generate(writing)
            if not writing.text.strip():
                raise failure or ReplyFailed()
            reply = await self._store(writing, "incomplete" if failure else "complete")
        except ChatkeepError as exc:
            await self._finish(pump, writing, None, exc)
            raise
        except BaseException:
            pump.cancel()
            raise
        await self._finish(pump, writing, reply, None if isinstance(failure, ReplyStopped) else failure)
        return reply

    async def _generate(self, writing: _Writing) -> ReplyFailed | ReplyStopped | None:
        """Collects the reply until it ends, fails or is stopped; answers why it is not whole, if it is not."""
        consumer = asyncio.get_running_loop().create_task(self._consume(writing))
        stopped = asyncio.get_running_loop().create_task(writing.stop.wait())
        try:
            await asyncio.wait({consumer, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not consumer.done():
                return ReplyStopped()
            return consumer.result()
        finally:
            for task in (consumer, stopped):
                task.cancel()
            await asyncio.gather(consumer, stopped, return_exceptions=True)

    async def _consume(self, writing: _Writing) -> ReplyFailed | None:
        idle = self._settings.reply_idle_seconds
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(idle) as patience:
                async for piece in self._responder.stream(await self._context(writing.writer)):
                    writing.text += piece
                    if len(writing.text) >= self._settings.reply_chars_max:
                        writing.text = writing.text[: self._settings.reply_chars_max]
                        return ReplyFailed(f"The reply was cut at {self._settings.reply_chars_max} characters.")
                    patience.reschedule(loop.time() + idle)
        except TimeoutError:
            return ReplyFailed(f"The model fell silent for {idle:g} s. What it had said is kept; repeat the call to try again.")
        except ReplyFailed as exc:
            return exc
        except ChatkeepError:
            raise
        except Exception as exc:  # noqa: BLE001 - whatever a responder raises, its reply has failed, and the turn must not wait for its lease
            log.error("reply failed", **describe(exc))
            return ReplyFailed()
        return None

    async def _pump(self, writing: _Writing) -> None:
        """Streams the text on as it comes, keeps the turn, and notices when somebody asks to stop."""
        since = 0.0
        while True:
            await asyncio.sleep(COALESCE_SECONDS)
            since += COALESCE_SECONDS
            fresh = writing.text[writing.streamed :]
            if not fresh and since < KEEP_SECONDS:
                continue
            since = 0.0
            try:
                outcome = await self._stream_on(writing, fresh) if fresh else await self._streams.keep(writing.writer)
            except TryAgainLater as exc:
                log.info("reply not streamed", error=type(exc).__name__)
                continue
            if outcome != "OK":  # also when the turn is lost: the conversation was deleted, or we were stalled and somebody went on
                writing.stop.set()

    async def _stream_on(self, writing: _Writing, fresh: str) -> str:
        outcome = await self._streams.add(writing.writer, "delta", orjson.dumps({"text": fresh}))
        writing.streamed += len(fresh)
        return outcome

    async def _finish(self, pump: asyncio.Task[None], writing: _Writing, reply: Appended | None, failure: ChatkeepError | None) -> None:
        """The rest of the text, what was stored and what went wrong; the last event ends the turn. If Redis is away, `watch` ends it."""
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)
        try:
            if fresh := writing.text[writing.streamed :]:
                await self._stream_on(writing, fresh)
            if reply:
                message = reply.message.public(reply.committed)
                await self._streams.add(writing.writer, "assistant_message", message, last=failure is None)
            if failure:
                await self._streams.add(writing.writer, "error", orjson.dumps(describe_problem(failure)), last=True)
        except TryAgainLater as exc:
            log.info("end of a reply not streamed", error=type(exc).__name__)

    async def _store(self, writing: _Writing, status: Status) -> Appended:
        """Appends the reply, again and again for a while: it is worth more than an append that is safe to repeat."""
        writer = writing.writer
        for attempt in range(_STORE_ATTEMPTS):
            try:
                reply = await self._log.append(
                    writer.user_id,
                    writer.conversation_id,
                    "assistant",
                    writing.text,
                    status=status,
                    key=reply_key(writer.question_id),
                    counted=False,
                )
            except TryAgainLater:
                if attempt == _STORE_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(0.25 * (attempt + 1))
            except KeyReused as exc:  # we were stalled for longer than our lease, and somebody has stored what there was
                raise ReplyFailed(_INTERRUPTED) from exc
            else:
                ACCEPTED.inc(not reply.replayed)
                return reply
        raise AssertionError("unreachable")

    async def _context(self, writer: Writer) -> list[Turn]:
        """The latest messages up to the question."""
        until = writer.question_id + 1
        cached = await self._log.read(writer.user_id, writer.conversation_id, "before", until, CONTEXT_MESSAGES)
        if cached:  # as much as Redis has: a reply should not wait for Postgres
            messages: Sequence[Stored] = cached.messages[::-1]
        else:
            page = Page(limit=CONTEXT_MESSAGES, before=until)
            messages = (await read_history(self._log, writer.user_id, writer.conversation_id, page)).messages
        return [Turn(body["role"], body["content"]) for body in (orjson.loads(message.body) for message in messages)]

    async def _stored_reply(self, user_id: int, conversation_id: int, reply_id: int) -> Appended:
        page = await read_history(self._log, user_id, conversation_id, Page(limit=1, before=reply_id + 1))
        return Appended(page.messages[-1], page.committed, replayed=True)

    # Dead processes

    async def _watch(self) -> None:
        """Any process finishes what a dead one left, also when nobody asks for it."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                for user_id, conversation_id in await self._streams.begun():
                    await self.finish_abandoned(user_id, conversation_id)
            except ChatkeepError as exc:
                log.info("abandoned replies not looked for", error=type(exc).__name__)
