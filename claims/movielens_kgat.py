"""Claim of `movielens-kgat`: facts and attention against matrix factorisation, each at its own best."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.ops.ranking import best_gain, expected_top
from cupel.probes.quality.ranking import quarters
from cupel.runner.claims import Claim
from cupel.workloads.structured.movielens_kgat import MovielensKGAT

CLAIM = Claim(
    method="movielens-kgat",
    statement="On MovieLens-100K with attribute facts KGAT (d = 32, layers 32 and 16) has at least 3 percent more "
    "Recall@20 than matrix factorisation of the same d and as many epochs at its own tuned settings, gains more on the "
    "quarter of items with fewest interactions, and no ablation beats it by over a standard error",
    paper="Recall@20 above the best baseline by 8.95% (Amazon-book), 4.93% (Last-FM), 7.18% (Yelp2018)",
    bounds={
        "recall_gain": ">= 0.03",
        "tail_gain_over_gain": "> 0",
        "no_attention_excess_in_errors": "<= 1",
        "no_kge_excess_in_errors": "<= 1",
    },
    seeds=(0, 1, 2),
    quick_seeds=1,
    explains="The margin is the baseline's tuning: KGAT is 13 percent above factorisation at the authors' l2 of 1e-5 "
    "(0.347 against 0.307), and level with it (0.350) once l2 and the learning rate are chosen on validation data. The "
    "facts still help where interactions are few: Recall@20 on the third quarter of items 0.040 against 0.031; the two "
    "rarest quarters (0 to 7 interactions, under 1 percent of test pairs in the first) reach the first twenty for almost "
    "nobody. Training the facts is worth 1.1 points, attention nothing measurable.",
)

# Chosen on the validation part at seed 0: lr 1e-3 to 2e-2, l2 1e-5 to 1e-1, both schedules, batches of 1024 and 2048.
KGAT: dict[str, object] = {"graph": "attributes", "l2": 1e-2}
KGAT_BUDGET: dict[str, object] = {"epochs": 40, "batch_size": 2048, "lr": 1e-2, "schedule": "linear"}
MF: dict[str, object] = {"graph": "attributes", "layers": (), "attention": False, "kge": False, "l2": 2e-2}
MF_BUDGET: dict[str, object] = {"epochs": 40, "batch_size": 1024, "lr": 2e-2, "schedule": "linear"}
PEERS = {
    "kgat": (KGAT, KGAT_BUDGET),
    "no_attention": (KGAT | {"attention": False}, KGAT_BUDGET),
    "no_kge": (KGAT | {"kge": False}, KGAT_BUDGET),
    "factors": (MF, MF_BUDGET),
    "factors_untuned": (MF | {"l2": 1e-5}, {"epochs": 40, "batch_size": 1024, "lr": 5e-3, "schedule": "constant"}),
}


@dataclass(frozen=True)
class Found:
    """Recall@20 of every user, its mean over users by quarter of items (least known first), and NDCG@20."""

    recall: Tensor
    quarters: list[float]
    ndcg: float


def judged(name: str, seed: int, quick: bool) -> Found:
    changes, budget = PEERS[name]
    subject = build(MovielensKGAT(**changes), Context(seed=seed))
    chosen = replace(subject.budget, **(budget | ({"epochs": 4} if quick else {})))
    net = fit(subject.model, subject.data, subject.task, budget=chosen, seed=seed)
    batches = list(subject.data.test.batches(500))
    seen, wanted = torch.cat([b.inputs["seen"] for b in batches]), torch.cat([b.targets for b in batches])
    hits, gains = expected_top(subject.with_model(net).outputs(), seen, 20)
    quarter = quarters(seen.sum(0))
    parts = [(hits * p).sum(1) / p.sum(1) for p in (wanted & (quarter == q) for q in range(4))]
    ndcg = (gains * wanted).sum(1) / best_gain(wanted.sum(1), 20)
    return Found((hits * wanted).sum(1) / wanted.sum(1), [float(p.nanmean()) for p in parts], float(ndcg.mean()))


def contrast(a: float, b: float) -> float:
    """Gain of a over b that stays finite where b is zero: (a - b) / (a + b)."""
    return (a - b) / (a + b) if a + b > 0 else 0.0


def measure(seed: int, quick: bool) -> dict[str, float]:
    names = ("kgat", "factors") if quick else tuple(PEERS)
    found = {name: judged(name, seed, quick) for name in names}
    recall = {name: float(f.recall.mean()) for name, f in found.items()}
    kgat, factors = found["kgat"], found["factors"]
    told = {f"{name}_recall": value for name, value in recall.items()} | {f"{n}_ndcg": f.ndcg for n, f in found.items()}
    told |= {f"{name}_quarter_{q + 1}": found[name].quarters[q] for name in ("kgat", "factors") for q in range(4)}
    told["recall_gain"] = recall["kgat"] / recall["factors"] - 1
    whole = contrast(recall["kgat"], recall["factors"])
    for q, key in enumerate(("tail_gain_over_gain", "second_quarter_gain_over_gain", "third_quarter_gain_over_gain")):
        # Where neither finds anything there is no gain, even if the whole is a loss.
        told[key] = contrast(kgat.quarters[q], factors.quarters[q]) - max(whole, 0.0)
    for name in ("no_attention", "no_kge"):
        # With --quick the ablations are not run: their excess is that of the full network over itself.
        gap = found.get(name, kgat).recall - kgat.recall
        told[f"{name}_excess_in_errors"] = float(gap.mean() / (gap.std() / len(gap) ** 0.5 + 1e-12))
    return told
