"""A smoothing certificate of one network carried over to a network that was made from it.

Source: S. Ugare, T. Suresh, D. Banerjee, G. Singh, S. Misailovic, Incremental Randomized Smoothing Certification,
ICLR 2024, arXiv 2305.19521, theorem 2 and algorithms 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.ops.smoothing import lower_bound, radius_of, upper_bound


def project(hits: Tensor, seen: int, sizes: Sequence[int]) -> Tensor:
    """Hits among each of `sizes` copies, `[S, N]`: counted where so many were seen, else at the same share.

    Args:
        hits: `[N, seen]` bool, copy by copy.
    """
    counted = torch.cat([torch.zeros(len(hits), 1), hits.cumsum(1)], 1)
    rows = [counted[:, m] if m <= seen else (counted[:, seen] * (m / seen)).round() for m in sizes]
    return torch.stack(rows)


@dataclass(frozen=True)
class Counts:
    """What is known of every input after `samples` noisy copies of the changed network.

    Args:
        original: `[N]` copies out of `total` on which the original gave its class.
        differing: `[N]` copies out of `samples` on which the two networks differ.
        kept: `[N]` copies out of `samples` on which the changed network gives the original's class.
    """

    original: Tensor
    total: int
    differing: Tensor
    kept: Tensor
    samples: int

    def incremental(self, alpha: float, gamma: float) -> Tensor:
        """p(original) - zeta, or where p(original) >= gamma the share of the changed network itself, `[N]`.

        Right with probability 1 - `alpha` in all, half of it for each of the two bounds. In the second case the
        whole of `alpha` would be too much: the case was chosen by looking at the same noise.
        """
        p = lower_bound(self.original, self.total, alpha / 2)
        zeta = upper_bound(self.differing, self.samples, alpha / 2)
        return torch.where(p < gamma, p - zeta, lower_bound(self.kept, self.samples, alpha / 2))

    def better(self, alpha: float) -> Tensor:
        """The larger of both lower bounds, `[N]`: a quarter of `alpha` each for p and zeta, half for the other."""
        return torch.maximum(self.carried(alpha / 4), lower_bound(self.kept, self.samples, alpha / 2))

    def carried(self, share: float) -> Tensor:
        """p(original) - zeta, `[N]`, with `share` of alpha for each of them."""
        zeta = upper_bound(self.differing, self.samples, share)
        return lower_bound(self.original, self.total, share) - zeta


@dataclass(frozen=True)
class Pair:
    """What both networks answered: `before` `[N, n]`, `after` `[N, at least m]`; `own`: the vote of the changed one."""

    y: Tensor
    classes: Tensor
    before: Tensor
    after: Tensor
    own: Tensor
    sigma: float
    alpha: float
    gamma: float

    most = 10**6  # copies beyond which nothing is projected

    def counts(self, m: int) -> Counts:
        old, new = self.before[:, :m], self.after[:, :m]
        hits = (self.before == self.classes[:, None]).sum(1)
        return Counts(hits, self.before.shape[1], (old != new).sum(1), (new == self.classes[:, None]).sum(1), m)

    def bound(self, rule: str, m: int) -> Tensor:
        counts = self.counts(m)
        return counts.better(self.alpha) if rule == "better" else counts.incremental(self.alpha, self.gamma)

    def average(self, p: Tensor, classes: Tensor) -> float:
        """Mean radius; 0 where the class is wrong or nothing is certified."""
        return float((radius_of(p, self.sigma) * (classes == self.y)).mean())

    def anew(self, size: int) -> float:
        """Average radius of certifying the changed network anew with `size` copies."""
        return self._anew([size])[0]

    def _anew(self, sizes: Sequence[int]) -> list[float]:
        hits = project(self.after == self.own[:, None], self.after.shape[1], sizes)
        p = lower_bound(hits, torch.tensor(sizes)[:, None], self.alpha)
        return [self.average(row, self.own) for row in p]

    def needed(self, radius: float) -> float:
        """Copies with which certifying anew reaches that average radius; between sizes by their logarithm."""
        sizes = [round(10 ** (1 + k / 12)) for k in range(61)]
        # Upwards in strides, because bounds of many copies take long; then by halves.
        high = next((k for k in range(0, 61, 6) if self.anew(sizes[k]) >= radius), None)
        if not high:
            return float(self.most if high is None else sizes[0])
        low = high - 6
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.anew(sizes[middle]) >= radius else (middle, high)
        before, after = self.anew(sizes[low]), self.anew(sizes[high])
        return float(sizes[low] * (sizes[high] / sizes[low]) ** ((radius - before) / (after - before)))

    def crossover(self, m: int) -> float:
        """The zeta at which p - zeta, the same zeta everywhere, is worth as much as certifying anew with m copies."""
        p, goal = lower_bound(self.counts(m).original, self.before.shape[1], self.alpha / 2), self.anew(m)
        low, high = 0.0, 0.5
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.average(p - middle, self.classes) >= goal else (low, middle)
        return low if goal > 0 else 0.5

    def curve(self) -> list[dict[str, float]]:
        """Average radii by the number of copies, for all rules."""
        shares = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
        sizes = sorted({m for s in shares if (m := round(s * self.before.shape[1])) and m <= self.after.shape[1]})
        found = []
        for m, anew in zip(sizes, self._anew(sizes), strict=True):
            rules = {r: round(self.average(self.bound(r, m), self.classes), 5) for r in ("incremental", "better")}
            found.append({"samples": m, **rules, "anew": round(anew, 5)})
        return found
