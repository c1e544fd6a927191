"""Singular values of weight matrices: penalties that shape them, and how well conditioned a (pruned) matrix is.

A weight `[out, in, ...]` counts as the matrix `[out, in * ...]` that multiplies one input patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SMOOTH = 1e-8  # under the root of |u| = sqrt(u^2 + SMOOTH), so that weights at zero have a gradient of zero


def as_matrix(weight: Tensor) -> Tensor:
    """`[out, in, ...]` -> `[out, in * ...]`."""
    return weight.flatten(1)


def short_side(weight: Tensor) -> int:
    """How many singular values the matrix of `weight` has."""
    return min(as_matrix(weight).shape)


def transformed_l1(weight: Tensor, a: float) -> Tensor:
    """Mean of (a + 1) |u| / (a + |u|) over all entries u = w / std(w), a scalar.

    Between counting non-zeros (a to 0) and their magnitude (a to infinity): small entries are pushed down, large
    ones hardly. A common factor of all entries changes nothing. The standard deviation is measured and not
    differentiated: with its gradient, shrinking the small entries would pay for growing the large ones.

    Source: Nikolova, SIAM J. Appl. Math. 61(2), 2000; Zhang and Xin, Math. Programming 169, 2018.
    """
    u = weight / weight.detach().std(correction=0).clamp_min(1e-12)
    size = (u.square() + SMOOTH).sqrt()
    return ((a + 1) * size / (a + size)).mean()


def unevenness(weight: Tensor, ridge: float) -> Tensor:
    """h(W) = (||W||_F^2 - log det(ridge I + G)) / 2m with G = W W^T on the shorter side m, a scalar.

    That is the mean over singular values s of (s^2 - log(ridge + s^2)) / 2: least, (1 - ridge) / 2, where all of
    them are sqrt(1 - ridge), and steep where one falls to zero. Its gradient is (W - (ridge I + G)^-1 W) / m. One
    Cholesky factor, no decomposition. NaN where rounding leaves no positive definite matrix.
    """
    w = as_matrix(weight)
    w = w if w.shape[0] <= w.shape[1] else w.T  # [m, n]
    gram = w @ w.T + ridge * torch.eye(len(w), dtype=w.dtype, device=w.device)
    # The plain call raises on a diverged network; NaN reaches the loss, whose check tells the user to lower lr.
    factor, failed = torch.linalg.cholesky_ex(gram)
    log_det = 2 * factor.diagonal().log().sum()
    return torch.where(failed == 0, (w.square().sum() - log_det) / (2 * len(w)), torch.nan)


@dataclass(frozen=True)
class Conditioning:
    """What a linear map does to lengths.

    Args:
        largest: singular value; what the map adds to a Lipschitz bound.
        least: singular value within the rank.
        rank: how many singular values differ from zero in the arithmetic of the weight's type.
        rows, columns: that are not all zero.
        full: how many singular values there are, zeros and dead rows and columns counted.
    """

    largest: float
    least: float
    rank: int
    rows: int
    columns: int
    full: int

    @property
    def kappa(self) -> float:
        """Largest over smallest singular value of the whole matrix; infinite for a singular one."""
        return self.effective if self.rank == self.full else math.inf

    @property
    def effective(self) -> float:
        """Largest over smallest singular value within the rank, zero rows and columns left out; 1 for a zero matrix."""
        return self.largest / self.least if self.rank else 1.0

    @property
    def lost(self) -> int:
        """Directions that the live rows and columns could carry and do not: rows with one support, for example."""
        return min(self.rows, self.columns) - self.rank


def conditioning(weight: Tensor) -> Conditioning:
    """Singular values of `weight` in double precision.

    Pruning makes exact zeros among them: dead rows and columns, and rows that share their support. A ratio with such
    a zero says nothing about the directions that the matrix does carry; hence `effective`.
    """
    w = as_matrix(weight.detach())
    live = w[(w != 0).any(1)][:, (w != 0).any(0)]
    full, (rows, columns) = min(w.shape), live.shape
    if not live.numel():
        return Conditioning(0.0, 0.0, 0, 0, 0, full)
    values = torch.linalg.svdvals(live.double())
    floor = values[0] * max(live.shape) * torch.finfo(weight.dtype).eps
    rank = max(1, int((values > floor).sum()))
    return Conditioning(float(values[0]), float(values[rank - 1]), rank, rows, columns, full)


def lipschitz_bound(weights: Iterable[Tensor]) -> float:
    """Upper bound on ||f(x) - f(y)|| / ||x - y|| in the l2 norm: the product of the layers' largest singular values.

    It holds for chains of linear layers and zero-padded convolutions with activations of slope at most 1 between
    them (ReLU). An entry of a convolution's input meets each of its k positions at most once, so the matrix's value
    counts sqrt(k) times. Batch norms must be folded into the weights first (`ops.folding`); sums of branches add up
    and are not covered.
    """
    bound = 1.0
    for weight in weights:
        positions = math.prod(weight.shape[2:])
        bound *= float(torch.linalg.matrix_norm(as_matrix(weight.detach()).double(), 2)) * math.sqrt(positions)
    return bound
