"""SPSA: gradient steps without gradients, from scores at pairs of randomly displaced inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from cupel.core.descend import adam_move, descend
from cupel.ops.threats import Model, Tally, Threat


def spsa(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    pairs: int = 32,
    reach: float = 0.01,
    lr: float = 0.01,
    tally: Tally | None = None,
) -> Tensor:
    """Adam on the margin's slope along random signs: g = mean of (f(x + c v) - f(x - c v)) v / 2c, v in {-1, 1}^D.

    `threat.steps` is the query budget: 2 `pairs` a step, and one more to see whether the input is done. An input
    drops out as soon as it is fooled.

    Args:
        reach: c, as a share of the width of the box; `lr` likewise.

    Source: Uesato et al., ICML 2018, arXiv 1802.05666, section 4; Spall 1992 for the estimate.
    """
    side = threat.bounds.high - threat.bounds.low
    steps = max(1, threat.steps // (2 * pairs + 1))
    step = reach * side

    def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            now = model(here)
            signs = torch.randint(0, 2, (len(rows), pairs, *x.shape[1:]), generator=draw).to(here) * 2 - 1
            ends = torch.cat([here[:, None] + step * signs, here[:, None] - step * signs], 1).flatten(0, 1)
            gaps = threat.gap(model(ends), y[rows].repeat_interleave(2 * pairs)).view(len(rows), 2, pairs)
            slope = (gaps[:, 0] - gaps[:, 1]) / (2 * step)
            grad = (slope.view(len(rows), pairs, *[1] * (x.ndim - 1)) * signs).mean(1)
            if tally is not None:
                tally.queries[rows.cpu()] += 2 * pairs + 1
        # A plane of that slope, whose gradient is the estimate.
        return (here * grad).flatten(1).sum(1), threat.reached(now, y[rows])

    return descend(x, objective, steps, adam_move(x, lr * side), lambda new, rows: threat.admit(new, x[rows]))
