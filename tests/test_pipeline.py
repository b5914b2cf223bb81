"""A message through real processes, and what is left of it when each of them is killed, frozen, or robbed.

One installation for the module; each test finds it whole (`chatkeep`) and may break what it likes. Nothing here looks inside a process:
only at what it answers, prints, and leaves in the stores.
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import httpx2
import psutil
import psycopg2
import pytest
import redis

from tests.people import Person, browser, keyed, ok, problem, sign_up, until
from tests.processes import OPERATOR, SHARDS, Installation, Process, answers, frozen_server
from worker import keys
from worker.embedded import free_port

EMAIL = "ann.of.the.pipeline@example.org"
PASSWORD = "correct horse battery staple"
WORDS = "swordfish"
"""In every message that is written here, and in nothing else: whatever shows it has shown a message."""
AT_ONCE = 2.0
"""In which whatever cannot be kept is refused."""
SLACK = 1.0
"""For a machine with other things to do."""

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def installation() -> Iterator[Installation]:
    with Installation() as made:
        made.migrate()
        made.start()
        yield made


@pytest.fixture
def chatkeep(installation: Installation) -> Installation:
    installation.heal()
    return installation


@pytest.fixture(scope="module")
def account(installation: Installation) -> Person:
    return sign_up(installation.api.url, EMAIL, PASSWORD)


@pytest.fixture
def ann(chatkeep: Installation, account: Person) -> Person:
    return account


@pytest.fixture
def conversation(ann: Person) -> int:
    return int(ann.start()["id"])


def words(count: int, first: int = 1) -> list[str]:
    return [f"{WORDS} {number}" for number in range(first, first + count)]


def write(person: Person, conversation: int, texts: list[str]) -> list[int]:
    """The ids of the acknowledged messages."""
    return [person.say(conversation, text)["id"] for text in texts]


def rows(chatkeep: Installation, conversation: int) -> list[tuple[int, str]]:
    return chatkeep.query("SELECT id, content FROM message WHERE conversation_id = %s ORDER BY id", conversation)


def timed(call: Callable[[], httpx2.Response]) -> tuple[httpx2.Response, float]:
    started = time.monotonic()
    answer = call()
    return answer, time.monotonic() - started


def refused_at_once(call: Callable[[], httpx2.Response]) -> dict[str, Any]:
    answer, seconds = timed(call)
    assert seconds < AT_ONCE + SLACK
    return problem(answer, 503)


@contextmanager
def locked_out(chatkeep: Installation) -> Iterator[Callable[[], bool]]:
    """Nobody can insert messages, because somebody holds the table; tells whether a worker stands before it."""
    with chatkeep.database() as cursor:
        cursor.execute("LOCK TABLE message IN SHARE MODE")

        def somebody_waits() -> bool:
            return bool(chatkeep.query("SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'message'::regclass"))

        yield somebody_waits


@contextmanager
def ending_api(chatkeep: Installation) -> Iterator[tuple[Process, str]]:
    """An API process with the slow model and little patience, and its address."""
    port, name = free_port(), f"ending api {secrets.token_hex(3)}"
    command = ("uvicorn", "api.app:app", "--port", str(port), "--timeout-graceful-shutdown", "1")
    url = f"http://127.0.0.1:{port}"
    model = {"LLM_BASE_URL": chatkeep.model.url, "LLM_MODEL": "slow", "LLM_API_KEY": "none", "SHUTDOWN_GRACE_SECONDS": "1"}
    process = chatkeep.process(name, *command, ready=lambda _: answers(url + "/livez"), **model)
    process.start()
    process.wait()
    try:
        yield process, url
    finally:
        process.kill()


def stream_of(chatkeep: Installation, conversation: int) -> list[str]:
    """What has been streamed of the running reply."""
    with chatkeep.redis() as client:
        return [str(entry) for entry in client.xrange(keys.reply(keys.shard_of_id(conversation), conversation))]


@contextmanager
def nobody_at_the_queue(chatkeep: Installation) -> Iterator[tuple[redis.Redis, Callable[[], list[bytes]]]]:
    """The worker is frozen, and what it would be given stays in the queue; the broker, and what tells of the flush tasks there."""
    with chatkeep.redis(chatkeep.broker) as broker, chatkeep.worker.frozen():
        for client in broker.client_list():
            if client["cmd"] == "brpop":  # it would be given the next task, frozen or not
                broker.client_kill_filter(_id=client["id"])
        yield broker, lambda: [task for task in broker.lrange("celery", 0, -1) if json.loads(task)["headers"]["task"] == "flush"]


def logs(chatkeep: Installation) -> str:
    """All that processes and servers have said."""
    said = [process.said for process in (*chatkeep.processes.values(), chatkeep.migration)]
    return "\n".join([*said, *(server.log.read_text(errors="replace") for server in (chatkeep.postgres, chatkeep.valkey, chatkeep.broker))])


def sign_in(chatkeep: Installation) -> Person:
    with httpx2.Client(base_url=chatkeep.api.url, timeout=10) as http:
        token = ok(http.post("/api/auth/token", data={"username": EMAIL, "password": PASSWORD}))["access_token"]
        return Person(chatkeep.api.url, ok(http.get("/api/auth/me", headers={"Authorization": f"Bearer {token}"}))["id"], token)


class TestAllProcesses:
    def test_a_message_goes_through_all_of_them(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        message = ann.say(conversation, f"{WORDS} \u202eשלום\u202c 👋🏽\r\n\ufeff")
        assert message["state"] == "pending"
        until(lambda: ann.history(conversation)[0]["state"] == "committed", "the worker commits it", 10)
        assert ann.history(conversation) == [message | {"state": "committed"}]
        assert rows(chatkeep, conversation) == [(message["id"], message["content"])]
        assert chatkeep.query("SELECT user_id, title FROM conversation WHERE id = %s", conversation) == [
            (ann.id, ann.look(conversation)["title"])
        ]

    def test_two_api_processes_are_one(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        """Whoever acknowledged it, everybody shows it, at every instant of the flushes that go on meanwhile."""
        chatkeep.start("other_api")
        there = ann.at(chatkeep.other_api.url)
        expected: list[int] = []
        for number in range(40):
            writer, reader = (ann, there) if number % 2 else (there, ann)
            expected.append(writer.say(conversation, f"{WORDS} {number}")["id"])
            assert [message["id"] for message in reader.page(conversation, limit=200)["items"]] == expected
            assert reader.conversations(limit=1)["items"][0]["id"] == conversation
        assert expected == sorted(set(expected))
        with ThreadPoolExecutor(8) as threads:
            both = [ann, there] * 4
            answers = list(threads.map(lambda person: person.post(conversation, f"{WORDS} once", key="once"), both))
        assert len({ok(answer, 201)["id"] for answer in answers}) == 1
        chatkeep.drain()
        assert [number for number, _ in rows(chatkeep, conversation)] == [message["id"] for message in ann.history(conversation)]
        assert len(ann.history(conversation)) == 41

    def test_readers_never_see_it_go_backwards(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        """Two readers at two processes, while one writes and the worker flushes."""
        chatkeep.start("other_api")
        done = threading.Event()
        written = 0

        def read(person: Person) -> int:
            seen = looks = 0
            while not done.is_set():
                at_least = written
                texts = [message["content"] for message in person.page(conversation, limit=200)["items"]]
                assert texts == words(len(texts)), "a gap, or another order"
                assert len(texts) >= max(seen, at_least), "it was acknowledged, or seen, and is not there"
                seen, looks = len(texts), looks + 1
            return looks

        with ThreadPoolExecutor(2) as threads:
            readers = [threads.submit(read, ann.at(api.url)) for api in (chatkeep.api, chatkeep.other_api)]
            try:
                for text in words(100):
                    ann.say(conversation, text)
                    written += 1
            finally:
                done.set()
            assert all(reader.result(10) > 5 for reader in readers)


class TestFlower:
    def test_is_closed_to_everybody_else(self, chatkeep: Installation) -> None:
        chatkeep.start("flower")
        for login in ((), ("operator", "wrong"), ("", "")):
            with chatkeep.browser(*login) as http:
                for path in ("/", "/workers", "/tasks", "/broker", "/api/workers", "/api/tasks", "/api/queues/length"):
                    assert http.get(path).status_code == 401, path
        with chatkeep.browser(*OPERATOR) as http:
            for path in ("/api/worker/shutdown/celery", "/api/task/revoke/1", "/api/task/async-apply/flush"):
                assert http.post(path, json={"args": [1]}).status_code in (403, 404, 405), path
        listening = [one for one in chatkeep.flower.family()[0].net_connections() if one.status == psutil.CONN_LISTEN]
        assert {one.laddr.ip for one in listening} == {"127.0.0.1"}

    def test_shows_the_flushes_and_nothing_of_anybody(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        write(ann, conversation, words(7))
        chatkeep.drain()
        chatkeep.start("flower")
        with chatkeep.browser(*OPERATOR) as http:

            def flush_with_messages() -> dict[str, Any] | None:
                tasks = ok(http.get("/api/tasks?limit=1000")).values()
                return next(
                    (
                        task
                        for task in tasks
                        if task["name"] == "flush"
                        and re.search(rf"'shards': \[[0-9, ]*\b{ann.id % SHARDS}\b", task["result"] or "")
                        and "'messages': 0" not in task["result"]
                    ),
                    None,
                )

            task = until(flush_with_messages, "Flower has heard of the flush")
            assert re.fullmatch(r"\((\d+, ?)+\d*\)", task["args"]), "numbers of shards, and nothing else"
            assert re.search(r"'entries': [1-9]\d*", task["result"])
            assert re.search(r"'seconds': \d+\.\d+", task["result"])
            pages = [
                "/",
                "/workers",
                "/tasks",
                "/broker",
                "/api/tasks?limit=1000",
                "/api/workers?refresh=1",
                f"/task/{task['uuid']}",
                "/metrics",
            ]
            for page in pages:
                answer = http.get(page)
                assert answer.status_code == 200, page
                for secret in (WORDS, EMAIL, PASSWORD, ann.token, chatkeep.secret, str(conversation)):
                    assert secret not in answer.text, page


class TestDeadLetters:
    def command(self, chatkeep: Installation, *arguments: str) -> tuple[int, str]:
        process = chatkeep.process(f"dead letters {secrets.token_hex(3)}", "worker.dead_letters", *arguments, COLUMNS="200")
        process.start()
        return process.exit_code(), process.said

    def test_poison_blocks_nobody_and_is_in_an_operators_hands(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        shard = keys.shard_of_user(ann.id, SHARDS)
        chatkeep.drain()
        absent = conversation + 64 * 10**6
        planted = b'{"conversation_id":%d,"user_id":%d,"role":"user","content":"%s planted","status":"complete"}'
        poison = {"no_conversation": planted % (absent, ann.id, WORDS.encode()), "malformed": WORDS.encode()}
        with chatkeep.worker.frozen(), chatkeep.redis() as client:
            before = write(ann, conversation, words(2))
            for number, body in enumerate(poison.values(), start=1):
                entry = {"k": "m", "t": str(int(time.time() * 1e6)), "b": body, "x": "", "a": ""}
                client.xadd(keys.log(shard), entry, id=f"{before[-1] + 64 * number}-0")
            after = write(ann, conversation, words(2, first=3))
        chatkeep.drain()
        assert rows(chatkeep, conversation) == list(zip(before + after, words(4), strict=True)), "its neighbours are not taken along"
        ids = {reason: str(number) for reason, number in chatkeep.query("SELECT reason, id FROM dead_letter")}
        assert set(ids) == set(poison)

        commands = (("list",), ("show", ids["no_conversation"]), ("replay", ids["no_conversation"], ids["malformed"]))
        with ThreadPoolExecutor(len(commands)) as threads:
            listed, shown, replayed = threads.map(lambda command: self.command(chatkeep, *command), commands)
        assert listed[0] == 0
        assert all(reason in listed[1] and number in listed[1] for reason, number in ids.items())
        assert WORDS not in listed[1], "the list shows no content"
        assert shown[0] == 0
        assert f"{WORDS} planted" in shown[1]
        assert replayed[0] == 1
        assert replayed[1].count("refused again") == 2
        with psycopg2.connect(chatkeep.postgres.url) as connection, connection.cursor() as cursor:  # what stood in its way is mended
            cursor.execute("INSERT INTO conversation (id, user_id, created_at, updated_at) VALUES (%s, %s, now(), now())", (absent, ann.id))
        code, said = self.command(chatkeep, "replay", ids["no_conversation"])
        assert (code, said.strip()) == (0, f"{ids['no_conversation']}: replayed")
        assert ann.contents(absent) == [f"{WORDS} planted"]
        code, said = self.command(chatkeep, "drop", "--yes", ids["malformed"])
        assert (code, said.strip()) == (0, "1 dropped")
        assert chatkeep.query("SELECT reason FROM dead_letter WHERE replayed_at IS NULL") == []
        metrics = ann.http.get("/metrics").text
        assert 'level": "error"' in chatkeep.worker.said
        assert re.search(r"^chatkeep_dead_letters_total 2", metrics, re.MULTILINE), "the alarm"


class TestStart:
    def test_wrong_settings_are_refused_in_one_line(self, chatkeep: Installation) -> None:
        api, worker = ("uvicorn", "api.app:app", "--port", "0"), ("celery", "-A", "worker.app", "worker")
        refused = {
            "api with other shards": (api, {"SHARDS": "8"}, f"SHARDS is 8, but this installation was made with {SHARDS}"),
            "worker with other shards": (worker, {"SHARDS": "8"}, f"SHARDS is 8, but this installation was made with {SHARDS}"),
            "api with a short secret": (api, {"JWT_SECRET": "short"}, "JWT_SECRET: Value error, must be at least 32 bytes"),
            "worker with a known secret": (worker, {"JWT_SECRET": "changeme" * 5}, "JWT_SECRET: Value error, is a well-known"),
            "api without a database": (api, {"DATABASE_URL": "", "FLUSH_BATCH_MAX": "many"}, "DATABASE_URL: Field required"),
        }
        started = [(chatkeep.process(name, *command, **env), message) for name, (command, env, message) in refused.items()]
        for process, _ in started:
            process.start()
        for process, message in started:
            assert process.exit_code() != 0, process.name
            (line,) = [line for line in process.said.splitlines() if line.startswith("chatkeep: ")]
            assert message in line, process.name
            assert "Traceback" not in process.said, process.name


class TestRedis:
    def calls(self, person: Person, conversation: int) -> list[Callable[[], httpx2.Response]]:
        http, path = person.http, f"/api/conversations/{conversation}"
        return [
            lambda: person.post(conversation, WORDS, key="while-away"),
            lambda: http.get(path + "/messages"),
            lambda: http.get(path),
            lambda: http.get("/api/conversations"),
            lambda: http.post("/api/conversations", json={}),
            lambda: http.patch(path, json={"title": WORDS}),
            lambda: http.delete(path),
            lambda: http.post("/api/chat/start", json={}),
            lambda: person.chat(conversation, WORDS),
            lambda: person.stream(conversation, WORDS),
        ]

    def check_refusals(self, chatkeep: Installation, person: Person, conversation: int) -> None:
        """Everything at once: each is refused within 2 s."""
        calls = self.calls(person, conversation)
        with ThreadPoolExecutor(len(calls) + 2) as threads:
            refusals = [threads.submit(refused_at_once, call) for call in calls]
            ready = threads.submit(until, lambda: person.http.get("/readyz").status_code == 503, "it is not ready", AT_ONCE + SLACK)
            alive = threads.submit(timed, lambda: person.http.get("/livez"))
            for refusal in refusals:
                refusal.result(20)
            assert ready.result(20)
            assert alive.result(20)[0].status_code == 200
            assert alive.result(20)[1] < SLACK

    def test_frozen(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        ids = write(ann, conversation, words(3))
        with frozen_server(chatkeep.valkey):
            self.check_refusals(chatkeep, ann, conversation)
        until(lambda: ann.http.get("/readyz").status_code == 200, "it recovers by itself", 10)
        kept = [message for message in ann.history(conversation) if message["id"] in ids]
        assert [message["content"] for message in kept] == words(3)

    def test_write_of_unknown_outcome_is_stored_once(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        with frozen_server(chatkeep.valkey):
            for _ in range(2):
                refused_at_once(lambda: ann.post(conversation, WORDS, key="k"))
        message = until(
            lambda: answer.json() if (answer := ann.post(conversation, WORDS, key="k")).status_code == 201 else None, "it recovers", 10
        )
        assert [one["id"] for one in ann.history(conversation)] == [message["id"]]
        chatkeep.drain()
        assert rows(chatkeep, conversation) == [(message["id"], WORDS)]

    def test_killed_and_restarted(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        with chatkeep.worker.frozen():
            ids = write(ann, conversation, words(20))
            chatkeep.valkey.kill()
            self.check_refusals(chatkeep, ann, conversation)
            chatkeep.valkey.start()
            until(lambda: ann.http.get(f"/api/conversations/{conversation}").status_code == 200, "it recovers by itself", 10)
            assert ann.contents(conversation) == words(20), "what was acknowledged was fsynced"
            assert {message["state"] for message in ann.history(conversation)} == {"pending"}
        ids += write(ann, conversation, words(3, first=21))
        assert ids == sorted(set(ids))
        chatkeep.drain(30)
        assert rows(chatkeep, conversation) == list(zip(ids, words(23), strict=True))

    def test_emptied_when_everything_was_committed(self, chatkeep: Installation, ann: Person) -> None:
        chatkeep.start("other_api")
        started = ann.http.post("/api/conversations", json={"title": WORDS}, headers=keyed("start"))
        conversation = started.json()["id"]
        with chatkeep.redis() as client:
            client.incrby(keys.clock(keys.shard_of_user(ann.id, SHARDS)), 6_000_000)  # as if its server's time had been a minute ahead
        first = ann.say(conversation, WORDS, key="k")
        turn = ok(ann.chat(conversation, f"{WORDS} turn", key="t"))
        ids = [message["id"] for message in ann.history(conversation)]
        chatkeep.drain()
        for person in (ann.at(chatkeep.other_api.url), ann):
            chatkeep.drain()
            with chatkeep.redis() as client:
                client.flushall()
            replayed = person.post(conversation, WORDS, key="k")
            assert (ok(replayed, 201)["id"], replayed.headers["idempotent-replayed"]) == (first["id"], "true")
            problem(person.post(conversation, "another body", key="k"), 422)
            assert ok(person.chat(conversation, f"{WORDS} turn", key="t"))["assistant_message"]["id"] == turn["assistant_message"]["id"]
            again = person.http.post("/api/conversations", json={"title": WORDS}, headers=keyed("start"))
            assert again.json() == started.json()
            ids.append(person.say(conversation, f"{WORDS} more")["id"])
            assert [message["id"] for message in person.history(conversation)] == ids == sorted(set(ids))
            new = person.start()["id"]
            assert new > ids[-1] >> 6 << 6, "no id goes back"
        chatkeep.drain()
        assert [number for number, _ in rows(chatkeep, conversation)] == ids


class TestPostgres:
    def test_killed_and_restarted(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        cold = self.cold_conversation(chatkeep, ann)
        ids = write(ann, conversation, words(3))
        chatkeep.drain()
        chatkeep.postgres.kill()
        ids += write(ann, conversation, words(10, first=4))
        assert ann.contents(conversation) == words(13)
        refused_at_once(lambda: ann.http.get(f"/api/conversations/{cold}/messages"))
        refused_at_once(lambda: ann.http.get("/api/conversations"))
        until(lambda: ok(ann.http.get("/readyz"))["status"] == "degraded", "it says so", AT_ONCE + SLACK)
        chatkeep.postgres.start()
        chatkeep.drain(30)
        assert rows(chatkeep, conversation) == list(zip(ids, words(13), strict=True))
        assert ann.contents(cold) == [WORDS]
        until(lambda: ok(ann.http.get("/readyz"))["status"] == "ok", "it is whole again", 10)

    def test_frozen_changes_no_write_to_a_known_conversation(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        """Neither its status nor its latency; what Redis has whole is read as before, and what it has not is refused."""
        colds = [self.cold_conversation(chatkeep, ann) for _ in range(3)]
        write(ann, conversation, words(5))
        chatkeep.drain()

        def round_of_calls(number: int) -> list[float]:
            calls: list[Callable[[], httpx2.Response]] = [
                lambda: ann.post(conversation, f"{WORDS} {number}"),
                lambda: ann.post(conversation, f"{WORDS} {number}", key=f"k{number}"),
                lambda: ann.http.patch(f"/api/conversations/{conversation}", json={"title": f"{WORDS} {number}"}),
                lambda: ann.http.post("/api/conversations", json={}),
                lambda: ann.http.get(f"/api/conversations/{conversation}/messages?limit=5"),
                lambda: ann.http.get(f"/api/conversations/{conversation}"),
                lambda: ann.chat(conversation, f"{WORDS} {number}"),
            ]
            found = [timed(call) for call in calls]
            assert [answer.status_code for answer, _ in found] == [201, 201, 200, 201, 200, 200, 200]
            return [seconds for _, seconds in found]

        usual = [max(each) for each in zip(*(round_of_calls(number) for number in range(10)), strict=True)]
        with frozen_server(chatkeep.postgres):
            with ThreadPoolExecutor(12) as threads:
                refusals = [
                    threads.submit(refused_at_once, lambda number=number: ann.http.get(f"/api/conversations/{number}/messages"))
                    for number in colds
                ]
                while_frozen = [min(each) for each in zip(*(round_of_calls(number) for number in range(10, 20)), strict=True)]
                for refusal in refusals:
                    refusal.result(20)
            assert all(now < before + 0.1 for now, before in zip(while_frozen, usual, strict=True)), (while_frozen, usual)
            until(lambda: ok(ann.http.get("/readyz"))["status"] == "degraded", "it says so", AT_ONCE + SLACK)
        chatkeep.drain(40)
        texts = [text for _, text in rows(chatkeep, conversation)]
        assert texts == ann.contents(conversation)
        assert ann.contents(colds[0]) == [WORDS]

    def test_frozen_refuses_a_crowd_as_fast_as_one(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        """Everything that needs it, and more callers at once than there are connections."""
        http, login = ann.http, {"username": EMAIL, "password": PASSWORD}
        needs_it: list[Callable[[str], httpx2.Response]] = [
            lambda path: http.get(path + "/messages"),
            lambda path: http.post(path + "/messages", json={"role": "user", "content": WORDS}),
            http.get,
            lambda path: http.patch(path, json={"title": WORDS}),
            http.delete,
            lambda path: http.post("/api/chat/start", json={"conversation_id": int(path.rsplit("/", 1)[1])}),
            lambda path: http.post(path.replace("conversations", "chat") + "/message", json={"message": WORDS}),
            lambda path: http.get(path.replace("conversations", "chat") + "/history"),
            lambda _: http.get("/api/conversations"),
            lambda _: http.get("/api/auth/me"),
            lambda _: http.post("/api/auth/token", data=login),
            lambda _: http.post("/api/auth/register", json={"email": "late@example.org", "password": PASSWORD}),
        ]
        paths = [f"/api/conversations/{self.cold_conversation(chatkeep, ann)}" for _ in range(24)]
        with frozen_server(chatkeep.postgres), ThreadPoolExecutor(24) as threads:
            calls = [partial(needs_it[number % len(needs_it)], path) for number, path in enumerate(paths)]
            for refusal in [threads.submit(refused_at_once, call) for call in calls]:
                refusal.result(30)
        assert ann.contents(int(paths[0].rsplit("/", 1)[1])) == [WORDS]

    @staticmethod
    def cold_conversation(chatkeep: Installation, person: Person) -> int:
        conversation = int(person.start()["id"])
        person.say(conversation, WORDS)
        chatkeep.drain()
        with chatkeep.redis() as client:
            shard = keys.shard_of_user(person.id, SHARDS)
            client.delete(*keys.of_conversation(shard, conversation))
        return conversation


class TestWorker:
    def test_killed_in_the_middle_of_a_flush(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        with locked_out(chatkeep) as worker_waits:
            ids = write(ann, conversation, words(10))
            until(worker_waits, "the worker is inserting")
            chatkeep.worker.kill()
        assert rows(chatkeep, conversation) == []
        assert ann.contents(conversation) == words(10)
        ids += write(ann, conversation, words(5, first=11))
        chatkeep.start("worker")
        chatkeep.drain()
        assert rows(chatkeep, conversation) == list(zip(ids, words(15), strict=True))
        assert ann.contents(conversation) == words(15)

    def test_killed_between_commit_and_trim(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        dead_letters = chatkeep.query("SELECT count(*) FROM dead_letter")
        with locked_out(chatkeep) as worker_waits:
            ids = write(ann, conversation, words(10))
            until(worker_waits, "the worker has read the log and is inserting")
            chatkeep.valkey.kill()
        committed = until(lambda: rows(chatkeep, conversation), "it has committed, and has nothing to trim")
        chatkeep.worker.kill()
        chatkeep.valkey.start()
        assert chatkeep.pending() >= len(committed), "the log has it too"
        history = until(lambda: answer.json() if (answer := self.get(ann, conversation)).status_code == 200 else None, "it recovers", 10)
        assert [message["id"] for message in history["items"]] == ids
        chatkeep.start("worker")
        chatkeep.drain()
        assert rows(chatkeep, conversation) == list(zip(ids, words(10), strict=True))
        assert ann.contents(conversation) == words(10)
        assert chatkeep.query("SELECT count(*) FROM dead_letter") == dead_letters

    @staticmethod
    def get(person: Person, conversation: int) -> httpx2.Response:
        return person.http.get(f"/api/conversations/{conversation}/messages")

    def test_a_killed_child_is_replaced(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        with locked_out(chatkeep) as worker_waits:
            ids = write(ann, conversation, words(3))
            until(worker_waits, "a child is inserting")
            chatkeep.worker.kill_children()
        chatkeep.drain()
        assert rows(chatkeep, conversation) == list(zip(ids, words(3), strict=True))

    def test_lost_task_is_made_good_by_the_sweep(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        chatkeep.drain()
        with nobody_at_the_queue(chatkeep) as (broker, flushes):
            ids = write(ann, conversation, words(3))
            until(flushes, "the task is in the queue")
            broker.delete("celery")
        chatkeep.drain(15)
        assert [number for number, _ in rows(chatkeep, conversation)] == ids

    def test_wiped_broker_costs_no_message(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        chatkeep.drain()
        with nobody_at_the_queue(chatkeep) as (broker, flushes):
            ids = write(ann, conversation, words(3))
            until(flushes, "the task is in the queue")
            broker.flushall()
        chatkeep.drain(15)
        with chatkeep.redis(chatkeep.broker) as broker:
            broker.flushall()
        ids += write(ann, conversation, words(3, first=4))
        chatkeep.drain(15)
        assert rows(chatkeep, conversation) == list(zip(ids, words(6), strict=True))

    def test_dead_or_frozen_broker_delays_no_acknowledgement(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        chatkeep.broker.kill()
        before = time.monotonic()
        ids = write(ann, conversation, words(20))
        assert time.monotonic() - before < AT_ONCE
        chatkeep.broker.start()
        with frozen_server(chatkeep.broker):
            before = time.monotonic()
            ids += write(ann, conversation, words(20, first=21))
            assert time.monotonic() - before < AT_ONCE
            assert ann.contents(conversation) == words(40)
        chatkeep.drain(60)  # kombu notices a half-open connection after up to 51 s (brpop_timeout + 2 * health_check_interval)
        assert rows(chatkeep, conversation) == list(zip(ids, words(40), strict=True))


class TestEverything:
    def test_killed_at_once_and_started_again(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        """kill -9 of every process and both stores, with messages committed, pending, and on their way."""
        ids = write(ann, conversation, words(10))
        chatkeep.drain()
        with locked_out(chatkeep) as worker_waits:
            ids += write(ann, conversation, words(10, first=11))
            until(worker_waits, "the worker is inserting")
            ids.append(ann.say(conversation, f"{WORDS} 21", key="last")["id"])
            for process in chatkeep.processes.values():
                process.kill()
            for server in (chatkeep.valkey, chatkeep.postgres, chatkeep.broker):
                server.kill()
        chatkeep.heal()
        assert [message["id"] for message in ann.history(conversation)] == ids
        assert ann.contents(conversation) == words(21)
        assert ann.say(conversation, f"{WORDS} 21", key="last")["id"] == ids[-1]
        assert ann.say(conversation, f"{WORDS} 22")["id"] > ids[-1]
        chatkeep.drain()
        assert [text for _, text in rows(chatkeep, conversation)] == words(22)
        assert sign_in(chatkeep).id == ann.id

    def test_reply_outlives_a_restart_of_redis(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        chatkeep.start("other_api")
        chatkeep.model.reset()
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(ann.at(chatkeep.other_api.url).chat, conversation, WORDS)
            assert chatkeep.model.asked.wait(10)
            chatkeep.valkey.kill()
            chatkeep.model.go_on.set()
            chatkeep.valkey.start()
            turn = ok(running.result(20))
        assert turn["reply"] == "Once upon a time."
        assert ann.contents(conversation) == [WORDS, "Once upon a time."]

    def test_turn_of_a_dead_api_process_gets_free(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        """Its lease lasts 15 s at the most, and nobody prolongs it; the test does not wait so long."""
        chatkeep.start("other_api")
        chatkeep.model.reset()
        there = ann.at(chatkeep.other_api.url)
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(lambda: there.chat(conversation, f"{WORDS} one", key="turn"))
            assert chatkeep.model.asked.wait(10)
            problem(ann.chat(conversation, f"{WORDS} two"), 409)
            chatkeep.other_api.kill()
            with pytest.raises(httpx2.TransportError):
                running.result(10)
        chatkeep.model.go_on.set()
        assert ann.contents(conversation)[0] == f"{WORDS} one"
        problem(ann.chat(conversation, f"{WORDS} two"), 409)
        name = keys.turn(keys.shard_of_user(ann.id, SHARDS), conversation)
        with chatkeep.redis() as client:
            left = client.pttl(name)
            assert 0 < left <= 15_000
            until(lambda: client.pttl(name) < left, "it runs out")
            client.pexpire(name, 1)
        turn = until(
            lambda: answer.json() if (answer := ann.chat(conversation, f"{WORDS} one", key="turn")).status_code == 200 else None, "free", 5
        )
        assert turn["user_message"]["content"] == f"{WORDS} one"
        assert [message["role"] for message in ann.history(conversation)] == ["user", "assistant"]
        assert ann.history(conversation)[1]["id"] == turn["assistant_message"]["id"]

    def test_reply_may_end_when_its_process_is_told_to_and_is_kept_when_it_does_not(
        self, chatkeep: Installation, ann: Person, conversation: int
    ) -> None:
        """SIGTERM, with a reader at the stream; at once afterwards, without any lease running out, the next turn works."""
        for goes_on, kept in ((True, ("Once upon a time.", "complete")), (False, ("Once ", "incomplete"))):
            with ending_api(chatkeep) as (process, url), ThreadPoolExecutor(1) as threads:
                chatkeep.model.reset()
                running = threads.submit(ann.at(url).stream, conversation, WORDS)
                assert chatkeep.model.asked.wait(10)
                until(lambda: "Once" in json.dumps(stream_of(chatkeep, conversation)), "it is streamed")
                process.family()[0].terminate()
                if goes_on:
                    chatkeep.model.go_on.set()
                process.exit_code()
                with suppress(httpx2.TransportError):
                    running.result(10)
            last = ann.history(conversation)[-1]
            assert (last["content"], last["status"]) == kept
            assert ok(ann.chat(conversation, f"{WORDS} next"))["reply"]


class TestLogs:
    def test_one_that_nobody_takes_away_stops_no_answer(self, chatkeep: Installation) -> None:
        """Its disk, or whoever collects it, stands still: a pipe holds the lines of some 300 requests."""
        port = free_port()
        command = (sys.executable, "-m", "uvicorn", "api.app:app", "--port", str(port))
        with subprocess.Popen(command, env=chatkeep.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                until(lambda: answers(f"http://127.0.0.1:{port}/livez"), "it is ready", 30)
                with browser(f"http://127.0.0.1:{port}") as http:
                    for _ in range(2_000):
                        ok(http.get("/livez"))
            finally:
                process.kill()

    def test_has_the_last_words_of_a_process_that_is_told_to_end(self, chatkeep: Installation) -> None:
        with ending_api(chatkeep) as (process, _):
            process.family()[0].terminate()
            process.exit_code()
            assert "Application shutdown complete" in process.said
            assert "Finished server process" in process.said


class TestSecrets:
    def test_the_broker_carries_no_data(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        chatkeep.drain()
        with nobody_at_the_queue(chatkeep) as (_, flushes):
            write(ann, conversation, words(3))
            for task in until(flushes, "the task is in the queue"):
                assert not any(secret.encode() in task for secret in (WORDS, EMAIL, ann.token, str(conversation)))
                assert b64decode(json.loads(task)["body"]).startswith(b"[[%d], {}" % (ann.id % SHARDS)), "a shard and nothing else"

    def test_no_log_holds_a_message_a_token_or_an_address(self, chatkeep: Installation, ann: Person, conversation: int) -> None:
        """Of all processes and servers, with all that the tests before this one have done to them."""
        write(ann, conversation, words(3))
        ok(ann.chat(conversation, f"I remember {WORDS}"))
        problem(ann.http.post(f"/api/conversations/{conversation}/messages", json={"role": WORDS, "content": WORDS, WORDS: EMAIL}), 422)
        ann.http.get(f"/api/conversations/{conversation}", headers={"Authorization": f"Bearer {ann.token}x"})
        ann.http.post("/api/auth/token", data={"username": EMAIL, "password": PASSWORD + "x"})
        chatkeep.drain()
        said = logs(chatkeep)
        assert "flushed" in said
        passwords = [server.url.split(":")[2].split("@")[0] for server in (chatkeep.postgres, chatkeep.valkey, chatkeep.broker)]
        for secret in (
            WORDS,
            EMAIL,
            EMAIL.partition("@")[0],
            PASSWORD,
            ann.token,
            ann.token.split(".")[1],
            chatkeep.secret,
            OPERATOR[1],
            *passwords,
        ):
            where = said.find(secret)
            assert where < 0, said[max(0, where - 300) : where].rsplit("\n", 1)[-1]
