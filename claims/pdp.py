"""Claim of `pdp`: soft masks made of the weights beat one-shot pruning at equal epochs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.protocols import Hook
from cupel.core.slots import phase
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.ops.masks import sparsity_of
from cupel.runner.claims import Claim
from cupel.techniques.compress.magnitude_prune import MagnitudePrune
from cupel.techniques.compress.pdp import PDP
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="pdp",
    statement="At 95% and 98% sparsity PDP keeps more accuracy than one-shot magnitude pruning with masked "
    "fine-tuning, at equal epochs and the same share per layer; cutting its soft masks hard costs at most half a point",
    paper="MobileNet-v1, ImageNet: 68.2% at 86.6% sparsity, 1.7 points over the best rival",
    bounds={"gain_95": ">= 0.02", "gain_98": ">= 0.05", "hard_cut_95": "<= 0.005", "hard_cut_98": "<= 0.005"},
    explains="One-shot pruning with its start tuned on the validation split loses only 1.0 and 3.3 points here, less "
    "than in the trial that set the bounds, so only 1.3 and 2.6 points are left to gain: PDP is ahead in all five "
    "seeds but by less than asked. A plain gradual magnitude ramp is as good as PDP (97.6 and 97.2 against "
    "97.8 and 96.9). The hard cut costs 0.8 points at 98%",
)
WARMUP = 0.1  # share of the fit after which all of them fix the layers' shares, from the same weights


def right(out: torch.Tensor, subject: Subject) -> float:
    return float((out.argmax(-1) == subject.data.test.targets).double().mean())


@dataclass(frozen=True)
class Watch:
    """Accuracy on the test split under the masks as they are just before `pdp` makes them hard."""

    subject: Subject
    after: float  # share of the fit
    seen: list[float] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Watch(self)


class _Watch(Hook):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    @phase("project")  # before the masks of the same step
    def stepped(self, at: Any) -> None:
        if at.progress >= self.watch.after and not self.watch.seen:
            with at.evaluating():
                self.watch.seen.append(right(at.output_of(self.watch.subject.data.test.whole()), self.watch.subject))


@dataclass(frozen=True)
class Cut:
    """Accuracy just after the masks of the same step; stands behind `pdp` in the list."""

    watch: Watch
    seen: list[float] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Cut(self)


class _Cut(Hook):
    def __init__(self, cut: Cut) -> None:
        self.cut = cut

    @phase("mask")
    def stepped(self, at: Any) -> None:
        if len(self.cut.watch.seen) > len(self.cut.seen):
            with at.evaluating():
                out = at.output_of(self.cut.watch.subject.data.test.whole())
            self.cut.seen.append(right(out, self.cut.watch.subject))


def measure(seed: int, quick: bool) -> dict[str, float]:
    epochs = 15 if quick else 60
    subject = build(DigitsMlp(), Context(seed=seed))
    found: dict[str, float] = {}

    def trained(*techniques: object) -> Subject:
        fresh = build(DigitsMlp(), Context(seed=seed))
        budget = replace(fresh.budget, epochs=epochs, schedule="constant")
        model = fit(fresh.model, fresh.data, fresh.task, techniques=techniques, budget=budget, seed=seed)
        return fresh.with_model(model)

    def judged(name: str, made: Subject) -> None:
        found[name] = right(made.outputs(), made)
        found[f"{name}_zeros"] = sparsity_of({n: p for n, p in made.model.named_parameters() if p.ndim > 1})

    judged("dense", trained())
    for level, s in (("95", 0.95), ("98", 0.98)):
        watch = Watch(subject, 1 - PDP().settle)
        cut = Cut(watch)
        judged(f"pdp_{level}", trained(watch, PDP(sparsity=s, warmup=WARMUP), cut))
        found[f"hard_cut_{level}"] = watch.seen[0] - cut.seen[0]
        starts = {}
        for start in (0.1, 0.5):
            starts[start] = trained(MagnitudePrune(sparsity=s, start=start, ramp=0.0, allot=WARMUP))
        valid = {k: (m.outputs("valid").argmax(-1) == m.data.valid.targets).double().mean() for k, m in starts.items()}
        best = max(valid, key=lambda k: (float(valid[k]), k))
        judged(f"one_shot_{level}", starts[best])
        found[f"one_shot_start_{level}"] = best
        judged(f"one_shot_own_{level}", trained(MagnitudePrune(sparsity=s, start=best, ramp=0.0)))  # its own ranking
        judged(f"gradual_{level}", trained(MagnitudePrune(sparsity=s, start=WARMUP, ramp=0.5)))
        judged(f"gradual_regrow_{level}", trained(MagnitudePrune(sparsity=s, start=WARMUP, ramp=0.5, regrow=True)))
        found[f"gain_{level}"] = found[f"pdp_{level}"] - found[f"one_shot_{level}"]
    return found
