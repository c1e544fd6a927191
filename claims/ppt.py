"""Claim of `ppt`: choosing by image between dropping and merging is as good as the better of the two."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.types import Subject
from cupel.ops.ledger import ledger_of
from cupel.ops.tokens import picked, significance
from cupel.runner.claims import Claim
from cupel.techniques.compress.ppt import PPT, ReducedBlock
from cupel.workloads.vision.digits_vit import DigitsVit

CLAIM = Claim(
    method="ppt",
    statement="Without any training, a vision transformer on 64 one-pixel tokens that drops or merges 8, 16 or 24 of "
    "them at two of six blocks, each image by its own var(S), is within half a point of the better of dropping only "
    "and merging only and, with 24, two points above dropping at random; operations and time fall",
    paper="DeiT-S, ImageNet: 37% fewer FLOPs, 45% more throughput, no loss after fine-tuning; 79.5% (of 79.8%) without",
    bounds={
        "over_best_8": ">= -0.005",
        "over_best_16": ">= -0.005",
        "over_best_24": ">= -0.005",
        "over_random_24": ">= 0.02",
        "operations_24": "<= 0.65",
        "time_24": "<= 0.85",
    },
    seeds=(0, 1, 2, 3),
    quick_seeds=1,
    explains="In the two seeds whose network reached 94.8% or more, choosing by image is 0.0, 0.0 and -0.3 points from "
    "the better policy (8, 16, 24 tokens); the miss comes from the two that twelve epochs left at 88.9% and 85.7%. In "
    "the second of them dropping costs up to 17 points and merging 6, and half of the decisions drop. One median of "
    "var(S) for both places splits by place more than by image (82% and 17% drop), and the opposite choice is as good "
    "on the mean (within 0.4 points) and 0.8 to 1.7 worse in the two good seeds: var(S) tells little here. Operations "
    "(57% with 24 tokens) and time (70%) fall as asked",
)
PLACES = (1, 3)  # the second and the fourth of six blocks


class _Random(ReducedBlock):
    """Any tokens but the class token leave."""

    def reduced(self, x: Tensor, sizes: Tensor, seen: dict[str, Tensor], drop: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(x.shape[1])
        order = torch.rand(len(x), x.shape[1] - 1, generator=draw).argsort(1)[:, drop:].sort(1).values + 1
        kept = torch.cat([torch.zeros_like(order[:, :1]), order], 1)
        return picked(x, kept), picked(sizes, kept)


class _Opposite(ReducedBlock):
    """Merges where attention is concentrated and drops where it is flat: what the rule advises against."""

    def reduced(self, x: Tensor, sizes: Tensor, seen: dict[str, Tensor], drop: int) -> tuple[Tensor, Tensor]:
        sharp = (significance(seen["map"], seen["values"]).var(1) >= self.tau)[:, None, None]
        self.policy = "prune"
        pruned = super().reduced(x, sizes, seen, drop)
        self.policy = "pool"
        pooled = super().reduced(x, sizes, seen, drop)
        return torch.where(sharp, pooled[0], pruned[0]), torch.where(sharp, pooled[1], pruned[1])


def places_of(model: nn.Module) -> list[ReducedBlock]:
    return [m for m in model.modules() if isinstance(m, ReducedBlock) and m.drop]


def other(subject: Subject, kind: type[ReducedBlock]) -> Subject:
    model = copy.deepcopy(subject.model)
    for block in places_of(model):
        block.__class__ = kind
    return subject.with_model(model)


def right(subject: Subject) -> float:
    return float((subject.outputs().argmax(-1) == subject.data.test.targets).double().mean())


@torch.no_grad()
def seconds(models: list[nn.Module], x: Tensor, rounds: int) -> list[float]:
    """Least time of one forward of each, measured in turns."""
    found: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, times in zip(models, found, strict=True):
            began = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - began)
    return [min(times) for times in found]


def watched(subject: Subject, found: dict[str, float]) -> None:
    """var(S) and the share of test images that drop, at both places."""
    for number, block in enumerate(places_of(subject.model), 1):
        block.watched = []
        subject.model(subject.data.test.inputs)
        spread, block.watched = torch.cat(block.watched), None
        found[f"var_at_{number}"] = float(spread.mean())
        found[f"dropping_at_{number}"] = float((spread >= block.tau).double().mean())


def measure(seed: int, quick: bool) -> dict[str, float]:
    fresh = build(DigitsVit(patch=1, depth=6), Context(seed=seed))
    budget = replace(fresh.budget, epochs=3 if quick else 12, batch_size=16, lr=1e-3)
    subject = fresh.with_model(fit(fresh.model, fresh.data, fresh.task, budget=budget, seed=seed))
    x, found = subject.data.test.inputs, {"whole": right(subject)}
    whole = sum(op.macs for op in ledger_of(subject.model, x[:1]).ops)
    for drop in (8, 16, 24):
        made = {
            policy: apply(PPT(drop=drop, places=PLACES, policy=policy), subject, seed=seed)
            for policy in ("adaptive", "prune", "pool")
        }
        made |= {"opposite": other(made["adaptive"], _Opposite)}
        if drop == 24:
            made |= {"random": other(made["prune"], _Random)}
        acc = {policy: right(s) for policy, s in made.items()}
        found |= {f"{policy}_{drop}": value for policy, value in acc.items()}
        found[f"over_best_{drop}"] = acc["adaptive"] - max(acc["prune"], acc["pool"])
        found[f"operations_{drop}"] = sum(op.macs for op in ledger_of(made["adaptive"].model, x[:1]).ops) / whole
    found["over_random_24"] = acc["adaptive"] - acc["random"]
    plain, less = seconds([subject.model, made["adaptive"].model], x[:64], 5 if quick else 15)
    found["time_24"] = less / plain
    watched(made["adaptive"], found)
    if not quick:  # one more epoch, with and without
        more = replace(budget, epochs=1, lr=1e-4)
        for name, techniques in (("whole_tuned", []), ("adaptive_24_tuned", [PPT(drop=24, places=PLACES)])):
            model = copy.deepcopy(subject.model)
            model = fit(model, subject.data, subject.task, techniques=techniques, budget=more, seed=seed)
            found[name] = right(subject.with_model(model))
    return found
