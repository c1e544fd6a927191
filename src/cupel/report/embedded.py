"""What the page's script reads: the scorecard's numbers in little room, as JSON that cannot end its script element."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from cupel.report.figures import curves_of, figures_of, fit_into
from cupel.report.kinds import short
from cupel.report.words import label, rows_shown, variants_of


def data_of(card: Mapping[str, Any], room: int = 1_000_000) -> dict[str, Any]:
    """Readings, curves and figures; what `room` bytes of JSON do not hold is named instead of shown.

    Readings come first; the figures share what readings and training curves leave. Where these two alone are too
    much, the curves go, then the values of single seeds.
    """
    names = variants_of(card)
    made: dict[str, Any] = {
        "variants": names,
        "baseline": card["baseline"],
        "seeds": card["seeds"],
        "readings": [_reading(probe, name, cells, names) for probe, name, cells in rows_shown(card)],
        "curves": curves_of(card),
        "lacks": [],
    }
    if len(as_json(made)) > room:
        made |= {"curves": {}, "lacks": ["training curves"]}
    if len(as_json(made)) > room:
        made["lacks"].append("values of single seeds")
        for row in made["readings"]:
            row["cells"] = [cell and cell[:3] for cell in row["cells"]]
    figures = figures_of(card)
    made["left_out"] = fit_into(figures, room - len(as_json(made)))
    made["figures"] = figures
    return made


def _reading(probe: str, name: str, cells: Mapping[str, Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
    """One row; a cell is `[value, low, high, one for each seed]`, or `[value]` where all of these are the same."""
    first = next(iter(cells.values()))
    row = {"probe": probe, "name": label(name), "unit": first["unit"], "better": first["better"]}
    return row | {"counts": _counts(cells, names), "cells": [_cell(cells.get(n)) for n in names]}


def _cell(cell: Mapping[str, Any] | None) -> list[Any] | None:
    if cell is None:
        return None
    values = [short(v) for v in (cell["value"], cell["low"], cell["high"], *cell["seeds"])]
    return values[:1] if len(set(values)) == 1 else values


def _counts(cells: Mapping[str, Mapping[str, Any]], names: list[str]) -> int | list[int | None]:
    """How many inputs or repeats: one number where all variants rest on as many."""
    every = {c["count"] for c in cells.values()}
    return every.pop() if len(every) == 1 else [cells[n]["count"] if n in cells else None for n in names]


def plain(value: Any) -> Any:
    """The card as it will be read back from its JSON: lists for tuples, text keys, null for what is no finite number.

    >>> plain({1: (2, float("nan"))})
    {'1': [2, None]}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(value: Any) -> str:
    """JSON without a character that HTML could take for markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
