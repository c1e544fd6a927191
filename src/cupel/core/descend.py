"""Gradient steps on anything that is not a network's weights: perturbations, triggers, masks, codes.

`fit` trains models; `descend` moves tensors. There is no third loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

CIRCLES = (1, 2, 4, 6)  # periods looked for; signed steps in a ball end almost only in even ones
Project = Callable[[Tensor, Tensor], Tensor]  # (x, rows) -> x inside the allowed set


class Objective(Protocol):
    """Values to lower, and which rows are finished.

    Called with `x` `[R, ...]` and `rows` `[R]` (positions of these rows in the whole). Returns values
    `[R]` and a bool `[R]` of rows that need no further step, or `None`.
    """

    def __call__(self, x: Tensor, rows: Tensor, /) -> tuple[Tensor, Tensor | None]: ...


class Move(Protocol):
    """One step: `(x, grad, rows, k) -> x`, all for the active rows only."""

    def __call__(self, x: Tensor, grad: Tensor, rows: Tensor, k: int, /) -> Tensor: ...


def descend(
    start: Tensor,
    objective: Objective,
    steps: int,
    move: Move,
    project: Project | None = None,
    memoryless: bool = False,
) -> Tensor:
    """Lower `objective` row by row from `start` `[N, ...]`; finished rows are dropped from the work.

    One forward serves both the loss and the check: a row is checked by the forward that would compute
    its next gradient, so `steps` moves cost at most `steps` forwards and as many backwards. Where the last
    move leads, the caller looks for itself.

    Args:
        start: `[N, ...]`; not changed.
        objective: values to lower and finished rows.
        steps: moves a row may make.
        move: the step rule (`sign_move`, `adam_move`, or your own).
        project: back into the allowed set after every move.
        memoryless: `objective`, `move` and `project` look at nothing but x. Then a row that a move leaves
            where it was, or brings back to where it was 2, 4 or 6 moves earlier, would circle for ever
            among points that were checked already: it is dropped too.

    Returns:
        `[N, ...]` where each row stopped.
    """
    x = start.detach().clone()
    rows = torch.arange(len(x), device=x.device)
    here = start.detach()  # where the active rows are
    trail: list[Tensor] = []  # where they were, newest last
    for k in range(steps):
        if not len(rows):
            break
        with torch.enable_grad():
            leaf = here.detach().requires_grad_(True)
            values, done = objective(leaf, rows)
            keep = None if done is None or not bool(done.any()) else ~done
            if keep is not None and not bool(keep.any()):
                break
            # The graph holds all rows; the summed values of the open ones give their gradients alone.
            (grad,) = torch.autograd.grad((values if keep is None else values[keep]).sum(), leaf)
        with torch.no_grad():
            here = leaf.detach()
            if keep is not None:
                x[rows[~keep]] = here[~keep]
                rows, here, grad = rows[keep], here[keep], grad[keep]
                trail = [past[keep] for past in trail]
            new = move(here, grad, rows, k)
            new = project(new, rows) if project is not None else new
            if memoryless:
                trail = [*trail[-CIRCLES[-1] + 1 :], here]
                rests = _rests(new, trail)
                if bool(rests.any()):
                    x[rows[rests]] = new[rests]
                    rows, new, trail = rows[~rests], new[~rests], [past[~rests] for past in trail]
            here = new
    x[rows] = here
    return x


def _rests(new: Tensor, trail: list[Tensor]) -> Tensor:
    """Rows `[R]` of `new` that are, up to rounding, where they were one of `CIRCLES` moves ago."""
    shift = (new - trail[-1]).flatten(1).abs().amax(dim=1)
    found = shift == 0
    for ago in CIRCLES[1:]:
        if ago <= len(trail):
            # Rounding shifts a row that circles by far less than one part in a thousand of its step.
            found |= (new - trail[-ago]).flatten(1).abs().amax(dim=1) <= 1e-3 * shift
    return found


def sign_move(size: float) -> Move:
    """Steps of `size` along minus the sign of the gradient (the steepest descent in L-infinity)."""

    def move(x: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        return x - size * grad.sign()

    return move


def unit_move(size: float) -> Move:
    """Steps of L2 length `size` along minus the gradient, row by row."""

    def move(x: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        norm: Tensor = grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (grad.ndim - 1))
        return x - size * grad / norm

    return move


def adam_move(like: Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> Move:
    """Adam's rule (Kingma and Ba 2015, Algorithm 1) with state per row of `like`."""
    first, second = torch.zeros_like(like), torch.zeros_like(like)

    def move(x: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        first[rows] = betas[0] * first[rows] + (1 - betas[0]) * grad
        second[rows] = betas[1] * second[rows] + (1 - betas[1]) * grad * grad
        m = first[rows] / (1 - betas[0] ** (k + 1))
        v = second[rows] / (1 - betas[1] ** (k + 1))
        return x - lr * m / (v.sqrt() + 1e-8)

    return move
