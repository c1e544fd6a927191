"""Which weights stay: masks as pure functions of weights, and the split of a global target over layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def keep_count(size: int, share: float) -> int:
    """How many of `size` entries a share in [0, 1] keeps, rounded to the nearest."""
    return max(0, min(size, round(size * share)))


def keep_largest(weight: Tensor, share: float) -> Tensor:
    """A 0/1 mask of `weight`'s shape and dtype that keeps its largest magnitudes.

    Exactly `keep_count(numel, share)` entries stay; among equals the earlier ones do.
    """
    flat = weight.detach().abs().flatten()
    keep = keep_count(flat.numel(), share)
    mask = torch.zeros_like(flat)
    mask[flat.argsort(descending=True, stable=True)[:keep]] = 1
    return mask.view_as(weight).to(weight.dtype)


def boundary(magnitude: Tensor, share: float) -> Tensor:
    """The value half-way between the smallest kept and the largest dropped of `magnitude` `[..., K]`.

    Works along the last axis; `share` in [0, 1) of it is dropped. Returns `[..., 1]`; nothing dropped
    gives zero.
    """
    size = magnitude.shape[-1]
    drop = size - keep_count(size, 1 - share)
    if drop == 0:
        return torch.zeros_like(magnitude[..., :1])
    ranked = magnitude.sort(dim=-1).values
    dropped = ranked[..., drop - 1 : drop]
    kept = ranked[..., drop : drop + 1] if drop < size else dropped
    return (dropped + kept) / 2


def global_shares(
    magnitudes: Mapping[str, Tensor], sparsity: float, ceiling: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Split a global sparsity over layers by one global ranking of magnitudes.

    Args:
        magnitudes: layer name -> non-negative scores of any shape.
        sparsity: share of all entries to drop, in [0, 1).
        ceiling: layer name -> most that may be dropped there; what it spares, the other layers drop.

    Returns:
        Layer name -> share to drop there; over all entries they add up to `sparsity` unless the
        ceilings forbid it.
    """
    shares: dict[str, float] = {}
    free = {name: m.detach().flatten() for name, m in magnitudes.items()}
    target = sparsity * sum(m.numel() for m in free.values())
    while free:
        pool = torch.cat(list(free.values())).sort().values
        drop = min(len(pool), max(0, round(target)))
        cut = pool[drop - 1] if drop else torch.tensor(-1.0)
        found = {name: float((m <= cut).double().mean()) for name, m in free.items()}
        over = [n for n, s in found.items() if ceiling and s > ceiling.get(n, 1.0)]
        if not over:
            return shares | found
        for name in over:
            assert ceiling is not None
            shares[name] = ceiling[name]
            target -= ceiling[name] * free.pop(name).numel()
    return shares


def sparsity_of(weights: Mapping[str, Tensor]) -> float:
    """Share of exact zeros over all tensors."""
    total = sum(w.numel() for w in weights.values())
    return sum(int((w == 0).sum()) for w in weights.values()) / max(total, 1)
