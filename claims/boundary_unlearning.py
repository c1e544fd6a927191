"""Claim of `boundary-unlearning`: a class is forgotten in a fraction of the time of retraining."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.protocols import Hook, Moment
from cupel.core.shelf import FORGETTING, Shelf
from cupel.core.steps import apply, build
from cupel.core.types import Budget, Examples, Subject, outputs_on
from cupel.ops.membership import auc, logit_confidence
from cupel.runner.claims import Claim
from cupel.techniques.privacy.boundary_unlearning import BoundaryUnlearning
from cupel.workloads.vision.digits_cnn import DigitsCnn

# The bounds judge the method's default lr. Beside it stands `shrink_tuned`, with the best of five rates on run seeds
# 100 to 104, as the rates of the other forms were chosen: a finding, not a verdict.
LR = {"shrink": 1e-3, "shrink_tuned": 3e-3, "expanding": 1e-3, "random_labels": 1e-3}
CLAIM = Claim(
    method="boundary-unlearning",
    statement="Boundary Shrink forgets digit 3 (at most 5% of its test images still recognised) at a cost of at most 2 "
    "points on the other digits, three times faster than retraining, and spreads the forgotten images over classes "
    "more like the retrained network than fine-tuning on random labels does",
    paper="CIFAR-10 and VGGFace2: utility and privacy near retraining, 17 and 19 times faster",
    bounds={
        "shrink_rest_loss": "<= 0.02",
        "shrink_forget": "<= 0.05",
        "shrink_speedup": ">= 3",
        "histogram_gain": "> 0",
        "shrink_hit_rate": ">= 0.8",
    },
    explains="At the default lr the other digits lose a little more than the two points allowed. With lr 3e-3, chosen on "
    "other seeds, they lose less (shrink_tuned_rest_loss); the short fine-tuning on one class is sensitive to its rate",
)
FORGET = 3


@dataclass(frozen=True)
class FrozenNorms:
    """The baseline keeps batch norms in evaluation mode as the method does."""

    def hook(self, ctx: Context) -> Hook:
        return _Frozen()


class _Frozen(Hook):
    def start(self, at: Moment) -> None:
        for module in at.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def random_labels(subject: Subject, seed: int) -> nn.Module:
    """Baseline: forget examples with a random other label."""
    forget = subject.data.train.where(lambda b: b.targets == FORGET)
    shift = torch.randint(1, 10, (len(forget),), generator=Context(seed=seed).rng("labels"))
    data = forget.having(targets=(forget.targets + shift) % 10)
    budget = Budget(30, 64, optimizer="sgd", lr=LR["random_labels"], momentum=0.0)
    return fit(copy.deepcopy(subject.model), data, subject.task, techniques=[FrozenNorms()], budget=budget, seed=seed)


def spread(model: nn.Module, forgotten: Examples) -> Tensor:
    """Shares of the classes given to the images of the forgotten class."""
    return torch.bincount(outputs_on(model, forgotten).argmax(1), minlength=10).double() / len(forgotten)


def judge(model: nn.Module, subject: Subject) -> dict[str, float]:
    test = subject.data.test
    right = outputs_on(model, test).argmax(1) == test.targets
    gone = test.targets == FORGET
    train = subject.data.train.where(lambda b: b.targets == FORGET)
    scores = [logit_confidence(outputs_on(model, d), d.targets) for d in (train, test.take(gone))]
    return {
        "rest": float(right[~gone].double().mean()),
        "forget": float(right[gone].double().mean()),
        "forget_auc": auc(scores[0], scores[1]),
    }


def measure(seed: int, quick: bool) -> dict[str, float]:
    size = DigitsCnn(width=32)
    subject = build(size, Context(seed=seed))
    fit(subject.model, subject.data, subject.task, budget=subject.budget, seed=seed)
    nets, seconds = {"original": subject.model}, {}

    began = time.perf_counter()
    fresh = build(size, Context(seed=seed)).model
    rest = subject.data.train.where(lambda b: b.targets != FORGET)
    nets["retrained"] = fit(fresh, rest, subject.task, budget=subject.budget, seed=seed)
    seconds["retrained"] = time.perf_counter() - began

    notes = {}
    for name in ("shrink", "shrink_tuned", "expanding"):
        shelf = Shelf(subject.data.fingerprint)
        began = time.perf_counter()
        method = BoundaryUnlearning(forget=FORGET, form=name.removesuffix("_tuned"), lr=LR[name])
        nets[name] = apply(method, replace(subject, shelf=shelf), seed=seed).model
        seconds[name] = time.perf_counter() - began
        notes |= shelf.get(FORGETTING)
    nets["random_labels"] = random_labels(subject, seed)

    found = {f"{name}_{k}": v for name, net in nets.items() for k, v in judge(net, subject).items()}
    test = subject.data.test.where(lambda b: b.targets == FORGET)
    train = subject.data.train.where(lambda b: b.targets == FORGET)
    gone = Examples(torch.cat([train.inputs, test.inputs]), torch.cat([train.targets, test.targets]),
                    torch.cat([train.index, test.index]))  # fmt: skip
    like = spread(nets["retrained"], gone)
    for name in LR:
        found[f"{name}_histogram_distance"] = 0.5 * float((spread(nets[name], gone) - like).abs().sum())
        found[f"{name}_rest_loss"] = found["original_rest"] - found[f"{name}_rest"]
    for name in ("shrink", "expanding"):
        found[f"{name}_speedup"] = seconds["retrained"] / seconds[name]
    found["shrink_hit_rate"] = notes["unlearning_hit_rate"]
    found["shrink_eps"] = notes["unlearning_eps"]
    found["histogram_gain"] = found["random_labels_histogram_distance"] - found["shrink_histogram_distance"]
    return found
