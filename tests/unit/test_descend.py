"""`descend` against closed forms, and its active set."""

from __future__ import annotations

import torch
from torch import Tensor

from cupel.core.descend import adam_move, descend, sign_move, unit_move


def test_reaches_the_minimum_of_a_bowl() -> None:
    goal = torch.tensor([[1.0, -2.0], [3.0, 0.5]])

    def objective(x: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        return (x - goal[rows]).square().sum(1), None

    found = descend(torch.zeros(2, 2), objective, 400, adam_move(goal, 0.05))
    assert torch.allclose(found, goal, atol=1e-3)


def test_sign_steps_are_counted_exactly() -> None:
    found = descend(torch.zeros(3, 4), lambda x, rows: (x.sum(1), None), 5, sign_move(0.1))
    assert torch.allclose(found, torch.full((3, 4), -0.5))


def test_unit_steps_have_their_length() -> None:
    found = descend(torch.zeros(2, 4), lambda x, rows: ((x * torch.arange(1, 5)).sum(1), None), 1, unit_move(0.3))
    assert torch.allclose(found.norm(dim=1), torch.full((2,), 0.3))


def test_finished_rows_stop_and_cost_nothing() -> None:
    seen: list[list[int]] = []
    goal = torch.tensor([0.25, 0.95, 10.0])

    def objective(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(rows.tolist())
        return -x.sum(1), x.sum(1) >= goal[rows]

    found = descend(torch.zeros(3, 1), objective, 12, sign_move(0.1))
    assert torch.allclose(found.flatten(), torch.tensor([0.3, 1.0, 1.2]), atol=1e-6)
    assert seen[0] == [0, 1, 2] and seen[4] == [1, 2] and seen[11] == [2]


def test_projection_holds_after_every_step() -> None:
    low: list[float] = []

    def project(x: Tensor, rows: Tensor) -> Tensor:
        low.append(float(x.min()))
        return x.clamp(-0.2, 0.2)

    found = descend(torch.zeros(2, 2), lambda x, rows: (x.sum(1), None), 10, sign_move(0.1), project)
    assert torch.equal(found, torch.full((2, 2), -0.2)) and len(low) == 10


def test_start_is_not_changed() -> None:
    start = torch.ones(2, 2)
    descend(start, lambda x, rows: (x.sum(1), None), 3, sign_move(0.1))
    assert torch.equal(start, torch.ones(2, 2)) and not start.requires_grad
