"""Gradient steps on anything that is not a network's weights: perturbations, triggers, masks, codes.

`fit` trains models; `descend` moves tensors. There is no third loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

CIRCLES = (1, 2, 4, 6)  # how many moves ago; signed steps in a ball end almost only in even circles
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
    width: int | None = None,
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
        width: only where `objective`, `move` and `project` look at nothing but x and rows. Rows then need not
            move in step: at most `width` are worked on, and one that leaves makes room for one that
            waits. A row also leaves when a move brings it where it stood before (see `CIRCLES`): it would
            circle for ever among points that were checked already.

    Returns:
        `[N, ...]` where each row stopped.
    """
    work = _Work(start.detach(), len(start) if width is None else width)
    k = 0
    while work.fill() and steps:
        with torch.enable_grad():
            leaf = work.here.detach().requires_grad_(True)
            values, done = objective(leaf, work.rows)
            open_ = None if done is None or not bool(done.any()) else ~done
            if open_ is not None and not bool(open_.any()):
                work.drop(~open_)
                continue
            # The graph holds all rows; the summed values of the open ones give their gradients alone.
            (grad,) = torch.autograd.grad((values if open_ is None else values[open_]).sum(), leaf)
        with torch.no_grad():
            if open_ is not None:
                work.drop(~open_)
                grad = grad[open_]
            new = move(work.here, grad, work.rows, k)
            new = project(new, work.rows) if project is not None else new
            rests = work.step(new, remember=width is not None)
            over = work.taken >= steps if rests is None else (work.taken >= steps) | rests
            if bool(over.any()):
                work.drop(over)
        k += 1
    return work.x


class _Work:
    """The rows that are worked on: `rows` `[R]`, where they are, where they were, how often they moved."""

    def __init__(self, start: Tensor, width: int) -> None:
        self.start, self.width, self.next = start, max(width, 1), 0
        self.x = start.clone()
        self.rows = torch.zeros(0, dtype=torch.long, device=start.device)
        self.here, self.taken = start[:0], self.rows
        self.trail: list[Tensor] = []  # newest last

    def fill(self) -> int:
        """Take waiting rows into free places; how many rows are at work then."""
        room = min(self.width - len(self.rows), len(self.start) - self.next)
        if room > 0:
            fresh = torch.arange(self.next, self.next + room, device=self.rows.device)
            there = self.start[self.next : self.next + room]
            self.next += room
            self.rows, self.here = torch.cat([self.rows, fresh]), torch.cat([self.here, there])
            self.taken = torch.cat([self.taken, torch.zeros_like(fresh)])
            nowhere = torch.full_like(there, torch.nan)  # equal to no place at all
            self.trail = [torch.cat([past, nowhere]) for past in self.trail]
        return len(self.rows)

    def step(self, new: Tensor, remember: bool) -> Tensor | None:
        """Move to `new`; with `remember`, tell which rows `[R]` stand where they stood before."""
        before, self.here, self.taken = self.here, new, self.taken + 1
        if not remember:
            return None
        self.trail = [*self.trail[-CIRCLES[-1] + 1 :], before]
        shift = (new - before).flatten(1).abs().amax(dim=1)
        found = shift == 0
        for ago in CIRCLES[1:]:
            if ago <= len(self.trail):
                # Rounding shifts a row that circles by far less than one part in a thousand of its step.
                found |= (new - self.trail[-ago]).flatten(1).abs().amax(dim=1) <= 1e-3 * shift
        return found

    def drop(self, gone: Tensor) -> None:
        """Write down where the rows `gone` `[R]` are, and work on the others alone."""
        self.x[self.rows[gone]] = self.here[gone].detach()
        keep = ~gone
        self.rows, self.here, self.taken = self.rows[keep], self.here[keep], self.taken[keep]
        self.trail = [past[keep] for past in self.trail]


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
