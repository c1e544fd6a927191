"""Norm balls around inputs: distances, projections, steepest steps and random points, row by row.

`norm` is `linf` or `l2` everywhere; a row is one input `[...]` of a batch `[N, ...]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("linf", "l2")


def along(values: Tensor, like: Tensor) -> Tensor:
    """`values` `[N]` in a shape that multiplies rows of `like` `[N, ...]`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def size_of(delta: Tensor, norm: str) -> Tensor:
    """Norm of every row: `[N, ...]` -> `[N]`.

    >>> size_of(torch.tensor([[3.0, -4.0]]), "l2"), size_of(torch.tensor([[3.0, -4.0]]), "linf")
    (tensor([5.]), tensor([4.]))
    """
    flat = delta.flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1)


def into_ball(x: Tensor, centre: Tensor, eps: float, norm: str, low: float, high: float) -> Tensor:
    """`x` moved into the ball of radius `eps` around `centre` and into the box `[low, high]`.

    `centre` must lie in the box. For `linf` this is the nearest such point. For `l2` the ball comes
    first and the box second: clipping moves every coordinate towards `centre`, so the result is in
    both, and the nearest point only if the box does not bind.
    """
    if norm == "linf":
        return torch.clamp(x, (centre - eps).clamp_min(low), (centre + eps).clamp_max(high))
    delta = x - centre
    length = along(delta.flatten(1).norm(dim=1), x)
    return (centre + delta * (eps / length.clamp_min(1e-12)).clamp_max(1.0)).clamp(low, high)


def random_in_ball(like: Tensor, eps: float, norm: str, draw: torch.Generator) -> Tensor:
    """A uniform random point of the ball around zero for every row of `like`."""
    kind = {"generator": draw, "dtype": torch.float32}
    if norm == "linf":
        delta = torch.rand(like.shape, **kind) * (2 * eps) - eps  # type: ignore[call-overload]
    else:
        delta = torch.randn(like.shape, **kind)  # type: ignore[call-overload]
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        radius = torch.rand(len(like), **kind) ** (1.0 / max(1, like[0].numel()))  # type: ignore[call-overload]
        delta = delta * along(eps * radius / length, delta)
    found: Tensor = delta.to(device=like.device, dtype=like.dtype)
    return found
