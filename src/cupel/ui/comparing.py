"""The page that holds several runs against one of them: readings with differences, and a plot over all variants."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from cupel.report.compare import beyond, differences
from cupel.report.words import label, number, rows_of, spread, variants_of
from cupel.ui.cards import workload_name
from cupel.ui.views import frame, run_address

MOST_RUNS = 50
MOST_ROWS = 3000
MOST_CELLS = 100_000  # of all runs together
MARKS = {"better": "&#9650;", "worse": "&#9660;"}


@dataclass(frozen=True)
class Chosen:
    """What the comparison is about: runs that could be read, and against what they are held."""

    names: Sequence[str]
    cards: Sequence[Mapping[str, Any]]
    base: int = 0
    variant: str | None = None  # of the base; without it each variant meets its namesake

    @property
    def option(self) -> str:
        if self.variant is None:
            return str(self.base)
        return f"{self.base}.{variants_of(self.cards[self.base]).index(self.variant)}"


def chosen(names: Sequence[str], cards: Sequence[Mapping[str, Any]], option: str) -> Chosen:
    """`option` is `1` for the second run, `1.0` for its first variant; anything else means the first run."""
    run, _, of = option.partition(".")
    base = int(run) if run.isdecimal() and len(run) < 4 and int(run) < len(cards) else 0
    found = variants_of(cards[base])
    known = of.isdecimal() and len(of) < 6 and int(of) < len(found)
    return Chosen(names, cards, base, found[int(of)] if known else None)


def page(what: Chosen, wrong: Sequence[str], nonce: str, version: str) -> str:
    """The whole page."""
    told = [*(f'<li class="wrong">{escape(w)}</li>' for w in wrong), *(f"<li>{escape(c)}</li>" for c in cautions(what))]
    remarks = f'<ul class="cautions">{"".join(told)}</ul>' if told else ""
    body = f"""<nav class="ui-strip" aria-label="Run"><a href="/">All runs</a> <b>{len(what.names)} runs</b>
<button type="button" class="theme" hidden></button></nav>
<header><h1>Comparison</h1></header>
<main>{remarks}
<section aria-labelledby="plot"><h2 id="plot">One reading against another</h2>
<div class="ui-bar"><label>across <select id="x"></select></label> <label>up <select id="y"></select></label>
<label><input type="checkbox" id="xlog"> log across</label>
<label><input type="checkbox" id="ylog"> log up</label></div>
<div id="key"></div><div id="pareto"></div></section>
<section aria-labelledby="readings"><h2 id="readings">Readings</h2>
<p class="note">Mean over seeds with half its 95% interval; below it the difference from the base with its 95% interval,
paired by seed where the seeds are the same. &#9650; better, &#9660; worse beyond that interval.</p>
{_controls(what)}
<div class="wide" role="region" aria-label="Readings of the chosen runs" tabindex="0">{_table(what)}</div>
<p id="none" hidden>No reading matches.</p></section>
</main>
<script type="application/json" id="points">{points(what)}</script>"""
    return frame("Comparison", body, nonce, ("report.js",), version)


def cautions(what: Chosen) -> list[str]:
    """What makes these runs less alike than their names say."""
    base, told = what.cards[what.base], []
    workloads = {json.dumps(c["recipe"]["workload"], sort_keys=True) for c in what.cards}
    if len(workloads) > 1:
        told.append("The runs have different workloads (" + ", ".join(sorted({workload_name(c) for c in what.cards}))
                    + ", or different parameters of one): differences are not due to the variants alone.")  # fmt: skip
    settings = _probe_settings(base)
    for name, card in zip(what.names, what.cards, strict=True):
        mine = _probe_settings(card)
        unlike = [p for p in mine if p in settings and mine[p] != settings[p]]
        if unlike:
            told.append(f"{name} measured {', '.join(unlike)} with other parameters than {what.names[what.base]}.")
        if card["seeds"] != base["seeds"]:
            told.append(f"{name} has other seeds than {what.names[what.base]}: its differences are not paired.")
    return told


def _probe_settings(card: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for probe in card["recipe"]["probes"]:
        if isinstance(probe, str):
            found[probe] = "{}"
        else:
            name = str(probe.get("as") or next((k for k in probe if k != "as"), ""))
            found[name] = json.dumps({k: v for k, v in probe.items() if k != "as"}, sort_keys=True)
    return found


def _controls(what: Chosen) -> str:
    hidden = "".join(f'<input type="hidden" name="run" value="{escape(n)}">' for n in what.names)
    options = []
    for i, (name, card) in enumerate(zip(what.names, what.cards, strict=True)):
        choices = [(str(i), f"{name}: same variant")]
        choices += [(f"{i}.{j}", f"{name}: {v}") for j, v in enumerate(variants_of(card))]
        for value, words in choices:
            on = " selected" if value == what.option else ""
            options.append(f'<option value="{value}"{on}>{escape(words)}</option>')
    return f"""<form action="/compare" method="get" id="against" class="ui-bar">{hidden}
<label>Difference from <select name="base">{"".join(options)}</select></label>
<button type="submit">Show</button></form>
<div class="ui-bar"><label>Search <input type="search" id="search" autocomplete="off"
placeholder="reading, probe, variant"></label>
<label><input type="checkbox" id="sure"> only differences beyond their interval</label>
<span id="shown" role="status"></span></div>"""


def _table(what: Chosen) -> str:
    cells = [{(p, r, v): c for p, r, row in rows_of(card) for v, c in row.items()} for card in what.cards]
    gaps = {
        (d["run"], d["probe"], d["reading"], d["variant"]): d
        for d in differences(what.cards, what.names, what.base, what.variant)
    }
    keys = sorted(dict.fromkeys(k for found in cells for k in found), key=_order(cells))
    heads = "".join(
        f'<th scope="col">{i + 1} <a href="{escape(run_address(n))}">{escape(n)}</a>'
        f"{'<small> base</small>' if i == what.base else ''}</th>"
        for i, n in enumerate(what.names)
    )
    lines = [f'<table class="against"><thead><tr><th scope="col">reading</th><th scope="col">variant</th>{heads}</tr>'
             "</thead><tbody>"]  # fmt: skip
    last = ""
    for probe, reading, variant in keys[:MOST_ROWS]:
        if probe != last:
            lines.append(
                f'<tr class="probe"><th scope="rowgroup" colspan="{len(what.names) + 2}">{escape(probe)}</th></tr>'
            )
            last = probe
        row = [gaps.get((n, probe, reading, variant)) for n in what.names]
        sure = any(d and beyond(d) for d in row)
        said = escape(f"{probe} {reading} {label(reading)} {variant}".lower())
        tds = "".join(_td(found.get((probe, reading, variant)), d) for found, d in zip(cells, row, strict=True))
        lines.append(
            f'<tr data-search="{said}" data-sure="{int(sure)}"><th scope="row">{escape(label(reading))}</th>'
            f'<td class="variant">{escape(variant)}</td>{tds}</tr>'
        )
    lines.append("</tbody></table>")
    if len(keys) > MOST_ROWS:
        lines.append(f"<p>{len(keys) - MOST_ROWS} further rows are left out; <code>cupel compare</code> has all.</p>")
    return "\n".join(lines)


def _order(cells: Sequence[Mapping[tuple[str, str, str], Any]]) -> Any:
    """Sorts keys by probe, then reading, then variant, each by where it first comes up."""
    places: list[dict[str, int]] = [{}, {}, {}]
    for found in cells:
        for key in found:
            for place, part in zip(places, key, strict=True):
                place.setdefault(part, len(place))
    return lambda key: tuple(place[part] for place, part in zip(places, key, strict=True))


def _td(cell: Mapping[str, Any] | None, gap: Mapping[str, Any] | None) -> str:
    if cell is None:
        return '<td class="none">n/a</td>'
    unit = cell["unit"]
    half = spread(cell)
    shown = escape(number(cell["value"], unit)) + (f" <small>{escape(half)}</small>" if half else "")
    if gap is None:
        return f"<td>{shown}</td>"
    if gap["gap"] is None:
        why = "not in the base" if gap["first"] is None else "no difference"
        return f'<td>{shown}<br><small class="gap">{why}</small></td>'
    kind = beyond(gap)
    mark = f' <span aria-hidden="true">{MARKS[kind]}</span><span class="unseen">{kind}</span>' if kind else ""
    span = f" [{signed(gap['low'], unit)}, {signed(gap['high'], unit)}]" if gap["low"] is not None else ""
    return f'<td>{shown}<br><small class="gap {kind}">{escape(signed(gap["gap"], unit) + span)}{mark}</small></td>'


def signed(value: float, unit: str) -> str:
    """
    >>> signed(0.0123, "share"), signed(-0.5, "share"), signed(0.0, "bytes")
    ('+.012', '−.500', '0')
    """
    text = number(value, unit).replace("-", "−") if math.isfinite(value) else "-"
    return f"+{text}" if value > 0 else text


def points(what: Chosen) -> str:
    """Every variant of every run as JSON that cannot end its script element."""
    at: dict[tuple[str, str, str], int] = {}
    axes: list[dict[str, str]] = []
    found = []
    for i, card in enumerate(what.cards):
        table = rows_of(card)
        for variant in variants_of(card):
            cells = {}
            for probe, reading, row in table:
                cell = row.get(variant)
                if cell is None or cell["value"] is None:
                    continue
                key = (probe, reading, cell["unit"])
                if key not in at:
                    at[key] = len(axes)
                    axes.append({"name": f"{probe}: {label(reading)}", "reading": reading, "unit": cell["unit"],
                                 "better": cell["better"]})  # fmt: skip
                cells[at[key]] = [cell["value"], cell["low"], cell["high"]]
            found.append({"name": f"{i + 1} {variant}", "run": i, "cells": cells})
    return json.dumps({"runs": list(what.names), "axes": axes, "points": found}).replace("<", "\\u003c")
