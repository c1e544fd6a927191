"""Grouped attention: several query heads share one head of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor


def even_sizes(heads: int, groups: int) -> tuple[int, ...]:
    """Equal group sizes.

    >>> even_sizes(8, 4)
    (2, 2, 2, 2)
    """
    return (heads // groups,) * groups


def _runs(weight: Tensor, heads: int, groups: int) -> Tensor:
    return _split(weight, 0, (groups, heads // groups, -1))  # [groups, run, d, ...]


def _split(x: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    parts: Tensor = x.unflatten(axis, shape)
    return parts


def pooled_heads(weight: Tensor, heads: int, groups: int) -> Tensor:
    """The mean over each run of heads / groups heads: `[heads * d, ...]` -> `[groups * d, ...]`."""
    return _runs(weight, heads, groups).mean(1).flatten(0, 1)


def first_heads(weight: Tensor, heads: int, groups: int) -> Tensor:
    """The first of each run of heads / groups heads: `[heads * d, ...]` -> `[groups * d, ...]`."""
    return _runs(weight, heads, groups)[:, 0].flatten(0, 1)


def _bounds(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Group, first query head and the one after the last, of every group that has a query head."""
    ends = list(accumulate(sizes))
    return [(g, end - n, end) for g, (n, end) in enumerate(zip(sizes, ends, strict=True)) if n]


def grouped_scores(q: Tensor, k: Tensor, sizes: Sequence[int]) -> Tensor:
    """q k^T, where consecutive runs of query heads meet the keys of their group; keys are not repeated in memory.

    Shapes: q `[B, H, T, d]`, k `[B, G, T, d]` -> `[B, H, T, T]`; `sum(sizes)` is H, and a size may be 0.
    """
    back = k.transpose(-1, -2)
    if len(set(sizes)) == 1:  # one product for all groups
        rows = _split(q, 1, (len(sizes), -1)).flatten(2, 3)  # [B, G, (H / G) T, d]
        return _split(rows @ back, 2, (sizes[0], -1)).flatten(1, 2)
    parts = [_split(q[:, a:z].flatten(1, 2) @ back[:, g], 1, (z - a, -1)) for g, a, z in _bounds(sizes)]
    return torch.cat(parts, 1)


def grouped_mix(attention: Tensor, v: Tensor, sizes: Sequence[int]) -> Tensor:
    """A v, where consecutive runs of query heads mix the values of their group.

    Shapes: attention `[B, H, T, T]`, v `[B, G, T, d]` -> `[B, H, T, d]`.
    """
    if len(set(sizes)) == 1:
        rows = _split(attention, 1, (len(sizes), -1)).flatten(2, 3)  # [B, G, (H / G) T, T]
        return _split(rows @ v, 2, (sizes[0], -1)).flatten(1, 2)
    parts = [_split(attention[:, a:z].flatten(1, 2) @ v[:, g], 1, (z - a, -1)) for g, a, z in _bounds(sizes)]
    return torch.cat(parts, 1)


def key_norms(k: Tensor) -> Tensor:
    """Frobenius norm of every head's keys, tokens by features, averaged over the batch: `[B, G, T, d]` -> `[G]`."""
    return k.float().square().sum((2, 3)).sqrt().mean(0)


def stretched(norms: Tensor) -> Tensor:
    """(n - min n) / (max n - min n); all ones where the norms do not differ."""
    low, high = norms.min(), norms.max()
    return torch.where(high > low, (norms - low) / (high - low), torch.ones_like(norms))


def allotted(weights: Tensor, heads: int, settle: Callable[[list[int], bool], int]) -> tuple[int, ...]:
    """round(heads * w / sum w), one head at a time put right until all `heads` are allotted.

    Args:
        weights: `[G]`, none below zero.
        heads: to allot.
        settle: given the sizes and whether there are too many heads, the group that loses or gains one.
    """
    total = float(weights.sum())
    if not total > 0:
        return even_sizes(heads, len(weights))
    sizes = [round(heads * w / total) for w in weights.double().tolist()]
    while sum(sizes) != heads:
        over = sum(sizes) > heads
        sizes[settle(sizes, over)] += -1 if over else 1
    return tuple(sizes)


def at_extremes(sizes: list[int], over: bool) -> int:
    """The largest group loses a head, the smallest gains one; the first among equals.

    >>> at_extremes([1, 3, 3], True), at_extremes([1, 3, 1], False)
    (1, 0)
    """
    return sizes.index(max(sizes) if over else min(sizes))


def like(heads: Tensor, draw: Tensor) -> Tensor:
    """`draw` shifted and scaled to the mean and standard deviation of each image's and head's output.

    Shapes: both `[B, H, T, d]`.
    """

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)

    (mean, std), (own, spread) = moments(heads), moments(draw)
    return (draw - own) / spread.clamp_min(1e-12) * std + mean
