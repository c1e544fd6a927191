"""Scorecards to draw: a small real one, and large ones made from it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

_SMALL = {"digits-cnn": {"width": 4, "examples": 96}}
_FIT: dict[str, Any] = {"epochs": 2}
_PROBES = (
    "accuracy",
    "calibration",
    "cost",
    {"evasion": {"eps": 0.3, "examples": 8, "steps": 2, "queries": 4, "cw_examples": 1}},
    "corruption",
    "membership",
    {"integrated-gradients": {"inputs": 3, "steps": 2, "points": 4}},
)


@cache
def _small() -> dict[str, Any]:
    from cupel.runner.run import run

    return run(
        workload=_SMALL,
        seeds=[0, 1],
        variants={
            "plain": [{"fit": _FIT}],
            "lean": [{"fit": {**_FIT, "techniques": [{"pdp": {"sparsity": 0.9}}]}}, {"apply": {"dqa": {"bits": 4}}}],
            "tough": [{"fit": {**_FIT, "techniques": [{"adversarial-training": {"eps": 0.1}}]}}, {"fit": _FIT}],
        },
        probes=list(_PROBES),
        gate={"lean": {"size_bytes": "<= plain / 2"}, "tough": {"accuracy": ">= 0.999"}},
    )


def small_card() -> dict[str, Any]:
    """A real run of a few seconds with every kind of figure that images give; made once, handed out as copies."""
    return copy.deepcopy(_small())


def large_card(card: Mapping[str, Any], variants: int, seed: int = 0) -> dict[str, Any]:
    """`card` with as many variants as asked: its own, over and over, with readings moved a little."""
    draw = random.Random(seed)
    made: dict[str, Any] = copy.deepcopy(dict(card))
    names = list(made["variants"])
    for i in range(variants - len(names)):
        of = names[i % len(names)]
        name = f"{of}-{i:03d}"
        made["variants"][name] = _moved(copy.deepcopy(made["variants"][of]), draw)
        made["recipe"]["variants"][name] = made["recipe"]["variants"][of]
    return made


def _moved(variant: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    for probe in variant["probes"].values():
        for cell in probe["readings"].values():
            by, most = 1 + 0.1 * (draw.random() - 0.5), 1.0 if cell["unit"] == "share" else math.inf
            for key in ("value", "low", "high"):
                cell[key] = None if cell[key] is None else min(most, cell[key] * by)
            cell["seeds"] = [None if v is None else min(most, v * by) for v in cell["seeds"]]
    return variant
