"""Claim of `magnitude-prune`: a large network pruned gradually beats a small dense one of the same size."""

from __future__ import annotations

from dataclasses import replace

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.runner.claims import Claim
from cupel.techniques.compress.magnitude_prune import MagnitudePrune
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="magnitude-prune",
    statement="A 300-100 network pruned to 90, 95 or 98% zeros along the cubic ramp is more accurate than a dense "
    "network with at least as many non-zero parameters, at equal epochs",
    paper="MobileNet, ImageNet: 67.7% at 75% zeros against 63.7% of a dense one of that size; 61.8% and 50.6% at 90%",
    bounds={"margin_90": ">= 0.0", "margin_95": ">= 0.005", "margin_98": ">= 0.01"},
    quick_seeds=1,
)
SMALL = {0.9: (62, 20), 0.95: (37, 12), 0.98: (18, 9)}  # dense hidden sizes with no fewer parameters than are non-zero


def right(subject: Subject, split: str = "test") -> float:
    return float((subject.outputs(split).argmax(-1) == getattr(subject.data, split).targets).double().mean())


def nonzero(subject: Subject) -> float:
    return float(sum(int((p != 0).sum()) for p in subject.model.parameters()))


def measure(seed: int, quick: bool) -> dict[str, float]:
    epochs = 30 if quick else 60

    def trained(hidden: tuple[int, ...], *techniques: object, lr: float = 2e-3, schedule: str = "constant") -> Subject:
        subject = build(DigitsMlp(hidden=hidden), Context(seed=seed))
        budget = replace(subject.budget, epochs=epochs, lr=lr, schedule=schedule)
        model = fit(subject.model, subject.data, subject.task, techniques=techniques, budget=budget, seed=seed)
        return subject.with_model(model)

    found = {"dense_large": right(trained((300, 100)))}
    for sparsity, hidden in SMALL.items():
        level = round(100 * sparsity)
        large = trained((300, 100), MagnitudePrune(sparsity=sparsity, start=0.1, ramp=0.5))
        # The small network gets its own tuning on the validation split; the pruned one has a single setting.
        tuned = [trained(hidden, lr=lr, schedule=s) for lr in (2e-3, 6e-3) for s in ("constant", "cosine")]
        small = max(tuned, key=lambda made: right(made, "valid"))
        found |= {f"large_sparse_{level}": right(large), f"small_dense_{level}": right(small)}
        found |= {f"nonzero_large_{level}": nonzero(large), f"nonzero_small_{level}": nonzero(small)}
        found[f"one_shot_{level}"] = right(trained((300, 100), MagnitudePrune(sparsity=sparsity, start=0.1, ramp=0.0)))
        found[f"margin_{level}"] = found[f"large_sparse_{level}"] - found[f"small_dense_{level}"]
    return found
