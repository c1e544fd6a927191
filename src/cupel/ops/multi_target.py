"""Aim at one wrong class after another: what an attack on the nearest wrong class alone misses."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cupel.ops.apgd import apgd
from cupel.ops.attacks import at_once
from cupel.ops.threats import Model, Tally, Threat, errs


def gap_towards(logits: Tensor, y: Tensor, goal: Tensor) -> Tensor:
    """z_goal - z_y per row."""
    return (logits.gather(1, goal[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def ratio_towards(logits: Tensor, y: Tensor, goal: Tensor) -> Tensor:
    """Targeted DLR: -(z_y - z_goal) / (z_(1) - (z_(3) + z_(4)) / 2); the plain gap with fewer than four classes.

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
    finalists: int = 3,
    tally: Tally | None = None,
) -> Tensor:
    """Auto-step PGD towards each of the likeliest wrong classes, and longer towards those that came nearest.

    Every input is aimed at each of `targets` classes, ranked by the clean logits, for a fifth of `threat.steps`;
    where none fooled, the `finalists` classes whose gap is smallest then get `threat.steps` each, from where the first
    round led. Whatever wrong class an input is read as, it is done.

    Source: Gowal et al., arXiv 1910.09338 (the idea); Croce and Hein, ICML 2020, arXiv 2003.01690, section 4 (APGD-T).

    Departs: APGD-T gives all its nine targets the same steps, one target after another.
    """
    with torch.no_grad():
        clean = torch.cat([model(part) for part in x.split(at_once(x))]).scatter(1, y[:, None], -torch.inf)
    goals = clean.argsort(dim=1, descending=True)[:, : min(targets, clean.shape[1] - 1)]
    found, rows = x.clone(), torch.arange(len(x), device=x.device)
    scout = replace(threat, steps=max(threat.steps // 5, 1))
    moved, gaps = _aimed(model, x, y, rows, goals, None, scout, draw, tally)
    rows, moved, gaps = _settled(found, rows, moved, gaps)
    nearest = gaps.argsort(dim=1)[:, :finalists]
    at = moved.gather(1, nearest.view(*nearest.shape, *[1] * (x.ndim - 1)).expand(-1, -1, *x.shape[1:]))
    moved, gaps = _aimed(model, x, y, rows, goals[rows].gather(1, nearest), at, threat, draw, tally)
    _settled(found, rows, moved, gaps)
    return found


def _aimed(
    model: Model,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    goals: Tensor,
    start: Tensor | None,
    threat: Threat,
    draw: torch.Generator,
    tally: Tally | None,
) -> tuple[Tensor, Tensor]:
    """Where `rows` `[R]` end for each of `goals` `[R, T]`: `[R, T, ...]`; and gaps left `[R, T]`, -inf where fooled."""
    count = goals.shape[1]
    which, ends, gaps = rows.repeat_interleave(count), [], []
    begin = None if start is None else start.flatten(0, 1)
    for part in torch.arange(len(which), device=x.device).split(at_once(x)):
        own, labels, goal = which[part], y[which[part]], goals.flatten()[part]
        spent = Tally.of(len(part))
        end = apgd(
            model, x[own], labels, threat, draw, loss=ratio_towards, goal=goal,
            start=None if begin is None else begin[part], tally=spent,
        )  # fmt: skip
        with torch.no_grad():
            logits = model(end)
            gap = -gap_towards(logits, labels, goal)
            gaps.append(torch.where(errs(logits, labels), torch.full_like(gap, -torch.inf), gap))
        ends.append(end)
        if tally is not None:
            tally.gradients.index_add_(0, own.cpu(), spent.gradients)
    if not ends:
        return x[:0].unsqueeze(1).expand(-1, count, *x.shape[1:]), x.new_zeros(0, count)
    return torch.cat(ends).view(len(rows), count, *x.shape[1:]), torch.cat(gaps).view(len(rows), count)


def _settled(found: Tensor, rows: Tensor, moved: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write down what fooled, and keep the rest: rows, where they are and their gaps."""
    if not len(rows):
        return rows, moved, gaps
    least, best = gaps.min(dim=1)
    done = least == -torch.inf
    found[rows[done]] = moved[done, best[done]]
    return rows[~done], moved[~done], gaps[~done]
