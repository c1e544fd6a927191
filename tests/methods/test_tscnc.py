"""tscnc against NumPy's singular values, closed forms, training by hand, and bounds that random inputs must keep."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.fit import Named, fit, run_fit
from cupel.core.shelf import MASKS, Shelf
from cupel.core.tasks import Classification
from cupel.core.types import Bounds, Budget, Examples, TrainView
from cupel.ops.conditioning import conditioning, lipschitz_bound, short_side, transformed_l1, unevenness
from cupel.ops.masks import sparsity_of
from cupel.techniques.compress.magnitude_prune import MagnitudePrune
from cupel.techniques.compress.tscnc import TSCNC, condition_term, sparse_term
from cupel.techniques.robust.adversarial_training import AdversarialTraining

torch.set_num_threads(1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(*sizes: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def data(count: int = 64) -> tuple[Tensor, Tensor]:
    x = drawn(count, 6, seed=2).sigmoid()
    return x, (x[:, 0] > 0.5).long() + (x[:, 1] > 0.5).long()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.ndim > 1}


def penalty(w: np.ndarray, a: float) -> float:
    u = np.abs(w / w.std())
    return float(np.mean((a + 1) * u / (a + u)))


def h(values: np.ndarray, ridge: float) -> float:
    return float(np.mean(values**2 - np.log(ridge + values**2)) / 2)


def test_transformed_l1_lies_between_counting_and_summing() -> None:
    w = drawn(7, 9)
    w[0] = 0
    u = (w / w.std(correction=0)).abs()
    for a in (0.1, 1.0, 5.0):
        assert float(transformed_l1(w, a)) == pytest.approx(penalty(w.numpy(), a), rel=1e-3)
        assert float(transformed_l1(100 * w, a)) == pytest.approx(float(transformed_l1(w, a)), rel=1e-3)
    assert float(transformed_l1(w, 1e6)) == pytest.approx(float(u.mean()), rel=1e-3)
    nearly_zero = torch.cat([torch.full((500,), 1e-9), torch.ones(500)]).reshape(25, 40)
    assert float(transformed_l1(nearly_zero, 1e-2)) == pytest.approx(0.51, abs=0.01)  # half of them count


def test_its_gradient_is_that_of_the_formula_at_a_fixed_scale() -> None:
    w = torch.tensor([[0.0, 0.1, -0.1, 1.0, 3.0, -3.0]], requires_grad=True)
    transformed_l1(w, 1.0).backward()
    assert w.grad is not None
    scale = float(w.detach().std(correction=0))
    u = w.detach() / scale
    assert torch.allclose(w.grad, 2 * u.sign() / (1 + u.abs()) ** 2 / scale / 6, rtol=1e-4)
    pushes = w.grad.abs()[0]
    assert pushes[1] > 2 * pushes[3] > 4 * pushes[4] > 0 and pushes[0] == 0
    constant = torch.full((3, 3), 0.5, requires_grad=True)
    transformed_l1(constant, 1.0).backward()
    assert constant.grad is not None and bool(torch.isfinite(constant.grad).all())


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6), (4, 3, 3, 3), (1, 8)])
def test_unevenness_is_the_sum_over_singular_values(shape: tuple[int, ...]) -> None:
    w = drawn(*shape)
    values = np.linalg.svd(w.reshape(shape[0], -1).numpy(), compute_uv=False)
    assert float(unevenness(w, 0.01)) == pytest.approx(h(values, 0.01), rel=1e-4)
    assert short_side(w) == len(values)


def test_its_gradient_is_the_closed_form() -> None:
    w = drawn(4, 9).double().requires_grad_(True)
    unevenness(w, 0.1).backward()
    inverse = torch.linalg.inv(0.1 * torch.eye(4).double() + w.detach() @ w.detach().T)
    assert w.grad is not None and torch.allclose(w.grad, (w.detach() - inverse @ w.detach()) / 4)


def test_it_is_least_where_all_singular_values_are_equal() -> None:
    ridge = 0.04
    rows = torch.linalg.qr(drawn(9, 4).double())[0].T
    best = (math.sqrt(1 - ridge) * rows).requires_grad_(True)
    value = unevenness(best, ridge)
    value.backward()
    assert best.grad is not None and float(best.grad.abs().max()) < 1e-12
    assert float(value.detach()) == pytest.approx((1 - ridge) / 2)
    assert float(condition_term([best.detach(), 1.0 * best.detach()], ridge)) == pytest.approx(0, abs=1e-12)
    for factor in (0.5, 2.0):
        assert float(unevenness(factor * best.detach(), ridge)) > float(value.detach())
    squeezed = best.detach().clone()
    squeezed[0] *= 0.01  # one singular value falls
    assert float(unevenness(squeezed, ridge)) > float(value.detach()) + 0.1


def test_singular_and_diverged_matrices_do_not_raise() -> None:
    same = drawn(1, 6).expand(4, 6).clone().requires_grad_(True)
    value = unevenness(same, 0.01)
    value.backward()
    assert bool(torch.isfinite(value)) and same.grad is not None and bool(torch.isfinite(same.grad).all())
    assert bool(torch.isnan(unevenness(torch.full((3, 4), torch.nan), 0.01)))
    assert bool(torch.isnan(unevenness(torch.full((3, 4), 1e10), 0.01)))  # rounding swallows the ridge


def test_conditioning_counts_live_rows_and_the_rank() -> None:
    w = torch.zeros(6, 7)
    w[1, 2], w[3, 4], w[4, 5], w[4, 6] = 8.0, 2.0, 0.3, 0.4
    w[5] = 2 * w[4]  # the same support: a direction is lost
    c = conditioning(w)
    lowest = 0.5 * math.sqrt(5)
    assert (c.rows, c.columns, c.rank, c.full, c.lost) == (4, 4, 3, 6, 1)
    assert (c.largest, c.least) == pytest.approx((8.0, lowest))
    assert c.effective == pytest.approx(8 / lowest) and c.kappa == math.inf
    dense = drawn(5, 8)
    assert conditioning(dense).kappa == pytest.approx(np.linalg.cond(dense.numpy()), rel=1e-4)
    assert conditioning(dense).kappa == conditioning(dense).effective
    dead = conditioning(torch.zeros(3, 4))
    assert (dead.rank, dead.effective, dead.kappa) == (0, 1.0, math.inf)
    product = conditioning(drawn(6, 2) @ drawn(2, 7, seed=5))  # rounding leaves its other singular values near 1e-7
    assert (product.rank, product.rows, product.lost) == (2, 6, 4) and product.effective < 100
    kernels = drawn(4, 3, 3, 3)
    assert conditioning(kernels).kappa == pytest.approx(np.linalg.cond(kernels.flatten(1).numpy()), rel=1e-4)


def test_no_pair_of_inputs_breaks_the_lipschitz_bound() -> None:
    model = net(6, 20, 12, 3)
    bound = lipschitz_bound(weights(model).values())
    x, y = drawn(500, 6, seed=3), drawn(500, 6, seed=4)
    with torch.no_grad():
        assert float(((model(x) - model(y)).norm(dim=1) / (x - y).norm(dim=1)).max()) <= bound
    one = drawn(5, 9)
    assert lipschitz_bound([one]) == pytest.approx(float(np.linalg.norm(one.numpy(), 2)), rel=1e-5)
    assert lipschitz_bound([one, drawn(4, 5)]) == pytest.approx(lipschitz_bound([one]) * lipschitz_bound([drawn(4, 5)]))


def test_the_bound_of_a_convolution_covers_its_whole_map_and_is_met_by_a_mean() -> None:
    for kernel in (drawn(3, 2, 3, 3), torch.ones(1, 1, 3, 3)):
        size = (kernel.shape[1], 12, 12)
        columns = torch.eye(math.prod(size)).reshape(-1, *size)
        full = F.conv2d(columns, kernel, padding=1).flatten(1).T
        norm = float(torch.linalg.matrix_norm(full, 2))
        assert norm <= lipschitz_bound([kernel]) * (1 + 1e-5)
    assert norm > 0.9 * 9  # of ones: three times what the matrix alone would say


class Told:
    """Collects what a fit tells its log."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def fit(self, technique: TSCNC, model: nn.Module, budget: Budget, seed: int = 0) -> nn.Module:
        x, y = data()
        examples = Examples(x, y, torch.arange(len(y)))
        ctx = Context(seed=seed, path=("fit",), shelf=Shelf(), report=lambda line: self.lines.append(dict(line)))
        view = TrainView(examples, examples)
        return run_fit(model, view, Classification(3), budget, [Named("tscnc", technique, ctx.child("tscnc"))], ctx)

    def notes(self) -> list[str]:
        return [str(line["text"]) for line in self.lines if line.get("kind") == "note"]


def by_hand(p: TSCNC, model: nn.Module, steps: int, lr: float) -> None:
    """Full-batch gradient descent on the loss as the docstring states it."""
    x, y = data()
    for step in range(steps):
        loss = F.cross_entropy(model(x), y)
        for w in (q for q in model.parameters() if q.ndim > 1):
            u = ((w / w.detach().std(correction=0)).square() + 1e-8).sqrt()
            if step < p.sparse_until * steps:
                loss = loss + p.sparse_weight * ((p.a + 1) * u / (p.a + u)).mean()
            if step % p.every == 0 and min(w.shape) <= p.max_side:
                s = torch.linalg.svdvals(w)
                gap = (s.square().sum() - torch.log(p.ridge + s.square()).sum()) / (2 * len(s))
                loss = loss + p.condition_weight * p.every * gap
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for q in model.parameters():
                q -= lr * q.grad


@pytest.mark.parametrize(
    "p",
    [
        TSCNC(sparse_weight=0.2, condition_weight=0.0),
        TSCNC(sparse_weight=0.0, condition_weight=0.3, ridge=0.1),
        TSCNC(sparse_weight=0.3, condition_weight=0.2, sparse_until=0.5, every=3, a=0.7),
        TSCNC(sparse_weight=0.1, condition_weight=0.5, max_side=5),
    ],
)
def test_training_follows_the_loss_that_is_written_down(p: TSCNC) -> None:
    budget = Budget(epochs=8, batch_size=64, optimizer="sgd", lr=0.1, momentum=0.0)
    made, slow = Told().fit(p, net(6, 10, 3), budget), net(6, 10, 3)
    by_hand(p, slow, 8, 0.1)
    for ours, theirs in zip(made.parameters(), slow.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6)
    plain = fit(net(6, 10, 3), data(), Classification(3), budget=budget)
    assert not torch.allclose(weights(made)["0.weight"], weights(plain)["0.weight"], atol=1e-3)


def test_large_matrices_are_left_out_and_the_log_says_so() -> None:
    told, budget = Told(), Budget(epochs=1, batch_size=64, optimizer="sgd", lr=0.1, momentum=0.0)
    told.fit(TSCNC(max_side=5), net(6, 10, 3), budget)
    assert "0.weight have more than 5 singular values" in told.notes()[0]
    assert [line["layer"] for line in told.lines if line.get("kind") == "conditioning"] == ["2.weight"]
    everything = Told()
    everything.fit(TSCNC(), net(6, 10, 3), budget)
    assert len(everything.notes()) == 1 and "over 9 of 9 singular values" in everything.notes()[0]


def test_frozen_matrices_take_no_part() -> None:
    budget = Budget(epochs=2, batch_size=64, optimizer="sgd", lr=0.1, momentum=0.0)
    model = net(6, 10, 3)
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    made = Told().fit(TSCNC(), model, budget)
    assert torch.equal(weights(made)["0.weight"], frozen)
    for p in model.parameters():
        p.requires_grad_(False)
    model[2].bias.requires_grad_(True)
    shaped, neutral = Told(), Told()
    shaped.fit(TSCNC(), copy.deepcopy(model), budget)  # nothing to shape: no error, and the same loss
    neutral.fit(TSCNC(sparse_weight=0.0, condition_weight=0.0), model, budget)
    losses = [[line["loss"] for line in told.lines if line.get("kind") == "epoch"] for told in (shaped, neutral)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert not neutral.notes()  # what acts on nothing says nothing


def trained(*techniques: object, epochs: int = 30) -> tuple[nn.Module, Shelf]:
    shelf, budget = Shelf(), Budget(epochs=epochs, batch_size=16, optimizer="adam", lr=1e-2)
    found = fit(
        net(6, 16, 12, 3), data(), Classification(3), techniques=techniques, budget=budget, bounds=Bounds(), shelf=shelf
    )
    return found, shelf


def log_kappa(model: nn.Module) -> float:
    return float(np.mean([math.log10(conditioning(w).effective) for w in weights(model).values()]))


def test_each_term_does_what_it_is_for() -> None:
    plain, even = trained()[0], trained(TSCNC(sparse_weight=0.0, condition_weight=0.1))[0]
    sparse = trained(TSCNC(sparse_weight=0.1, condition_weight=0.0))[0]
    assert log_kappa(even) < log_kappa(plain) - 0.3

    def small(model: nn.Module) -> float:
        return float(np.mean([float((w.abs() < 0.1 * w.std()).double().mean()) for w in weights(model).values()]))

    assert small(sparse) > small(plain) + 0.15
    assert float(sparse_term(weights(sparse).values(), 1.0)) < float(sparse_term(weights(plain).values(), 1.0))


def test_in_one_fit_with_adversarial_training_and_a_pruner() -> None:
    prune, attack = MagnitudePrune(sparsity=0.8, start=0.5, ramp=0.0), AdversarialTraining(eps=0.05, steps=2)
    shape = TSCNC(sparse_until=0.5)
    (one, shelf), (other, _) = trained(attack, shape, prune, epochs=6), trained(shape, prune, attack, epochs=6)
    assert sparsity_of(weights(one)) == pytest.approx(0.8, abs=0.01)
    for name, w in weights(one).items():
        assert torch.equal(w, weights(other)[name])  # the order of the list does not matter
        assert torch.equal((w != 0).to(w.dtype), shelf.get(MASKS)[name])
