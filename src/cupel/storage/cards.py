"""Scorecards as files, checked when they are read: someone may have sent the folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cupel.core.errors import RecipeError
from cupel.core.scorecard import FORMAT
from cupel.storage.files import replace_file

CELLS = 20_000  # readings times variants that are drawn
LARGEST = 1e300  # beyond it arithmetic on two values overflows
LONG = 120  # characters of a name in a message


class BadCard(RecipeError):
    """A scorecard that will not be drawn; says why in one line."""


def write_json(path: Path, content: object) -> None:
    """Write JSON in the order it was made, whole or not at all. NaN and infinities become null."""
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, text)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def read_scorecard(folder: Path) -> dict[str, Any]:
    """The scorecard of a run folder (or the JSON file itself), every part of the type that cupel writes.

    Raises:
        RecipeError: it is not there, no JSON, or not what cupel writes.
    """
    path = folder if folder.is_file() else folder / "scorecard.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"{folder} must be a run folder with a scorecard.json; reading it failed: {error}. "
            "Give the folder that `cupel run` printed."
        ) from None
    try:
        check(card)
    except BadCard as error:
        raise RecipeError(f"{path} must be a scorecard of cupel. {error} Run the recipe again.") from None
    return dict(card)


def check(card: Any) -> None:
    """Every part that is drawn has the type that cupel writes.

    Raises:
        BadCard: names the first part that has not.
    """
    _of(card, dict, "the scorecard")
    if card.get("format") != FORMAT:
        raise BadCard(f"the scorecard must be of format {FORMAT}; got {str(card.get('format'))[:20]}.")
    parts: dict[str, type | tuple[type, ...]] = {
        "recipe": dict, "variants": dict, "seeds": list, "gate": list, "claims": dict, "versions": dict,
        "machine": dict, "baseline": str, "date": str, "seconds": (int, float),
    }  # fmt: skip
    for name, kind in parts.items():
        _of(card.get(name), kind, name)
    for seed in card["seeds"]:
        _of(seed, int, "a seed")
    for verdict in card["claims"].values():
        _of(verdict, str, "a claim's verdict")
    for name in ("processor", "cores", "device"):
        _of(card["machine"].get(name), (str, int, type(None)), f"machine.{name}")
    _recipe(card["recipe"])
    _variants(card)
    for rule in card["gate"]:
        _rule(rule)


def _of(value: Any, kind: type | tuple[type, ...], where: str) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        words = " or ".join(k.__name__ for k in kinds)
        raise BadCard(f"{where[:LONG]} must be {words}; got {type(value).__name__}.")


def _number(value: Any, where: str) -> None:
    _of(value, (int, float, type(None)), where)
    if value is not None and not abs(value) < LARGEST:  # also false for NaN
        raise BadCard(f"{where[:LONG]} must be a finite number; got one beyond {LARGEST:g}.")


def _recipe(recipe: Mapping[str, Any]) -> None:
    workload = recipe.get("workload")
    _of(workload, (str, dict), "recipe.workload")
    _of(recipe.get("variants"), dict, "recipe.variants")
    _of(recipe.get("probes"), list, "recipe.probes")
    if not workload:
        raise BadCard("recipe.workload must name a workload; it is empty.")
    for probe in recipe["probes"]:
        _of(probe, (str, dict), "a probe of the recipe")
        if isinstance(probe, dict) and not probe:
            raise BadCard("a probe of the recipe must have a name; it is empty.")
        if isinstance(probe, dict):
            _of(probe.get("as", ""), str, "the name of a probe")


def _variants(card: Mapping[str, Any]) -> None:
    variants = card["variants"]
    if not variants:
        raise BadCard("variants must hold one or more; it is empty.")
    labels = None
    cells = 0
    for name, content in variants.items():
        _of(content, dict, f"variant {name}")
        _of(content.get("probes"), dict, f"probes of {name}")
        _of(content.get("failures"), list, f"failures of {name}")
        for failure in content["failures"]:
            _of(failure, str, f"a failure of {name}")
        labels = labels or set(content["probes"])
        if set(content["probes"]) != labels:
            raise BadCard(f"variant {name[:LONG]} must have the same probes as the others; it has others.")
        for probe, found in content["probes"].items():
            cells += _probe(found, f"{probe} of {name}")
            if cells > CELLS:
                raise BadCard(f"the scorecard must hold at most {CELLS} readings to be shown; it holds more.")
    if not any(name in variants for name in card["recipe"]["variants"]):
        raise BadCard("variants must be those of the recipe; none is.")


def _probe(found: Any, where: str) -> int:
    _of(found, dict, where)
    _of(found.get("readings"), dict, f"readings of {where}")
    _of(found.get("notes"), list, f"notes of {where}")
    for note in found["notes"]:
        _of(note, str, f"a note of {where}")
    if len(found["readings"]) > CELLS:
        return len(found["readings"])
    for name, cell in found["readings"].items():
        _cell(cell, f"{name} in {where}")
    return len(found["readings"])


def _cell(cell: Any, where: str) -> None:
    _of(cell, dict, where)
    for key in ("value", "low", "high"):
        _number(cell.get(key), f"{key} of {where}")
    if cell["value"] is not None and (cell.get("low") is None) != (cell.get("high") is None):
        raise BadCard(f"the interval of {where[:LONG]} must have two ends; it has one.")
    _of(cell.get("unit"), str, f"unit of {where}")
    _of(cell.get("better"), str, f"better of {where}")
    _of(cell.get("count"), int, f"count of {where}")
    _of(cell.get("seeds"), list, f"seeds of {where}")
    for value in cell["seeds"]:
        _number(value, f"a seed's value of {where}")


def _rule(rule: Any) -> None:
    _of(rule, dict, "a rule of the gate")
    for key in ("variant", "reading", "rule"):
        _of(rule.get(key), str, f"{key} of a rule")
    _of(rule.get("passed"), bool, "passed of a rule")
    _of(rule.get("why"), (str, type(None)), "why of a rule")
    for key in ("value", "limit"):
        _number(rule.get(key), f"{key} of a rule")
