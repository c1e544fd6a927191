"""subnetwork-inference: curvature and posterior by other means, laplace-torch, and a network that travels."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Examples, Splits, Subject
from cupel.ops.jacobians import Numbering, input_jacobians, parameter_jacobians
from cupel.ops.laplace import (
    class_roots,
    function_covariance,
    ggn,
    ggn_diagonal,
    log_evidence,
    precision_factor,
    predictive,
)
from cupel.storage.networks import load_network, save_network
from cupel.storage.state import size_of
from cupel.techniques.robust.subnetwork_inference import GRID, Linearised, SubnetworkInference
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


class Forked(nn.Module):
    """Looks at values, so it has no batched form; one parameter is not used at all, one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.spare = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(self.one(x).tanh())
        return self.two(h if float(x.detach()[0].sum()) > 0 else h.square())


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype).eval()


def points(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=draw, dtype=dtype)
    return x, torch.randint(0, 3, (count,), generator=draw)


def whole(model: nn.Module, x: Tensor, chosen: Tensor | None = None, most: int = 2**20) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits, parts = zip(*parameter_jacobians(model, x, Numbering.of(model), chosen, most), strict=True)
    return torch.cat(logits), torch.cat(parts)


def bench(net: nn.Module, x: Tensor, y: Tensor, classes: int = 3) -> Subject:
    data = Examples(x, y, torch.arange(len(x)))
    return Subject(net.eval(), Splits(data, data, data), Classification(classes))


@pytest.fixture(scope="module")
def digits() -> Subject:
    subject = build(DigitsCnn(width=4, examples=160), Context())
    return subject.with_model(fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=6)))


def finite_differences(model: nn.Module, x: Tensor, step: float = 1e-6) -> Tensor:
    """`[B, K, D]`, one parameter after the other."""
    columns = []
    with torch.no_grad():
        for p in model.parameters():
            for i in range(p.numel()):
                twins = []
                for sign in (1, -1):
                    other = copy.deepcopy(model)
                    dict(other.named_parameters())[next(n for n, q in model.named_parameters() if q is p)].view(-1)[
                        i
                    ] += sign * step
                    twins.append(other(x))
                columns.append((twins[0] - twins[1]) / (2 * step))
    return torch.stack(columns, dim=2)


def test_jacobians_are_the_slopes() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    norm.running_mean, norm.running_var = torch.randn(4).double(), torch.rand(4).double() + 0.5
    net = nn.Sequential(nn.Linear(5, 4), norm, nn.GELU(), nn.Dropout(0.5), nn.Linear(4, 3)).double().eval()
    x, _ = points(6)
    wanted = finite_differences(net, x)
    logits, found = whole(net, x)
    assert torch.equal(logits, net(x)) and found.shape == (6, 3, 47)
    assert torch.allclose(found, wanted, atol=1e-7)
    chosen = torch.tensor([0, 3, 20, 24, 27, 46])
    for most in (1, 47 * 3 * 8 * 4, 2**20):  # chunks of 1, 4 and all examples
        assert torch.allclose(whole(net, x, chosen, most)[1], wanted[:, :, chosen], atol=1e-7)
    sizes = [len(f) for f, _ in parameter_jacobians(net, x, Numbering.of(net), None, 47 * 3 * 8 * 4)]
    assert sizes == [4, 2] and not list(parameter_jacobians(net, x[:0], Numbering.of(net)))


def test_a_forward_that_cannot_be_batched() -> None:
    torch.manual_seed(0)
    net = Forked().double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    single = torch.cat([finite_differences(net, one[None]) for one in x])
    found = torch.cat([whole(net, one[None])[1] for one in x])
    assert torch.allclose(found, single, atol=1e-7) and not found[:, :, :2].any()
    up = x[x.sum(1) > 0]
    assert len(up) > 1 and torch.allclose(whole(net, up)[1], single[x.sum(1) > 0], atol=1e-7)
    assert not any(p.requires_grad is False or p.grad is not None for p in net.parameters())
    slopes = input_jacobians(mlp(), points(4)[0])
    wanted = torch.stack([torch.autograd.functional.jacobian(mlp(), one) for one in points(4)[0]])
    assert torch.allclose(slopes, wanted)
    assert torch.allclose(input_jacobians(net, x[:1])[0], torch.autograd.functional.jacobian(net, x[:1])[0, :, 0])


def test_a_scalar_parameter_has_slopes_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    net, x = Scaled(), torch.randn(5, 3)
    ((_, slopes),) = parameter_jacobians(net, x, Numbering.of(net))
    assert torch.equal(slopes, x[:, :, None])
    ((_, chosen),) = parameter_jacobians(net, x, Numbering.of(net), torch.tensor([0]))
    assert torch.equal(chosen, slopes)


def test_numbers_run_through_the_trained_parameters() -> None:
    net = mlp()
    net[0].bias.requires_grad_(False)
    numbering = Numbering.of(net)
    assert list(numbering.shapes) == ["0.weight", "2.weight", "2.bias"] and numbering.total == 40 + 24 + 3
    flat = numbering.flat(dict(net.named_parameters()))
    for name, at in numbering.parts(torch.tensor([39, 40, 66])).items():
        low = {n: a for n, a, _ in numbering.spans()}[name]
        assert torch.equal(flat[low + at], dict(net.named_parameters())[name].flatten()[at])
    net[2].weight = net[0].weight  # tied: counted once
    assert list(Numbering.of(net).shapes) == ["0.weight", "2.bias"]


def test_curvature_against_loops() -> None:
    net, (x, _) = mlp(), points(7)
    logits, jacobian = whole(net, x)
    j, z = jacobian.numpy(), logits.detach().numpy()
    slow = np.zeros((75, 75))
    for n in range(7):
        p = np.exp(z[n]) / np.exp(z[n]).sum()
        slow += j[n].T @ (np.diag(p) - np.outer(p, p)) @ j[n]
    roots = class_roots(logits)
    np.testing.assert_allclose(ggn(jacobian, roots).numpy(), slow, atol=1e-12)
    np.testing.assert_allclose(ggn_diagonal(jacobian, roots).numpy(), np.diag(slow), atol=1e-12)
    factor = precision_factor(torch.from_numpy(slow), 0.7)
    cov = np.einsum("nkd,de,nle->nkl", j, np.linalg.inv(slow + 0.7 * np.eye(75)), j)
    np.testing.assert_allclose(function_covariance(jacobian, factor).numpy(), cov, atol=1e-10)
    diagonal = precision_factor(torch.from_numpy(np.diag(slow).copy()), 0.7)
    cov = np.einsum("nkd,d,nld->nkl", j, 1 / (np.diag(slow) + 0.7), j)
    np.testing.assert_allclose(function_covariance(jacobian, diagonal).numpy(), cov, atol=1e-10)


def test_it_is_the_hessian_and_the_posterior_of_linear_models() -> None:
    """Softmax regression: Gauss-Newton is the Hessian. Linear regression: the posterior is Bayes' rule."""
    x, y = points(30)
    net = nn.Linear(5, 3).double()
    logits, jacobian = whole(net, x)

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(x @ flat[:15].view(3, 5).T + flat[15:], y, reduction="sum")

    hessian = torch.autograd.functional.hessian(loss, torch.cat([net.weight.flatten(), net.bias]).detach())
    assert torch.allclose(ggn(jacobian, class_roots(logits)), hessian, atol=1e-10)
    line = nn.Linear(5, 1, bias=False).double()
    sigma, ridge = 0.3, 2.0
    roots = torch.full((30, 1, 1), 1 / sigma, dtype=torch.float64)
    factor = precision_factor(ggn(whole(line, x)[1], roots), ridge)
    exact = torch.linalg.inv(x.T @ x / sigma**2 + ridge * torch.eye(5))
    assert torch.allclose(function_covariance(whole(line, x)[1], factor).flatten(), ((x @ exact) * x).sum(1))


def test_the_mean_of_a_softmax() -> None:
    """Two classes: the exact mean by quadrature; MacKay's formula is near it, sampling exact in the limit."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    for mean, variance in ((1.0, 0.5), (2.0, 4.0), (-3.0, 9.0)):
        exact = float((weights / (1 + np.exp(-mean - math.sqrt(variance) * nodes))).sum() / math.sqrt(2 * math.pi))
        logits = torch.tensor([[mean / 2, -mean / 2]], dtype=torch.float64)
        covariance = torch.tensor([[[variance, 0.0], [0.0, 0.0]]], dtype=torch.float64)
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(200_000, 2, generator=draw, dtype=torch.float64)
        sampled = predictive(logits, covariance, noise)
        assert abs(float(sampled.softmax(1)[0, 0]) - exact) < 3e-3
        assert abs(float(sampled.exp().sum()) - 1) < 1e-12  # log probabilities
        both = torch.full((1, 2, 2), 0.0, dtype=torch.float64)
        both[0, 0, 0] = both[0, 1, 1] = variance  # the formula divides each logit by its own spread
        probit = float(predictive(logits, both).softmax(1)[0, 0])
        assert abs(probit - 1 / (1 + math.exp(-mean / math.sqrt(1 + math.pi / 8 * variance)))) < 1e-12
    assert torch.equal(predictive(logits, 0 * covariance), logits)


def test_against_laplace_torch() -> None:
    """Selection, posterior, evidence and predictions of an independent implementation on the same network."""
    library = pytest.importorskip("laplace")
    from laplace.curvature import BackPackGGN
    from laplace.utils import LargestVarianceDiagLaplaceSubnetMask
    from torch.utils.data import DataLoader, TensorDataset

    net = mlp()
    x, y = points(40)
    loader, precision = DataLoader(TensorDataset(x, y), batch_size=16), 2.0
    told = {"likelihood": "classification", "backend": BackPackGGN}
    diagonal = library.Laplace(net, subset_of_weights="all", hessian_structure="diag", **told)
    rows = LargestVarianceDiagLaplaceSubnetMask(net, 12, diagonal).select(loader)
    theirs = library.Laplace(
        net,
        subset_of_weights="subnetwork",
        hessian_structure="full",
        subnetwork_indices=rows,
        prior_precision=precision,
        **told,
    )
    theirs.fit(loader)
    made = apply(SubnetworkInference(size=12, precision=precision), bench(mlp(), x, y)).model
    assert made.chosen.tolist() == sorted(rows.tolist())
    assert torch.allclose(made.factor @ made.factor.T, theirs.posterior_precision)
    logits, jacobian = whole(net, x[:9], made.chosen.long())
    _, covariance = theirs._glm_predictive_distribution(x[:9])
    assert torch.allclose(function_covariance(jacobian, made.factor), covariance)
    assert torch.allclose(made(x[:9]).softmax(1), theirs(x[:9], link_approx="probit"))
    flat = torch.cat([p.flatten() for p in net.parameters()])[rows]
    fitted = -float(F.cross_entropy(net(x), y, reduction="sum"))
    found = log_evidence(fitted, flat.detach(), precision_factor(theirs.H, precision), precision)
    assert found == pytest.approx(float(theirs.log_marginal_likelihood()), rel=1e-9)
    assert torch.allclose(logits, net(x[:9]))


def test_the_weights_that_know_least() -> None:
    net, (x, y) = mlp(), points(40)
    with torch.no_grad():
        net[0].weight[:, 4] = 0.5
        x[:, 4] = 0  # an input that is never lit: eight silent weights
        net[2].weight[0, :3] = 0  # pruned
    logits, jacobian = whole(net, x)
    h = ggn_diagonal(jacobian, class_roots(logits))
    lonely = {4 + 5 * unit for unit in range(8)}
    cut = {48, 49, 50}
    assert set((h == 0).nonzero().flatten().tolist()) == lonely
    order = [i for i in h.argsort().tolist() if i not in lonely | cut]
    subject = bench(net, x, y)

    def chosen(**told: object) -> list[int]:
        return apply(SubnetworkInference(precision=1.0, **told), subject).model.chosen.tolist()  # type: ignore[arg-type]

    assert chosen(size=10) == sorted(order[:10])
    assert set(chosen(size=8, silent=True)) == lonely and len(chosen(size=500)) == 75 - 11
    assert chosen(choice="last") == list(range(51, 75))
    drawn = chosen(size=10, choice="random")
    assert len(set(drawn)) == 10 and drawn != sorted(order[:10]) and not set(drawn) & (lonely | cut)
    whole_set = apply(SubnetworkInference(precision=1.0, choice="all", covariance="diagonal"), subject).model
    assert torch.allclose(whole_set.factor.square(), h[whole_set.chosen.long()] + 1.0)
    some = apply(SubnetworkInference(precision=1.0, size=10, examples=20, choice="last"), subject).model
    full = apply(SubnetworkInference(precision=1.0, size=10, choice="last"), subject).model
    ratio = (some.factor.square().sum() - 24) / (full.factor.square().sum() - 24)
    assert 0.7 < float(ratio) < 1.4  # half of the examples, counted twice


def test_the_prior_that_is_found() -> None:
    net, (x, y) = mlp(3), points(60)
    subject = bench(net, x, y)
    losses = {}
    for value in GRID:
        made = apply(SubnetworkInference(size=30, precision=value), subject).model
        losses[value] = float(F.cross_entropy(made(x), y))
    for leeway in (0.0, 0.02):
        found = apply(SubnetworkInference(size=30, leeway=leeway), subject).model
        first = next(v for v in GRID if losses[v] <= min(losses.values()) + leeway)
        wanted = apply(SubnetworkInference(size=30, precision=first), subject).model
        assert torch.equal(found.factor, wanted.factor)
    logits, jacobian = whole(net, x)
    rows = found.chosen.long()
    h = ggn(jacobian[:, :, rows], class_roots(logits))
    flat = torch.cat([p.flatten() for p in net.parameters()]).detach()[rows]

    def evidence(v: float) -> float:
        """By another route: a Gaussian prior times a Gaussian likelihood around the mode."""
        prior = 0.5 * len(rows) * math.log(v) - 0.5 * v * float(flat.square().sum())
        return prior - 0.5 * float(torch.logdet(h + v * torch.eye(len(rows))))

    best = max(GRID, key=evidence)
    found = apply(SubnetworkInference(size=30, tune="evidence"), subject).model
    assert torch.allclose(found.factor, precision_factor(h, best)) and GRID[0] < best < GRID[-1]


def test_confidence_falls_away_from_the_data(digits: Subject) -> None:
    """A tighter prior, more confidence; far from the data, less."""
    made = apply(SubnetworkInference(size=300, precision=1.0), digits).model
    tight = apply(SubnetworkInference(size=300, precision=100.0), digits).model
    x = digits.data.test.inputs[:60]

    def spread(net: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(net, Linearised)
        _, jacobian = whole(net.net, inputs, net.chosen.long())
        return function_covariance(jacobian, net.factor).diagonal(dim1=1, dim2=2).mean(1)

    assert torch.equal(made.chosen, tight.chosen) and bool((spread(tight, x) < spread(made, x)).all())
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x, _ = points(80)
    subject = bench(net, x, x[:, :3].argmax(1))
    subject = subject.with_model(fit(net, subject.data, subject.task, budget=Budget(epochs=20, lr=0.02)))
    bent = apply(SubnetworkInference(choice="all", precision=1.0), subject).model
    far = 1e4 * x  # a piecewise linear network is certain there; its posterior spreads as fast as its logits grow
    plain, here = (subject.model(far).softmax(1).amax(1), bent(far).softmax(1).amax(1))
    assert float((plain > 0.9999).double().mean()) > 0.95 and float(here.mean()) < 0.95
    assert torch.allclose(here, bent(2 * far).softmax(1).amax(1), atol=1e-3)


def test_gradients_go_through_it(digits: Subject) -> None:
    """An attack sees the whole of it: slopes by differences, with the covariance's part in them."""
    subject = bench(mlp(), *points(40))
    for told in ({}, {"samples": 7}, {"covariance": "diagonal", "choice": "all"}):
        made = apply(SubnetworkInference(size=20, precision=0.5, **told), subject).model  # type: ignore[arg-type]
        x = points(3)[0].requires_grad_()
        assert torch.autograd.gradcheck(lambda t, made=made: made(t), (x,))
    net = apply(SubnetworkInference(size=30, precision=1.0), digits).model
    x = digits.data.test.inputs[:2].clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x)
    assert bool(slope.ne(0).any())


def test_it_travels(digits: Subject, tmp_path: Path) -> None:
    for told in ({}, {"samples": 5}, {"covariance": "diagonal"}):
        made = apply(SubnetworkInference(size=120, precision=1.0, **told), digits)  # type: ignore[arg-type]
        wanted = made.outputs()
        assert wanted.shape == (160, 10) and wanted.dtype == torch.float32
        save_network(made.model, tmp_path, "net", {})
        again = load_network(tmp_path, "net")
        for other in (again, copy.deepcopy(made.model), pickle.loads(pickle.dumps(made.model))):
            assert torch.equal(made.with_model(other).outputs(), wanted)
    full = apply(SubnetworkInference(size=120, precision=1.0), digits).model
    room = size_of(full) - size_of(digits.model)
    assert 120 * 121 / 2 * 4 <= room <= 120 * 121 / 2 * 4 + 120 * 4 + 120 * 120 / 8 + 2000


def test_refusals(digits: Subject) -> None:
    made = apply(SubnetworkInference(size=20, precision=1.0), digits).model
    with pytest.raises(PlanError, match="evaluation mode"):
        made.train()(digits.data.test.inputs[:2])
    with pytest.raises(PlanError, match="training and validation"):
        SubnetworkInference().seal(mlp(), Context())
    x, y = points(8)
    with pytest.raises(PlanError, match="one score for each class"):
        apply(SubnetworkInference(), bench(nn.Linear(5, 1).double(), x, y))
    with pytest.raises(PlanError, match="a trained weight to choose"):
        apply(SubnetworkInference(), bench(nn.Linear(5, 3).double().requires_grad_(False), x, y))
    assert all(p.requires_grad for p in made.parameters())
    assert made.eval()(digits.data.test.inputs[:0]).shape == (0, 10)
