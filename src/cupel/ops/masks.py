"""Which weights stay: masks as pure functions of weights, and the split of a global target over layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def keep_count(size: int, share: float) -> int:
    """How many of `size` entries a share in [0, 1] keeps, rounded to the nearest."""
    return max(0, min(size, round(size * share)))


def largest(scores: Tensor, keep: int) -> Tensor:
    """Which entries are among the `keep` largest along the last axis: `[..., K]` -> bool `[..., K]`.

    Exactly `keep` are; among equals the earlier ones.
    """
    if keep <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    chosen = scores >= scores.topk(keep, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    if bool((chosen.sum(-1) == keep).all()):
        return chosen
    # Ties at the edge, and only these pay for a full sort.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(chosen).scatter(-1, order[..., :keep], True)


def keep_largest(weight: Tensor, share: float) -> Tensor:
    """A 0/1 mask of `weight`'s shape and dtype that keeps its largest magnitudes.

    Exactly `keep_count(numel, share)` entries stay; among equals the earlier ones do.
    """
    flat = weight.detach().abs().flatten()
    return largest(flat, keep_count(flat.numel(), share)).view_as(weight).to(weight.dtype)


def in_groups(weight: Tensor, m: int, dim: int = 1) -> Tensor:
    """Entries of `weight` `[out, in, ...]` in groups of `m` neighbours along `dim`: `[numel / m, m]`.

    `dim` 1 groups input channels, which the forward product sums over, at each position of a kernel; 0 groups output
    channels, which the product with the transposed matrix sums over, for the gradient of the input.

    Raises:
        ValueError: `m` does not divide the axis.
    """
    if weight.shape[dim] % m:
        raise ValueError(
            f"axis {dim} must be a multiple of {m} entries; it has {weight.shape[dim]}. Leave the layer dense."
        )
    return weight.movedim(dim, -1).reshape(-1, m)


def out_of_groups(groups: Tensor, like: Tensor, dim: int = 1) -> Tensor:
    """What `in_groups` took apart, put back into the shape of `like`."""
    return groups.reshape(like.movedim(dim, -1).shape).movedim(-1, dim)


def keep_n_of_m(weight: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    """A 0/1 mask that keeps the `n` largest magnitudes of every group of `m` along `dim` (see `in_groups`).

    >>> keep_n_of_m(torch.tensor([[3.0, -1.0, 2.0, -4.0]]), 2, 4).tolist()
    [[1.0, 0.0, 0.0, 1.0]]
    """
    kept = largest(in_groups(weight.detach().abs(), m, dim), n)
    return out_of_groups(kept, weight, dim).to(weight.dtype)


def boundary(magnitude: Tensor, share: float) -> Tensor:
    """The value half-way between the smallest kept and the largest dropped of `magnitude` `[..., K]`.

    Works along the last axis; `share` in [0, 1) of it is dropped. Returns `[..., 1]`; nothing dropped
    gives zero.
    """
    size = magnitude.shape[-1]
    drop = size - keep_count(size, 1 - share)
    if drop == 0:
        return torch.zeros_like(magnitude[..., :1])
    if drop == size:
        return magnitude.amax(dim=-1, keepdim=True)
    # Only the shorter side is selected: a sort of the whole layer at every forward would cost more than the layer.
    if drop > size // 2:
        side = magnitude.topk(size - drop + 1, dim=-1, sorted=False).values
        edge = side.topk(2, dim=-1, largest=False).values
    else:
        side = magnitude.topk(drop + 1, dim=-1, largest=False, sorted=False).values
        edge = side.topk(2, dim=-1).values
    return edge.mean(dim=-1, keepdim=True)


def layer_ceilings(sizes: Mapping[str, int], head_keep: float) -> dict[str, float]:
    """Most that may be dropped of every layer, the last one being the head.

    A layer that loses everything cuts the network, so each keeps one part in a hundred and at least one entry.
    """
    *_, head = sizes
    return {n: min(1 - head_keep if n == head else 0.99, 1 - 1 / size) for n, size in sizes.items()}


def even_shares(sizes: Mapping[str, int], sparsity: float, ceiling: Mapping[str, float]) -> dict[str, float]:
    """One share for all layers; what a ceiling spares, the other layers drop (see `global_shares`).

    >>> even_shares({"body": 80, "head": 20}, 0.5, {"body": 0.99, "head": 0.3})
    {'head': 0.3, 'body': 0.55}
    """
    shares: dict[str, float] = {}
    free, target = dict(sizes), sparsity * sum(sizes.values())
    while free:
        share = target / sum(free.values())
        over = [n for n in free if share > ceiling.get(n, 1.0)]
        if not over:
            return shares | dict.fromkeys(free, share)
        for name in over:
            shares[name] = ceiling[name]
            target -= ceiling[name] * free.pop(name)
    return shares


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


def zero_where(weight: Tensor, mask: Tensor) -> None:
    """Set `weight` to zero in place where the 0/1 `mask` of its shape is zero.

    A product would leave negative zeros, which a file has to store.
    """
    weight.masked_fill_(mask == 0, 0.0)


def sparsity_of(weights: Mapping[str, Tensor]) -> float:
    """Share of exact zeros over all tensors."""
    total = sum(w.numel() for w in weights.values())
    return sum(int((w == 0).sum()) for w in weights.values()) / max(total, 1)
