"""accelat against the rule written out step by step, and on linear networks whose robust accuracy is known."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import PlanError
from cupel.core.fit import Named, fit, run_fit
from cupel.core.protocols import Hook, Moment
from cupel.core.slots import phase
from cupel.core.steps import build
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Bounds, Budget, Examples, TrainView
from cupel.ops.labelled import evenly
from cupel.ops.swap import swapped
from cupel.techniques.robust.accelat import AccelAT, decays
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
W = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
WIDE = Bounds(-9.0, 9.0)


@dataclass(frozen=True)
class Watch:
    """Records batches and rates of all updates."""

    batches: list[Batch] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Watching(self)


class _Watching(Hook):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    @phase("weight")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        self.watch.batches.append(batch)
        self.watch.rates.append(at.lr)
        return loss


@dataclass(frozen=True)
class Negated:
    """Trains the network with every weight negated."""

    def hook(self, ctx: Context) -> Hook:
        return _Negating()


class _Negating(Hook):
    @phase("mask")
    def around_forward(self, at: Moment):  # type: ignore[no-untyped-def]
        return swapped(at.model, {name: torch.neg for name, _ in at.weights()})


def linear() -> nn.Module:
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = W.clone()
    return model


def points(count: int, name: str) -> Examples:
    draw = seeded(0, name)
    x = torch.randn(count, 3, generator=draw)
    flip = torch.rand(count, generator=draw) < 0.1
    # Any order of the identities, so that a row is not its own identity by accident.
    return Examples(x, ((x @ W[0] < 0) ^ flip).long(), torch.randperm(count, generator=draw) + 7)


DATA = TrainView(points(16, "train"), points(200, "valid"))


def run(p: AccelAT, *others: object, epochs: int = 3, lr: float = 1e-12, bounds: Bounds | None = WIDE):  # type: ignore[no-untyped-def]
    """Train the linear network (by default hardly at all): what was watched, what was logged, and the network."""
    watch, log = Watch(), []
    methods = [("accelat", p), *((str(k), o) for k, o in enumerate(others)), ("watch", watch)]
    task = Classification(2)
    ctx = Context(train=DATA, task=task, bounds=bounds, report=lambda row: log.append(dict(row)))
    named = [Named(label, m, ctx.child(label)) for label, m in methods]
    budget = Budget(epochs=epochs, batch_size=8, optimizer="sgd", lr=lr, momentum=0.0)
    model = run_fit(linear(), DATA, task, budget, named, ctx)
    return watch, [row for row in log if row.get("kind") == "accelat"], model


def robust(eps: float, sign: float = 1.0, norm: str = "linf", most: int = 0) -> float:
    """Share of the validation points that stay right wherever the ball lets them move."""
    rows = evenly(200, most)
    x, y = DATA.valid.inputs[rows], DATA.valid.targets[rows]
    gap = sign * (x @ W[0]) * torch.where(y == 0, 1.0, -1.0)
    return float((gap > eps * (W[0].abs().sum() if norm == "linf" else W[0].norm())).double().mean())


def written_out(accuracies: list[float], window: int, quiet: int, gain: float, factor: float, least: float) -> float:
    """The rule as a state that is carried from epoch to epoch."""
    acc: list[float] = []
    mean: list[float] = []
    rate, counter = 1.0, quiet
    for a in accuracies:
        acc.append(a)
        m = sum(acc[-window:]) / len(acc[-window:])
        counter += 1
        if len(mean) > window and counter > quiet and m - mean[-1] < gain:
            rate, counter = rate * factor, 1
        rate = max(rate, least)
        mean.append(m)
    return rate


@pytest.mark.parametrize(("window", "quiet"), [(1, 0), (1, 3), (5, 5), (3, 1)])
def test_decays_are_those_of_the_rule(window: int, quiet: int) -> None:
    draw = seeded(window, quiet)
    counts = set()
    for _ in range(20):
        seen = (0.02 * torch.randn(40, generator=draw)).cumsum(0).tolist()
        for t in range(41):
            count = decays(seen[:t], window, quiet, 0.005)
            counts.add(count)
            want = written_out(seen[:t], window, quiet, 0.005, 0.8, 0.1)
            assert max(0.1, 0.8**count) == pytest.approx(want)
    assert len(counts) > 4


def test_never_falls_while_accuracy_climbs() -> None:
    assert decays([0.01 * t for t in range(30)], 5, 5, 0.005) == 0
    assert decays([0.004 * t for t in range(30)], 5, 0, 0.005) > 10


def test_the_rate_multiplies_that_of_the_fit() -> None:
    p = AccelAT(start=4.0, window=1, quiet=0, factor=0.5, gain=9.0, least=0.2, eps=0.1)
    watch, log, _ = run(p, epochs=7, lr=1e-12)
    rates = [4.0, 4.0, 4.0, 2.0, 1.0, 0.8, 0.8]  # two means must be known, then it falls each epoch, to the floor
    assert watch.rates == pytest.approx([1e-12 * r for r in rates for _ in range(2)])
    assert [row["rate"] for row in log] == pytest.approx(rates[1:])
    # With an unhurried gain the rate stays.
    assert set(run(replace(p, gain=-9.0), epochs=5)[0].rates) == {4e-12}


def test_the_update_takes_the_rate() -> None:
    """Plain SGD moves a weight in proportion to the rate."""
    moves = []
    for start in (1.0, 3.0):
        p = AccelAT(start=start, factor=1.0)
        budget = Budget(epochs=1, batch_size=16, optimizer="sgd", lr=1e-2, momentum=0.0)
        model = fit(linear(), DATA, Classification(2), techniques=[p], budget=budget, bounds=WIDE)
        moves.append(model.weight.detach() - W)
    assert torch.allclose(moves[1], 3 * moves[0], rtol=1e-4) and moves[0].norm() > 1e-4


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_the_signal_is_robust_accuracy_on_validation_data(eps: float) -> None:
    _, log, _ = run(AccelAT(eps=eps, steps=9))
    assert [row["robust"] for row in log] == pytest.approx([robust(eps)] * 2, abs=1e-9)
    assert robust(0.3) < robust(0.05) - 0.1 < robust(0.0) - 0.1


def test_the_signal_keeps_to_the_norm_and_the_number_of_examples() -> None:
    _, log, _ = run(AccelAT(eps=0.3, norm="l2", steps=9))
    assert log[0]["robust"] == pytest.approx(robust(0.3, norm="l2"), abs=1e-9)
    assert robust(0.3, norm="l2") > robust(0.3) + 0.05
    _, log, _ = run(AccelAT(eps=0.3, steps=9, examples=50))
    assert log[0]["robust"] == pytest.approx(robust(0.3, most=50), abs=1e-9) != pytest.approx(robust(0.3), abs=1e-3)


def test_the_signal_is_that_of_the_network_as_it_is_trained() -> None:
    _, log, _ = run(AccelAT(eps=0.05, steps=9), Negated())
    assert log[-1]["robust"] == pytest.approx(robust(0.05, -1.0), abs=1e-9)
    assert robust(0.05, -1.0) < 0.3


def test_static_inputs_are_made_once_from_the_first_network() -> None:
    watch, log, model = run(AccelAT(eps=0.1, steps=20, static=True), epochs=3, lr=0.02)
    assert (model.weight - W).abs().max() > 0.02  # it has learnt meanwhile
    where = {int(i): k for k, i in enumerate(DATA.train.index)}
    for batch in watch.batches:
        rows = torch.tensor([where[int(i)] for i in batch.index])
        x, y = DATA.train.inputs[rows], DATA.train.targets[rows]
        shift = batch.inputs - x
        assert shift.abs().max() <= 0.1 + 1e-6
        out = batch.inputs @ W.T
        gap = (x @ W[0]) * torch.where(y == 0, 1.0, -1.0)
        reach = 0.1 * W[0].abs().sum()
        assert torch.equal(out.argmax(1) == y, gap > reach)  # they fool the first network wherever the ball lets them
    same = [b.inputs[b.index.argsort()] for b in watch.batches]
    assert len(same) == 6
    table: dict[int, Tensor] = {}
    for batch in watch.batches:
        for i, x in zip(batch.index.tolist(), batch.inputs, strict=True):
            assert torch.equal(table.setdefault(i, x), x)
    assert len(log) == 2


def test_static_looks_at_moved_inputs_and_also_trains_on_them_at_a_rate_that_rests() -> None:
    watch, log, _ = run(AccelAT(eps=0.1, steps=20, static=True))
    assert [row["robust"] for row in log] == pytest.approx([robust(0.1)] * 2, abs=1e-9)
    assert robust(0.1) < robust(0.0) - 0.02
    still_rate, _, _ = run(AccelAT(eps=0.1, steps=20, static=True, factor=1.0))
    for a, b in zip(watch.batches, still_rate.batches, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.index, b.index)


def test_batch_statistics_see_only_the_forwards_of_the_update() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    budget = replace(subject.budget, epochs=3, batch_size=48)
    p = AccelAT(eps=0.05, steps=2)
    model = fit(subject.model, subject.data, subject.task, techniques=[p], budget=budget, bounds=subject.bounds)
    assert int(model.block1.norm.num_batches_tracked) == 6


def test_refuses_what_it_cannot_look_at() -> None:
    with pytest.raises(PlanError, match="range of the inputs"):
        run(AccelAT(), bounds=None)
    run(AccelAT(factor=1.0), bounds=None)
    empty = replace(DATA, valid=DATA.valid.take(torch.arange(0)))
    with pytest.raises(PlanError, match="validation examples"):
        fit(linear(), empty, Classification(2), techniques=[AccelAT()], budget=Budget(epochs=2), bounds=WIDE)
