"""What operations that only move, join or part entries do to the labels of channels (see `ops.channels`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cupel.ops.labels import Flow, aligned, laid

if TYPE_CHECKING:
    from cupel.ops.channel_rules import Follower

COUNTS = ("heads", "num_heads", "n_heads", "nhead", "n_head", "num_attention_heads")  # attributes that can be renewed


def permuted(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x = f.flow(args[0])
    if x.labels is None:
        return Flow(shape)
    if f.name == "permute":
        return Flow(shape, x.labels.permute(args[1]), x.zero)
    return Flow(shape, x.labels.transpose(*(args[1:3] if f.name == "transpose" else (0, 1))), x.zero)


def reshape(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x = f.flow(args[0])
    if x.labels is None:
        return Flow(shape)
    asked = {"unflatten": 2, "view": 1, "reshape": 1, "_unsafe_view": 1}.get(f.name)
    said = args[asked] if asked is not None else []
    expanded, folded, axes = [], [], []
    for old, new in segments(x.shape, shape):
        full = any(d in x.tracked() for d in old)
        expanded += [x.shape[d] if full else 1 for d in old]
        folded += [shape[d] if full else 1 for d in new]
        if full and sum(shape[d] > 1 for d in new) > sum(x.shape[d] > 1 for d in old):
            axes += [d for d in new if shape[d] > 1]
    labels = _shrunk(x.labels.expand(expanded).reshape(folded))
    if axes:
        first = args[1] % len(x.shape) if f.name == "unflatten" else 0
        told = [said[d - first] if 0 <= d - first < len(said) else -1 for d in axes]
        if not _can_renew(f, [shape[d] for d in axes], told):
            return f.fixed([Flow(shape, labels)], shape)
        wide = labels.expand([n if d in axes else labels.shape[d] for d, n in enumerate(shape)])
        front = [*axes, *(d for d in range(len(shape)) if d not in axes)]
        f.labels.splits.append((f.stack[-1][0], wide.permute(front).reshape([shape[d] for d in axes] + [-1])))
    return Flow(shape, labels, x.zero)


def _can_renew(f: Follower, sizes: Sequence[int], told: Sequence[int]) -> bool:
    """Whether every size that Python says is an attribute of the module that says it, or left open once."""
    path = f.stack[-1][0]
    module = f.model.get_submodule(path) if path else f.model
    counts = {getattr(module, name, None) for name in COUNTS}
    return any(n in counts for n in sizes) or sum(n == -1 for n in told) >= 1


def _shrunk(labels: Tensor) -> Tensor:
    """Axes along which nothing changes become 1."""
    for d, n in enumerate(labels.shape):
        if n > 1 and bool((labels == labels.narrow(d, 0, 1)).all()):
            labels = labels.narrow(d, 0, 1)
    return labels


def segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of two shapes of one number of entries, in runs of equal product.

    >>> segments((2, 12, 5), (2, 3, 4, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = ([i], []) if i < len(old) else ([], [j])
        i, j = i + len(a), j + len(b)
        while prod(old[d] for d in a) != prod(new[d] for d in b) or not (a and b):
            left, right = prod(old[d] for d in a), prod(new[d] for d in b)
            if j < len(new) and (right < left or not b):
                b.append(j)
                j += 1
            elif i < len(old):
                a.append(i)
                i += 1
            elif j < len(new):
                b.append(j)
                j += 1
            else:
                break
        found.append((a, b))
    return found


def cat(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    parts, dim = [f.flow(p) for p in args[0]], (args[1] if len(args) > 1 else 0) % len(shape)
    if any(p.tracked() and p.tracked() != [dim] for p in parts):
        return _side_by_side(f, parts, dim, shape)
    for part in parts:
        f.needs_zero(part)
    if all(p.labels is None for p in parts):
        return Flow(shape)
    own = [torch.zeros(1, dtype=torch.long) if p.labels is None else p.labels.flatten() for p in parts]
    return laid(shape, dim, torch.cat([o.expand(p.shape[dim]) for o, p in zip(own, parts, strict=True)]))


def _side_by_side(f: Follower, parts: Sequence[Flow], dim: int, shape: tuple[int, ...]) -> Flow:
    """Along an axis without labels: the other axes must agree."""
    first = parts[0]
    if any(p.tracked() != first.tracked() or dim in p.tracked() for p in parts):
        return f.fixed(parts, shape)
    for p in parts[1:]:
        assert first.labels is not None and p.labels is not None
        f.labels.join(first.labels, p.labels)
    return Flow(shape, first.labels, all(p.zero for p in parts))


def pieces(f: Follower, args: Any, shape: tuple[int, ...]) -> Any:
    x, dim = f.flow(args[0]), args[2] if len(args) > 2 else 0
    sizes = [p.shape[dim] for p in f.out]
    dim %= len(x.shape)
    if x.labels is None or dim not in x.tracked():
        return [Flow(tuple(p.shape), x.labels, x.zero) for p in f.out]
    if len(set(sizes)) > 1:
        f.labels.fix(x.labels)
        return [Flow(tuple(p.shape)) for p in f.out]
    parts = x.labels.split(sizes[0], dim)  # equal parts stay equal: entry j goes from all of them
    for part in parts[1:]:
        f.labels.join(parts[0], part)
    return [Flow(tuple(p.shape), parts[0], x.zero) for p in f.out]


def unbind(f: Follower, args: Any, shape: tuple[int, ...]) -> Any:
    x, dim = f.flow(args[0]), args[1] if len(args) > 1 else 0
    x = f.labels.collapse(x, dim % len(x.shape))
    labels = None if x.labels is None else x.labels.squeeze(dim)
    return [Flow(tuple(p.shape), labels, x.zero) for p in f.out]


def select(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x = f.labels.collapse(f.flow(args[0]), args[1] % len(f.flow(args[0]).shape))
    return Flow(shape, None if x.labels is None else x.labels.squeeze(args[1]), x.zero)


def slice_(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x, dim = f.flow(args[0]), args[1] if len(args) > 1 else 0
    if dim % len(shape) in x.tracked() and shape != x.shape:
        return f.fixed(args, shape)
    return Flow(shape, x.labels, x.zero)


def mean(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    return _reduced(f, args, shape, lambda x: f.labels.fix(x.labels))


def sum_(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    kind = f.stack[-1][1] if f.stack else ""
    # A narrow norm adds what missing features would have, so its sum of squares need not vanish; its mean must.
    told = kind.endswith("NarrowLayerNorm") and f.name_before == "square"
    return _reduced(f, args, shape, (lambda x: None) if told else f.needs_zero)


def _reduced(f: Follower, args: Any, shape: tuple[int, ...], check: Callable[[Flow], None]) -> Flow:
    x = f.flow(args[0])
    dims = args[1] if len(args) > 1 and isinstance(args[1], list) and args[1] else list(range(len(x.shape)))
    dims = [d % len(x.shape) for d in dims]
    if any(d in x.tracked() for d in dims):
        check(x)
        if set(x.tracked()) <= set(dims):
            return Flow(shape)
        for d in dims:
            x = f.labels.collapse(x, d)
    if x.labels is None:
        return Flow(shape)
    keep = len(shape) == len(x.shape)
    sizes = [n for d, n in enumerate(x.labels.shape) if keep or d not in dims]
    return Flow(shape, x.labels.reshape(sizes), x.zero)


def expand(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x = f.flow(args[0])
    return Flow(shape, aligned(x.labels, len(shape)), x.zero)


def pool(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x = f.flow(args[0])
    if any(d > 1 for d in x.tracked()) or isinstance(f.out, (list, tuple)):
        return f.fixed(args, shape)
    return Flow(shape, x.labels, x.zero)


def pad(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x, widths = f.flow(args[0]), args[1]
    value = args[3] if len(args) > 3 and args[3] is not None else 0
    if any(d >= len(shape) - len(widths) // 2 for d in x.tracked()):
        return f.fixed(args, shape)
    return Flow(shape, x.labels, x.zero and value == 0)
