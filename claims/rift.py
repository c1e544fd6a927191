"""Claim of `rift`: fine-tuning the module robustness depends on least wins clean accuracy at no robust cost."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import ApplyStep, build, run_step
from cupel.core.types import Examples, Subject, still
from cupel.data.digits import digits
from cupel.data.splits import stratified
from cupel.ops.apgd import apgd
from cupel.ops.attacks import logits_ratio, pgd
from cupel.ops.square import square
from cupel.ops.threats import Attack, Threat, attacked
from cupel.runner.claims import Claim
from cupel.techniques.robust.adversarial_training import AdversarialTraining
from cupel.techniques.robust.rift import RIFT, tuned
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="rift",
    statement="On digits (eps = 0.2) the criticality of five modules of an adversarially trained network spans a "
    "factor of 10; fine-tuning the least critical one and interpolating to where validation robustness is kept wins "
    "clean test accuracy at a robust cost of at most 1 point, also under attacks that know both ends of the line; "
    "all the way, the most critical module costs more robustness than the least critical one. Trained for 40 epochs, "
    "after a first run with 18 did not hold",
    paper="ResNet18, ResNet34 and WRN34-10 on CIFAR-10, CIFAR-100 and Tiny-ImageNet: about 1.5 points of clean "
    "accuracy and 1.5 points under corruptions at equal or slightly better robust accuracy; on CIFAR-10 the worst "
    "change of one module costs 2.86 points of robust accuracy, of another 53.03",
    bounds={
        "robust_cost_adaptive": "<= 0.01",
        "criticality_ratio": ">= 10",
        "clean_gain": "> 0",
        "cost_at_end_most_minus_least": "> 0",
    },
    seeds=(0, 1, 2),
    quick_seeds=1,
    explains="A second run, after a first of 18 epochs and five seeds in which all stayed at a = 0. Now a is 0.27 on "
    "average and wins nothing on the test split (0.0 points of clean accuracy) for 0.5 robust points. The "
    "ordering is there: criticality spans 20 times, the first convolution is the least critical with every "
    "seed, and all the way it costs 1.3 robust points where the most critical module costs 3.1. But the "
    "network starts at 0.975 of clean accuracy, which leaves 3 of 100 images to win, and what one small "
    "convolution wins on the validation split is chance.",
)
EPS = 0.2


def network(seed: int) -> nn.Module:
    """Three convolutions and two linear layers without batch norm, 24 thousand weights."""
    with Context(seed=seed).scope("network"):
        parts: list[nn.Module] = []
        for fan_in, fan_out, stride in ((1, 16, 1), (16, 16, 1), (16, 32, 2)):
            parts += [nn.Conv2d(fan_in, fan_out, 3, stride, 1), nn.ReLU()]
        return nn.Sequential(*parts, nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10))


def bench(seed: int) -> Subject:
    """Digits with twice the usual validation split: on 180 images one robust point is not two inputs."""
    whole = digits()
    x, y, row = (
        torch.cat([getattr(s, part) for s in (whole.train, whole.valid, whole.test)])
        for part in ("inputs", "targets", "index")
    )
    order = row.argsort()
    data = stratified(x[order], y[order], valid=0.2, test=0.3, data_seed=0)
    return build(DigitsCnn(), Context(seed=seed)).with_data(data).with_model(network(seed))


def hardened(subject: Subject, seed: int, epochs: int) -> Subject:
    technique = AdversarialTraining(eps=EPS, steps=7, warmup=0.3)
    budget = replace(subject.budget, epochs=epochs)
    model = fit(
        subject.model,
        subject.data,
        subject.task,
        techniques=[technique],
        budget=budget,
        bounds=subject.bounds,
        seed=seed,
    )
    return subject.with_model(model)


def adversarial(model: nn.Module, data: Examples, attack: Attack, threat: Threat, name: str) -> tuple[Tensor, Tensor]:
    """What the attack found, and `[N]` bool: it fools."""
    with still(model):
        outcome = attacked(attack, model, data.inputs, data.targets, threat, seeded(0, name))
    return outcome.x, outcome.fooled


def adaptive(model: nn.Module, ends: list[nn.Module], data: Examples, threat: Threat, queries: int) -> float:
    """Robust accuracy: each input's worst case over white-box, score-based and transferred attacks.

    Who knows the method knows that the network lies on the line between two others: what fools an end is
    tried as it is and as the start of further steps.
    """
    fooled = torch.zeros(len(data), dtype=torch.bool)
    for name, attack in (("ce", apgd), ("dlr", partial(apgd, loss=logits_ratio)), ("pgd", pgd)):
        fooled |= adversarial(model, data, attack, threat, name)[1]
    fooled |= adversarial(model, data, square, replace(threat, steps=queries), "square")[1]
    for k, end in enumerate(ends):
        x, _ = adversarial(end, data, apgd, threat, f"end-{k}")
        with still(model):
            moved = pgd(model, data.inputs, data.targets, threat, seeded(0, "on"), start=x)
            with torch.no_grad():
                for tried in (x, moved):
                    fooled |= model(tried).argmax(1) != data.targets
    return 1 - float(fooled.double().mean())


def clean(subject: Subject) -> float:
    return float((subject.outputs().argmax(1) == subject.data.test.targets).double().mean())


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = hardened(bench(seed), seed, 12 if quick else 40)
    # Chosen on seed 99: with 1e-3 as in the paper, 80 updates move a module hardly at all.
    rift = RIFT(eps=EPS, lr=5e-3, examples=0)
    log: list[dict[str, object]] = []
    assert subject.shelf is not None
    ctx = Context(seed=seed, shelf=subject.shelf, report=lambda row: log.append(dict(row)))
    fresh = subject.with_model(copy.deepcopy(subject.model))
    done = run_step(fresh, "apply-rift", ApplyStep("rift", rift), ctx)
    rises = subject.shelf.entries["criticality"].value
    assert isinstance(rises, dict)
    least, most = min(rises, key=lambda n: rises[n]), max(rises, key=lambda n: rises[n])
    ends = {}
    for name in (least, most):
        ends[name] = copy.deepcopy(subject.model)
        tuned(rift, ends[name], name, subject, Context(seed=seed))
    data = subject.data.test
    threat = Threat("linf", EPS, subject.bounds, steps=40)  # type: ignore[arg-type]
    pair, queries = [subject.model, ends[least]], 50 if quick else 100
    before, after = (
        adaptive(subject.model, pair, data, threat, queries),
        adaptive(done.model, pair, data, threat, queries),
    )
    plain = Threat("linf", EPS, subject.bounds, steps=10, restarts=3)  # type: ignore[arg-type]
    pgd10 = {
        name: 1 - float(adversarial(model, data, pgd, plain, "pgd-10")[1].double().mean())
        for name, model in (
            ("start", subject.model),
            ("rift", done.model),
            ("least", ends[least]),
            ("most", ends[most]),
        )
    }
    share = next(float(row["share"]) for row in log if row.get("kind") == "rift")  # type: ignore[arg-type]
    return {
        "rift_robust_adaptive": after,
        "start_robust_adaptive": before,
        "robust_cost_adaptive": before - after,
        "robust_cost_pgd10": pgd10["start"] - pgd10["rift"],
        "start_robust_pgd10": pgd10["start"],
        "start_clean": clean(subject),
        "clean_gain": clean(done) - clean(subject),
        "share": share,
        "criticality_least": rises[least],
        "criticality_most": rises[most],
        "criticality_ratio": rises[most] / max(rises[least], 1e-9),
        "least_is_first_convolution": float(least == "0.weight"),
        "least_clean_gain_at_end": clean(subject.with_model(ends[least])) - clean(subject),
        "most_clean_gain_at_end": clean(subject.with_model(ends[most])) - clean(subject),
        "least_robust_cost_at_end": pgd10["start"] - pgd10["least"],
        "most_robust_cost_at_end": pgd10["start"] - pgd10["most"],
        "cost_at_end_most_minus_least": pgd10["least"] - pgd10["most"],
    }
