"""Claim of `prune-mia`: SAMIA beats the confidence threshold; the leak of pruning comes from its extra epochs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from cupel.core.context import Context
from cupel.core.steps import FitStep, Step
from cupel.core.tasks import Classification
from cupel.core.types import Bounds, Budget, Splits, Subject
from cupel.data.cifar import cifar10
from cupel.nets.mlp import Mlp
from cupel.probes.privacy.prune_mia import PruneMIA
from cupel.runner.bench import Bench
from cupel.runner.claims import Claim
from cupel.techniques.compress.magnitude_prune import MagnitudePrune
from cupel.techniques.privacy.ppb import PPB

CLAIM = Claim(
    method="prune-mia",
    statement="On a network that overfits, SAMIA tells members 2 points better than per-class confidence thresholds; "
    "training half as long again makes it 3 points better whether or not the network is pruned to 60% first; PPB with "
    "weight 4 while retraining takes 5 points from it",
    paper="CIFAR-10, CIFAR-100, SVHN and others, 4 pruners: SAMIA beats 8 attacks; PPB lowers its accuracy at equal "
    "sparsity",
    bounds={"samia_gain": ">= 0.02", "retraining_rise": ">= 0.03", "ppb_drop": ">= 0.05"},
    seeds=(0, 1, 2),
    quick_seeds=1,
)


@lru_cache(maxsize=2)
def data(images: int) -> Splits:
    """Images halved to 16x16; prune-mia makes its own splits: of 4,000, 900 members and 900 others a side."""
    whole = cifar10(train=images // 2 - 100, valid=100, data_seed=0)
    shrink = nn.AvgPool2d(2)
    train, valid, test = (p.having(inputs=shrink(p.inputs)) for p in (whole.train, whole.valid, whole.test))
    return Splits(train, valid, test.take(torch.arange(images // 2)))


@dataclass(frozen=True)
class SmallCifar:
    """A perceptron, 768-128-128-10, on a small part of CIFAR-10."""

    images: int = 4000

    def build(self, ctx: Context) -> Subject:
        with ctx.scope("init"):
            net = Mlp(768, (128, 128), 10)
        return Subject(net, data(self.images), Classification(10), budget=Budget(120, 100, lr=1.5e-3), bounds=Bounds())


def recipes(quick: bool) -> dict[str, list[Step]]:
    first, again = {"epochs": 60 if quick else 120}, {"epochs": 30 if quick else 60}
    prune = ("magnitude-prune", MagnitudePrune(sparsity=0.6, start=0.0, ramp=0.0))
    return {
        "original": [FitStep(first)],
        "retrained": [FitStep(first), FitStep(again)],
        "pruned": [FitStep(first), FitStep(again, [prune])],
        "pruned_ppb": [FitStep(first), FitStep(again, [prune, ("ppb", PPB(weight=4.0))])],
    }


def measure(seed: int, quick: bool) -> dict[str, float]:
    found = {}
    for name, steps in recipes(quick).items():
        bench = Bench(SmallCifar(1600 if quick else 4000), steps, seed)
        subject = bench.start()  # never trained: the probe looks at forks alone
        ctx = bench.context(subject.shelf, forks=True)
        for reading, r in PruneMIA(epochs=4 if quick else 8).measure(subject, ctx).items():
            found[f"{name}_{reading}"] = r.value
    found["samia_gain"] = found["original_samia_accuracy"] - found["original_confidence_accuracy"]
    found["retraining_rise"] = found["retrained_samia_accuracy"] - found["original_samia_accuracy"]
    found["pruning_over_control"] = found["pruned_samia_accuracy"] - found["retrained_samia_accuracy"]
    found["ppb_drop"] = found["pruned_samia_accuracy"] - found["pruned_ppb_samia_accuracy"]
    found["ppb_cost"] = found["pruned_victim_test_accuracy"] - found["pruned_ppb_victim_test_accuracy"]
    return found
