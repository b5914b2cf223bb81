"""Shows a run: as a table in the terminal, as Markdown for the README, as JSON and SVG in `benchmarks/results/`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.chart import draw, number
from benchmarks.figures import Figure, Results, median
from benchmarks.machine import NOISY

FOLDER = Path(__file__).parent / "results"
CHART = FOLDER / "latest.svg"
README = Path(__file__).parent / "README.md"
_COLOURS = {"beyond": "bold green", "met": "green", "missed": "bold red", "": "dim"}


def show(results: Results, console: Console) -> None:
    """The table."""
    table = Table(title=f"Chatkeep, {results.taken_at}", caption=results.machine, header_style="bold", pad_edge=False)
    for name, justify in (
        ("#", "left"),
        ("measure", "left"),
        ("median", "right"),
        ("min – max", "right"),
        ("bar", "left"),
        ("made of", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=name in ("#", "median", "min – max"))  # type: ignore[arg-type]
    for figure in results.figures:
        verdict = figure.verdict
        mark = f"[{_COLOURS[verdict]}]{number(figure.value)} {figure.unit}[/]"
        bar = f"{figure.bar}  [{_COLOURS[verdict]}]{verdict}[/]" if figure.bar else ""
        table.add_row(figure.row, figure.what, mark, _range(figure), bar, _made_of(figure))
    console.print(table)
    console.print(noise(results))


def noise(results: Results) -> str:
    """How quiet the machine was."""
    if not results.noise:
        return "Nothing was timed."
    loud = sum(share > NOISY for share in results.noise)
    return (
        f"Others used {median(results.noise):.1%} of the machine (median of {len(results.noise)} timed phases, "
        f"worst {max(results.noise):.1%}); {loud} phases stayed above {NOISY:.0%}."
    )


def save(results: Results) -> Path:
    """Writes `<date>.json` (a second run of a day gets a number) and the chart of this run."""
    day = results.taken_at[:10]
    path = next(path for i in range(1, 1000) if not (path := FOLDER / (f"{day}.json" if i == 1 else f"{day}-{i}.json")).exists())
    results.save(path)
    CHART.write_text(draw(results), encoding="utf-8")
    return path


def record(results: Results) -> None:
    """Appends the run to `benchmarks/README.md`."""
    text = README.read_text(encoding="utf-8").rstrip("\n")
    README.write_text(f"{text}\n\n{markdown(results)}", encoding="utf-8")


def markdown(results: Results) -> str:
    """The run as a section."""
    lines = [
        f"### {results.taken_at[:10]}",
        "",
        f"{results.machine}. Load: {results.plan['load']}. {noise(results)}",
        "",
        "| # | measure | median [min – max] | bar | | made of (medians) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for figure in results.figures:
        value = f"{number(figure.value)} {figure.unit} [{_range(figure)}]"
        lines.append(f"| {figure.row} | {figure.what} | {value} | {figure.bar or ''} | {figure.verdict} | {_made_of(figure)} |")
    return "\n".join(lines) + "\n"


def _range(figure: Figure) -> str:
    return f"{number(min(figure.values))} – {number(max(figure.values))}" if len(figure.values) > 1 else "–"


def _made_of(figure: Figure) -> str:
    return "; ".join(f"{name} {number(value)}" for name, value in figure.raw.items())
