"""`gsm` against a slow NumPy recursion, closed-form decay, torch's SGD in the limit, and an exact global cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError
from cupel.core.fit import Loop, fit
from cupel.core.params import check
from cupel.core.protocols import Hook, Update
from cupel.core.shelf import MASKS, Shelf
from cupel.core.slots import Hooks
from cupel.core.tasks import Classification
from cupel.core.types import Budget
from cupel.core.update import TorchUpdate
from cupel.techniques.compress.gsm import GSM, active, cut, shrinkage
from cupel.techniques.train.mkor import MKOR
from cupel.techniques.train.xgrad import XGrad

torch.set_num_threads(1)
BUDGET = Budget(epochs=3, batch_size=16, optimizer="adam", lr=1e-2)  # 15 updates


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net()


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(80, 2, 2, 4, generator=torch.Generator().manual_seed(2))
    return x, (x[:, 0].sum((1, 2)) > 0).long() + (x[:, 1].sum((1, 2)) > 0).long()


def trained(*techniques: object, model: nn.Module | None = None, budget: Budget = BUDGET) -> tuple[nn.Module, Shelf]:
    shelf = Shelf()
    made = fit(model or net(), data(), Classification(3), techniques=techniques, budget=budget, shelf=shelf)
    return made, shelf


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Two(nn.Module):
    """Two layers whose gradients a test hands out itself."""

    def __init__(self) -> None:
        super().__init__()
        make = np.random.default_rng(3)
        self.first, self.second = nn.Linear(4, 3).double(), nn.Linear(2, 4).double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.from_numpy(make.normal(size=tuple(p.shape))))


def rule(model: nn.Module, method: GSM, budget: Budget = BUDGET) -> Update:
    return method.update(TorchUpdate(dict(model.named_parameters()), budget), model, Context())


def numpy_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}


def test_every_step_equals_a_slow_recursion_over_all_layers() -> None:
    model, draw, mu, decay = Two(), np.random.default_rng(4), 0.8, 0.1
    update = rule(model, GSM(sparsity=0.65, momentum=mu, weight_decay=decay))
    w = numpy_of(model)
    z = {n: np.zeros_like(v) for n, v in w.items()}
    shares, seen = set(), set()
    for step in range(40):
        lr = 0.05 / (1 + step)
        g = {n: draw.normal(size=v.shape) for n, v in w.items()}
        order = sorted(
            (
                (abs(w[n][at] * g[n][at]), n, at)
                for n in ("first.weight", "second.weight")
                for at in np.ndindex(w[n].shape)
            ),
            reverse=True,
        )
        learns = {(n, at) for _, n, at in order[:7]}  # 35% of 20
        for n in w:
            for at in np.ndindex(w[n].shape):
                through = g[n][at] if n.endswith("bias") or (n, at) in learns else 0.0
                z[n][at] = mu * z[n][at] + decay * w[n][at] + through
                w[n][at] -= lr * z[n][at]
        update.step({n: torch.from_numpy(v) for n, v in g.items()}, lr)
        shares.add(sum(n == "first.weight" for n, _ in learns))
        seen |= learns
        for n, p in model.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), w[n], rtol=1e-11, atol=1e-13)
        for n, d in update.direction().items():
            np.testing.assert_allclose(d.numpy(), z[n], rtol=1e-11, atol=1e-13)
    assert len(shares) > 1 and len(seen) > 7  # no quota a layer, no fixed set


def test_saliency_is_the_product_and_ranks_all_layers_together() -> None:
    w = [torch.tensor([[9.0, 1.0, -2.0]]), torch.tensor([[0.1, -4.0]])]
    g = [torch.tensor([[0.01, 0.5, 1.0]]), torch.tensor([[8.0, -0.5]])]  # T = 0.09 0.5 2.0 | 0.8 2.0
    assert [m.tolist() for m in active(w, g, 3)] == [[[False, False, True]], [[True, True]]]
    assert [m.tolist() for m in active(w, g, 4)] == [[[False, True, True]], [[True, True]]]
    assert [int(m.sum()) for m in active([torch.zeros(5), torch.zeros(3)], [torch.ones(5), torch.ones(3)], 6)] == [5, 1]


@pytest.mark.parametrize("reached", [True, False])
def test_passive_weights_follow_the_closed_form_of_their_decay(reached: bool) -> None:
    model, mu, decay, lr, steps = Two(), 0.9, 0.02, 0.05, 200
    update = rule(model, GSM(sparsity=0.9, momentum=mu, weight_decay=decay))
    before = numpy_of(model)
    for _ in range(steps):
        strong = torch.zeros(3, 4, dtype=torch.float64)
        strong[0, :2] = 1e-6 / model.first.weight.detach()[0, :2].abs()  # the two active ones of twenty
        weak = {"second.weight": torch.full((4, 2), 1e-9, dtype=torch.float64)} if reached else {}
        update.step({"first.weight": strong, **weak}, lr)
    # One step is linear: z' = mu z + decay w, w' = w - lr z'.
    once = np.array([[1 - lr * decay, -lr * mu], [decay, mu]])
    factor = np.linalg.matrix_power(once, steps)[0, 0]
    np.testing.assert_allclose(model.second.weight.detach(), factor * before["second.weight"], rtol=1e-12)
    np.testing.assert_allclose(model.first.weight.detach()[1:], factor * before["first.weight"][1:], rtol=1e-12)
    assert abs(np.log(factor) + shrinkage(lr, decay, mu, steps)) < 0.15  # exp(-2) but for the first steps
    assert np.array_equal(model.second.bias.detach(), before["second.bias"])  # no gradient, not a weight: left alone


def test_a_passive_weight_comes_back_when_it_matters() -> None:
    model = Two()
    update = rule(model, GSM(sparsity=0.95, momentum=0.0, weight_decay=0.5))  # one of twenty
    grads = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for _ in range(20):
        update.step(grads | {"first.weight": torch.eye(3, 4, dtype=torch.float64) * 1e-3}, 0.1)
    low = float(model.second.weight[0, 0].detach())
    away = torch.zeros(4, 2, dtype=torch.float64)
    away[0, 0] = -5.0 * np.sign(low)
    update.step(grads | {"second.weight": away}, 0.1)
    assert float(model.second.weight[0, 0].detach()) == pytest.approx(low * 0.95 + 0.5 * np.sign(low))


def test_gradients_are_handed_over_unchanged() -> None:
    model = Two()
    grads = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    rule(model, GSM(sparsity=0.9)).step(grads, 0.1)
    assert all(bool((g == 1).all()) for g in grads.values()) and all(p.grad is None for p in model.parameters())


def test_with_all_weights_active_it_is_torch_sgd_with_momentum() -> None:
    every = GSM(sparsity=1e-6, momentum=0.7, weight_decay=0.03)
    plain = Budget(epochs=3, batch_size=16, optimizer="sgd", lr=1e-2, momentum=0.7, weight_decay=0.03)
    expected = trained(budget=plain)[0]
    assert same(trained(every)[0], expected)  # whatever optimiser the fit names
    assert same(trained(every, budget=Budget(3, 16, "sgd", 1e-2, 0.1, 0.5))[0], expected)


@dataclass(frozen=True)
class Last:
    """The weights just before the cut of what stands behind it."""

    seen: dict[str, Tensor] = field(default_factory=dict)

    def hook(self, ctx: Context) -> Hook:
        return _Last(self.seen)


class _Last(Hook):
    def __init__(self, seen: dict[str, Tensor]) -> None:
        self.seen = seen

    def end(self, at: Any) -> None:
        self.seen.update({n: p.detach().clone() for n, p in at.weights()})


@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.99])
def test_the_cut_keeps_the_largest_of_all_layers_and_moves_nothing_else(sparsity: float) -> None:
    last = Last()
    model, shelf = trained(last, GSM(sparsity=sparsity))
    keep = round((6 * 2 * 9 + 3 * 48) * (1 - sparsity))
    edge = np.sort(np.concatenate([w.abs().numpy().ravel() for w in last.seen.values()]))[-keep]
    masks = shelf.get(MASKS)
    assert set(masks) == {"conv.weight", "head.weight"}
    assert sum(int(m.sum()) for m in masks.values()) == keep
    for name, p in model.named_parameters():
        if name in masks:
            kept = last.seen[name].abs() >= edge
            assert torch.equal(masks[name], kept.float())
            assert torch.equal(p.detach(), torch.where(kept, last.seen[name], torch.zeros(())))
            assert not bool(torch.signbit(p[masks[name] == 0]).any())


def test_a_layer_may_lose_everything() -> None:
    weights = {"a.weight": torch.full((2, 2), 0.1), "b.weight": torch.full((2, 3), -1.0)}
    masks = cut(weights, 0.4)
    assert not bool(masks["a.weight"].any()) and bool(masks["b.weight"].all())
    assert cut({}, 0.5) == {}


def test_enough_decay_makes_the_cut_free_and_too_little_does_not() -> None:
    start = trained(budget=Budget(epochs=6, batch_size=16, optimizer="adam", lr=1e-2))[0].state_dict()
    lost = {}
    for decay in (0.05, 0.005):
        last, model = Last(), net()
        model.load_state_dict(start)
        budget = Budget(epochs=24, batch_size=16, lr=0.02)
        _, shelf = trained(last, GSM(sparsity=0.8, momentum=0.9, weight_decay=decay), model=model, budget=budget)
        gone = sum(
            float((w * (1 - m)).abs().sum()) for w, m in zip(last.seen.values(), shelf.get(MASKS).values(), strict=True)
        )
        lost[shrinkage(0.02, decay, 0.9, 120)] = gone / sum(float(w.abs().sum()) for w in last.seen.values())
    enough, few = (lost[k] for k in sorted(lost, reverse=True))
    assert sorted(lost) == pytest.approx([0.12, 1.2])
    assert enough < few


def test_zero_sparsity_is_the_fit_without_it_bit_for_bit() -> None:
    for budget in (BUDGET, Budget(3, 16, "sgd", 1e-2, 0.9, 1e-2)):
        model, shelf = trained(GSM(sparsity=0.0), budget=budget)
        assert same(model, trained(budget=budget)[0])
        assert dict(shelf.get(MASKS)) == {}


@pytest.mark.parametrize("other", [XGrad(steps=2), MKOR(every=2, warmup=2)])
def test_it_is_the_innermost_rule_wherever_it_stands(other: object) -> None:
    gsm = GSM(sparsity=0.5)
    first, second = trained(gsm, other)[0], trained(other, gsm)[0]
    assert same(first, second) and not same(first, trained(gsm)[0])


def test_frozen_weights_do_not_count_and_are_not_cut() -> None:
    model = net()
    model.conv.weight.requires_grad_(False)
    before = model.conv.weight.clone()
    made, shelf = trained(GSM(sparsity=0.5), model=model)
    assert set(shelf.get(MASKS)) == {"head.weight"} and int(shelf.get(MASKS)["head.weight"].sum()) == 72
    assert torch.equal(made.get_parameter("conv.weight"), before)


def test_a_network_without_weights_trains_as_it_is() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Unflatten(1, (8, 2)), nn.AvgPool1d(2), nn.Flatten())
    made, shelf = trained(GSM(sparsity=0.5), model=model)
    assert dict(shelf.get(MASKS)) == {} and not torch.equal(made[1].weight, torch.ones(16))


def test_the_log_tells_how_far_the_slide_goes_and_what_the_cut_took() -> None:
    told: list[Mapping[str, Any]] = []
    model, ctx = net(), Context(report=told.append)
    hook = GSM(sparsity=0.75, momentum=0.98, weight_decay=5e-3).hook(ctx)
    at = Loop(model, Classification(3), Hooks([]), Budget(epochs=1, lr=0.1), 400, ctx)
    whole = sum(float(w.detach().abs().sum()) for _, w in at.weights())
    hook.start(at)
    hook.end(at)
    left = sum(float(w.detach().abs().sum()) for _, w in at.weights())
    assert told[0]["shrinkage"] == pytest.approx(10.0) and told[0]["enough"]
    assert told[1]["cut"] == pytest.approx(1 - left / whole) and set(told[1]["kept"]) == {"conv.weight", "head.weight"}
    GSM(momentum=0.9).hook(ctx).start(at)
    assert told[2]["shrinkage"] == pytest.approx(2.0) and not told[2]["enough"]
    notes = [t["text"] for t in told if t["kind"] == "note"]  # reach the scorecard; only the short slide is one
    assert len(notes) == 1 and "exp(-2) only" in notes[0] and "Raise epochs" in notes[0]


class Opaque:
    def ahead(self) -> Any: ...
    def step(self, grads: Mapping[str, Tensor], lr: float) -> None: ...
    def direction(self) -> dict[str, Tensor]:
        return {}


def test_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(PlanError, match="must find the optimiser it replaces; got Opaque"):
        GSM().update(Opaque(), net(), Context())
    with pytest.raises(PlanError, match="once in a fit; got it twice"):
        trained(GSM(), GSM())
    for bad in (GSM(sparsity=1.0), GSM(momentum=1.0), GSM(weight_decay=-1.0)):
        with pytest.raises(ParamError):
            check(bad)
