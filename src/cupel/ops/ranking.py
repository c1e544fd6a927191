"""Recall and NDCG of a full ranking, with ties counted at their expected worth."""

from __future__ import annotations

import torch
from torch import Tensor


def expected_top(scores: Tensor, seen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Chance of every item to be in the first `k` places, and its expected discount 1 / log2(1 + place).

    Ties are broken evenly at random and the expectation is exact, so the order in which items are stored says
    nothing (sklearn's `ndcg_score` counts the same way). NaN ranks with the lowest score.

    Args:
        scores: `[U, I]`, higher is better.
        seen: `[U, I]` bool, items that are out of the ranking.
        k: length of the list, at least 1.

    Returns:
        hits `[U, I]` in [0, 1] and gains `[U, I]` (a place beyond `k` gains nothing); both zero for seen items.
    """
    lowest, highest = torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max
    clean = scores.nan_to_num(nan=lowest, posinf=highest, neginf=lowest).masked_fill(seen, -torch.inf)
    k = min(k, scores.shape[1])
    top = clean.topk(k, dim=1).values.flip(1).contiguous()  # ascending; only these values can be in the list
    above = k - torch.searchsorted(top, clean, right=True)
    up_to = k - torch.searchsorted(top, clean, right=False)
    edge = clean == top[:, :1]  # only the last value of the list can be shared with items outside it
    last = torch.where(edge, above + edge.sum(1, keepdim=True), up_to)
    worth = 1.0 / torch.log2(torch.arange(2.0, k + 2, dtype=torch.float64, device=scores.device))
    gains = torch.cat((worth.new_zeros(1), worth.cumsum(0)))  # gains[p]: sum over the first p places
    inside, span = last.clamp_max(k), (last - above).clamp_min(1).double()
    out = seen | (clean < top[:, :1])
    return (
        ((inside - above) / span).masked_fill(out, 0.0),
        ((gains[inside] - gains[above]) / span).masked_fill(out, 0.0),
    )


def recall_at(scores: Tensor, relevant: Tensor, seen: Tensor, k: int) -> Tensor:
    """Share of a row's relevant unseen items among its first `k`; NaN for a row that has none.

    Shapes: all `[U, I]`, `relevant` and `seen` bool -> `[U]`, float64.
    """
    wanted = relevant & ~seen
    hits, _ = expected_top(scores, seen, k)
    return (hits * wanted).sum(1) / wanted.sum(1)


def ndcg_at(scores: Tensor, relevant: Tensor, seen: Tensor, k: int) -> Tensor:
    """Discounted gain of the first `k` over the best possible one; NaN for a row without relevant items.

    The best possible ranking holds min(`k`, relevant items) relevant ones in front, not only those that were
    found, as in some released code: that would give full marks for one hit in the first place.

    Shapes: all `[U, I]`, `relevant` and `seen` bool -> `[U]`, float64.
    """
    wanted = relevant & ~seen
    _, gains = expected_top(scores, seen, k)
    return (gains * wanted).sum(1) / best_gain(wanted.sum(1), k)


def best_gain(relevant: Tensor, k: int) -> Tensor:
    """Discounted gain of a list of `k` that starts with all of `relevant` `[U]` items (a count), float64."""
    worth = 1.0 / torch.log2(torch.arange(2.0, k + 2, dtype=torch.float64, device=relevant.device))
    return torch.cat((worth.new_zeros(1), worth.cumsum(0)))[relevant.clamp_max(k)]
