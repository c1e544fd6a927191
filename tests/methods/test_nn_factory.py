"""`nn-factory`: gates against brute force, slices against gates, budgets by counted work, held-out tasks."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.types import Subject
from cupel.ops.assembled import ModularNet, fitted_cost, is_held_out, parts_of, straight_through, top_modules
from cupel.ops.channels import structure_of
from cupel.ops.ledger import ledger_of
from cupel.storage.networks import load_network, save_network
from cupel.techniques.compress import nn_factory
from cupel.techniques.compress.nn_factory import NNFactory, likeness, over_budget, task_loss
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_top_modules_against_brute_force() -> None:
    block = torch.tensor([0, 0, 0, 1, 1, 2])
    for seed in range(20):
        scores = draw(6, seed=seed)
        for count in range(8):
            on = top_modules(scores, block, count)
            size = min(max(count, 3), 6)
            allowed = [c for c in combinations(range(6), size) if {int(block[i]) for i in c} == {0, 1, 2}]
            best = max(allowed, key=lambda c: float(scores[list(c)].sum()))
            assert on.nonzero().flatten().tolist() == sorted(best)


def test_gates_are_hard_with_the_gradient_of_a_sigmoid() -> None:
    scores = draw(5).requires_grad_()
    on = torch.tensor([True, False, True, False, False])
    gates = straight_through(scores, on)
    assert torch.allclose(gates.detach(), on.float(), atol=1e-6)
    weight = draw(5, seed=1)
    (grad,) = torch.autograd.grad((gates * weight).sum(), scores)
    s = torch.sigmoid(scores.detach())
    assert torch.allclose(grad, weight * s * (1 - s), atol=1e-6)


def test_losses_of_a_task() -> None:
    out, targets, task = draw(4, 5), torch.tensor([1, 3, 3, 1]), torch.tensor([0.0, 1, 0, 1, 0])
    alone = F.cross_entropy(out[:, [1, 3]], torch.tensor([0, 1, 1, 0]))
    assert float(task_loss(out, targets, task)) == pytest.approx(float(alone), rel=1e-5)
    gates, costs = torch.tensor([1.0, 1, 0, 0]), torch.tensor([2.0, 1, 0.5, 0.5])
    assert float(over_budget(gates, costs, 0.5)) == pytest.approx(0.0625)  # (3 / 4 - 1 / 2)^2
    assert float(over_budget(gates, costs, 0.8)) == 0
    a, b = torch.zeros(3), torch.full((3,), 50.0)
    same, apart = torch.tensor([1.0, 1, 0]), torch.tensor([0.0, 0, 1])
    half = torch.tensor([0.0, 1, 1])
    assert float(likeness(a, b, (same, same))) == 0
    assert float(likeness(a, b, (same, apart))) == pytest.approx(0.5)
    assert float(likeness(a, b, (same, half))) == pytest.approx(0.5 * 2 / 3)


def test_held_out_sets_are_the_share_asked_for() -> None:
    sets = list(combinations(range(12), 4))
    held = [s for s in sets if is_held_out(s, 0.2)]
    assert 0.15 < len(held) / len(sets) < 0.25
    assert is_held_out(held[0][::-1], 0.2) and not any(is_held_out(s, 0.0) for s in sets)


def test_cost_predictor_finds_the_coefficients() -> None:
    block = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    sets = [draw(8, seed=s) > 0 for s in range(12)]
    true = [7 + 2.0 * float(s[:3].sum()) + 5 * float(s[3:6].sum()) + 0.5 * float(s[6:].sum()) for s in sets]
    cost = fitted_cost(sets, true, block)
    np.testing.assert_allclose((cost.constant, *cost.weights), (7, 2, 5, 0.5), atol=1e-6)
    assert cost.r2 == pytest.approx(1) and cost.of(sets[0], block) == pytest.approx(true[0], rel=1e-6)
    noisy = [t + float(n) for t, n in zip(true, 4 * draw(12, seed=99), strict=True)]
    rough = fitted_cost(sets, noisy, block)
    left = sum((n - rough.of(s, block)) ** 2 for s, n in zip(sets, noisy, strict=True))
    assert rough.r2 == pytest.approx(1 - left / (12 * np.var(noisy)), abs=1e-6) and 0 < rough.r2 < 1


@lru_cache
def subject() -> Subject:
    made = build(DigitsCnn(width=8), Context(seed=0))
    return made.with_model(fit(made.model, made.data, made.task, budget=replace(made.budget, epochs=2), seed=0))


@lru_cache
def factory() -> ModularNet:
    with torch.enable_grad():
        made = apply(NNFactory(epochs=2, parts=4, measured=16), subject(), seed=0).model
    assert isinstance(made, ModularNet)
    return made


def test_every_channel_is_in_one_module() -> None:
    structure = structure_of(subject().model, subject().data.train.inputs[:2])
    parts = parts_of(structure, 4)
    assert parts.block.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert parts.module.bincount().tolist() == [2] * 4 + [4] * 8


@torch.no_grad()
def test_slices_compute_what_gates_do_and_less() -> None:
    net, x = factory(), subject().data.test.inputs[:64]
    whole = net(x)
    for seed in range(4):
        on = top_modules(draw(12, seed=seed), net.parts.block, 5)
        with net.gated(on.float()):
            gated = net(x)
        small = net.sliced(on, (7, 2, 5))
        assert torch.allclose(small(x), gated[:, [2, 5, 7]], atol=1e-5)
        assert not torch.allclose(gated, whole, atol=1e-3)
        widths = [int(on[4 * b : 4 * b + 4].sum()) * c for b, c in enumerate((2, 4, 4))]
        macs = 9 * (64 * widths[0] + 16 * widths[0] * widths[1] + 16 * widths[1] * widths[2]) + 4 * widths[2] * 3
        assert net.macs_of(small) == macs == sum(op.macs for op in ledger_of(small, x[:1]).ops)
    assert torch.equal(net(x), whole)


def score_of(classes: tuple[int, ...]) -> nn.Module:
    valid = subject().data.valid
    rows = torch.isin(valid.targets, torch.tensor(classes))
    wanted = torch.tensor(classes)

    def score(net: nn.Module) -> float:
        return float((wanted[net(valid.inputs[rows]).argmax(1)] == valid.targets[rows]).double().mean())

    return score  # type: ignore[return-value]


def test_queries_meet_their_budget_by_counted_work() -> None:
    net = factory()
    full = net.macs_of(net.backbone)
    before = copy.deepcopy(net.state_dict())
    for share in (0.15, 0.3, 0.6):
        for classes in ((0, 1), (3, 5, 8), (2, 4, 6, 9)):
            small, on = net.query(classes, share * full, score_of(classes), samples=4, finalists=2)
            assert net.macs_of(small) <= share * full
            assert small(subject().data.test.inputs[:3]).shape == (3, len(classes)) and 3 <= int(on.sum()) <= 12
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="budget must be at least"):
        net.query((0, 1), 10, score_of((0, 1)))
    bytes_of = net.fit_cost(
        lambda m: float(sum(p.numel() for p in m.parameters())), 12, torch.Generator().manual_seed(0)
    )
    assert bytes_of.r2 > 0.8
    small, _ = net.query(
        (1, 7), 900, score_of((1, 7)), cost=bytes_of, measure=lambda m: float(sum(p.numel() for p in m.parameters()))
    )
    assert sum(p.numel() for p in small.parameters()) <= 900


def test_training_draws_tasks_that_are_not_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def note(out: Tensor, targets: Tensor, task: Tensor) -> Tensor:
        assert bool((task[targets] == 1).all())  # only rows of the task's classes
        seen.append(tuple(task.nonzero().flatten().tolist()))
        return task_loss(out, targets, task)

    monkeypatch.setattr(nn_factory, "task_loss", note)
    old = subject().model.state_dict()
    made = apply(NNFactory(epochs=2, parts=2, held=0.5, most=3, measured=2, batch_size=128), subject(), seed=1).model
    small = {t for t in seen if len(t) < 10}
    assert len(seen) == 18 and len(small) > 8 and {len(t) for t in small} <= {1, 2, 3}
    assert not any(is_held_out(t, 0.5) for t in small)
    new = made.backbone.state_dict()
    assert torch.equal(new["block1.norm.running_mean"], old["block1.norm.running_mean"])  # statistics stay
    assert not torch.equal(new["block1.conv.weight"], old["block1.conv.weight"])


def test_generator_learns_which_modules_a_task_needs() -> None:
    """Two kinds of inputs, each seen by its own hidden nodes: the generator must tell them apart."""
    from cupel.core.tasks import Classification
    from cupel.core.types import Anatomy, Examples, Splits

    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(4 * torch.eye(4))
        net[2].weight.copy_(4 * torch.eye(4))
    targets = torch.arange(4).repeat(100)
    x = F.one_hot(targets, 4) + 0.1 * draw(400, 4)
    data = Examples(x, targets, torch.arange(400))
    s = Subject(net, Splits(data, data, data), Classification(4), Anatomy(("0",), "2"), gives=frozenset())
    made = apply(NNFactory(epochs=40, parts=4, most=2, held=0.0, batch_size=50, lr=0.02, measured=2), s, seed=0).model
    assert isinstance(made, ModularNet)
    ours, other = [], []
    with torch.no_grad():
        for pair in combinations(range(4), 2):
            rows = torch.isin(targets, torch.tensor(pair))
            good = made.chosen(made.assembler(made.task(pair), 0.5), 0.5)
            for on, found in ((good, ours), (~good, other)):
                guess = torch.tensor(pair)[made.sliced(on, pair)(x[rows]).argmax(1)]
                found.append(float((guess == targets[rows]).double().mean()))
    assert sum(ours) / 6 > 0.85 and sum(ours) > sum(other) + 1.5  # six pairs: a quarter better than the modules left


@torch.no_grad()
def test_networks_travel(tmp_path: Path) -> None:
    net, x = factory(), subject().data.test.inputs[:9]
    save_network(net, tmp_path, "net", {})
    on = top_modules(draw(12), net.parts.block, 6)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), load_network(tmp_path, "net")):
        assert torch.equal(other(x), net(x))
        assert torch.equal(other.sliced(on)(x), net.sliced(on)(x)) and other.macs == net.macs
