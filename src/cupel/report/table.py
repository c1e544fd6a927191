"""The table of readings as HTML that stands without a script: few variants as columns, many as rows."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from cupel.report.words import best, label, number, rows_shown, spread, variants_of, worse

ACROSS = 8  # variants that stand side by side; more stand below each other
BARE = 24  # variants from which on a cell is text alone: half the boxes, half the time to sort
Row = tuple[str, str, dict[str, Mapping[str, Any]]]
_CAPTION = (
    "Mean over seeds, ± half its 95% interval (seeds and inputs together). ↑ higher is better, ↓ lower is better. "
)
_MARKS = (
    '<span class="best">▲ best</span> of all variants, <span class="worse">▼ worse</span> than {baseline} '
    "beyond the interval of their difference."
)


def readings_table(card: Mapping[str, Any]) -> str:
    """The whole table; cells carry no tooltips, the page's script takes details from the embedded data."""
    rows, names = rows_shown(card), variants_of(card)
    made = _upright(rows, names, card) if len(names) <= ACROSS else _lying(rows, names, card)
    caption = _CAPTION + (_MARKS.format(baseline=html.escape(card["baseline"])) if len(names) > 1 else "")
    layout = "variants-across" if len(names) <= ACROSS else "variants-down"
    layout += " bare" if len(names) > BARE else ""
    style = f' style="--columns:{len(rows)}"' if len(names) > ACROSS else ""
    return f'<table id="readings" class="readings {layout}"{style}><caption>{caption}</caption>{made}</table>'


def _upright(rows: list[Row], names: list[str], card: Mapping[str, Any]) -> str:
    """Readings below each other, a group of rows for each probe."""
    head = "".join(f'<th scope="col">{html.escape(n)}</th>' for n in names)
    lines = [f'<thead><tr><th scope="col">reading</th>{head}</tr></thead>']
    for probe, group in groupby(rows, key=lambda r: r[0]):
        title = f'<th scope="rowgroup" colspan="{len(names) + 1}">{html.escape(probe)}</th>'
        lines.append(f'<tbody><tr class="probe">{title}</tr>')
        for _, reading, cells in group:
            tds = "".join(_cells(cells, names, card["baseline"]))
            lines.append(f'<tr><th scope="row">{_named(reading, cells)}</th>{tds}</tr>')
        lines.append("</tbody>")
    return "\n".join(lines)


def _lying(rows: list[Row], names: list[str], card: Mapping[str, Any]) -> str:
    """Variants below each other, a group of columns for each probe."""
    groups = [(probe, len(list(group))) for probe, group in groupby(rows, key=lambda r: r[0])]
    top = "".join(f'<th scope="colgroup" colspan="{n}" style="--span:{n}">{html.escape(p)}</th>' for p, n in groups)
    head = "".join(f'<th scope="col">{_named(reading, cells)}</th>' for _, reading, cells in rows)
    lines = [f'<thead><tr class="probe"><td></td>{top}</tr><tr><th scope="col">variant</th>{head}</tr></thead><tbody>']
    by_row = [list(_cells(cells, names, card["baseline"])) for _, _, cells in rows]
    for i, name in enumerate(names):
        title = html.escape(name)
        lines.append(f'<tr><th scope="row" title="{title}">{title}</th>{"".join(tds[i] for tds in by_row)}</tr>')
    return "\n".join([*lines, "</tbody>"])


def _cells(cells: Mapping[str, Mapping[str, Any]], names: list[str], baseline: str) -> Iterator[str]:
    top, base, inexact = best(cells), cells.get(baseline), any(spread(c) for c in cells.values())
    for name in names:
        td = _td if len(names) <= BARE else _bare
        yield td(cells.get(name), name in top, base, inexact)


def _named(reading: str, cells: Mapping[str, Mapping[str, Any]]) -> str:
    """The reading's name, and an arrow where more or less of it is better."""
    better = next(iter(cells.values()))["better"]
    arrow = f'<i class="{better}"></i>' if better in ("higher", "lower") else ""
    return html.escape(label(reading)) + arrow


def _td(cell: Mapping[str, Any] | None, top: bool, base: Mapping[str, Any] | None, inexact: bool) -> str:
    """One cell; the word in it is drawn as a mark and read aloud as a word. `inexact`: its row has intervals."""
    if cell is None:
        return '<td class="none">n/a</td>'
    kind = _mark(cell, top, base)
    shown = number(cell["value"], cell["unit"]) + (f" <small>{spread(cell)}</small>" if inexact else "")
    return f'<td class="{kind}">{shown} <b>{kind}</b></td>' if kind else f"<td>{shown}</td>"


def _bare(cell: Mapping[str, Any] | None, top: bool, base: Mapping[str, Any] | None, inexact: bool) -> str:
    """The same cell without elements inside; its class alone draws the mark and names it."""
    if cell is None:
        return '<td class="none">n/a</td>'
    kind = _mark(cell, top, base)
    shown = f"{number(cell['value'], cell['unit'])} {spread(cell)}".strip()
    return f'<td class="{kind}">{shown}</td>' if kind else f"<td>{shown}</td>"


def _mark(cell: Mapping[str, Any], top: bool, base: Mapping[str, Any] | None) -> str:
    if top:
        return "best"
    return "worse" if base is not None and base is not cell and worse(cell, base) else ""
