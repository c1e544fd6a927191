"""The scorecard as one self-contained page: no network, light and dark, printable."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cupel.report.words import best, number, remarks_of, rows_of, spoken, spread, variants_of, worse

_HERE = Path(__file__).parent


def write_page(card: Mapping[str, Any], path: Path) -> None:
    """Write `scorecard.html`."""
    path.write_text(page(card), encoding="utf-8")


def page(card: Mapping[str, Any]) -> str:
    """The page's text. Every word from the recipe is escaped."""
    frame = (_HERE / "page.html").read_text(encoding="utf-8")
    parts = {
        "STYLE": (_HERE / "page.css").read_text(encoding="utf-8"),
        "TITLE": html.escape(
            f"{_name(card['recipe']['workload'])}: {len(card['variants'])} variants, {len(card['seeds'])} seeds"
        ),
        "VERDICT": _gate(card),
        "TABLE": _table(card),
        "REMARKS": _remarks(card),
        "CLAIMS": _claims(card),
        "RECIPE": html.escape(yaml.safe_dump(card["recipe"], sort_keys=False, allow_unicode=True)),
        "ABOUT": html.escape(_about(card)),
        "DATA": _embedded(card),
        "SCRIPT": (_HERE / "page.js").read_text(encoding="utf-8"),
    }
    for key, text in parts.items():
        frame = frame.replace(f"<!--{key}-->", text, 1)
    return frame


def _name(workload: Any) -> str:
    return workload if isinstance(workload, str) else next(iter(workload))


def _embedded(card: Mapping[str, Any]) -> str:
    """Points of the plot as JSON that cannot end its script element."""
    names = variants_of(card)
    rows = [
        {"probe": p, "reading": spoken(r), "unit": next(iter(cells.values()))["unit"],
         "cells": {v: [c["value"], c["low"], c["high"], number(c["value"], c["unit"])] for v, c in cells.items()}}
        for p, r, cells in rows_of(card)
    ]  # fmt: skip
    return json.dumps({"variants": names, "rows": rows}).replace("<", "\\u003c")


def _table(card: Mapping[str, Any]) -> str:
    names = variants_of(card)
    head = "".join(f'<th scope="col">{html.escape(n)}</th>' for n in names)
    lines = [f'<table><thead><tr><th scope="col">reading</th>{head}</tr></thead><tbody>']
    last = ""
    for probe, reading, cells in rows_of(card):
        if probe != last:
            lines.append(
                f'<tr class="probe"><th scope="rowgroup" colspan="{len(names) + 1}">{html.escape(probe)}</th></tr>'
            )
            last = probe
        top, base = best(cells), cells.get(card["baseline"])
        tds = "".join(_td(cells.get(n), n in top, base) for n in names)
        lines.append(f'<tr><th scope="row">{html.escape(spoken(reading))}</th>{tds}</tr>')
    return "\n".join([*lines, "</tbody></table>"])


def _td(cell: Mapping[str, Any] | None, top: bool, base: Mapping[str, Any] | None) -> str:
    if cell is None:
        return '<td class="none">n/a</td>'
    bad = base is not None and base is not cell and worse(cell, base)
    kind = "best" if top else "worse" if bad else ""
    mark = '<span class="mark" title="best of its row">&#9650;</span>' if top else ""
    mark = (
        '<span class="mark" title="worse than the baseline beyond the interval">&#9660;</span>'
        if bad and not top
        else mark
    )
    unit = cell["unit"]
    seeds = ", ".join(number(v, unit) for v in cell["seeds"])
    span = f"{number(cell['low'], unit)} to {number(cell['high'], unit)}"
    title = html.escape(f"95%: {span}; seeds: {seeds}; n = {cell['count']}")
    shown = f"{number(cell['value'], unit)} <small>{spread(cell)}</small>{mark}"
    return f'<td class="{kind}" title="{title}">{shown}</td>'


def _gate(card: Mapping[str, Any]) -> str:
    if not card["gate"]:
        return "<p>This recipe has no gate.</p>"
    items = []
    for rule in card["gate"]:
        word = "pass" if rule["passed"] else "fail"
        why = f" &mdash; {html.escape(rule['why'])}" if rule["why"] else ""
        value = "-" if rule["value"] is None else f"{rule['value']:.4g}"
        limit = "-" if rule["limit"] is None else f"{rule['limit']:.4g}"
        text = html.escape(f"{rule['variant']}: {spoken(rule['reading'])} {rule['rule']}")
        items.append(f'<li class="{word}"><b>{word}</b> {text} (measured {value}, limit {limit}){why}</li>')
    return f'<ul class="gate">{"".join(items)}</ul>'


def _remarks(card: Mapping[str, Any]) -> str:
    items = [
        f'<li class="fail">{html.escape(name)} failed: {html.escape(failure)}</li>'
        for name in variants_of(card)
        for failure in card["variants"][name]["failures"]
    ]
    for probe, names, note in remarks_of(card):
        items.append(f"<li>{html.escape(probe)} ({html.escape(names)}): {html.escape(note)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else "<p>None.</p>"


def _claims(card: Mapping[str, Any]) -> str:
    items = [f"<li>{html.escape(name)}: {html.escape(verdict)}</li>" for name, verdict in card["claims"].items()]
    return f"<ul>{''.join(items)}</ul>"


def _about(card: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in card["versions"].items())
    machine = card["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['device']}"
    return f"{card['date']}; {versions}; {where}; {card['seconds']} s"
