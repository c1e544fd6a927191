"""Claim of `calibration`: a network trained to the end boasts, and one temperature takes most of it back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.probes.quality.calibration import Calibration
from cupel.runner.claims import Claim
from cupel.workloads.vision.fashion_mnist_cnn import FashionMnistCnn

CLAIM = Claim(
    method="calibration",
    statement="A convolutional network trained to the end on 1,000 images of Fashion-MNIST is overconfident, "
    "and one temperature fitted on validation data removes at least half of the ece above what chance explains",
    paper="ResNet-110, CIFAR-100: ece 16.53% before, 1.26% after temperature scaling; CIFAR-10: 4.60% and 0.83%",
    bounds={"ece_above_chance": ">= 0.03", "share_overconfident": ">= 0.8", "excess_kept": "<= 0.5"},
)


class Tempered(nn.Module):
    """Logits divided by one number."""

    def __init__(self, inner: nn.Module, temperature: float) -> None:
        super().__init__()
        self.inner, self.temperature = inner, temperature

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / self.temperature


def best_temperature(subject: Subject) -> float:
    """The temperature of least log loss on the validation split, from 200 between 1/4 and 16."""
    out, batch = subject.outputs("valid"), subject.data.valid.whole()
    grid = torch.logspace(-2, 4, 200, base=2).tolist()
    return min(grid, key=lambda t: float(subject.task.loss(out / t, batch)))


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(FashionMnistCnn(width=8, train_examples=1000, examples=2000), Context(seed=seed))
    budget = replace(subject.budget, epochs=15 if quick else 25, schedule="constant")
    subject = subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget, seed=seed))
    temperature = best_temperature(subject)
    plain = Calibration().measure(subject, Context(seed=seed))
    cooled = Calibration().measure(subject.with_model(Tempered(subject.model, temperature)), Context(seed=seed))
    excess = [r["ece"].value - r["ece_by_chance"].value for r in (plain, cooled)]
    right = subject.outputs().argmax(1) == subject.data.test.targets
    return {
        "ece_above_chance": excess[0],
        "share_overconfident": plain["overconfidence"].value / plain["ece"].value,
        "excess_kept": excess[1] / excess[0],
        "ece_before": plain["ece"].value,
        "ece_after": cooled["ece"].value,
        "nll_before": plain["nll"].value,
        "nll_after": cooled["nll"].value,
        "brier_before": plain["brier"].value,
        "brier_after": cooled["brier"].value,
        "temperature": temperature,
        "train_loss": float(subject.task.loss(subject.outputs("train"), subject.data.train.whole())),
        "accuracy": float(right.double().mean()),
    }
