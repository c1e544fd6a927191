"""What separates training from fresh data: distances of samples, divergences, and the bounds on a loss they give.

Rows of samples are examples `[m, d]`; expectations over a gap are in the unit of the loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def directions(width: int, count: int, draw: torch.Generator) -> Tensor:
    """`count` random unit vectors as columns, `[width, count]`."""
    found = torch.randn(width, count, generator=draw)
    unit: Tensor = found / found.norm(dim=0)
    return unit


def sliced_distance(a: Tensor, b: Tensor) -> Tensor:
    """W1 between two samples of one size along each of their columns, `[m, k]`, `[m, k]` -> `[k]`.

    >>> sliced_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [1.0]])).tolist()
    [1.0]
    """
    return (a.sort(0).values - b.sort(0).values).abs().mean(0)


def gaussian_kl(mean: Tensor, variance: Tensor, mean0: Tensor, variance0: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(mean0, variance0)) of independent coordinates, entry by entry, in nats."""
    return ((variance + (mean - mean0).square()) / variance0 - 1 - (variance / variance0).log()) / 2


def averaging_kl(width: int, count: int) -> float:
    """E_w KL(training point given w || fresh point), w the mean of `count` points N(mu, s^2 I), in `width` dimensions.

    Given w a training point is N(w, s^2 (1 - 1/n) I): the means add 1/n, the variances take it away, and what is left
    is -(width / 2) ln(1 - 1/n), about width / 2n.
    """
    return -0.5 * width * math.log1p(-1 / count)


def kl_bound(kl: float, spread: float = 0.5) -> float:
    """Bound on the gap of a `spread`-sub-Gaussian loss (1/2 for one in [0, 1]) from the mean KL of a training point.

    >>> kl_bound(0.02)
    0.1
    """
    return spread * math.sqrt(2 * kl)


def averaging_gap(centre: Tensor, spread: float, count: int, draws: int, draw: torch.Generator) -> tuple[float, float]:
    """Mean over w of test minus training error of x -> sign(w x), and its standard error.

    X given Y is N(Y `centre`, `spread`^2 I), and w the mean of Y_i X_i over `count` examples: both errors are normal
    tails given w, so only w `[draws, d]` is drawn.
    """
    w = centre + spread / math.sqrt(count) * torch.randn(draws, len(centre), generator=draw, dtype=centre.dtype)
    size = w.norm(dim=1)
    test = torch.special.ndtr(-(w @ centre) / (spread * size))
    train = torch.special.ndtr(-size / (spread * math.sqrt(1 - 1 / count)))
    gap = test - train
    return float(gap.mean()), float(gap.std() / math.sqrt(draws))


def dropout_contraction(rate: float, units: int) -> float:
    """Most of a KL that survives dropout of `units` units at `rate`: 1 - rate^units, all but the chance that all fall.

    A matrix whose entries are dropped (DropConnect) counts its entries as units.
    """
    return 1 - rate**units


def noise_contraction(deviation: float, bound: float, units: int) -> float:
    """Most of a KL that survives Gaussian noise on `units` activations in [-bound, bound]: 1 - 2 Q(sqrt(d) B / s).

    >>> round(noise_contraction(1.0, 1.0, 1), 4)
    0.6827
    """
    return math.erf(math.sqrt(units) * bound / deviation / math.sqrt(2))
