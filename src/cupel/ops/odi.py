"""Output-diversified starts: spread the beginnings of an attack over what the network says, not over pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cupel.core.descend import descend
from cupel.ops.attacks import Loss, negative_margin, raising, stepping
from cupel.ops.threats import Model, Tally, Threat

SCHEDULES: dict[str, Callable[[float], float]] = {  # progress in [0, 1) -> step length as a share of eps
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "cyclical": lambda t: (1 + math.cos(math.pi * ((3 * t) % 1))) / 2,
    "step": lambda t: 4.0 ** -int(3 * t),
}


def diversified(
    model: Model,
    x: Tensor,
    start: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    steps: int = 2,
    tally: Tally | None = None,
) -> Tensor:
    """`steps` of length eps from `start` up w . z(x), with w ~ U(-1, 1)^K drawn for every row, in the ball of `x`.

    Source: Tashiro, Song, Ermon, Diversity can be Transferred: Output Diversification for White- and Black-box
    Attacks, NeurIPS 2020, arXiv 2003.06878, section 3.
    """
    with torch.no_grad():
        classes = model(x[:1]).shape[1] if len(x) else 1
    way = (torch.rand(len(x), classes, generator=draw) * 2 - 1).to(x)

    def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(here)
        if tally is not None:
            tally.gradients[rows.cpu()] += 1
        return -(way[rows] * logits).sum(1), threat.reached(logits, y[rows])

    return descend(
        threat.admit(start, x),
        objective,
        steps,
        stepping(threat, threat.eps),
        lambda new, rows: threat.admit(new, x[rows]),
    )


def odi(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    schedule: str = "cosine",
    loss: Loss = negative_margin,
    start: Tensor | None = None,
    tally: Tally | None = None,
) -> Tensor:
    """A diversified start of two steps, then steps whose length falls from eps along a schedule.

    Args:
        schedule: `cosine` falls once, `cyclical` three times, `step` by a factor of four after each third.
        start: where to begin in place of x itself; brought into the ball first.

    Source: Mao et al., AAAI 2021, arXiv 2012.05434, appendix (ODI with three schedules); start as in `diversified`.
    """
    first = min(2, threat.steps)
    begin = diversified(model, x, x if start is None else start, y, threat, draw, steps=first, tally=tally)
    rest, size = threat.steps - first, SCHEDULES[schedule]

    def move(here: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        # Never shorter than a hundredth: the last steps of a schedule would stand still.
        return stepping(threat, threat.eps * max(size(k / max(rest, 1)), 0.01))(here, grad, rows, k)

    objective = raising(model, y, loss, threat, tally)
    return descend(begin, objective, rest, move, lambda new, rows: threat.admit(new, x[rows]))
