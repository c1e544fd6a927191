"""Claim of `fitact`: learned bounds for every neuron keep the accuracy under bit flips that other bounds lose."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.types import Examples, Subject
from cupel.ops.bit_flips import fault_positions, flipped, from_fixed, to_fixed
from cupel.ops.bounded import activations, bounded_copy, bounds_of, maxima
from cupel.probes.robust.bit_errors import right_answers
from cupel.runner.claims import Claim
from cupel.techniques.compress.fitact import FitAct
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="fitact",
    statement="A digits network of four hidden layers of 96, with weights, biases and bounds in Q15.16 and random bits "
    "of all but the classifier flipped (the same for all), keeps 20 points more accuracy with FitAct than with Ranger and "
    "than without bounds at a rate of 1e-4; it is level with Clip-Act there (within a point) and 3 points ahead at 3e-4, "
    "for at most a point of accuracy without faults",
    paper="AlexNet, VGG16 and ResNet50 on CIFAR-10 and CIFAR-100: above Clip-Act and Ranger over a wide range of rates",
    bounds={
        "over_ranger_1e4": ">= 0.2",
        "over_relu_1e4": ">= 0.2",
        "over_clip_act_1e4": ">= -0.01",
        "over_clip_act_3e4": ">= 0.03",
        "clean_lost": "<= 0.01",
    },
    explains="The 3 points come from a trial of 2 seeds. Level at 3e-4 (70.4 against 71.7, seeds from -9.8 to +3.4): 384 "
    "bounds are hit 96 times as often as Clip-Act's 4, and one flipped upwards lets a broken neuron through; with bounds "
    "unharmed FitAct has 74.9 against 73.1. Clip-Act's thresholds are searched under faults, FitAct's bounds are not. "
    "Learning adds nothing here: the maxima alone have 70.2, and a stronger pull (tight) loses 4 points",
)
RATES = {"1e5": 1e-5, "1e4": 1e-4, "3e4": 3e-4, "1e3": 1e-3}
TOP = max(RATES.values())
NONE = torch.zeros(0, dtype=torch.long)
Faults = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Memory:
    """A network whose parameters are held in Q15.16."""

    model: nn.Module

    def hits(self, data: Examples, subject: Subject, faults: Sequence[Faults], rate: float) -> float:
        """Mean accuracy over sets of faults."""
        twin = copy.deepcopy(self.model)
        codes = {name: to_fixed(p.detach()) for name, p in self.model.named_parameters()}
        right = 0
        for drawn in faults:
            with torch.no_grad():
                for name, p in twin.named_parameters():
                    at, marks = drawn.get(name, (NONE, NONE))
                    p.copy_(from_fixed(flipped(codes[name], at[marks <= rate / TOP])))
            right += int(right_answers(twin, [data.whole()], subject.task).sum())
        return right / len(faults) / len(data)


def drawn(model: nn.Module, seed: int, kind: str, trials: int, skip: str = "head") -> list[Faults]:
    """Faults by parameter name; they depend on name and size alone, so rivals with the same weights share them."""
    sizes = {name: 32 * p.numel() for name, p in model.named_parameters() if not name.startswith(skip)}
    return [
        {name: fault_positions(bits, TOP, seeded(seed, kind, t, name)) for name, bits in sizes.items()}
        for t in range(trials)
    ]


def with_bounds(subject: Subject, per: str, beyond: str, share: Mapping[str, float] | None = None) -> nn.Module:
    """Maxima over the training data as bounds, or a share of them by layer."""
    tops = maxima(subject.model, activations(subject.model), [subject.data.train.inputs], per)
    scaled = {name: [b * (share or {}).get(name, 1.0) for b in own] for name, own in tops.items()}
    return bounded_copy(subject.model, scaled, per, beyond)


def clip_act(subject: Subject, seed: int, trials: int, tolerance: float) -> nn.Module:
    """Layer thresholds by interval search, first layer to last: most accurate under faults on the validation split."""
    valid, share = subject.data.valid, dict.fromkeys(activations(subject.model), 1.0)
    faults = drawn(with_bounds(subject, "layer", "zero"), seed, "search", trials)
    floor = Memory(subject.model).hits(valid, subject, [{}], TOP) - tolerance

    def score(name: str, value: float) -> float:
        memory = Memory(with_bounds(subject, "layer", "zero", share | {name: value}))
        if memory.hits(valid, subject, [{}], TOP) < floor:
            return -1.0
        return sum(memory.hits(valid, subject, faults, RATES[r]) for r in ("1e4", "3e4"))

    for name in share:
        found = {1.0: score(name, 1.0)}
        low, high = 0.0, 1.0
        for _ in range(3):
            width = (high - low) / 4
            found |= {v: score(name, v) for v in (low + width, low + 2 * width, low + 3 * width)}
            best = max(found, key=lambda v: (found[v], v))
            low, high = max(best - width, 0.0), min(best + width, 1.0)
        share[name] = max(found, key=lambda v: (found[v], v))
    return with_bounds(subject, "layer", "zero", share)


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(DigitsMlp(hidden=(96,) * 4), Context(seed=seed))
    budget = replace(subject.budget, epochs=10) if quick else subject.budget
    subject = subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget, seed=seed))
    method, trials = FitAct(), 5 if quick else 25
    rivals = {
        "relu": subject.model,
        "ranger": with_bounds(subject, "layer", "clamp"),
        "clip_act": clip_act(subject, seed, 2 if quick else 10, method.tolerance),
        "neuron_zero": with_bounds(subject, "neuron", "zero"),
        "neuron_clamp": with_bounds(subject, "neuron", "clamp"),
        "untrained": apply(replace(method, epochs=0), subject, seed=seed).model,
        "fitact": apply(method, subject, seed=seed).model,
        "fitact_long": apply(replace(method, epochs=10 if quick else 100), subject, seed=seed).model,
        "fitact_tight": apply(replace(method, epochs=30, lr=1e-2, weight=1.0), subject, seed=seed).model,
    }
    test, found = subject.data.test, {}
    faults = {name: drawn(net, seed, "test", trials) for name, net in rivals.items()}
    for name, net in rivals.items():
        memory = Memory(net)
        found[f"{name}_clean"] = memory.hits(test, subject, [{}], TOP)
        for label, rate in RATES.items():
            found[f"{name}_{label}"] = memory.hits(test, subject, faults[name], rate)
        safe = [{n: at for n, at in one.items() if "bounds" not in n} for one in faults[name]]
        for label in ("1e4", "3e4"):
            found[f"{name}_{label}_bounds_unharmed"] = memory.hits(test, subject, safe, RATES[label])
        whole = drawn(net, seed, "test", trials, skip="-")
        found[f"{name}_1e4_classifier_too"] = memory.hits(test, subject, whole, 1e-4)
    extra = sum(b.numel() for b in bounds_of(rivals["fitact"]))
    return {
        "over_ranger_1e4": found["fitact_1e4"] - found["ranger_1e4"],
        "over_relu_1e4": found["fitact_1e4"] - found["relu_1e4"],
        "over_clip_act_1e4": found["fitact_1e4"] - found["clip_act_1e4"],
        "over_clip_act_3e4": found["fitact_3e4"] - found["clip_act_3e4"],
        "clean_lost": found["relu_clean"] - found["fitact_clean"],
        "bounds_share_of_memory": extra / sum(p.numel() for p in subject.model.parameters()),
        **found,
    }
