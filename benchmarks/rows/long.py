"""Rows 14 and 16, which take long: ten million rows, and the libraries that people use today."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.figures import Figure, at_least, at_most, median, ratios
from benchmarks.load import ROOT
from benchmarks.planting import Planted, plant
from benchmarks.rows.flush import flush_backlog
from benchmarks.rows.reads import read_cold
from benchmarks.stand import Stand

MANY = 16
_PEERS = "PEERS_BENCH"
_PEERS_SECONDS = 3 * 3600.0


def size(stand: Stand) -> list[Figure]:
    """14: accept, flush and cold history with 10,000,000 messages in the table against 10,000."""
    planted: dict[str, Planted] = {}
    for name, rows in (("few", stand.plan.few_rows), ("many", stand.plan.many_rows)):
        stand.add_database(name)
        planted[name] = plant(stand, name, user=1, conversations=rows // 100, messages=100)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    try:
        for _ in range(stand.plan.few_rounds):
            for name in ("few", "many"):
                stand.move_to(name)
                found["accept"][name].append(stand.append(stand.chatkeep.system, MANY, stand.plan.seconds).served.rate)
                found["flush"][name].append(flush_backlog(stand, stand.plan.small_backlog, []).rate)
                found["history"][name].append(read_cold(stand, some(planted[name], stand.plan.reads)))
    finally:
        stand.move_to("chatkeep")
    figures = []
    for what, unit in (("accept", "/s"), ("flush", "rows/s"), ("history", "ms")):
        few, many = found[what]["few"], found[what]["many"]
        values = ratios(many, few) if what == "history" else ratios(few, many)
        raw = {f"10,000, {unit}": median(few), f"10,000,000, {unit}": median(many)}
        figures.append(Figure("14", f"{what} at 10,000,000 rows against 10,000: how much slower", "×", values, at_most(1.2, 1.0), raw))
    return figures


def some(planted: Planted, count: int) -> Planted:
    """Evenly spread over all of them."""
    step = max(1, len(planted.pairs) // count)
    return Planted(planted.pairs[::step][:count], planted.message_ids)


def peers(stand: Stand) -> list[Figure]:
    """16: `peers_bench.py` with Chatkeep put beside the others (`benchmarks/peers_adapter.py`); it brings its own servers.

    PEERS_BENCH is the path of that script, and the Python that has its packages is PEERS_PYTHON (or `v/bin/python` beside it).
    """
    if _PEERS not in os.environ:
        print(f"Row 16 is left out: {_PEERS} does not say where peers_bench.py is (see benchmarks/README.md).", file=sys.stderr)
        return []
    script = Path(os.environ[_PEERS]).resolve()
    python = os.environ.get("PEERS_PYTHON", str(script.parent / "v" / "bin" / "python"))
    out, place = stand.home / "peers.json", stand.home / "peers"
    extent = "--rounds 1 --secs 0.5 --warm 0.3 --rsecs 0.2" if stand.plan.is_tiny else "--rounds 3 --secs 2.5"
    only = os.environ.get("PEERS_ONLY", "chatkeep,raw_asyncpg" if stand.plan.is_tiny else DEFAULT_PEERS)
    adapter = ROOT / "benchmarks" / "peers_adapter.py"
    command = [python, str(script), "bench", "--adapter", str(adapter), "--only", only, "--out", str(out), "--dir", str(place)]
    env = os.environ | {"CHATKEEP_PYTHON": sys.executable, "CHATKEEP_ROOT": str(ROOT)}
    process = stand.processes.run_program("peers", env, [*command, *extent.split()])
    try:
        if process.wait(_PEERS_SECONDS) != 0:
            raise RuntimeError(f"{script.name} failed:\n{process.tail()}")
    finally:
        stand.processes.stop("peers")
        shutil.rmtree(place, ignore_errors=True)
    return peer_figures(json.loads(out.read_text()))


DEFAULT_PEERS = "chatkeep,lc_sync,lc_async,langgraph_exit,oai_sqla,oai_redis,chainlit,sqlmodel_async,raw_asyncpg"
REFERENCES = ("raw_asyncpg", "raw_redis", "http_asyncpg", "http_sqlmodel", "chatkeep")
"""Written by hand for comparison; a peer is what people use."""


def peer_figures(told: dict[str, object]) -> list[Figure]:
    """Chatkeep against the best peer of each measure."""
    rounds: dict[str, list[dict[str, dict[str, float]]]] = told["peers"]  # type: ignore[assignment]
    peers_ = [name for name in rounds if name not in REFERENCES and rounds[name]]
    if not rounds.get("chatkeep") or not peers_:
        return []

    def middle(name: str, phase: str, measure: str) -> float:
        return median([one[phase][measure] for one in rounds[name]])

    turns = {name: middle(name, "w16", "tps") for name in [*peers_, "chatkeep"]}
    reads = {name: middle(name, "r5000", "p50") for name in [*peers_, "chatkeep"]}
    cpu = {name: middle(name, "w16", "server_us") for name in [*peers_, "chatkeep"] if name != "oai_redis"}
    best_turns, best_read = max(turns[name] for name in peers_), min(reads[name] for name in peers_)
    best_cpu = min(cost for name, cost in cpu.items() if name != "chatkeep")
    return [
        Figure(
            "16", "turns a second at 16 writers, against the best peer", "×", (turns["chatkeep"] / best_turns,), at_least(1.0, 3.0), turns
        ),
        Figure(
            "16", "read of the last 50 of 5,000, against the best peer", "×", (best_read / reads["chatkeep"],), at_least(1.0, 3.0), reads
        ),
        Figure("16", "PostgreSQL's CPU for a message, against the best peer", "×", (cpu["chatkeep"] / best_cpu,), at_most(0.3), cpu),
    ]
