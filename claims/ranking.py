"""Claim of `ranking`: full ranking agrees with independent code, and a ranking among sampled items would mislead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.ops.ranking import recall_at
from cupel.probes.quality.ranking import Ranking
from cupel.runner.claims import Claim
from cupel.workloads.structured.movielens_kgat import MovielensKGAT

CLAIM = Claim(
    method="ranking",
    statement="On MovieLens-100K the readings equal scikit-learn's NDCG and a slow loop, put matrix factorisation "
    "above popularity, and stand far below what ranking the same items among 100 sampled ones would show",
    paper="Krichene and Rendle 2020: sampled metrics need not keep the order of recommenders; no single number",
    bounds={"oracle_gap": "<= 1e-9", "gain_over_popularity": ">= 0.05", "sampled_excess": ">= 0.2"},
)


def slow(scores: Tensor, seen: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Mean Recall@20 by sorting each row, and mean NDCG@20 by scikit-learn, over the unseen items of each user."""
    from sklearn.metrics import ndcg_score

    recall, ndcg = [], []
    for row, out, good in zip(scores.double().numpy(), seen.numpy(), wanted.numpy(), strict=True):
        left, relevant = row[~out], good[~out]
        top = np.argsort(-left, kind="stable")[:20]
        recall.append(relevant[top].sum() / relevant.sum())
        ndcg.append(ndcg_score(relevant[None], left[None], k=20, ignore_ties=True))
    return float(np.mean(recall)), float(np.mean(ndcg))


def sampled_recall(scores: Tensor, seen: Tensor, wanted: Tensor, draw: torch.Generator) -> float:
    """Recall@20 when each relevant item is ranked among 100 unseen irrelevant ones (the habit to avoid)."""
    chance = torch.rand(scores.shape, generator=draw).masked_fill(seen | wanted, -1)
    rivals = torch.zeros_like(seen).scatter(1, chance.topk(100, dim=1).indices, True)
    hits = torch.zeros(scores.shape, dtype=torch.float64)
    for item in range(scores.shape[1]):
        rows = wanted[:, item].nonzero().flatten()
        if len(rows):
            asked = torch.zeros_like(rivals[rows])
            asked[:, item] = True
            hits[rows, item] = recall_at(scores[rows], asked, ~(rivals[rows] | asked), 20)
    return float((hits.sum(1) / wanted.sum(1)).mean())


def measure(seed: int, quick: bool) -> dict[str, float]:
    factors = MovielensKGAT(layers=(), attention=False, kge=False, graph="attributes", l2=2e-2)
    subject = build(factors, Context(seed=seed))
    budget = replace(subject.budget, epochs=8 if quick else 40, batch_size=1024, lr=2e-2)
    net = fit(subject.model, subject.data, subject.task, budget=budget, seed=seed)
    trained = subject.with_model(net)
    batches = list(subject.data.test.batches(500))
    seen = torch.cat([b.inputs["seen"] for b in batches])
    wanted = torch.cat([b.targets for b in batches])
    found = Ranking().measure(trained, Context())
    recall, ndcg = slow(trained.outputs(), seen, wanted)
    popular = float(recall_at(seen.sum(0).float().expand(len(seen), -1), wanted, seen, 20).mean())
    sampled = sampled_recall(trained.outputs(), seen, wanted, seeded(seed, "sampled"))
    here = found["recall_at_20"].value
    return {
        "recall_at_20": here,
        "ndcg_at_20": found["ndcg_at_20"].value,
        "tail_recall_at_20": found["tail_recall_at_20"].value,
        "coverage_at_20": found["coverage_at_20"].value,
        "popularity_recall_at_20": popular,
        "sampled_recall_at_20": sampled,
        "oracle_gap": max(abs(here - recall), abs(found["ndcg_at_20"].value - ndcg)),
        "gain_over_popularity": here - popular,
        "sampled_excess": sampled - here,
    }
