"""Scorecards that cannot be trusted: each is checked before anything is drawn from it.

What fails becomes one plain line for its run, and the other runs go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cupel.core.scorecard import FORMAT
from cupel.ui import folders
from cupel.ui.folders import CARD, FINISHED, STOPPED, UNREADABLE, Progress

HEAVY = 32 * 2**20  # bytes of the largest scorecard that is read
CELLS = 20_000  # readings times variants that are drawn
LARGEST = 1e300  # beyond it arithmetic on two values overflows
LONG = 120  # characters of a name in the list of runs


class BadCard(Exception):
    """A scorecard that will not be drawn; says why in one line."""


@dataclass(frozen=True)
class Summary:
    """One line of the list of runs."""

    name: str
    state: str
    workload: str = ""
    date: str = ""
    seeds: int = 0
    variants: tuple[str, ...] = ()
    gate: str = ""  # `pass`, `fail (1 of 3)`, `none`, or empty while nothing was judged
    wrong: str = ""
    progress: Progress = Progress()


def load(folder: Path) -> dict[str, Any]:
    """The scorecard of a run, whole and of the right types.

    Raises:
        BadCard: it is not there, too large, no JSON, or not what cupel writes.
    """
    try:
        raw = folders.read_within(folder, CARD, HEAVY + 1)
    except OSError:
        raise BadCard(f"{CARD} is not there any more, or is a link; nothing can be shown.") from None
    if len(raw) > HEAVY:
        raise BadCard(f"{CARD} must be at most {HEAVY // 2**20} MB to be shown here; it is larger.")
    try:
        card = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadCard(f"{CARD} must be JSON; reading it failed: {str(error)[:100]}.") from None
    check(card)
    return dict(card)


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


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


def workload_name(card: Mapping[str, Any]) -> str:
    """The workload's name, with or without parameters."""
    workload = card["recipe"]["workload"]
    return workload if isinstance(workload, str) else str(next(iter(workload)))


class Shelf:
    """Summaries of the runs under one folder; a scorecard is read again only when its file changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, tuple[tuple[int, int, int], Summary]] = {}

    def summaries(self) -> list[Summary]:
        """One for each run, newest first."""
        runs = folders.runs_in(self.root)
        self._known = {name: known for name, known in self._known.items() if name in runs}
        return sorted((self.summary(n, p) for n, p in runs.items()), key=lambda s: (s.date, s.name), reverse=True)

    def summary(self, name: str, folder: Path) -> Summary:
        state = folders.state_of(folder)
        if state != FINISHED:
            return _unfinished(Summary(name, state), folder)
        try:
            seen = (folder / CARD).lstat()
        except OSError:
            return Summary(name, STOPPED)
        stamp = (seen.st_mtime_ns, seen.st_size, seen.st_ino)
        known = self._known.get(name)
        if known is None or known[0] != stamp:
            known = (stamp, _finished(name, folder))
            self._known[name] = known
        return known[1]


def _unfinished(summary: Summary, folder: Path) -> Summary:
    progress = folders.progress_of(folder)
    return replace(summary, workload=folders.workload_of(folder), date=progress.started[:25], progress=progress)


def _finished(name: str, folder: Path) -> Summary:
    try:
        card = load(folder)
    except BadCard as error:
        return Summary(name, UNREADABLE, wrong=str(error))
    failed = sum(not rule["passed"] for rule in card["gate"])
    verdict = f"fail ({failed} of {len(card['gate'])})" if failed else "pass" if card["gate"] else "none"
    return Summary(
        name=name,
        state=FINISHED,
        workload=workload_name(card)[:LONG],
        date=card["date"][:25],
        seeds=len(card["seeds"]),
        variants=tuple(str(v)[:LONG] for v in list(card["variants"])[:100]),
        gate=verdict,
    )
