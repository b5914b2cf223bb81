"""What makes Chatkeep fast, counted rather than timed: round trips, statements, bytes, allocations. And every row of the benchmarks, once.

Counting is done from outside, by a proxy before each store. Nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import asyncio
import gc
import math
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

import pytest
from redis import Redis
from rich.console import Console
from starlette.testclient import TestClient

from api.app import create_app
from api.dependencies import Page
from api.history import list_conversations, read_conversation, read_history
from benchmarks import planting, report
from benchmarks.__main__ import ALL, ROWS, chosen, measure
from benchmarks.figures import TINY, Figure, Plan, Results, at_least, at_most, ratios, results
from benchmarks.load import Load, percentile, request, run, sentence
from benchmarks.proxy import Proxy
from benchmarks.stand import Stand
from tests import core
from worker import keys
from worker.database import dispose
from worker.flush import flush_shard, flush_shards
from worker.pending import Draft, PendingLog
from worker.redis import connect, connect_sync
from worker.scripts import SEND_AT
from worker.settings import Settings, get_settings

MEMORY_BYTES_MAX = 900
"""Row 13's bar."""
WIRE_BYTES_MAX = 1500
"""For a message of 200 bytes: the body, ten keys, twelve arguments."""
FLUSH_STATEMENTS_MAX = 12


class Counted:
    """The product's settings with a counting proxy before each store."""

    def __init__(self, settings: Settings, redis: Proxy, postgres: Proxy) -> None:
        self.settings = settings
        self.redis = redis
        self.postgres = postgres

    def reset(self) -> None:
        self.redis.reset()
        self.postgres.reset()


@pytest.fixture
def counted(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    with Proxy(_port(settings.redis_url)) as redis, Proxy(_port(settings.database_url)) as postgres:
        for name, url, proxy in (("REDIS_URL", settings.redis_url, redis), ("DATABASE_URL", settings.database_url, postgres)):
            plain = url.get_secret_value()
            monkeypatch.setenv(name, plain.replace(f":{urlsplit(plain).port}/", f":{proxy.port}/"))
        dispose()
        get_settings.cache_clear()
        yield Counted(get_settings(), redis, postgres)
        dispose()


class TestAccept:
    @pytest.mark.anyio
    async def test_an_append_is_one_round_trip_to_redis_and_none_to_postgres(self, counted: Counted) -> None:
        async with writing(counted) as (log, user, conversation):
            counted.reset()
            for i in range(20):
                await log.append(user, conversation, "user", sentence(i))
            assert counted.redis.flights == 20
            assert counted.postgres.flights == 0
            assert counted.redis.bytes_up / 20 < WIRE_BYTES_MAX

    @pytest.mark.anyio
    async def test_an_append_with_a_retry_key_is_one_too(self, counted: Counted) -> None:
        async with writing(counted) as (log, user, conversation):
            counted.reset()
            for i in range(20):
                await log.append(user, conversation, "user", sentence(i), key=f"k:{i}")
            assert counted.redis.flights == 20
            assert counted.postgres.flights == 0

    @pytest.mark.anyio
    async def test_messages_that_come_together_are_one_round_trip(self, counted: Counted) -> None:
        async with writing(counted) as (log, user, conversation):
            counted.reset()
            await log.append_all(user, conversation, [Draft("user", sentence(i)) for i in range(20)], key="k:a")
            assert counted.redis.flights == 1
            assert counted.postgres.flights == 0

    @pytest.mark.anyio
    async def test_appends_that_arrive_together_share_round_trips(self, counted: Counted) -> None:
        """The first leaves alone, those behind it by eights (`test_scripts.py` counts the writes); answers may come between."""
        async with writing(counted) as (log, user, conversation):
            counted.reset()
            await asyncio.gather(*(log.append(user, conversation, "user", sentence(i)) for i in range(16)))
            assert counted.redis.flights <= 1 + math.ceil(15 / SEND_AT)

    @pytest.mark.anyio
    async def test_an_append_leaves_nothing_allocated_in_the_process(self, counted: Counted) -> None:
        async with writing(counted) as (log, user, conversation):

            async def blocks_after(count: int) -> int:
                for i in range(count):
                    await log.append(user, conversation, "user", sentence(i % 50))
                gc.collect()
                return sys.getallocatedblocks()

            before = await blocks_after(200)
            assert await blocks_after(400) - before < 400, "a block or more for each append stays behind"

    def test_http_does_not_ask_postgres_to_accept_or_to_read_what_is_hot(self, counted: Counted) -> None:
        app = create_app(counted.settings)
        with TestClient(app) as client:
            headers = {"Authorization": f"Bearer {app.state.tokens.issue(core.make_user())}"}
            conversation = client.post("/api/conversations/", json={}, headers=headers).json()["id"]
            path = f"/api/conversations/{conversation}/messages"
            assert client.post(path, json={"role": "user", "content": "the first"}, headers=headers).status_code == 201
            counted.reset()
            for i in range(30):
                assert client.post(path, json={"role": "user", "content": sentence(i)}, headers=headers).status_code == 201
                assert len(client.get(path, headers=headers).json()["items"]) == i + 2
            assert counted.postgres.flights == 0


class TestRead:
    @pytest.mark.anyio
    async def test_a_hot_read_is_one_round_trip_to_redis(self, counted: Counted) -> None:
        async with writing(counted) as (log, user, conversation):
            await append_many(log, user, conversation, 60)
            await read_history(log, user, conversation, Page(50))  # finds out whose it is
            counted.reset()
            for page in (Page(50), Page(50, after=1), Page(10, before=1 << 52)) * 5:
                await read_history(log, user, conversation, page)
            assert counted.redis.flights == 15
            assert counted.postgres.flights == 0

    @pytest.mark.anyio
    async def test_a_cold_read_is_one_round_trip_to_each(self, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(PendingLog, "load_soon", lambda *_: None)
        async with writing(counted) as (log, user, conversation):
            await append_many(log, user, conversation, 60)
            with connect_sync(counted.settings) as client:
                _flush(client, counted.settings, user)
                core.forget(client, user, conversation, counted.settings)
            await list_conversations(log, user, 20, None)  # opens a connection
            reads = (
                lambda: read_history(log, user, conversation, Page(50)),
                lambda: read_history(log, user, conversation, Page(50, after=1)),
                lambda: read_conversation(log, user, conversation),
                lambda: list_conversations(log, user, 20, None),
            )
            for read in reads:
                counted.reset()
                await read()
                assert (counted.redis.flights, counted.postgres.flights) == (1, 1)
            counted.reset()
            await log.append(user, conversation, "user", "to be appended it has to be loaded")
            assert counted.postgres.flights == 1


class TestFlush:
    @pytest.mark.anyio
    async def test_number_of_statements_does_not_depend_on_the_rows(self, counted: Counted) -> None:
        """Only on the parts that a large batch is written in: of 500 entries, 1,500, and then of 3,000 each."""
        statements = {}
        async with writing(counted) as (log, user, conversation):
            with connect_sync(counted.settings) as client:
                for count in (3, 3, 10, 600, 2200, 4500):  # the first one opens the connection
                    await append_many(log, user, conversation, count)
                    counted.reset()
                    assert _flush(client, counted.settings, user).messages >= count
                    statements[count] = counted.postgres.flights
        assert statements[3] == statements[10] <= FLUSH_STATEMENTS_MAX
        assert statements[600] <= 2 * FLUSH_STATEMENTS_MAX
        assert 0 < statements[2200] - statements[600] <= FLUSH_STATEMENTS_MAX
        assert statements[4500] == statements[2200], "as many parts"

    @pytest.mark.anyio
    async def test_number_of_statements_does_not_depend_on_the_shards(self, counted: Counted) -> None:
        async with writing(counted) as (log, user, conversation):
            with connect_sync(counted.settings) as client:
                for _ in range(2):  # the first one opens the connection
                    await log.append(user, conversation, "user", "x")
                    counted.reset()
                    flush_shards(client, counted.settings, range(16))
                one = counted.postgres.flights
                for other in [core.make_user() for _ in range(10)]:
                    await log.append(other, (await log.create(other, None)).conversation.id, "user", "x")
                counted.reset()
                report = flush_shards(client, counted.settings, range(16))
                assert (report.batches, report.messages) == (1, 10)
        assert counted.postgres.flights == one + 1, "new conversations are one more statement"
        assert counted.redis.flights <= 5

    @pytest.mark.anyio
    async def test_round_trips_to_redis_are_few_for_many_messages(self, counted: Counted) -> None:
        async with writing(counted) as (log, user, conversation):
            await append_many(log, user, conversation, 2000)
            with connect_sync(counted.settings) as client:
                counted.reset()
                assert _flush(client, counted.settings, user).messages >= 2000
        assert counted.redis.flights <= 30

    @pytest.mark.anyio
    async def test_memory_of_the_worker_is_bounded(self, counted: Counted) -> None:
        async with writing(counted) as (log, user, conversation):
            await append_many(log, user, conversation, 3000)
            with connect_sync(counted.settings) as client:
                _flush(client, counted.settings, user)
                await append_many(log, user, conversation, 3000)
                tracemalloc.start()
                try:
                    _flush(client, counted.settings, user)
                    peak = tracemalloc.get_traced_memory()[1]
                finally:
                    tracemalloc.stop()
        assert peak / 3000 < 8_000


class TestMemory:
    @pytest.mark.anyio
    async def test_redis_needs_less_than_the_bar_for_a_pending_message(self, counted: Counted) -> None:
        async with writing(counted) as (log, user, _):
            conversations = [(await log.create(user, "some")).conversation.id for _ in range(100)]
            with connect_sync(counted.settings) as client:
                before = client.info("memory")["used_memory"]
                for i in range(20):
                    await asyncio.gather(*(log.append(user, conversation, "user", sentence(i)) for conversation in conversations))
                assert (client.info("memory")["used_memory"] - before) / 2000 < MEMORY_BYTES_MAX


# Every row


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    from tests.schema import state_directory

    with state_directory() as home, Stand(Path(home) / "stand", TINY, durable=False) as made:
        yield made


@pytest.mark.timeout(300)
@pytest.mark.parametrize("row", [*ROWS, "keyed"])
def test_row_runs_and_yields_figures(stand: Stand, row: str) -> None:
    figures = measure([row], stand, Console(quiet=True))
    assert figures
    for figure in figures:
        assert figure.what
        assert figure.unit
        assert all(math.isfinite(value) for value in (*figure.values, *figure.raw.values())), figure
    assert stand.chatkeep.pending() == 0


@pytest.mark.timeout(300)
def test_row_with_a_large_table_runs(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planting, "CHUNK", 2_000)
    assert [figure.row for figure in measure(["14"], stand, Console(quiet=True))] == ["14"] * 3


class TestCommandLine:
    def test_rows_are_found_by_what_they_are_measured_with(self) -> None:
        assert chosen("3,4b", with_long=False) == ["1"]
        assert chosen("15", with_long=False) == ["15", "15b", "10"]
        assert chosen("", with_long=False) == list(ROWS)
        assert {"14", "16"} < set(chosen("", with_long=True)) < set(ALL)

    def test_unknown_row_is_refused(self) -> None:
        with pytest.raises(SystemExit, match="no row 99"):
            chosen("99", with_long=False)


class TestFigures:
    FIGURE = Figure("1", "append <fast> & safe", "×", (2.0, 1.0, 3.0), at_least(1.5, 2.5), {"dict, /s": 4380.123})

    def test_median_decides(self) -> None:
        assert self.FIGURE.value == 2.0
        assert self.FIGURE.verdict == "met"
        assert Figure("3", "p99", "×", (0.9,), at_most(1.7, 1.0)).verdict == "beyond"
        assert Figure("3", "p99", "×", (1.8,), at_most(1.7, 1.0)).verdict == "missed"
        assert Figure("9", "no bar", "×", (1.8,)).verdict == ""

    def test_rounds_are_compared_one_by_one(self) -> None:
        assert ratios([2.0, 6.0], [1.0, 2.0]) == (2.0, 3.0)

    def test_saved_run_is_read_back_and_drawn(self, tmp_path: Path) -> None:
        done = results([self.FIGURE], [0.01, 0.2], Plan(), "own")
        done.save(tmp_path / "run.json")
        again = Results.load(tmp_path / "run.json")
        assert (again.figures[0].values, again.figures[0].bar) == (self.FIGURE.values, self.FIGURE.bar)
        root = ElementTree.fromstring(report.draw(again))
        assert root.tag.endswith("svg")
        assert "append <fast> & safe" in "".join(root.itertext())
        assert "2 × [1 – 3]" in report.markdown(again)
        assert "1 phases stayed above 10%" in report.noise(again)

    def test_machine_is_described_without_names_and_paths(self) -> None:
        machine = results([], [], TINY, "own").machine
        assert "cores" in machine
        assert "/home" not in machine
        assert str(Path.home()) not in machine


class TestLoad:
    def test_percentiles(self) -> None:
        values = [float(i) for i in range(1, 101)]
        assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (50.0, 99.0, 7.0)

    def test_sentences_have_the_length_they_say(self) -> None:
        assert {len(sentence(i).encode()) for i in range(300)} == {200}

    def test_unexpected_answer_ends_the_run(self, stand: Stand) -> None:
        system = stand.yardsticks["in_memory"]
        with pytest.raises(RuntimeError, match=r"unexpected answer: HTTP/1\.1 401"):
            run(Load(system.ports, (request("GET", "/api/conversations/1/messages"),), 2, 0.2))

    def test_count_ends_the_run(self, stand: Stand) -> None:
        system = stand.yardsticks["in_memory"]
        assert run(Load(system.ports, stand.histories(system.conversations), 3, 30.0, count=50)).all_requests == 50

    def test_rate_is_kept(self, stand: Stand) -> None:
        system = stand.yardsticks["in_memory"]
        served = run(Load(system.ports, stand.histories(system.conversations), 2, 2.0, rate=20.0, warm_seconds=0.0))
        assert served.all_requests <= 42


class TestProxy:
    def test_delay_is_there_and_back(self, valkey: Any) -> None:
        import time

        with Proxy(valkey.port, delay_seconds=0.05) as proxy:
            client = Redis.from_url(valkey.url.replace(f":{valkey.port}/", f":{proxy.port}/"), socket_timeout=10)
            client.ping()
            proxy.reset()
            started = time.monotonic()
            client.ping()
            assert time.monotonic() - started >= 0.1
            assert proxy.flights == 1
            client.close()


# Helpers


@asynccontextmanager
async def writing(counted: Counted) -> Any:
    """A log that nobody watches in the background, a user, and a conversation that Redis knows."""
    client = connect(counted.settings)
    log = PendingLog(client, counted.settings, wake=lambda shard: None)
    user = core.make_user()
    conversation = (await log.create(user, "a title")).conversation.id
    await log.append(user, conversation, "user", "opens the connection and teaches Redis the script")
    try:
        yield log, user, conversation
    finally:
        await log.close()
        await client.aclose()


async def append_many(log: PendingLog, user: int, conversation: int, count: int) -> None:
    """Some at a time, so that a slow machine is not taken for an outage."""
    for start in range(0, count, 100):
        await asyncio.gather(*(log.append(user, conversation, "user", sentence(i)) for i in range(start, min(start + 100, count))))


def _flush(client: Redis, settings: Settings, user: int) -> Any:
    return flush_shard(client, settings, keys.shard_of_user(user, settings.shards))


def _port(url: Any) -> int:
    return int(urlsplit(url.get_secret_value()).port or 0)
