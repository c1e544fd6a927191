"""How far stated confidence lies from the share of right answers, in bins of confidence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def bin_edges(confidence: Tensor, bins: int, rule: str) -> Tensor:
    """Edges of `bins` bins of confidence `[N]`: `[bins + 1]`, from 0 to 1, never falling.

    `equal-width` cuts [0, 1] into equal parts; `equal-mass` puts equal numbers of examples into each
    (equal confidences always share a bin, so bins may come out empty).
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    if rule == "equal-mass":
        edges[1:-1] = torch.quantile(confidence.double(), edges[1:-1])
    return edges


def bin_of(confidence: Tensor, edges: Tensor) -> Tensor:
    """The bin of every confidence, `[N]` int64. Bin b holds (edge b, edge b+1]; zero lies in the first."""
    return torch.bucketize(confidence.double(), edges[1:-1].contiguous())


@dataclass(frozen=True)
class Bins:
    """Sums over bins: examples, confidence and right answers, each `[bins]` float64."""

    count: Tensor
    confidence: Tensor
    right: Tensor

    @property
    def gaps(self) -> Tensor:
        """(confidence - right answers) of each bin as a share of all examples, `[bins]`.

        Absolute values add up to the expected calibration error; plain ones to the mean confidence
        minus the accuracy.
        """
        return (self.confidence - self.right) / self.count.sum()


def binned(confidence: Tensor, right: Tensor, edges: Tensor) -> Bins:
    """Sort confidence `[N]` and right answers `[N]` (bool) into the bins of `edges`."""
    where, size = bin_of(confidence, edges), len(edges) - 1
    columns = (torch.ones_like(confidence, dtype=torch.float64), confidence.double(), right.double())
    return Bins(*(torch.bincount(where, column, minlength=size) for column in columns))


def resampled_gaps(confidence: Tensor, right: Tensor, edges: Tensor, resamples: int, draw: torch.Generator) -> Tensor:
    """`Bins.gaps` of bootstrap samples drawn with replacement: `[resamples, bins]`. The edges stay."""
    where, size, count = bin_of(confidence, edges), len(edges) - 1, len(confidence)
    gap = confidence.double() - right.double()
    found = []
    for _ in range(resamples):
        rows = torch.randint(count, (count,), generator=draw)
        found.append(torch.bincount(where[rows], gap[rows], minlength=size) / count)
    return torch.stack(found)


def honest_gaps(confidence: Tensor, edges: Tensor, resamples: int, draw: torch.Generator) -> Tensor:
    """`Bins.gaps` if every confidence were true: each answer is right with just that chance. `[resamples, bins]`.

    Consistency resampling (Broecker and Smith 2007): what chance alone makes of a calibrated model.
    """
    where, size, count = bin_of(confidence, edges), len(edges) - 1, len(confidence)
    chance = confidence.double()
    found = []
    for _ in range(resamples):
        right = torch.rand(count, generator=draw, dtype=torch.float64) < chance
        found.append(torch.bincount(where, chance - right.double(), minlength=size) / count)
    return torch.stack(found)


def gap_interval(value: float, resampled: Tensor, honest: Tensor, share: float = 0.95) -> tuple[float, float]:
    """Interval of a sum of absolute gaps, which is never negative; always holds `value`.

    Twice the value minus the quantiles of its bootstrap samples: this turns round the upward bias of
    such a sum, which percentiles would double (basic bootstrap, Davison and Hinkley 1997, section 5.2).
    It reaches down to 0 when chance alone could make the value from calibrated answers.

    Args:
        value: the sum on the sample itself.
        resampled: the sum on bootstrap samples, `[R]`.
        honest: the sum under calibrated answers, `[R]`.
        share: of coverage.
    """
    ends = torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64)
    low, high = (float(q) for q in torch.quantile(resampled.double(), ends))
    chance = float(torch.quantile(honest.double(), ends[1]))
    bottom = 0.0 if value <= chance else max(0.0, min(value, 2 * value - high))
    return bottom, max(value, 2 * value - low)
