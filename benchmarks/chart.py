"""Draws a run as an SVG: one bar for each figure, on a scale on which every bar's length says how far its goal was passed or missed.

A figure's goal lies at 1: twice as good as demanded is one step to the right, half as good one to the left. Colours carry light and dark.
"""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

from benchmarks.figures import Figure, Results

WIDTH, LEFT, RIGHT, ROW, TOP, BOTTOM = 980, 470, 120, 24, 64, 46
STEPS = 4.0
"""Steps of two to each side; longer bars end there, with their number beside them."""
_COLOURS = {"beyond": "#15803d", "met": "#65a30d", "missed": "#dc2626"}
_STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#1f2937}
.small{font-size:11px;fill:#6b7280}
.title{font-size:16px;font-weight:600}
.line{stroke:#9ca3af}
.paper{fill:#ffffff}
@media(prefers-color-scheme:dark){text{fill:#e5e7eb}.small{fill:#9ca3af}.paper{fill:#111827}.line{stroke:#6b7280}}
"""


def draw(results: Results) -> str:
    """The SVG, for the figures that have a bar."""
    figures = [figure for figure in results.figures if figure.bar]
    height = TOP + ROW * len(figures) + BOTTOM
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title">',
        f'<title id="title">Chatkeep, measured side by side, {results.taken_at[:10]}</title>',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<text class="title" x="20" y="30">Measured side by side, {results.taken_at[:10]}</text>',
        f'<text class="small" x="{middle:.0f}" y="50" text-anchor="middle">worse ◂ goal ▸ better (each step: twice)</text>',
    ]
    for step in range(-int(STEPS), int(STEPS) + 1):
        x = middle + step * _step()
        width = 1.6 if step == 0 else 0.4
        parts.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{height - BOTTOM}" stroke-width="{width}"/>')
    for i, figure in enumerate(figures):
        parts += _bar(figure, TOP + i * ROW, middle)
    parts.append(f'<text class="small" x="20" y="{height - 26}">{escape(results.machine)}</text>')
    how = "Medians of interleaved rounds; how, and what to beware of: benchmarks/README.md"
    parts.append(f'<text class="small" x="20" y="{height - 11}">{how}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def _bar(figure: Figure, y: float, middle: float) -> list[str]:
    assert figure.bar is not None
    goal = figure.bar.limit
    share = figure.value / goal if figure.bar.at_least else goal / max(figure.value, 1e-9)
    steps = max(-STEPS, min(STEPS, math.log2(share) if share > 0 else -STEPS))
    x, length = (middle, steps * _step()) if steps >= 0 else (middle + steps * _step(), -steps * _step())
    colour = _COLOURS[figure.verdict]
    says = f"{number(figure.value)} {figure.unit}"
    title = f"<title>{escape(figure.what)}</title>"
    return [
        f'<text x="20" y="{y + 15}">{escape(figure.row)}</text>',
        f'<text x="52" y="{y + 15}">{escape(shortened(figure.what))}</text>',
        f'<rect x="{x:.1f}" y="{y + 4}" width="{max(length, 1.5):.1f}" height="14" rx="2" fill="{colour}">{title}</rect>',
        f'<text x="{WIDTH - RIGHT + 8}" y="{y + 15}">{escape(says)}</text>',
        f'<text class="small" x="{WIDTH - 8}" y="{y + 15}" text-anchor="end">{escape("≥" if figure.bar.at_least else "≤")} {goal:g}</text>',
    ]


def number(value: float) -> str:
    """Three digits that mean something."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def shortened(what: str, most: int = 62) -> str:
    return what if len(what) <= most else what[: most - 1] + "…"


def _step() -> float:
    return (WIDTH - LEFT - RIGHT) / 2 / STEPS
