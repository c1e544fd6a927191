"""`xgrad`: look-ahead against NumPy recursions, torch's Nesterov, and exact restoration."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.protocols import Hook, Update
from cupel.core.slots import phase
from cupel.core.types import Budget
from cupel.core.update import TorchUpdate
from cupel.techniques.train.mkor import MKOR
from cupel.techniques.train.xgrad import XGrad, moved
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)

CURVATURE = np.array([3.0, 0.5, 1.0, 0.1])


class Point(nn.Module):
    """Four weights at the bottom of a bowl: loss = 1/2 sum c (w - 1)^2, gradient c (w - 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0, -1.0, 0.3, 5.0], dtype=torch.float64))


def run(steps: int, budget: Budget, updates: int, lrs: list[float] | None = None) -> np.ndarray:
    model = Point()
    curvature = torch.from_numpy(CURVATURE)
    update: Update = TorchUpdate(dict(model.named_parameters()), budget)
    update = XGrad(steps=steps).update(update, model, Context())
    path = []
    for t in range(updates):
        with update.ahead():
            grad = (curvature * (model.w - 1)).detach()
        update.step({"w": grad}, budget.lr if lrs is None else lrs[t])
        path.append(model.w.detach().numpy().copy())
    return np.stack(path)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_sgd_matches_numpy(steps: int) -> None:
    lrs = [0.05, 0.05, 0.02, 0.02, 0.1, 0.1]
    w, v, decay, mu = np.array([2.0, -1.0, 0.3, 5.0]), np.zeros(4), 0.01, 0.9
    expected, before = [], 0.0
    for lr in lrs:
        grad = CURVATURE * (w - steps * before * v - 1) + decay * w  # decay acts on the true weights
        v, before = mu * v + grad, lr
        w = w - lr * v
        expected.append(w)
    budget = Budget(optimizer="sgd", lr=0.05, momentum=mu, weight_decay=decay)
    np.testing.assert_allclose(run(steps, budget, 6, lrs), np.stack(expected), rtol=1e-12)


def test_adam_matches_numpy() -> None:
    w, m, s, lr, eps = np.array([2.0, -1.0, 0.3, 5.0]), np.zeros(4), np.zeros(4), 0.1, 1e-8
    expected, direction = [], np.zeros(4)
    for t in range(1, 8):
        grad = CURVATURE * (w - 2 * lr * direction - 1)
        m, s = 0.9 * m + 0.1 * grad, 0.999 * s + 0.001 * grad**2
        direction = (m / (1 - 0.9**t)) / (np.sqrt(s / (1 - 0.999**t)) + eps)
        w = w - lr * direction
        expected.append(w)
    np.testing.assert_allclose(run(2, Budget(optimizer="adam", lr=lr), 7), np.stack(expected), rtol=1e-9)


def test_mu_steps_ahead_is_nesterov() -> None:
    """Looking mu * lr ahead along the momentum visits the points of torch's Nesterov rule."""
    mu, lr, curvature = 0.8, 0.1, torch.from_numpy(CURVATURE)
    model, twin = Point(), Point()
    inner = TorchUpdate(dict(model.named_parameters()), Budget(optimizer="sgd", lr=lr, momentum=mu))
    nesterov = torch.optim.SGD(twin.parameters(), lr=lr, momentum=mu, nesterov=True)
    for _ in range(10):
        found = inner.direction().get("w", torch.zeros(4, dtype=torch.float64))
        with moved([model.w], [found], mu * lr):
            assert torch.allclose(model.w, twin.w, rtol=1e-12)
            grad = (curvature * (model.w - 1)).detach()
        inner.step({"w": grad}, lr)
        twin.w.grad = (curvature * (twin.w - 1)).detach()
        nesterov.step()


def test_first_step_and_memoryless_rules_stay() -> None:
    sgd = Budget(optimizer="sgd", lr=0.1, momentum=0.9)
    assert (run(1, sgd, 1) == run(0, sgd, 1)).all()
    plain = replace(sgd, momentum=0.0)
    assert (run(3, plain, 5) == run(0, plain, 5)).all()


def test_weights_come_back_bit_for_bit_even_after_an_error() -> None:
    w = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    before = w.detach().clone()
    far = torch.full_like(w, 1e6)  # adding and subtracting this would round
    with pytest.raises(ZeroDivisionError), moved([w], [far], 1.0):
        assert float((w.detach() - before).abs().min()) > 1e5
        raise ZeroDivisionError
    assert torch.equal(w, before)
    model = Point()
    update = XGrad(steps=2).update(
        TorchUpdate(dict(model.named_parameters()), Budget(optimizer="sgd")), model, Context()
    )
    update.step({"w": torch.ones(4, dtype=torch.float64)}, 0.1)
    held = model.w.detach().clone()
    with pytest.raises(ZeroDivisionError), update.ahead():
        assert torch.allclose(held - model.w.detach(), torch.full((4,), 0.2, dtype=torch.float64))
        raise ZeroDivisionError
    assert torch.equal(model.w, held)


@dataclass(frozen=True)
class _Partner:
    """A technique that trains a network beside the student."""

    def hook(self, ctx: Context) -> Hook:
        return _Pair()


class _Pair(Hook):
    def __init__(self) -> None:
        self.net = nn.Linear(10, 10, bias=False)
        nn.init.eye_(self.net.weight)

    def trains(self) -> dict[str, nn.Module]:
        return {"pair": self.net}

    @phase("term")
    def loss(self, loss, out, batch, at):  # type: ignore[no-untyped-def]
        return loss + at.task.loss(self.net(out.detach()), batch)


def weights(techniques: list[object], optimizer: str = "sgd") -> list[torch.Tensor]:
    subject = DigitsMlp(hidden=(12,), examples=80).build(Context())
    budget = Budget(epochs=3, batch_size=16, optimizer=optimizer, lr=0.05)
    return list(fit(subject.model, subject.data, subject.task, techniques=techniques, budget=budget).parameters())


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_zero_steps_is_the_plain_fit(optimizer: str) -> None:
    assert same(weights([], optimizer), weights([XGrad(steps=0)], optimizer))
    assert not same(weights([], optimizer), weights([XGrad(steps=1)], optimizer))


def test_wraps_add_up_and_both_orders_with_mkor_agree() -> None:
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(weights([XGrad(steps=3)]), weights([XGrad(steps=1), XGrad(steps=2)]), strict=True)
    )
    assert same(weights([XGrad(), MKOR(every=2)]), weights([MKOR(every=2), XGrad()]))


def test_partners_are_trained_but_not_moved() -> None:
    assert same(weights([XGrad()]), weights([XGrad(), _Partner()]))
