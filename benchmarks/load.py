"""The load generator: a process of its own that sends finished requests over keep-alive connections and times every answer.

Each connection is closed-loop: it sends, waits for the whole answer, checks its status, sends the next. With a rate, the connections
together send that many a second at most, evenly. One thread, non-blocking sockets, no HTTP library: 35 to 45 µs of CPU a request (wrk: 25).
`wrk` can do the same (`--load wrk`; Debian: `apt install wrk`), but has no rate and only one target.

    run(Load(...))               from the benchmark: starts `python -m benchmarks.load` and waits for it
    Probe(port).get(path, ...)   one request at a time, in the caller's own process
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ANSWER_SECONDS = 30.0
AT_LEAST = 20
"""Answers that are timed, however long it takes."""
_END_OF_HEAD = b"\r\n\r\n"
_LENGTH = b"content-length:"
KEY = b"<key>"
"""Stands in a request for a text of 20 characters that is new each time."""
_WORDS = (  # noqa: SIM905 - a list would take a page
    "the of and to in is that for it was on with as be at by this have from or one had not but what all were when we there can an your "
    "which their said if do will each about how up out them then she many some so these would other into has more her two like him see "
    "time could no make than first been its who now people my made over did down only way find use may water long little very after words "
    "called just where most know get through back much before go good new write our used me man too any day same right look think also"
).split()


@dataclass(frozen=True, slots=True)
class Load:
    """What to send, and for how long. Connection i sends requests i, i + connections, … in turn, to ports[i % len(ports)]."""

    ports: tuple[int, ...]
    requests: tuple[bytes, ...]
    connections: int
    seconds: float
    expect: int = 200
    warm_seconds: float = 0.3
    rate: float | None = None
    count: int | None = None
    """Ends after so many answers, if that comes first; then nothing is sent for warming up."""


@dataclass(frozen=True, slots=True)
class Served:
    """What came of it; latencies in milliseconds, of the requests that were sent after the warm-up."""

    requests: int
    seconds: float
    p50: float
    p99: float
    worst: float
    all_requests: int
    """With those of the warm-up: what the server did."""

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def run(load: Load) -> Served:
    """Runs the load in a process of its own; raises `RuntimeError` if any answer was not the expected one."""
    plan = asdict(load) | {"requests": [request.decode("latin-1") for request in load.requests]}
    limit = load.seconds + load.warm_seconds + 2 * ANSWER_SECONDS
    command = [sys.executable, "-m", "benchmarks.load"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=json.dumps(plan).encode(), capture_output=True, timeout=limit, check=False, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"the load generator failed: {done.stderr.decode(errors='replace').strip()[-1000:]}")
    return Served(**json.loads(done.stdout))


def request(
    method: str, path: str, headers: Mapping[str, str] | None = None, body: Mapping[str, Any] | None = None, key: bool = False
) -> bytes:
    """A request as it goes over the wire; with `key`, it carries an Idempotency-Key that is new each time."""
    content = b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
    lines = {"Host": "127.0.0.1", **(headers or {})}
    if body is not None:
        lines |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    if key:
        lines["Idempotency-Key"] = KEY.decode()
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content


class Probe:
    """One connection, one request at a time; answers (status, body) and remembers how long the last one took."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.milliseconds = 0.0

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> tuple[int, bytes]:
        started = time.perf_counter()
        self._socket.sendall(data)
        answer = b""
        while not is_whole(answer):
            part = self._socket.recv(1 << 18)
            if not part:
                raise ConnectionError("the server closed the connection")
            answer += part
        self.milliseconds = (time.perf_counter() - started) * 1000
        head, _, body = answer.partition(_END_OF_HEAD)
        return int(head[9:12]), body

    def ask(self, method: str, path: str, status: int, headers: Mapping[str, str], body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of an answer that has this status."""
        found, content = self.send(request(method, path, headers, body))
        if found != status:
            raise RuntimeError(f"{method} {path}: {found} {content[:200]!r}")
        return json.loads(content) if content else None


def is_whole(answer: bytes) -> bool:
    """Whether this is a complete answer. (All servers here send a Content-Length, except with 204.)"""
    end = answer.find(_END_OF_HEAD)
    if end < 0:
        return False
    head = answer[:end].lower()
    at = head.find(_LENGTH)
    if at < 0:
        return True
    line_end = head.find(b"\r\n", at)
    length = int(head[at + len(_LENGTH) : line_end if line_end > 0 else end])
    return len(answer) >= end + len(_END_OF_HEAD) + length


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def sentence(seed: int, length: int = 200) -> str:
    """Some words, always the same for a seed: 200 characters, 200 bytes."""
    words = [_WORDS[(seed * 31 + 7 * i * i + 13 * i) % len(_WORDS)] for i in range(length // 2)]
    return " ".join(words)[: length - 1].ljust(length - 1, "x") + "."


# The process


@dataclass(slots=True)
class _Line:
    """One connection. `due`: when it may send next (only with a rate)."""

    socket: socket.socket
    requests: Sequence[bytes]
    next_request: int = 0
    sent_at: float = 0.0
    due: float = 0.0
    received: bytes = b""


class _Generator:
    def __init__(self, load: Load) -> None:
        self._load = load
        self._selector = selectors.DefaultSelector()
        self._latencies: list[float] = []
        self._sent = self._answered = self._keys = 0
        self._stamp = time.time_ns() % 10**13
        self._waiting: list[_Line] = []

    def run(self) -> Served:
        lines = [self._open(i) for i in range(self._load.connections)]
        began = time.perf_counter()
        self._warm_until = began + (0 if self._load.count else self._load.warm_seconds)
        self._end = self._warm_until + self._load.seconds
        for i, line in enumerate(lines):
            line.due = began + (i / self._load.rate if self._load.rate else 0)
            self._go_on(line)
        while len(self._waiting) + self._sent > self._answered:
            self._turn()
        for line in lines:
            line.socket.close()
        enough = self._load.count is None and self._counted >= AT_LEAST
        return Served(
            requests=self._counted if enough else len(self._latencies),
            seconds=self._load.seconds if enough else self._last_answer - self._warm_until,
            p50=statistics.median(self._latencies) * 1000,
            p99=percentile(self._latencies, 0.99) * 1000,
            worst=max(self._latencies) * 1000,
            all_requests=self._answered,
        )

    _counted = 0
    _last_answer = 0.0

    def _open(self, i: int) -> _Line:
        target = socket.create_connection(("127.0.0.1", self._load.ports[i % len(self._load.ports)]), timeout=ANSWER_SECONDS)
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        target.setblocking(False)
        line = _Line(target, self._load.requests[i % len(self._load.requests) :: self._load.connections])
        self._selector.register(target, selectors.EVENT_READ, line)
        return line

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._waiting:
            still: list[_Line] = []
            for line in self._waiting:
                if line.due <= now:
                    self._send(line)
                else:
                    still.append(line)
            self._waiting = still
        wait = min((line.due for line in self._waiting), default=now + ANSWER_SECONDS) - time.perf_counter()
        ready = self._selector.select(max(0.0, wait))
        if not ready and not self._waiting and time.perf_counter() - now > ANSWER_SECONDS * 0.9:
            raise SystemExit(f"no answer for {ANSWER_SECONDS:.0f} s")
        for event, _ in ready:
            self._receive(event.data)

    def _receive(self, line: _Line) -> None:
        part = line.socket.recv(1 << 16)  # 256 KiB the C library maps and unmaps each time: 20 µs
        if not part:
            raise SystemExit("the server closed a connection")
        line.received += part
        if not is_whole(line.received):
            return
        now = time.perf_counter()
        if int(line.received[9:12]) != self._load.expect:
            raise SystemExit(f"unexpected answer: {line.received[:600].decode(errors='replace')}")
        line.received = b""
        self._answered += 1
        self._last_answer = now
        if line.sent_at >= self._warm_until:
            self._latencies.append(now - line.sent_at)
            self._counted += now <= self._end
        self._go_on(line)

    def _go_on(self, line: _Line) -> None:
        """Sends the next request of this line, now or when it is due, unless it is over."""
        now = time.perf_counter()
        over = now >= self._end and len(self._latencies) >= AT_LEAST
        if over or (self._load.count is not None and self._sent + len(self._waiting) >= self._load.count):
            return
        if self._load.rate is None:
            self._send(line)
        else:
            self._waiting.append(line)

    def _send(self, line: _Line) -> None:
        data = line.requests[line.next_request % len(line.requests)]
        line.next_request += 1
        if KEY in data:
            self._keys += 1
            data = data.replace(KEY, b"%013d%07d" % (self._stamp, self._keys), 1)
        self._sent += 1
        if self._load.rate is not None:
            line.due = max(line.due, time.perf_counter() - 1) + self._load.connections / self._load.rate
        line.sent_at = time.perf_counter()
        with contextlib.suppress(BlockingIOError):  # nothing was taken then; a request is far smaller than a socket's buffer
            if line.socket.send(data) == len(data):
                return
        raise SystemExit("a request did not fit into the socket's buffer")


# wrk

_WRK = """
local requests, i = %s, 0
request = function() i = i + 1; return requests[i %% #requests + 1] end
done = function(summary, latency)
  local e = summary.errors
  io.stderr:write(string.format('{"requests":%%d,"us":%%d,"p50":%%d,"p99":%%d,"max":%%d,"errors":%%d}', summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency.max, e.status + e.connect + e.read + e.write + e.timeout))
end
"""


def run_wrk(load: Load) -> Served:
    """The same load by wrk, where it can do it (whole seconds, one port, no rate, no keys); else by `run`."""
    simple = load.rate is None and load.count is None and len(load.ports) == 1 and not any(KEY in one for one in load.requests)
    if not simple:
        return run(load)
    program = shutil.which("wrk")
    if program is None:
        raise SystemExit("wrk is not installed (Debian, Ubuntu: apt install wrk); without --load wrk, the built-in generator is used.")
    warm = run(replace(load, seconds=load.warm_seconds, warm_seconds=0.0)).all_requests if load.warm_seconds else 0
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_WRK % ("{" + ",".join("'" + "".join(f"\\{byte:03d}" for byte in one) + "'" for one in load.requests) + "}"))
        script.flush()
        length = f"-d{max(1, round(load.seconds))}s"
        command = [program, "-t1", f"-c{load.connections}", length, "-s", script.name, f"http://127.0.0.1:{load.ports[0]}/"]
        done = subprocess.run(command, capture_output=True, timeout=load.seconds + 2 * ANSWER_SECONDS, check=True)
    told = json.loads(done.stderr[done.stderr.rindex(b"{") :])
    if told["errors"]:
        raise RuntimeError(f"{told['errors']} answers were not the expected ones")
    return Served(told["requests"], told["us"] / 1e6, told["p50"] / 1e3, told["p99"] / 1e3, told["max"] / 1e3, told["requests"] + warm)


RUNNERS: dict[str, Callable[[Load], Served]] = {"own": run, "wrk": run_wrk}


def main() -> None:
    """Reads a `Load` as JSON from standard input and writes a `Served` to standard output."""
    told = json.load(sys.stdin)
    told |= {"requests": tuple(one.encode("latin-1") for one in told["requests"]), "ports": tuple(told["ports"])}
    print(json.dumps(asdict(_Generator(Load(**told)).run())))


if __name__ == "__main__":
    main()
