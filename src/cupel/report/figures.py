"""All figures of a scorecard, ordered for the page and cut to the room that is left on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cupel.report.kinds import drawn, short
from cupel.report.words import label, probes_of, variants_of

_HEAVY = ("images", "listing", "pathways")


def figures_of(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each probe, figure and kind: what its variants share in `all`, the rest in `by`.

    Variants for which a probe found nothing to show stand in `none`; nothing is left out.
    """
    found: list[dict[str, Any]] = []
    for probe in probes_of(card):
        parts: dict[tuple[str, str], dict[str, Any]] = {}
        empty: dict[str, list[str]] = {}
        for variant in variants_of(card):
            figures = card["variants"][variant]["probes"].get(probe, {}).get("figures") or {}
            for key, content in drawn(figures, card.get("classes") or ()).items():
                kind = content.pop("kind")
                if kind == "none":
                    empty.setdefault(key, []).append(variant)
                    continue
                name = "" if kind == "facts" else key
                here = parts.setdefault((name, kind), {}).setdefault(variant, content)
                if kind == "facts" and here is not content:
                    here["facts"] += content["facts"]
        names = list(dict.fromkeys([*(k for k, _ in parts), *empty]))
        for name in names:
            kinds = [(kind, by) for (key, kind), by in parts.items() if key == name] or [("none", {})]
            found += [_entry(probe, name, kind, by, empty.get(name, [])) for kind, by in kinds]
    return found


def _entry(probe: str, key: str, kind: str, by: dict[str, Any], none: list[str]) -> dict[str, Any]:
    contents = list(by.values())
    every = {k: v for k, v in contents[0].items() if all(c.get(k) == v for c in contents)} if contents else {}
    rest = {v: {k: x for k, x in c.items() if k not in every} for v, c in by.items()}
    name = label(key) if key else "further numbers"
    return {"probe": probe, "name": name, "kind": kind, "all": every, "by": rest, "none": none, "left": []}


def fit_into(figures: list[dict[str, Any]], room: int) -> int:
    """Leave out figures of the last variants, images first, until `room` bytes hold the rest; how many went.

    Each entry then lists in `left` the variants whose figure is in scorecard.json only, so that the page can say so.
    """
    sizes = {(i, v): len(json.dumps(c)) for i, f in enumerate(figures) for v, c in f["by"].items()}
    room -= sum(len(json.dumps({k: v for k, v in f.items() if k != "by"})) for f in figures)
    order = {v: n for n, v in enumerate(dict.fromkeys(v for f in figures for v in f["by"]))}
    turn = sorted(sizes, key=lambda at: (order[at[1]] >= 8, figures[at[0]]["kind"] in _HEAVY, order[at[1]]))
    gone = 0
    for at in turn:
        index, variant = at
        if sizes[at] + 40 <= room:
            room -= sizes[at] + 40
        else:
            figures[index]["by"].pop(variant)
            figures[index]["left"].append(variant)
            gone += 1
    return gone


def curves_of(card: Mapping[str, Any]) -> dict[str, dict[str, dict[str, dict[str, list[list[Any]]]]]]:
    """`quantity -> step -> variant -> seed -> [[epoch, value], ...]` of everything that a fit logged."""
    found: dict[str, Any] = {}
    for variant in variants_of(card):
        for seed, events in card["variants"][variant].get("curves", {}).items():
            for i, event in enumerate(events):
                step, at = str(event.get("step", event.get("at", "fit"))), event.get("epoch", i + 1)
                for key, value in event.items():
                    if key in ("epoch", "seconds") or isinstance(value, (str, bool, list, dict)):
                        continue
                    by = found.setdefault(label(key), {}).setdefault(step, {}).setdefault(variant, {})
                    by.setdefault(seed, []).append([at, short(value)])
    return found
