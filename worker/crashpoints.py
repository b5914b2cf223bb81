"""Named places at which a test can have a process kill itself, as `kill -9` would: `visit("flush:before_commit")`.

In production there are none of these: without `CHATKEEP_CRASH_ORDERS` in the environment `visit` does nothing at all. With it, it takes a
second thing to die: a file in that directory with the point's name (`flush.before_commit`) and the number of the visit that is meant. The
file is taken away before the process dies, so one order kills one process, once, and a test sees that the place was come to. Nothing has
to be started again to be given an order.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import structlog

VARIABLE = "CHATKEEP_CRASH_ORDERS"
_ORDERS = os.environ.get(VARIABLE)

if _ORDERS:
    structlog.get_logger(__name__).warning("this process can be told to kill itself", orders=_ORDERS)


def visit(point: str) -> None:
    """Dies here, if this visit is the one that somebody ordered to be the last."""
    if _ORDERS:
        _obey(order(Path(_ORDERS), point))


def order(directory: Path, point: str) -> Path:
    """The file that orders a death at a point; it holds how many visits are left, this one included."""
    return directory / point.replace(":", ".")


def _obey(path: Path) -> None:
    try:
        left = int(path.read_text())
        if left > 1:
            path.write_text(str(left - 1))
            return
        path.unlink()
    except (FileNotFoundError, ValueError):  # no order, one that another process has just taken, or one that is being written
        return
    os.kill(os.getpid(), signal.SIGKILL)
