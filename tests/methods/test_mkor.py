"""`mkor`: exact inverses, statistics of Linear and Conv2d against loops, norms, clean-up, composition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.types import Budget
from cupel.core.update import TorchUpdate
from cupel.techniques.train.mkor import (
    MKOR,
    layers_of,
    mean_gradient,
    mean_input,
    preconditioned,
    rank_one_inverse,
    stabilised,
)
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rank_one_steps_equal_the_true_inverse() -> None:
    m, inverse = torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for k in range(40):
        v = 5 * draw(6, seed=k)
        m = 0.9 * m + 0.1 * torch.outer(v, v)
        inverse = rank_one_inverse(inverse, v, 0.9)
        assert torch.allclose(inverse, torch.linalg.inv(m), rtol=1e-8)
    assert torch.equal(inverse, inverse.T)
    assert float(torch.linalg.eigvalsh(inverse).min()) > 0


def test_stabiliser_acts_only_above_its_bound() -> None:
    low, high = 1.9 * torch.eye(3), 3.0 * torch.eye(3)
    assert stabilised(low, 2.0, 0.9) is low
    assert torch.allclose(stabilised(high, 2.0, 0.9), 2.8 * torch.eye(3))
    assert torch.allclose(stabilised(-high, 2.0, 0.9), -2.6 * torch.eye(3))


def test_preconditioning_keeps_the_norm_and_is_kronecker() -> None:
    left, right, grad = draw(4, 4), draw(3, 3, seed=1), draw(4, 3, seed=2)
    made = preconditioned(left, grad, right)
    assert torch.allclose(made.norm(), grad.norm())
    kron = torch.kron(left, right.T.contiguous()) @ grad.flatten()
    assert torch.allclose(F.normalize(kron, dim=0), F.normalize(made.flatten(), dim=0))
    assert torch.equal(preconditioned(left, torch.zeros(4, 3, dtype=torch.float64), right), torch.zeros_like(grad))


def test_linear_statistics_over_batch_and_sequence() -> None:
    layer, x, g = nn.Linear(3, 2).double(), draw(5, 4, 3), draw(5, 4, 2, seed=1)
    assert torch.allclose(mean_input(layer, x), torch.cat([x.mean((0, 1)), torch.ones(1, dtype=torch.float64)]))
    n = 5 * 4
    assert torch.allclose(mean_gradient(g, False), (n * g).mean((0, 1)))
    assert torch.allclose(mean_input(layer, 1e9 * x).abs(), torch.tensor([100.0, 100, 100, 1], dtype=torch.float64))


@pytest.mark.parametrize("stride,padding,dilation", [(1, 1, 1), (2, 0, 1), (1, 2, 2)])
def test_conv_statistics_against_a_loop(stride: int, padding: int, dilation: int) -> None:
    layer = nn.Conv2d(2, 3, 3, stride, padding, dilation, bias=False).double()
    x = draw(4, 2, 6, 6)
    padded = F.pad(x, (padding,) * 4)
    out = layer(x)
    total = torch.zeros(2 * 9, dtype=torch.float64)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            rows = [i * stride + dilation * k for k in range(3)]
            cols = [j * stride + dilation * k for k in range(3)]
            total += padded[:, :, rows][:, :, :, cols].flatten(1).mean(0)
    positions = out.shape[2] * out.shape[3]
    assert torch.allclose(mean_input(layer, x), total / positions)
    # The conv is linear in its input, so the mean output is the weight times the mean input.
    assert torch.allclose(layer.weight.flatten(1) @ mean_input(layer, x), out.mean((0, 2, 3)))
    g = draw(*out.shape, seed=3)
    assert torch.allclose(mean_gradient(g, True), (4 * g).mean((0, 2, 3)))


def test_which_layers() -> None:
    net = nn.ModuleDict(
        {
            "a": nn.Linear(9, 4), "big": nn.Linear(10, 4), "grouped": nn.Conv2d(4, 4, 1, groups=2),
            "c": nn.Conv2d(1, 3, 3, bias=False), "same": nn.Conv2d(1, 3, 3, padding="same"), "n": nn.BatchNorm2d(3),
        }
    )  # fmt: skip
    assert list(layers_of(net, 10)) == ["a", "c"]  # 9 inputs and a bias make 10 rows, 10 make 11


def one_step(every: int = 1, inputs: Tensor | None = None) -> tuple[nn.Linear, Tensor]:
    """A single layer after one preconditioned SGD step of size 1, and the change of [W | b]."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).view(2, 3) / 10)
        layer.bias.zero_()
    params = dict(layer.named_parameters())
    update = MKOR(every=every, gamma=0.8).update(TorchUpdate(params, Budget(optimizer="sgd")), layer, Context())
    before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone()
    x = torch.tensor([[1.0, 2, 3], [0, 1, -1]]) if inputs is None else inputs
    with update.ahead():
        layer(x).square().mean(0).sum().backward()
    grads = {n: p.grad for n, p in params.items() if p.grad is not None}
    update.step(grads, 1.0)
    return layer, before - torch.cat([layer.weight, layer.bias[:, None]], 1).detach()


def test_a_whole_step_against_inverted_factors() -> None:
    _, change = one_step()
    w = torch.arange(6.0).view(2, 3) / 10
    x = torch.cat([torch.tensor([[1.0, 2, 3], [0, 1, -1]]), torch.ones(2, 1)], 1)
    per_row = 2 * x @ torch.cat([w, torch.zeros(2, 1)], 1).T  # n * dLoss/dOutput, [B, o]
    grad = per_row.T @ x / 2
    a, g = x.mean(0), per_row.mean(0)
    left = torch.linalg.inv(0.8 * torch.eye(2) + 0.2 * torch.outer(g, g))
    right = torch.linalg.inv(0.8 * torch.eye(4) + 0.2 * torch.outer(a, a))
    expected = left @ grad @ right
    assert torch.allclose(change, expected * grad.norm() / expected.norm(), atol=1e-5)


def test_only_training_forwards_are_watched_and_hooks_leave() -> None:
    layer = nn.Linear(3, 2)
    inner = TorchUpdate(dict(layer.named_parameters()), Budget(optimizer="sgd"))
    update = MKOR(every=2, warmup=0).update(inner, layer, Context())
    factors = update.factors[""]  # type: ignore[attr-defined]
    x = torch.ones(4, 3)
    with pytest.raises(ZeroDivisionError), update.ahead():
        layer(x).sum().backward()
        raise ZeroDivisionError
    assert not layer._forward_hooks
    with update.ahead():  # statistics of the broken step are gone; an attack's forward does not count
        layer.eval()
        layer(5 * x).sum().backward()
        layer.train()
        with torch.no_grad():
            layer(7 * x)
        layer(x).sum().backward()
    assert not layer._forward_hooks
    assert [a.tolist() for a in factors.inputs] == [[1, 1, 1, 1]]
    update.step({n: torch.ones_like(p) for n, p in layer.named_parameters()}, 0.1)
    held = factors.right.clone()
    with update.ahead():  # step 1 is not due
        layer(x).sum().backward()
    update.step({n: torch.ones_like(p) for n, p in layer.named_parameters()}, 0.1)
    assert torch.equal(factors.right, held)


def test_foreign_names_frozen_layers_and_functional_calls_pass_through() -> None:
    layer = nn.Linear(2, 2)
    inner = TorchUpdate({"pair/net.weight": nn.Parameter(torch.zeros(2, 2))}, Budget(optimizer="sgd", momentum=0.0))
    update = MKOR().update(inner, layer, Context())
    with update.ahead():  # per-example gradients by torch.func must survive the watching
        torch.func.vmap(torch.func.grad(lambda x: layer(x).sum()))(torch.ones(3, 2))
    update.step({"pair/net.weight": torch.eye(2)}, 0.5)
    assert torch.equal(inner.params["pair/net.weight"], -0.5 * torch.eye(2))


def weights(*techniques: object, epochs: int = 2, **budget: object) -> list[Tensor]:
    subject = DigitsCnn(width=4, examples=96).build(Context())
    plan = replace(subject.budget, epochs=epochs, **budget)  # type: ignore[arg-type]
    return list(fit(subject.model, subject.data, subject.task, techniques=techniques, budget=plan).parameters())


def test_no_layer_is_the_plain_fit() -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(MKOR(largest=0)), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(), weights(MKOR()), strict=True))


def test_hybrid_stops_for_good_when_the_decrease_fades() -> None:
    layer = nn.Linear(1, 1, bias=False)
    inner = TorchUpdate(dict(layer.named_parameters()), Budget(optimizer="sgd", momentum=0.5))
    update = MKOR(every=1, hybrid=0.5).update(inner, layer, Context())
    states = []
    for t in range(30):
        update.step({"weight": torch.full((1, 1), 1.0 if t < 12 else 0.01)}, 0.1)
        states.append(update.active)  # type: ignore[attr-defined]
    assert all(states[:13]) and not any(states[-10:])
    assert sorted(states, reverse=True) == states


def test_refreshes_every_step_of_the_warm_up_then_every_third() -> None:
    layer = nn.Linear(3, 2)
    inner = TorchUpdate(dict(layer.named_parameters()), Budget(optimizer="sgd"))
    update = MKOR(every=3, warmup=2).update(inner, layer, Context())
    refreshed = []
    for _ in range(8):
        before = update.factors[""].left  # type: ignore[attr-defined]
        with update.ahead():
            layer(torch.ones(4, 3)).sum().backward()
        update.step({n: torch.ones_like(p) for n, p in layer.named_parameters()}, 0.1)
        refreshed.append(update.factors[""].left is not before)  # type: ignore[attr-defined]
    assert refreshed == [True, True, False, True, False, False, True, False]
