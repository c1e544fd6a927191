"""Claim of `bivit`: attention binarised with the softmax in mind, and in two stages, keeps a 1-bit transformer alive."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.shelf import TEACHER
from cupel.core.steps import build
from cupel.core.types import Subject, still
from cupel.ops.quantize import sign_through
from cupel.runner.claims import Claim
from cupel.storage.state import size_of
from cupel.techniques.compress.bivit import BinaryAttention, BiViT, kept, operations, row_scale
from cupel.workloads.vision.digits_vit import DigitsVit

CLAIM = Claim(
    method="bivit",
    statement="On digits, in a transformer of three blocks: the binary map with its row scale is nearer to the real one "
    "than a threshold of one half (scaled too) and than the mean of the row; put into the real network untrained, the "
    "scale is worth 10 points; trained for equal epochs from one teacher, each at the better of two rates, thresholds on "
    "the softmax beat signs of the scores, and two stages beat making all binary at once",
    paper="TinyImageNet: 19.8 points over the best earlier binary transformer; ImageNet: Swin-T 70.8%",
    bounds={
        "error_below_half": "> 0.0",
        "error_below_mean": "> 0.0",
        "scale_gain": ">= 0.1",
        "gain_over_sign": "> 0.0",
        "gain_two_stages": "> 0.0",
    },
    explains="Undecided rather than refuted: two stages against one are +2.6, -4.6 and +0.2 points, interval -9.8 to 8.6. "
    "What makes the difference was not looked into. In two stages the weights outside attention are signs for half of "
    "the epochs, in one for all of them. The controls without scale and with full binary MLPs ran at one rate, the "
    "others at the better of two",
    seeds=(10, 11, 12),  # rates were tried on seed 0, with these images
    quick_seeds=1,
)
RATES = (3e-3, 1e-2)


class SignedScores(nn.Module):
    """1 where a score is above zero: signs taken before any softmax, as binary networks did it."""

    def forward(self, scores: Tensor) -> Tensor:
        return (sign_through(scores) + 1) / 2


@dataclass(frozen=True)
class Replaced:
    """Puts another module in the place of every attention's softmax."""

    make: Callable[[], nn.Module]

    def model(self, model: nn.Module, ctx: Context) -> nn.Module:
        for module in list(model.modules()):
            if hasattr(module, "normalise"):
                module.normalise = self.make()
        return model


def right(subject: Subject, split: str = "test") -> float:
    return float((subject.outputs(split).argmax(-1) == getattr(subject.data, split).targets).double().mean())


def student(teacher: Subject, seed: int) -> Subject:
    """A fresh network whose shelf holds the teacher."""
    fresh = build(DigitsVit(), Context(seed=seed))
    assert fresh.shelf is not None
    fresh.shelf.put(TEACHER, copy.deepcopy(teacher.model))
    return fresh


def fitted(subject: Subject, seed: int, epochs: int, lr: float, *techniques: Any) -> Subject:
    budget = replace(subject.budget, epochs=epochs, lr=lr, weight_decay=0.0)
    model = fit(
        subject.model, subject.data, subject.task, techniques=techniques, budget=budget, seed=seed, shelf=subject.shelf
    )
    return subject.with_model(model)


def staged(teacher: Subject, seed: int, epochs: int, lr: float) -> tuple[Subject, Subject]:
    """After the first stage, and after the second."""
    first = fitted(student(teacher, seed), seed, epochs, lr, BiViT(stage="attention"))
    kept_ = replace(first.with_model(copy.deepcopy(first.model)))
    return kept_, fitted(first, seed, epochs, lr, BiViT(stage="mlp"))


def best(made: list[Subject]) -> Subject:
    return max(made, key=lambda s: right(s, "valid"))


@torch.no_grad()
def map_errors(subject: Subject) -> dict[str, float]:
    """|A' - A| / |A| over all heads and layers, for every way to make a row binary."""
    maps: list[Tensor] = []
    model = copy.deepcopy(subject.model)
    for module in model.modules():
        if isinstance(module, nn.Softmax):
            module.register_forward_hook(lambda m, x, out: maps.append(out))
    with still(model):
        model(subject.data.test.inputs[:200])
    a = torch.cat([m.flatten() for m in maps]).view(-1, maps[0].shape[-1])
    half = (a >= 0.5).to(a.dtype)
    keep = kept(a, 0.25)
    ways = {
        "softmax_aware": keep * row_scale(a, keep),
        "unscaled": keep,
        "half": half * (a * half).sum(-1, keepdim=True) / half.sum(-1, keepdim=True).clamp_min(1),
        "mean": a.mean(-1, keepdim=True).expand_as(a),
    }
    return {f"error_{name}": float((w - a).norm() / a.norm()) for name, w in ways.items()}


def only_map(subject: Subject, make: Callable[[], nn.Module]) -> float:
    """Accuracy of the real network with nothing but its attention maps binary, untrained."""
    model = Replaced(make).model(copy.deepcopy(subject.model), Context())
    return right(subject.with_model(model))


def measure(seed: int, quick: bool) -> dict[str, float]:
    real_epochs, epochs, rates = (5, 2, RATES[:1]) if quick else (15, 8, RATES)
    fresh = build(DigitsVit(), Context(seed=seed))
    budget = replace(fresh.budget, epochs=real_epochs)
    real = fresh.with_model(fit(fresh.model, fresh.data, fresh.task, budget=budget, seed=seed))
    found = {"float": right(real)} | map_errors(real)
    found["error_below_half"] = found["error_half"] - found["error_softmax_aware"]
    found["error_below_mean"] = found["error_mean"] - found["error_softmax_aware"]
    like = torch.zeros(1)
    for name, scale in (("row", "row"), ("no", "none")):
        found[f"untrained_{name}_scale"] = only_map(real, lambda scale=scale: BinaryAttention(0.25, scale, like, 4))  # type: ignore[misc]
    found["untrained_signs"] = only_map(real, SignedScores)
    found["scale_gain"] = found["untrained_row_scale"] - found["untrained_no_scale"]
    pairs = [staged(real, seed, epochs, lr) for lr in rates]
    first, two = best([a for a, _ in pairs]), best([b for _, b in pairs])
    signed = [
        fitted(student(real, seed), seed, epochs, lr, BiViT(stage="attention"), Replaced(SignedScores)) for lr in rates
    ]
    once = best([fitted(student(real, seed), seed, 2 * epochs, lr, BiViT(stage="all")) for lr in rates])
    found |= {"attention_only": right(first), "attention_only_signs": right(best(signed)), "two_stages": right(two)}
    found |= {"one_stage": right(once)}
    found["gain_over_sign"] = found["attention_only"] - found["attention_only_signs"]
    found["gain_two_stages"] = found["two_stages"] - found["one_stage"]
    found["file_bytes_share"] = size_of(two.model) / size_of(real.model)
    before, after = operations(two.model, two.data.test.inputs[:1])
    found["operations_share"] = after / before
    if not quick:
        plain = fitted(student(real, seed), seed, epochs, RATES[0], BiViT(stage="attention", scale="none"))
        found["attention_only_no_scale"] = right(plain)
        full = fitted(first, seed, epochs, RATES[0], BiViT(stage="mlp", mlp="full"))
        found["two_stages_full_mlp"] = right(full)
    return found
