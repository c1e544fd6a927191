"""Claim of `subnetwork-inference`: a posterior over a tenth of the weights keeps a network honest under rotation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context, global_seed, seeded
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.types import Bounds, Splits, Subject, outputs_on, still
from cupel.nets.mlp import Mlp
from cupel.ops.attacks import pgd
from cupel.ops.calibration import bin_edges, binned
from cupel.ops.corruptions import gaussian_blur
from cupel.ops.threats import Threat, attacked
from cupel.runner.claims import Claim
from cupel.techniques.robust.subnetwork_inference import SubnetworkInference
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="subnetwork-inference",
    statement="On 400 digits, a network of 6,310 weights with a full-covariance posterior over the 600 of largest "
    "variance, the prior chosen on clean validation digits alone, has at most 0.65 of the plain network's log loss on test "
    "digits turned by 30, 60 and 90 degrees (mean of the three), less than with 600 drawn weights, for at most 0.01 nats "
    "and 1.5 points of accuracy on clean digits",
    paper="ResNet18 with 0.38% of the weights: better log loss than MAP, diagonal Laplace, dropout, SWAG and 5-net ensembles "
    "on rotated MNIST and corrupted CIFAR-10",
    bounds={
        "rotated_nll_share_of_plain": "<= 0.65",
        "rotated_nll_share_of_random": "< 1.0",
        "clean_nll_cost": "<= 0.01",
        "clean_accuracy_change": "<= 0.015",
    },
)
SIZE, ANGLES = 600, (30, 60, 90)
EPS = 0.1


def turned(x: Tensor, degrees: float) -> Tensor:
    """Images `[N, 1, H, W]` turned about their middle, black beyond the edge."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    plane = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(plane, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": lambda x: x,
    **{f"turned_{a}": (lambda x, a=a: turned(x, a)) for a in ANGLES},  # type: ignore[misc]
    "dimmed": lambda x: 0.4 * x,  # leaves dark what was dark in training
    "blurred": lambda x: gaussian_blur(x, 1.0),
}


def scores(out: Tensor, y: Tensor) -> dict[str, float]:
    """Log loss, calibration error in 15 bins, accuracy."""
    p = out.double().softmax(1)
    right = p.argmax(1) == y
    bins = binned(p.amax(1), right, bin_edges(p.amax(1), 15, "equal-width"))
    nll = float(F.cross_entropy(out.double(), y))
    return {"nll": nll, "ece": float(bins.gaps.abs().sum()), "accuracy": float(right.double().mean())}


@dataclass(frozen=True)
class Dropped:
    """The mean softmax over forwards with dropout left on."""

    model: nn.Module
    seed: int
    passes: int = 30

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad(), global_seed(self.seed):
            self.model.train()
            out = torch.stack([self.model(x).log_softmax(1) for _ in range(self.passes)])
            self.model.eval()
        return out.logsumexp(0) - math.log(self.passes)


def with_dropout(rate: float, seed: int) -> nn.Module:
    with global_seed(seed):
        net = Mlp(features=64, hidden=(50, 50), classes=10)
    for name in net.blocks:
        net.get_submodule(name).add_module("drop", nn.Dropout(rate))
    return net


def dropout(subject: Subject, seed: int, quick: bool) -> Callable[[Tensor], Tensor]:
    """The rate that is best on clean validation digits, as the prior of the others is."""
    valid, found = subject.data.valid, {}
    for rate in (0.2,) if quick else (0.1, 0.3):
        net = fit(with_dropout(rate, seed), subject.data, subject.task, budget=subject.budget, seed=seed)
        rule = Dropped(net, seed)
        found[float(F.cross_entropy(rule(valid.inputs), valid.targets))] = rule
    return found[min(found)]


def ensemble(subject: Subject, seed: int, count: int) -> Callable[[Tensor], Tensor]:
    """The mean softmax of the plain network and others from other starts."""
    nets = [subject.model]
    for k in range(1, count):
        with global_seed(1000 * seed + k):
            net = Mlp(features=64, hidden=(50, 50), classes=10)
        nets.append(fit(net, subject.data, subject.task, budget=subject.budget, seed=1000 * seed + k))

    def rule(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([n(x).log_softmax(1) for n in nets]).logsumexp(0) - math.log(count)

    return rule


def standing(model: nn.Module, subject: Subject, seed: int, count: int) -> float:
    """Share of test digits that stay right under PGD through all of `model`, covariance included."""
    test = subject.data.test
    threat = Threat("linf", EPS, Bounds(), steps=20, restarts=2)
    with still(model):
        return attacked(pgd, model, test.inputs[:count], test.targets[:count], threat, seeded(seed, "pgd")).robust


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(DigitsMlp(hidden=(50, 50)), Context(seed=seed))
    data = subject.data
    subject = subject.with_data(Splits(data.train.take(torch.arange(400)), data.valid, data.test))
    subject = replace(subject, budget=replace(subject.budget, epochs=120 if quick else 200, batch_size=100, lr=3e-3))
    subject = subject.with_model(fit(subject.model, subject.data, subject.task, budget=subject.budget, seed=seed))

    def net(**told: object) -> nn.Module:
        return apply(SubnetworkInference(size=SIZE, **told), subject, seed=seed).model  # type: ignore[arg-type]

    ours = net()
    nets = {
        "plain": subject.model,
        "subnetwork": ours,
        "with_silent": net(silent=True),
        "random": net(choice="random"),
        "last_layer": net(choice="last"),
        "diagonal": net(choice="all", covariance="diagonal"),
        "diagonal_of_subnetwork": net(covariance="diagonal"),
        "evidence": net(tune="evidence"),
    }
    rules: dict[str, Callable[[Tensor], Tensor]] = {
        **{name: (lambda x, m=m: outputs_on(m, data.test.having(inputs=x))) for name, m in nets.items()},  # type: ignore[misc]
        "dropout": dropout(subject, seed, quick),
        "ensemble": ensemble(subject, seed, 2 if quick else 5),
    }
    found: dict[str, float] = {}
    for name, rule in rules.items():
        for shift, change in SHIFTS.items():
            for what, value in scores(rule(change(data.test.inputs)), data.test.targets).items():
                found[f"{name}_{shift}_{what}"] = value
        found[f"{name}_rotated_nll"] = sum(found[f"{name}_turned_{a}_nll"] for a in ANGLES) / len(ANGLES)
    count = 20 if quick else 60
    return {
        "adaptive_robust_accuracy_pgd20x2_linf_0.1": standing(ours, subject, seed, count),
        "plain_robust_accuracy_pgd20x2_linf_0.1": standing(subject.model, subject, seed, count),
        "rotated_nll_share_of_plain": found["subnetwork_rotated_nll"] / found["plain_rotated_nll"],
        "rotated_nll_share_of_random": found["subnetwork_rotated_nll"] / found["random_rotated_nll"],
        "rotated_nll_share_of_ensemble": found["subnetwork_rotated_nll"] / found["ensemble_rotated_nll"],
        "rotated_nll_share_of_dropout": found["subnetwork_rotated_nll"] / found["dropout_rotated_nll"],
        "with_silent_rotated_nll_share_of_plain": found["with_silent_rotated_nll"] / found["plain_rotated_nll"],
        "clean_nll_cost": found["subnetwork_clean_nll"] - found["plain_clean_nll"],
        "clean_accuracy_change": abs(found["subnetwork_clean_accuracy"] - found["plain_clean_accuracy"]),
        **found,
    }
