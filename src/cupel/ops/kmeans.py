"""Clusters of numbers on a line: Lloyd's rounds on sorted values, exact and without draws."""

from __future__ import annotations

import torch
from torch import Tensor


def assigned(values: Tensor, centres: Tensor) -> Tensor:
    """Which of the rising `centres` `[K]` is nearest to every value; half-way between two, the lower one. int64.

    >>> assigned(torch.tensor([0.0, 0.4, 0.9]), torch.tensor([0.0, 1.0])).tolist()
    [0, 0, 1]
    """
    return torch.bucketize(values, (centres[1:] + centres[:-1]) / 2)


def cluster_line(values: Tensor, count: int, rounds: int = 100) -> Tensor:
    """Up to `count` centres of `values` `[N]`, rising: `[K]` in the dtype of `values`.

    Centres start evenly spaced from the least to the largest value, which keeps some among the few large ones (Han et
    al. 2016, section 3.2). Each round every value joins its nearest centre and each centre moves to the mean of its
    values; a centre without values is dropped. Ends when no value changes its centre, or after `rounds`. With no more
    than `count` distinct values, these are the centres.
    """
    ranked = values.detach().flatten().sort().values
    distinct: Tensor = ranked.unique()
    if len(distinct) <= count:
        return distinct
    exact = ranked.double()
    sums = torch.cat([exact.new_zeros(1), exact.cumsum(0)])
    step = torch.arange(count, dtype=torch.float64, device=exact.device) / max(count - 1, 1)
    centres = exact[0] + (exact[-1] - exact[0]) * step if count > 1 else exact.mean().view(1)
    before = torch.empty(0, dtype=torch.int64, device=exact.device)
    for _ in range(rounds):
        cuts = torch.searchsorted(exact, (centres[1:] + centres[:-1]) / 2, right=True)
        edges = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(exact))])
        if torch.equal(edges, before):
            break
        low, high = edges[:-1], edges[1:]
        held = high > low
        centres = (sums[high[held]] - sums[low[held]]) / (high[held] - low[held])
        before = edges if bool(held.all()) else edges.new_empty(0)
    found: Tensor = centres.to(values.dtype).unique()
    return found
