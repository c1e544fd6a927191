"""Matrices as products of two thin ones: singular values, and non-negative factors."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12


def break_even(fan_in: int, fan_out: int) -> int:
    """Largest rank at which two factors hold no more numbers than the matrix: floor(in out / (in + out)).

    >>> break_even(300, 100)
    75
    """
    return fan_in * fan_out // (fan_in + fan_out)


def root_of(moment: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Symmetric root R of a second moment C (R R = C) and its inverse: `[I, I]` each, float64.

    `ridge` times the mean eigenvalue is added, so that directions the inputs never take can be inverted.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(0)
    values = (values + ridge * values.mean().clamp_min(TINY)).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def energy_rank(weight: Tensor, share: float, root: Tensor | None = None) -> int:
    """Smallest rank whose singular values hold `share` of the squared sum: of W, or of W R with a root R."""
    matrix = weight.double() if root is None else weight.double() @ root
    energy = torch.linalg.svdvals(matrix).square().cumsum(0)
    return int((energy < share * energy[-1] * (1 - 1e-9)).sum()) + 1


def svd_factors(weight: Tensor, rank: int, roots: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The closest product of two matrices of `rank`: W `[O, I]` -> first `[r, I]`, second `[O, r]`, W ~ second first.

    Without `roots` the distance is the Frobenius norm of the weights (Eckart and Young 1936); with the
    root of the inputs' second moment and its inverse it is the mean squared error of the outputs.
    """
    matrix = weight.double() if roots is None else weight.double() @ roots[0]
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    first = s[:rank, None] * vh[:rank]
    if roots is not None:
        first = first @ roots[1]
    return first.to(weight.dtype), u[:, :rank].to(weight.dtype)


def nmf_factors(weight: Tensor, start: tuple[Tensor, Tensor], iterations: int) -> tuple[Tensor, Tensor]:
    """Non-negative factors of a non-negative W by multiplicative updates (Lee and Seung 2001, theorem 1).

    Args:
        weight: `[O, I]`, no entry below zero.
        start: positive first `[r, I]` and second `[O, r]`.
        iterations: rounds of both updates.

    Returns:
        first and second, W ~ second first.
    """
    w, (first, second) = weight.double(), (s.double() for s in start)
    for _ in range(iterations):
        second = second * (w @ first.T) / (second @ (first @ first.T)).clamp_min(TINY)
        first = first * (second.T @ w) / ((second.T @ second) @ first).clamp_min(TINY)
    return first.to(weight.dtype), second.to(weight.dtype)


def snmf_factors(weight: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Factors of which the second is non-negative and the first is free (Ding, Li, Jordan 2010).

    Args:
        weight: `[O, I]`.
        start: positive second `[O, r]`.
        iterations: rounds of both updates.

    Returns:
        first `[r, I]` and second `[O, r]`, W ~ second first.
    """
    w, second = weight.double(), start.double()
    for _ in range(iterations):
        first = torch.linalg.pinv(second) @ w  # (G^T G)^-1 G^T W
        up, gram = w @ first.T, first @ first.T
        above = up.clamp_min(0) + second @ (-gram).clamp_min(0)
        below = (-up).clamp_min(0) + second @ gram.clamp_min(0)
        second = second * (above / below.clamp_min(TINY)).sqrt()
    return (torch.linalg.pinv(second) @ w).to(weight.dtype), second.to(weight.dtype)
