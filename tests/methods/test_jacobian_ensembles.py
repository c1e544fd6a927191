"""jacobian-ensembles on networks whose Jacobians are known, and universal shifts of a linear network."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context, seeded
from cupel.core.fit import Named, run_fit
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Bounds, Budget, Examples, TrainView, still
from cupel.ops.projections import random_in_ball
from cupel.ops.threats import Threat
from cupel.ops.universal import clamped_loss, evaded, moved, universal
from cupel.techniques.robust.jacobian_ensembles import (
    Ensemble,
    JacobianEnsembles,
    _Flat,
    on_sphere,
    projected_jacobian,
)
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
WIDE = Bounds(-9.0, 9.0)


def two_layer() -> nn.Module:
    with Context().scope("net"):
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


def test_the_estimate_is_unbiased() -> None:
    net, x = two_layer(), torch.randn(3, 5, generator=seeded(0, "x"))
    exact = torch.stack([torch.autograd.functional.jacobian(net, row).square().sum() for row in x])
    leaf = x.repeat(4000, 1).requires_grad_(True)
    out = net(leaf)
    found = projected_jacobian(out, leaf, on_sphere(out, seeded(0, "v"))).view(4000, 3).mean(0)
    assert torch.allclose(found, exact, rtol=0.05)


def test_directions_are_uniform_on_the_sphere() -> None:
    v = on_sphere(torch.zeros(20000, 4), seeded(0, "v"))
    assert torch.allclose(v.norm(dim=1), torch.ones(20000), atol=1e-5)
    assert torch.allclose(v.T @ v / 20000, torch.eye(4) / 4, atol=0.01) and v.mean(0).abs().max() < 0.02


def test_the_penalty_of_a_linear_network_and_its_gradient() -> None:
    w = torch.randn(4, 5, generator=seeded(0, "w")).requires_grad_(True)
    x = torch.randn(6, 5, generator=seeded(0, "x")).requires_grad_(True)
    v = on_sphere(torch.zeros(6, 4), seeded(0, "v"))
    value = projected_jacobian(x @ w.T, x, v)
    assert torch.allclose(value, 4 * (v @ w).square().sum(1))
    (slope,) = torch.autograd.grad(value.mean(), w)
    assert torch.allclose(slope, 8 * v.T @ (v @ w) / 6, atol=1e-5)  # nothing without create_graph
    single = x[:, 0].detach().requires_grad_(True)  # inputs of one number each, without an axis for it
    assert torch.allclose(projected_jacobian(torch.outer(single, w[:, 0]), single, v), 4 * (v @ w[:, 0]).square())


def test_a_step_of_the_fit_follows_loss_and_penalty() -> None:
    """One SGD step on a linear network, all examples in one batch."""
    draw = seeded(0, "data")
    data = Examples(torch.rand(8, 3, generator=draw), torch.arange(8) % 2, torch.arange(8))
    net = nn.Linear(3, 2, bias=False)
    start = net.weight.detach().clone()
    ctx = Context(task=Classification(2))
    own = ctx.child("jacobian")
    budget = Budget(epochs=1, batch_size=8, optimizer="sgd", lr=0.1, momentum=0.0)
    run_fit(net, TrainView(data, data), Classification(2), budget, [Named("jacobian", _Flat(3.0), own)], ctx)
    w = start.clone().requires_grad_(True)
    v = on_sphere(torch.zeros(8, 2), own.rng("directions"))
    loss = F.cross_entropy(data.inputs @ w.T, data.targets) + 3.0 / 2 * 2 * (v @ w).square().sum(1).mean()
    loss.backward()
    assert w.grad is not None
    assert torch.allclose(net.weight, start - 0.1 * w.grad, atol=1e-6)


def test_the_ensemble_says_the_log_of_the_mean_softmax() -> None:
    a, b = two_layer(), nn.Linear(5, 4)
    both, x = Ensemble([a, b]), torch.randn(6, 5, generator=seeded(0, "x"))
    want = (a(x).softmax(-1) + b(x).softmax(-1)) / 2
    assert torch.allclose(both(x).exp(), want, atol=1e-6)
    far = Ensemble([nn.Identity(), nn.Identity()])(torch.tensor([[0.0, 300.0]]))
    assert torch.allclose(far, torch.tensor([[-300.0, 0.0]]))  # no logarithm of zero
    leaf = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(both(leaf)[:, 0].sum(), leaf)
    (plain,) = torch.autograd.grad(want_of(a, b, leaf).log()[:, 0].sum(), leaf)
    assert torch.allclose(slope, plain, atol=1e-5)
    for other in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert torch.equal(other(x), both(x))


def want_of(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    return (a(x).softmax(-1) + b(x).softmax(-1)) / 2


def test_members_are_fresh_differ_and_the_penalty_flattens_them() -> None:
    subject = build(DigitsCnn(width=4, examples=192), Context())
    subject = replace(subject, budget=replace(subject.budget, batch_size=32))
    kept = copy.deepcopy(subject.model.state_dict())
    slopes = []
    for weight in (0.0, 0.3):
        made = apply(JacobianEnsembles(members=2, weight=weight, epochs=3), subject).model
        first, second = made.members
        assert not torch.equal(first.head.weight, second.head.weight)
        with still(first):
            x = subject.data.test.inputs[:40].clone().requires_grad_(True)
            out = first(x)
            slopes.append(float(projected_jacobian(out, x, on_sphere(out, seeded(0, "v"))).detach().mean()))
    assert slopes[1] < slopes[0] / 2
    assert all(torch.equal(v, kept[n]) for n, v in subject.model.state_dict().items())


def test_a_weight_of_zero_is_a_plain_fit_bit_for_bit() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    nets = []
    for named in ([], [Named("jacobian", _Flat(0.0), Context().child("jacobian"))]):
        net, budget = copy.deepcopy(subject.model), replace(subject.budget, epochs=1)
        nets.append(run_fit(net, subject.data.view(), subject.task, budget, named, Context()))
    assert all(torch.equal(v, nets[1].state_dict()[n]) for n, v in nets[0].state_dict().items())


def slanted(count: int = 400) -> tuple[nn.Module, Examples]:
    """A linear network of three classes, and points labelled by it."""
    net = nn.Linear(6, 3, bias=False)
    net.weight.data = torch.tensor([[1.0, -1, 0, 0, 0.5, 0], [0, 0, 1, -1, 0, 0.5], [-1, 1, -1, 1, 0, 0]])
    x = torch.randn(count, 6, generator=seeded(0, "points"))
    return net, Examples(x, net(x).argmax(1), torch.arange(count))


def test_one_shift_for_a_single_class_goes_along_the_weights() -> None:
    """Where all inputs are of class 0 of two, the best shift of a linear network is known."""
    net = nn.Linear(4, 2, bias=False)
    net.weight.data = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]])
    x = 0.1 * torch.randn(50, 4, generator=seeded(0, "x"))
    data, gap = Examples(x, torch.zeros(50, dtype=torch.long), torch.arange(50)), net.weight.detach()[:1]
    delta = universal(net, data, Threat("linf", 0.3, WIDE), seeded(0, "u"), batch=16, passes=6)
    assert torch.allclose(delta, -0.3 * gap.sign(), atol=1e-6)
    delta = universal(net, data, Threat("l2", 0.3, WIDE), seeded(0, "u"), batch=16, passes=20)
    assert torch.allclose(delta, -0.3 * gap / gap.norm(), atol=0.02)
    towards = universal(net, data, Threat("linf", 0.3, WIDE), seeded(0, "u"), batch=16, passes=6, target=0)
    assert torch.allclose(towards, 0.3 * gap.sign(), atol=1e-6)


def test_shifts_keep_the_ball_beat_noise_and_reach_every_target() -> None:
    net, data = slanted()
    threat = Threat("linf", 0.8, WIDE)
    delta = universal(net, data, replace(threat, restarts=8), seeded(0, "u"))
    assert delta.shape == (1, 6) and delta.abs().max() <= 0.8 + 1e-6
    ours, draw = float(evaded(net, data, delta, threat).double().mean()), seeded(0, "noise")
    corners = [0.8 * torch.randn(1, 6, generator=draw).sign() for _ in range(40)]
    noise = sorted(float(evaded(net, data, corner, threat).double().mean()) for corner in corners)
    assert ours >= noise[35] and ours > sum(noise) / 40 + 0.1, (ours, noise)
    base = (net(data.inputs).argmax(1)[:, None] == torch.arange(3)).double().mean(0)
    for t in range(3):
        shift = universal(net, data, threat, seeded(t, "u"), target=t)
        assert float(evaded(net, data, shift, threat, target=t).double().mean()) > base[t] + 0.2


def test_the_clamp_takes_lost_inputs_out() -> None:
    logits = torch.tensor([[0.0, 50.0], [0.0, 1.0]]).requires_grad_(True)
    loss = clamped_loss(logits, torch.tensor([0, 0]), 9.0)
    assert loss.tolist() == pytest.approx([9.0, 1.3133], abs=1e-3)
    loss.sum().backward()
    assert logits.grad is not None and logits.grad[0].abs().max() == 0 and logits.grad[1].abs().min() > 0.1
    # Nine inputs in ten are lost beyond the clamp and pull one way; the tenth alone is followed, the other way.
    net = nn.Linear(2, 2, bias=False)
    net.weight.data = torch.eye(2)
    x = torch.cat([torch.tensor([[40.0, 0.0]]).repeat(9, 1), torch.tensor([[1.0, 0.0]])])
    data = Examples(x, torch.tensor([1] * 9 + [0]), torch.arange(10))
    threat = Threat("linf", 0.6, Bounds(-99.0, 99.0))
    delta = universal(net, data, threat, seeded(0, "u"), batch=10)
    assert torch.allclose(delta, torch.tensor([[-0.6, 0.6]])) and bool(evaded(net, data, delta, threat)[9])


def test_inputs_stay_in_their_bounds_and_outsized_shifts_are_cut() -> None:
    net, data = slanted(20)
    threat = Threat("linf", 0.3, Bounds(-1.0, 1.0))
    x = moved(data.inputs, torch.full((1, 6), 5.0), threat)
    assert x.max() <= 1 and x.min() >= -1
    a, b = torch.full((1, 6), 5.0), torch.full((1, 6), 0.3)
    assert torch.equal(evaded(net, data, a, threat), evaded(net, data, b, threat))
    first, again = (universal(net, data, replace(threat, restarts=2), seeded(1, "u")) for _ in range(2))
    assert torch.equal(first, again)


def written_out(
    net: nn.Module, data: Examples, threat: Threat, draw: torch.Generator, target: int | None, passes: int
) -> tuple[Tensor, Tensor]:
    """The rule step by step with batches of 150: the shift that is kept, and where the last pass ended."""
    delta, best = torch.zeros_like(data.inputs[:1]), -float("inf")
    kept, sign = delta, 1.0 if target is None else -1.0
    for _ in range(passes):
        total = 0.0
        for rows in reversed(torch.randperm(len(data), generator=draw).split(150)):
            here = delta.clone().requires_grad_(True)
            y = data.targets[rows] if target is None else torch.full_like(data.targets[rows], target)
            out = net((data.inputs[rows] + here).clamp(threat.bounds.low, threat.bounds.high))
            losses = -sign * out.log_softmax(1).gather(1, y[:, None]).squeeze(1).clamp_min(-2.0)
            (slope,) = torch.autograd.grad(losses.mean(), here)
            total += float(losses.detach().sum())
            delta = (delta + (threat.step or threat.eps / 10) * slope.sign()).clamp(-threat.eps, threat.eps)
        if total > best:
            best, kept = total, delta
    return kept, delta


@pytest.mark.parametrize("step", [0.0, 0.27])
@pytest.mark.parametrize("target", [None, 1])
def test_a_shift_is_that_of_the_rule_written_out(step: float, target: int | None) -> None:
    net, data = slanted()
    threat = Threat("linf", 0.8, Bounds(-1.5, 1.5), step=step)
    ends = []
    for seed in range(4):
        for passes in (1, 7):
            want, last = written_out(net, data, threat, seeded(seed, "u"), target, passes)
            found = universal(net, data, threat, seeded(seed, "u"), target=target, most=2.0, passes=passes, batch=150)
            assert torch.allclose(found, want, atol=1e-6)
            ends.append(torch.equal(want, last))
    assert step == 0.0 or not all(ends)  # the pass that is kept is not always the last


def test_of_several_runs_the_one_that_evades_most_is_kept() -> None:
    """With no pass at all, the runs are their starts: no shift, then random points of the ball."""
    net, data = slanted()
    threat, draw = Threat("linf", 0.8, WIDE, restarts=6), seeded(3, "u")
    starts = [torch.zeros(1, 6)] + [random_in_ball(data.inputs[:1], 0.8, "linf", draw) for _ in range(5)]
    hits = [int((net(data.inputs + start).argmax(1) != data.targets).sum()) for start in starts]
    found = universal(net, data, threat, seeded(3, "u"), passes=0)
    assert torch.equal(found, starts[hits.index(max(hits))]) and max(hits) > hits[-1] and len(set(hits)) > 3
