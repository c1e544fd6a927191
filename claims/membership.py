"""Claim of `membership`: shadow networks find exposed examples that a threshold on the loss cannot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from cupel.core.context import Context
from cupel.core.steps import FitStep
from cupel.core.tasks import Classification
from cupel.core.types import Bounds, Budget, Splits, Subject
from cupel.data.cifar import cifar10
from cupel.nets.mlp import Mlp
from cupel.probes.privacy.membership import Membership
from cupel.runner.bench import prepare
from cupel.runner.claims import Claim

CLAIM = Claim(
    method="membership",
    statement="On a network that overfits, LiRA with 16 shadows names at least 5 points more of the members at 1% false "
    "alarms than the threshold on the loss does, at an AUC at least 0.02 higher; both find nothing (AUC within 0.03 of "
    "one half) in an untrained network, and the threshold finds less in one trained for a tenth of the epochs",
    paper="CIFAR-10, wide ResNet: 8.4% of members at 0.1% false alarms against 0.0% for the loss; balanced accuracy "
    "63.8% against 59.4%",
    bounds={"tpr_gain": ">= 0.05", "auc_gain": ">= 0.02", "fresh_auc_off": "<= 0.03", "short_gain": "> 0"},
    quick_seeds=1,
)


@lru_cache(maxsize=1)
def data() -> Splits:
    """500 training and 500 test images, 50 of every class, halved to 16x16."""
    whole = cifar10(train=500, valid=100, data_seed=0)
    test = whole.test.take(torch.arange(500))  # the file goes round the classes
    shrink = nn.AvgPool2d(2)
    return Splits(*(p.having(inputs=shrink(p.inputs)) for p in (whole.train, whole.valid, test)))


@dataclass(frozen=True)
class SmallCifar:
    """A perceptron on a small part of CIFAR-10: it learns its training images by heart."""

    def build(self, ctx: Context) -> Subject:
        with ctx.scope("init"):
            net = Mlp(768, (128, 128), 10)
        return Subject(net, data(), Classification(10), budget=Budget(60, 64, lr=2e-3), bounds=Bounds())


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject, ctx = prepare(SmallCifar(), [FitStep()], seed)
    shadows = 8 if quick else 16
    found = {}
    for name, probe in (("loss", Membership()), ("lira", Membership(attack="lira", shadows=shadows))):
        found |= {f"{name}_{k.removeprefix('membership_')}": r.value for k, r in probe.measure(subject, ctx).items()}
    for name, epochs in (("fresh", 0), ("short", 6)):
        other, there = prepare(SmallCifar(), [FitStep({"epochs": epochs})], seed)
        found[f"{name}_auc"] = Membership().measure(other, there)["membership_auc"].value
    for split in ("train", "test"):
        guess = subject.outputs(split).argmax(1)
        found[f"{split}_accuracy"] = float((guess == getattr(subject.data, split).targets).double().mean())
    found["tpr_gain"] = found["lira_tpr_at_1fpr"] - found["loss_tpr_at_1fpr"]
    found["auc_gain"] = found["lira_auc"] - found["loss_auc"]
    found["fresh_auc_off"] = abs(found["fresh_auc"] - 0.5)
    found["short_gain"] = found["loss_auc"] - found["short_auc"]
    return found
