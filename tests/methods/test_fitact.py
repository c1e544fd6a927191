"""fitact: the formula against NumPy, bounds that are true maxima, nothing else trained, and a flipped bit stopped."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from dataclasses import replace
from typing import Any

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
from cupel.core.types import Examples, Splits, Subject
from cupel.ops.bit_flips import flipped, from_fixed, to_fixed
from cupel.ops.bounded import Bounded, activations, bounded_copy, bounds_of, clamped, faded, largest, maxima, zeroed
from cupel.techniques.compress.fitact import FitAct, accuracy, mean_square
from cupel.workloads.vision.digits_cnn import DigitsCnn
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)


def bench(net: nn.Module, x: Tensor, y: Tensor | None = None, classes: int = 2) -> Subject:
    data = Examples(x, torch.zeros(len(x), dtype=torch.long) if y is None else y, torch.arange(len(x)))
    return Subject(net.eval(), Splits(data, data, data), Classification(classes))


@pytest.fixture(scope="module")
def digits() -> Subject:
    """Convolutions and batch norm, briefly trained."""
    subject = build(DigitsCnn(width=4, examples=256), Context())
    return subject.with_model(fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=2)))


@pytest.fixture(scope="module")
def dense() -> Subject:
    """A network that knows its digits."""
    subject = build(DigitsMlp(hidden=(32, 32)), Context())
    return subject.with_model(fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=10)))


def test_the_formula() -> None:
    x = np.linspace(-3, 8, 2001)
    bound, k = 2.5, 20.0
    slow = np.maximum(0, x - x / (1 + np.exp(-k * (x - bound))))
    found = faded(torch.from_numpy(x).relu(), torch.tensor(bound).double(), k).numpy()
    np.testing.assert_allclose(found, slow, atol=1e-12)
    assert found[x < 0].max() == 0 and np.abs(found - x)[(x > 0) & (x < 1.5)].max() < 1e-8
    assert found[x > 4].max() < 1e-10
    single = torch.tensor([3e4, 3e38, torch.inf, torch.nan])
    assert faded(single, torch.tensor(2.5), k).tolist() == [0, 0, 0, 0]
    z, b = torch.rand(50).double() * 4, torch.full((50,), 2.0).double().requires_grad_()
    (grad,) = torch.autograd.grad(faded(z, b, k).sum(), b)
    g = torch.sigmoid(k * (2.0 - z))
    assert torch.allclose(grad, k * z * g * (1 - g))


def test_the_rivals() -> None:
    z, b = torch.tensor([0.0, 1.0, 2.0, 2.1, torch.inf]), torch.tensor(2.0)
    assert zeroed(z, b).tolist() == [0, 1, 2, 0, 0] and clamped(z, b).tolist() == [0, 1, 2, 2, 2]
    for beyond, rule in (("zero", zeroed), ("clamp", clamped)):
        assert torch.equal(Bounded(nn.ReLU(), [b], "layer", beyond)(z), rule(z, b))


class Twice(nn.Module):
    """One activation module called with two shapes, of which one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 2)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        h = self.act(self.first(-x)) + h
        return self.head(self.act(self.second(h)))


def test_bounds_are_the_maxima_over_the_training_data(digits: Subject) -> None:
    x, model = digits.data.train.inputs, digits.model
    with torch.no_grad():
        one = model.block1(x)
        two = model.block2(one)
    for per, wanted in (
        ("neuron", (one.amax(0), two.amax(0))),
        ("channel", tuple(z.amax((0, 2, 3))[:, None, None] for z in (one, two))),
        ("layer", (one.max(), two.max())),
    ):
        made = apply(FitAct(epochs=0, per=per), digits).model
        for block, top in zip((made.block1, made.block2), wanted, strict=True):
            assert [b.shape for b in block.relu.bounds] == [top.shape]
            assert torch.allclose(block.relu.bounds[0], top)
    assert torch.equal(largest(-torch.ones(3, 2), "channel"), -torch.ones(2))


def test_one_module_with_several_shapes() -> None:
    torch.manual_seed(0)
    net, x = Twice(), torch.randn(40, 6)
    made = apply(FitAct(epochs=0), bench(net, x)).model
    five, three = made.act.bounds
    with torch.no_grad():
        both = torch.stack([F.silu(net.first(x)), F.silu(net.first(-x))])
        last = F.silu(net.second(both.sum(0)))
    assert torch.allclose(five, both.amax((0, 1))) and torch.allclose(three, last.amax(0))
    inner = activations(net)
    parts = maxima(net, inner, x.split(7), "neuron")["act"]
    assert all(torch.allclose(a, b) for a, b in zip(parts, (five, three), strict=True))
    with pytest.raises(PlanError, match=r"\(5,\) or \(3,\); got \(4,\)"):
        made.act(torch.zeros(2, 4))
    assert not any(len(m._forward_pre_hooks) for m in net.modules())


def test_only_the_bounds_learn(digits: Subject) -> None:
    model = copy.deepcopy(digits.model)
    model.head.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    ctx = Context(train=digits.data.view(), task=digits.task)
    made = FitAct(epochs=2, lr=0.05, tolerance=1.0).seal(model, ctx)
    start = FitAct(epochs=0).seal(model, ctx)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the network handed in
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items() if "bounds" not in k)
    assert set(made.state_dict()) - set(before) == {f"block{k}.relu.bounds.0" for k in (1, 2, 3)}
    assert all(not torch.equal(a, b) for a, b in zip(bounds_of(made), bounds_of(start), strict=True))
    assert not made.head.bias.requires_grad and made.head.weight.requires_grad
    assert all(b.requires_grad and b.grad is None for b in bounds_of(made)) and not made.training
    assert all(p.grad is None for p in made.parameters())


def silent() -> Subject:
    """A network whose logits do not depend on its activations, so that only the price of bounds moves them."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.init.zeros_(net[2].weight)
    nn.init.ones_(net[0].bias)
    return bench(net, torch.rand(40, 4))


def test_the_price_of_bounds_in_closed_form() -> None:
    assert float(mean_square([torch.tensor([1.0, 2.0]), torch.tensor(4.0)])) == 7.0  # over neurons, not over layers
    base = silent()
    start = [b.detach() for b in bounds_of(apply(FitAct(epochs=0), base).model)]
    # 40 examples are one batch, so an epoch is one step; Adam moves by lr against a gradient of one sign.
    one = apply(FitAct(epochs=1, lr=0.01, weight=1.0), base).model
    assert torch.allclose(start[0] - 0.01, next(bounds_of(one)), atol=1e-5)
    free = apply(FitAct(epochs=1, lr=0.01, weight=0.0), base).model
    assert torch.equal(start[0], next(bounds_of(free)).detach())
    value = torch.tensor(start[0].tolist(), requires_grad=True)
    rule = torch.optim.Adam([value], 0.01)
    for _ in range(6):  # state goes on from epoch to epoch
        rule.zero_grad()
        (2.0 * value.square().mean()).backward()
        rule.step()
    six = apply(FitAct(epochs=6, lr=0.01, weight=2.0), base).model
    assert torch.allclose(value, next(bounds_of(six)), atol=1e-6)


def test_the_loss_of_the_task_moves_bounds_too(dense: Subject) -> None:
    task, data = dense.task, dense.data.train
    loose = FitAct(slope=1.0, epochs=10, lr=0.05, weight=0.0, tolerance=1.0)
    made, start = apply(loose, dense), apply(replace(loose, epochs=0), dense)
    losses = [float(task.loss(s.outputs("train"), data.whole())) for s in (start, made)]
    assert losses[1] < 0.95 * losses[0]


def logged(method: FitAct, subject: Subject) -> tuple[nn.Module, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    ctx = Context(train=subject.data.view(), task=subject.task, report=lambda entry: told.append(dict(entry)))
    return method.seal(subject.model, ctx), told


def test_training_ends_when_accuracy_falls_and_the_last_good_bounds_stay(dense: Subject) -> None:
    valid = dense.data.valid
    plain = accuracy(dense.model, valid, dense.task)
    hasty = FitAct(epochs=30, lr=0.01, weight=50.0, tolerance=0.1)
    made, told = logged(hasty, dense)
    curve = [t["accuracy"] for t in told if t["kind"] == "fitact"]
    assert len(curve) < 30 and curve[-1] < plain - 0.1 and min(curve[:-1]) >= plain - 0.1 - 1e-9
    assert accuracy(made, valid, dense.task) == curve[-2] >= plain - 0.1
    assert not any("no bounds keep" in str(t.get("text")) for t in told)
    far, told = logged(replace(hasty, epochs=len(curve), tolerance=1.0), dense)
    assert accuracy(far, valid, dense.task) == curve[-1]
    assert sum(t["kind"] == "fitact" for t in told) == len(curve)


def test_a_bad_start_is_trained_on_and_told(dense: Subject) -> None:
    # With so gentle a slope every value is about halved: the maxima themselves are too tight.
    gentle = FitAct(slope=0.02, epochs=3, tolerance=0.0, weight=0.0, lr=0.02)
    start = accuracy(logged(replace(gentle, epochs=0), dense)[0], dense.data.valid, dense.task)
    assert start < accuracy(dense.model, dense.data.valid, dense.task)
    made, told = logged(gentle, dense)
    curve = [t["accuracy"] for t in told if t["kind"] == "fitact"]
    assert len(curve) == 3  # no end before the first good ones
    assert accuracy(made, dense.data.valid, dense.task) == max(start, *curve)
    assert any("no bounds keep the accuracy within 0" in str(t.get("text")) for t in told)
    rough = replace(gentle, slope=0.3, lr=5.0, weight=50.0)  # training makes it worse still: the start stays
    start = accuracy(logged(replace(rough, epochs=0), dense)[0], dense.data.valid, dense.task)
    worse, told = logged(rough, dense)
    curve = [t["accuracy"] for t in told if t["kind"] == "fitact"]
    assert len(curve) == 3 and max(curve) < start == accuracy(worse, dense.data.valid, dense.task)


def test_a_flipped_bit_is_stopped(dense: Subject) -> None:
    nets = {"relu": dense.model, "fitact": apply(FitAct(), dense).model}
    weight = dense.model.block1.linear.weight.detach()
    pixel = int(dense.data.train.inputs.flatten(1).mean(0).argmax())  # one that is nearly always lit
    rows = (weight[:, pixel] > 0).nonzero().flatten()[:5]
    wrong = from_fixed(flipped(to_fixed(weight), 32 * (64 * rows + pixel) + 30))
    assert int((wrong > 1000).sum()) == 5  # the highest bit below the sign
    right = {}
    for name, net in nets.items():
        hit = copy.deepcopy(net)
        with torch.no_grad():
            hit.block1.linear.weight.copy_(wrong)
        right[name] = accuracy(hit, dense.data.test, dense.task)
        right[f"{name}_clean"] = accuracy(net, dense.data.test, dense.task)
    assert abs(right["relu_clean"] - right["fitact_clean"]) <= 0.03
    assert right["relu"] < 0.4 < right["fitact"]


def test_every_kind_is_bounded_wherever_it_stands() -> None:
    torch.manual_seed(2)
    shared = nn.ReLU()
    parts = OrderedDict(a=nn.Linear(3, 4), b=shared, c=nn.Linear(4, 4), d=shared, e=nn.GELU(), f=nn.ReLU6())
    net, x = nn.Sequential(parts), torch.randn(30, 3)
    made = bounded_copy(net, maxima(net, activations(net), [x], "neuron"), "neuron", "clamp")
    assert made.b is made.d and [type(m) for m in (made.b, made.e, made.f)] == [Bounded] * 3
    assert torch.equal(made(x), net(x)) and not torch.equal(made(9 * x), net(9 * x))
    alone = nn.ReLU()
    assert torch.equal(bounded_copy(alone, maxima(alone, {"": alone}, [x], "layer"), "layer", "clamp")(x), alone(x))
    assert torch.equal(pickle.loads(pickle.dumps(made))(9 * x), made(9 * x))
    assert made.b(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16  # as under autocast


def test_refusals_say_what_to_do() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    x = torch.rand(8, 4)
    for net in (Functional(), nn.Linear(4, 2)):
        with pytest.raises(PlanError, match=r"must call a ReLU.*F\.relu cannot be replaced"):
            apply(FitAct(), bench(net, x))
    with pytest.raises(PlanError, match="must have training and validation data"):
        FitAct().seal(nn.ReLU(), Context())
    with pytest.raises(PlanError, match="calls none without a bound"):
        apply(FitAct(), apply(FitAct(epochs=0), silent()))
