"""Claim of `cifar10-resnet20`: a short fit of the narrow network learns; the full fit is not measured here."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Budget, Subject
from cupel.runner.claims import Claim
from cupel.workloads.vision.cifar10_resnet20 import Cifar10Resnet20

CLAIM = Claim(
    method="cifar10-resnet20",
    statement="A half-width ResNet-20 trained for 6 epochs on 4,000 of the images labels at least 0.38 of the test "
    "images rightly and beats a linear classifier on the same images by 5 points. The workload's own fit (full width, 9,000 "
    "images, 10 epochs) takes over ten minutes on one core and is not part of this claim",
    paper="0.9125 with 45,000 images, augmentation and 64,000 updates (He et al. 2016, table 6)",
    bounds={"accuracy": ">= 0.38", "gain_over_linear": ">= 0.05"},
    seeds=(10, 11, 12),
    quick_seeds=1,
)


def accuracy(subject: Subject, seed: int, model: nn.Module, budget: Budget) -> float:
    done = subject.with_model(fit(model, subject.data, subject.task, budget=budget, seed=seed))
    return float((done.outputs().argmax(1) == subject.data.test.targets).double().mean())


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(Cifar10Resnet20(width=8, train_examples=4000), Context(seed=seed))
    epochs = 2 if quick else 6
    with Context(seed=seed).scope("linear"):
        linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    adam = Budget(epochs=4 if quick else 15, batch_size=64, lr=3e-4, schedule="cosine")
    ours = accuracy(subject, seed, subject.model, replace(subject.budget, epochs=epochs))
    plain = accuracy(subject, seed, linear, adam)
    return {"accuracy": ours, "linear_accuracy": plain, "gain_over_linear": ours - plain}
