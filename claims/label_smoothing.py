"""Claim of `label-smoothing`: no accuracy is lost, and confidence falls to what was asked for."""

from __future__ import annotations

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.runner.claims import Claim
from cupel.techniques.train.label_smoothing import LabelSmoothing
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="label-smoothing",
    statement="Smoothing by 0.1 does not lower test accuracy, and takes the mean top confidence from near 1 to near 0.91",
    paper="ImageNet, Inception-v2: about 0.2 points of top-1 error less",
    bounds={"accuracy_gain": ">= 0.0", "confidence": "<= 0.95"},
)


def measure(seed: int, quick: bool) -> dict[str, float]:
    found = {}
    for name, techniques in (("plain", []), ("smooth", [LabelSmoothing(0.1)])):
        subject = build(DigitsCnn(), Context(seed=seed))
        net = fit(subject.model, subject.data, subject.task, techniques=techniques, budget=subject.budget, seed=seed)
        out = subject.with_model(net).outputs().softmax(-1)
        found[f"{name}_accuracy"] = float((out.argmax(-1) == subject.data.test.targets).double().mean())
        found[f"{name}_confidence"] = float(out.amax(-1).double().mean())
    gain = found["smooth_accuracy"] - found["plain_accuracy"]
    return found | {"accuracy_gain": gain, "confidence": found["smooth_confidence"]}
