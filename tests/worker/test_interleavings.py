"""The merge and the flush, in every order that their steps can fall: the real functions, on the real stores, driven one step at a time.

A flush has six steps (`tests/core.py`). Between `lock` and `commit` it touches nothing that anybody else can see or change, but that it
reads the log: an append before `fetch` is in the batch, one after is not, as if it had come before `lock` or after `commit`. So most tests
take these steps as one, and lose no order that could be told from another.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import structlog
from redis import Redis

from api.dependencies import Page
from api.history import HistoryPage, list_conversations, read_conversation, read_history
from tests import core
from worker import committed, flush, keys
from worker.errors import NotFound
from worker.flush import flush_shard
from worker.pending import PendingLog, client_key
from worker.settings import Settings

pytestmark = pytest.mark.anyio
EMPTIED = True

SEEDS = int(os.environ.get("CHATKEEP_WALKS", "5"))
"""Of long walks; more of them by hand."""
APART = ("wake", "lock", "commit", "trim")
"""The steps of a flush that do not commute with somebody else's."""


class Order:
    """One order of steps: whoever may move next is picked by `pick`."""

    def __init__(self, beginning: Sequence[int]) -> None:
        self._beginning = beginning
        self.picked: list[tuple[int, int]] = []
        self.names = ""

    def pick(self, able: str) -> str:
        at = len(self.picked)
        chosen = self._beginning[at] if at < len(self._beginning) else 0
        self.picked.append((chosen, len(able)))
        self.names += able[chosen]
        return able[chosen]


def every_order() -> Iterator[Order]:
    """Each order once: after each run, the last pick that had another choice takes the next one."""
    beginning: list[int] = []
    while True:
        order = Order(beginning)
        yield order
        beginning = [chosen for chosen, _ in order.picked]
        while beginning and beginning[-1] + 1 == order.picked[len(beginning) - 1][1]:
            beginning.pop()
        if not beginning:
            return
        beginning[-1] += 1


@pytest.fixture(autouse=True)
def quick(redis: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache that keeps two committed messages, so that a page has a seam; and no fsync, which no order depends on."""
    monkeypatch.setattr(settings, "cache_messages_max", 2)
    redis.config_set("appendfsync", "no")
    with core.gates(), structlog.testing.capture_logs():
        yield
    redis.config_set("appendfsync", "always")


@pytest.fixture
def no_background(log: PendingLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the API loads in the background is an actor of its own here."""
    monkeypatch.setattr(log, "_spawn", lambda work: work.close())


def texts(page: HistoryPage) -> list[str]:
    ids = [message.id for message in page.messages]
    assert ids == sorted(set(ids)), "out of order, or twice"
    return [core.text(message.body) for message in page.messages]


class TestMergedRead:
    async def test_every_acknowledged_message_is_seen_once_whatever_the_flush_does(self, settings, redis, log, user, shard, conversation):
        """One flush, an append, and a read in three steps: what it does before it asks Postgres, that, and what it does after."""
        said: list[str] = []
        ids: list[int] = []

        async def say() -> None:
            said.append(str(len(said)))
            ids.append((await log.append(user, conversation, "user", said[-1])).message.id)

        for _ in range(8):
            await say()
        halves = core.Halves(log)
        count = 0
        for order in every_order():
            count += 1
            await say()  # so that the flush has something to do, whenever it looks
            flusher = core.Flusher(lambda: flush_shard(redis, settings, shard), APART)
            start, known, reads = len(said), 0, []
            while able := "w" * (len(said) == start) + "f" * (flusher.at is not None) + "r" * (not reads or not reads[0].done()):
                step = order.pick(able)
                if step == "w":
                    await say()
                elif step == "f":
                    flusher.step()
                elif not reads:
                    known = len(said)
                    pages = Page(limit=5), Page(limit=5, before=(1 << 53) - 1), Page(limit=200, after=ids[start - 7])
                    reads = [await halves.start(read_history(log, user, conversation, page)) for page in pages]
                else:
                    for read in reads:
                        await halves.step(read)
            latest, before, after = [await read for read in reads]
            moments = range(known, len(said) + 1)
            assert texts(latest) in [said[n - 5 : n] for n in moments], order.names
            assert texts(before) in [said[n - 5 : n] for n in moments], order.names
            assert texts(after) in [said[start - 6 : n] for n in moments], order.names
            assert self._committed(conversation, ids[start - 7]) >= {m.id for m in after.messages if m.id <= after.committed}
            assert texts(await read_history(log, user, conversation, Page(limit=5))) == said[-5:], order.names
            flush_shard(redis, settings, shard)
        assert count == 280
        assert core.contents(conversation) == said
        core.assert_clean(redis, settings)

    async def test_also_of_a_conversation_that_is_forgotten_meanwhile(self, settings, redis, log, user, shard, no_background) -> None:
        """`x` is what expiry may do at any moment: it takes whatever has an expiry."""
        halves = core.Halves(log)
        count = 0
        for order in every_order():
            count += 1
            conversation = await known_conversation(settings, redis, log, user, shard)
            said = ["one", "two", "three", "pending"]
            await log.append(user, conversation, "user", "pending")
            flusher = core.Flusher(lambda: flush_shard(redis, settings, shard), ("commit", "trim"))
            known, read = 0, None
            while able := (
                "w" * (len(said) < 5)
                + "f" * (flusher.at is not None)
                + "r" * (read is None or not read.done())
                + "x" * expires(redis, shard, conversation)
            ):
                step = order.pick(able)
                if step == "w":
                    said.append("new")
                    await log.append(user, conversation, "user", "new")
                elif step == "f":
                    flusher.step()
                elif step == "x":
                    core.forget(redis, user, conversation, settings)
                elif read is None:
                    known = len(said)
                    read = await halves.start(read_history(log, user, conversation, Page(limit=200)))
                else:
                    await halves.step(read)
            assert texts(await read) in (said, said[:known]), order.names
            assert await core.shown(log, user, conversation) == said, order.names
            flush_shard(redis, settings, shard)
        assert count > 60
        core.assert_clean(redis, settings)

    @staticmethod
    def _committed(conversation: int, above: int) -> set[int]:
        return {row[0] for row in core.ask("SELECT id FROM message WHERE conversation_id = %s AND id > %s", conversation, above)}

    @pytest.mark.parametrize("page", [Page(limit=5), Page(limit=5, before=(1 << 53) - 1), Page(limit=5, after=1)])
    async def test_a_conversation_deleted_meanwhile_shows_no_part_of_itself(
        self, settings, redis, log, user, shard, conversation, monkeypatch, page
    ) -> None:
        """The cached half of a page, read before the deletion, with nothing below it would look like a whole one."""
        monkeypatch.setattr(settings, "cache_messages_max", 2)
        for i in range(4):
            await log.append(user, conversation, "user", str(i))
        flush_shard(redis, settings, shard)
        halves = core.Halves(log)
        reading = await halves.start(read_history(log, user, conversation, page))
        await log.delete(user, conversation)
        flush_shard(redis, settings, shard)
        with pytest.raises(NotFound):
            await halves.finish(reading)

    async def test_also_not_if_it_is_deleted_while_postgres_is_asked(
        self, settings, redis, log, user, shard, conversation, monkeypatch
    ) -> None:
        """The conversation and its messages are of one snapshot."""
        monkeypatch.setattr(settings, "cache_messages_max", 2)
        for i in range(6):
            await log.append(user, conversation, "user", str(i))
        flush_shard(redis, settings, shard)
        find, loop = committed.read_rows, asyncio.get_running_loop()

        def found_then_deleted(*arguments: Any, **options: Any) -> object:
            found = find(*arguments, **options)
            asyncio.run_coroutine_threadsafe(log.delete(user, conversation), loop).result(10)
            flush_shard(redis, settings, shard)
            return found

        monkeypatch.setattr(committed, "read_rows", found_then_deleted)
        assert texts(await read_history(log, user, conversation, Page(limit=5))) == ["1", "2", "3", "4", "5"]


class TestPaging:
    @pytest.mark.parametrize("direction", ["before", "after"])
    async def test_a_walk_over_the_moving_boundary_misses_and_repeats_nothing(
        self, settings, redis, log, user, shard, direction, no_background
    ) -> None:
        """Pages of two, while a flush commits what is pending and the cache lets go of it: together they are the history."""
        count = 0
        for order in every_order():
            count += 1
            conversation = await known_conversation(settings, redis, log, user, shard)
            said = ["one", "two", "three", "four", "five"]
            for content in said[3:]:
                await log.append(user, conversation, "user", content)
            flusher = core.Flusher(lambda: flush_shard(redis, settings, shard), ("commit", "trim"))
            walked: list[str] = []
            page, more = Page(limit=2, **({} if direction == "before" else {"after": 1})), True
            while able := "p" * more + "f" * (flusher.at is not None) + "x" * expires(redis, shard, conversation):
                step = order.pick(able)
                if step == "f":
                    flusher.step()
                elif step == "x":
                    core.forget(redis, user, conversation, settings)
                else:
                    found = await read_history(log, user, conversation, page)
                    walked = [*texts(found), *walked] if direction == "before" else [*walked, *texts(found)]
                    assert found.has_newer == (walked[-1] != "five" if direction == "after" else len(walked) > 2), order.names
                    if direction == "before":
                        more, page = found.has_older, Page(limit=2, before=found.messages[0].id)
                    else:
                        assert found.has_older == (len(walked) > 2), order.names
                        more, page = found.has_newer, Page(limit=2, after=found.messages[-1].id)
            assert walked == said, order.names
            flush_shard(redis, settings, shard)
        assert count >= 20
        core.assert_clean(redis, settings)


class TestHandover:
    async def test_two_flushers_and_an_append_lose_nothing_and_leave_nothing_behind(
        self, settings, redis, log, user, shard, conversation, wakes
    ):
        """A flush that was asked for and one that came twice. What they leave in the log, somebody was told to fetch."""
        said: list[str] = []

        async def say() -> None:
            said.append(str(len(said)))
            await log.append(user, conversation, "user", said[-1])

        count = 0
        for order in every_order():
            count += 1
            await say()
            flushers = [core.Flusher(lambda: flush_shard(redis, settings, shard), APART) for _ in "fg"]
            redis.set(keys.wake(shard), "1", px=3000)  # the one of them that was asked for
            wakes.clear()
            end = len(said) + 1
            # They are alike, so `f` is the one that moves first.
            while (
                able := "w" * (len(said) < end)
                + "f" * (flushers[0].at is not None)
                + "g" * ("f" in order.names and flushers[1].at is not None)
            ):
                step = order.pick(able)
                if step == "w":
                    await say()
                else:
                    flushers["fg".index(step)].step()
            assert (await core.shown(log, user, conversation, limit=5)) == said[-5:], order.names
            if redis.xlen(keys.log(shard)):
                assert wakes == [shard], order.names
            flush_shard(redis, settings, shard)
        assert count > 100
        assert core.contents(conversation) == said
        core.assert_clean(redis, settings)


class TestLoading:
    @pytest.mark.parametrize("change", ["append", "rename", "delete"])
    async def test_a_slow_loader_never_hides_a_change(self, settings, redis, log, user, shard, change, no_background) -> None:
        """A loader that has read Postgres comes late: after a change, its flush, and the expiry of everything that knew of it."""
        halves = core.Halves(log)
        count = 0
        for order in every_order():
            count += 1
            conversation = await known_conversation(settings, redis, log, user, shard)
            flusher, loader, changed, loads = None, None, False, 3
            while able := (
                "w" * (not changed and redis.exists(keys.conversation(shard, conversation)))
                + "f" * (changed and (flusher is None or flusher.at is not None))
                + "x" * expires(redis, shard, conversation)
                + "l" * (loads > 0)
            ):
                step = order.pick(able)
                if step == "w":
                    await make_change(change, log, user, conversation)
                    changed = True
                elif step == "f":
                    flusher = flusher or core.Flusher(lambda: flush_shard(redis, settings, shard), ("lock", "trim"))
                    flusher.step()
                elif step == "x":
                    core.forget(redis, user, conversation, settings)
                else:
                    loads -= 1
                    if loader is None:
                        loader = await halves.start(log._load(shard, user, conversation))
                    elif loads:
                        await halves.step(loader)
                    else:
                        await halves.finish(loader)
                assert await looks(log, user, conversation) == (EXPECTED[change] if changed else EXPECTED[None]), order.names
            flush_shard(redis, settings, shard)
        assert count > 30
        core.assert_clean(redis, settings)


EXPECTED = {
    None: ("title", ["one", "two", "three"]),
    "append": ("title", ["one", "two", "three", "new"]),
    "rename": ("renamed", ["one", "two", "three"]),
    "delete": None,
}


async def make_change(change: str, log: PendingLog, user: int, conversation: int) -> None:
    if change == "append":
        await log.append(user, conversation, "user", "new")
    elif change == "rename":
        await log.rename(user, conversation, "renamed")
    else:
        await log.delete(user, conversation)


async def looks(log: PendingLog, user: int, conversation: int) -> tuple[str | None, list[str]] | None:
    """What a reader sees: the title, everywhere the same, and the messages; None if there is no such conversation, in the list neither."""
    listed = {state.id: state.title for state in (await list_conversations(log, user, 100, None)).items}
    try:
        page = await read_history(log, user, conversation, Page(limit=200))
    except NotFound:
        assert conversation not in listed
        return None
    assert page.conversation.title == listed[conversation] == (await read_conversation(log, user, conversation)).title
    return page.conversation.title, texts(page)


async def known_conversation(settings: Settings, redis: Redis, log: PendingLog, user: int, shard: int) -> int:
    """A committed conversation of three messages, of which the cache keeps two."""
    conversation = (await log.create(user, "title")).conversation.id
    for content in ("one", "two", "three"):
        await log.append(user, conversation, "user", content)
    flush_shard(redis, settings, shard)
    return conversation


def expires(redis: Redis, shard: int, conversation: int) -> bool:
    return redis.pttl(keys.conversation(shard, conversation)) > 0


class TestLongWalk:
    """Orders that are too long to try all of them: everything at once, in an order that a seed decides."""

    @pytest.mark.parametrize("seed", range(SEEDS))
    async def test_history_is_what_was_acknowledged(self, settings, redis, log, user, shard, no_background, monkeypatch, seed) -> None:
        monkeypatch.setattr(settings, "flush_batch_max", 3)
        monkeypatch.setattr(flush, "_TRIM_CHUNK", 2)
        others = [core.make_user() for _ in range(settings.shards)]
        walk = Walk(settings, redis, log, shard, [user, others[-1]], random.Random(seed))
        await walk.create()
        for _ in range(400):
            await walk.step()
        await walk.end()
        core.assert_clean(redis, settings)


class Walk:
    """Two users of one shard, up to four conversations, two flushers, readers and loaders, and what was acknowledged (the model)."""

    def __init__(self, settings: Settings, redis: Redis, log: PendingLog, shard: int, users: list[int], dice: random.Random) -> None:
        self.settings, self.redis, self.log, self.shard, self.users, self.dice = settings, redis, log, shard, users, dice
        self.halves = core.Halves(log)
        self.said: dict[int, list[str]] = {}
        self.ids: dict[tuple[int, str], int] = {}
        self.titles: dict[int, str | None] = {}
        self.owners: dict[int, int] = {}
        self.created: dict[str, int] = {}
        self.gone: set[int] = set()
        self.flushers: list[core.Flusher | None] = [None, None]
        self.readers: list[tuple[asyncio.Task[HistoryPage], int, int]] = []
        self.loaders: list[tuple[asyncio.Task[None], int]] = []
        self.trace: list[str] = []

    async def step(self) -> None:
        moves = {
            self.say: 6,
            self.say_again: 2,
            self.flush: 14,
            self.begin_read: 4,
            self.end_read: 4,
            self.expire: 3,
            self.load: 4,
            self.rename: 3,
            self.create: 1,
            self.create_again: 1,
            self.kill: 1,
            self.delete: 0.3,
            self.clock_leaps: 0.2,
            self.wipe: 0.3,
        }
        [move] = self.dice.choices(list(moves), list(moves.values()))
        self.trace.append(move.__name__)
        await move()

    async def end(self) -> None:
        """Everybody does what is left; then both stores have exactly what was acknowledged, and a retry finds it."""
        for i, flusher in enumerate(self.flushers):
            if flusher is not None:
                flusher.finish()
                self.flushers[i] = None
        while self.readers:
            await self.end_read()
        while self.loaders:
            await self.halves.finish(self.loaders.pop()[0])
        flush_shard(self.redis, self.settings, self.shard)
        for emptied in (False, True):
            if emptied:
                await self.wipe()
            for conversation, said in self.said.items():
                await self._check(conversation, said)
                assert core.contents(conversation) == said, self.trace
        flush_shard(self.redis, self.settings, self.shard)
        assert core.dead_letters() == [], self.trace

    async def _check(self, conversation: int, said: list[str]) -> None:
        user = self.owners[conversation]
        if conversation in self.gone:
            with pytest.raises(NotFound):
                await core.shown(self.log, user, conversation)
            return
        assert await core.shown(self.log, user, conversation) == said, self.trace
        listed = {state.id: state.title for state in (await list_conversations(self.log, user, 100, None)).items}
        assert listed == {number: self.titles[number] for number, owner in self.owners.items() if owner == user and number not in self.gone}
        for content in said[:: max(1, len(said) // 5)]:
            again = await self.log.append(user, conversation, "user", content, key=client_key(content))
            assert (again.replayed, again.message.id) == (True, self.ids[conversation, content]), self.trace

    # Moves

    async def create(self) -> None:
        if len(self.owners) < 4:
            user, key = self.dice.choice(self.users), str(len(self.owners))
            conversation = (await self.log.create(user, None, key=client_key(key))).conversation.id
            self.said[conversation], self.titles[conversation], self.owners[conversation], self.created[key] = [], None, user, conversation

    async def create_again(self) -> None:
        key = self.dice.choice(list(self.created))
        again = await self.log.create(self.owners[self.created[key]], None, key=client_key(key))
        assert (again.replayed, again.conversation.id) == (True, self.created[key]), self.trace

    async def say(self) -> None:
        conversation = await self._pick()
        content = f"{len(self.trace)}"
        call = self.log.append(self.owners[conversation], conversation, "user", content, key=client_key(content))
        if conversation in self.gone:
            with pytest.raises(NotFound):
                await call
            return
        appended = await call
        assert not appended.replayed
        assert all(appended.message.id > self.ids[conversation, earlier] for earlier in self.said[conversation][-1:])
        self.ids[conversation, content] = appended.message.id
        self.said[conversation].append(content)
        self.titles[conversation] = self.titles[conversation] or content

    async def say_again(self) -> None:
        conversation = await self._pick()
        if self.said[conversation] and conversation not in self.gone:
            content = self.dice.choice(self.said[conversation])
            again = await self.log.append(self.owners[conversation], conversation, "user", content, key=client_key(content))
            assert (again.replayed, again.message.id) == (True, self.ids[conversation, content]), self.trace

    async def rename(self) -> None:
        conversation = await self._pick()
        if conversation not in self.gone:
            await self.log.rename(self.owners[conversation], conversation, f"title {len(self.trace)}")
            self.titles[conversation] = f"title {len(self.trace)}"

    async def delete(self) -> None:
        conversation = await self._pick()
        if conversation not in self.gone:
            await self.log.delete(self.owners[conversation], conversation)
            self.gone.add(conversation)
            self.said[conversation] = []

    async def flush(self) -> None:
        which = self.dice.randrange(2)
        flusher = self.flushers[which]
        if flusher is None:
            self.flushers[which] = core.Flusher(lambda: flush_shard(self.redis, self.settings, self.shard))
        elif flusher.step() is None:
            flusher.finish()
            self.flushers[which] = None

    async def kill(self) -> None:
        which = self.dice.randrange(2)
        flusher = self.flushers[which]
        if flusher is not None:
            self.trace.append(f"at {flusher.at}")
            flusher.kill()
            self.flushers[which] = None

    async def begin_read(self) -> None:
        conversation = self.dice.choice(list(self.owners))
        if conversation not in self.gone:
            read = read_history(self.log, self.owners[conversation], conversation, Page(limit=200))
            self.readers.append((await self.halves.start(read), conversation, len(self.said[conversation])))

    async def end_read(self) -> None:
        if not self.readers:
            return
        task, conversation, known = self.readers.pop(self.dice.randrange(len(self.readers)))
        try:
            page = await self.halves.finish(task)
        except NotFound:
            assert conversation in self.gone, self.trace
            return
        if conversation not in self.gone:  # else it was deleted meanwhile, and what is seen depends on when
            seen, said = texts(page), self.said[conversation]
            assert seen == said[: len(seen)], self.trace
            assert len(seen) >= known, self.trace

    async def expire(self) -> None:
        conversation = self.dice.choice(list(self.owners))
        core.forget(self.redis, self.owners[conversation], conversation, self.settings)

    async def load(self) -> None:
        """Begins one, or does a step of one that is under way."""
        if self.loaders and self.dice.random() < 0.7:
            await self.halves.step(self.loaders[0][0])
            if self.loaders[0][0].done():
                await self.loaders.pop(0)[0]
            return
        conversation = self.dice.choice(list(self.owners))
        if not self.redis.exists(keys.conversation(self.shard, conversation)):
            work = self.log._load(self.shard, self.owners[conversation], conversation)
            self.loaders.append((await self.halves.start(work), conversation))

    async def clock_leaps(self) -> None:
        """An hour ahead, and back at once: ids go on from where they were."""
        clock = keys.clock(self.shard)
        if tick := self.redis.get(clock):
            self.redis.set(clock, int(tick) + 3600 * 100_000)

    async def wipe(self) -> None:
        """Redis loses everything, at a moment when nothing is pending."""
        if not self.redis.xlen(keys.log(self.shard)):
            self.redis.flushall()

    async def _pick(self) -> int:
        """A conversation to write to; if its load is under way, it ends first (the write would wait for it)."""
        conversation = self.dice.choice(list(self.owners))
        for task, loading in [one for one in self.loaders if one[1] == conversation]:
            await self.halves.finish(task)
            self.loaders.remove((task, loading))
        return conversation
