"""RayS: an attack that sees the predicted class alone, by a search over rays along which all entries move alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.ops.projections import along
from cupel.ops.threats import Model, Tally, Threat


def block_of(level: int, block: int, size: int) -> tuple[int, int]:
    """First and last (exclusive) entry of a block where `size` entries are cut into 2^level blocks.

    >>> block_of(1, 1, 10), block_of(3, 4, 10)
    ((5, 10), (8, 10))
    """
    long = -(-size // (1 << level))
    return min(block * long, size), min((block + 1) * long, size)


@dataclass
class RaySearch:
    """Where the search stands: signs `[N, D]`, shortest known radius `[N]`, answers asked for so far `[N]`."""

    model: Model
    x: Tensor
    y: Tensor
    threat: Threat
    signs: Tensor
    radius: Tensor
    asked: Tensor

    def wrong(self, rows: Tensor, signs: Tensor, radius: Tensor) -> Tensor:
        """Whether the model errs at `radius` `[R]` along `signs` `[R, D]` from inputs `rows`, `[R]` bool: one query."""
        self.asked[rows] += 1
        moved = self.x[rows] + along(radius, self.x[rows]) * signs.view(-1, *self.x.shape[1:])
        seen = moved.clamp(self.threat.bounds.low, self.threat.bounds.high)
        return self.model(seen).argmax(1) != self.y[rows]

    def standing(self) -> Tensor:
        """Inputs that are not fooled within eps and may still ask."""
        return ((self.radius > self.threat.eps) & (self.asked < self.threat.steps)).nonzero().flatten()

    def search(self, rows: Tensor, signs: Tensor, tolerance: float) -> None:
        """Keep the new signs of every row whose class changes nearer than its known radius; halve down to where."""
        widest = self.threat.bounds.high - self.threat.bounds.low
        far = self.radius[rows].clamp_max(widest)
        near = torch.zeros_like(far)
        better = self.wrong(rows, signs, far)
        rows, signs, far, near = rows[better], signs[better], far[better], near[better]
        self.signs[rows] = signs
        self.radius[rows] = far
        while len(rows):
            # A ray that fools within eps is short enough, and one that cannot ask any more ends where it is.
            open_ = (far > self.threat.eps) & (far - near > tolerance) & (self.asked[rows] < self.threat.steps)
            rows, signs, far, near = rows[open_], signs[open_], far[open_], near[open_]
            if not len(rows):
                break
            middle = (near + far) / 2
            hit = self.wrong(rows, signs, middle)
            far, near = torch.where(hit, middle, far), torch.where(hit, near, middle)
            self.radius[rows] = far


@torch.no_grad()
def rays(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator | None = None,
    *,
    tolerance: float = 1e-3,
    tally: Tally | None = None,
) -> Tensor:
    """Flip the signs of ever smaller blocks of a direction, keep a flip if the class changes at a smaller radius.

    A direction is a vertex of the cube: d in {-1, 1}^D. One query tells whether a candidate errs at the best
    radius so far; only if it does, the radius is halved down to `tolerance` (a share of eps). Blocks halve from the
    whole input to single entries, and those repeat. `threat.steps` is the most queries of an input, which drops
    out as soon as it is fooled within eps. Nothing is drawn; of outputs `[N, K]` only the argmax is looked at.

    Source: Chen and Gu, RayS, KDD 2020, arXiv 2006.12792, algorithms 1 to 3 (fast check, hierarchical search).

    Departs: radii are linf distances, where the paper scales d to length one; a search on a ray ends within eps.
    """
    if threat.targeted:
        raise ValueError("RayS must have no target: it starts from any other class. Use an untargeted threat.")
    if threat.norm != "linf":
        raise ValueError(f"the norm of RayS must be linf; got {threat.norm}. Its directions are corners of the cube.")
    size = x[:1].numel()
    radius = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    state = RaySearch(model, x, y, threat, torch.ones_like(x).flatten(1), radius, torch.zeros_like(y))
    level = block = 0
    while len(rows := state.standing()):
        low, high = block_of(level, block, size)
        tried = state.signs[rows]
        tried[:, low:high] *= -1
        state.search(rows, tried, tolerance * threat.eps)
        block += 1
        if block == 1 << level or high == size:
            level, block = level + (1 << level < size), 0
    if tally is not None:
        tally.queries += state.asked.cpu()
    reached = torch.where(state.radius.isfinite(), state.radius, torch.zeros_like(radius))
    return x + along(reached, x) * state.signs.view_as(x)
