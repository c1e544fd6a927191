"""Walks through the codes of a generator: to an image that is given, and to one that a detector calls real."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cupel.core.descend import Move, Objective, adam_move, descend


def removing(
    detector: Callable[[Tensor], Tensor], make: Callable[[Tensor], Tensor], kappa: float, fake: int = 1
) -> Objective:
    """Lower P_fake^2 of `make(code)`; done where P_real - P_fake > kappa. P = softmax of two logits, in doubles.

    Source: Li et al., ICME 2024, arXiv 2404.08341, section 3.
    """
    real = 1 - fake

    def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        p = detector(make(here)).double().softmax(1)  # [R, 2]
        return p[:, fake].square(), (p[:, real] - p[:, fake]).detach() > kappa

    return objective


def walk(start: Tensor, objective: Objective, steps: int, move: Move, radius: float, free: Tensor | None) -> Tensor:
    """`start` `[N, ...]` moved until it is done; at most `radius` away (0: anywhere), and only where `free` is 1."""

    def within(x: Tensor, rows: Tensor) -> Tensor:
        away = x - start[rows]
        away = away if free is None else away * free
        return start[rows] + (away.clamp(-radius, radius) if radius else away)

    return descend(start, objective, steps, move, within)


def inverted(start: Tensor, images: Tensor, make: Callable[[Tensor], Tensor], steps: int = 100) -> Tensor:
    """The encoder's codes `start`, refined until `make(code)` is near the images: Adam on the squared error."""

    def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        return (make(here) - images[rows]).flatten(1).square().sum(1), None

    return descend(start, objective, steps, adam_move(start, 0.1))
