"""`python -m benchmarks` (what `make bench` calls): measures all rows side by side and shows one table. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.chart import draw
from benchmarks.figures import TINY, Figure, Plan, Results, results
from benchmarks.load import ROOT, RUNNERS
from benchmarks.rows import accept, flush, long, reads
from benchmarks.stand import Stand
from worker.errors import ConfigurationError

Measure = Callable[[Stand], list[Figure]]

ROWS: dict[str, Measure] = {
    "1": accept.appends_many,
    "2": accept.appends_one,
    "5": accept.appends_frozen,
    "6": reads.history_hot,
    "7": reads.history_cold,
    "8": reads.history_deep,
    "9": reads.conversation_list,
    "12": flush.lag,
    "13": flush.memory,
    "15": flush.two_apis,
    "15b": flush.shards_apart,
    "10": flush.flush,
    "4c": accept.appends_far,
}
"""In this order: what wants a fresh table first, what restarts Chatkeep last."""
LONG: dict[str, Measure] = {"14": long.size, "16": long.peers}
EXTRA: dict[str, Measure] = {"keyed": accept.appends_keyed, "broker": accept.broker_apart}
"""Only when asked for by name."""
ALSO = {"3": "1", "4": "1", "4b": "1", "11": "10"}
"""Rows that come out of another one's measurement."""
ALL = ROWS | LONG | EXTRA
STATE = ROOT / ".chatkeep" / "benchmarks"


def measure(names: Sequence[str], stand: Stand, console: Console) -> list[Figure]:
    """The figures of these rows, in the table's order."""
    figures = []
    for name in names:
        started = time.monotonic()
        console.print(f"[dim]{(ALL[name].__doc__ or '').strip().splitlines()[0]}[/dim]", end=" ", highlight=False)
        figures += ALL[name](stand)
        console.print(f"[dim]{time.monotonic() - started:.0f} s[/dim]", highlight=False)
    return sorted(figures, key=lambda figure: _order(figure.row))


def chosen(asked: str, with_long: bool) -> list[str]:
    """The names of the measurements that yield these rows."""
    if not asked:
        return [*ROWS, *(LONG if with_long else ())]
    wanted = {ALSO.get(name, name) for name in asked.split(",")}
    if "15" in wanted:
        wanted |= {"15b", "10"}
    unknown = wanted - set(ALL)
    if unknown:
        sys.exit(f"There is no row {', '.join(sorted(unknown))}; there are {', '.join([*ALL, *ALSO])}.")
    return [name for name in ALL if name in wanted]


def _order(row: str) -> tuple[int, str]:
    digits = "".join(character for character in row if character.isdigit())
    return int(digits or 99), row


def main() -> int:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures Chatkeep beside what it replaces.")
    parser.add_argument("--long", action="store_true", help="rows 14 and 16 too")
    parser.add_argument("--rows", default="", help="only these, such as 1,6,4c; also keyed and broker")
    parser.add_argument("--tiny", action="store_true", help="run every line for a moment; the figures mean nothing and are not saved")
    parser.add_argument("--load", choices=sorted(RUNNERS), default="own", help="the load generator (default: own)")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/README.md")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="measure nothing: show a saved run again and draw its chart")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if given.draw:
        saved = Results.load(given.draw)
        report.CHART.write_text(draw(saved), encoding="utf-8")
        report.show(saved, console)
        return 0
    plan, names = TINY if given.tiny else Plan(), chosen(given.rows, given.long)
    try:
        with Stand(STATE, plan, load=given.load) as stand:
            figures = measure(names, stand, console)
            done = results(figures, stand.noise, plan, given.load)
    except (ConfigurationError, OSError, RuntimeError) as exc:
        sys.exit(f"benchmarks: {exc}")
    report.show(done, console)
    if not given.tiny and not given.rows:
        console.print(f"Saved: {report.save(done).relative_to(ROOT)}, {report.CHART.relative_to(ROOT)}")
    if given.record and not given.tiny:
        report.record(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
