"""Claim of `black-box`: classes alone unmask a network that hides its gradients, with few questions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Bounds, Subject, still
from cupel.ops.attacks import pgd
from cupel.ops.rays import rays
from cupel.ops.threats import Outcome, Threat, attacked
from cupel.probes.robust.black_box import BlackBox
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="black-box",
    statement="On digits (linf 0.1, 1,500 questions) RayS fools at least 0.2 more of the inputs than PGD where the "
    "network hides its gradients (logits times 1,000), and the hidden network is no harder for it than the open one "
    "(within 0.02); with equal questions its median distance is at most half that of a random search over rays",
    paper="RayS (KDD 2020): a sanity check for falsely robust models; on several published defences its accuracy under "
    "attack lies far under the one reported with gradients; fewer queries than other hard-label attacks by its "
    "hierarchical search and fast check",
    bounds={"unmasked": ">= 0.2", "rays_gap": "<= 0.02", "radius_ratio": "<= 0.5", "white_box_lead": ">= -0.05"},
    explains="What is about hidden gradients holds (PGD .98, RayS .47 of the inputs left right). Within 500 questions RayS "
    "comes 1.6 times as near as random rays on digits, not twice: our random search has RayS's own fast check, and "
    "structure of the image is not why RayS leads, for on planes without any it comes 1.8 to 2 times as near",
)
EPS = 0.1


class Loud(nn.Module):
    """The same classes with logits a thousand times as large: the softmax saturates and the loss has no gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 1000 * self.model(x)
        return out


def random_rays(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator) -> Tensor:
    """The baseline: a fresh random direction each time, the same check and the same halving; radii `[N]`."""
    best = torch.full((len(x),), threat.bounds.high - threat.bounds.low)
    asked = torch.zeros(len(x), dtype=torch.long)

    def wrong(rows: Tensor, signs: Tensor, radius: Tensor) -> Tensor:
        asked[rows] += 1
        moved = x[rows] + radius.view(-1, 1, 1, 1) * signs
        return model(moved.clamp(threat.bounds.low, threat.bounds.high)).argmax(1) != y[rows]

    while len(rows := (asked < threat.steps).nonzero().flatten()):
        signs = torch.randint(0, 2, x[rows].shape, generator=draw) * 2.0 - 1
        hit = wrong(rows, signs, best[rows])
        rows, signs = rows[hit], signs[hit]
        low, high = torch.zeros(len(rows)), best[rows].clone()
        while bool(((high - low) > 1e-3).any()):
            middle = (low + high) / 2
            won = wrong(rows, signs, middle)
            low, high = torch.where(won, low, middle), torch.where(won, middle, high)
        best[rows] = high
    return best


class HalfSpace(nn.Module):
    """Class 1 where w x > 0."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w
        return torch.stack([-score, score], dim=1)


def ratio_on_half_spaces(side: int, seed: int) -> float:
    """Median radius of RayS over that of random rays for a plane through images of `side` x `side` pixels."""
    draw = torch.Generator().manual_seed(seed)
    w, x = torch.randn(side * side, generator=draw), 0.1 * torch.randn(20, 1, side, side, generator=draw)
    model, threat = HalfSpace(w), Threat("linf", 1e-3, Bounds(-1.0, 1.0), 500)
    y = model(x).argmax(1)
    ours = (rays(model, x, y, threat, tolerance=1.0) - x).abs().flatten(1).amax(1)
    return float(ours.median() / random_rays(model, x, y, threat, draw).median())


def attack_all(subject: Subject, model: nn.Module, examples: int) -> dict[str, Outcome]:
    assert subject.bounds is not None
    x, y = subject.data.test.inputs[:examples], subject.data.test.targets[:examples]
    draw = torch.Generator().manual_seed(0)
    with still(model):
        return {
            "pgd": attacked(pgd, model, x, y, Threat("linf", EPS, subject.bounds, 40), draw),
            "rays": attacked(rays, model, x, y, Threat("linf", EPS, subject.bounds, 1500), draw),
        }


def measure(seed: int, quick: bool) -> dict[str, float]:
    examples = 40 if quick else 100
    subject = build(DigitsCnn(width=8 if quick else 16), Context(seed=seed))
    budget = replace(subject.budget, epochs=5 if quick else 10)
    subject = subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget, seed=seed))
    open_, loud = (attack_all(subject, m, examples) for m in (subject.model, Loud(subject.model)))
    assert subject.bounds is not None
    x, y = subject.data.test.inputs[:examples], subject.data.test.targets[:examples]
    threat = Threat("linf", 1e-3, subject.bounds, 500)  # too near to succeed: both search on to the end
    with still(subject.model) as model, torch.no_grad():
        right = model(x).argmax(1) == y
        found = rays(model, x[right], y[right], threat, tolerance=1.0)
        ours = (found - x[right]).abs().flatten(1).amax(1)
        theirs = random_rays(model, x[right], y[right], threat, torch.Generator().manual_seed(seed))
    probe = BlackBox(eps=EPS, examples=examples).measure(subject, Context(seed=seed))
    return {
        "unmasked": loud["pgd"].robust - loud["rays"].robust,
        "rays_gap": abs(loud["rays"].robust - open_["rays"].robust),
        "radius_ratio": float(ours.median() / theirs.median()),
        "white_box_lead": open_["rays"].robust - open_["pgd"].robust,
        "hidden_pgd_accuracy": loud["pgd"].robust,
        "hidden_rays_accuracy": loud["rays"].robust,
        "open_pgd_accuracy": open_["pgd"].robust,
        "open_rays_accuracy": open_["rays"].robust,
        **({} if quick else {f"ratio_on_planes_{side * side}": ratio_on_half_spaces(side, seed) for side in (8, 28)}),
        "rays_distance": float(ours.median()),
        "random_distance": float(theirs.median()),
        **{name: reading.value for name, reading in probe.items()},
    }
