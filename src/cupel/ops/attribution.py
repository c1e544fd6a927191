"""Attribution of an output to the pixels of an input: path integrals, the search for a path, and how maps are judged.

A map has one value for each pixel (or moment of a series): inputs `[B, C, *space]` have maps `[B, *space]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cupel.core.descend import descend

Value = Callable[[Tensor, Tensor], Tensor]  # (inputs [R, C, *space], rows [R]) -> the explained output, [R]


def gradient_of(value: Value, x: Tensor, rows: Tensor) -> Tensor:
    """Gradient of each row's value by its own input, `x`'s shape."""
    here = x.detach().requires_grad_(True)
    (found,) = torch.autograd.grad(value(here, rows).sum(), here)
    return found


def integrated_gradients(value: Value, x: Tensor, base: Tensor, steps: int) -> Tensor:
    """(x - base) times the mean gradient on the straight line from `base` to `x`, `[B, *space]`.

    The integral is a midpoint sum of `steps` terms: gradients at (k - 1/2) / steps of the way.
    """
    rows = torch.arange(len(x), device=x.device)
    total = torch.zeros_like(x)
    for k in range(steps):
        total += gradient_of(value, base + (k + 0.5) / steps * (x - base), rows)
    return ((x - base) * total / steps).sum(1)


class PixelPath:
    """Moves inputs to a goal, at each step the few pixels that change the value most; sums up what that did.

    A `Move` of `core.descend`. Its steps are not steps of descent: the gradient ranks the pixels.

    Args:
        goal: where the path ends, `[N, C, *space]`.
        pixels: how many pixels one step moves.
        rising: prefer pixels that raise the value (insertion), not those that lower it (deletion).
        limit: most that a step may move each example in L1, `[N]`; infinite for whole moves.
        smooth: weight of the new gradient in the running one, in (0, 1]; 1 keeps none of the past.
    """

    def __init__(self, goal: Tensor, pixels: int, rising: bool, limit: Tensor, smooth: float = 1.0) -> None:
        self.goal, self.pixels, self.sign = goal, pixels, 1.0 if rising else -1.0
        self.limit, self.smooth = limit, smooth
        self.left = torch.ones(len(goal), goal[0, 0].numel(), dtype=torch.bool, device=goal.device)  # [N, P]
        self.found = torch.zeros(self.left.shape, dtype=goal.dtype, device=goal.device)  # [N, P]
        self.running: Tensor | None = None
        self.passes = 0

    def done(self, rows: Tensor) -> Tensor:
        return ~self.left[rows].any(1)

    def __call__(self, x: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        self.passes += 1
        if self.running is None:
            self.running = grad.new_zeros(self.goal.shape).index_copy(0, rows, grad)
        self.running[rows] = self.smooth * grad + (1 - self.smooth) * self.running[rows]
        slope = self.running[rows].flatten(2)  # [R, C, P]
        way = (self.goal[rows] - x).flatten(2)
        left = self.left[rows]
        gain = (self.sign * (slope * way).sum(1)).masked_fill(~left, -math.inf)  # [R, P]
        picked = torch.zeros_like(left)
        picked.scatter_(1, gain.topk(min(self.pixels, gain.shape[1]), dim=1).indices, True)
        move = way * picked[:, None]
        size, limit = move.abs().sum((1, 2)), self.limit[rows]
        cut = size > limit * (1 + 1e-5)
        move = move * torch.where(cut, limit / size, 1.0)[:, None, None]
        self.found[rows] += (slope * move).sum(1)
        self.left[rows] = left & ~(picked & ~cut[:, None])
        # Whole moves land on the goal itself: x + (goal - x) may miss it by a rounding.
        arrived = (picked & ~cut[:, None])[:, None]  # pixels that had arrived before may be among them: no harm
        return torch.where(arrived, self.goal[rows].flatten(2), x.flatten(2) + move).view(x.shape)


def path_map(
    value: Value, start: Tensor, goal: Tensor, pixels: int, rising: bool, fragments: int | None, smooth: float
) -> tuple[Tensor, int]:
    """Attributions on the searched path from `start` to `goal`, `[B, *space]`, and the gradients they took.

    Args:
        value: what is explained.
        start, goal: `[B, C, *space]`.
        pixels: most pixels that one step moves.
        rising: see `PixelPath`.
        fragments: a step moves at most a `fragments`-th of the L1 length of the way; `None` sets no limit.
        smooth: weight of the new gradient; 1 keeps none of the past.
    """
    way = (goal - start).abs().flatten(1).sum(1)
    limit = way / fragments if fragments else torch.full_like(way, math.inf)
    path = PixelPath(goal, pixels, rising, limit, smooth)

    def objective(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return value(x, rows), path.done(rows)

    # Every step finishes `pixels` pixels or goes a full fragment.
    steps = -(-path.left.shape[1] // pixels) + (fragments or 0) + 2
    descend(start, objective, steps, path)
    return path.found.view(len(start), *start.shape[2:]), path.passes


def ranked_curve(value: Value, start: Tensor, goal: Tensor, maps: Tensor, points: int) -> Tensor:
    """The value while pixels go from `start` to `goal`, largest map values first: `[points + 1, B]`.

    Point k has round(k / points * P) of the P pixels moved. Equal map values go in order of place.
    """
    rows = torch.arange(len(start), device=start.device)
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # the inverse permutation: place of each pixel in the order
    found = []
    with torch.no_grad():
        for k in range(points + 1):
            moved = (rank < round(k / points * order.shape[1]))[:, None]
            now = torch.where(moved, goal.flatten(2), start.flatten(2)).view(start.shape)
            found.append(value(now, rows))
    return torch.stack(found)


def area(curve: Tensor) -> Tensor:
    """Area under a curve over [0, 1] with equal steps, by trapezes: `[K, B]` -> `[B]`."""
    return (curve[1:] + curve[:-1]).mean(0) / 2


def gini(maps: Tensor) -> Tensor:
    """Gini coefficient of each map's absolute values: 0 all equal, near 1 all in one pixel. `[B, ...]` -> `[B]`."""
    ranked = maps.flatten(1).abs().sort(dim=1).values
    n = ranked.shape[1]
    weight = 2 * torch.arange(1, n + 1, device=maps.device, dtype=maps.dtype) - n - 1
    return (weight * ranked).sum(1) / (n * ranked.sum(1)).clamp_min(1e-30)


def completeness_gap(value: Value, maps: Tensor, start: Tensor, goal: Tensor) -> Tensor:
    """|sum of the map - (value at goal - value at start)|, `[B]`."""
    rows = torch.arange(len(start), device=start.device)
    with torch.no_grad():
        change = value(goal, rows) - value(start, rows)
    return (maps.flatten(1).sum(1) - change).abs()
