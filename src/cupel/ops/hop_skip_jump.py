"""HopSkipJump: the nearest fooling input, found from the predicted class alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cupel.ops.projections import along, size_of
from cupel.ops.threats import Model, Tally, Threat


class _Asked:
    """The network as a yes-or-no oracle on rows of `x` `[N, ...]`, which counts what it is asked."""

    def __init__(self, model: Model, x: Tensor, y: Tensor, threat: Threat) -> None:
        self.model, self.x, self.y, self.threat = model, x, y, threat
        self.count = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def fools(self, tried: Tensor, rows: Tensor) -> Tensor:
        """`[R]` bool for `tried` `[R, ...]`: one query each."""
        self.count.index_add_(0, rows, torch.ones_like(rows))
        hit = self.model(tried).argmax(1) == self.y[rows]
        return hit if self.threat.targeted else ~hit

    def blended(self, rows: Tensor, away: Tensor, share: Tensor) -> Tensor:
        """Points on the way from `x` to `away`: along the line for `l2`, a shrunken box around `x` for `linf`."""
        centre = self.x[rows]
        if self.threat.norm == "l2":
            return centre + along(share, centre) * (away - centre)
        radius = along(share, centre)
        return torch.clamp(away, centre - radius, centre + radius)

    def to_boundary(self, rows: Tensor, away: Tensor, tolerance: float) -> Tensor:
        """The nearest fooling point on the way to the fooling `away` `[R, ...]` that bisection finds."""
        high = torch.ones(len(rows), dtype=away.dtype, device=away.device)
        if self.threat.norm == "linf":
            high = size_of(away - self.x[rows], "linf")
        low = torch.zeros_like(high)
        limit = tolerance * high.clamp_min(1e-12)
        while bool((high - low > limit).any()):
            middle = (low + high) / 2
            hit = self.fools(self.blended(rows, away, middle), rows)
            high, low = torch.where(hit, middle, high), torch.where(hit, low, middle)
        return self.blended(rows, away, high)


def _begun(ask: _Asked, draw: torch.Generator, tries: int = 100) -> tuple[Tensor, Tensor]:
    """Random inputs that fool, and the rows for which one was found."""
    bounds, x = ask.threat.bounds, ask.x
    found, open_ = x.clone(), torch.arange(len(x), device=x.device)
    for _ in range(tries):
        noise = torch.rand(x[open_].shape, generator=draw).to(x) * (bounds.high - bounds.low) + bounds.low
        hit = ask.fools(noise, open_)
        found[open_[hit]] = noise[hit]
        open_ = open_[~hit]
        if not len(open_):
            break
    return found, torch.tensor([i for i in range(len(x)) if i not in set(open_.tolist())], dtype=torch.long).to(
        x.device
    )


def _direction(ask: _Asked, rows: Tensor, at: Tensor, count: int, reach: Tensor, draw: torch.Generator) -> Tensor:
    """Where the boundary at `at` `[R, ...]` is crossed: mean of random unit vectors, weighted by (answer - mean)."""
    shape = (len(rows), count, *at.shape[1:])
    noise = torch.randn(shape, generator=draw) if ask.threat.norm == "l2" else torch.rand(shape, generator=draw) * 2 - 1
    noise = noise.to(at)
    noise = noise / noise.flatten(2).norm(dim=2).view(len(rows), count, *[1] * (at.ndim - 1))
    bounds = ask.threat.bounds
    tried = (at[:, None] + reach.view(-1, *[1] * at.ndim) * noise).clamp(bounds.low, bounds.high)
    moved = (tried - at[:, None]) / reach.view(-1, *[1] * at.ndim)
    answers = ask.fools(tried.flatten(0, 1), rows.repeat_interleave(count)).view(len(rows), count).to(at) * 2 - 1
    mean = answers.mean(1, keepdim=True)
    weight = torch.where(mean.abs() < 1, answers - mean, answers)
    grad: Tensor = (weight.view(len(rows), count, *[1] * (at.ndim - 1)) * moved).mean(1)
    if ask.threat.norm == "linf":
        return grad.sign()
    return grad / along(grad.flatten(1).norm(dim=1).clamp_min(1e-12), grad)


@torch.no_grad()
def hop_skip_jump(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    first: int = 100,
    tally: Tally | None = None,
) -> Tensor:
    """From a random fooling input: bisect to the boundary, estimate its normal from answers, jump along it, again.

    Round t asks `first` sqrt(t) random neighbours; the jump starts at distance / sqrt(t) and is halved until it
    fools. Rounds end when an input has asked `threat.steps` questions or is fooled within eps. Of outputs `[N, K]`
    only the argmax is looked at.

    Source: Chen, Jordan and Wainwright, IEEE S&P 2020, arXiv 1904.02144, algorithms 1 and 2.
    """
    ask = _Asked(model, x, y, threat)
    best, rows = _begun(ask, draw)
    size = x[:1].numel()
    tolerance = 1 / (size * math.sqrt(size)) if threat.norm == "l2" else 1 / size**2
    tolerance = max(tolerance, 1e-5)  # what float32 can tell apart
    if len(rows):
        best[rows] = ask.to_boundary(rows, best[rows], tolerance)
    t = 0
    while True:
        t += 1
        far = size_of(best - x, threat.norm)
        rows = rows[(far[rows] > threat.eps) & (ask.count[rows] < threat.steps)]
        if not len(rows):
            break
        at, far = best[rows], far[rows]
        spread = math.sqrt(size) if threat.norm == "l2" else size
        reach = 0.1 * far if t == 1 else spread * tolerance * far
        normal = _direction(ask, rows, at, round(first * math.sqrt(t)), reach, draw)
        step, ahead = far / math.sqrt(t), at.clone()
        open_ = torch.arange(len(rows), device=x.device)
        for _ in range(20):
            tried = at[open_] + along(step[open_], at) * normal[open_]
            tried = tried.clamp(threat.bounds.low, threat.bounds.high)
            hit = ask.fools(tried, rows[open_])
            ahead[open_[hit]] = tried[hit]
            open_ = open_[~hit]
            step[open_] /= 2
            if not len(open_):
                break
        landed = ask.to_boundary(rows, ahead, tolerance)
        nearer = size_of(landed - x[rows], threat.norm) < far
        best[rows[nearer]] = landed[nearer]
    if tally is not None:
        tally.queries += ask.count.cpu()
    return best
