"""The gate: bounds on readings, judged at the worse end of their interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cupel.core.scorecard import difference


def judge(rules: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A verdict for every rule: `{variant, reading, rule, value, limit, passed, why}`.

    A rule against another variant judges the difference paired by seed. NaN and missing readings fail.
    """
    return [_judge(rule, card) for rule in rules]


def cell_of(card: Mapping[str, Any], variant: str, reading: str) -> Mapping[str, Any] | None:
    """The cell of `reading` or `probe.reading` in one variant."""
    probe, _, name = reading.rpartition(".")
    for label, content in card["variants"][variant]["probes"].items():
        if (not probe or probe == label) and name in content["readings"]:
            found: Mapping[str, Any] = content["readings"][name]
            return found
    return None


def _judge(rule: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    told = {"variant": rule["variant"], "reading": rule["reading"], "rule": rule["text"]}
    cell = cell_of(card, rule["variant"], rule["reading"])
    base = cell_of(card, rule["base"], rule["reading"]) if rule["base"] else None
    if cell is None or (rule["base"] and base is None) or not _finite(cell) or (base is not None and not _finite(base)):
        return told | {"value": None, "limit": None, "passed": False, "why": "the reading is missing or not a number"}
    rising = rule["op"] in (">=", ">")
    if base is None:
        value, limit = (cell["low"] if rising else cell["high"]), rule["number"]
        shown = limit
    elif rule["arith"] in ("", "+", "-"):
        _, low, high = difference(cell, base)
        shift = rule["number"] * (-1 if rule["arith"] == "-" else 1)
        value, limit = (low if rising else high), shift
        shown = base["value"] + shift
    else:
        factor = rule["number"] if rule["arith"] == "*" else 1 / rule["number"]
        scaled = {**base, **{k: base[k] * factor for k in ("value", "low", "high")}}
        scaled["seeds"] = [v * factor for v in base["seeds"]]
        _, low, high = difference(cell, scaled)
        value, limit = (low if rising else high), 0.0
        shown = scaled["value"]
    passed = {">=": value >= limit, ">": value > limit, "<=": value <= limit, "<": value < limit}[rule["op"]]
    side = "low" if rising else "high"
    why = "" if passed else f"the {side} end of its interval is on the wrong side of the limit"
    return told | {"value": cell["value"], "limit": shown, "passed": bool(passed), "why": why}


def _finite(cell: Mapping[str, Any]) -> bool:
    return all(cell[k] is not None and math.isfinite(cell[k]) for k in ("value", "low", "high"))
