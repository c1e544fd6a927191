"""Claim of `jacobian-ensembles`: penalty and averaging together resist universal shifts at unchanged accuracy."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.steps import apply, build
from cupel.core.types import Examples, Subject, still
from cupel.ops.apgd import apgd
from cupel.ops.threats import Model, Threat, attacked
from cupel.ops.universal import evaded, universal
from cupel.runner.claims import Claim
from cupel.techniques.robust.jacobian_ensembles import JacobianEnsembles
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="jacobian-ensembles",
    statement="On digits three networks with Jacobian penalty 0.01 are together as accurate as one plain network "
    "(within half a point) and err half as often under a universal shift of 0.15 made for the whole ensemble; they "
    "are 1.5 points more accurate than one of them; averaging alone takes less than 30% of the errors away",
    paper="MNIST and Fashion-MNIST: accuracy and robustness to universal perturbations together that neither Jacobian "
    "regularisation nor an ensemble reaches alone",
    bounds={
        "accuracy_cost": "<= 0.005",
        "evasion_ratio_15": ">= 2",
        "accuracy_gain_of_averaging": ">= 0.015",
        "evasion_cut_by_averaging_alone": "< 0.30",
    },
    seeds=(0, 1, 2),
    quick_seeds=1,
    explains="The baseline is better than the one the bounds were written on, so there is less to win: one plain "
    "network is 0.990 accurate and errs on 9.4% under the shift (0.978 and 25% there), one flat network is 0.981 "
    "(0.962). The flat ensemble costs 0.7 points for half a point allowed (one image of 540 too many); averaging "
    "wins 0.2 points of the 1.9 left to win; errors fall from 9.4% to 5.2%, by seed 1.2 to 2.3 times. That averaging "
    "alone cuts errors by 47% does not stand up: the plain attack finds 5.1% on the joint output of plain networks, "
    "shifts made with restarts, through mean logits or for single members find 14.0% (the one network did not meet "
    "those). Under the stronger attack the penalty takes an ensemble from 14.0% to 6.5%, 2.2 times fewer errors.",
)


class MeanLogits(nn.Module):
    """The same members with their logits averaged: a smoother way up, for an attacker who knows the ensemble."""

    def __init__(self, members: nn.ModuleList) -> None:
        super().__init__()
        self.members = members

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


def shifts(model: Model, train: Examples, threat: Threat, name: str, passes: int) -> Tensor:
    return universal(model, train, threat, seeded(0, name), passes=passes)


def error(model: Model, data: Examples, delta: Tensor, threat: Threat) -> float:
    return float(evaded(model, data, delta, threat).double().mean())


def adaptive(ensemble: nn.Module, train: Examples, test: Examples, threat: Threat, passes: int) -> float:
    """Highest error that one shift causes: on the joint output with restarts, through mean logits, for each member."""
    surrogates: list[Model] = [MeanLogits(ensemble.members), *ensemble.members]  # type: ignore[arg-type, list-item]
    deltas = [shifts(ensemble, train, replace(threat, restarts=2), "joint", passes)]
    deltas += [shifts(model, train, threat, "surrogate", passes) for model in surrogates]
    return max(error(ensemble, test, delta, threat) for delta in deltas)


def targeted(model: Model, train: Examples, test: Examples, threat: Threat, passes: int) -> float:
    """Share of test inputs of other classes that a shift made for a class sends there, mean over the classes."""
    rates = []
    for t in range(10):
        delta = universal(model, train, threat, seeded(0, "target", t), target=t, passes=passes)
        others = test.where(lambda b, t=t: b.targets != t)  # type: ignore[misc]
        rates.append(float(evaded(model, others, delta, threat, target=t).double().mean()))
    return sum(rates) / len(rates)


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject: Subject = build(DigitsCnn(), Context(seed=seed))
    assert subject.bounds is not None
    train, test, passes = subject.data.train, subject.data.test, 4 if quick else 10
    threats = {eps: Threat("linf", eps / 100, subject.bounds) for eps in (15, 25)}
    nets: dict[str, nn.Module] = {}
    for name, weight in (("plain", 0.0), ("flat", 0.01)):
        technique = JacobianEnsembles(members=3, weight=weight, epochs=4 if quick else 0)
        made = apply(technique, subject, seed=seed).model
        nets[f"{name}_ensemble"], nets[f"{name}_single"] = made, made.members[0]  # type: ignore[index, assignment]
    found: dict[str, float] = {}
    for name, model in nets.items():
        with still(model):
            if name.endswith("ensemble"):
                found[f"{name}_evasion_15_adaptive"] = adaptive(model, train, test, threats[15], passes)
            found[f"{name}_accuracy"] = 1 - error(model, test, torch.zeros(1, 1, 8, 8), threats[15])
            for eps, threat in threats.items():
                found[f"{name}_evasion_{eps}"] = error(model, test, shifts(model, train, threat, "uap", passes), threat)
    for name in ("plain_ensemble", "flat_ensemble"):
        with still(nets[name]) as model:
            part = test.take(torch.arange(100))
            each = replace(threats[15], steps=20)
            found[f"{name}_robust_apgd_15"] = attacked(
                apgd, model, part.inputs, part.targets, each, seeded(0, "each")
            ).robust
            found[f"{name}_targeted_25"] = targeted(model, train, test, threats[25], 2 if quick else 4)
    found["accuracy_cost"] = found["plain_single_accuracy"] - found["flat_ensemble_accuracy"]
    found["accuracy_gain_of_averaging"] = found["flat_ensemble_accuracy"] - found["flat_single_accuracy"]
    found["evasion_ratio_15"] = found["plain_single_evasion_15"] / max(found["flat_ensemble_evasion_15"], 1e-9)
    found["evasion_ratio_15_adaptive"] = found["plain_single_evasion_15"] / max(
        found["flat_ensemble_evasion_15_adaptive"], 1e-9
    )
    found["evasion_cut_by_averaging_alone"] = 1 - found["plain_ensemble_evasion_15"] / max(
        found["plain_single_evasion_15"], 1e-9
    )
    first = "flat_ensemble_evasion_15_adaptive"
    return {first: found[first]} | found
