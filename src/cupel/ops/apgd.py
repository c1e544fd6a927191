"""Auto-step PGD: projected steps with momentum whose length is halved where progress stalls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cupel.core.descend import descend
from cupel.ops.attacks import cross_entropy, raising, stepping
from cupel.ops.projections import along, random_in_ball
from cupel.ops.threats import Model, Tally, Threat


def checkpoints(steps: int) -> list[int]:
    """Steps at which the step length is judged: gaps of 0.22 of all steps, shrinking by 0.03 down to 0.06.

    >>> checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    gap, found = max(int(0.22 * steps), 1), []
    at = gap
    while at <= steps:
        found.append(at)
        gap = max(gap - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        at += gap
    return found


class _Course:
    """What one run remembers of every row `[N]`: step length, best point and its gradient, rises since a check."""

    def __init__(self, start: Tensor, x: Tensor, threat: Threat) -> None:
        self.x, self.threat = x, threat
        self.step = torch.full((len(x),), 2 * threat.eps, dtype=x.dtype, device=x.device)
        self.value = torch.full_like(self.step, torch.inf)  # lower is better for the attack
        self.last = torch.full_like(self.step, torch.inf)
        self.best, self.best_x, self.best_grad = self.value.clone(), start.clone(), torch.zeros_like(start)
        self.before = start.clone()
        self.rises = torch.zeros_like(self.step)
        self.best_then, self.halved = self.value.clone(), torch.ones_like(self.step, dtype=torch.bool)
        self.checks, self.checked = set(checkpoints(threat.steps)), 0
        self.unit = stepping(threat, 1.0)

    def _learn(self, here: Tensor, grad: Tensor, rows: Tensor, k: int) -> None:
        value = self.value[rows]
        self.rises[rows] += (value < self.last[rows]).to(value.dtype) if k else 0.0
        self.last[rows] = value
        won = rows[value < self.best[rows]]
        if len(won):
            better = value < self.best[rows]
            self.best[won], self.best_x[won], self.best_grad[won] = value[better], here[better], grad[better]

    def _judge(self, rows: Tensor, k: int) -> Tensor:
        """Halve the step of rows that rose too seldom, or whose best has stood still; True `[R]` where halved."""
        few = self.rises[rows] <= 0.75 * (k - self.checked)
        stuck = ~self.halved[rows] & (self.best_then[rows] <= self.best[rows])
        halve = few | stuck
        self.step[rows[halve]] /= 2
        self.halved[rows], self.best_then[rows], self.rises[rows] = halve, self.best[rows], 0.0
        self.checked = k
        return halve

    def move(self, here: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        self._learn(here, grad, rows, k)
        if k == 0:
            self.best_then[rows] = self.best[rows]
        before = self.before[rows]
        if k in self.checks:
            halve = self._judge(rows, k)
            here, grad = here.clone(), grad.clone()
            here[halve], grad[halve] = self.best_x[rows[halve]], self.best_grad[rows[halve]]
        centre = self.x[rows]
        one = self.unit(torch.zeros_like(here), grad, rows, k)
        ahead = self.threat.admit(here + along(self.step[rows], here) * one, centre)
        share = 0.75 if k else 1.0
        self.before[rows] = here
        return self.threat.admit(here + share * (ahead - here) + (1 - share) * (here - before), centre)


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    loss: Callable[..., Tensor] = cross_entropy,
    goal: Tensor | None = None,
    start: Tensor | None = None,
    tally: Tally | None = None,
) -> Tensor:
    """PGD that sets its own step length: nothing to tune, so a weak setting cannot flatter a defence.

    z = P(x_k + s g_k), x_(k+1) = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_(k-1))) from s = 2 eps. At the
    checkpoints a row halves s and returns to its best point if fewer than three in four of its steps
    raised the loss, or if s was not halved last time and its best loss has not grown since.

    Args:
        loss: `cross_entropy` or `logits_ratio` (DLR).
        goal: classes `[N]` that `loss` takes as a third argument; the judge asks for any wrong class all the same.
        start: where to begin in place of a random point; brought into the ball first.

    Source: Croce and Hein, ICML 2020, arXiv 2003.01690, algorithm 1.

    Departs: a fooled row stops at once; the start is uniform in the ball in both norms.
    """
    if start is None:
        start = x + random_in_ball(x, threat.eps, threat.norm, draw)
    start = threat.admit(start, x)
    course, plain = (
        _Course(start, x, threat),
        raising(model, y, loss, threat, tally, *(() if goal is None else (goal,))),
    )

    def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        values, done = plain(here, rows)
        course.value[rows] = values.detach()
        return values, done

    return descend(start, objective, threat.steps, course.move)
