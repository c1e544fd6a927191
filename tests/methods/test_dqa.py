"""dqa: values against a slow NumPy version, the real bit stream, the ranking, gradients."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.fit import fit
from cupel.core.shelf import BITS
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject
from cupel.ops.huffman import code_lengths
from cupel.techniques.compress.dqa import DQA, Grid, decode, encode
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


def bench(net: nn.Module, x: Tensor, classes: int = 3) -> Subject:
    data = Examples(x, torch.arange(len(x)) % classes, torch.arange(len(x)))
    return Subject(net.eval(), Splits(data, data, data), Classification(classes))


def slow(x: np.ndarray, low: float, high: float, bits: int, extra: int, important: np.ndarray) -> np.ndarray:
    """Steps 3, 4 and 6 of the method, one value after the other, in double precision."""
    out = np.empty(x.shape)
    for place in np.ndindex(*x.shape):
        fine = important[place[1]]
        n = bits + extra if fine else bits
        step = (high - low) / (2**n - 1)
        c = min(max(round((float(x[place]) - low) / step), 0), 2**n - 1)
        if fine:
            h, e = c >> extra, c - ((c >> extra) << extra)
            assert 0 <= h < 2**bits and 0 <= e < 2**extra
            out[place] = ((h << extra) + e) * step + low
        else:
            out[place] = c * step + low
    return out


@pytest.mark.parametrize(("bits", "extra"), [(1, 1), (2, 3), (4, 3), (8, 8)])
def test_values_equal_the_slow_version(bits: int, extra: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 2) * 2
    grid = Grid(torch.tensor(-2.5), torch.tensor(3.0), 5, bits, extra, -3)
    grid.important[[0, 3]] = True
    wanted = slow(x.numpy(), -2.5, 3.0, bits, extra, grid.important.numpy())
    off = np.abs(grid(x).numpy() - wanted)
    # A value within float error of a rounding border may fall on either side of it.
    assert (off > 1e-5).mean() <= 1e-3 * 2 ** (bits + extra) / 256 and np.median(off) < 1e-6
    assert float(grid(torch.full((1, 5, 1, 1), -9.0)).max()) == -2.5
    assert torch.allclose(grid(torch.full((1, 5, 1, 1), 9.0)), torch.tensor(3.0))


def test_stream_is_exact_and_as_long_as_counted() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ELU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    x = torch.randn(60, 6, 6, 6)
    made = apply(DQA(bits=3, extra=3, important=0.5, examples=60), bench(net, x))
    assert made.shelf is not None
    effective = made.shelf.get(BITS)
    assert list(effective) == ["0", "3"]
    layer = made.model[0]
    data = encode(layer, x)
    assert torch.equal(decode(layer, data), layer.grid(x))
    head = 1 + 4 * 4
    payload = 8 * (len(data) - head) / x.numel()
    assert abs(payload - effective["0"]) < 16 / x.numel() + 1e-9  # the table was made on these very values
    assert 3 < effective["0"] <= 3 + 0.5 * 3
    wild = torch.randn(2, 6, 9, 7) * 50  # values and shapes that calibration never met
    assert torch.equal(decode(layer, encode(layer, wild)), layer.grid(wild))
    hidden = made.model[:3](x)
    assert torch.equal(decode(made.model[3], encode(made.model[3], hidden)), made.model[3].grid(hidden))


def test_layer_computes_with_the_decoded_values() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(40, 6)
    made = apply(DQA(bits=2, important=0.5), bench(net, x)).model
    hidden = torch.tanh(nn.functional.linear(decode(made[0], encode(made[0], x)), net[0].weight, net[0].bias))
    wanted = nn.functional.linear(decode(made[2], encode(made[2], hidden)), net[2].weight, net[2].bias)
    assert torch.equal(made(x), wanted)
    assert torch.equal(made[0].grid.low, x.min()) and torch.equal(made[0].grid.high, x.max())


def test_ranking_finds_the_channels_that_matter() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[0, 5], net[0].weight[1, 2] = 8.0, 7.0  # the other six channels change nothing
    made = apply(DQA(bits=1, extra=8, important=0.25, examples=64), bench(net, torch.randn(64, 8))).model
    assert made[0].grid.important.nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("ranking", ["output", "loss"])
def test_ranking_equals_scoring_each_channel_alone_with_other_layers_in_float(ranking: str) -> None:
    torch.manual_seed(8)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(32, 6)
    subject = bench(net, x)
    made = apply(DQA(bits=1, extra=4, important=0.4, ranking=ranking, examples=32), subject).model
    targets = subject.data.train.targets
    for place, many in ((0, 2), (2, 2)):
        seen = net[:place](x).detach()
        scores = []
        for channel in range(seen.shape[1]):
            mixed = seen.numpy().copy()
            mixed = slow(mixed, mixed.min(), mixed.max(), 1, 4, np.arange(seen.shape[1]) == channel)
            out = net[place:](torch.from_numpy(mixed).float()).detach()
            error = (out - net(x).detach()).square().mean()
            scores.append(float(error if ranking == "output" else nn.functional.cross_entropy(out, targets)))
        best = sorted(np.argsort(scores)[:many].tolist())
        assert made[place].grid.important.nonzero().flatten().tolist() == best


def test_shares_and_the_limit_cases() -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(10, 3))
    x = torch.rand(30, 10)
    for important, many in ((0.0, 0), (0.25, 3), (0.5, 5), (1.0, 10)):
        made = apply(DQA(bits=3, extra=5, important=important), bench(net, x))
        assert int(made.model[0].grid.important.sum()) == many
    assert made.shelf is not None and made.shelf.get(BITS)["0"] > 3
    # All channels important: the same numbers as plain quantisation to 3 + 5 bits.
    step = (x.max() - x.min()) / 255
    plain = ((x - x.min()) / step).round() * step + x.min()
    assert torch.allclose(made.model[0].grid(x), plain, atol=1e-6)
    # None important: plain 3 bits, and nothing but 3 bits.
    none = apply(DQA(bits=3, important=0.0), bench(net, x))
    step = (x.max() - x.min()) / 7
    assert torch.allclose(none.model[0].grid(x), ((x - x.min()) / step).round() * step + x.min(), atol=1e-6)
    assert none.shelf is not None and none.shelf.get(BITS)["0"] == 3.0


def test_more_bits_never_hurt_the_logits_of_a_trained_network() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    subject = subject.with_model(
        fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=3))
    )
    errors = []
    for bits in (2, 4, 6, 8):
        made = apply(DQA(bits=bits, examples=32), replace(subject, shelf=None))
        errors.append(float((made.outputs() - subject.outputs()).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0]
    better = apply(DQA(bits=2, important=0.5), replace(subject, shelf=None))
    assert float((better.outputs() - subject.outputs()).square().mean()) < errors[0]


def test_gradients_pass_as_through_the_float_network() -> None:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(6, 3))
    x = torch.randn(50, 6)
    made = apply(DQA(bits=3), bench(net, x)).model
    inside = (x[:4] * 0.9).requires_grad_(True)
    made(inside)[:, 0].sum().backward()
    assert torch.allclose(inside.grad, net[0].weight[0].expand(4, 6), atol=1e-6)  # straight-through: exactly linear
    outside = torch.full((1, 6), 99.0, requires_grad=True)
    made(outside).sum().backward()
    assert float(outside.grad.abs().max()) == 0.0  # the range ends there


def test_the_subject_is_untouched_and_the_result_travels() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    before = copy.deepcopy(subject.model.state_dict())
    made = apply(DQA(bits=4, examples=16), subject)
    assert all(torch.equal(v, before[k]) for k, v in subject.model.state_dict().items())
    assert type(subject.model.head) is nn.Linear and isinstance(made.model.head, nn.Linear)
    x = subject.data.test.inputs[:8]
    for other in (copy.deepcopy(made.model), pickle.loads(pickle.dumps(made.model))):
        assert torch.equal(other(x), made.model(x))
    assert not any(m._forward_pre_hooks for m in made.model.modules())
    assert {k for k, _ in made.model.named_parameters()} == {k for k, _ in subject.model.named_parameters()}
    fresh = apply(DQA(bits=4, examples=16, ranking="random"), replace(subject, shelf=None), seed=9).model
    fresh.load_state_dict(made.model.state_dict())
    assert torch.equal(fresh(x), made.model(x))


def test_same_seed_same_channels_and_other_seed_others() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())

    def channels(seed: int) -> list[bool]:
        made = apply(DQA(ranking="random", important=0.5), replace(subject, shelf=None), seed=seed)
        return made.model.head.grid.important.tolist()

    assert channels(0) == channels(0) != channels(1)
    first, second = (apply(DQA(examples=32), replace(subject, shelf=None), seed=3).model.state_dict() for _ in "ab")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_hooks_are_gone_after_an_error() -> None:
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    net = nn.Sequential(nn.Linear(4, 4), Fails(4, 3))
    subject = bench(net, torch.rand(8, 4))
    ctx = Context(train=subject.data.view(), task=subject.task)
    with pytest.raises(PlanError, match=r"layers for dqa must be plain Linear, .*; 1 is a Fails"):
        DQA().seal(net, ctx)
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(p.requires_grad for p in net.parameters()) and type(net[0]) is nn.Linear


def test_refusals_say_what_to_do() -> None:
    x = torch.rand(8, 4)
    with pytest.raises(PlanError, match="must call a linear or convolution layer"):
        apply(DQA(), bench(nn.Sequential(nn.Flatten(), nn.Softmax(1)), x))
    twice = apply(DQA(), bench(nn.Sequential(nn.Linear(4, 3)), x))
    with pytest.raises(PlanError, match="is a GridLinear"):
        apply(DQA(), replace(twice, shelf=None))
    with pytest.raises(PlanError, match="must have data to calibrate on"):
        DQA().seal(nn.Linear(4, 3), Context())


def test_a_layer_called_twice_has_one_range() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

    net = Twice()
    nn.init.constant_(net.inner.weight, -0.5)
    grid = apply(DQA(), bench(net, torch.tensor([[0.0], [1.0], [4.0]]))).model.inner.grid
    assert (float(grid.low), float(grid.high)) == (-2.0, 4.0)


def test_calibration_moves_no_statistics_and_no_modes() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    subject.model.train()
    ctx = Context(train=subject.data.view(), task=subject.task)
    before = copy.deepcopy(subject.model.state_dict())
    made = DQA(examples=16, ranking="random").seal(subject.model, ctx)
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in before.items())
    assert made.block1.norm.training and all(p.requires_grad for p in made.parameters())


def test_rests_that_calibration_never_met_have_codes() -> None:
    x = torch.tensor([[0.0, 1.0]] * 20)  # the only rests are 0 and 7
    layer = apply(DQA(bits=2, extra=3, important=1.0), bench(nn.Sequential(nn.Linear(2, 3)), x)).model[0]
    other = torch.rand(100, 2)
    assert torch.equal(decode(layer, encode(layer, other)), layer.grid(other))
    assert int(layer.grid.lengths[0]) < int(layer.grid.lengths[3])


def test_the_table_is_made_on_calibration_counts() -> None:
    torch.manual_seed(7)
    x = torch.randn(200, 4) ** 3
    made = apply(DQA(bits=2, extra=3, important=1.0, examples=200), bench(nn.Sequential(nn.Linear(4, 3)), x)).model
    step = (x.max() - x.min()) / 31
    rests = ((x - x.min()) / step).round().clamp(0, 31).long() % 8
    assert made[0].grid.lengths.tolist() == code_lengths(torch.bincount(rests.flatten(), minlength=8) + 1).tolist()
