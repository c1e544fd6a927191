"""DDN: the nearest fooling input in L2, in hundreds of steps, by moving direction and distance separately."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cupel.core.descend import descend
from cupel.ops.attacks import cross_entropy
from cupel.ops.projections import along
from cupel.ops.threats import Model, Tally, Threat


def ddn(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator | None = None,
    *,
    first: float = 1.0,
    change: float = 0.05,
    tally: Tally | None = None,
) -> Tensor:
    """Step up the loss, then rescale to a distance that shrinks by `change` while the input fools, else grows.

    d <- d + a_k g / ||g||, a_k from 1 to 0.01 along a cosine; rho <- (1 - change) rho if x + d fools, else
    (1 + change) rho; d <- rho d / ||d||, clipped to the box. Of the fooling inputs seen, the nearest is returned.
    `threat.eps` is not used: the judge compares the distance with it.

    Args:
        first: the first distance rho, in input units; times the width of the box.

    Source: Rony et al., CVPR 2019, arXiv 1811.09600, algorithm 1.
    """
    bounds, side = threat.bounds, threat.bounds.high - threat.bounds.low
    rho = torch.full((len(x),), first * side, dtype=x.dtype, device=x.device)
    near, best = torch.full_like(rho, torch.inf), x.clone()
    sign, hit = (-1.0 if threat.targeted else 1.0), torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        logits = model(here)
        if tally is not None:
            tally.gradients[rows.cpu()] += 1
        with torch.no_grad():
            hit[rows] = threat.reached(logits, y[rows])
            far = (here - x[rows]).flatten(1).norm(dim=1)
            nearer = hit[rows] & (far < near[rows])
            near[rows[nearer]], best[rows[nearer]] = far[nearer], here.detach()[nearer]
        return -sign * cross_entropy(logits, y[rows]), None

    def move(here: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        length = side * (0.01 + 0.99 * (1 + math.cos(math.pi * k / max(threat.steps, 1))) / 2)
        unit = grad / along(grad.flatten(1).norm(dim=1).clamp_min(1e-12), grad)
        delta = here - x[rows] - length * unit
        rho[rows] *= torch.where(hit[rows], 1 - change, 1 + change)
        delta = delta * along(rho[rows] / delta.flatten(1).norm(dim=1).clamp_min(1e-12), delta)
        return (x[rows] + delta).clamp(bounds.low, bounds.high)

    last = descend(x, objective, threat.steps, move)
    with torch.no_grad():
        objective(last, torch.arange(len(x), device=x.device))
    return best
