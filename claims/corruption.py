"""Claim of `corruption`: damage costs far more accuracy than the clean figure hints, step by step; width helps."""

from __future__ import annotations

from itertools import pairwise

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.probes.robust.corruption import Corruption
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="corruption",
    statement="On digits a network that is right on 97% of clean images loses 0.15 of its accuracy or more under the "
    "twenty corruptions, every kind costs more the stronger it is, and a wide network keeps more than a narrow one",
    paper="ImageNet: ResNet-50 errs on 23.9% of clean images; its corruption error is 76.7% of AlexNet's, its loss "
    "relative to clean 105.0% of AlexNet's; within a family larger networks have lower corruption error",
    bounds={"clean": ">= 0.97", "drop": ">= 0.15", "share_of_steps_down": ">= 0.95", "gain_by_width": ">= 0.01"},
)


def measured(width: int, seed: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    subject = build(DigitsCnn(width=width), Context(seed=seed))
    model = fit(subject.model, subject.data, subject.task, budget=subject.budget, seed=seed)
    found = Corruption().measure(subject.with_model(model), Context(seed=seed))
    values = {name: reading.value for name, reading in found.items()} | {"clean": found.figures["clean"]}
    return values, found.figures["severity"]


def measure(seed: int, quick: bool) -> dict[str, float]:
    wide, levels = measured(16 if quick else 32, seed)
    narrow, _ = measured(8, seed)
    steps = [b <= a for curve in levels.values() for a, b in pairwise(curve)]
    return {
        **wide,
        "drop": wide["clean"] - wide["corruption_accuracy"],
        "share_of_steps_down": sum(steps) / len(steps),
        "gain_by_width": wide["corruption_accuracy"] - narrow["corruption_accuracy"],
        "clean_narrow": narrow["clean"],
        "corruption_accuracy_narrow": narrow["corruption_accuracy"],
    }
