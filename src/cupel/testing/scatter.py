"""One reading against another as a picture for the documentation: points with intervals, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from html import escape
from typing import Any

from cupel.report.words import number

WIDE, HIGH = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 20, 50
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}line,path{stroke:#888;fill:none}.front{stroke:#0a6;stroke-width:1.5}"
    "circle{fill:#fff;stroke:#235;stroke-width:1.5}.on{fill:#0a6;stroke:#0a6}.grid{stroke:#ddd}.ci{stroke:#9ab}.doubted{stroke:#c33;stroke-width:2}"
    "rect{fill:#fff}@media(prefers-color-scheme:dark){text{fill:#ddd}rect{fill:#16181c}circle{fill:#16181c;stroke:#9bd}"
    ".on{fill:#3c9;stroke:#3c9}.front{stroke:#3c9}.grid{stroke:#333}.ci{stroke:#567}}"
)
Cell = Mapping[str, Any]


def front(points: Mapping[str, tuple[Cell, Cell]]) -> list[str]:
    """Names of the points that no other is at least as good as in both readings and better in one."""

    def rank(cell: Cell) -> float:
        return float(cell["value"]) * (1 if cell["better"] == "lower" else -1)

    ranks = {name: (rank(x), rank(y)) for name, (x, y) in points.items()}
    return [
        name
        for name, mine in ranks.items()
        if not any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in ranks.values())
    ]


class _Scale:
    """Positions of values along one axis, which spans all intervals with some room."""

    def __init__(self, cells: list[Cell], start: float, end: float, log: bool) -> None:
        ends = [float(c[k]) for c in cells for k in ("low", "value", "high") if c[k] is not None]
        self.log, self.start, self.end = log, start, end
        low, high = (math.log10(v) if log else v for v in (min(ends), max(ends)))
        room = (high - low) * 0.06 or 0.5
        self.low, self.high = low - room, high + room

    def at(self, value: float) -> float:
        v = math.log10(value) if self.log else value
        return self.start + (v - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            return [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= math.log10(m * 10.0**p) <= self.high]
        raw = (self.high - self.low) / 5
        step = 10.0 ** math.floor(math.log10(raw))
        step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step) + 1)]


def _apart(wanted: dict[str, float], gap: float = 15.0) -> dict[str, float]:
    """Heights of labels, moved down as little as keeps them `gap` apart."""
    placed: dict[str, float] = {}
    last = -math.inf
    for name in sorted(wanted, key=lambda n: wanted[n]):
        last = max(wanted[name], last + gap)
        placed[name] = last
    over = max(0.0, last - (HIGH - BOTTOM))
    return {name: y - over for name, y in placed.items()}


def scatter(
    points: Mapping[str, tuple[Cell, Cell]], across: str, up: str, log: bool = False, doubted: Collection[str] = ()
) -> str:
    """An SVG of `points`: name -> (x, y) cells with value, low, high, unit and better; names stand at the right.

    Points that are `doubted` are crosses, and no part of the front.
    """
    x = _Scale([p[0] for p in points.values()], LEFT, WIDE - RIGHT, log)
    y = _Scale([p[1] for p in points.values()], HIGH - BOTTOM, TOP, False)
    units = [next(iter(points.values()))[k]["unit"] for k in (0, 1)]
    parts = [f'<rect width="{WIDE}" height="{HIGH}"/>']
    for v in x.ticks():
        parts.append(f'<line class="grid" x1="{x.at(v):.1f}" x2="{x.at(v):.1f}" y1="{TOP}" y2="{HIGH - BOTTOM}"/>')
        parts.append(
            f'<text x="{x.at(v):.1f}" y="{HIGH - BOTTOM + 18}" text-anchor="middle">{number(v, units[0])}</text>'
        )
    for v in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y.at(v):.1f}" y2="{y.at(v):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y.at(v) + 4:.1f}" text-anchor="end">{number(v, units[1])}</text>')
    best = sorted(
        front({n: p for n, p in points.items() if n not in doubted}), key=lambda name: points[name][0]["value"]
    )
    path = " ".join(f"{x.at(points[n][0]['value']):.1f},{y.at(points[n][1]['value']):.1f}" for n in best)
    parts.append(f'<path class="front" d="M{path.replace(" ", " L")}"/>')
    heights = _apart({name: y.at(cell["value"]) for name, (_, cell) in points.items()})
    for name, (a, b) in points.items():
        px, py = x.at(a["value"]), y.at(b["value"])
        if b["low"] is not None and b["high"] is not None:
            low, high = y.at(b["low"]), y.at(b["high"])
            parts.append(f'<line class="ci" x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        if name in doubted:
            ends = f"M{px - 5:.1f},{py - 5:.1f} l10,10 m0,-10 l-10,10"
            parts.append(f'<path class="doubted" d="{ends}"/>')
        else:
            parts.append(f'<circle class="{"on" if name in best else ""}" cx="{px:.1f}" cy="{py:.1f}" r="4.5"/>')
        edge, line = WIDE - RIGHT + 8, heights[name]
        parts.append(f'<path class="grid" d="M{px + 6:.1f},{py:.1f} L{edge},{line:.1f}"/>')
        parts.append(f'<text x="{edge + 4}" y="{line + 4:.1f}">{escape(name)}</text>')
    parts.append(f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 12}" text-anchor="middle">{escape(across)}</text>')
    middle = (TOP + HIGH - BOTTOM) / 2
    parts.append(f'<text transform="translate(16,{middle}) rotate(-90)" text-anchor="middle">{escape(up)}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" role="img" '
        f'aria-label="{escape(up)} against {escape(across)}"><style>{STYLE}</style>\n{body}\n</svg>\n'
    )
