"""Nothing that people write, and nothing that they prove who they are with, is where operators look, or in an answer to anybody else.

Every text, title, address, password, retry key and reply in this module carries its owner's mark; what the servers give out (tokens,
cookies) is noted when it comes. Then everything goes wrong that can, at DEBUG and at INFO; and then whatever a process or a server has
written, shows, or has answered is searched for the marks, also in base64 and hex.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2
import psycopg2
import pytest

from tests import people
from tests.browser.model import Failure, Gate, Model
from tests.people import ok, until
from tests.processes import OPERATOR, SHARDS, Installation, Process, answers, frozen_server
from worker import keys
from worker.embedded import free_port

MARK = "quokka"
"""In everything that is anybody's, and in nothing else."""
ANN, BOB = f"{MARK}ann", f"{MARK}bob"
MODEL_KEY = f"sk-{MARK}-model-key"
ERROR = 400
CREDENTIAL_CHARS_MIN = 16

pytestmark = pytest.mark.timeout(300)


@dataclass
class Witness:
    """What came over the wire: everybody's credentials, every error, and what each person was shown."""

    credentials: set[str] = field(default_factory=set)
    errors: list[tuple[str, str]] = field(default_factory=list)
    shown: dict[str, list[str]] = field(default_factory=dict)

    def client(self, whose: str, url: str) -> httpx2.Client:
        """A client of this person; everything that it is answered is noted."""
        http = people.browser(url)
        http.event_hooks["response"].append(lambda answer: self._note(whose, answer))
        return http

    def _note(self, whose: str, answer: httpx2.Response) -> None:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            answer.read()
            self.shown.setdefault(whose, []).append(answer.text)
        if answer.status_code >= ERROR:
            self.errors.append((f"{answer.status_code} {answer.request.method} {answer.request.url.path}", answer.text))
        elif "json" in answer.headers.get("content-type", "") and "token" in answer.text:
            told = answer.json()
            self.credentials |= {value for name, value in told.items() if name.endswith("token")} if isinstance(told, dict) else set()
        cookies = [cookie.partition("=")[2].partition(";")[0].strip('"') for cookie in answer.headers.get_list("set-cookie")]
        self.credentials |= {cookie for cookie in cookies if len(cookie) >= CREDENTIAL_CHARS_MIN}  # what is shorter takes one away


class Someone:
    """A person, at one API process after the other."""

    def __init__(self, mark: str, url: str, witness: Witness) -> None:
        self.mark, self.http = mark, witness.client(mark, url)
        self.email, self.password = f"{mark}@{MARK}.example", f"{mark} has a password"
        self.http.post("/api/auth/register", json=self.account)
        token = ok(self.http.post("/api/auth/token", data={"username": self.email, "password": self.password}))["access_token"]
        self.http.headers["Authorization"] = f"Bearer {token}"
        self.id = int(ok(self.http.get("/api/auth/me"))["id"])

    @property
    def account(self) -> dict[str, str]:
        return {"email": self.email, "password": self.password}

    def at(self, url: str) -> Someone:
        """The same person at another process."""
        self.http.base_url = httpx2.URL(url)
        return self

    def start(self) -> int:
        return int(ok(self.http.post("/api/conversations", json={"title": f"{self.mark} title"}), 201)["id"])

    def say(self, conversation: int, text: str, **headers: str) -> httpx2.Response:
        return self.http.post(
            f"/api/conversations/{conversation}/messages", json={"role": "user", "content": f"{self.mark} {text}"}, headers=headers
        )

    def chat(self, conversation: int, text: str, **headers: str) -> httpx2.Response:
        return self.http.post(f"/api/chat/{conversation}/message", json={"message": f"{self.mark} {text}"}, headers=headers)


@dataclass
class Story:
    """What has happened, and to whom."""

    chatkeep: Installation
    witness: Witness
    ann: Someone
    bob: Someone
    api: Process
    worker: Process

    @property
    def processes(self) -> list[Process]:
        return [*self.chatkeep.processes.values(), self.chatkeep.migration, self.api, self.worker]

    def leaks(self, where: str, text: str, *, also: tuple[str, ...] = ()) -> list[str]:
        """Each place where something of somebody's stands, with what stands before it."""
        servers = (self.chatkeep.postgres, self.chatkeep.valkey, self.chatkeep.broker)
        passwords = [server.url.split(":")[2].partition("@")[0] for server in servers]
        needles = {*marks(MARK), *self.witness.credentials, self.chatkeep.secret, OPERATOR[1], *passwords, *also}
        folded = text.casefold()
        found = [(needle, folded.find(needle.casefold())) for needle in needles]
        return [f"{where}: …{text[max(0, at - 200) : at + 40]!r}" for _, at in found if at >= 0]


def marks(mark: str) -> set[str]:
    """A mark as it stands, and as base64 (wherever in a longer text it begins) and hex make of it."""
    raw = mark.encode()
    shifted = [base64.b64encode(b"\0" * skip + raw)[(skip * 8 + 5) // 6 :].rstrip(b"=") for skip in range(3)]
    return {mark, raw.hex(), *(part[: -1 if (skip + len(raw)) % 3 else None].decode() for skip, part in enumerate(shifted))}


@pytest.fixture(scope="module")
def story() -> Iterator[Story]:
    model, witness = Model(), Witness()
    model.start()
    settings = {"LLM_BASE_URL": model.url, "LLM_MODEL": "m", "LLM_API_KEY": MODEL_KEY, "REPLY_IDLE_SECONDS": "2", "LOG_LEVEL": "DEBUG"}
    try:
        with Installation(**settings) as chatkeep:
            chatkeep.migrate()
            chatkeep.start("api", "worker", "beat", "flower")
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            api = chatkeep.process(
                "quiet api", "uvicorn", "api.app:app", f"--port={port}", ready=lambda _: answers(url + "/livez"), LOG_LEVEL="INFO"
            )
            worker = chatkeep.celery(
                "quiet worker", "worker", "-n", "quiet@%h", ready=lambda one: " ready." in one.said_now, LOG_LEVEL="INFO"
            )
            try:
                for process in (api, worker):
                    process.start()
                    process.wait()
                told = Story(
                    chatkeep, witness, Someone(ANN, chatkeep.api.url, witness), Someone(BOB, chatkeep.api.url, witness), api, worker
                )
                for at in (chatkeep.api.url, url):
                    told.ann.at(at), told.bob.at(at)
                    _live(told, model)
                    _err(told)
                    _fail(told, model)
                _poison(told)
                _break(told, model)
                chatkeep.heal()
                yield told
            finally:
                for process in (api, worker):
                    process.kill()
    finally:
        model.stop()


def _live(story: Story, model: Model) -> None:
    """All that a person does."""
    ann, http = story.ann, story.ann.http
    ok(http.post("/api/auth/session", data={"username": ann.email, "password": ann.password}, headers={"Sec-Fetch-Site": "same-origin"}))
    http.cookies.clear()
    conversation = ann.start()
    for number in range(20):
        ok(ann.say(conversation, f"says {number}", **{"Idempotency-Key": f"{ANN}-key-{number}"}), 201)
    ok(ann.say(conversation, "says 3", **{"Idempotency-Key": f"{ANN}-key-3"}), 201)
    model.will_say(f"{MARK} ", "replies")
    assert ok(ann.chat(conversation, "asks"))["reply"] == f"{MARK} replies"
    model.will_say(f"{MARK} ", "streams")
    assert MARK in ann.chat(conversation, "asks again", Accept="text/event-stream").text
    ok(http.patch(f"/api/conversations/{conversation}", json={"title": f"{ANN} renames"}))
    ok(http.get(f"/api/conversations/{conversation}/messages"))
    ok(http.get("/api/conversations"))
    gone = ann.start()
    ok(ann.say(gone, "deletes"), 201)
    assert http.delete(f"/api/conversations/{gone}").status_code == 204
    for path in (f"/api/conversations/{conversation}", f"/api/chat/{conversation}/history", f"/api/chat/{conversation}/stream"):
        assert story.bob.http.get(path).status_code == 404
    assert story.bob.say(conversation, "intrudes").status_code == 404
    ok(story.bob.http.get("/api/conversations"))


def _err(story: Story) -> None:
    """Everything that can be wrong with a request, with a mark wherever one can be put."""
    ann, conversation = story.ann, story.ann.start()
    http, path = ann.http, f"/api/conversations/{conversation}/messages"
    bodies: list[Any] = [
        {"role": ANN, "content": ANN},
        {"role": "user", "content": ANN, "surplus": ANN},  # its name is told: it is no text, and the sender's own
        {"role": "user", "content": f"{ANN}\x00"},
        {"role": "user", "content": [ANN]},
        {"role": "user", "content": ANN * 20_000},
        [ANN],
        ANN,
    ]
    raw = [
        f'{{"content": "{ANN}'.encode(),
        f'{{"role": "user", "content": "{ANN} \\ud800"}}'.encode(),
        ANN.encode(),
        b"\xff" + ANN.encode(),
    ]
    refusals = [http.post(path, json=body) for body in bodies]
    refusals += [http.post(path, content=body, headers=people.JSON) for body in raw]
    refusals += [
        http.post(path, content=json.dumps({"role": "user", "content": ANN * 200_000}), headers=people.JSON),
        http.post(path, data={"content": ANN}),
        http.put(path, json={"content": ANN}),
        http.post("/api/conversations", json={"title": ANN * 100}),
        http.patch(f"/api/conversations/{conversation}", json={"title": f"{ANN}\x00"}),
        http.post(f"/api/chat/{conversation}/message", json={"message": {"text": ANN}}),
        http.post("/api/chat/start", json={"title": ANN, "conversation_id": ANN}),
        http.get("/api/conversations", params={"cursor": ANN, "limit": ANN}),
        http.get(path, params={"before": ANN}),
        http.get(f"/api/chat/{conversation}/stream", headers={"Last-Event-ID": ANN}),
        ann.say(conversation, "has a bad key", **{"Idempotency-Key": ANN * 50}),
        http.post("/api/auth/register", json=ann.account),
        http.post("/api/auth/register", json={"email": f"{ANN} at {MARK}", "password": ANN}),
        http.post("/api/auth/register", json={"email": ann.email, "password": ANN, "surplus": ANN}),
        http.post("/api/auth/token", data={"username": ann.email, "password": f"{ANN} wrong"}),
        http.post("/api/auth/token", data={"username": f"{ANN}.nobody@{MARK}.example", "password": ANN}),
        http.post("/api/auth/token", data={"username": ann.email}),
        http.get("/api/auth/me", headers={"Authorization": f"Bearer {ANN}"}),
        http.get("/api/auth/me", headers={"Authorization": http.headers["Authorization"] + "x"}),
        http.get("/api/auth/me", headers={"Authorization": f"Basic {base64.b64encode(ANN.encode()).decode()}"}),
    ]
    ok(ann.say(conversation, "uses a key", **{"Idempotency-Key": f"{ANN}-used"}), 201)
    refusals.append(ann.say(conversation, "uses it again", **{"Idempotency-Key": f"{ANN}-used"}))
    assert [answer.request.url.path for answer in refusals if answer.status_code < ERROR] == []


def _fail(story: Story, model: Model) -> None:
    """Models that refuse, break off, and fall silent."""
    ann, conversation = story.ann, story.ann.start()
    model.will_say(Failure())
    assert ann.chat(conversation, "is refused").status_code == 502
    model.will_say(f"{MARK} begins, ", Failure())
    assert ok(ann.chat(conversation, "is cut"))["assistant_message"]["status"] == "incomplete"
    gate = Gate()
    model.will_say(gate)
    assert ann.chat(conversation, "waits in vain").status_code == 502
    gate.open()


def _poison(story: Story) -> None:
    """Entries that nobody can read, rows that Postgres refuses and says so, and copies in Redis that are not what they should be."""
    chatkeep, ann = story.chatkeep, story.ann
    conversation = ann.start()
    shard = keys.shard_of_user(ann.id, SHARDS)
    chatkeep.drain()
    body = b'{"conversation_id":%d,"user_id":%d,"role":"user","content":"%s","status":"complete"}'
    with chatkeep.redis() as client, database(chatkeep) as cursor:
        cursor.execute("ALTER TABLE message ADD CONSTRAINT wary CHECK (content NOT LIKE '%% is refused by Postgres') NOT VALID")
        first = ok(ann.say(conversation, "is fine"), 201)["id"]
        with chatkeep.worker.frozen(), story.worker.frozen():
            for number, (name, value) in enumerate(
                ((b"b", ANN.encode()), (ANN.encode(), b"x"), (b"b", body % (conversation + 64_000_000, ann.id, ANN.encode()))), start=1
            ):
                entry: dict[Any, Any] = {b"k": b"m", b"t": b"1", b"x": b"", b"a": b"", name: value}
                client.xadd(keys.log(shard), entry, id=f"{first + 64 * number}-0")
            ok(ann.say(conversation, "is refused by Postgres"), 201)
            ok(ann.say(conversation, "comes after it"), 201)
        chatkeep.drain()
        cursor.execute("ALTER TABLE message DROP CONSTRAINT wary")
        assert {reason for (reason,) in chatkeep.query("SELECT DISTINCT reason FROM dead_letter")} == {
            "malformed",
            "no_conversation",
            "refused",
        }
        for name in (keys.messages(shard, conversation), keys.conversation(shard, conversation)):
            client.delete(name)
            client.set(name, ANN)
            for call in (
                lambda: ann.http.get(f"/api/conversations/{conversation}/messages"),
                lambda: ann.say(conversation, "finds a mess"),
            ):
                assert call().status_code >= ERROR
            client.delete(name)
    listed = chatkeep.process("dead letters", "worker.dead_letters", "list")
    listed.start()
    assert listed.exit_code() == 0
    chatkeep.processes["dead letters"] = listed


def _break(story: Story, model: Model) -> None:
    """Stores that are away, and processes that crash: in the middle of whatever they were at."""
    chatkeep, ann = story.chatkeep, story.ann
    conversation, cold = ann.start(), ann.start()
    ok(ann.say(cold, "goes cold"), 201)
    chatkeep.drain()
    with frozen_server(chatkeep.postgres):
        ok(ann.say(conversation, "is pending"), 201)
        with chatkeep.redis() as client:
            client.delete(*(name(keys.shard_of_user(ann.id, SHARDS), cold) for name in (keys.messages, keys.conversation)))
        assert ann.say(cold, "waits for Postgres").status_code == 503
        time.sleep(2)
    with database(chatkeep) as cursor:  # the worker stands with a title in its statement, and dies with it
        cursor.execute("BEGIN; LOCK TABLE conversation IN SHARE MODE")
        ok(ann.http.patch(f"/api/conversations/{conversation}", json={"title": f"{ANN} is in a statement"}))
        waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ILIKE %s"
        pids = until(lambda: chatkeep.query(waiting, "%is in a statement%"), "a statement waits", 60)
        os.kill(pids[0][0], signal.SIGKILL)
        chatkeep.worker.kill()
    chatkeep.postgres.kill()
    ok(ann.say(conversation, "is pending, too"), 201)
    chatkeep.postgres.start()
    chatkeep.worker.start()
    gate = Gate()
    model.will_say(f"{MARK} half ", gate)
    with (
        suppress(httpx2.TransportError),
        ann.at(chatkeep.api.url).http.stream(
            "POST", f"/api/chat/{conversation}/message", json={"message": f"{ANN} and a crash"}, headers={"Accept": "text/event-stream"}
        ) as answer,
    ):
        for line in answer.iter_lines():
            if "half" in line:
                chatkeep.api.family()[0].send_signal(signal.SIGABRT)
    gate.open()
    chatkeep.api.kill()
    os.kill(chatkeep.valkey.pid, signal.SIGSEGV)  # some builds write a report of what they were at
    chatkeep.api.start()
    chatkeep.api.wait()
    assert ann.say(conversation, "finds no Redis").status_code == 503
    assert ann.chat(conversation, "finds none either").status_code == 503
    chatkeep.valkey.kill()
    chatkeep.broker.kill()
    chatkeep.valkey.start()
    until(lambda: ann.say(conversation, "has it again").status_code == 201, "it is back", 20)


@contextmanager
def database(chatkeep: Installation) -> Iterator[Any]:
    """A cursor whose statements stay."""
    with closing(psycopg2.connect(chatkeep.postgres.url, connect_timeout=5)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SET chatkeep.role = 'owner'")
            yield cursor


def test_the_search_finds_what_there_is(story: Story) -> None:
    """Also in the broker's base64, and with its case changed."""
    for skip in range(3):
        assert story.leaks("here", base64.b64encode(b"." * skip + f"[1, {{}}, {ANN}]".encode()).decode()), skip
    assert story.leaks("here", ANN.upper())
    assert story.leaks("here", f"Cookie: {min(story.witness.credentials)}")
    assert len(story.witness.credentials) >= 3
    assert not story.leaks("here", "An innocent line")


def test_no_log(story: Story) -> None:
    chatkeep = story.chatkeep
    logs = {process.name: process.said for process in story.processes}
    for server in (chatkeep.postgres, chatkeep.valkey, chatkeep.broker):
        for path in server.log.parent.glob("server.log*"):
            logs[f"{server.label} {path.name}"] = path.read_text(errors="replace")
    assert '"level": "debug"' in logs["api"], "DEBUG is on"
    assert '"level": "debug"' not in logs["quiet api"]
    for said in ("terminated by signal", "violates check constraint"):
        assert said in logs["PostgreSQL server.log"]
    assert [leak for name, text in logs.items() for leak in story.leaks(name, text)] == []


def test_no_slow_log_of_redis(story: Story) -> None:
    """It keeps the arguments of slow calls, and a message is one."""
    for server in (story.chatkeep.valkey, story.chatkeep.broker):
        with story.chatkeep.redis(server) as client:
            assert int(client.config_get("slowlog-log-slower-than")["slowlog-log-slower-than"]) < 0
            told = [
                client.execute_command("SLOWLOG", "GET", "-1"),
                client.execute_command("ACL", "LOG"),
                client.client_list(),
                client.info(),
            ]
        assert story.leaks(server.label, str(told)) == []


def test_no_metric_and_no_operators_page(story: Story) -> None:
    found = []
    for url in (story.chatkeep.api.url, str(story.ann.http.base_url)):
        with people.browser(url) as http:
            for path in ("/metrics", "/readyz", "/livez", "/healthz", "/docs", "/openapi.json", "/"):
                found += story.leaks(path, http.get(path).text)
    assert found == []


def test_no_page_of_flower(story: Story) -> None:
    chatkeep = story.chatkeep
    chatkeep.start("flower")
    with chatkeep.browser(*OPERATOR) as http:
        tasks = until(lambda: http.get("/api/tasks?limit=10000").json(), "Flower has tasks")
        assert {task["name"] for task in tasks.values()} >= {"flush", "sweep"}
        some = {task["name"] + str(task["state"]): uuid for uuid, task in tasks.items()}.values()
        workers = until(lambda: len(found := ok(http.get("/api/workers?refresh=1"))) >= 2 and found, "both workers are back", 90)
        pages = ["/", "/workers", "/tasks", "/broker", "/metrics", "/api/workers?refresh=1", "/api/tasks?limit=10000", "/api/task/types"]
        pages += ["/api/queues/length", *(f"/worker/{name}" for name in workers)]
        pages += [path for uuid in some for path in (f"/task/{uuid}", f"/api/task/info/{uuid}")]
        said = {page: http.get(page) for page in pages}
        assert {page for page, answer in said.items() if answer.status_code != 200} == set()
    assert [leak for page, answer in said.items() for leak in story.leaks(page, answer.text)] == []


def test_nothing_in_the_broker(story: Story) -> None:
    chatkeep = story.chatkeep
    with chatkeep.redis(chatkeep.broker) as broker, chatkeep.worker.frozen(), story.worker.frozen():
        for number in range(5):
            ok(story.ann.say(story.ann.start(), f"asks for a flush {number}"), 201)
        reads = {b"list": lambda name: broker.lrange(name, 0, -1), b"hash": broker.hgetall, b"set": broker.smembers, b"string": broker.get}
        reads[b"zset"] = lambda name: broker.zrange(name, 0, -1)
        content = until(lambda: {name: reads[broker.type(name)](name) for name in broker.scan_iter()}, "there is something")
    assert story.leaks("the broker", str(content)) == []
    bodies = [task for values in content.values() if isinstance(values, list) for task in values if task.startswith(b'{"body"')]
    for task in bodies:
        assert story.leaks("a task", base64.b64decode(json.loads(task)["body"]).decode()) == []


def test_no_error_repeats_what_was_sent(story: Story) -> None:
    assert {status for status, _ in (told.split(" ", 1) for told, _ in story.witness.errors)} >= {
        "401",
        "404",
        "405",
        "409",
        "413",
        "422",
        "502",
        "503",
    }
    assert [leak for where, text in story.witness.errors for leak in story.leaks(where, text)] == []


def test_nothing_of_one_person_is_shown_to_another(story: Story) -> None:
    for whose, other in ((ANN, BOB), (BOB, ANN)):
        assert story.witness.shown[whose]
        assert not [text for text in story.witness.shown[whose] if other in text]


def test_no_command_line(story: Story) -> None:
    lines = [" ".join(part.cmdline()) for process in story.processes for part in process.family()]
    assert lines
    assert [leak for line in lines for leak in story.leaks("a command line", line)] == []


def test_marks_stand_nowhere_else() -> None:
    assert not re.search(MARK, " ".join(os.environ))
