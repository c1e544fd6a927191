"""Masks that are a closed form of the weights, and the thresholds they are centred on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cupel.ops.channels import Structure, totals
from cupel.ops.masks import boundary, in_groups, out_of_groups


def soft_mask(square: Tensor, cut: Tensor, tau: Tensor) -> Tensor:
    """m = exp(w^2/tau) / (exp(w^2/tau) + exp(t^2/tau)) from w^2 and t^2; one half at |w| = t."""
    return torch.sigmoid((square - cut) / tau)


def ranked(weight: Tensor, form: str, m: int) -> Tensor:
    """Magnitudes to rank along the last axis: `[1, N]` unstructured, `[N/m, m]` n:m."""
    w = weight.detach().abs()
    return in_groups(w, m) if form == "nm" else w.reshape(1, -1)  # groups run along the inputs, as kernels read them


def spread(value: Tensor, weight: Tensor, form: str) -> Tensor:
    """Back from the rows or entries of `ranked` to a shape that broadcasts against `weight`."""
    if form == "nm":
        return out_of_groups(value.expand(-1, weight.numel() // len(value)), weight)
    return value.reshape(()) if value.numel() == 1 else value.reshape(weight.shape)


def group_squares(structure: Structure, weights: Mapping[str, Tensor]) -> Tensor:
    """Squared L2 norm of the kernels that make each group of channels, `[groups]`; biases and norms are left out."""
    return totals(structure, {n: w.square() for n, w in weights.items() if w.ndim > 1})


def group_masks(squares: Tensor, axes: Sequence[tuple[Tensor, float]], softness: float) -> Tensor:
    """One soft mask a group, `[groups]`; each axis is a set of groups and the share of them that is pruned."""
    mask = torch.ones_like(squares)
    for members, share in axes:
        own = squares[members]
        t = boundary(own.detach().sqrt()[None], share).squeeze(0)
        mask = mask.index_put((members,), soft_mask(own, t * t, softness * (t * t).clamp_min(1e-12)))
    return mask
