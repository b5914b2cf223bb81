"""Logs say what happened, and never what was said."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from tests.schema import ROOT
from worker import logs
from worker.errors import NotDurable

SECRET = "s3cret-text"


class Output(io.StringIO):
    """What was logged."""

    def events(self) -> list[dict[str, Any]]:
        """The lines, read as JSON."""
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def output() -> Iterator[Output]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = Output()
    logs.configure("info", process="test", stream=stream, as_json=True)
    yield stream
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def test_event_is_one_line_of_json_with_its_fields(output: Output) -> None:
    structlog.get_logger("here").info("batch committed", shard=7, entries=512)
    (event,) = output.events()
    assert event["event"] == "batch committed"
    assert (event["level"], event["logger"], event["process"], event["shard"], event["entries"]) == ("info", "here", "test", 7, 512)
    assert event["timestamp"].endswith("Z")


def test_the_standard_librarys_go_the_same_way(output: Output) -> None:
    logging.getLogger("uvicorn.error").warning("slow %s", "loop")
    (event,) = output.events()
    assert (event["event"], event["level"], event["logger"]) == ("slow loop", "warning", "uvicorn.error")


def test_below_the_level_nothing_is_written(output: Output) -> None:
    structlog.get_logger("here").debug("detail")
    logging.getLogger("other").debug("detail")
    assert output.getvalue() == ""


def test_clients_that_log_whole_requests_do_not_even_when_debugging(output: Output) -> None:
    logs.configure("DEBUG", process="test", stream=output, as_json=True)
    for name in ("openai", "openai._base_client", "httpx2", "httpcore2.http11"):
        logging.getLogger(name).debug(SECRET)
        logging.getLogger(name).info(SECRET)
    assert output.getvalue() == ""


def test_access_log_leaves_out_the_query(output: Output) -> None:
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/api/x?q=what%20I%20wrote", "1.1", 200)
    assert output.events()[0]["event"] == '1.2.3.4:5 - "GET /api/x HTTP/1.1" 200'


def test_configuring_again_does_not_double_the_lines(output: Output) -> None:
    logs.configure(process="test", stream=output, as_json=True)
    structlog.get_logger("here").info("once")
    assert len(output.events()) == 1


class TestBeside:
    """A log that whoever writes it does not wait for."""

    def test_one_that_stands_still_stops_nobody_and_says_what_it_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logs, "LINES_MAX", 3)
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        reading, writing = os.pipe()
        try:
            with os.fdopen(reading) as lines, os.fdopen(writing, "w") as output:
                logs.configure("info", process="test", stream=output, as_json=True, beside=True)
                log = structlog.get_logger("here")
                log.info("the pipe is full", padding=["x" * 1000] * 100)
                time.sleep(0.2)  # the thread stands in its write
                for number in range(5):
                    log.info(str(number))
                events = [json.loads(lines.readline()) for _ in range(5)]
        finally:
            root.handlers, root.level = handlers, level
            structlog.reset_defaults()
        assert [event["event"] for event in events] == ["the pipe is full", "0", "1", "2", "log lines lost"]
        assert events[-1]["count"] == 2

    @pytest.mark.parametrize(("lines", "reads"), [(1, True), (5_000, False)])
    def test_end_of_the_process_waits_for_its_last_words_but_not_for_ever(self, lines: int, reads: bool) -> None:
        said = (
            "import structlog; from worker import logs; logs.configure(beside=True)\n"
            f"for number in range({lines}): structlog.get_logger('here').info('last words', padding='x' * 100)"
        )
        with subprocess.Popen((sys.executable, "-c", said), stderr=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stderr is not None
            if reads:
                assert b"last words" in process.stderr.read()
            assert process.wait(20) == 0


@pytest.mark.parametrize(
    "name", ["content", "text", "title", "body", "prompt", "reply", "email", "username", "password", "token", "authorization", "cookie"]
)
def test_fields_with_a_telling_name_are_hidden(output: Output, name: str) -> None:
    structlog.get_logger("here").info("something", **{name: SECRET})
    assert SECRET not in output.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        f"connecting to redis://user:{SECRET}@127.0.0.1:6379/0",
        f"postgresql://chatkeep:{SECRET}@db.example.org/chatkeep?sslmode=require",
        f"redis://:{SECRET}@127.0.0.1:1/0",
        f"got eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIx{SECRET}.{SECRET}",
        f"mail from {SECRET}@example.org",
    ],
)
def test_secrets_and_addresses_are_hidden_wherever_they_stand(output: Output, text: str) -> None:
    structlog.get_logger("here").info("something", detail=text)
    structlog.get_logger("here").info(text)
    logging.getLogger("celery").warning("%s", text)
    assert len(output.events()) == 3
    assert SECRET not in output.getvalue()


@pytest.mark.parametrize(
    "log", [lambda: structlog.get_logger("here").exception("failed"), lambda: logging.getLogger("there").exception("failed")]
)
def test_exception_is_a_class_and_a_place(output: Output, log: Any) -> None:
    try:
        try:
            int(SECRET)
        except ValueError as exc:
            raise RuntimeError(f"about {SECRET}") from exc
    except RuntimeError:
        log()
    (event,) = output.events()
    assert (event["error"], event["cause"]) == ("RuntimeError", "ValueError")
    assert any("test_logs.py" in place for place in event["where"])
    assert SECRET not in output.getvalue()


def test_our_own_errors_may_say_more(output: Output) -> None:
    try:
        raise NotDurable("set appendonly to yes")
    except NotDurable:
        structlog.get_logger("here").error("refused", exc_info=sys.exc_info())
    assert output.events()[0]["detail"] == "set appendonly to yes"


def test_long_text_is_cut(output: Output) -> None:
    structlog.get_logger("here").info("x" * 1_000_000)
    assert len(output.getvalue()) < 3000


def test_values_that_are_no_json_are_only_named(output: Output) -> None:
    structlog.get_logger("here").info("something", value=ValueError(SECRET), other=b"bytes")
    (event,) = output.events()
    assert (event["value"], event["other"]) == ("ValueError", "bytes")
