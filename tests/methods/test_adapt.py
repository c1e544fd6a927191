"""adapt: rules by hand and by NumPy, one step by hand, formats of known grids, bytes of the file, modelled costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError
from cupel.core.fit import Named, fit, run_fit
from cupel.core.protocols import Hook
from cupel.core.shelf import BITS, Shelf
from cupel.core.slots import phase
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Budget, Examples, Subject, TrainView
from cupel.ops import fixed_words as words
from cupel.ops.fixed_layers import FixedConv2d, FixedLinear
from cupel.probes.cost.cost import Cost
from cupel.storage.state import load_into, load_state, save_model
from cupel.techniques.compress.adapt import AdaPT
from cupel.workloads.vision.digits_cnn import DigitsCnn
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)


def numpy_loss(w: np.ndarray, held: np.ndarray, bins: int) -> float:
    span = (float(w.min()), float(w.max()))
    counts = [np.histogram(np.clip(x, *span), bins, span)[0] + 0.5 for x in (w, held)]
    p, q = (c / c.sum() for c in counts)
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def test_information_loss_by_numpy() -> None:
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(40, 50, generator=draw, dtype=torch.float64)
    for bins, step in ((10, 0.5), (50, 0.5), (50, 0.01), (100, 4.0)):
        held = (w / step).round() * step
        assert words.information_loss(w, held, bins) == pytest.approx(numpy_loss(w.numpy(), held.numpy(), bins))
    assert words.information_loss(w, w, 70) == 0.0
    # What falls outside of the weights' range counts in the outer bins.
    assert words.information_loss(w, w * 1.5, 20) == pytest.approx(numpy_loss(w.numpy(), 1.5 * w.numpy(), 20))
    flat = torch.full((3, 3), 0.5)
    assert words.information_loss(flat, flat, 5) == 0.0
    assert words.information_loss(flat, flat + 1, 5) == math.inf


@pytest.mark.parametrize(("fraction", "top", "word"), [(5, 20, 6), (6, 31, 6), (6, 33, 7), (9, 700, 11)])
def test_push_down_finds_the_format_that_weights_were_made_in(fraction: int, top: int, word: int) -> None:
    codes = torch.arange(-top, top + 1).repeat(30).view(30, -1)
    weights = codes.float() / 2**fraction
    draw = torch.Generator().manual_seed(0)
    found = words.push_down(weights, (16, 12), 2 * top + 1, 1e-6, draw)
    assert found[:2] == (word, fraction)
    assert found[2] <= 8
    # Without a shorter one that keeps all, the format stays.
    assert words.push_down(weights, (word, fraction - 1), 2 * top + 1, 1e-6, draw)[:2] == (word, fraction - 1)
    # Coarser histograms see less: never a longer fraction.
    assert words.push_down(weights, (16, 12), 8, 1e-2, draw)[1] <= fraction


def test_bisection_is_a_search_through_all() -> None:
    for high in range(12):
        for wanted in range(14):
            found, tries = words.smallest(2, high, lambda n, wanted=wanted: n >= wanted) if high >= 2 else (high, 0)
            assert found == max(min(wanted, high), min(2, high)) and tries <= 4


def test_diversity() -> None:
    one = torch.tensor([0.6, 0.8])
    assert words.diversity(7 * one, 7) == pytest.approx(1.0)
    assert words.diversity(torch.ones(9), 9) == pytest.approx(3.0)  # nine gradients at right angles
    assert words.diversity(torch.zeros(4), 5) == math.inf


@pytest.mark.parametrize(
    ("spread", "form", "strategy", "wanted"),
    [
        (1.0, (9, 5), "max", (14, 6)),  # all agree: one bit more
        (0.999 * math.e, (9, 5), "max", (14, 6)),  # d just below 0 as well
        (math.exp(2.02), (9, 5), "min", (14, 6)),  # d = 1.02: 1 against 27
        (math.exp(2.02), (9, 5), "mean", (27, 19)),
        (math.exp(2.02), (9, 5), "max", (32, 24)),  # capped at 32 - buffer
        (math.exp(1.49), (9, 5), "min", (16, 8)),  # d = 0.49: 5 against 8 - 5
        (math.exp(1.49), (9, 5), "mean", (17, 9)),
        (math.exp(1.49), (9, 5), "max", (18, 10)),
        (math.exp(1.49), (20, 5), "max", (21, 10)),  # a longer word stays longer
        (math.exp(1.11), (9, 5), "min", (13, 5)),  # d = 0.11: 83 against 0
        (math.inf, (9, 5), "max", (14, 6)),
    ],
)
def test_push_up_by_hand(spread: float, form: tuple[int, int], strategy: str, wanted: tuple[int, int]) -> None:
    assert words.push_up(spread, form, strategy, 8) == wanted


def test_lookback_and_strategy_by_hand() -> None:
    assert words.next_lookback(50, 2.0, (10, 100), 0.5) == 50
    assert words.next_lookback(50, 1.0, (10, 100), 0.33) == math.ceil(33 + 33.5)
    assert words.next_lookback(10, 50.0, (10, 100), 0.33) == 10
    assert words.next_lookback(20, math.inf, (10, 100), 1.0) == 10
    assert [words.next_strategy(s, [1.0, 3.0], 2.5) for s in words.STRATEGIES] == ["mean", "max", "max"]
    assert [words.next_strategy(s, [1.0, 3.0], 1.5) for s in words.STRATEGIES] == ["min"] * 3
    assert words.next_strategy("min", [2.0], 2.0) == "mean"


# ---- in a fit


@dataclass(frozen=True)
class Spy:
    """Keeps what `look` returns beside every loss, and after every update."""

    look: Callable[[Any, Batch], object]
    after: Callable[[Any], object] = lambda at: None
    seen: list[Any] = field(default_factory=list)
    left: list[Any] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Spying(self)


class _Spying(Hook):
    def __init__(self, spy: Spy) -> None:
        self.spy = spy

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Any) -> Tensor:
        self.spy.seen.append(self.spy.look(at, batch))
        return loss

    @phase("mask")
    def stepped(self, at: Any) -> None:
        self.spy.left.append(self.spy.after(at))


class Echo(nn.Module):
    """A layer that hands out the weights it computes with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.used = torch.cat([self.inner.weight, self.inner.bias[:, None]], 1).detach().clone()
        return self.inner(x)


def rows(count: int = 24) -> Examples:
    draw = torch.Generator().manual_seed(1)
    return Examples(torch.randn(count, 4, generator=draw), torch.arange(count) % 3, torch.arange(count))


def used(at: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        at.output_of(batch)
    return at.model.used


def test_one_step_by_hand() -> None:
    model, data, lr, l1 = Echo(), rows(), 0.5, 0.01
    before = [p.detach().clone() for p in model.parameters()]
    budget = Budget(epochs=1, batch_size=24, optimizer="sgd", lr=lr, momentum=0.0)
    spy = Spy(used, lambda at: [p.detach().clone() for p in at.model.parameters()])
    fit(model, data, Classification(3), techniques=[AdaPT(word=6, fraction=3, l1=l1), spy], budget=budget)
    q = spy.seen[0].clone().requires_grad_()
    assert torch.equal(q.detach() * 8, (q.detach() * 8).round())  # multiples of 1/8
    nn.functional.cross_entropy(data.inputs @ q[:, :4].T + q[:, 4], data.targets).backward()
    weight = before[0] - lr * (q.grad[:, :4] + l1 * before[0].sign())
    bias = before[1] - lr * q.grad[:, 4]
    assert torch.allclose(spy.left[0][0], weight, atol=1e-6) and torch.allclose(spy.left[0][1], bias, atol=1e-6)
    assert torch.equal(model.inner.weight.detach() * 8, (weight * 8).round())


def test_rounding_is_random_without_bias_and_once_a_step() -> None:
    twice = Spy(lambda at, batch: (used(at, batch), used(at, batch)))
    budget = Budget(epochs=400, batch_size=24, optimizer="sgd", lr=1e-12)
    model, start, still = Echo(), Echo(), AdaPT(word=6, fraction=3, l1=0.0, lookback=(500, 500))
    fit(model, rows(), Classification(3), techniques=[still, twice], budget=budget)
    assert all(torch.equal(a, b) for a, b in twice.seen)
    many = torch.stack([a for a, _ in twice.seen])
    real = torch.cat([start.inner.weight, start.inner.bias[:, None]], 1).detach()
    assert float((many.mean(0) - real).abs().max()) < 4 * 0.125 / 2 / 20  # four deviations of a fair coin
    assert float((many - real).abs().max()) <= 0.125
    kinds = [len(many[:, i, j].unique()) for i in range(3) for j in range(5)]
    assert max(kinds) == 2 and kinds.count(1) <= 2  # one level alone only where the weight lies on it


@pytest.mark.parametrize("kind", ["unit", "fixed"])
def test_gradients_of_length_one(kind: str) -> None:
    model = Echo()
    spy = Spy(used, lambda at: at.model.inner.weight.detach().clone())
    start = model.inner.weight.detach().clone()
    budget = Budget(epochs=1, batch_size=8, optimizer="sgd", lr=0.25, momentum=0.0)
    fit(model, rows(), Classification(3), techniques=[AdaPT(word=12, fraction=6, gradients=kind), spy], budget=budget)
    moves = [b - a for a, b in zip([start, *spy.left], spy.left, strict=False)]
    assert all(float(m.norm()) == pytest.approx(0.25, abs=1e-6) for m in moves)
    if kind == "fixed":  # integers over one common length
        ints = moves[0] / moves[0].abs()[moves[0] != 0].min()
        assert torch.allclose(ints, (ints * 60).round() / 60, atol=1e-3) and bool((moves[0] == 0).any())


@dataclass(frozen=True)
class Sum:
    """A little of the outputs as they are: all gradients have one direction, and the other one after `turn` steps."""

    turn: int = 10**6
    calls: list[int] = field(default_factory=list)

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        return 0.01 * out.sum(-1)

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        self.calls.append(1)
        return self.losses(out, batch).mean() * (-1 if len(self.calls) > self.turn else 1)


def logged(model: nn.Module, data: Any, task: Any, method: AdaPT, budget: Budget) -> tuple[nn.Module, dict[str, Any]]:
    told: list[Any] = []
    shelf = Shelf()
    view = TrainView(data, data) if isinstance(data, Examples) else data.view()
    ctx = Context(path=("fit",), shelf=shelf, train=view, task=task, report=told.append)
    made = run_fit(model, view, task, budget, [Named("adapt", method, ctx.child("adapt"))], ctx)
    found = next(dict(t) for t in told if t["kind"] == "adapt")
    return made, found | {"notes": [t for t in told if t["kind"] == "note"], "bits": shelf.get(BITS)}


def test_gradients_that_agree_stretch_the_lookback() -> None:
    budget = Budget(epochs=60, batch_size=24, optimizer="sgd", lr=1e-9)
    method = AdaPT(word=12, fraction=6, lookback=(2, 30), momentum=0.5, l1=0.0)
    _, told = logged(Echo(), rows(), Sum(), method, budget)
    lookback, count, decisions = 2, 0, 0
    for _ in range(60):
        count, lookback = count + 1, math.ceil(30 * 0.5 + lookback * 0.5)
        if count >= lookback:
            count, decisions = 0, decisions + 1
    assert told["decisions"] == {"inner": decisions} and decisions == 2
    # Behind a decision the sum begins anew: gradients that turn round there still agree among themselves.
    _, turned = logged(Echo(), rows(), Sum(turn=30), method, replace(budget, epochs=59))  # type: ignore[arg-type]
    assert turned["decisions"] == {"inner": 1}
    _, fraction = told["formats"]["inner"]
    assert told["formats"]["inner"] == [fraction + 8, fraction] and told["bits"] == {"inner": fraction + 8.0}


def test_decisions_follow_the_weights() -> None:
    """Weights of a known grid, and gradients that agree: the least format, one bit more, and room in front."""
    model = Echo()
    with torch.no_grad():
        model.inner.weight.copy_((torch.arange(12).float() - 6).view(3, 4) / 2**7)
    budget = Budget(epochs=3, batch_size=24, optimizer="sgd", lr=1e-12)
    method = AdaPT(word=20, fraction=12, lookback=(3, 3), tolerance=1e-6, buffer=5, l1=0.0)
    _, told = logged(model, rows(), Sum(), method, budget)
    assert told["formats"]["inner"] == [7 + 1 + 5, 7 + 1]
    model = Echo()
    with torch.no_grad():
        model.inner.weight.copy_((torch.arange(12).float() - 6).view(3, 4) / 2**7)
    _, told = logged(model, rows(), Sum(), replace(method, settle=True), budget)  # type: ignore[arg-type]
    assert told["formats"]["inner"] == [4, 7] and told["bits"] == {"inner": 4.0}  # -6 to 5 take four bits
    _, told = logged(Echo(), rows(), Sum(), replace(method, lookback=(4, 4)), budget)
    assert told["formats"]["inner"] == [20, 12] and "too few" in told["notes"][0]["text"]


def test_modelled_costs_by_hand() -> None:
    macs = {"a": 300.0, "b": 100.0, "rest": 50.0}
    shares = {"a": words.work_share(8, 0.5), "b": words.work_share(16, 0.0)}
    assert shares == {"a": 0.125, "b": 0.5}
    assert words.relative_cost(macs, shares) == pytest.approx((37.5 + 50 + 50) / 450)  # type: ignore[arg-type]
    assert words.relative_cost(macs, shares, 45.0) == pytest.approx((137.5 + 45) / 450)  # type: ignore[arg-type]
    assert words.decision_work(100, 0, 0) == 300
    assert words.decision_work(100, 4, 50) == 300 + 100 + 4 * (500 + 150)
    values = {"a": torch.tensor([0.0, 1.0, 2.0, 0.0]), "b": torch.ones(4)}
    assert words.relative_size({"a": 16, "b": 8}, values) == (2 * 16 + 4 * 8) / (32 * 8)


def test_costs_of_a_fit() -> None:
    subject = build(DigitsMlp(hidden=(20,), examples=90), Context())
    size, budget = 64 * 20 + 20 * 10, Budget(epochs=2, batch_size=30, lr=1e-9)
    method = AdaPT(word=24, fraction=23, l1=0.0)
    _, told = logged(subject.model, subject.data, subject.task, method, budget)
    assert max(told["zeros"].values()) < 0.01
    assert told["inference_cost"] == pytest.approx(0.75, rel=0.01)
    # Nothing is decided in six steps, but every gradient is summed: 3 operations a weight against 2 * 30 macs.
    assert told["training_cost"] == pytest.approx(0.75 + 3 / 60, rel=0.01)
    # All is lossless: down to 2 and 4 bits and up to 13 and 5 at every step, one format tried for FL and four for WL.
    with torch.no_grad():
        for p in subject.model.parameters():
            p.mul_(50.0)
    method = AdaPT(word=13, fraction=5, tolerance=1e9, lookback=(1, 1), resolution=(50, 50), l1=0.0)
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    fresh[1].load_state_dict(subject.model.block1.linear.state_dict())  # type: ignore[union-attr,arg-type]
    fresh[3].load_state_dict(subject.model.head.state_dict())  # type: ignore[union-attr,arg-type]
    _, told = logged(fresh, subject.data, subject.task, method, budget)
    assert set(map(tuple, told["formats"].values())) == {(13, 5)} and set(told["decisions"].values()) == {6}
    decided = (size + 5 * 5 * size + 2 * 5 * 3 * 50) / (60 * size)
    assert told["training_cost"] == pytest.approx(13 / 32 + 3 / 60 + decided, rel=0.01)


# ---- what is shipped


def trained(method: AdaPT, epochs: int = 1) -> Subject:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    budget = Budget(epochs=epochs, batch_size=16, lr=3e-3)
    return subject.with_model(fit(subject.model, subject.data, subject.task, techniques=[method], budget=budget))


@pytest.mark.parametrize("word", [5, 8, 13, 26])
def test_file_holds_words_and_is_the_network(tmp_path: Path, word: int) -> None:
    done = trained(AdaPT(word=word, fraction=word - 3))
    written = save_model(done.model, tmp_path / "m")
    state = load_state(tmp_path / "m")
    sizes = {"block1.conv": 36, "block2.conv": 8 * 4 * 9, "block3.conv": 8 * 8 * 9, "head": 10 * 32}
    for name, size in sizes.items():
        layer = done.model.get_submodule(name)
        assert isinstance(layer, FixedLinear | FixedConv2d) and (layer.word, layer.fraction) == (word, word - 3)
        packed = state[f"{name}.weight_codes"]
        assert f"{name}.weight" not in state and packed.numel() == -(-size * word // 8)
        bits = np.unpackbits(packed.numpy(), bitorder="little")[: size * word].reshape(size, word)
        codes = bits.astype(np.int64) @ (1 << np.arange(word)) - 2 ** (word - 1)
        assert np.array_equal(codes / 2 ** (word - 3), layer.weight.detach().double().flatten().numpy())
    assert int(state["block1.norm.num_batches_tracked"]) == 6  # counting the products moved no statistics
    assert "head.bias_codes" in state and "block1.norm.weight" in state
    fresh = load_into(trained(AdaPT(word=9, fraction=2)).model, tmp_path / "m")
    assert torch.equal(done.with_model(fresh).outputs(), done.outputs())
    assert Cost().measure(done, Context())["size_bytes"].value == written


def test_stored_bytes_follow_the_formats(tmp_path: Path) -> None:
    subject = build(DigitsMlp(examples=96), Context())
    dense = save_model(subject.model, tmp_path / "f")
    made, told = logged(
        subject.model, subject.data, subject.task, AdaPT(lookback=(2, 4), buffer=4), Budget(epochs=4, batch_size=24)
    )
    written = save_model(made, tmp_path / "m")
    bits = sum(told["bits"][n] * (m.weight.numel() + len(m.bias)) for n, m in made.named_modules() if n in told["bits"])
    assert bits / 8 < written < bits / 8 + 1500 < dense
    assert {n: [m.word, m.fraction] for n, m in made.named_modules() if n in told["bits"]} == told["formats"]


def test_what_changed_since_is_stored_whole(tmp_path: Path) -> None:
    layer = trained(AdaPT()).model.get_submodule("head")
    assert set(layer.packed_state()) == {"format", "weight_codes", "bias_codes"}  # type: ignore[operator]
    changes: tuple[Callable[[Tensor], Any], ...] = (
        lambda w: w[2, 3].add_(1e-4),
        lambda w: w[0, 0].fill_(-0.0),
        lambda w: w[0, 0].fill_(1e6),
        lambda w: w[1].fill_(math.nan),
    )
    for change in changes:
        other = copy.deepcopy(layer)
        with torch.no_grad():
            change(other.weight)  # type: ignore[arg-type]
        save_model(other, tmp_path / "m")
        back: Any = load_into(copy.deepcopy(layer), tmp_path / "m")
        assert torch.equal(back.weight.nan_to_num(9.0), other.weight.nan_to_num(9.0))  # type: ignore[operator]
        assert torch.equal(back.weight.signbit(), other.weight.signbit())  # type: ignore[operator]


def test_a_second_fit_goes_on_from_the_format() -> None:
    done = trained(AdaPT(word=11, fraction=7))
    again, told = logged(done.model, done.data, done.task, AdaPT(), Budget(epochs=1, batch_size=32))
    assert set(map(tuple, told["formats"].values())) == {(11, 7)}
    assert type(again.get_submodule("head")) is FixedLinear


def test_refusals() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    with pytest.raises(PlanError, match="acts during training"):
        apply(AdaPT(), subject)
    with pytest.raises(PlanError, match="trained with it"):
        AdaPT().seal(copy.deepcopy(subject.model), Context())
    for bad, match in (
        (AdaPT(lookback=(9, 2)), "lookback of adapt"),
        (AdaPT(resolution=(5,)), "resolution of adapt"),
    ):
        with pytest.raises(ParamError, match=match):
            fit(subject.model, subject.data, subject.task, techniques=[bad], budget=Budget(epochs=1))
    for p in subject.model.parameters():
        p.requires_grad_(p.ndim == 1)
    with pytest.raises(PlanError, match="of its own to train"):
        fit(subject.model, subject.data, subject.task, techniques=[AdaPT()])
