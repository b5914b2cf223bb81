"""A log that stands still stops nobody, and says what it lost."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.people import until
from tests.schema import ROOT
from worker import log_thread, logs

SECRET = "s3cret-text"


class Pipe:
    """What a process writes its log into, and a reader who reads when he is told to."""

    def __init__(self) -> None:
        self.reading, writing = os.pipe()
        self.output, self._lines = os.fdopen(writing, "w"), os.fdopen(self.reading)

    def configure(self, level: str = "INFO") -> Any:
        """Has this process's log written into it; the logger."""
        logs.configure(level, process="test", stream=self.output, as_json=True, beside=True)
        return structlog.get_logger("here")

    def fill(self) -> None:
        """Nothing more goes in."""
        os.set_blocking(self.output.fileno(), False)
        for size in (4096, 1):
            try:
                while os.write(self.output.fileno(), b" " * size):
                    pass
            except BlockingIOError:
                continue
        os.set_blocking(self.output.fileno(), True)

    def read(self, count: int) -> list[dict[str, Any]]:
        """So many lines."""
        return [json.loads(self._lines.readline()) for _ in range(count)]

    def close(self) -> None:
        """The reader first, or whoever stands in a write would stand there for ever."""
        self._lines.close()
        with suppress(BrokenPipeError):
            self.output.close()


@pytest.fixture
def pipe(own_logging: None) -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def handler() -> log_thread.LogThread:
    (found,) = (one for one in logging.getLogger().handlers if isinstance(one, log_thread.LogThread))
    return found


@pytest.mark.parametrize("level", ["INFO", "ERROR"])
def test_one_that_stands_still_stops_nobody_and_says_what_it_lost(pipe: Pipe, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setattr(log_thread, "LINES_MAX", 3)
    log = pipe.configure(level)
    pipe.fill()
    log.error("first")
    until(lambda: not handler()._lines, "the thread stands in its write")
    for number in range(5):
        log.error(str(number))
    assert names(pipe.read(5)) == ["first", "0", "1", "2", "2 log lines lost"]
    log.error("later")
    assert names(pipe.read(1)) == ["later"]


def test_output_that_does_not_block_loses_nothing(pipe: Pipe) -> None:
    """Whoever shares a pipe may have made it so."""
    log = pipe.configure()
    os.set_blocking(pipe.output.fileno(), False)
    for number in range(1_000):
        log.info(str(number), padding="x" * 200)
    assert names(pipe.read(1_000)) == [str(number) for number in range(1_000)]


def test_full_disk_is_counted(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    log = pipe.configure()
    written, full = os.write, threading.Event()
    full.set()

    def write(file: int, data: bytes) -> int:
        if full.is_set() and file == handler()._file:
            raise OSError(28, "No space left on device")
        return written(file, data)

    monkeypatch.setattr(os, "write", write)
    for number in range(3):
        log.info(str(number))
    handler().flush()
    full.clear()
    log.info("there is room")
    assert names(pipe.read(2)) == ["there is room", "3 log lines lost"]


def test_lines_of_several_processes_are_not_mixed(pipe: Pipe) -> None:
    program = "import sys, structlog; from worker import log_thread, logs; logs.configure(process=sys.argv[1], as_json=True, beside=True)\n"
    program += "log_thread._FLUSH_SECONDS = 30\n"
    program += "for number in range(500): structlog.get_logger('here').info(str(number), padding='x' * 300)"
    running = [
        subprocess.Popen((sys.executable, "-c", program, name), stderr=pipe.output, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        for name in "ab"
    ]
    try:
        time.sleep(0.8)  # until both of them stand before a full pipe
        text = b""
        while text.count(b"\n") < 1_000:
            text += os.read(pipe.reading, 1_000)  # slowly, so that the pipe is always full
    finally:
        for process in running:
            process.kill()
            process.wait()
    events = [json.loads(line) for line in text.splitlines()]
    for name in "ab":
        assert [event["event"] for event in events if event["process"] == name] == [str(number) for number in range(500)]


def test_line_that_cannot_be_made_shows_no_argument(pipe: Pipe, capfd: pytest.CaptureFixture[str]) -> None:
    pipe.configure()
    handler().handle(logging.LogRecord("other", logging.INFO, "", 0, "%d", (SECRET,), None))
    assert names(pipe.read(1)) == ["a line of other could not be made: TypeError"]
    assert SECRET not in capfd.readouterr().err


def test_goes_on_after_a_pause_and_in_a_child(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_thread, "_IDLE_SECONDS", 0.05)
    log = pipe.configure()
    log.info("before")
    until(lambda: handler()._thread is None, "the thread has ended")
    log.info("after")
    assert names(pipe.read(2)) == ["before", "after"]
    with handler()._changed:
        if (child := os.fork()) == 0:
            log.info("in a child")
            handler().flush()
            os._exit(0)
    assert names(pipe.read(1)) == ["in a child"]
    assert os.waitpid(child, 0)[1] == 0


def test_what_waits_when_it_is_set_up_again_is_written(pipe: Pipe) -> None:
    log = pipe.configure()
    pipe.fill()
    log.info("first")
    until(lambda: not handler()._lines, "the thread stands in its write")
    log.info("second")
    former = handler()
    log = pipe.configure()
    assert handler() is not former
    log.info("third")
    assert sorted(names(pipe.read(3))) == ["first", "second", "third"]


def test_output_that_is_no_file_is_written_at_once(own_logging: None) -> None:
    output = io.StringIO()
    logs.configure(process="test", stream=output, as_json=True, beside=True)
    structlog.get_logger("here").info("said")
    assert json.loads(output.getvalue())["event"] == "said"


@pytest.mark.parametrize(("lines", "reads"), [(1, True), (5_000, False)])
def test_end_of_the_process_waits_for_its_last_words_but_not_for_ever(lines: int, reads: bool) -> None:
    program = (
        "import structlog; from worker import logs; logs.configure(beside=True)\n"
        f"for number in range({lines}): structlog.get_logger('here').info('last words', padding='x' * 100)"
    )
    with subprocess.Popen((sys.executable, "-c", program), stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stderr is not None
        if reads:
            assert b"last words" in process.stderr.read()
        assert process.wait(20) == 0


def test_end_by_a_signal_has_its_last_words(tmp_path: Path) -> None:
    """uvicorn ends itself by the signal that it got, and nothing that Python does at an end is done."""
    program = (
        "import os, signal, structlog; from worker import logs, log_thread; logs.configure(beside=True)\n"
        "log = structlog.get_logger('here'); log.info('first'); log_thread.be_patient(); log.info('last')\n"
        "signal.raise_signal(signal.SIGTERM)"
    )
    done = subprocess.run((sys.executable, "-c", program), check=False, capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert done.returncode == -15
    assert names([json.loads(line) for line in done.stderr.splitlines()]) == ["first", "last"]
