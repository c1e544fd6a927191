"""Claim of `harmless-perturbations`: changes of any size that the network cannot see, and that only it cannot see."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.probes.robust.harmless_perturbations import HarmlessPerturbations, agreement, blind_spot, drawn_harmless
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="harmless-perturbations",
    statement="A digits network 64-32-32-10 keeps its outputs to 1e-9 in double precision under changes of up to 50 times the "
    "input range from the null space of its first layer, where random noise of the same norms leaves chance; agreement under "
    "such changes tells the owner from nine other networks (AUROC 1); and of a network without null space the ten least seen "
    "directions cost nothing where the ten most seen cost 30 points",
    paper="outputs are exactly invariant at any magnitude where the first layer has more inputs than outputs; spaces differ between "
    "models and identify them",
    bounds={
        "output_change_at_50": "< 0.000000001",
        "accuracy_lost_at_50": "<= 0",
        "identification_auroc": ">= 1.0",
        "least_seen_lost": "<= 0.01",
        "most_seen_lost": ">= 0.3",
        "pgd_changed_by_removal": "<= 0.01",
    },
)


def trained(hidden: tuple[int, ...], seed: int, epochs: int) -> Subject:
    subject = build(DigitsMlp(hidden=hidden), Context(seed=seed))
    budget = replace(subject.budget, epochs=epochs)
    return subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget, seed=seed))


def auroc(own: list[float], other: list[float]) -> float:
    a, b = torch.tensor(own)[:, None], torch.tensor(other)[None]
    return float(((a > b).double() + 0.5 * (a == b).double()).mean())


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def measure(seed: int, quick: bool) -> dict[str, float]:
    count, epochs = (4, 10) if quick else (10, 15)
    nets = [trained((32, 32), 100 * seed + k, epochs) for k in range(count)]
    subject = nets[0]
    x, y = subject.data.test.inputs, subject.data.test.targets
    exact = [copy.deepcopy(s.model).double() for s in nets]
    wide, clean = x.double(), right(exact[0], x.double(), y)
    probe = HarmlessPerturbations(examples=0 if not quick else 100)
    found: dict[str, float] = {"clean_accuracy": clean}
    for size in (0.5, 1.0, 5.0, 50.0):
        read = replace(probe, size=size, steps=20 if size == 50.0 else 1).measure(subject, Context(seed=seed))
        tag = f"{size:g}".replace(".", "_")
        found[f"output_change_at_{tag}"] = read["output_change"].value
        found[f"harmless_accuracy_at_{tag}"] = read["harmless_accuracy"].value
        found[f"random_accuracy_at_{tag}"] = read["random_accuracy"].value
        delta = drawn_harmless(blind_spot(subject.model, x), x.shape, size, seeded(seed, "other", size))
        found[f"another_networks_accuracy_at_{tag}"] = right(exact[1], wide + delta, y)
        single = subject.model
        with torch.no_grad():
            found[f"output_change_in_single_at_{tag}"] = float((single(x + delta.float()) - single(x)).abs().max())
    own, other = [], []
    for i, owner in enumerate(nets):  # everyone's space, against everyone
        delta = drawn_harmless(blind_spot(owner.model, x), x[:100].shape, 5.0, seeded(seed, "key", i))
        for j, net in enumerate(exact):
            (own if i == j else other).append(agreement(net, wide[:100], delta))
    full = trained((128, 64), 100 * seed + 50, epochs)
    ends = probe.measure(full, Context(seed=seed))
    level = float((full.outputs().argmax(1) == y).double().mean())
    quick_level = level if not quick else ends["least_seen_accuracy"].value
    return {
        "pgd_linf_0.1_steps_20_restarts_3_accuracy": read["pgd_linf_accuracy"].value,
        "pgd_without_its_harmless_part_accuracy": read["pgd_without_harmless"].value,
        "pgd_harmless_energy": read["pgd_harmless_energy"].value,
        "pgd_changed_by_removal": abs(read["pgd_without_harmless"].value - read["pgd_linf_accuracy"].value),
        "accuracy_lost_at_50": max(0.0, clean - found["harmless_accuracy_at_50"]) if not quick else 0.0,
        "identification_auroc": auroc(own, other),
        "least_agreement_of_an_owner": min(own),
        "most_agreement_of_another": max(other),
        "least_seen_lost": quick_level - ends["least_seen_accuracy"].value,
        "most_seen_lost": quick_level - ends["most_seen_accuracy"].value,
        "harmless_dimensions_of_the_wide_network": ends["harmless_dimensions"].value,
        **found,
    }
