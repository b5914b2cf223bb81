"""Logs: one line an event, with fields, for every process. Never a message's text, a token, a password or an e-mail address.

    log = structlog.get_logger(__name__)
    log.info("batch committed", shard=7, entries=512, seconds=0.041)

`configure` sends structlog's events and the standard library's (uvicorn, Celery, SQLAlchemy) through one handler. Three things keep data
out: fields with a telling name are hidden, text that looks like a secret or an address is hidden wherever it stands, and of an exception
only its class and the places in the code are shown, because its text may quote what it choked on (ours excepted).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import structlog

from worker.errors import ChatkeepError
from worker.log_thread import LogThread

_HIDDEN_FIELDS = frozenset(
    {
        "content",
        "message_text",
        "text",
        "title",
        "body",
        "prompt",
        "reply",
        "email",
        "username",
        "password",
        "token",
        "authorization",
        "cookie",
    }
)
_HIDDEN = "[hidden]"
_SECRETS = (
    (re.compile(r"(?<=://)[^/\s@]*:[^\s@]*(?=@)"), _HIDDEN),  # user:password in an address
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"), _HIDDEN),  # a JWT
    (re.compile(r"(?<![/@:])\b[\w.+%-]+@[\w-]+(?:\.[\w-]+)+"), _HIDDEN),  # an e-mail address
)
_CHARS_MAX = 2000
_FRAMES_MAX = 12
_OUR_HANDLER = "chatkeep"
_ADOPTED = ("uvicorn", "uvicorn.error", "uvicorn.access")
"""Loggers that come with handlers of their own."""
_TALKATIVE = ("openai", "httpx2", "httpcore2")
"""Below warnings, these write whole requests: what people said, and the key."""

Event = MutableMapping[str, Any]


def configure(
    level: str = "INFO", *, process: str | None = None, stream: TextIO | None = None, as_json: bool | None = None, beside: bool = False
) -> None:
    """Sets logging up for this process; `process` is written on every line. JSON, unless a person is watching. May be called again.

    `beside`: a thread writes them, and nobody waits for the output (`worker/log_thread.py`).
    """
    output = stream or sys.stderr
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _name_process(process or Path(sys.argv[0]).stem),
        _describe_exception,
        _hide,
    ]
    last: Any = _render_json if as_json or (as_json is None and not output.isatty()) else structlog.dev.ConsoleRenderer()
    handler: logging.Handler = logging.StreamHandler(output)
    if beside:
        with suppress(OSError):  # no file, no pipe: a notebook's
            handler = LogThread(output)
    handler.name = _OUR_HANDLER
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last]
        )
    )
    root = logging.getLogger()
    for former in [former for former in root.handlers if former.name == _OUR_HANDLER]:
        root.removeHandler(former)
        former.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    for adopted in map(logging.getLogger, _ADOPTED):
        if adopted.handlers or adopted.propagate:  # else it was switched off (uvicorn's --no-access-log)
            adopted.handlers.clear()
            adopted.propagate = True
    for talkative in map(logging.getLogger, _TALKATIVE):
        talkative.setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").addFilter(_without_query)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    if stream is None:  # then it is the log of the process, and not of a test
        _take_over()


def _take_over() -> None:
    """Has warnings, and exceptions that nobody can catch, go into the log. Python would print them, with a text that may quote data."""
    log = structlog.get_logger(__name__)
    logging.captureWarnings(True)
    sys.unraisablehook = lambda found: log.error("exception that could not be raised", **_describe_any(found.exc_value))
    threading.excepthook = lambda found: log.error("exception that ended a thread", **_describe_any(found.exc_value))


def _describe_any(exc: BaseException | None) -> dict[str, Any]:
    return {} if exc is None else describe(exc)


def describe(exc: BaseException) -> dict[str, Any]:
    """What may be said of an exception: its class, and where it happened. The text only of our own, which hold no data."""
    frames = traceback.extract_tb(exc.__traceback__)[-_FRAMES_MAX:]
    told: dict[str, Any] = {
        "error": type(exc).__name__,
        "where": [f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames],
    }
    if isinstance(exc, ChatkeepError):
        told["detail"] = exc.detail
    cause = exc.__cause__ or exc.__context__
    if cause is not None:
        told["cause"] = type(cause).__name__
    return told


def _without_query(record: logging.LogRecord) -> bool:
    """What stands behind the `?` of an address, anybody may have put there: a search, a token, somebody else's words."""
    if isinstance(record.args, tuple):  # uvicorn's: (client, method, address, HTTP version, status)
        record.args = tuple(part.partition("?")[0] if isinstance(part, str) else part for part in record.args)
    return True


def _name_process(process: str) -> Any:
    def add(_: Any, __: str, event: Event) -> Event:
        event.setdefault("process", process)
        return event

    return add


def _describe_exception(_: Any, __: str, event: Event) -> Event:
    found = event.pop("exc_info", None)
    event.pop("stack_info", None)
    if found is True:
        found = sys.exc_info()
    exc = found[1] if isinstance(found, tuple) else found
    if isinstance(exc, BaseException):
        for name, value in describe(exc).items():
            event.setdefault(name, value)
    return event


def _hide(_: Any, __: str, event: Event) -> Event:
    for name, value in event.items():
        if name in _HIDDEN_FIELDS:
            event[name] = _HIDDEN
        elif isinstance(value, str):
            event[name] = _without_secrets(value)
    return event


def _without_secrets(text: str) -> str:
    shown = text if len(text) <= _CHARS_MAX else text[:_CHARS_MAX] + "…"
    for pattern, replacement in _SECRETS:
        shown = pattern.sub(replacement, shown)
    return shown


def _render_json(_: Any, __: str, event: Event) -> str:
    return json.dumps(event, default=lambda value: type(value).__name__)
