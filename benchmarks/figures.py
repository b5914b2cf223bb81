"""What a run yields: figures with their bars, how long everything was measured, and how quiet the machine was."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]  # it ships no types

Verdict = Literal["beyond", "met", "missed", ""]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything. `TINY` runs every line of code in a second or two and means nothing."""

    rounds: int = 5
    few_rounds: int = 3
    seconds: float = 2.5
    short_seconds: float = 1.5
    warm_seconds: float = 0.4
    users: int = 64
    conversations: int = 256
    reads: int = 150
    deep: int = 100_000
    listed: int = 10_000
    backlog: int = 200_000
    small_backlog: int = 50_000
    held: int = 20_000
    lag_seconds: float = 12.0
    few_rows: int = 10_000
    many_rows: int = 10_000_000
    is_tiny: bool = False


TINY = Plan(
    rounds=1,
    few_rounds=1,
    seconds=0.3,
    short_seconds=0.3,
    warm_seconds=0.1,
    users=16,
    conversations=32,
    reads=8,
    deep=2_000,
    listed=200,
    backlog=1_000,
    small_backlog=1_000,
    held=1_000,
    lag_seconds=1.0,
    few_rows=1_000,
    many_rows=5_000,
    is_tiny=True,
)


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure has to reach (`limit`) and what it would like to (`beyond`)."""

    limit: float
    beyond: float | None = None
    at_least: bool = True

    def verdict(self, value: float) -> Verdict:
        if self.beyond is not None and self._reaches(value, self.beyond):
            return "beyond"
        return "met" if self._reaches(value, self.limit) else "missed"

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.limit:g}" + (f", {sign} {self.beyond:g}" if self.beyond is not None else "")

    def _reaches(self, value: float, limit: float) -> bool:
        return value >= limit if self.at_least else value <= limit


def at_least(limit: float, beyond: float | None = None) -> Bar:
    return Bar(limit, beyond)


def at_most(limit: float, beyond: float | None = None) -> Bar:
    return Bar(limit, beyond, at_least=False)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: a value for each round, and in `raw` what it was made of (medians, in their own units)."""

    row: str
    what: str
    unit: str
    values: tuple[float, ...]
    bar: Bar | None = None
    raw: Mapping[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def verdict(self) -> Verdict:
        return self.bar.verdict(self.value) if self.bar else ""


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """Round by round: what ran side by side is compared."""
    return tuple(our / their for our, their in zip(ours, theirs, strict=True))


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


@dataclass(frozen=True, slots=True)
class Results:
    """One run."""

    taken_at: str
    machine: str
    figures: tuple[Figure, ...]
    noise: tuple[float, ...]
    """For each timed phase, the share of the machine that anything else used."""
    plan: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Writes what `load` reads, one figure a line."""
        told = asdict(self) | {"noise": [round(share, 3) for share in self.noise]}
        figures = told.pop("figures")
        lines = ",\n  ".join(json.dumps(_rounded(figure), ensure_ascii=False) for figure in figures)
        head = json.dumps(told, ensure_ascii=False, indent=1)[:-2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{head},\n "figures": [\n  {lines}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        told = json.loads(path.read_text(encoding="utf-8"))
        figures = tuple(
            Figure(**one | {"values": tuple(one["values"]), "bar": Bar(**one["bar"]) if one["bar"] else None}) for one in told["figures"]
        )
        return cls(**told | {"figures": figures, "noise": tuple(told["noise"])})


def results(figures: Sequence[Figure], noise: Sequence[float], plan: Plan, load: str) -> Results:
    """A run that has just ended."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Results(now, describe_machine(), tuple(figures), tuple(noise), asdict(plan) | {"load": load})


def describe_machine() -> str:
    """Processor, cores, memory, system, versions; no name and no path."""
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} cores ({_processor()}), {memory:.0f} GiB, {platform.system()} {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}, PostgreSQL and Valkey out of wheels, {sys.platform}/{platform.machine()}"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or "unknown processor"


def _rounded(figure: dict[str, Any]) -> dict[str, Any]:
    return figure | {
        "values": [_significant(value) for value in figure["values"]],
        "raw": {name: _significant(value) for name, value in figure["raw"].items()},
    }


def _significant(value: float) -> float:
    return float(f"{value:.4g}")
