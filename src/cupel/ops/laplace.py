"""Laplace's approximation around trained weights: curvature from Jacobians, posterior precision, linearised prediction.

Jacobians `[B, K, S]` are of K outputs after S parameters (`ops.jacobians`). A posterior is held by a factor of its
precision: the lower Cholesky factor `[S, S]`, or `[S]` roots where it is diagonal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def class_roots(logits: Tensor) -> Tensor:
    """R `[B, K, K]` with R R^T = diag(p) - p p^T: the curvature of the cross-entropy at `logits` `[B, K]`.

    >>> z = torch.tensor([[0.0, 1.0, 2.0]]); p, r = z.softmax(1)[0], class_roots(z)[0]
    >>> torch.allclose(r @ r.T, p.diag() - p.outer(p))
    True
    """
    p = logits.softmax(1)
    return p.sqrt().diag_embed() - p.unsqueeze(2) * p.sqrt().unsqueeze(1)


def ggn_diagonal(jacobian: Tensor, roots: Tensor) -> Tensor:
    """sum over examples of the diagonal of J^T R R^T J: `[B, K, S]`, `[B, K, L]` -> `[S]` in double precision."""
    return (roots.mT @ jacobian).square().sum((0, 1), dtype=torch.float64)


def ggn(jacobian: Tensor, roots: Tensor) -> Tensor:
    """sum over examples of J^T R R^T J, the generalised Gauss-Newton matrix: `[B, K, S]` -> `[S, S]` in double."""
    rows: Tensor = (roots.mT @ jacobian).flatten(0, 1).double()
    total: Tensor = rows.mT @ rows
    return total


def precision_factor(curvature: Tensor, precision: float) -> Tensor:
    """Of `curvature` + `precision` I: the Cholesky factor of `[S, S]`, the roots of a diagonal `[S]`."""
    if curvature.ndim == 1:
        return (curvature + precision).sqrt()
    factor: Tensor = torch.linalg.cholesky(curvature + precision * torch.eye(len(curvature)).to(curvature))
    return factor


def function_covariance(jacobian: Tensor, factor: Tensor) -> Tensor:
    """J P^-1 J^T for J `[B, K, S]` and the posterior precision P: `[B, K, K]`.

    `factor` is the lower Cholesky factor of P, `[S, S]`, or for a diagonal P its roots, `[S]`.
    """
    rows = jacobian.flatten(0, 1)
    half = rows / factor if factor.ndim == 1 else torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT
    half = half.unflatten(0, jacobian.shape[:2])
    covariance: Tensor = half @ half.mT
    return covariance


def predictive(logits: Tensor, covariance: Tensor, noise: Tensor | None = None) -> Tensor:
    """Logits of the mean class probabilities when the logits are N(`logits` `[B, K]`, `covariance` `[B, K, K]`).

    Without `noise` by MacKay's probit formula, f / sqrt(1 + pi/8 diag V); with standard normal draws `[T, K]` the log
    of the mean softmax over T sampled logits.
    """
    spread = covariance.diagonal(dim1=1, dim2=2)
    if noise is None:
        return logits / (1 + math.pi / 8 * spread).sqrt()
    jitter = 1e-6 * (1 + spread.amax(1))[:, None, None] * torch.eye(spread.shape[1]).to(spread)
    root = torch.linalg.cholesky(covariance + jitter)
    drawn: Tensor = logits.unsqueeze(1) + noise @ root.mT  # [B, T, K]
    return drawn.log_softmax(2).logsumexp(1) - math.log(len(noise))


def log_evidence(fit: float, weights: Tensor, factor: Tensor, precision: float) -> float:
    """log p(D | w) - (lambda |w_S|^2 + log det P - S log lambda) / 2, with `factor` as in `function_covariance`."""
    roots = (factor if factor.ndim == 1 else factor.diagonal()).double()
    price = precision * float(weights.double().square().sum()) + 2 * float(roots.log().sum())
    return fit - (price - len(weights) * math.log(precision)) / 2
