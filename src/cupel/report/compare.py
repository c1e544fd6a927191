"""Readings of several runs against one of them; shared by `cupel compare` and the page of `cupel ui`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cupel.core.scorecard import difference
from cupel.report.words import rows_of


def differences(
    cards: Sequence[Mapping[str, Any]], names: Sequence[str], base: int = 0, variant: str | None = None
) -> list[dict[str, Any]]:
    """One row for each reading of each variant of every run but the base.

    Args:
        cards: scorecards.
        names: what to call each.
        base: which of them the others are held against.
        variant: the variant of the base that everything is held against, also what else the base holds;
            without it, each variant meets its namesake; two runs of a single variant each are always compared.

    Returns:
        Rows with `run`, `variant`, `probe`, `reading`, `unit`, `better`, `first` (the base's value), `value`,
        `gap` and its 95% interval `low` to `high`. What cannot be subtracted is None, and so are timings.
    """
    there = {(p, r): cells for p, r, cells in rows_of(cards[base])}
    lone = next(iter(cards[base]["variants"])) if len(cards[base]["variants"]) == 1 else None
    found = []
    for i, (card, name) in enumerate(zip(cards, names, strict=True)):
        if i == base and variant is None:
            continue
        for probe, reading, cells in rows_of(card):
            for mine, cell in cells.items():
                if i == base and mine == variant:
                    continue
                theirs = variant or (lone if lone and len(card["variants"]) == 1 else mine)
                other = there.get((probe, reading), {}).get(theirs)
                paired = other is not None and _same_seeds(card, mine, cards[base], theirs)
                gap, low, high = _gap(cell, other, paired)
                found.append(
                    {"variant": mine, "probe": probe, "reading": reading, "unit": cell["unit"],
                     "better": cell["better"], "run": name, "first": other["value"] if other else None,
                     "value": cell["value"], "gap": gap, "low": low, "high": high}
                )  # fmt: skip
    return found


def _same_seeds(card: Mapping[str, Any], mine: str, base: Mapping[str, Any], theirs: str) -> bool:
    """Whether the n-th value of both comes from the same seed; a failed seed leaves a gap that moves the rest."""
    failures = card["variants"][mine]["failures"] or base["variants"][theirs]["failures"]
    return not failures and card["seeds"] == base["seeds"]


def _gap(
    cell: Mapping[str, Any], base: Mapping[str, Any] | None, paired: bool
) -> tuple[float | None, float | None, float | None]:
    if base is None or cell["value"] is None or base["value"] is None or cell["unit"] != base["unit"]:
        return None, None, None
    if cell["unit"] in ("ms", "s"):  # seconds of one run say nothing about those of another hour or machine
        return None, None, None
    if paired and None not in (*cell["seeds"], *base["seeds"]) and len(cell["seeds"]) > 1:
        return difference(cell, base)
    if None in (cell["low"], cell["high"], base["low"], base["high"]):
        return float(cell["value"]) - float(base["value"]), None, None
    # Without their values by seed, `difference` takes the two as independent.
    return difference({**cell, "seeds": ()}, {**base, "seeds": ()})


def beyond(row: Mapping[str, Any]) -> str:
    """`better` or `worse` where the interval of a difference excludes zero and the reading has a direction.

    >>> beyond({"low": 0.01, "high": 0.03, "better": "lower"})
    'worse'
    """
    if row["low"] is None or row["high"] is None or row["low"] <= 0 <= row["high"]:
        return ""
    if row["better"] not in ("higher", "lower"):
        return ""
    return "better" if (row["low"] > 0) == (row["better"] == "higher") else "worse"
