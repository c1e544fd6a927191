"""int8-ptq: integer arithmetic checked against NumPy, kernels really int8, and a network that travels."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject
from cupel.ops.ledger import ledger_of
from cupel.probes.cost.cost import Cost
from cupel.storage.state import load_into, save_model, size_of
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


def bench(net: nn.Module, x: Tensor) -> Subject:
    data = Examples(x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)))
    return Subject(net.eval(), Splits(data, data, data), Classification(2))


@pytest.fixture(scope="module")
def digits() -> Subject:
    subject = build(DigitsCnn(), Context())
    return subject.with_model(fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=2)))


@pytest.fixture(scope="module")
def made(digits: Subject) -> Subject:
    return apply(Int8PTQ(), replace(digits, shelf=None))


def test_a_linear_layer_computes_in_integers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 6))
    x = torch.randn(64, 20)
    model = apply(Int8PTQ(), bench(net, x)).model
    layer = model.net.get_submodule("0")
    weight, bias = layer.weight(), layer.bias()
    assert weight.dtype == torch.qint8
    state = model.state_dict()
    in_scale = next(float(value) for name, value in state.items() if "input_scale" in name)
    in_zero = next(int(value) for name, value in state.items() if "input_zero" in name)
    codes = np.clip(np.rint(x.numpy() / np.float32(in_scale)) + in_zero, 0, 255).astype(np.int64)
    total = (codes - in_zero) @ weight.int_repr().numpy().astype(np.int64).T  # [64, 6]
    exact = total * in_scale * weight.q_per_channel_scales().numpy() + bias.detach().numpy()
    out = np.clip(np.rint(exact / layer.scale) + layer.zero_point, 0, 255)
    found = model(x).numpy() / layer.scale + layer.zero_point
    assert np.abs(found - out).max() <= 1.001  # a border of rounding may fall to either side
    assert (np.abs(found - out) > 1e-3).mean() < 0.02
    # Weights: symmetric, a scale for every output row, at most half a step from the float ones.
    steps = weight.q_per_channel_scales()
    assert (weight.dequantize() - net[0].weight).abs().le(0.5001 * steps[:, None]).all()
    assert weight.q_per_channel_zero_points().eq(0).all()


def test_kernels_are_int8(digits: Subject, made: Subject) -> None:
    ops = ledger_of(made.model, digits.data.test.inputs[:1]).ops
    busy = {op.name for op in ops if op.macs}
    assert busy == {"quantized.conv2d_relu", "quantized.linear"}
    assert sum(op.macs for op in ops) == sum(op.macs for op in ledger_of(digits.model, digits.data.test.inputs[:1]).ops)
    assert not any(op.name.endswith("batch_norm") for op in ops)  # folded


def test_close_to_float_and_a_quarter_of_its_size(digits: Subject, made: Subject, tmp_path: Path) -> None:
    targets = digits.data.test.targets
    float_right, int8_right = (float((s.outputs().argmax(1) == targets).double().mean()) for s in (digits, made))
    assert abs(float_right - int8_right) <= 0.01
    assert made.outputs().dtype == digits.outputs().dtype and made.outputs().shape == digits.outputs().shape
    assert save_model(made.model, tmp_path / "m") == size_of(made.model) <= 0.35 * size_of(digits.model)
    other = apply(Int8PTQ(examples=8), replace(digits, shelf=None), seed=5).model
    x = digits.data.test.inputs
    assert not torch.equal(other(x), made.model(x))
    assert torch.equal(load_into(other, tmp_path / "m")(x), made.model(x))


def test_cost_counts_the_int8_network(digits: Subject, made: Subject) -> None:
    before, after = (Cost().measure(s, Context()) for s in (digits, made))
    assert after["operations"].value == before["operations"].value
    biases, norms = 16 + 32 + 32, 2 * (16 + 32 + 32)
    assert after["params"].value == before["params"].value - norms + biases
    assert after["peak_activation_bytes"].value < 0.25 * before["peak_activation_bytes"].value


def test_same_seed_same_bits_and_the_subject_untouched(digits: Subject, made: Subject) -> None:
    before = copy.deepcopy(digits.model.state_dict())
    state = torch.get_rng_state()
    again = apply(Int8PTQ(), replace(digits, shelf=None))
    assert torch.equal(again.outputs(), made.outputs())
    assert all(torch.equal(v, before[k]) for k, v in digits.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in digits.model.parameters())


def test_the_float_network_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).train()
    x = torch.rand(20, 1, 8, 8)
    before, fields = copy.deepcopy(net.state_dict()), [set(vars(m)) for m in net.modules()]
    Int8PTQ().seal(net, Context(train=bench(copy.deepcopy(net), x).data.view()))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [set(vars(m)) for m in net.modules()] == fields and all(m.training for m in net.modules())


def test_it_can_be_copied_and_pickled_and_says_nothing(digits: Subject, made: Subject) -> None:
    x = digits.data.test.inputs[:20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (copy.deepcopy(made.model), pickle.loads(pickle.dumps(made.model))):
            assert torch.equal(other(x), made.model(x)) and not other.training
        apply(Int8PTQ(examples=8), replace(digits, shelf=None))
    depthwise = (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    grouped = nn.Sequential(*depthwise, nn.Flatten(), nn.Linear(8, 2))
    y = torch.rand(8, 4, 4, 4)
    model = apply(Int8PTQ(), bench(grouped, y)).model
    assert torch.equal(pickle.loads(pickle.dumps(model))(y), model(y))


def test_gradients_are_gone(digits: Subject, made: Subject) -> None:
    x = digits.data.test.inputs[:2].clone().requires_grad_(True)
    assert not made.model(x).requires_grad
    assert not list(made.model.parameters())


def test_refusals_say_what_to_do() -> None:
    x = torch.rand(8, 4)

    with pytest.raises(PlanError, match="must call a linear or convolution layer"):
        apply(Int8PTQ(), bench(Branches(nn.Softmax(1)), x))
    with pytest.raises(PlanError, match="their weights not be read"):
        apply(Int8PTQ(), bench(Branches(nn.Linear(4, 2), peeks=True), x))
    with pytest.raises(PlanError, match="must have data to calibrate on"):
        Int8PTQ().seal(nn.Linear(4, 2), Context())
    view = bench(nn.Linear(4, 2), x).data.view()
    with pytest.raises(PlanError, match="the device for int8-ptq must be the CPU; got cuda"):
        Int8PTQ().seal(nn.Linear(4, 2), Context(train=view, device=torch.device("cuda")))


class Branches(nn.Module):
    """A forward that torch.fx cannot trace."""

    def __init__(self, inner: nn.Module, peeks: bool = False) -> None:
        super().__init__()
        self.inner, self.peeks = inner, peeks

    def forward(self, x: Tensor) -> Tensor:
        if self.peeks:
            return nn.functional.linear(x, self.inner.weight) + len(x) * self.inner(x)
        return self.inner(x) if len(x) > 1 and float(x.sum()) > -1e9 else self.inner(-x)


def test_a_network_that_cannot_be_traced_is_converted_layer_by_layer() -> None:
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 5))
    x = torch.rand(40, 1, 8, 8)
    base = bench(Branches(inner), x)
    made = apply(Int8PTQ(), base).model
    traced = apply(Int8PTQ(), bench(inner, x)).model
    assert (made.whole, traced.whole) == (False, True)
    busy = {op.name for op in ledger_of(made, x).ops if op.macs}
    assert busy == {"quantized.conv2d", "quantized.linear"}
    wanted = inner(x).detach()
    spread = float(wanted.std())
    assert float((made(x) - wanted).abs().max()) < 0.1 * spread
    assert float((made(x) - traced(x)).abs().max()) < 0.1 * spread
    assert size_of(made) < 0.7 * size_of(inner)  # the header weighs much in so small a file
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), made(x))


def test_no_gradient_comes_from_float_parts_alone() -> None:
    class Skips(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    x = torch.randn(20, 4)
    made = apply(Int8PTQ(), bench(Skips(nn.Linear(4, 4)), x)).model
    assert not made.whole and not made(x.requires_grad_(True)).requires_grad  # half a gradient would mislead an attack


def test_functional_calls_stay_float_and_are_stored(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(12, 30), nn.Parameter(torch.randn(5, 30))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.first(x), self.weight)

    torch.manual_seed(3)
    x = torch.randn(50, 12)
    made, other = (apply(Int8PTQ(), bench(Both(), x)).model for _ in "ab")
    assert {op.name for op in ledger_of(made, x).ops if op.macs} == {"quantized.linear", "aten.mm"}
    save_model(made, tmp_path / "m")
    assert torch.equal(load_into(other, tmp_path / "m")(x), made(x))


def test_a_lone_layer_and_double_precision() -> None:
    torch.manual_seed(2)
    x = torch.randn(30, 4).double()
    made = apply(Int8PTQ(), bench(nn.Linear(4, 2).double(), x))
    assert made.outputs().dtype == torch.float64
    assert float((made.outputs() - bench_of(made, x)).abs().max()) < 0.1


def bench_of(made: Subject, x: Tensor) -> Tensor:
    """The same layer from its stored integers, in float."""
    layer = next(m for m in made.model.modules() if callable(getattr(m, "weight", None)))
    return nn.functional.linear(x.float(), layer.weight().dequantize(), layer.bias()).double().detach()


def test_a_network_that_goes_to_double_precision_inside_is_converted_layer_by_layer(digits: Subject) -> None:
    class Double(nn.Module):
        def __init__(self, head: bool) -> None:
            super().__init__()
            self.first = nn.Linear(64, 10) if head else nn.Flatten()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.narrow(self.first(x.flatten(1)).double(), 1, 0, 10)  # torch quantizes what this is given

    held = apply(Int8PTQ(), digits.with_model(Double(head=True).eval()))
    assert held.outputs().dtype == torch.float64 and "quantized" in str(held.model)[:2000].lower()
    with pytest.raises(PlanError, match="linear or convolution"):
        apply(Int8PTQ(), digits.with_model(Double(head=False).eval()))


def test_scales_of_powers_of_two_are_those_of_the_least_squared_error() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(64, 20)
    made = apply(Int8PTQ(scales="power-of-two"), bench(net, x)).model
    state = made.state_dict()
    scales = {name: float(v) for name, v in state.items() if "scale" in name and isinstance(v, Tensor)}
    assert len(scales) >= 3 and all(np.log2(s) == round(np.log2(s)) for s in scales.values())
    weight = made.net.get_submodule("0").weight()
    assert weight.qscheme() == torch.per_tensor_affine and weight.q_zero_point() == 0
    w = net[0].weight.detach().double().numpy()

    def error(f: int, values: np.ndarray, low: int, high: int) -> float:
        return float(((np.clip(np.rint(values * 2.0**f), low, high) / 2.0**f - values) ** 2).sum())

    errors = [error(f, w, -127, 127) for f in range(-12, 25)]
    assert weight.q_scale() == 2.0 ** (12 - int(np.argmin(errors)))
    top = int(state[next(k for k in state if "input_zero" in k)])  # zero lies in the middle of the codes: 64 or 128
    assert top in (64, 128)
    errors = [error(f, x.double().numpy(), -top, top - 1) for f in range(-12, 25)]
    assert scales[next(k for k in scales if "input_scale" in k)] == 2.0 ** (12 - int(np.argmin(errors)))
    hidden = made.net.get_submodule("0")
    assert int(hidden.zero_point) == 0  # behind a ReLU nothing is negative: all codes are above zero
    free = apply(Int8PTQ(), bench(net, x)).model
    with torch.no_grad():
        wanted = net(x)
        assert float((free(x) - wanted).norm()) < float((made(x) - wanted).norm()) < 0.05 * float(wanted.norm())


def test_layers_converted_one_by_one_can_have_such_scales_too() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x if float(x.sum()) > 0 else -x)

    made = apply(Int8PTQ(scales="power-of-two"), bench(Looking(), torch.randn(16, 5))).model
    assert not made.whole
    found = [float(v) for k, v in made.state_dict().items() if k.endswith("scale")]
    assert found and all(np.log2(v) == round(np.log2(v)) for v in found)
