"""Gradient steps on anything that is not a network's weights: perturbations, triggers, masks, codes.

`fit` trains models; `descend` moves tensors. There is no third loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Project = Callable[[Tensor, Tensor], Tensor]  # (x, rows) -> x inside the allowed set


class Objective(Protocol):
    """Values to lower, and which rows are finished.

    Called with `x` `[R, ...]` and `rows` `[R]` (positions of these rows in the whole). Returns values
    `[R]` and a bool `[R]` of rows that need no further step, or `None`.
    """

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]: ...


class Move(Protocol):
    """One step: `(x, grad, rows, k) -> x`, all for the active rows only."""

    def __call__(self, x: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor: ...


def descend(
    start: Tensor,
    objective: Objective,
    steps: int,
    move: Move,
    project: Project | None = None,
) -> Tensor:
    """Lower `objective` row by row from `start` `[N, ...]`; finished rows are dropped from the work.

    One forward serves both the loss and the check: a row is checked by the forward that would compute
    its next gradient, so `steps` moves cost at most `steps` + 1 forwards and `steps` backwards.

    Args:
        start: `[N, ...]`; not changed.
        objective: values to lower and finished rows.
        steps: moves a row may make.
        move: the step rule (`sign_move`, `adam_move`, or your own).
        project: back into the allowed set after every move.

    Returns:
        `[N, ...]` where each row stopped.
    """
    x = start.detach().clone()
    rows = torch.arange(len(x), device=x.device)
    for k in range(steps):
        if not len(rows):
            break
        here = x if len(rows) == len(x) else x[rows]
        here = here.detach().requires_grad_(True)
        values, done = objective(here, rows)
        if done is not None and bool(done.any()):
            keep = ~done
            rows_left = rows[keep]
            if not len(rows_left):
                rows = rows_left
                break
            # The graph holds all rows; the summed values of the open ones give their gradients alone.
            (grad,) = torch.autograd.grad(values[keep].sum(), here)
            rows, grad, here = rows_left, grad[keep], here[keep]
        else:
            (grad,) = torch.autograd.grad(values.sum(), here)
        with torch.no_grad():
            new = move(here.detach(), grad, rows, k)
            new = project(new, rows) if project is not None else new
            if len(rows) == len(x):
                x = new
            else:
                x[rows] = new
    return x.detach()


def sign_move(size: float) -> Move:
    """Steps of `size` along minus the sign of the gradient (the steepest descent in L-infinity)."""

    def move(x: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        return x - size * grad.sign()

    return move


def unit_move(size: float) -> Move:
    """Steps of L2 length `size` along minus the gradient, row by row."""

    def move(x: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        norm = grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (grad.ndim - 1))
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
