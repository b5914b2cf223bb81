"""Logs say what happened, and never what was said."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
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
def output(own_logging: None) -> Output:
    stream = Output()
    logs.configure("info", process="test", stream=stream, as_json=True)
    return stream


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


def test_what_python_itself_would_print_says_no_more_than_a_class_and_a_place() -> None:
    """Warnings, exceptions that ended a thread, and those that could not be raised."""
    program = f"""
import threading, warnings
from worker import logs
logs.configure()
class Gone:
    def __del__(self):
        raise ValueError("{SECRET}")
def end():
    raise KeyError("{SECRET}")
Gone()
thread = threading.Thread(target=end)
thread.start()
thread.join()
warnings.warn("old", DeprecationWarning, stacklevel=1)
"""
    command = (sys.executable, "-W", "always", "-c", program)
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=30)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(event["level"], event.get("error")) for event in events] == [("error", "ValueError"), ("error", "KeyError"), ("warning", None)]
    assert SECRET not in done.stderr
