"""Scripts on a shared connection: everybody gets the own answer or none, whatever happens to the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import hiredis
import pytest
from pydantic import SecretStr
from redis.exceptions import ResponseError
from structlog.testing import capture_logs

from worker import scripts
from worker.errors import RedisUnavailable, TooSlow
from worker.multiplexed import Argument, Packed, PackedCommands, pack, pack_command
from worker.redis import connect
from worker.scripts import SEND_AT, AsyncScripts

pytestmark = pytest.mark.anyio
EMPTIED = True

Handler = Callable[["Peer", list[bytes]], Awaitable[None]]


@dataclass
class Peer:
    """The server's end of one connection."""

    writer: asyncio.StreamWriter
    commands: list[list[bytes]] = field(default_factory=list)
    left: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def server(handle: Handler) -> AsyncIterator[tuple[str, list[Peer]]]:
    """A server that answers what a test says; its address, and the connections that came."""
    peers: list[Peer] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer, parser = Peer(writer), hiredis.Reader()
        peers.append(peer)
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                parser.feed(data)
                while (command := parser.gets()) is not False:
                    if command[0] in (b"CLIENT", b"SELECT"):
                        writer.write(b"+OK\r\n")
                    elif command[0] == b"PING" and not peer.commands:  # redis-py's, when it has connected
                        writer.write(b"+PONG\r\n")
                    else:
                        peer.commands.append(command)
                        await handle(peer, command)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}/0", peers
    finally:
        listening.close()
        for peer in peers:
            peer.writer.close()


@asynccontextmanager
async def scripts_on(settings, url: str, seconds: float = 5) -> AsyncIterator[AsyncScripts]:
    client = connect(settings.model_copy(update={"redis_url": SecretStr(url)}))
    made = AsyncScripts(client, seconds)
    yield made
    await made.close()
    await client.aclose()


def counted(running: AsyncScripts) -> list[bytes]:
    """What is written from here on, write by write."""
    writes: list[bytes] = []
    transport = running._connection._transport

    class Counted:
        def write(self, data: bytes) -> None:
            writes.append(data)
            transport.write(data)

        def is_closing(self) -> bool:
            return False

        def abort(self) -> None:
            transport.abort()

    running._connection._transport = Counted()
    return writes


async def say_which(peer: Peer, command: list[bytes]) -> None:
    """Answers with the last argument."""
    peer.writer.write(b"$%d\r\n%s\r\n" % (len(command[-1]), command[-1]) if command[0] != b"PING" else b"+PONG\r\n")


@pytest.mark.parametrize("arguments", [(), ("",), ("GET", b"k", 7, "\xe4\r\n$3\r\n", b"\x00" * 3000, 1.5)])
def test_what_is_packed_once_is_what_hiredis_packs(arguments: tuple[Argument, ...]) -> None:
    whole = hiredis.pack_command(arguments)
    assert pack_command(arguments) == whole
    assert b"*%d\r\n" % len(arguments) + pack(arguments) == whole
    assert Packed(arguments) == arguments
    assert Packed(arguments).wire == pack(arguments)
    assert PackedCommands([arguments, arguments]) == (arguments, arguments)
    assert PackedCommands([arguments, arguments]).wire == whole * 2


@pytest.mark.parametrize("with_source", [False, True])
async def test_a_call_is_the_same_whether_its_keys_are_packed_or_not(settings, with_source: bool) -> None:
    """Also where the server does not know the script."""

    async def forgetful(peer: Peer, command: list[bytes]) -> None:
        if with_source and command[0] == b"EVALSHA":
            peer.writer.write(b"-NOSCRIPT No matching script\r\n")
        else:
            await say_which(peer, command)

    async with server(forgetful) as (url, peers), scripts_on(settings, url) as running:
        for keys in (["k", "\xe4"], Packed(("k", "\xe4"))):
            assert await running.run("turn", keys, ["token", 5]) == b"5"
        half = 1 + with_source
        first, second = peers[0].commands[:half], peers[0].commands[half:]
        assert first == second
        assert first[-1][2:] == [b"2", b"k", "\xe4".encode(), b"token", b"5"]


async def test_each_caller_gets_the_own_answer(settings) -> None:
    async with server(say_which) as (url, peers), scripts_on(settings, url) as running:
        for _ in range(3):
            answers = await asyncio.gather(*(running.run("turn", ["k"], [str(n)]) for n in range(200)))
            assert answers == [str(n).encode() for n in range(200)]
        assert len(peers) == 1


async def test_calls_of_one_turn_leave_in_few_writes(settings) -> None:
    async with server(say_which) as (url, _), scripts_on(settings, url) as running:
        await running.run("turn", ["k"], ["first"])
        writes = counted(running)
        await asyncio.gather(*(running.run("turn", ["k"], [str(n)]) for n in range(50)))
        together, rest = divmod(49, SEND_AT)
        assert [write.count(b"EVALSHA") for write in writes] == [1, *[SEND_AT] * together, rest], "the first has nobody to wait for"


async def test_a_late_answer_reaches_nobody_else(settings) -> None:
    """The one who gave up leaves a gap in the order: the next caller must not get his answer."""
    late = asyncio.Event()

    async def handle(peer: Peer, command: list[bytes]) -> None:
        if command[-1] == b"slow":
            await late.wait()
        await say_which(peer, command)

    async with server(handle) as (url, peers), scripts_on(settings, url, seconds=0.2) as running:
        slow = asyncio.create_task(running.run("turn", ["k"], ["slow"]))
        await asyncio.sleep(0.05)
        behind = asyncio.create_task(running.run("turn", ["k"], ["behind"]))
        for call in (slow, behind):
            with pytest.raises(RedisUnavailable):
                await call
        late.set()
        assert await running.run("turn", ["k"], ["next"]) == b"next"
        assert len(peers) == 2


async def test_a_caller_whose_own_time_is_over_leaves_the_connection_to_the_others(settings) -> None:
    late = asyncio.Event()

    async def handle(peer: Peer, command: list[bytes]) -> None:
        await late.wait()
        await say_which(peer, command)

    async with server(handle) as (url, peers), scripts_on(settings, url) as running:
        clock = asyncio.get_running_loop().time
        impatient = asyncio.create_task(running.run("turn", ["k"], ["impatient"], until=clock() + 0.1))
        patient = asyncio.create_task(running.run("turn", ["k"], ["patient"], until=clock() + 60))
        started = clock()
        with pytest.raises(TooSlow):
            await impatient
        assert clock() - started < 2
        late.set()
        assert await patient == b"patient"
        assert len(peers) == 1


async def test_nothing_waits_for_the_end_of_a_call_that_was_answered(settings, monkeypatch) -> None:
    late = []
    async with server(say_which) as (url, _), scripts_on(settings, url, seconds=0.3) as running:
        monkeypatch.setattr(running, "_lost", late.append)
        assert await running.run("turn", ["k"], ["x"]) == b"x"
        await asyncio.sleep(0.4)
    assert late == []


async def test_a_caller_who_hangs_up_takes_no_answer_along(settings) -> None:
    go_on = asyncio.Event()

    async def handle(peer: Peer, command: list[bytes]) -> None:
        await go_on.wait()
        await say_which(peer, command)

    async with server(handle) as (url, peers), scripts_on(settings, url) as running:
        calls = [asyncio.create_task(running.run("turn", ["k"], [str(n)])) for n in range(10)]
        await asyncio.sleep(0.05)
        for call in calls[::2]:
            call.cancel()
        go_on.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert answers[1::2] == [b"1", b"3", b"5", b"7", b"9"]
        assert {type(answer) for answer in answers[::2]} == {asyncio.CancelledError}
        assert len(peers) == 1, "and the connection is still good"


async def test_what_was_given_up_before_it_was_sent_is_not_sent(settings) -> None:
    async with server(say_which) as (url, peers), scripts_on(settings, url) as running:
        gone = asyncio.create_task(running.run("turn", ["k"], ["gone"]))
        await asyncio.sleep(0)
        gone.cancel()
        assert await running.run("turn", ["k"], ["here"]) == b"here"
        assert [command[-1] for command in peers[0].commands] == [b"here"]


async def test_a_lost_connection_tells_all_who_wait_and_nothing_is_repeated(settings) -> None:
    async def handle(peer: Peer, command: list[bytes]) -> None:
        if command[-1] == b"9":
            peer.writer.transport.abort()
        elif command[-1] == b"after":
            await say_which(peer, command)

    async with server(handle) as (url, peers), scripts_on(settings, url) as running:
        async with asyncio.timeout(2):
            answers = await asyncio.gather(*(running.run("turn", ["k"], [str(n)]) for n in range(10)), return_exceptions=True)
        assert {type(answer) for answer in answers} == {RedisUnavailable}
        assert await running.run("turn", ["k"], ["after"]) == b"after"
        assert [len(peer.commands) for peer in peers] == [10, 1]


@pytest.mark.parametrize("noise", [b"what is this\r\n", b"+one\r\n+too many\r\n"])
async def test_answers_that_cannot_be_told_apart_end_the_connection(settings, noise: bytes) -> None:
    async def handle(peer: Peer, command: list[bytes]) -> None:
        peer.writer.write(noise) if len(peers) == 1 else await say_which(peer, command)

    async with server(handle) as (url, peers), scripts_on(settings, url) as running:
        first = asyncio.gather(running.run("turn", ["k"], ["x"]), return_exceptions=True)
        assert (await first)[0] == b"one" or isinstance((await first)[0], RedisUnavailable)
        async with asyncio.timeout(2):
            while not running._connection.lost:
                await asyncio.sleep(0.01)
        assert await running.run("turn", ["k"], ["y"]) == b"y"


async def test_a_connection_that_was_idle_is_asked_before_it_is_used(settings, monkeypatch) -> None:
    """Cut silently, it would take a write along, and nobody would know whether it was done."""
    monkeypatch.setattr(scripts, "HEALTH_CHECK_SECONDS", 0)
    silent = False

    async def handle(peer: Peer, command: list[bytes]) -> None:
        if not (silent and peer is peers[0]):
            await say_which(peer, command)

    async with server(handle) as (url, peers), scripts_on(settings, url, seconds=0.3) as running:
        assert await running.run("turn", ["k"], ["a"]) == b"a"
        assert await running.run("turn", ["k"], ["b"]) == b"b"
        silent = True
        with pytest.raises(RedisUnavailable):
            await running.run("turn", ["k"], ["write"])
        assert [command[0] for command in peers[0].commands] == [b"EVALSHA", b"PING", b"EVALSHA", b"PING"]
        assert await running.run("turn", ["k"], ["c"]) == b"c"
        assert len(peers) == 2


async def test_a_server_that_has_forgotten_a_script_gets_it_again(settings, redis) -> None:
    redis.script_flush()
    async with scripts_on(settings, settings.redis_url.get_secret_value()) as running:
        assert await asyncio.gather(*(running.run("turn", ["ck:{s00}:load:1"], ["token", 1000]) for _ in range(5)))


# Transactions


def in_transactions(*answers: bytes) -> Handler:
    """A server that answers the commands of a transaction with these, one after the other, and a script with its last argument."""

    async def handle(peer: Peer, command: list[bytes]) -> None:
        if command[0] in (b"EVALSHA", b"PING"):
            await say_which(peer, command)
        elif command[0] == b"MULTI":
            peer.left = list(answers)
        if command[0] not in (b"EVALSHA", b"PING"):
            answer = peer.left.pop(0) if peer.left else b""
            peer.writer.write(answer) if answer else peer.writer.transport.abort()

    return handle


async def test_transactions_and_scripts_of_one_turn_get_their_own_answers(settings, redis) -> None:
    for n in range(50):
        redis.set(f"n:{n}", n)
        redis.hset(f"h:{n}", mapping={"a": n, "b": "x" * n * 1000})
    async with scripts_on(settings, settings.redis_url.get_secret_value()) as running:
        for _ in range(3):
            calls = [
                call
                for n in range(50)
                for call in (
                    running.transaction("some", [("GET", f"n:{n}"), ("HMGET", f"h:{n}", "a", "b", "none"), ("PTTL", "none")]),
                    running.run("turn", [f"ck:{{s00}}:load:{n}"], [f"token {n}", 1000]),
                    running.transaction("some", [("SET", f"n:{n}", n)]),
                )
            ]
            answers = await asyncio.gather(*calls)
            assert answers[::3] == [[b"%d" % n, [b"%d" % n, b"x" * n * 1000, None], -2] for n in range(50)]
            assert answers[2::3] == [[b"OK"]] * 50


async def test_a_transaction_is_one_step_and_one_write(settings) -> None:
    server_says = in_transactions(b"+OK\r\n", b"+QUEUED\r\n", b"+QUEUED\r\n", b"*2\r\n:1\r\n:2\r\n")
    async with server(server_says) as (url, peers), scripts_on(settings, url) as running:
        await running.run("turn", ["k"], ["first"])
        writes = counted(running)
        assert await running.transaction("some", [("GET", "a"), ("GET", "b")]) == [1, 2]
        assert len(writes) == 1
        assert [command[0] for command in peers[0].commands[1:]] == [b"MULTI", b"GET", b"GET", b"EXEC"]


async def test_an_error_among_the_answers_is_an_error_and_no_data(settings, redis) -> None:
    redis.set("text", "a")
    async with scripts_on(settings, settings.redis_url.get_secret_value()) as running:
        with capture_logs() as logs:
            calls = [
                running.transaction("some", [("GET", "text"), (command, "text", *rest)]) for command, *rest in (("HGETALL",), ("GET",))
            ]
            broken, sound = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(broken, RedisUnavailable)
        assert [line["code"] for line in logs if line["log_level"] == "error"] == ["WRONGTYPE"]
        assert sound == [b"a", b"a"]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([b"+OK\r\n", b"-LOADING Redis is loading\r\n", b"-EXECABORT Transaction discarded\r\n"], []),
        ([b"+OK\r\n", b"-NOPERM no permissions\r\n", b"-EXECABORT Transaction discarded\r\n"], ["NOPERM"]),
        ([b"-NOAUTH Authentication required\r\n", b"-NOAUTH Authentication required\r\n", b"-ERR EXEC without MULTI\r\n"], ["NOAUTH"]),
        ([b"-NOPERM MULTI\r\n", b"$1\r\na\r\n", b"-ERR EXEC without MULTI\r\n"], ["NOPERM"]),
        ([b"+OK\r\n", b"+QUEUED\r\n", b"*-1\r\n"], ["EXECABORT"]),
    ],
)
async def test_a_transaction_that_is_refused_says_why(settings, answers: list[bytes], said: list[str]) -> None:
    """By the first refusal: EXEC's is the same for all. And whoever comes next is answered."""
    async with server(in_transactions(*answers)) as (url, peers), scripts_on(settings, url) as running:
        with capture_logs() as logs:
            refused, next_one = await asyncio.gather(
                running.transaction("some", [("GET", "a")]), running.run("turn", ["k"], ["next"]), return_exceptions=True
            )
        assert isinstance(refused, RedisUnavailable)
        assert [line["code"] for line in logs if line["log_level"] == "error"] == said
        assert next_one == b"next"
        assert len(peers) == 1


@pytest.mark.parametrize("answers", [[b""], [b"+OK\r\n", b"+QUEUED\r\n", b""], [b"+OK\r\n", b"+QUEUED\r\n", b"+QUEUED\r\n", b""]])
async def test_a_connection_lost_in_mid_transaction_tells_all_and_nothing_is_repeated(settings, answers: list[bytes]) -> None:
    async with server(in_transactions(*answers)) as (url, peers), scripts_on(settings, url) as running:
        async with asyncio.timeout(2):
            calls = [running.transaction("some", [("GET", "a"), ("GET", "b")]), running.run("turn", ["k"], ["behind"])]
            lost = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(one) for one in lost} == {RedisUnavailable}
        assert await running.run("turn", ["k"], ["after"]) == b"after"
        assert [command[0] for command in peers[1].commands] == [b"EVALSHA"]


async def test_a_transaction_that_is_not_answered_ends_in_time_and_takes_its_connection_along(settings) -> None:
    async def handle(peer: Peer, command: list[bytes]) -> None:
        if command[0] == b"EVALSHA":
            await say_which(peer, command)

    async with server(handle) as (url, peers), scripts_on(settings, url, seconds=0.2) as running:
        async with asyncio.timeout(1):
            with pytest.raises(RedisUnavailable):
                await running.transaction("some", [("GET", "a")])
        assert await running.run("turn", ["k"], ["next"]) == b"next"
        assert len(peers) == 2


async def test_a_reader_who_hangs_up_takes_no_answer_along(settings, redis) -> None:
    redis.set("a", "1")
    async with scripts_on(settings, settings.redis_url.get_secret_value()) as running:
        await running.transaction("some", [("GET", "a")])
        calls = [asyncio.create_task(running.transaction("some", [("GET", "a"), ("GET", f"none {n}")])) for n in range(20)]
        await asyncio.sleep(0)
        for n, call in enumerate(calls):
            if n % 3 == 0:
                call.cancel()
        await asyncio.sleep(0)
        calls[1].cancel()  # this one was sent
        answers = await asyncio.gather(*calls, return_exceptions=True)
        gone = [0, 1, *range(3, 20, 3)]
        assert [n for n, answer in enumerate(answers) if isinstance(answer, asyncio.CancelledError)] == gone
        assert all(answer == [b"1", None] for n, answer in enumerate(answers) if n not in gone)
        assert not running._sent


async def test_close_is_bounded_and_leaves_no_connection(settings) -> None:
    async def handle(peer: Peer, command: list[bytes]) -> None: ...

    async with server(handle) as (url, _), scripts_on(settings, url, seconds=0.2) as running:
        call = asyncio.create_task(running.run("turn", ["k"], ["x"]))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(1):
            await running.close()
        with pytest.raises(RedisUnavailable):
            await call
        assert running._connection.lost


@pytest.mark.parametrize(
    ("answer", "said"), [("WRONGTYPE Operation against a key", ["WRONGTYPE"]), ("ERR Error running script", ["ERR"]), ("LOADING x", [])]
)
async def test_what_redis_refuses_for_good_is_an_error_in_the_log(answer: str, said: list[str]) -> None:
    """A script that is wrong would else be put off for ever, like an outage, without a word."""
    with capture_logs() as logs:
        assert isinstance(scripts.translate(ResponseError(answer)), RedisUnavailable)
    assert [line["code"] for line in logs if line["log_level"] == "error"] == said
