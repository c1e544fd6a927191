"""Claim of `label-issues`: planted wrong labels are found, with fewer false alarms than plain disagreement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.steps import FitStep, build
from cupel.core.types import Subject, TrainView
from cupel.ops.confident import self_confidence, suspects
from cupel.probes.data.label_issues import LabelIssues, noise_of
from cupel.runner.bench import prepare
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="label-issues",
    statement="On digits with 20% of the training labels wrong, evenly or always as the next digit, four-fold "
    "confident learning finds them with an F1 of 0.85 (0.8) or more, is more precise by 0.02 or more than plain "
    "disagreement of the same probabilities and no worse in F1, and estimates their share to within 0.05",
    paper="CIFAR-10, 20% to 70% wrong labels: confident learning finds label errors with higher precision and F1 than "
    "the disagreement of the most probable class, its baseline (JAIR 2021, section 5)",
    bounds={
        "uniform_f1": ">= 0.85",
        "next_f1": ">= 0.8",
        "uniform_precision_gain": ">= 0.02",
        "next_precision_gain": ">= 0.02",
        "uniform_f1_gain": ">= 0",
        "next_f1_gain": ">= 0",
        "uniform_noise_error": "<= 0.05",
        "next_noise_error": "<= 0.05",
    },
)


@dataclass(frozen=True)
class Spoilt:
    """Digits whose training labels are wrong at a known rate."""

    kind: str
    rate: float
    seed: int
    examples: int

    def build(self, ctx: Context) -> Subject:
        subject = build(DigitsMlp(examples=self.examples, data_seed=self.seed), ctx)
        return subject.with_data(subject.data.seen_as(self.spoilt(subject.data.view())))

    def spoilt(self, view: TrainView) -> TrainView:
        draw = torch.Generator().manual_seed(self.seed)
        truth = view.train.targets
        wrong = torch.rand(len(truth), generator=draw) < self.rate
        step = torch.randint(1, 10, truth.shape, generator=draw) if self.kind == "uniform" else 1
        return view.with_train(view.train.having(targets=torch.where(wrong, (truth + step) % 10, truth)))


def scores(named: Tensor, wrong: Tensor) -> tuple[float, float, float]:
    """Precision, recall and F1."""
    hits = float((named & wrong).sum())
    precision, recall = hits / max(float(named.sum()), 1.0), hits / float(wrong.sum())
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)


def measured(kind: str, rate: float, seed: int, quick: bool) -> dict[str, float]:
    workload = Spoilt(kind, rate, seed, 900 if quick else 0)
    subject, ctx = prepare(workload, [FitStep({"epochs": 15})], seed)
    truth = build(DigitsMlp(examples=workload.examples, data_seed=seed), Context()).data.train.targets
    p, labels, _ = LabelIssues(folds=4).judged(subject, ctx)
    wrong = labels != truth
    own = self_confidence(p, labels)
    noise = noise_of(p, labels)[0]
    least = torch.zeros_like(wrong)
    least[own.argsort()[: round(noise * len(labels))]] = True
    rules = {
        "": suspects(p, labels),
        "off_diagonal_": suspects(p, labels, "off-diagonal"),
        "argmax_": p.argmax(1) != labels,
        "least_confident_": least,
    }
    found = {rule: scores(named, wrong) for rule, named in rules.items()}
    return {
        "precision_gain": found[""][0] - found["argmax_"][0],
        "f1_gain": found[""][2] - found["argmax_"][2],
        "noise_error": abs(noise - float(wrong.double().mean())),
        "random_precision": float(wrong.double().mean()),
        **{
            f"{rule}{name}": value
            for rule, values in found.items()
            for name, value in zip(("precision", "recall", "f1"), values, strict=True)
        },
    }


def measure(seed: int, quick: bool) -> dict[str, float]:
    kinds = [("uniform", "uniform", 0.2), ("next", "next", 0.2)]
    kinds += [] if quick else [("next40", "next", 0.4)]
    return {
        f"{label}_{name}": value
        for label, kind, rate in kinds
        for name, value in measured(kind, rate, seed, quick).items()
    }
