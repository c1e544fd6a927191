"""How far two sets of feature vectors lie apart, as Gaussians."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import eigh, eigvalsh


def frechet(a: Tensor, b: Tensor) -> float:
    """|| m_a - m_b ||^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2) of features `[N, F]` and `[M, F]`.

    Source: Dowson and Landau, The Frechet distance between multivariate normal distributions, 1982; for images:
    Heusel et al., NeurIPS 2017, arXiv 1706.08500, equation 6.

    >>> import torch; float(f"{frechet(torch.eye(3), torch.eye(3) + 1):.4f}")
    3.0
    """
    x, y = a.double(), b.double()
    first, second = x.T.cov(correction=0), y.T.cov(correction=0)
    values, vectors = eigh(first)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return max(0.0, float(apart + first.trace() + second.trace() - 2 * cross))
