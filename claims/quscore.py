"""Claim of `quscore`: seeds from a copy save queries; whether a copy's kept maps are kept on the network is asked apart."""

from __future__ import annotations

from functools import partial

from torch import nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import FitStep, build
from cupel.ops.labelled import evenly
from cupel.ops.saliency import Interpreter, activation_maps, gradient_maps
from cupel.probes.robust.quscore import QuScore
from cupel.runner.bench import prepare
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="quscore",
    statement="On digits at linf 0.2 (1,000 queries, flip rate 0.02) the genetic search started from a copy's "
    "perturbations takes at most half the queries of a random start, at a success within 2 points; seeds that also "
    "keep the copy's class activation map raise the overlap of the network's own maps by 0.05 or more at no more than "
    "1.5 times the queries",
    paper="ImageNet and CIFAR, four CNNs, CAM and gradient interpreters: 95 to 100% success, 69% mean transfer, maps "
    "similar to the benign ones, preprocessing does not stop it",
    bounds={
        "queries_ratio": "<= 0.5",
        "success_gap": "<= 0.02",
        "overlap_gain": ">= 0.05",
        "joint_queries_ratio": "<= 1.5",
    },
    explains="The joint loss keeps the maps of the copy (overlap 0.064 higher there, on all five seeds) and not those "
    "of the network (-0.001): on clean digits the class activation maps of network and copy overlap by only about 0.4, "
    "gradient maps by 0.27, so what keeps one map says little about the other. Queries behave as claimed.",
)


def measure(seed: int, quick: bool) -> dict[str, float]:
    """Two sources: the recipe from another seed, and a network twice as wide that was trained apart."""
    subject, ctx = prepare(DigitsCnn(), [FitStep({"epochs": 12})], seed)
    rows = evenly(len(subject.data.test), 60 if quick else 120)
    x, y = subject.data.test.inputs[rows], subject.data.test.targets[rows]
    sources: dict[str, nn.Module] = {"copy": ctx.fork(seed=seed + 1000).model}
    if not quick:
        other = build(DigitsCnn(width=24), Context(seed=seed + 2000))
        sources["wide"] = fit(other.model, other.data, other.task, budget=other.budget, seed=seed + 2000)
    cam: Interpreter = partial(activation_maps, block="block3")
    found: dict[str, float] = {}
    for name, source in sources.items():
        for kind, maps in (("cam", cam), ("grad", gradient_maps)):
            probe = QuScore(maps=kind, flip=0.02)
            readings = probe.judged(subject, source, x, y, maps, ctx.child(f"{name}-{kind}"))
            found |= {f"{name}_{kind}_{reading}": r.value for reading, r in readings.items()}
    cams = [f"{name}_cam" for name in sources]

    def mean(value: str) -> float:
        return sum(found[f"{name}_{value}"] for name in cams) / len(cams)

    rare = QuScore(flip=0.001, weight=0.0).judged(subject, sources["copy"], x, y, cam, ctx.child("rare"))
    return {
        "queries_ratio": mean("plain_queries") / mean("random_queries"),
        "success_gap": abs(mean("plain_success") - mean("random_success")),
        "overlap_gain": mean("joint_overlap") - mean("plain_overlap"),
        "joint_queries_ratio": mean("joint_queries") / mean("plain_queries"),
        "source_overlap_gain": mean("joint_source_overlap") - mean("plain_source_overlap"),
        "rare_flips_random_success": rare["random_success"].value,
        "rare_flips_random_queries": rare["random_queries"].value,
        **found,
    }
