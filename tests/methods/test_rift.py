"""rift against closed forms of the ascent, a network with a module that cannot matter, and its own rules of choice."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context, seeded
from cupel.core.errors import PlanError
from cupel.core.fit import fit
from cupel.core.protocols import Hook, Moment
from cupel.core.shelf import CRITICALITY
from cupel.core.slots import phase
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Bounds, Budget, Examples, Splits, Subject
from cupel.ops.weight_ascent import mean_loss, movable, worst_weight
from cupel.techniques.robust import rift
from cupel.techniques.robust.rift import RIFT, best_on_line, between
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
TINY = RIFT(eps=0.05, steps=3, passes=2, epochs=2, points=4, restarts=1)


class Product:
    """A task whose loss is linear in the outputs: -<out, target>."""

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        return -(out * batch.targets).sum(1)

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        return self.losses(out, batch).mean()

    def predict(self, out: Tensor) -> Tensor:
        return out

    def scores(self, out: Tensor) -> Tensor:
        return out


def rows(count: int, width: int, out: int, name: str) -> Batch:
    draw = seeded(0, name)
    x, t = torch.randn(count, width, generator=draw), torch.randn(count, out, generator=draw)
    return Batch(x, t, torch.arange(count))


def small(seed: int = 0) -> Subject:
    return build(DigitsCnn(width=4, examples=96), Context(seed=seed))


def trained(subject: Subject, epochs: int = 2) -> Subject:
    budget = replace(subject.budget, epochs=epochs, batch_size=32)
    return subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget))


@pytest.mark.parametrize("lr", [1.0, 100.0])
def test_worst_weight_of_a_linear_loss_lies_on_the_gradient(lr: float) -> None:
    net = nn.Linear(5, 3, bias=False)
    net.weight.data = torch.randn(3, 5, generator=seeded(0, "w"))
    batch = rows(20, 5, 3, "linear")
    slope = -(batch.targets.T @ batch.inputs) / 20
    found = worst_weight(net, "weight", [batch], Product(), share=0.1, lr=lr, passes=10)
    radius = 0.1 * net.weight.detach().norm()
    assert found.rise == pytest.approx(float(radius * slope.norm()), rel=1e-4)
    assert torch.allclose(found.weight - net.weight.detach(), radius * slope / slope.norm(), atol=1e-5)
    assert found.reach == pytest.approx(1.0, rel=1e-5)


def test_small_steps_stop_inside_the_ball() -> None:
    net = nn.Linear(5, 3, bias=False)
    net.weight.data = torch.ones(3, 5)
    batch = rows(20, 5, 3, "linear")
    slope = -(batch.targets.T @ batch.inputs) / 20
    found = worst_weight(net, "weight", [batch], Product(), share=0.1, lr=0.01, passes=3)
    assert torch.allclose(found.weight, 1 + 0.03 * slope, atol=1e-6)
    assert found.reach == pytest.approx(float(0.03 * slope.norm() / (0.1 * 15**0.5)), rel=1e-4)


def test_loss_is_the_mean_over_examples_and_each_step_sees_one_batch() -> None:
    net = nn.Linear(4, 2, bias=False)
    net.weight.data = torch.ones(2, 4)
    parts = [rows(7, 4, 2, "a"), rows(3, 4, 2, "b")]
    found = worst_weight(net, "weight", parts, Product(), share=10.0, lr=0.5, passes=2)
    slopes = [-(b.targets.T @ b.inputs) / len(b) for b in parts]
    assert torch.allclose(found.weight, 1 + 0.5 * 2 * (slopes[0] + slopes[1]), atol=1e-5)
    whole = torch.cat([Product().losses(net(b.inputs), b) for b in parts]).detach().mean()
    assert found.base == pytest.approx(float(whole), rel=1e-5)


def test_two_batches_take_turns_and_the_ball_binds_after_every_step() -> None:
    net = nn.Linear(4, 2, bias=False)
    net.weight.data = torch.ones(2, 4)
    parts = [rows(7, 4, 2, "a"), rows(3, 4, 2, "b")]
    slopes = [-(b.targets.T @ b.inputs) / len(b) for b in parts]
    whole = 0.7 * slopes[0] + 0.3 * slopes[1]
    radius, step, best, rise = 0.1 * 8**0.5, torch.zeros(2, 4), torch.zeros(2, 4), 0.0
    for _ in range(3):
        for slope in slopes:
            step = step + 0.1 * slope
            step = step * min(1.0, radius / float(step.norm()))
        if float((whole * step).sum()) > rise:
            best, rise = step.clone(), float((whole * step).sum())
    found = worst_weight(net, "weight", parts, Product(), share=0.1, lr=0.1, passes=3)
    assert torch.allclose(found.weight, 1 + best, atol=1e-5) and found.rise == pytest.approx(rise, rel=1e-4)


def test_ascent_beats_random_directions_and_touches_nothing() -> None:
    subject = trained(small())
    model, batch = subject.model, subject.data.valid.whole()
    before = copy.deepcopy(model.state_dict())
    model.train()
    for name in movable(model):
        found = worst_weight(model, name, [batch], subject.task, 0.1)
        weight, draw = dict(model.named_parameters())[name].detach(), seeded(0, name)
        assert float((found.weight - weight).norm()) <= 0.1001 * float(weight.norm())
        model.eval()
        for _ in range(30):
            step = torch.randn(weight.shape, generator=draw)
            tried = weight + 0.1 * float(weight.norm()) * step / step.norm()
            assert mean_loss(model, name, tried, [batch], subject.task) < found.worst
        model.train()
    assert model.training and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Idle(nn.Module):
    """Two linear layers in a row and, beside them, one whose outputs count for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.relu(self.first(x)) + 0.0 * self.idle(x))
        return out


def stripes(valid_flipped: bool = False, test_flipped: bool = False) -> Subject:
    draw = seeded(0, "stripes")
    x = torch.rand(240, 6, generator=draw)
    y = (x[:, :3].sum(1) > x[:, 3:].sum(1)).long()
    parts = [
        Examples(x[r], y[r], torch.arange(r.start, r.stop)) for r in (slice(0, 120), slice(120, 180), slice(180, 240))
    ]
    if test_flipped:
        parts[2] = parts[2].having(targets=1 - parts[2].targets)
    with Context().scope("net"):
        net = Idle()
    subject = Subject(net, Splits(*parts), Classification(2), bounds=Bounds())
    fit(net, subject.data, subject.task, budget=Budget(epochs=5, batch_size=30, lr=1e-2))
    return subject


def test_the_module_that_cannot_matter_is_found_and_alone_changes() -> None:
    subject = stripes()
    done = apply(replace(TINY, weight_decay=0.1, lr=0.1, spare=1.0), subject)
    assert done.shelf is not None
    rises = done.shelf.get(CRITICALITY)
    assert list(rises) == ["first.weight", "idle.weight", "last.weight"]
    assert rises["idle.weight"] == 0 and min(rises["first.weight"], rises["last.weight"]) > 0
    for name, value in done.model.state_dict().items():
        assert name == "idle.weight" or torch.equal(value, subject.model.state_dict()[name])


def test_test_data_decide_nothing() -> None:
    a, b = (
        apply(replace(TINY, module="last", lr=0.1), stripes()),
        apply(replace(TINY, module="last", lr=0.1), stripes(test_flipped=True)),
    )
    assert all(torch.equal(v, b.model.state_dict()[n]) for n, v in a.model.state_dict().items())


def test_a_named_module_alone_learns_and_flags_come_back() -> None:
    subject = trained(small())
    model = copy.deepcopy(subject.model)
    model.block1.conv.weight.requires_grad_(False)
    after = rift.tuned(replace(TINY, lr=0.01), model, "head.weight", subject, Context())
    before = subject.model.state_dict()
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    buffers = {n for n, _ in subject.model.named_buffers()}
    assert "head.weight" in moved and moved - {"head.weight"} <= buffers and len(moved) > 1
    assert not model.block1.conv.weight.requires_grad and model.head.bias.requires_grad


def test_interpolation_runs_through_every_entry() -> None:
    a = {"w": torch.tensor([1.0, 2.0]), "running_mean": torch.tensor([0.0]), "count": torch.tensor(3)}
    b = {"w": torch.tensor([3.0, 0.0]), "running_mean": torch.tensor([8.0]), "count": torch.tensor(9)}
    assert between(a, b, 0.0)["w"] is a["w"] and between(a, b, 1.0)["w"] is b["w"]
    middle = between(a, b, 0.25)
    assert middle["w"].tolist() == [1.5, 1.5] and float(middle["running_mean"]) == 2.0 and int(middle["count"]) == 3
    assert int(between(a, b, 0.75)["count"]) == 9


def test_the_network_kept_is_a_point_of_the_line_and_no_less_robust() -> None:
    subject = trained(small(), 4)
    log: list[dict[str, object]] = []
    model = copy.deepcopy(subject.model)
    ctx = Context(shelf=copy.copy(subject.shelf), report=lambda row: log.append(dict(row)))  # type: ignore[arg-type]
    p = replace(TINY, module="block3.conv", lr=0.05)
    kept = p.procedure(subject.with_model(model), ctx)
    row = next(r for r in log if r["kind"] == "rift")
    line, share = row["line"], row["share"]
    chosen = line[round(share * 4)]  # type: ignore[index, operator]
    assert chosen[1] >= line[0][1] - p.spare - 1e-9 and chosen[0] >= line[0][0]  # type: ignore[index]
    again = copy.deepcopy(subject.model)
    end = rift.tuned(p, again, "block3.conv.weight", subject, Context())
    want = between(subject.model.state_dict(), end, share)  # type: ignore[arg-type]
    assert all(torch.equal(v, want[n]) for n, v in kept.state_dict().items())
    assert len(line) == 5  # type: ignore[arg-type]


def test_choice_on_the_line() -> None:
    line = [(0.90, 0.60), (0.92, 0.60), (0.92, 0.61), (0.94, 0.5985), (0.99, 0.2)]
    assert best_on_line(line, 0.001) == 1  # of equals the nearest
    assert best_on_line(line, 0.002) == 3
    assert best_on_line(line, 1.0) == 4
    assert best_on_line([(0.9, 0.6), (0.8, 0.7)], 0.001) == 0


@dataclass(frozen=True)
class Watch:
    """Records validation accuracy after every epoch and the rate of every update."""

    right: list[int]
    rates: list[float]

    def hook(self, ctx: Context) -> Hook:
        return _Watching(self, ctx)


class _Watching(Hook):
    def __init__(self, watch: Watch, ctx: Context) -> None:
        assert ctx.train is not None
        self.watch, self.valid = watch, ctx.train.valid.whole()

    def epoch(self, at: Moment) -> None:
        with at.evaluating(), torch.no_grad():
            self.watch.right.append(int((at.output_of(self.valid).argmax(1) == self.valid.targets).sum()))

    @phase("clip")
    def grads(self, grads: dict[str, Tensor], at: Moment) -> dict[str, Tensor]:
        self.watch.rates.append(at.lr)
        return grads


@dataclass(frozen=True)
class Spoil:
    """Empties the last layer in the last epoch."""

    def hook(self, ctx: Context) -> Hook:
        return _Spoiling()


class _Spoiling(Hook):
    @phase("mask")
    def stepped(self, at: Moment) -> None:
        if at.epoch == at.epochs - 1:
            at.model.head.weight.zero_()


def test_the_best_epoch_is_kept_and_the_rate_falls_in_the_second_half() -> None:
    subject, watch = small(), Watch([], [])
    budget = Budget(epochs=6, batch_size=32, optimizer="sgd", lr=0.2, momentum=0.9)
    fit(subject.model, subject.data, subject.task, techniques=[rift._Tuning(), watch, Spoil()], budget=budget)
    right = int((subject.outputs("valid").argmax(1) == subject.data.valid.targets).sum())
    assert right == max(watch.right[1:]) > 20 and bool(subject.model.head.weight.any())
    assert watch.rates == pytest.approx([0.2] * 9 + [0.02] * 9)


def test_refuses_what_it_cannot_do() -> None:
    subject = stripes()
    with pytest.raises(PlanError, match="first, idle, last"):
        apply(replace(TINY, module="lats"), subject)
    with pytest.raises(PlanError, match="range of the inputs"):
        apply(TINY, replace(subject, bounds=None))
    empty = replace(subject.data, valid=subject.data.valid.take(torch.arange(0)))
    with pytest.raises(PlanError, match="validation"):
        apply(TINY, subject.with_data(empty))
