"""binaryconnect: against the paper's own loop, its gradient by hand, the clip, one draw a step, bits and sums."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.fit import fit
from cupel.core.protocols import Hook
from cupel.core.slots import phase
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Budget
from cupel.nets.convnet import ConvNet
from cupel.ops.own_layers import own_layers
from cupel.probes.cost.cost import Cost
from cupel.storage.state import load_into, load_state, save_model
from cupel.techniques.compress.binaryconnect import (
    KINDS,
    PLAIN,
    BinaryConnect,
    BinaryConv2d,
    BinaryLinear,
    added,
    glorot,
    signs,
    through,
)
from cupel.techniques.compress.magnitude_prune import MagnitudePrune
from cupel.workloads.vision.digits_cnn import DigitsCnn
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)
TASK = Classification(3)


@dataclass(frozen=True)
class Spy:
    """Keeps what `look` returns, after every update behind the clip, or beside every loss."""

    look: Callable[[Any], object]
    slot: str = "stepped"
    seen: list[Any] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _After(self) if self.slot == "stepped" else _Beside(self)


class _After(Hook):
    def __init__(self, spy: Spy) -> None:
        self.spy = spy

    @phase("mask")
    def stepped(self, at: Any) -> None:
        self.spy.seen.append(self.spy.look(at))


class _Beside(Hook):
    def __init__(self, spy: Spy) -> None:
        self.spy = spy

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Any) -> Tensor:
        self.spy.seen.append(self.spy.look(at))
        return loss


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def rows(count: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, 6, dtype=torch.float64), torch.arange(count) % 3


def weights_of(at: Any) -> list[Tensor]:
    return [p.detach().clone() for _, p in at.weights()]


def papers_loop(optimizer: str, lr: float, size: float | None, steps: int) -> list[list[Tensor]]:
    """Algorithm 1 with W in [-1, 1], straight from the paper; learning rates by layer, in torch's own optimisers."""
    model, (x, y) = net(), rows()
    linears = [m for m in model if isinstance(m, nn.Linear)]
    h = [math.sqrt(1.5 / (m.in_features + m.out_features)) for m in linears]
    real = [(m.weight / m.weight.abs().max()).detach().requires_grad_() for m in linears]
    biases = [m.bias for m in linears]
    power = 1 if optimizer == "adam" else 2
    groups = [{"params": [w], "lr": lr / k**power} for w, k in zip(real, h, strict=True)]
    groups.append({"params": biases, "lr": lr})
    # Adam's eps is no part of the scaling law; it is small against these gradients.
    rule = torch.optim.Adam(groups, lr) if optimizer == "adam" else torch.optim.SGD(groups, lr, momentum=0.9)
    seen = []
    for _ in range(steps):
        scales = [k if size is None else size for k in h]
        binary = [(torch.where(w >= 0, 1.0, -1.0).double()).detach().requires_grad_() for w in real]
        hidden = torch.tanh(F.linear(x, scales[0] * binary[0], biases[0]))
        loss = F.cross_entropy(F.linear(hidden, scales[1] * binary[1], biases[1]), y)
        found = torch.autograd.grad(loss, [*binary, *biases])
        for w, g in zip([*real, *biases], found, strict=True):
            w.grad = g
        rule.step()
        with torch.no_grad():
            for w in real:
                w.clamp_(-1, 1)
        seen.append([w.detach().clone() for w in real])
    return seen


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.02), ("adam", 0.01)])
@pytest.mark.parametrize(("scale", "size"), [("one", 1.0), ("glorot", None)])
def test_equals_the_papers_loop(optimizer: str, lr: float, scale: str, size: float | None) -> None:
    spy = Spy(weights_of)
    budget = Budget(epochs=25, batch_size=24, optimizer=optimizer, lr=lr)
    fit(net(), rows(), TASK, techniques=[BinaryConnect(scale=scale), spy], budget=budget)
    wanted = papers_loop(optimizer, lr, size, 25)
    start = [torch.where(m.weight >= 0, 1.0, -1.0) for m in net() if isinstance(m, nn.Linear)]
    for ours, theirs in zip(spy.seen, wanted, strict=True):
        for v, w in zip(ours, theirs, strict=True):
            assert float((v / glorot(v) - w).abs().max()) < (1e-4 if optimizer == "adam" else 1e-9)
    turned = [int((s != torch.where(w >= 0, 1.0, -1.0)).sum()) for s, w in zip(start, wanted[-1], strict=True)]
    assert min(turned) > 0  # signs that never change would not tell the loops apart
    assert any(bool((w.abs() == 1).any()) for step in wanted[1:] for w in step)  # nor a clip that never acts


def test_gradient_is_that_at_the_binary_weights() -> None:
    real = torch.tensor([[0.3, -0.2], [0.0, -0.9]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([1.0, 3.0], dtype=torch.float64)
    (through(signs(real, 1.0), real, 2.0) @ x).square().sum().backward()
    y = torch.tensor([1.0 - 3.0, 1.0 - 3.0], dtype=torch.float64)  # the sign of zero is +1
    assert torch.equal(real.grad, 2.0 * 2 * y[:, None] * x)
    value = torch.tensor([0.1, -0.7])
    assert torch.equal(through(value, torch.tensor([1e8, 3e-9]), 0.37), value)  # exact, whatever stands behind


def test_magnitude_of_glorot() -> None:
    assert glorot(torch.zeros(300, 64)) == math.sqrt(1.5 / 364)
    conv = nn.Conv2d(6, 8, 3, groups=2)
    assert glorot(conv.weight) == math.sqrt(1.5 / (3 * 9 + 8 * 9))


def test_stochastic_signs_follow_the_hard_sigmoid() -> None:
    limit = 0.25
    real = torch.tensor([-0.5, -0.25, -0.125, 0.0, 0.2, 0.25, 1.0])
    draws = torch.rand(20000, 7, generator=torch.Generator().manual_seed(0))
    draws[0] = 0.0
    share = (signs(real.expand(20000, 7), limit, draws) + 1).mean(0) / 2
    wanted = torch.tensor([0.0, 0.0, 0.25, 0.5, 0.9, 1.0, 1.0])
    assert torch.allclose(share, wanted, atol=0.015) and torch.equal(share[[0, 1, 5, 6]], wanted[[0, 1, 5, 6]])


def test_real_weights_stay_in_their_interval() -> None:
    with_clip = Spy(weights_of)
    budget = Budget(epochs=3, batch_size=8, optimizer="adam", lr=0.2)
    fit(net(), rows(), TASK, techniques=[BinaryConnect(), with_clip], budget=budget)
    for step in with_clip.seen:
        for w in step:
            h = glorot(w)
            assert float(w.abs().max()) == h  # at this rate every step reaches the border
    assert any(len(w.unique()) > 2 for w in with_clip.seen[0])


def outputs_twice(at: Any) -> tuple[Tensor, Tensor]:
    x, y = rows()
    one = Batch(x, y, torch.arange(len(x)))
    with torch.no_grad():
        return at.output_of(one), at.output_of(one)


def test_one_draw_a_step() -> None:
    budget = Budget(epochs=4, batch_size=24, optimizer="sgd", lr=1e-12)
    spy, plain = Spy(outputs_twice, "loss"), Spy(outputs_twice, "loss")
    fit(net(), rows(), TASK, techniques=[BinaryConnect("stochastic"), spy], budget=budget)
    fit(net(), rows(), TASK, techniques=[BinaryConnect(), plain], budget=budget)
    assert all(torch.equal(a, b) for a, b in spy.seen)
    assert all(float((a[0] - b[0]).abs().max()) > 0.01 for a, b in zip(spy.seen, spy.seen[1:], strict=False))
    assert torch.allclose(plain.seen[0][0], plain.seen[-1][0], atol=1e-6)  # the step alone changes nothing
    # Not a matter of how often, or for what, the network was called before.

    def busy(at: Any) -> list[tuple[Tensor, Tensor]]:
        torch.rand(5)  # another method's draw from the fit's own stream
        return [outputs_twice(at) for _ in range(1 + 3 * (at.step == 1))]

    often = Spy(busy, "loss")
    fit(net(), rows(), TASK, techniques=[BinaryConnect("stochastic"), often], budget=budget)
    assert all(torch.equal(a[0], b[-1][0]) for a, b in zip(spy.seen, often.seen, strict=True))
    other = Spy(outputs_twice, "loss")
    fit(net(), rows(), TASK, techniques=[BinaryConnect("stochastic"), other], budget=budget, seed=1)
    assert not torch.equal(spy.seen[0][0], other.seen[0][0])


def trained_cnn(**params: str) -> tuple[nn.Module, Any]:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    model = fit(
        subject.model, subject.data, subject.task, techniques=[BinaryConnect(**params)], budget=Budget(epochs=1)
    )
    return model, subject.with_model(model)


def from_bits(state: dict[str, Tensor], layer: str, shape: tuple[int, ...]) -> Tensor:
    """Signs of a stored layer, read with NumPy: the lowest bit of a byte comes first."""
    bits = np.unpackbits(state[f"{layer}.signs"].numpy(), bitorder="little")[: math.prod(shape)]
    return torch.from_numpy(bits.astype(bool)).view(shape)


@pytest.mark.parametrize("scale", ["one", "glorot"])
def test_file_holds_bits_and_adding_them_up_is_the_network(tmp_path: Path, scale: str) -> None:
    model, subject = trained_cnn(scale=scale)
    written = save_model(model, tmp_path / "m")
    state = load_state(tmp_path / "m")
    convs = {"block1.conv": (4, 1, 3, 3), "block2.conv": (8, 4, 3, 3), "block3.conv": (8, 8, 3, 3)}
    for name, shape in {**convs, "head": (10, 32)}.items():
        assert state[f"{name}.signs"].numel() == -(-math.prod(shape) // 8) and f"{name}.weight" not in state
        w = model.get_submodule(name).weight
        assert set(w.unique().tolist()) == {-float(state[f"{name}.scale"]), float(state[f"{name}.scale"])}
    assert float(state["head.scale"]) == (1.0 if scale == "one" else pytest.approx(math.sqrt(1.5 / 42)))
    x = subject.data.test.inputs[:20]
    for name, (out, fan_in, *_) in convs.items():  # a convolution is sums over its windows
        stride = 2 if name == "block2.conv" else 1
        windows = F.unfold(x, 3, padding=1, stride=stride).transpose(1, 2)  # [B, places, in * 9]
        sums = added(windows, from_bits(state, name, (out, fan_in, 3, 3)).flatten(1)) * state[f"{name}.scale"]
        side = x.shape[-1] // stride
        y = sums.transpose(1, 2).reshape(len(x), out, side, side)
        direct = model.get_submodule(name)(x)
        if name == "block1.conv" and scale == "one":
            assert torch.equal(y, direct)  # the pixels are multiples of 1/16: no sum of them rounds
        assert torch.allclose(y, direct, atol=1e-5)
        x = model.get_submodule(name.split(".")[0])[1:](y)
    x = model.flat(model.pool(x))
    logits = added(x, from_bits(state, "head", (10, 32))) * state["head.scale"] + state["head.bias"]
    assert torch.allclose(logits, subject.outputs()[:20], atol=1e-4)
    again = load_into(trained_cnn(draw="stochastic")[0], tmp_path / "m")
    assert torch.equal(subject.with_model(again).outputs(), subject.outputs())
    assert Cost().measure(subject, Context())["size_bytes"].value == written


def test_bytes_of_a_larger_network(tmp_path: Path) -> None:
    subject = build(DigitsMlp(), Context())
    dense = save_model(subject.model, tmp_path / "f")
    sealed = fit(subject.model, subject.data, subject.task, techniques=[BinaryConnect()], budget=Budget(epochs=0))
    written = save_model(sealed, tmp_path / "b")
    weights, biases = 64 * 300 + 300 * 100 + 100 * 10, 410
    assert weights // 8 + 4 * biases < written < weights // 8 + 4 * biases + 1500
    assert dense > 20 * written


def test_added_equals_the_product() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-50, 50, (3, 4, 17), generator=draw).float()
    plus = torch.rand(5, 17, generator=draw) < 0.5
    assert torch.equal(added(x, plus), x @ (plus.float() * 2 - 1).T)


def test_what_changed_since_is_stored_whole(tmp_path: Path) -> None:
    layer = BinaryLinear(7, 5)
    with torch.no_grad():
        layer.weight.copy_(signs(layer.weight, 1.0) * 0.3)
    assert set(layer.packed_state()) == {"bias", "signs", "scale"}
    for change in (
        lambda w: w[2, 3].mul_(1.5),
        lambda w: w[0, 0].zero_(),
        lambda w: w.zero_(),
        lambda w: w[1].fill_(math.nan),
    ):
        other = copy.deepcopy(layer)
        with torch.no_grad():
            change(other.weight)
        save_model(other, tmp_path / "m")
        fresh = load_into(BinaryLinear(7, 5), tmp_path / "m")
        assert torch.equal(fresh.weight.nan_to_num(9.0), other.weight.nan_to_num(9.0))
        assert torch.equal(fresh.weight.signbit(), other.weight.signbit())


def test_real_weights_for_inference() -> None:
    spy = Spy(weights_of)
    budget = Budget(epochs=2, batch_size=8, optimizer="adam", lr=0.01)
    method = BinaryConnect("stochastic", "real", "one")
    made = fit(net(), rows(), TASK, techniques=[method, spy], budget=budget)
    for layer, last in zip((made[0], made[2]), spy.seen[-1], strict=True):  # type: ignore[index]
        assert type(layer) is nn.Linear and float(layer.weight.detach().abs().max()) <= 1.0 + 1e-12
        assert torch.allclose(layer.weight, last / glorot(last)) and len(layer.weight.unique()) > 2


def test_only_weights_of_its_own_are_binary() -> None:
    model = ConvNet(1, 10, 4)
    kinds = (*KINDS, *PLAIN)
    assert list(own_layers(model, kinds)) == ["block1.conv", "block2.conv", "block3.conv", "head"]
    model.block2.conv.weight.requires_grad_(False)
    tied = nn.ModuleDict({"table": nn.Embedding(4, 3), "read": nn.Linear(3, 4), "own": nn.Linear(4, 4)})
    tied["read"].weight = tied["table"].weight
    assert list(own_layers(model, kinds)) == ["block1.conv", "block3.conv", "head"]
    assert list(own_layers(tied, kinds)) == ["own"]
    before = model.block2.conv.weight.detach().clone()
    subject = build(DigitsCnn(width=4, examples=96), Context())
    made = fit(model, subject.data, subject.task, techniques=[BinaryConnect()], budget=Budget(epochs=1))
    assert torch.equal(made.block2.conv.weight, before) and type(made.block2.conv) is nn.Conv2d
    assert type(made.block1.conv) is BinaryConv2d


def test_a_second_fit_goes_on_from_the_signs() -> None:
    model, subject = trained_cnn()
    first = {n: m.weight.sign() for n, m in model.named_modules() if isinstance(m, (BinaryConv2d, BinaryLinear))}
    frozen = model.get_submodule("block2.conv").weight
    kept = frozen.requires_grad_(False).clone()
    budget = Budget(epochs=1, lr=1e-9)
    again = fit(model, subject.data, subject.task, techniques=[BinaryConnect(scale="one")], budget=budget)
    for name, sign in first.items():
        assert torch.equal(again.get_submodule(name).weight, kept if name == "block2.conv" else sign)


def test_refusals() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    with pytest.raises(PlanError, match="acts during training"):
        apply(BinaryConnect(), subject)
    with pytest.raises(PlanError, match="trained with it"):
        BinaryConnect().seal(copy.deepcopy(subject.model), Context())
    both = [BinaryConnect(), MagnitudePrune(sparsity=0.5)]
    with pytest.raises(PlanError, match="must not be pruned"):
        fit(copy.deepcopy(subject.model), subject.data, subject.task, techniques=both, budget=Budget(epochs=1))
    for p in subject.model.parameters():
        p.requires_grad_(p.ndim == 1)
    with pytest.raises(PlanError, match="of its own to train"):
        fit(subject.model, subject.data, subject.task, techniques=[BinaryConnect()])
