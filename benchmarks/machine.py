"""CPU time: of processes with their children, and of whoever else uses the machine while something is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]  # it ships no types

NOISY = 0.10
"""A phase in which others used more of the machine than this is measured again."""
_IDLE = ("idle", "iowait", "steal", "guest", "guest_nice")


@dataclass(slots=True)
class Noise:
    """The share of the machine (all cores) that processes used which are not ours; known after the `with` block."""

    share: float = 0.0


@contextmanager
def listen() -> Iterator[Noise]:
    """Listens for others while the block runs. All of ours are this process and its children."""
    noise = Noise()
    started, busy, own = time.monotonic(), _busy_seconds(), cpu_seconds([os.getpid()])
    yield noise
    others = (_busy_seconds() - busy) - (cpu_seconds([os.getpid()]) - own)
    noise.share = max(0.0, others) / ((time.monotonic() - started) * (os.cpu_count() or 1))


def wait_until_quiet(patience_seconds: float) -> None:
    """Returns when others leave the machine alone, or when patience is over."""
    end = time.monotonic() + patience_seconds
    while time.monotonic() < end:
        with listen() as noise:
            time.sleep(0.3)
        if noise.share < NOISY / 2:
            return


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes and of all that they have started, the ended ones included."""
    return sum(_tree_seconds(pid) for pid in pids)


def _tree_seconds(pid: int) -> float:
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0.0
    for process in family:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # it ended just now: its parent has its time
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _busy_seconds() -> float:
    times = psutil.cpu_times()._asdict()
    return float(sum(seconds for name, seconds in times.items() if name not in _IDLE))
