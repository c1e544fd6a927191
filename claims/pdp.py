"""Claim of `pdp`: soft masks made of the weights beat one-shot pruning at equal epochs."""

from __future__ import annotations

from dataclasses import replace

import torch

from cupel.core.claims import Claim
from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.types import Subject
from cupel.techniques.compress.magnitude_prune import MagnitudePrune
from cupel.techniques.compress.pdp import PDP
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="pdp",
    statement="At 95% and 98% sparsity PDP keeps more accuracy than one-shot magnitude pruning with masked fine-tuning, "
    "at equal epochs and the same share per layer",
    paper="MobileNet-v1, ImageNet: 68.2% at 86.6% sparsity, 1.7 points over the best rival",
    bounds={"gain_95": ">= 0.02", "gain_98": ">= 0.05"},
)


def accuracy(subject: Subject) -> float:
    targets = torch.cat([b.targets for b in subject.data.test.batches(500)])
    return float((subject.outputs().argmax(-1) == targets).double().mean())


def measure(seed: int, quick: bool) -> dict[str, float]:
    epochs = 30 if quick else 60
    found = {}
    for level, sparsity in (("95", 0.95), ("98", 0.98)):
        score = {}
        for name, technique in (
            ("pdp", PDP(sparsity=sparsity, warmup=0.1, ramp=0.5)),
            ("one_shot", MagnitudePrune(sparsity=sparsity, start=0.5, ramp=0.0)),
        ):
            subject = DigitsMlp().build(Context(seed=seed))
            budget = replace(subject.budget, epochs=epochs)
            model = fit(subject.model, subject.data, subject.task, techniques=[technique], budget=budget, seed=seed)
            score[name] = accuracy(subject.with_model(model))
            found[f"{name}_{level}"] = score[name]
        found[f"gain_{level}"] = score["pdp"] - score["one_shot"]
    return found
