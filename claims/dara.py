"""Claim of `dara`: the family of a network can be read off its graph, and misnamed ones are found."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.probes.robust.dara import Dara, corpus, learned
from cupel.runner.claims import Claim
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.techniques.compress.magnitude_prune import MagnitudePrune
from cupel.workloads.vision.digits_cnn import DigitsCnn
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="dara",
    statement="336 networks of 14 families with random weights, made here: the graph alone gives the family of one "
    "whose whole variant was held out in 95% of cases or more, 20 points above the number of parameters alone, and the "
    "exact variant (seen with another head) in 60%; with 10% of the names swapped the margin finds them with an AUROC "
    "of 0.97 across families and 0.7 within; every int8 or pruned copy under the dense network's name is flagged",
    paper="Hugging Face: architecture information alone gives the model type with 94% accuracy, other "
    "metadata above 70%",
    bounds={
        "family_accuracy": ">= 0.95",
        "over_parameter_count": ">= 0.20",
        "variant_accuracy": ">= 0.60",
        "auroc_across_families": ">= 0.97",
        "auroc_within_families": ">= 0.70",
        "compressed_flagged": ">= 1.0",
        "dense_flagged": "<= 0.0",
    },
)

Row = tuple[str, Mapping[str, int]]


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores above another, ties half."""
    gap = scores[positive][:, None] - scores[~positive][None]
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())


def out_of_fold(rows: Sequence[Row], fold: Tensor, seed: int, epochs: int) -> tuple[Tensor, list[str]]:
    """Probabilities `[N, K]` of every row from a classifier that has not seen its fold, and the labels."""
    labels = sorted({label for label, _ in rows})
    found = torch.zeros(len(rows), len(labels), dtype=torch.float64)
    for k in fold.unique().tolist():
        judge = learned([r for r, f in zip(rows, fold.tolist(), strict=True) if f != k], seed=seed, epochs=epochs)
        for i in (fold == k).nonzero().flatten().tolist():
            odds = judge.probabilities(rows[i][1])
            found[i] = torch.tensor([odds.get(label, 0.0) for label in labels])
    return found, labels


def right(odds: Tensor, true: Tensor) -> float:
    return float((odds.argmax(1) == true).double().mean())


def swapped(odds: Tensor, true: Tensor, draw: torch.Generator, allowed: Tensor) -> float:
    """AUROC of max P - P(named) after a tenth of the names went to another allowed label, `allowed` `[N, K]` bool."""
    chosen = torch.zeros(len(true), dtype=torch.bool)
    chosen[torch.randperm(len(true), generator=draw)[: len(true) // 10]] = True
    chance = torch.rand(odds.shape, generator=draw).double() * allowed
    other = chance.scatter(1, true[:, None], -1.0).argmax(1)
    named = torch.where(chosen, other, true)
    return auroc(odds.amax(1) - odds.gather(1, named[:, None]).squeeze(1), chosen)


def by_size(sizes: Tensor, family: Tensor, fold: Tensor) -> float:
    """Best family accuracy of neighbours in the logarithm of the parameter count, over 1 to 15 of them."""
    gap = (sizes.log()[:, None] - sizes.log()[None]).abs()
    gap[fold[:, None] == fold[None]] = torch.inf
    votes = nn.functional.one_hot(family)
    near = gap.argsort(1)
    scores = [right(votes[near[:, :k]].sum(1), family) for k in (1, 3, 5, 9, 15)]
    return max(scores)


def flagged(seed: int) -> dict[str, float]:
    """Share of compressed, and of dense, networks of ours whose plain name is found wanting."""
    compressed, dense = [], []
    for name, workload in (("digits-cnn", DigitsCnn(8, 200)), ("digits-mlp", DigitsMlp((64,), 200))):
        subject = build(workload, Context(seed=seed))
        budget = replace(subject.budget, epochs=1)
        task, data = subject.task, subject.data
        pruner = MagnitudePrune(sparsity=0.8, start=0.0, ramp=0.0)
        sparse = fit(copy.deepcopy(subject.model), data, task, techniques=[pruner], budget=budget, seed=seed)
        for small in (apply(Int8PTQ(examples=32), subject, seed=seed), subject.with_model(sparse)):
            compressed.append(Dara(name=name).measure(small, Context())["anomalies"].value > 0)
        dense.append(Dara(name=name).measure(subject, Context())["anomalies"].value > 0)
    return {
        "compressed_flagged": sum(compressed) / len(compressed),
        "dense_flagged": sum(dense) / len(dense),
    }


def measure(seed: int, quick: bool) -> dict[str, float]:
    table = corpus()
    draw = seeded(seed, "folds")
    families, names = [row[0] for row in table], [row[1] for row in table]
    known = {k: sorted(set(v)) for k, v in (("family", families), ("variant", names))}
    family = torch.tensor([known["family"].index(f) for f in families])
    variant = torch.tensor([known["variant"].index(n) for n in names])
    sizes = torch.tensor([row[2] for row in table], dtype=torch.float64)
    order = torch.randperm(len(known["variant"]), generator=draw) % 5
    fold = order[variant]  # all networks of a variant together
    odds, _ = out_of_fold([(f, row[3]) for f, row in zip(families, table, strict=True)], fold, seed, 40)
    every = torch.ones_like(odds, dtype=torch.bool)
    twin = torch.tensor([names[:i].count(n) for i, n in enumerate(names)])
    near, _ = out_of_fold(
        [(n, row[3]) for n, row in zip(names, table, strict=True)], (fold + 2 * twin) % 5, seed, 60 if quick else 300
    )
    home = torch.zeros(len(known["variant"]), dtype=torch.long)
    home[variant] = family
    accuracy, size = right(odds, family), by_size(sizes, family, fold)
    return {
        "family_accuracy": accuracy,
        "parameter_count_accuracy": size,
        "over_parameter_count": accuracy - size,
        "variant_accuracy": right(near, variant),
        "auroc_across_families": swapped(odds, family, draw, every),
        "auroc_within_families": swapped(near, variant, draw, home[None] == family[:, None]),
        **flagged(seed),
    }
