"""A log that nobody waits for: a thread of its own writes the lines.

A handler of the standard library writes where a line arises. When the output stands still (nobody reads the pipe, its disk is stuck),
whoever logs stands still with it; in the API that is the event loop, and every answer. It was seen to.

What does not fit any more is counted, and the count told. What still waits at the end of the process gets a second.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TextIO

LINES_MAX = 10_000
"""That wait for an output which stands still: some 3 MB."""
_PACE_SECONDS = 0.02
"""So that the thread is not woken for each of a thousand lines a second."""
_IDLE_SECONDS = 5.0
_FLUSH_SECONDS = 1.0
_PIPE_BUF = 4096
"""What Linux puts into a pipe whole: several processes may write into one."""


class LogThread(logging.Handler):
    """Takes lines for an output that is a file, a pipe or a terminal; raises `OSError` for any other.

    It writes past Python's own buffers: their lock, held by a thread that never ends, would abort the process at its end.
    """

    def __init__(self, output: TextIO) -> None:
        super().__init__()
        self.is_patient = False
        """Each line is waited for, a second at most: for the end of a process, when nobody waits for an answer any more."""
        self._file = os.dup(output.fileno())
        self.begin_anew()

    def begin_anew(self) -> None:
        """Without lines, and without a thread: a forked child has none, and perhaps a lock that nobody will ever give back."""
        self._lines: deque[bytes] = deque()
        self._lost = 0
        self._writing = False
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a line; called by `logging`."""
        line = self._line(record)
        with self._changed:
            if len(self._lines) < LINES_MAX:
                self._lines.append(line)
            else:
                self._lost += 1
            if self._thread is None:
                self._start()
            elif len(self._lines) == 1:
                self._changed.notify_all()
        if self.is_patient:
            self.flush()

    def flush(self) -> None:
        """Waits a little until everything is written."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._lines or self._writing), _FLUSH_SECONDS)

    def _line(self, record: logging.LogRecord) -> bytes:
        try:
            text = self.format(record)
        except Exception as exc:  # noqa: BLE001 - the standard library would print it, with the arguments
            text = self.format(_record(logging.ERROR, "a line of %s could not be made: %s", record.name, type(exc).__name__))
        return (text + "\n").encode(errors="backslashreplace")

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # there are too many: the next line tries again
            self._thread = None

    def _run(self) -> None:
        """Ends when there is nothing to do; the next line starts another thread."""
        try:
            while lines := self._next():
                for piece in _pieces(lines):
                    self._write(piece)
        except BaseException:
            self._thread = None
            raise

    def _next(self) -> Sequence[bytes]:
        with self._changed:
            self._writing = False
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._lines, _IDLE_SECONDS):
                self._thread = None
                return ()
            self._writing = True
        time.sleep(_PACE_SECONDS)
        with self._changed:
            lines, lost = list(self._lines), self._lost
            self._lines.clear()
            self._lost = 0
        return [*lines, self._line(_record(logging.WARNING, "%d log lines lost", lost))] if lost else lines

    def _write(self, piece: bytes) -> None:
        while piece:
            try:
                piece = piece[os.write(self._file, piece) :]
            except BlockingIOError:  # somebody who shares the output has made it so
                time.sleep(_PACE_SECONDS)
            except OSError:
                with self._changed:
                    self._lost += piece.count(b"\n")
                return


def be_patient() -> None:
    """Has each further line of this process waited for; for its end, which may come by a signal and write nothing more."""
    for handler in _handlers():
        handler.is_patient = True
        handler.flush()


def _pieces(lines: Sequence[bytes]) -> Iterator[bytes]:
    piece = b""
    for line in lines:
        if piece and len(piece) + len(line) > _PIPE_BUF:
            yield piece
            piece = b""
        piece += line
    yield piece


def _record(level: int, message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord(__name__, level, "", 0, message, arguments, None)


def _handlers() -> Iterator[LogThread]:
    return (handler for handler in logging.getLogger().handlers if isinstance(handler, LogThread))


def _forget_parent() -> None:
    for handler in _handlers():
        handler.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
