"""Claim of `accuracy`: its interval covers the true share as often as it says, where the plain one does not."""

from __future__ import annotations

import math

import torch

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.scorecard import share
from cupel.core.steps import build
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="accuracy",
    statement="Near 1, where test accuracies live, Wilson's 95% interval covers the true accuracy in at least 93% of "
    "test sets of 60 images; the interval of the normal approximation does not",
    paper="Wilson 1927 derives the interval; Brown, Cai, DasGupta 2001 report coverage near nominal for Wilson and "
    "far below it for the normal approximation",
    bounds={"wilson_coverage": ">= 0.93", "gain_over_normal": ">= 0.05"},
)


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(DigitsCnn(), Context(seed=seed))
    subject = subject.with_model(fit(subject.model, subject.data, subject.task, budget=subject.budget, seed=seed))
    right = (subject.outputs().argmax(-1) == subject.data.test.targets).double()
    truth, draw, size = float(right.mean()), seeded(seed, "resample"), 60
    wilson = normal = 0
    rounds = 500 if quick else 4000
    for _ in range(rounds):
        hits = int(right[torch.randint(len(right), (size,), generator=draw)].sum())
        r = share(hits, size)
        half = 1.96 * math.sqrt(hits / size * (1 - hits / size) / size)
        wilson += float(r.low or 0) <= truth <= float(r.high or 0)
        normal += abs(hits / size - truth) <= half
    return {
        "accuracy": truth,
        "wilson_coverage": wilson / rounds,
        "normal_coverage": normal / rounds,
        "gain_over_normal": (wilson - normal) / rounds,
    }
