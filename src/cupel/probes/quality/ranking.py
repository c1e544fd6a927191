"""Probe `ranking`: how many of the items that people liked stand in the first twenty of all they had not seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, mean_of
from cupel.core.types import Subject
from cupel.ops.ranking import best_gain, expected_top

CARD = Card(
    name="ranking",
    family="quality",
    source="K. Jarvelin, J. Kekalainen, Cumulated Gain-Based Evaluation of IR Techniques, ACM TOIS 20(4), 2002; "
    "all items ranked: W. Krichene, S. Rendle, On Sampled Metrics for Item Recommendation, KDD 2020; "
    "ties: F. McSherry, M. Najork, Computing Information Retrieval Performance Measures Efficiently in the Presence "
    "of Tied Scores, ECIR 2008",
    tags=("quality", "recommendation", "ranking", "long-tail"),
    needs=("ranking",),
    readings=("recall_at_20", "ndcg_at_20", "tail_recall_at_20", "coverage_at_20"),
    tiny={"tail": 0.5},
    ordered={"recall_at_20": "trained"},
)

K = 20


def quarters(known: Tensor) -> Tensor:
    """Quarter 0 (least known) to 3 of every item by how often it was seen, `[I]` counts -> `[I]`; ties by number."""
    place = torch.empty_like(known)
    place[known.argsort(stable=True)] = torch.arange(len(known), device=known.device)
    return place * 4 // len(known)


def rarest(known: Tensor, share: float) -> Tensor:
    """The least known items, at most `share` of all: counts `[I]` -> bool `[I]`.

    Items of equal count are all in or all out, except that the least known are in whatever their number.
    """
    ordered = known.sort().values
    quota = round(share * len(known))
    over = ordered[quota] if quota < len(known) else ordered[-1] + 1
    return (known < over) | (known == ordered[0])


def recall_of(hits: Tensor, wanted: Tensor) -> list[float]:
    """Recall of every row that wants something: hits `[U, I]` in [0, 1], wanted `[U, I]` bool."""
    some = wanted.any(1)
    values: list[float] = ((hits * wanted).sum(1) / wanted.sum(1))[some].tolist()
    return values


def bounded(reading: Reading) -> Reading:
    """A mean of shares, its interval cut to [0, 1]; of no rows: zero, and nothing known about it."""
    if reading.count == 0:
        return Reading(0.0, "share", reading.better, 0, 0.0, 1.0)
    low, high = reading.low, reading.high
    return replace(
        reading, low=max(0.0, low if low is not None else 0.0), high=min(1.0, high if high is not None else 1.0)
    )


@dataclass(frozen=True)
class Ranking:
    r"""Rank all items a user has not seen and look for the held-out ones among the first twenty.

    Recall@20 = |first 20 and relevant| / |relevant|; NDCG@20 = sum over relevant places p <= 20 of 1 / log2(1 + p),
    over the same sum for the best possible order. Both are means over users. `tail_recall` counts only relevant items
    that belong to the `tail` of items with fewest interactions known of the ranked users; the ranking is still over
    all items. Coverage is the share of items that stand in anyone's first twenty. Equal scores share their places
    evenly.

    The test split must give batches with `inputs["seen"]` `[B, I]` bool, items out of the ranking, and `targets`
    `[B, I]` bool, the relevant ones; the model's output on the batch must be the scores `[B, I]`. A user without
    relevant items is left out.

    Raises:
        NotApplicable: the test split or the outputs have another form.

    Source: Jarvelin and Kekalainen 2002; Krichene and Rendle 2020 for ranking all items instead of a sample.

    Departs: the best possible order holds all relevant items that fit, as in Jarvelin and Kekalainen; code released
    with several recommenders takes the found ones only, which gives more.

    Example:
        >>> Ranking(tail=0.25)
        Ranking(tail=0.25)
    """

    tail: float = param(0.25, "share of items, those with fewest interactions, that make the tail", gt=0, le=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        scores, seen, wanted = _table(subject)
        hits, gains = expected_top(scores, seen, K)
        known = seen.sum(0)
        rare = rarest(known, self.tail)
        some = wanted.any(1)
        ndcg = ((gains * wanted).sum(1)[some] / best_gain(wanted.sum(1)[some], K)).tolist()
        quarter = quarters(known)
        parts = [recall_of(hits, wanted & (quarter == q)) for q in range(4)]
        curve = {k: _mean(recall_of(expected_top(scores, seen, k)[0], wanted)) for k in (5, 10, 50)}
        return Readings.of(
            recall_at_20=bounded(mean_of(recall_of(hits, wanted), "share", "higher")),
            ndcg_at_20=bounded(mean_of(ndcg, "share", "higher")),
            tail_recall_at_20=bounded(mean_of(recall_of(hits, wanted & rare), "share", "higher")),
            coverage_at_20=exact(float((hits > 0).any(0).double().mean()), "share", "higher"),
            figures={
                "recall_at": {str(k): value for k, value in curve.items()},
                "recall_by_quarter": [_mean(p) for p in parts],
                "users_by_quarter": [len(p) for p in parts],
                "tail_items": int(rare.sum()),
            },
        )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _table(subject: Subject) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, seen and wanted items of all test users, `[U, I]` each."""
    batches = list(subject.data.test.batches(500))
    if not batches or not all(isinstance(b.inputs, dict) and "seen" in b.inputs for b in batches):
        raise NotApplicable(
            "test batches must hold a dict of inputs with `seen`; they do not. Use a workload that ranks items."
        )
    seen = torch.cat([b.inputs["seen"] for b in batches])
    wanted = torch.cat([b.targets for b in batches]).bool() & ~seen
    scores = subject.outputs("test")
    if scores.shape != seen.shape:
        raise NotApplicable(
            f"outputs must be scores of all items, {tuple(seen.shape)}; got {tuple(scores.shape)}. "
            "Give the model's ranking scores on test batches."
        )
    return scores, seen, wanted
