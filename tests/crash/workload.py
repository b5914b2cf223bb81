"""The clients: people who write, read, retry, rename, delete, and look where they should not, each with one call at a time.

Every text is unique and carries the run's mark, so that a digest names it and a log can be searched for it. A call whose outcome is not
known is repeated with its key, at once or later, as a careful client does; one without a key is never repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from tests.crash.history import History, Listed, Operation, Outcome, digest, items
from tests.crash.http import Answer, Client, Lost, NotSent

CALL_SECONDS = 10.0
MESSAGES_MAX = 300
"""A conversation with more is left alone, so that reading one stays cheap."""
CONVERSATIONS = 5
"""That a user is at work in."""
_NASTY = (
    "שלום עולם",
    "a\tb\\n\r\nc\\\\.",
    "🦀👩‍👩‍👧‍👦",
    "\u2028\u2029\x0b\x85",
    "' OR 1=1 --",
    "</script>",
    "\u200f\ufeff",
    "%s %(x)s {0}",
)
_REFUSED: tuple[tuple[str, bytes], ...] = (
    ("NUL", b'{"role":"user","content":"MARK \\u0000"}'),
    ("half a pair", b'{"role":"user","content":"MARK \\ud800"}'),
    ("NaN", b'{"role":"user","content":NaN,"mark":"MARK"}'),
    ("white space", b'{"role":"user","content":" \\n\\t "}'),
    ("nothing", b'{"role":"user","content":""}'),
    ("too long", b'{"role":"user","content":"MARK' + b"x" * 100_001 + b'"}'),
    ("another role", b'{"role":"system","content":"MARK"}'),
    ("more fields", b'{"role":"user","content":"MARK","user_id":1}'),
    ("not UTF-8", b'{"role":"user","content":"MARK \xff\xfe"}'),
    ("a number", b'{"role":"user","content":1e400}'),
)


class Said(NamedTuple):
    """A message as it is sent."""

    role: str
    content: str


@dataclass(slots=True)
class Conversation:
    """A conversation that its owner knows of."""

    id: int
    user: int
    messages: int = 0
    seen: list[int] = field(default_factory=list)
    deleted: bool = False


@dataclass(slots=True)
class Person:
    """A user, with a token that outlives the run."""

    id: int
    email: str
    token: str
    conversations: list[Conversation] = field(default_factory=list)
    again: list[tuple[int, str, list[Said]]] = field(default_factory=list)
    """Appends with a key: conversation, key, messages. Repeated later."""
    created: list[tuple[str | None, str]] = field(default_factory=list)
    """Creations with a key: title and key."""

    def active(self) -> list[Conversation]:
        return [one for one in self.conversations if not one.deleted and one.messages < MESSAGES_MAX]


@dataclass
class Workload:
    """All clients. `pace` is how long each waits between two calls, on average."""

    history: History
    ports: list[int]
    mark: str
    chance: random.Random
    pace: float = 0.02
    people: list[Person] = field(default_factory=list)
    acknowledged: int = 0
    longest: float = 0.0
    """The longest write that was answered."""
    faulty: list[str] = field(default_factory=list)
    """What no client may ever see."""
    clock_off_until: float = 0.0
    """So long an API process may take a good token for one of another time."""
    hangs: list[tuple[Operation, float, int]] = field(default_factory=list)
    """Calls that had no answer in time: when they began, and at which API process."""
    _serial: int = 0
    _open: asyncio.Event = field(default_factory=asyncio.Event)
    _busy: int = 0

    async def sign_up(self, count: int) -> None:
        """Makes the users, while everything works."""
        client = Client(self.ports[0])
        for i in range(count):
            email, password = f"{self.mark}-{i}@example.org", f"a password of {self.mark} {i}"
            made = await _send(client, "POST", "/api/auth/register", {"email": email, "password": password})
            form = f"username={email.replace('@', '%40')}&password={password.replace(' ', '+')}".encode()
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            answer = await client.call("POST", "/api/auth/token", body=form, headers=headers, seconds=CALL_SECONDS)
            if made.status != 201 or answer.status != 200:
                raise RuntimeError(f"no user could be made: {made.status} {answer.status} {answer.body[:200]!r}")
            self.people.append(Person(made.json()["id"], email, answer.json()["access_token"]))
        client.close()

    async def run(self, clients: int) -> None:
        """Runs until cancelled."""
        self._open.set()
        async with asyncio.TaskGroup() as group:
            for i in range(clients):
                group.create_task(self._client(self.people[i % len(self.people)], random.Random(self.chance.random())))

    @contextlib.asynccontextmanager
    async def paused(self) -> Any:
        """Nobody is calling inside of this."""
        self._open.clear()
        try:
            while self._busy:
                await asyncio.sleep(0.02)
            yield
        finally:
            self._open.set()

    def text(self, chance: random.Random) -> str:
        """A text that nobody has ever said."""
        self._serial += 1
        filler = chance.choice(_NASTY) if chance.random() < 0.2 else "x" * int(min(chance.expovariate(1 / 200), 32_000))
        return f"{self.mark}-{self._serial} {filler}"

    async def _client(self, person: Person, chance: random.Random) -> None:
        doings, weights = zip(*_DOINGS, strict=True)
        sessions = [_Session(self, port, person, chance) for port in self.ports]
        while True:
            await self._open.wait()
            self._busy += 1
            try:
                session = chance.choice(sessions)
                doing: Callable[[_Session], Awaitable[None]] = chance.choices(doings, weights)[0]
                if not person.active():
                    doing = _Session.create
                await doing(session)
            finally:
                self._busy -= 1
            await asyncio.sleep(chance.expovariate(1 / self.pace))


class _Session:
    """A person's connection to one API process."""

    def __init__(self, workload: Workload, port: int, person: Person, chance: random.Random) -> None:
        self._workload = workload
        self._client = Client(port)
        self._person = person
        self._chance = chance

    # Doings

    async def create(self) -> None:
        chance = self._chance
        title = f"{self._workload.mark} title {chance.getrandbits(40):x}" if chance.random() < 0.5 else None
        key = f"c-{chance.getrandbits(60):x}" if chance.random() < 0.7 else ""
        await self._create(title, key)
        if key:
            self._person.created = [*self._person.created[-20:], (title, key)]

    async def create_again(self) -> None:
        if self._person.created:
            await self._create(*self._chance.choice(self._person.created), attempts=1)

    async def append(self) -> None:
        await self._append_new(1)

    async def append_together(self) -> None:
        await self._append_new(self._chance.randint(2, 5))

    async def append_again(self) -> None:
        """An old one, acknowledged or not, perhaps long forgotten by the cache."""
        if not self._person.again:
            return
        number, key, messages = self._chance.choice(self._person.again)
        known = next((one for one in self._person.conversations if one.id == number), None)
        if known is not None:
            await self._append(known, key, messages, attempts=1)

    async def append_other(self) -> None:
        """A used key with another text, or with fewer or more: refused."""
        if not self._person.again:
            return
        number, key, messages = self._chance.choice(self._person.again)
        *others, last = messages
        changed = [[*others, Said(last.role, last.content + "!")], [*messages, Said("user", self._workload.text(self._chance))]]
        if others:
            changed += [others, messages[:1], messages[::-1]]
        known = next((one for one in self._person.conversations if one.id == number and not one.deleted), None)
        if known is not None:
            # Right if the first attempt never arrived: then this is the first use of the key. The checker sees which.
            await self._append(known, key, self._chance.choice(changed), attempts=1, note="key of another text")

    async def refused(self) -> None:
        what, raw = self._chance.choice(_REFUSED)
        conversation = self._pick()
        path = f"/api/conversations/{conversation.id}/messages"
        if self._chance.random() < 0.3:  # and so is what came with it
            path, raw = path + "/batch", b'{"messages":[{"role":"user","content":"MARK is in order"},%s]}' % raw
        body = raw.replace(b"MARK", self._workload.text(self._chance).split(" ")[0].encode())
        operation = self._invoke("append", conversation=conversation.id, text=digest(repr(body)), refused=True, note=what)
        answer = await self._call(operation, "POST", path, body)
        if answer is not None and answer.status < 300:
            self._end(operation, "ok", answer)

    async def two_tabs(self) -> None:
        """The same message sent twice at the same moment, and another one with it."""
        conversation = self._pick()
        messages, key = self._messages(self._chance.choice((1, 1, 3))), f"m-{self._chance.getrandbits(60):x}"
        others = [_Session(self._workload, self._chance.choice(self._workload.ports), self._person, self._chance) for _ in range(2)]
        try:
            await asyncio.gather(
                self._append(conversation, key, messages, attempts=1),
                others[0]._append(conversation, key, messages, attempts=1),
                others[1]._append(conversation, "", [Said("user", self._workload.text(self._chance))], attempts=1),
            )
        finally:
            for other in others:
                other._client.close()
        self._person.again = [*self._person.again[-200:], (conversation.id, key, messages)]

    async def chat(self) -> None:
        conversation = self._pick()
        text, key = self._workload.text(self._chance), f"t-{self._chance.getrandbits(60):x}"
        for _ in range(4):
            operation = self._invoke("turn", conversation=conversation.id, text=digest(text), key=key)
            answer = await self._call(operation, "POST", f"/api/chat/{conversation.id}/message", {"message": text}, key)
            if answer is not None and answer.status == 200:
                turn = answer.json()
                self._end(operation, "ok", answer, messages=items([turn["user_message"], turn["assistant_message"]]))
                conversation.messages += 2
                return
            if operation.outcome == "fail":
                return
            await self._breathe()

    async def read(self) -> None:
        conversation = self._pick()
        await self._page(conversation, None, None, self._chance.choice((1, 3, 20, 50, 200)))

    async def walk_back(self) -> None:
        conversation = self._pick()
        before: int | None = None
        for _ in range(6):
            page = await self._page(conversation, before, None, self._chance.choice((7, 50)))
            if page is None or not page.has_older or not page.messages:
                return
            before = page.messages[0].id

    async def walk_on(self) -> None:
        conversation = self._pick()
        after = self._chance.choice(conversation.seen) if conversation.seen else 1
        for _ in range(6):
            page = await self._page(conversation, None, after, self._chance.choice((7, 50)))
            if page is None or not page.has_newer or not page.messages:
                return
            after = page.messages[-1].id

    async def list_all(self) -> None:
        operation = self._invoke("list", limit=100)
        answer = await self._call(operation, "GET", "/api/conversations?limit=100")
        if answer is not None and answer.status == 200:
            found = answer.json()
            listed = [Listed(one["id"], digest(one["title"]) if one["title"] else "", one["updated_at"]) for one in found["items"]]
            self._end(operation, "ok", answer, conversations=listed, more=found["next_cursor"] or "")

    async def look(self) -> None:
        conversation = self._pick()
        operation = self._invoke("get", conversation=conversation.id)
        answer = await self._call(operation, "GET", f"/api/conversations/{conversation.id}")
        if answer is not None and answer.status == 200:
            one = answer.json()
            listed = [Listed(one["id"], digest(one["title"]) if one["title"] else "", one["updated_at"])]
            self._end(operation, "ok", answer, conversations=listed)

    async def rename(self) -> None:
        conversation = self._pick()
        title = f"{self._workload.mark} named {self._chance.getrandbits(40):x}"
        operation = self._invoke("rename", conversation=conversation.id, title=digest(title))
        answer = await self._call(operation, "PATCH", f"/api/conversations/{conversation.id}", {"title": title})
        if answer is not None and answer.status == 200:
            self._end(operation, "ok", answer)

    async def delete(self) -> None:
        if len(self._person.active()) < CONVERSATIONS - 1:
            return
        conversation = self._pick()
        conversation.deleted = True
        for _ in range(5):
            operation = self._invoke("delete", conversation=conversation.id)
            answer = await self._call(operation, "DELETE", f"/api/conversations/{conversation.id}")
            if answer is not None and answer.status == 204:
                self._end(operation, "ok", answer)
                return
            if operation.outcome == "fail":
                return
            await self._breathe()

    async def probe(self) -> None:
        """Another person's conversation, or nobody's: answered alike."""
        others = [one for person in self._workload.people if person is not self._person for one in person.conversations[-8:]]
        number = self._chance.choice(others).id if others and self._chance.random() < 0.8 else self._chance.getrandbits(50)
        intruder = {"role": "user", "content": f"{self._workload.mark} intruder"}
        method, path, body = self._chance.choice(
            (
                ("GET", f"/api/conversations/{number}", None),
                ("GET", f"/api/conversations/{number}/messages", None),
                ("PATCH", f"/api/conversations/{number}", {"title": "mine now"}),
                ("DELETE", f"/api/conversations/{number}", None),
                ("POST", f"/api/conversations/{number}/messages", intruder),
                ("POST", f"/api/conversations/{number}/messages/batch", {"messages": [intruder, intruder]}),
                ("GET", f"/api/chat/{number}/history", None),
                ("POST", f"/api/chat/{number}/message", {"message": f"{self._workload.mark} intruder"}),
                ("POST", "/api/chat/start", {"conversation_id": number}),
            )
        )
        operation = self._invoke("probe", conversation=number, title=f"{method} {path.rsplit('/', 1)[-1]}")
        answer = await self._call(operation, method, path, body)
        if answer is not None and answer.status < 300:
            self._end(operation, "ok", answer)

    # What they are made of

    async def _create(self, title: str | None, key: str, attempts: int = 4) -> None:
        for _ in range(attempts if key else 1):
            operation = self._invoke("create", key=key, title=digest(title) if title else "")
            answer = await self._call(operation, "POST", "/api/conversations", {"title": title} if title else {}, key)
            if answer is not None and answer.status == 201:
                number = answer.json()["id"]
                self._end(operation, "ok", answer, conversation=number, replayed=_replayed(answer))
                if all(one.id != number for one in self._person.conversations):
                    self._person.conversations.append(Conversation(number, self._person.id))
                return
            if operation.outcome == "fail":
                return
            await self._breathe()

    async def _append_new(self, count: int) -> None:
        conversation, messages = self._pick(), self._messages(count)
        key = f"m-{self._chance.getrandbits(60):x}" if self._chance.random() < 0.7 else ""
        await self._append(conversation, key, messages)
        if key:
            self._person.again = [*self._person.again[-200:], (conversation.id, key, messages)]

    def _messages(self, count: int) -> list[Said]:
        return [Said(self._chance.choice(("user", "assistant")), self._workload.text(self._chance)) for _ in range(count)]

    async def _append(self, conversation: Conversation, key: str, messages: list[Said], attempts: int = 4, note: str = "") -> None:
        """One is sent by itself or as a batch of one, which is the same to a key."""
        (text, role), *also = [(digest(content), role) for role, content in messages]
        batch = bool(also) or self._chance.random() < 0.05
        path = f"/api/conversations/{conversation.id}/messages" + "/batch" * batch
        bodies = [one._asdict() for one in messages]
        for _ in range(attempts if key else 1):
            operation = self._invoke("append", conversation=conversation.id, text=text, role=role, also=also, key=key, note=note)
            answer = await self._call(operation, "POST", path, {"messages": bodies} if batch else bodies[0], key)
            if answer is not None and answer.status == 201:
                shown = answer.json()["items"] if batch else [answer.json()]
                self._end(operation, "ok", answer, messages=items(shown), replayed=_replayed(answer))
                if not operation.replayed:
                    conversation.messages += len(shown)
                    self._workload.acknowledged += len(shown)
                conversation.seen = [*conversation.seen[-30:], operation.messages[-1].id]
                return
            if operation.outcome == "fail":
                return
            await self._breathe()

    async def _page(self, conversation: Conversation, before: int | None, after: int | None, limit: int) -> Operation | None:
        operation = self._invoke("page", conversation=conversation.id, before=before, after=after, limit=limit)
        query = f"limit={limit}" + (f"&before={before}" if before is not None else "") + (f"&after={after}" if after is not None else "")
        answer = await self._call(operation, "GET", f"/api/conversations/{conversation.id}/messages?{query}")
        if answer is None or answer.status != 200:
            return None
        page = answer.json()
        self._end(operation, "ok", answer, messages=items(page["items"]), has_older=page["has_older"], has_newer=page["has_newer"])
        return operation

    def _pick(self) -> Conversation:
        active = self._person.active()
        return self._chance.choice(active[-CONVERSATIONS:])

    def _invoke(self, kind: Any, **asked: Any) -> Operation:
        return self._workload.history.invoke(kind, self._person.id, **asked)

    def _end(self, operation: Operation, outcome: Any, answer: Answer, **more: Any) -> None:
        self._workload.history.end(operation, outcome, status=answer.status, **more)
        if operation.kind in ("append", "create", "rename", "delete") and operation.ended is not None:
            self._workload.longest = max(self._workload.longest, operation.ended - operation.started)

    async def _call(self, operation: Operation, method: str, path: str, body: Any = None, key: str = "") -> Answer | None:
        """The answer, with everything written down that is no success; None where there is none."""
        history = self._workload.history
        try:
            answer = await _send(self._client, method, path, body, self._person.token, key)
        except NotSent:
            history.end(operation, "fail", note="not sent")
            await self._breathe()
            return None
        except Lost as exc:
            history.end(operation, "info", note=str(exc))
            if str(exc) == "TimeoutError":
                self._workload.hangs.append((operation, operation.started, self._client.port))
            return None
        if answer.status < 300:
            return answer
        if answer.status == 401 and operation.started < self._workload.clock_off_until:
            history.end(operation, "fail", note="clock")
        elif answer.status == 503 or (answer.status == 502 and operation.kind == "turn"):
            history.end(operation, "info", status=answer.status)
            if answer.status == 503 and "retry-after" not in answer.headers:
                self._workload.faulty.append(f"op {operation.op}: 503 without Retry-After")
        elif answer.status < 500:
            # A turn has two halves: deleted in between, the conversation is not found, but its message had been there.
            outcome: Outcome = "info" if operation.kind == "turn" and answer.status == 404 else "fail"
            history.end(operation, outcome, status=answer.status, note=_detail(answer) if operation.kind == "probe" else operation.note)
            self._judge(operation, answer)
        else:
            history.end(operation, "info", status=answer.status)
            self._workload.faulty.append(f"op {operation.op}: {operation.kind} ({operation.note}) was answered with {answer.status}")
        return answer

    def _judge(self, operation: Operation, answer: Answer) -> None:
        """A refusal that this call cannot have earned."""
        earned = {"append": (404, 413, 422), "turn": (404, 409), "probe": (404,), "create": (422,)}.get(operation.kind, (404,))
        if answer.status not in earned:
            self._workload.faulty.append(f"op {operation.op}: {operation.kind} was answered with {answer.status}: {answer.body[:200]!r}")

    async def _breathe(self) -> None:
        await asyncio.sleep(self._chance.uniform(0.05, 0.4))


_DOINGS: tuple[tuple[Callable[[_Session], Awaitable[None]], int], ...] = (
    (_Session.append, 38),
    (_Session.append_together, 8),
    (_Session.append_again, 8),
    (_Session.append_other, 2),
    (_Session.refused, 2),
    (_Session.two_tabs, 3),
    (_Session.chat, 2),
    (_Session.read, 14),
    (_Session.walk_back, 4),
    (_Session.walk_on, 4),
    (_Session.list_all, 4),
    (_Session.look, 2),
    (_Session.create, 2),
    (_Session.create_again, 1),
    (_Session.rename, 2),
    (_Session.delete, 1),
    (_Session.probe, 4),
)


async def _send(client: Client, method: str, path: str, body: Any = None, token: str = "", key: str = "") -> Answer:
    headers = {"Content-Type": "application/json"} if body is not None else {}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    headers |= {"Idempotency-Key": key} if key else {}
    raw = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
    return await client.call(method, path, body=raw, headers=headers, seconds=CALL_SECONDS)


def _replayed(answer: Answer) -> bool:
    return answer.headers.get("idempotent-replayed") == "true"


def _detail(answer: Answer) -> str:
    """The body of a refusal, which has to be the same for all who ask."""
    return answer.body.decode(errors="replace")
