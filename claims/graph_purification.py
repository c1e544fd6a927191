"""Claim of `graph-purification`: filters win nodes back from an attack that does not know them, and not from one that does."""

from __future__ import annotations

from dataclasses import replace

import torch

from cupel.core.context import Context, derive, seeded
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.ops.node_attack import NodeThreat, siege
from cupel.runner.claims import Claim
from cupel.techniques.robust.graph_purification import GraphPurification
from cupel.workloads.structured.cora_gcn import CoraGCN

CLAIM = Claim(
    method="graph-purification",
    statement="On Cora, under degree + 2 flips by a surrogate that does not know of the filter, Jaccard wins back at least "
    "20 points of the targets at a clean cost of at most 2 points, and low rank (50) wins back at least 20 points; attacks "
    "that see the graph through the filter take at least 20 of these points away again, from either",
    paper="Jaccard restores most targets of gradient attacks at no clean cost (Wu et al. 2019); rank 10 vaccinates a GCN "
    "against Nettack (Entezari et al. 2020); adaptive attacks undo both (Mujkanovic et al., NeurIPS 2022, arXiv 2301.13694)",
    bounds={
        "jaccard_gain": ">= 0.2",
        "jaccard_clean_cost": "<= 0.02",
        "svd_gain": ">= 0.2",
        "jaccard_adaptive_fall": ">= 0.2",
        "svd_adaptive_fall": ">= 0.2",
    },
    seeds=(0, 1, 2),
    quick_seeds=1,
    explains="Only the clean cost of Jaccard is missed, 2.2 points with an interval from 0.6 to 3.9. Its least similarity of "
    "0.01 hides the 572 of 5,278 true citations whose ends share no word; a likely reason, which was not tested apart. Low "
    "rank costs more and is not bounded here. Under attacks that know the filter no target stands, with either. "
    "The bounds were agreed first, and written down after a look at one seed.",
)
FILTERS = {"jaccard": GraphPurification(), "svd": GraphPurification(by="svd")}
TARGETS = {"jaccard": 60, "svd": 20}  # every call of svd looks for 50 eigenvectors


def trained(name: str, seed: int, quick: bool) -> Subject:
    subject = build(CoraGCN(), Context(seed=seed))
    budget = replace(subject.budget, epochs=40 if quick else 200)
    made = [replace(FILTERS[name], rank=10 if quick else 50)] if name in FILTERS else []
    return subject.with_model(fit(subject.model, subject.data, subject.task, techniques=made, budget=budget, seed=seed))


def under_attack(subject: Subject, targets: int, seed: int) -> dict[str, torch.Tensor]:
    """Which targets stand under every attack, `[n]` bool by name."""
    _, _, told = siege(subject, NodeThreat(), targets, "claim", derive(seed, "surrogate"), seeded(seed, "random"))
    return {name: torch.tensor([right for right, _ in rows]) for name, rows in told.items()}


def share(hit: torch.Tensor) -> float:
    return float(hit.double().mean())


def measure(seed: int, quick: bool) -> dict[str, float]:
    subjects = {name: trained(name, seed, quick) for name in ("plain", *FILTERS)}
    targets = {name: 8 if quick else count for name, count in TARGETS.items()}
    clean = {n: float((s.outputs().argmax(1) == s.data.test.targets).double().mean()) for n, s in subjects.items()}
    plain = {n: under_attack(subjects["plain"], n, seed) for n in sorted(set(targets.values()))}
    adaptive, told = {}, {"plain_clean": clean["plain"]}
    for name in FILTERS:
        count = targets[name]
        hold = under_attack(subjects[name], count, seed)
        worst = hold["surrogate"] & hold["gradient"]
        adaptive[f"{name}_adaptive"] = share(worst)
        told |= {f"{name}_{n}": share(hold[n]) for n in ("surrogate", "gradient", "blind", "random")}
        told |= {f"{name}_clean": clean[name], f"{name}_clean_cost": clean["plain"] - clean[name]}
        told[f"{name}_plain_blind"] = share(plain[count]["surrogate"])
        told[f"{name}_gain"] = told[f"{name}_blind"] - told[f"{name}_plain_blind"]
        told[f"{name}_adaptive_fall"] = told[f"{name}_blind"] - share(worst)
    return adaptive | told
