"""Randomised smoothing: seeded noise for every input, exact binomial bounds, and certified radii.

The smoothed classifier of f answers argmax_k P(f(x + sigma z) = k), z standard normal. If its class has at least
probability p > 1/2, no input within sigma Phi^-1(p) of x in the l2 norm changes its answer.

Source: J. Cohen, E. Rosenfeld, Z. Kolter, Certified Adversarial Robustness via Randomized Smoothing, ICML 2019,
arXiv 1902.02918, theorem 1; C. Clopper, E. Pearson, The Use of Confidence or Fiducial Limits, Biometrika 26, 1934.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

BLOCK = 500  # noisy copies that one generator draws, so that a prefix of the noise can be drawn again

Classify = Callable[[Tensor], Tensor]  # inputs [B, ...] -> classes [B]


def beta_log_cdf(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the regularised incomplete beta function I_x(a, b), and of its density; float64, 0 < x < 1.

    By its continued fraction, on the side of the mean where that converges in about sqrt(a + b) terms.
    """
    left = x <= (a + 1) / (a + b + 2)
    u, p, q = torch.where(left, x, 1 - x), torch.where(left, a, b), torch.where(left, b, a)
    weight = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b) + a * x.log() + b * torch.log1p(-x)
    part = weight - p.log() + _fraction(u, p, q).log()
    part = part.clamp_max(-1e-300)
    return torch.where(left, part, torch.log(-torch.expm1(part))), weight - x.log() - torch.log1p(-x)


def _fraction(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The continued fraction 1 / (1 + d1 / (1 + d2 / (1 + ...))) of I_x(a, b), from the front by ratios of terms."""
    x_, a_, b_ = (t.cpu().numpy() for t in (x, a, b))  # thousands of short sums, which NumPy begins sooner
    upper, lower = np.ones_like(x_), 1 / (1 - (a_ + b_) / (a_ + 1) * x_)
    total = lower
    for m in range(1, 20_000):
        even = m * (b_ - m) * x_ / ((a_ + 2 * m - 1) * (a_ + 2 * m))
        odd = -(a_ + m) * (a_ + b_ + m) * x_ / ((a_ + 2 * m) * (a_ + 2 * m + 1))
        before = total
        for term in (even, odd):
            lower, upper = 1 / (1 + term * lower), 1 + term / upper
            total = total * lower * upper
        if (np.abs(total - before) <= 1e-13 * np.abs(total)).all():
            break
    return torch.as_tensor(total, device=x.device)


def lower_bound(hits: Tensor, count: Tensor | int, alpha: float) -> Tensor:
    """Clopper-Pearson: the p at which `hits` or more of `count` have probability `alpha`; float64, 0 for no hit.

    The true share lies above it with confidence 1 - `alpha`, one-sided. Newton's steps on log I in the logit of p:
    that function is concave, so they converge from anywhere.

    >>> round(float(lower_bound(torch.tensor(100), 100, 0.001)), 6)  # 0.001 ** (1 / 100)
    0.933254
    """
    hits, count = torch.broadcast_tensors(hits.double(), torch.as_tensor(count, device=hits.device).double())
    k = hits.clamp_min(1)
    a, b = k, count - k + 1
    goal = torch.tensor(alpha, dtype=torch.float64, device=hits.device).log()
    # Begin where a normal law of the logit puts the bound.
    at = (a / b).log() + torch.special.ndtri(goal.exp()) * (1 / a + 1 / b).sqrt()
    for _ in range(40):
        p = at.sigmoid().clamp(1e-300, 1 - 1e-16)
        log_cdf, log_density = beta_log_cdf(p, a, b)
        step = (goal - log_cdf) * (log_cdf - log_density - p.log() - torch.log1p(-p)).exp()
        at = at + step.clamp(-3, 3)
        if bool((step.abs() < 1e-9).all()):
            break
    return torch.where(hits > 0, at.sigmoid(), torch.zeros_like(at))


def upper_bound(hits: Tensor, count: Tensor | int, alpha: float) -> Tensor:
    """The true share lies below it with confidence 1 - `alpha`, one-sided; 1 where every trial was a hit."""
    return 1 - lower_bound(torch.as_tensor(count, device=hits.device) - hits, count, alpha)


def radius_of(p: Tensor, sigma: float) -> Tensor:
    """sigma Phi^-1(p) where p > 1/2, in input units; 0 where nothing is certified."""
    radius: Tensor = sigma * torch.special.ndtri(p.clamp(0.5, 1 - 1e-16))
    return radius


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of width `sigma` whose draws depend on a name, the input's number and the block alone.

    Args:
        generator: of a name; two calls with one name give the same numbers.
    """

    sigma: float
    generator: Callable[[str], torch.Generator]

    def copies(self, x: Tensor, row: int, part: str, first: int, count: int) -> Iterator[Tensor]:
        """Noisy copies number `first` to `count` of one input `x` `[...]`, in pieces of at most `BLOCK`."""
        if first >= count:
            return
        for block in range(first // BLOCK, -(-count // BLOCK)):
            draws = torch.randn(BLOCK, *x.shape, generator=self.generator(f"{part}-{row}-{block}"))
            low, high = max(first - block * BLOCK, 0), min(count - block * BLOCK, BLOCK)
            yield x + self.sigma * draws[low:high].to(x)


@torch.no_grad()
def answers_of(classify: Classify, x: Tensor, row: int, noise: Noise, part: str, count: int, first: int = 0) -> Tensor:
    """Classes of noisy copies number `first` to `count` of one input, `[count - first]` int16 on the CPU."""
    found = [classify(copies).to("cpu", torch.int16) for copies in noise.copies(x, row, part, first, count)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int16)


@dataclass
class Remembered:
    """Answers under keys that name network, input and noise; the least recently used go when `room` bytes are full."""

    room: int
    held: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)

    def recall(self, key: str) -> Tensor:
        """What is known under `key`, `[M]` int16, perhaps empty."""
        if key in self.held:
            self.held.move_to_end(key)
        return self.held.get(key, torch.zeros(0, dtype=torch.int16))

    def keep(self, key: str, answers: Tensor) -> None:
        self.held[key] = answers
        self.held.move_to_end(key)
        while sum(t.numel() * t.element_size() for t in self.held.values()) > self.room and len(self.held) > 1:
            self.held.popitem(last=False)


def most_frequent(answers: Tensor) -> Tensor:
    """The most frequent class of every row, `[N, M]` -> `[N]` int64; the lowest number where several are."""
    classes = int(answers.max()) + 1
    counts = torch.zeros(len(answers), classes, dtype=torch.long)
    return counts.scatter_add_(1, answers.long(), torch.ones_like(answers, dtype=torch.long)).argmax(1)
