"""Aim at one wrong class after another: what an attack on the nearest wrong class alone misses."""

from __future__ import annotations

import torch
from torch import Tensor

from cupel.ops.apgd import apgd
from cupel.ops.attacks import at_once
from cupel.ops.threats import Model, Tally, Threat, errs


def gap_towards(logits: Tensor, y: Tensor, goal: Tensor) -> Tensor:
    """z_goal - z_y per row."""
    return (logits.gather(1, goal[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def ratio_towards(logits: Tensor, y: Tensor, goal: Tensor) -> Tensor:
    """Targeted DLR: -(z_y - z_goal) / (z_(1) - (z_(3) + z_(4)) / 2) per row; the plain gap with fewer than four classes.

    Source: Croce and Hein, ICML 2020, arXiv 2003.01690, equation 7.
    """
    if logits.shape[1] < 4:
        return gap_towards(logits, y, goal)
    ranked = logits.topk(4, dim=1).values
    return gap_towards(logits, y, goal) / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + 1e-12)


def multi_target(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    targets: int = 9,
    tally: Tally | None = None,
) -> Tensor:
    """Auto-step PGD towards the likeliest wrong classes of every input, one after another, each from a new start.

    `threat.steps` steps for each of at most `targets` classes, ranked by the clean logits. An input that is read as
    any wrong class is done; only the others are aimed at the next class.

    Source: Gowal et al., arXiv 1910.09338 (the idea); Croce and Hein, ICML 2020, arXiv 2003.01690, section 4 (APGD-T).
    """
    with torch.no_grad():
        clean = torch.cat([model(part) for part in x.split(at_once(x))]).scatter(1, y[:, None], -torch.inf)
    order = clean.argsort(dim=1, descending=True)
    found, left = x.clone(), torch.arange(len(x), device=x.device)
    for goal in order[:, : min(targets, clean.shape[1] - 1)].T:
        part = Tally.of(len(left))
        tried = apgd(model, x[left], y[left], threat, draw, loss=ratio_towards, goal=goal[left], tally=part)
        if tally is not None:
            tally.add_at(left.cpu(), part)
        with torch.no_grad():
            done = torch.cat([errs(model(a), b) for a, b in zip(tried.split(1024), y[left].split(1024), strict=True)])
        found[left[done]] = tried[done]
        left = left[~done]
        if not len(left):
            break
    return found
