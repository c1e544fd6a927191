"""Claim of `jei-dnn`: exits trained with their gates are better calibrated than a threshold at the same cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.types import Budget, Examples, Subject
from cupel.ops.calibration import bin_edges, binned
from cupel.ops.exits import EarlyExit
from cupel.runner.claims import Claim
from cupel.techniques.compress.jei_dnn import JeiDnn
from cupel.workloads.vision.fashion_mnist_cnn import FashionMnistCnn

CLAIM = Claim(
    method="jei-dnn",
    statement="On a frozen CNN for Fashion-MNIST, at equal mean cost (prices 0.05, 0.2, 0.5), jointly trained exits have a "
    "lower calibration error than heads trained alone with a threshold on the largest probability tuned on the test "
    "cost, within a point of its accuracy; cost falls with its price, and gates beat random exits",
    paper="better accuracy-cost curves, lower ECE and smaller conformal sets than thresholds on T2T-ViT-7/14, CIFAR-10/100",
    bounds={
        "ece_gain": "> 0",
        "accuracy_gain": ">= -0.01",
        "cost_rises": "<= 0",
        "gain_over_random": ">= 0.005",
    },
    seeds=(0, 1, 2),
    quick_seeds=1,
)
PRICES = (0.0, 0.05, 0.2, 0.5)


def ece(logits: Tensor, targets: Tensor) -> float:
    confidence, guess = logits.softmax(1).max(1)
    return float(binned(confidence, guess == targets, bin_edges(confidence, 15, "equal-width")).gaps.abs().sum())


def share(logits: Tensor, targets: Tensor) -> float:
    return float((logits.argmax(1) == targets).double().mean())


@torch.no_grad()
def tapped(net: EarlyExit, data: Examples) -> list[Tensor]:
    """Features of every exit and the backbone's logits on all of `data`."""
    return [torch.cat(parts) for parts in zip(*(net.tapped(b.inputs) for b in data.batches(500)), strict=True)]


def heads_alone(train: list[Tensor], test: list[Tensor], subject: Subject, seed: int, epochs: int) -> list[Tensor]:
    """Test logits `[N, K]` of every exit, each head trained on all training rows by plain cross-entropy."""
    budget = Budget(epochs=epochs, batch_size=64, optimizer="sgd", lr=0.01, weight_decay=5e-4, schedule="cosine")
    found = []
    for level, (x, seen) in enumerate(zip(train[:-1], test[:-1], strict=True)):
        mean, std = x.mean(0), x.std(0).clamp_min(1e-5)
        with Context(seed=seed).scope(f"head-{level}"):
            head = nn.Linear(x.shape[1], 10)
        rows = subject.data.train.having(inputs=(x - mean) / std)
        fit(head, rows, subject.task, budget=budget, seed=seed)
        with torch.no_grad():
            found.append(head((seen - mean) / std))
    return [*found, test[-1]]


def by_threshold(logits: list[Tensor], costs: Tensor, wanted: float) -> tuple[Tensor, float]:
    """Logits of the first exit whose largest probability passes the threshold that comes nearest to a mean cost."""
    best: tuple[float, Tensor, float] | None = None
    for threshold in torch.linspace(0.1, 1.0, 181).tolist():
        go = torch.stack([out.softmax(1).amax(1) >= threshold for out in logits[:-1]], 1)
        taken = torch.cat([go, torch.ones(len(go), 1, dtype=torch.bool)], 1).int().argmax(1)
        cost = float(costs[taken].double().mean())
        if best is None or abs(cost - wanted) < abs(best[2] - wanted):
            best = (threshold, torch.stack(logits, 1)[torch.arange(len(taken)), taken], cost)
    assert best is not None
    return best[1], best[2]


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(FashionMnistCnn(width=8, train_examples=3000 if quick else 6000), Context(seed=seed))
    few = {part: getattr(subject.data, part).take(torch.arange(1000)) for part in ("valid", "test") if quick}
    subject = subject.with_data(replace(subject.data, **few))
    budget = replace(subject.budget, epochs=2 if quick else 4)
    subject = subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget, seed=seed))
    test = subject.data.test
    found = {
        "backbone_accuracy": share(subject.outputs(), test.targets),
        "backbone_ece": ece(subject.outputs(), test.targets),
    }
    tap = EarlyExit(subject.model, subject.anatomy.blocks[:-1], JeiDnn().pool, False)
    features = tapped(tap, test)
    # Passes of the warm-up and of the joint phases together.
    alone = heads_alone(tapped(tap, subject.data.train), features, subject, seed, epochs=14)
    rows = {}
    settings = {
        **{f"{p:g}": JeiDnn(cost_weight=p) for p in PRICES},
        "0.2_unbalanced": JeiDnn(cost_weight=0.2, balance=0.0),
    }
    for name, method in settings.items():
        net = apply(method, subject, seed=seed).model
        with torch.no_grad():
            out, taken = (torch.cat(p) for p in zip(*(net.exits(b.inputs) for b in test.batches(500)), strict=True))
            each = [h(f) for h, f in zip(net.heads, features, strict=False)] + [alone[-1]]
        spread = taken.bincount(minlength=len(each)) / len(taken)
        rival, rival_cost = by_threshold(alone, net.costs, net.mean_cost(taken))
        rows[name] = {
            "cost": net.mean_cost(taken), "accuracy": share(out, test.targets), "ece": ece(out, test.targets),
            "threshold_cost": rival_cost, "threshold_accuracy": share(rival, test.targets),
            "threshold_ece": ece(rival, test.targets),
            "random_accuracy": sum(float(s) * share(e, test.targets) for s, e in zip(spread, each, strict=True)),
        }  # fmt: skip
    found |= {f"{quantity}_at_{name}": value for name, row in rows.items() for quantity, value in row.items()}
    priced = [rows[f"{p:g}"] for p in PRICES[1:]]
    costs = [rows[f"{p:g}"]["cost"] for p in PRICES]
    found["ece_gain"] = sum(r["threshold_ece"] - r["ece"] for r in priced) / len(priced)
    found["accuracy_gain"] = sum(r["accuracy"] - r["threshold_accuracy"] for r in priced) / len(priced)
    found["cost_rises"] = float(sum(b > a + 1e-9 for a, b in pairwise(costs)))
    found["gain_over_random"] = sum(r["accuracy"] - r["random_accuracy"] for r in priced) / len(priced)
    return found
