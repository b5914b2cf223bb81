"""The model: every step of append, flush, trim, load and read in any order, each followed by a crash if the schedule says so.

`Chatkeep` is the state machine that hypothesis drives: its rules start calls, flushes and troubles, and `go_on` gives a schedule for what
is under way, a byte a step. Before it, all schedules of two: somebody is stopped (or killed, or loses a reply) at each of his steps, while
others come to their end. The checker judges each history at its end. `test_stand_ins.py` compares the two stores with the real ones.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeAlias
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import worker.flush
import worker.loading
import worker.persist
from tests.crash import model
from tests.crash.model import Actor, Fate, World
from worker.codec import Role
from worker.pending import Draft

USERS = (2, 4, 3)
"""The first two share a shard."""
INTERLEAVINGS_MIN = {"random": 25_000, "WORKS": 60_000, "REPLY_LOST": 7_000, "LATE": 9_000, "KILLED_AFTER": 7_000}
"""More than 100,000 together. What counts as one is said at `model.INTERLEAVINGS`."""
EXAMPLES_DEFAULT = 750
EXAMPLES = int(os.environ.get("CHATKEEP_MODEL_EXAMPLES", EXAMPLES_DEFAULT))
"""More, for a longer search."""
LENGTH = 40
MOVES = 16

_TO_THE_END = 1000
_MOVES = (
    *[(Fate.WORKS, _TO_THE_END)] * 9,
    *[(Fate.WORKS, steps) for steps in (1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8)],
    *[(fate, 1) for fate in (Fate.REQUEST_LOST, Fate.REPLY_LOST, Fate.REPLY_LOST, Fate.LATE, Fate.LATE)],
    *[(fate, 1) for fate in (Fate.KILLED_BEFORE, Fate.KILLED_AFTER, Fate.KILLED_AFTER)],
    *[(Fate.WORKS, steps) for steps in (1, 2, 4)],
)
"""What the upper five bits of a move mean: most races need one actor to stand still while others come to their end."""
_ROLES: tuple[Role, ...] = ("user", "assistant")
_SMALL = st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3])
How: TypeAlias = tuple[int, Fate]
AT_ONCE: How = (_TO_THE_END, Fate.WORKS)
_HOW = st.tuples(
    st.sampled_from([_TO_THE_END, _TO_THE_END, *range(13)]),
    st.sampled_from(
        [*[Fate.WORKS] * 5, Fate.REQUEST_LOST, Fate.REPLY_LOST, Fate.LATE, Fate.KILLED_BEFORE, Fate.KILLED_AFTER, Fate.KILLED_AFTER]
    ),
)
"""How many steps of a call run at once, and what becomes of the last; if it has not ended then, it stands there until it is moved."""


pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")


@pytest.fixture(autouse=True)
def _stand_ins() -> Iterator[None]:
    model.INTERLEAVINGS.clear()
    with model.installed(), mock.patch.object(worker.loading, "RETRY_KEYS_MAX", 2):
        yield


class Chatkeep(RuleBasedStateMachine):
    """Clients, flushes and troubles, in any order."""

    steps: ClassVar[int] = 0
    schedules: ClassVar[int] = 0

    @initialize(batch=st.sampled_from([3, 3, 3, 2, 1]))
    def begin(self, batch: int) -> None:
        """Flushes take so few entries at a time that messages which came together are committed apart."""
        self.world = World(flush_batch_max=batch)
        self.keyed: list[tuple[int, int, str, *tuple[Draft, ...]]] = []
        self._do(AT_ONCE, self.world.create, USERS[0], None, "a")

    # Clients

    @rule(which=_SMALL, keys=st.lists(st.booleans(), min_size=1, max_size=4), role=st.sampled_from(_ROLES), how=_HOW)
    def append(self, which: int, keys: list[bool], role: Role, how: How) -> None:
        """One or several; all but the last run to their end."""
        user, conversation = self._pick(which)
        for place, keyed in enumerate(keys, 1):
            self._append(how if place == len(keys) else AT_ONCE, user, conversation, keyed, [role])

    @rule(which=_SMALL, keyed=st.booleans(), roles=st.lists(st.sampled_from(_ROLES), min_size=2, max_size=4), how=_HOW)
    def append_together(self, which: int, keyed: bool, roles: list[Role], how: How) -> None:
        self._append(how, *self._pick(which), keyed, roles)

    @precondition(lambda self: self.keyed)
    @rule(which=_SMALL, how=_HOW)
    def append_again(self, which: int, how: How) -> None:
        self._do(how, self.world.append, *self.keyed[-1 - which % len(self.keyed)])

    @precondition(lambda self: self.keyed)
    @rule(which=_SMALL, change=st.sampled_from(["shorter", "longer", "other"]), how=_HOW)
    def append_other(self, which: int, change: str, how: How) -> None:
        """A key again, with another list: refused, unless the first never arrived."""
        user, conversation, key, *drafts = self.keyed[-1 - which % len(self.keyed)]
        if change == "longer" or len(drafts) == 1:
            drafts.append(Draft("user", self.world.say()))
        elif change == "shorter":
            drafts.pop()
        else:
            drafts[-1] = Draft(drafts[-1].role, self.world.say())
        self._do(how, self.world.append, user, conversation, key, *drafts)

    @rule(which=_SMALL, limit=st.sampled_from([1, 2, 50]), direction=st.sampled_from(["latest", "before", "after"]), where=_SMALL, how=_HOW)
    def read(self, which: int, limit: int, direction: str, where: int, how: How) -> None:
        user, conversation = self._pick(which)
        known = sorted(item.id for one in self.world.history.operations if one.conversation == conversation for item in one.messages)
        mark = known[where % len(known)] if known else conversation
        before, after = (mark if direction == name else None for name in ("before", "after"))
        self._do(how, self.world.page, user, conversation, before, after, limit)

    @rule(which=_SMALL, kind=st.sampled_from(["rename", "rename", "delete", "list", "probe"]), how=_HOW)
    def change(self, which: int, kind: str, how: How) -> None:
        user, conversation = self._pick(which)
        if kind == "rename":
            self._do(how, self.world.rename, user, conversation, "named " + self.world.say())
        elif kind == "delete":
            self._do(how, self.world.delete, user, conversation)
        elif kind == "list":
            self._do(how, self.world.list_all, user)
        else:
            self.world.probe(USERS[(USERS.index(user) + 1) % len(USERS)], conversation)

    @rule(user=st.sampled_from(USERS), titled=st.booleans(), key=st.sampled_from(["", "a", "b"]), how=_HOW)
    def create(self, user: int, titled: bool, key: str, how: How) -> None:
        """Under one key only one request: what happens otherwise is a test of its own."""
        self._do(how, self.world.create, user, f"title {self.world.say()}" if titled and not key else None, key)

    # The worker

    @rule(shards=st.sampled_from([(0,), (0,), (0, 1), (1,)]), how=_HOW)
    def flush(self, shards: tuple[int, ...], how: How) -> None:
        self._do(how, self.world.flush, *shards)

    @rule(shards=st.sampled_from([(0,), (0,), (0, 1), (1,)]))
    def flush_at_once(self, shards: tuple[int, ...]) -> None:
        self._do(AT_ONCE, self.world.flush, *shards)

    # Troubles

    @rule(kind=st.sampled_from(["stop", "outage", "start", "poison", "forward", "back"]))
    def trouble(self, kind: str) -> None:
        if kind in ("forward", "back"):
            self.world.turn_clock(3600 if kind == "forward" else -3600)
        elif kind == "poison":
            self.world.plant_poison(0)
        else:
            self.world.postgres.stop()
            self.world.postgres.up = kind != "outage"

    @rule(seconds=st.sampled_from([0.1, 3, 16, 25, 90]))
    def wait(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(backwards=st.booleans())
    def empty_cache(self, backwards: bool) -> None:
        """Once everything is flushed. Where another server takes the place of the lost one, its clock may be behind."""
        for shard in (0, 1):
            self._do(AT_ONCE, self.world.flush, shard)
        if self.world.empty_cache() and backwards:
            self.world.turn_clock(-3600)

    # The schedule

    @precondition(lambda self: self.world.actors)
    @rule(schedule=st.binary(min_size=1, max_size=MOVES))
    def go_on(self, schedule: bytes) -> None:
        """The lower three bits say who goes on, the upper five how far, or with which fate."""
        for move in schedule:
            if not self.world.actors:
                break
            fate, steps = _MOVES[move >> 3]
            self._move(self.world.actors[(move & 7) % len(self.world.actors)], fate, steps)

    def _append(self, how: How, user: int, conversation: int, keyed: bool, roles: list[Role]) -> None:
        call = (user, conversation, f"k{len(self.keyed)}" if keyed else "", *[Draft(role, self.world.say()) for role in roles])
        if keyed:
            self.keyed.append(call)
        self._do(how, self.world.append, *call)

    def _do(self, how: How, call: Callable[..., None], *arguments: Any) -> None:
        steps, fate = how
        call(*arguments)
        actor = self.world.actors[-1]
        self._move(actor, Fate.WORKS, steps)
        if fate is not Fate.WORKS and not actor.done:
            self.world.advance(actor, fate)

    def _move(self, actor: Actor, fate: Fate, steps: int) -> None:
        for _ in range(steps):
            self.world.advance(actor, fate)
            if actor.done:
                break

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        violations = self.world.finish()
        Chatkeep.steps += self.world.steps
        Chatkeep.schedules += 1
        assert not violations, "\n".join(map(str, violations))

    def _pick(self, which: int) -> tuple[int, int]:
        known = [(one.user, one.conversation) for one in self.world.history.operations if one.kind == "create" and one.outcome == "ok"]
        return known[which % len(known)]


# Two at once: whoever is stopped at whatever step, while anything else happens


class Scene:
    """A world with one conversation of user 2, and all that can be done to it by name."""

    def __init__(self, **changed: Any) -> None:
        self.world = World(**changed)
        self.run("create")
        [created] = self.world.history.operations
        self.conversation = created.conversation
        self.run("say", "say", "say")
        self.first = ("k1", Draft("user", "text 1\t\\ü"))
        self.together: tuple[str, *tuple[Draft, ...]] | None = None

    def run(self, *doings: str) -> None:
        """One after the other, each to its end."""
        for doing in doings:
            actors = self.start(doing)
            while any(not actor.done for actor in actors):
                for actor in actors:
                    if not actor.done:
                        self.world.advance(actor)

    def start(self, doing: str) -> list[Actor]:
        """Begins something; what is no call happens at once."""
        before = list(self.world.actors)
        getattr(self, "_" + doing)()
        return [actor for actor in self.world.actors if actor not in before]

    def _create(self) -> None:
        self.world.create(2, None, "a")

    def _create_new(self) -> None:
        self.world.create(2, f"title {self.world.say()}", "")

    def _say(self) -> None:
        text = self.world.say()
        self.world.append(2, self.conversation, "k" + text.split()[1], Draft("user", text))

    def _say_again(self) -> None:
        self.world.append(2, self.conversation, *self.first)

    def _say_together(self) -> None:
        """Three at once; said again, if they were said before."""
        if self.together is None:
            self.together = ("t", *[Draft(role, self.world.say()) for role in ("user", "assistant", "user")])
        self.world.append(2, self.conversation, *self.together)

    def _say_some(self) -> None:
        """Two at once, without a key."""
        self.world.append(2, self.conversation, "", *[Draft("user", self.world.say()) for _ in range(2)])

    def _say_fewer(self) -> None:
        """The key of the three with two of them."""
        if self.together is not None:
            self.world.append(2, self.conversation, *self.together[:-1])

    def _rename(self) -> None:
        self.world.rename(2, self.conversation, "named " + self.world.say())

    def _delete(self) -> None:
        self.world.delete(2, self.conversation)

    def _read(self) -> None:
        self.world.page(2, self.conversation, None, None, 50)

    def _read_on(self) -> None:
        self.world.page(2, self.conversation, None, self.conversation, 50)

    def _list(self) -> None:
        self.world.list_all(2)

    def _pry(self) -> None:
        """Somebody of the same shard, who also has a conversation under the same key."""
        self.world.create(4, None, "a")
        self.world.probe(4, self.conversation)

    def _flush(self) -> None:
        self.world.flush(0)

    def _wait(self) -> None:
        self.world.pass_time(25)

    def _stall(self) -> None:
        """Longer than Postgres waits for an idle client."""
        self.world.pass_time(16)

    def _empty(self) -> None:
        self.world.empty_cache()

    def _back(self) -> None:
        self.world.turn_clock(-3600)

    def _stop(self) -> None:
        self.world.postgres.stop()
        self.world.postgres.up = True


SETTINGS: tuple[tuple[str, ...], ...] = (("rename",), ("flush", "say"), ("flush", "wait"), ("flush", "empty", "back"))
"""What was done before: everything is pending, nothing but the last message is, the cache has forgotten everything, or all of Redis has."""
DOINGS = ("flush", "read", "say_again", "create", "delete", "rename", "say", "create_new", "read_on", "list")
MEANWHILE: tuple[tuple[str, ...], ...] = (
    ("flush",),
    ("flush", "flush", "wait"),
    ("flush", "rename", "flush"),
    ("delete", "flush"),
    ("flush", "empty"),
    ("flush", "pry"),
    ("stall", "flush", "say"),
    ("say", "say", "say", "flush", "flush"),
    ("say_again", "flush", "wait"),
    ("flush", "empty", "back", "create_new", "say"),
    ("delete", "flush", "wait", "wait", "wait", "wait", "read"),
    ("flush", "wait", "read"),
    ("say", "flush", "say"),
    ("rename", "flush"),
    ("create_new", "flush", "empty"),
    ("delete",),
    ("rename",),
    ("stop",),
)
SETTINGS_TOGETHER: tuple[tuple[str, ...], ...] = ((), ("flush", "wait"), ("say_together",), ("say_together", "flush", "wait"))
TOGETHER = (
    ("flush", "wait", "say_together"),
    ("say", "flush", "read", "say_together"),
    ("flush", "empty", "read"),
    ("say_together", "read_on", "flush"),
    ("say_fewer", "flush"),
    ("say_some", "say_together", "read"),
    ("stall", "say", "flush", "say_together"),
)
"""What comes between when somebody sends several messages at once; in a world whose flushes take two entries at a time."""
FATES = (Fate.WORKS, Fate.REPLY_LOST, Fate.LATE, Fate.KILLED_AFTER)


def _scenes(fate: Fate) -> Iterator[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    """All of them, where something is pending and nothing is lost; else those that have more to go wrong."""
    if fate is not Fate.WORKS:
        yield from itertools.product(SETTINGS_TOGETHER, ("say_together",), TOGETHER[:3])
        yield from itertools.product(SETTINGS[:2], DOINGS[:8], MEANWHILE[:11])
        return
    yield from itertools.product(SETTINGS_TOGETHER, ("say_together",), TOGETHER)
    yield from itertools.product(SETTINGS_TOGETHER[2:3], ("flush",), TOGETHER)
    yield from itertools.product(SETTINGS[:2], DOINGS, MEANWHILE)
    yield from itertools.product(SETTINGS[2:], DOINGS[:8], MEANWHILE[:15])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fate", FATES, ids=lambda fate: fate.name)
def test_promise_is_kept_by_whoever_is_stopped_at_whatever_step(fate: Fate, capsys: pytest.CaptureFixture[str]) -> None:
    schedules = steps = 0
    for setting, doing, meanwhile in _scenes(fate):
        for stopped_at in itertools.count(2):
            scene = Scene(flush_batch_max=2 if meanwhile in TOGETHER else 3)
            scene.run(*setting)
            ended = _stop_at(scene, doing, stopped_at, fate)
            scene.run(*meanwhile)
            violations = scene.world.finish()
            schedules += 1
            steps += scene.world.steps
            where = f"after {setting}, {doing} at step {stopped_at} ({fate.name}), meanwhile {meanwhile}"
            assert not violations, "\n".join([*map(str, violations), where])
            if ended:
                break
    _count(capsys, f"{steps} steps in {schedules} schedules of two ({fate.name})", fate.name)


@pytest.mark.parametrize("known", ["wait", "empty"])
def test_promise_is_kept_by_a_number_from_before_redis_was_emptied(known: str) -> None:
    """Somebody holds a number for a new conversation; the next clock is behind it. What would know it afterwards, goes too."""
    for ticks, others in itertools.product(range(5), range(2)):
        scene = Scene()
        scene.world.pass_time(ticks * 1e-5)
        assert not _stop_at(scene, "create_new", 2, Fate.WORKS)
        scene.run("flush", "empty", "back")
        scene.world.settle()
        scene.run("flush", known, *["rename"] * others, *["create_new"] * 8)
        violations = scene.world.finish()
        assert not violations, "\n".join([*map(str, violations), f"{ticks} ticks later, after {others} others"])


@pytest.mark.parametrize("doing", ["read", "read_on"])
def test_the_promise_holds_for_what_came_together_while_it_is_flushed(doing: str) -> None:
    for committed in range(1, 20):
        scene = Scene(flush_batch_max=2)
        scene.run("flush", "wait")
        assert not _stop_at(scene, doing, 2, Fate.WORKS)
        scene.run("say_together")
        ended = _stop_at(scene, "flush", committed, Fate.WORKS)
        reader = scene.world.actors[0]
        while not reader.done:
            scene.world.advance(reader)
        violations = scene.world.finish()
        assert not violations, "\n".join([*map(str, violations), f"{doing}, while a flush stands at step {committed}"])
        if ended:
            break
    assert ended


def _stop_at(scene: Scene, doing: str, stopped_at: int, fate: Fate) -> bool:
    """Runs something for so many steps; whether it has ended by then."""
    [actor] = scene.start(doing)
    for _ in range(stopped_at):
        scene.world.advance(actor)
        if actor.done:
            return True
    if fate is not Fate.WORKS:
        scene.world.advance(actor, fate)
    return False


# All at once, at random


@pytest.mark.timeout(900)
def test_no_schedule_breaks_the_promise(capsys: pytest.CaptureFixture[str]) -> None:
    run_state_machine_as_test(
        Chatkeep,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=LENGTH,
            deadline=None,
            database=None,
            # The same schedules in each run of the tests; others each time for who asks for a number of them, as a hunt does.
            derandomize=not {"CHATKEEP_MODEL_EXAMPLES", "CHATKEEP_MUTANT"} & os.environ.keys(),
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate] if "CHATKEEP_MUTANT" in os.environ else [Phase.generate, Phase.shrink],
        ),
    )
    _count(capsys, f"{Chatkeep.steps} steps in {Chatkeep.schedules} random schedules", "random")


def _count(capsys: pytest.CaptureFixture[str], what: str, kind: str) -> None:
    """Says how much was done, and fails if it was too little: then the model has become lazy."""
    with capsys.disabled():
        print(f"\nmodel: {what}, {len(model.INTERLEAVINGS)} interleavings", end=" ")
    assert len(model.INTERLEAVINGS) >= INTERLEAVINGS_MIN[kind] or EXAMPLES < EXAMPLES_DEFAULT
