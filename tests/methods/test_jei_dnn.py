"""`jei-dnn`: the exit rule against a slow loop, gradients of the joint loss, real skipping, counted costs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import PlanError
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.types import Anatomy, Examples, Subject
from cupel.ops.exits import (
    EarlyExit,
    cross_entropies,
    cut_at,
    exit_probabilities,
    gate_features,
    leaves,
    pooled,
    spread,
)
from cupel.techniques.compress.jei_dnn import (
    JeiDnn,
    _alternate,
    _Gates,
    _Heads,
    best_exits,
    gate_lessons,
    joint_loss,
    scaling,
)
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_exit_rule_against_a_slow_loop() -> None:
    g = draw(500, 4) ** 2
    chance, reached = exit_probabilities(g), torch.zeros(500, dtype=torch.float64)
    rule = []
    for k in range(4):
        rule.append(leaves(g[:, k], reached))
        reached = reached + g[:, k]
    for i, row in enumerate(g.tolist()):
        stay, slow, first = 1.0, [], None
        for k, gate in enumerate(row):
            p = max(0.0, min(gate, 1 - sum(row[:k])))
            if first is None and p / stay >= 0.5:
                first = k
            slow.append(p)
            stay *= 1 - p / stay if stay > 0 else 0.0  # prod of (1 - conditional probabilities)
        slow.append(1 - sum(slow))
        np.testing.assert_allclose(chance[i], slow, atol=1e-9)
        ours = next((k for k in range(4) if bool(rule[k][i])), None)
        assert ours == first
    assert any(bool(rule[1][i]) and not bool(rule[0][i]) and g[i, 1] < 0.5 for i in range(500))  # earlier than g >= 1/2


def test_gate_features_of_known_predictions() -> None:
    logits = torch.tensor([[0.0, 0, 0, 0], [50, 0, 0, 0], [np.log(0.6), np.log(0.3), np.log(0.1), -50]])
    p2 = np.array([0.36, 0.09, 0.01]) / 0.46
    expected = [
        [0.25, np.log(4), 0, np.log(4)],
        [1, 0, 1, 0],
        [0.6, -sum(p * np.log(p) for p in (0.6, 0.3, 0.1)), 0.3, -(p2 * np.log(p2)).sum()],
    ]
    np.testing.assert_allclose(gate_features(logits), expected, atol=1e-5)


def test_joint_loss_trains_a_head_on_what_leaves_there() -> None:
    ce = draw(6, 3).requires_grad_()
    p = exit_probabilities(draw(6, 2, seed=1) / 2)
    loss = joint_loss(ce, p)
    (grad,) = torch.autograd.grad(loss, ce)
    held = ce.detach()
    weight = p * (held.sum(1) / (p * held).sum(1))[:, None]
    over = (weight > 3).any(1)
    assert over.any() and not over.all()
    assert float((grad * held).sum()) == pytest.approx(float(loss.detach()))
    assert torch.allclose((grad * held).sum(1)[~over] * 6, held.sum(1)[~over])  # the value is the plain sum ...
    assert torch.allclose(grad, weight.clamp(max=3) / 6)  # ... but the gradient follows the gates, up to a bound
    logits, targets = draw(5, 3, 4), torch.tensor([0, 1, 2, 3, 0])
    slow = torch.stack([nn.functional.cross_entropy(logits[:, k], targets, reduction="none") for k in range(3)], 1)
    assert torch.allclose(cross_entropies(logits, targets), slow)


def test_gate_lessons_are_cumulative_and_weighted() -> None:
    ce = torch.tensor([[0.3, 0.1, 0.0], [0.1, 0.1, 0.0], [3.0, 2.0, 0.0], [0.3, 0.0, 0.1]])
    costs = torch.tensor([0.1, 0.5, 1.0])
    assert best_exits(ce, costs, 0.0).tolist() == [2, 2, 2, 1]
    assert best_exits(ce, costs, 0.4).tolist() == [1, 0, 2, 1]
    assert best_exits(ce, costs, 100.0).tolist() == [0, 0, 0, 0]
    s = subject()
    logits = torch.zeros(len(s.data.valid), 3, 10)  # equal losses: the cheapest exit is best for all
    lessons, weight = gate_lessons(logits, s.data.valid, costs, JeiDnn(balance=1.0))
    assert lessons.inputs.shape == (96, 2, 4) and bool((lessons.targets == 1).all()) and weight.tolist() == [0, 0]
    logits[:, 2] = 20 * nn.functional.one_hot(s.data.valid.targets, 10)  # now the last is best for all
    lessons, weight = gate_lessons(logits, s.data.valid, costs, JeiDnn(balance=1.0))
    assert bool((lessons.targets == 0).all()) and weight.tolist() == [5, 5]
    assert gate_lessons(logits, s.data.valid, costs, JeiDnn(balance=0.0))[1].tolist() == [1, 1]


def test_few_exits_are_spread_over_many_blocks() -> None:
    names = [str(k) for k in range(9)]
    assert spread(names, 2) == ("2", "5") and spread(names, 1) == ("3",)  # thirds; the half of nine is four blocks
    assert spread(names, 0) == spread(names, 8) == spread(names, 100) == tuple(names[:8])
    for count in range(2, 20):
        for most in range(1, count):
            found = [int(n) for n in spread([str(k) for k in range(count)], most)]
            assert len(found) == min(most, count - 1) and found == sorted(set(found)) and found[-1] < count - 1
    made = apply(JeiDnn(exits=1, warmup=1, rounds=1, every=4), subject()).model
    assert isinstance(made, EarlyExit) and len(made.names) == len(made.heads) == len(made.gates) == 1


def test_logits_are_not_scaled() -> None:
    z = 3 * draw(50, 6) + 2
    shift, scale = scaling(z, 2)
    normal = (z - shift) / scale
    assert torch.allclose(normal[:, :4].mean(0), torch.zeros(4).double(), atol=1e-9)
    assert torch.allclose(normal[:, :4].std(0), torch.ones(4).double())
    assert torch.equal(normal[:, 4:], z[:, 4:])


def test_pooled_layouts() -> None:
    maps = draw(2, 3, 4, 4)
    assert torch.allclose(pooled(maps, 1, False), maps.mean((2, 3)))
    assert torch.allclose(
        pooled(maps, 2, False)[0, :4], maps[0, 0].unflatten(0, (2, 2)).mean(1).view(2, 2, 2).mean(2).flatten()
    )
    line = draw(2, 5, 6)
    assert torch.allclose(pooled(line, 1, False), line.mean(2)) and torch.allclose(pooled(line, 9, True), line.mean(1))
    assert pooled(draw(2, 5), 2, False).shape == (2, 5)


@lru_cache
def subject() -> Subject:
    made = build(DigitsCnn(width=4), Context(seed=0))
    with torch.enable_grad():  # whichever test asks first
        model = fit(made.model, made.data, made.task, budget=replace(made.budget, epochs=3), seed=0)
    few = {part: getattr(made.data, part).take(torch.arange(96)) for part in ("valid", "test")}
    return made.with_model(model.requires_grad_(True)).with_data(replace(made.data, **few))


def wired(bias: tuple[float, float], slope: float = 0.0) -> EarlyExit:
    """Exits with random heads, and gates that look at the largest probability alone."""
    net = EarlyExit(subject().model, ("block1", "block2"), 2, False)
    torch.manual_seed(0)
    net.heads.extend([nn.Linear(16, 10), nn.Linear(32, 10)])
    for b in bias:
        gate = nn.Linear(4, 1)
        nn.init.zeros_(gate.weight)
        nn.init.constant_(gate.weight[0, :1], slope)
        nn.init.constant_(gate.bias, b)
        net.gates.append(gate)
    return net.eval()


@torch.no_grad()
def test_rows_leave_where_they_should_and_cost_nothing_after() -> None:
    x, model = subject().data.test.inputs, subject().model.eval()
    block1 = model.block1(x)
    features = [pooled(block1, 2, False), pooled(model.block2(block1), 2, False)]
    confidence = wired((0, 0)).heads[0](features[0]).softmax(1).amax(1)
    middle = float(confidence.median())
    net = wired((-middle * 300, -1000), 300.0)  # the more confident half leaves at the first exit, nobody at the second
    net.gates[1].weight.zero_()
    sizes: list[int] = []
    handle = model.block3.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    out, taken = net.exits(x)
    handle.remove()
    early = confidence >= middle
    assert taken.tolist() == [0 if e else 2 for e in early.tolist()]
    assert sizes == [int((~early).sum())] and 30 < sizes[0] < 66
    assert torch.allclose(out[early], net.heads[0](features[0])[early], atol=1e-5)
    assert torch.allclose(out[~early], model(x)[~early], atol=1e-5)
    alone = [net.exits(row[None]) for row in x]
    assert torch.allclose(torch.cat([o for o, _ in alone]), out, atol=1e-5)
    assert torch.equal(torch.cat([t for _, t in alone]), taken)


@torch.no_grad()
def test_all_or_none_may_leave() -> None:
    x, model = subject().data.test.inputs, subject().model.eval()
    ran: list[int] = []
    handle = model.block2.register_forward_hook(lambda m, args, out: ran.append(1))
    net = wired((50.0, 50.0))
    assert net.exits(x)[1].tolist() == [0] * 96 and not ran
    handle.remove()
    out, taken = wired((-50.0, -50.0)).exits(x)
    assert torch.equal(out, model(x)) and taken.tolist() == [2] * 96
    # Two gates just below one half: the second leaves, since half of the chance is used up.
    assert wired((-0.1, -0.1)).exits(x)[1].tolist() == [1] * 96


def test_hooks_leave_after_an_error() -> None:
    def fail(number: int, out: Tensor) -> None:
        raise ZeroDivisionError

    model = subject().model
    with pytest.raises(ZeroDivisionError), cut_at(model, ("block1", "block2"), fail):
        model(subject().data.test.inputs)
    assert not any(m._forward_hooks for m in model.modules())


@lru_cache
def exiting(**changes: object) -> EarlyExit:
    made = apply(JeiDnn(**{"warmup": 6, "rounds": 2, "every": 34} | changes), subject()).model
    assert isinstance(made, EarlyExit)
    return made


def test_costs_are_counted() -> None:
    block1, block2, block3, head = 64 * 9 * 4, 16 * 9 * 4 * 8, 16 * 9 * 8 * 8, 32 * 10
    total, gate = block1 + block2 + block3 + head, 4
    first, second = 16 * 10 + gate, 32 * 10 + gate
    expected = [block1 + first, block1 + block2 + first + second, total + first + second]
    net = exiting()
    np.testing.assert_allclose(net.costs, np.array(expected) / total, rtol=1e-6)
    assert net.mean_cost(torch.tensor([0, 2])) == pytest.approx((expected[0] + expected[2]) / 2 / total)


def test_trained_exits_know_the_digits_and_cost_falls_with_its_price() -> None:
    test = subject().data.test
    found = []
    for weight in (0.0, 0.3, 5.0):
        net = exiting(cost_weight=weight)
        with torch.no_grad():
            out, taken = net.exits(test.inputs)
            heads = [h(f) for h, f in zip(net.heads, net.tapped(test.inputs), strict=False)]
        for logits in heads:  # also shows that the scaling is folded in rightly
            assert float((logits.argmax(1) == test.targets).double().mean()) > 0.7
        assert float((out.argmax(1) == test.targets).double().mean()) > 0.7
        found.append(net.mean_cost(taken))
    # Where gates send the examples decides what the heads learn.
    assert not torch.equal(exiting(cost_weight=0.0).heads[1].weight, exiting(cost_weight=5.0).heads[1].weight)
    assert found[0] > found[1] > found[2] == pytest.approx(float(net.costs[0]))


def test_backbone_stays_and_no_round_is_the_network_itself() -> None:
    state = subject().model.state_dict()
    for made in (exiting().backbone, apply(JeiDnn(rounds=0), subject()).model):
        assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items())
    assert not exiting().training and all(p.requires_grad for p in exiting().parameters())


def test_gates_learn_from_the_validation_split() -> None:
    s = subject()
    wrong = s.data.valid.having(targets=(s.data.valid.targets + 1) % 10)
    other = apply(JeiDnn(warmup=6, rounds=2, every=34), s.with_data(replace(s.data, valid=wrong))).model
    assert not torch.equal(other.gates[0].weight, exiting().gates[0].weight)
    silent = s.data.train.having(targets=(s.data.train.targets + 1) % 10)
    swapped = apply(JeiDnn(warmup=6, rounds=2, every=34), s.with_data(replace(s.data, train=silent))).model
    heads = swapped.heads[0](swapped.tapped(s.data.test.inputs)[0]).argmax(1)
    assert float((heads == (s.data.test.targets + 1) % 10).double().mean()) > 0.7  # heads from the training split


class Bypass(nn.Module):
    """The second block sees the first block's input again: rows cannot be left out between them."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(self.block2(self.block1(x) + x))


class Mixing(nn.Module):
    """A block that subtracts the batch mean: rows are not alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_unfit_networks_are_refused() -> None:
    s = subject()
    with pytest.raises(PlanError, match="two or more blocks"):
        apply(JeiDnn(), replace(s, anatomy=Anatomy(blocks=("block1",))))
    with pytest.raises(PlanError, match="one after the other"):
        apply(JeiDnn(), replace(s.with_model(Bypass()), anatomy=Anatomy(blocks=("block1", "block2"))))
    parts = OrderedDict(flat=nn.Flatten(), block1=nn.Linear(64, 32), mix=Mixing(), block2=nn.Linear(32, 10))
    with pytest.raises(PlanError, match="one after the other"):
        apply(JeiDnn(), replace(s.with_model(nn.Sequential(parts)), anatomy=Anatomy(blocks=("block1", "block2"))))


def features_of_nine_exits(count: int, seed: int) -> Examples:
    """Features that tell the class a little better at every exit, with a large part in common, then weak logits."""
    means, mix = torch.randn(10, 16, generator=seeded(9)), torch.randn(16, 64, generator=seeded(8)) / 4
    draws, y = seeded(seed), torch.arange(count) % 10
    parts = []
    for k in range(8):
        told = (means[y] * (0.5 + 0.1 * k) + torch.randn(count, 16, generator=draws)) @ mix
        parts.append(told + 2 * torch.randn(count, 1, generator=draws))
    logits = 2.5 * nn.functional.one_hot(y, 10) + torch.randn(count, 10, generator=draws)
    return Examples(torch.cat([*parts, logits], 1), y, torch.arange(count))


def test_heads_of_nine_exits_do_not_diverge() -> None:
    sizes, costs = [64] * 8 + [10], torch.linspace(0.1, 1, 9)
    seen, held = features_of_nine_exits(1500, 0), features_of_nine_exits(400, 1)
    with Context().scope("init"):
        heads, gates = _Heads(sizes), _Gates(8)
    _alternate(JeiDnn(cost_weight=0.05, warmup=4, rounds=3, every=120), heads, gates, seen, held, costs, Context())
    with torch.no_grad():
        losses = cross_entropies(heads(held.inputs), held.targets).mean(0)
    assert float(losses.max()) < 5  # without the bound on weights, tens of thousands
