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


def test_rows_that_wait_come_in_as_others_leave_and_move_as_often() -> None:
    seen: list[list[int]] = []
    goal = torch.tensor([0.05, 0.25, 9.0, 9.0, 0.15])

    def objective(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(rows.tolist())
        return -x.sum(1), x.sum(1) >= goal[rows]

    found = descend(torch.zeros(5, 1), objective, 4, sign_move(0.1), width=2)
    assert torch.allclose(found.flatten(), torch.tensor([0.1, 0.3, 0.4, 0.4, 0.2]), atol=1e-6)
    assert seen == [[0, 1], [0, 1], [1, 2], [1, 2], [2, 3], [2, 3], [3, 4], [3, 4], [4]]


def test_circles_of_every_length_looked_for_are_noticed() -> None:
    for period in (2, 4, 6):
        calls = 0

        def objective(x: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            nonlocal calls
            calls += 1
            return x.sum(1), None

        def move(x: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
            return (x + 1) % period  # noqa: B023

        descend(torch.zeros(1, 1), objective, 40, move, width=1)
        assert calls == period
