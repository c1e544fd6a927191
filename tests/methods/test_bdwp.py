"""bdwp against slow NumPy training with two masks, torch's own gradients of masked layers, and counts of products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError
from cupel.core.fit import Loop, fit
from cupel.core.protocols import Hook
from cupel.core.shelf import MASKS, Shelf
from cupel.core.slots import Hooks, phase
from cupel.core.tasks import Classification
from cupel.core.types import Bounds, Budget
from cupel.nets.convnet import ConvNet
from cupel.nets.mlp import Mlp
from cupel.ops.accelerator import Device, device
from cupel.ops.ledger import ledger_of
from cupel.ops.products import Product
from cupel.ops.sat import passes_of, sat, sat_step, sat_update, training_macs
from cupel.ops.two_way import run_two_way, two_way
from cupel.storage.state import load_into, save_model, size_of
from cupel.techniques.compress.bdwp import BDWP, both_masks, sparse_layers
from cupel.techniques.robust.adversarial_training import AdversarialTraining

torch.set_num_threads(1)
SGD = Budget(epochs=2, batch_size=20, optimizer="sgd", lr=0.2, momentum=0.9)


def mlp(*sizes: int) -> Mlp:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Mlp(sizes[0], sizes[1:-1], sizes[-1])


def data() -> tuple[Tensor, Tensor]:
    x = torch.rand(60, 1, 2, 4, generator=torch.Generator().manual_seed(2))
    return x, (x.flatten(1)[:, :4].sum(1) > 2).long()


def moment(model: nn.Module, hook: Any) -> Loop:
    at = Loop(model, Classification(2), Hooks([("bdwp", hook)]), SGD, 20, Context())
    hook.start(at)
    return at


def slow_masks(w: np.ndarray, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    ff, bp = np.zeros_like(w), np.zeros_like(w)
    for o in range(len(w)):
        for low in range(0, w.shape[1], m):
            ff[o, low + np.argsort(-np.abs(w[o, low : low + m]), kind="stable")[:n]] = 1
    for i in range(w.shape[1]):
        for low in range(0, len(w), m):
            bp[low + np.argsort(-np.abs(w[low : low + m, i]), kind="stable")[:n], i] = 1
    return ff, bp


@dataclass(frozen=True)
class Order:
    """The batches of a fit."""

    seen: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Order(self)


class _Order(Hook):
    def __init__(self, order: Order) -> None:
        self.order = order

    @phase("augment")
    def batch(self, batch: Any, at: Any) -> Any:
        self.order.seen.append((batch.inputs.flatten(1).double().numpy(), batch.targets.numpy()))
        return batch


@pytest.mark.parametrize(("backward", "decay"), [("sparse", 0.0), ("sparse", 0.3), ("exact", 0.3)])
def test_a_fit_is_slow_numpy_training_with_two_masks(backward: str, decay: float) -> None:
    model, order = mlp(8, 8, 12, 2).double(), Order()
    w = [m.weight.detach().numpy().copy() for m in model.modules() if isinstance(m, nn.Linear)]
    b = [m.bias.detach().numpy().copy() for m in model.modules() if isinstance(m, nn.Linear)]
    x, y = data()
    shelf = Shelf()
    bdwp = BDWP(n=1, m=4, decay=decay, backward=backward)
    made = fit(model, (x.double(), y), Classification(2), techniques=[order, bdwp], budget=SGD, shelf=shelf)
    speed = [np.zeros_like(p) for p in (*w, *b)]
    for inputs, targets in order.seen:
        ff, bp = slow_masks(w[1], 1, 4)
        bp = bp if backward == "sparse" else ff
        one = inputs @ w[0].T + b[0]
        two = np.maximum(one, 0) @ (w[1] * ff).T + b[1]
        out = np.maximum(two, 0) @ w[2].T + b[2]
        p = np.exp(out - out.max(1, keepdims=True))
        d3 = (p / p.sum(1, keepdims=True) - np.eye(2)[targets]) / len(targets)
        d2 = d3 @ w[2] * (two > 0)
        d1 = d2 @ (w[1] * bp) * (one > 0)
        steps = [d1.T @ inputs, d2.T @ np.maximum(one, 0) + decay * (1 - ff) * w[1], d3.T @ np.maximum(two, 0)]
        for i, g in enumerate([*steps, d1.sum(0), d2.sum(0), d3.sum(0)]):
            speed[i] = 0.9 * speed[i] + g
            (w + b)[i][...] -= 0.2 * speed[i]
    assert len(order.seen) == 6
    last = slow_masks(w[1], 1, 4)[0]
    found = [m.weight.detach().numpy() for m in made.modules() if isinstance(m, nn.Linear)]
    assert np.allclose(found[0], w[0]) and np.allclose(found[1], w[1] * last) and np.allclose(found[2], w[2])
    assert np.array_equal(shelf.get(MASKS)["block2.linear.weight"].numpy(), last)
    assert set(shelf.get(MASKS)) == {"block2.linear.weight"}


LAYERS = [
    (nn.Linear(8, 4), (5, 8)),
    (nn.Linear(8, 4, bias=False), (2, 3, 8)),
    (nn.Conv1d(8, 8, 3, stride=2, padding=1, dilation=2, groups=2), (2, 8, 9)),
    (nn.Conv2d(4, 8, (3, 2), stride=(1, 2), padding=(1, 0), bias=False), (2, 4, 6, 5)),
    (nn.Conv2d(4, 4, 3, padding="same"), (2, 4, 5, 5)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3), (4, 6, 5)),
    (nn.Conv3d(4, 4, 2), (2, 4, 3, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(i) for i in range(len(LAYERS))])
def test_every_gradient_is_that_of_the_right_plain_layer(layer: Any, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ff, bp = both_masks(layer.weight, 2, 4)
    y = run_two_way(layer, x, ff, bp)
    dy = torch.randn_like(y)
    mine = torch.autograd.grad(y, [x, *layer.parameters()], dy)

    def plain(mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        masked = {"weight": layer.weight.detach() * mask}
        again = functional_call(layer, masked, (x,))
        return again, torch.autograd.grad(again, [x], dy)

    full = torch.autograd.grad(layer(x), list(layer.parameters()), dy)
    assert torch.allclose(y, plain(ff)[0]) and torch.allclose(mine[0], plain(bp)[1][0])
    assert not torch.equal(ff, bp) and not torch.allclose(plain(ff)[1][0], plain(bp)[1][0])
    assert all(torch.allclose(a, b) for a, b in zip(mine[1:], full, strict=True))


def test_masks_rank_groups_of_inputs_and_of_outputs() -> None:
    w = torch.randn(8, 12)
    ff, bp = both_masks(w, 2, 4)
    slow = slow_masks(w.numpy(), 2, 4)
    assert np.array_equal(ff.numpy(), slow[0]) and np.array_equal(bp.numpy(), slow[1])
    conv = torch.randn(8, 4, 3, 3)
    ff, bp = both_masks(conv, 1, 4)
    for i in range(3):
        for j in range(3):
            at = slow_masks(conv[:, :, i, j].numpy(), 1, 4)
            assert np.array_equal(ff[:, :, i, j].numpy(), at[0]) and np.array_equal(bp[:, :, i, j].numpy(), at[1])


def test_the_gradient_of_single_examples_is_that_of_one_at_a_time() -> None:
    model, (x, y) = mlp(8, 8, 8, 2), data()
    hook = BDWP(n=1, m=4).hook(Context())
    at = moment(model, hook)
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, p, (x[None],)), y[None])

    with hook.around_forward(at):
        whole = vmap(grad(loss), in_dims=(None, 0, 0))(params, x[:5], y[:5])
        for k in range(5):
            F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]).backward()
            for name, p in model.named_parameters():
                assert torch.allclose(whole[name][k], p.grad, atol=1e-6)
                p.grad = None
    conv = nn.Conv2d(4, 8, 3)
    masks, images = both_masks(conv.weight, 1, 4), torch.randn(5, 4, 6, 6)

    def one(w: Tensor, x: Tensor) -> Tensor:
        return two_way(x[None], w, *masks, None, ((1, 1), (0, 0), (1, 1), 1)).square().sum()

    found = vmap(grad(one), in_dims=(None, 0))(conv.weight.detach(), images)
    assert torch.allclose(found.sum(0), grad(lambda w: sum(one(w, i) for i in images))(conv.weight.detach()), atol=1e-3)


def test_masks_are_made_once_an_update_and_attacks_follow_the_backward_mask() -> None:
    model, (x, y) = mlp(8, 8, 8, 2), data()
    hook = BDWP(n=1, m=4).hook(Context())
    at = moment(model, hook)
    with hook.around_forward(at):
        first = hook.made["block2.linear"]
    inputs = x[:6].clone().requires_grad_()
    with hook.around_forward(at):
        assert hook.made["block2.linear"] is first
        seen = torch.autograd.grad(F.cross_entropy(model(inputs), y[:6]), inputs)[0]
    with torch.no_grad():
        model.block2.linear.weight.mul_(2.0)
    with hook.around_forward(at):
        assert hook.made["block2.linear"] is not first
        model.block2.linear.weight.data.neg_()
    at.step += 1
    again = hook.made["block2.linear"]
    with hook.around_forward(at):
        assert hook.made["block2.linear"] is not again
    model = mlp(8, 8, 8, 2)
    w = model.block2.linear.weight
    ff, bp = both_masks(w.detach(), 1, 4)
    one = F.relu(model.block1.linear(inputs.flatten(1)))
    mid = F.linear(one, w * ff, model.block2.linear.bias)
    d_out = torch.autograd.grad(F.cross_entropy(model.head(F.relu(mid)), y[:6]), mid)[0]
    d_one = d_out @ (w * bp) * (one > 0)
    assert torch.allclose(seen, (d_one @ model.block1.linear.weight).view_as(seen), atol=1e-7)


def test_it_trains_beside_adversarial_training_and_in_half_precision() -> None:
    for extra, budget in (
        ([AdversarialTraining(eps=0.05, steps=2, method="trades")], SGD),
        ([], replace(SGD, precision="bf16-mixed")),
    ):
        made = fit(
            mlp(8, 8, 8, 2), data(), Classification(2), techniques=[*extra, BDWP(n=1, m=4)], budget=budget,
            bounds=Bounds(0.0, 1.0),
        )  # fmt: skip
        w = made.block2.linear.weight
        assert w.dtype == torch.float32 and bool(((w != 0).view(8, 2, 4).sum(-1) == 1).all())


def test_autocast_computes_in_its_type_like_the_plain_layer() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(3, 8, requires_grad=True)
    ones = torch.ones(8, 8, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        mine, plain = run_two_way(layer, x, ones, ones), layer(x)
    assert mine.dtype == plain.dtype == torch.bfloat16 and torch.equal(mine, plain)
    a, b = (torch.autograd.grad(o.float().square().sum(), [x, layer.weight]) for o in (mine, plain))
    assert all(
        torch.allclose(p, q, rtol=0.02, atol=0.02) and p.dtype == torch.float32 for p, q in zip(a, b, strict=True)
    )


class Strange(nn.Module):
    """A network with layers that must stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.twin, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.twin.weight
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.frozen = nn.Linear(8, 8)
        self.frozen.weight.requires_grad_(False)
        self.depthwise, self.grouped = nn.Conv1d(8, 8, 1, groups=8), nn.Conv1d(8, 8, 1, groups=2)
        self.narrow = nn.Conv1d(8, 4, 1, groups=2)  # two outputs a group
        self.lent = nn.Linear(8, 8)
        self.encode = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.twin(self.first(x.flatten(2))))
        x = self.attend(x, x, x)[0] + F.linear(x, self.lent.weight)
        x = self.grouped(self.depthwise(self.frozen(x).transpose(1, 2))).transpose(1, 2)
        return self.head(self.encode(x).mean(1))


def test_layers_that_cannot_be_sparse_stay_dense() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Strange()
    assert set(sparse_layers(model, 4)) == {"grouped", "lent", "encode.linear1", "encode.linear2"}
    assert set(sparse_layers(model, 8)) == {"lent", "encode.linear1", "encode.linear2"}
    shelf = Shelf()
    made = fit(model, data(), Classification(2), techniques=[BDWP(n=1, m=4)], budget=SGD, shelf=shelf)
    assert set(shelf.get(MASKS)) == {f"{n}.weight" for n in ("grouped", "encode.linear1", "encode.linear2")}
    assert bool((made.lent.weight != 0).all())  # its layer never ran: the weight was read past it


def test_no_way_past_the_layers_in_evaluation() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), data()[0][:, 0]
    x = x.repeat(1, 1, 2)
    hook = BDWP(n=1, m=4).hook(Context())
    at = moment(model.eval(), hook)
    with torch.no_grad(), hook.around_forward(at):
        seen = model(x)
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() and not torch.allclose(seen, model(x), atol=1e-4)
    for name, layer in sparse_layers(model, 4).items():
        assert isinstance(layer, nn.Linear)
        layer.weight.data *= hook.made[name][1]
    assert torch.allclose(seen, model(x), atol=1e-5)


def test_everything_is_put_back_after_an_error() -> None:
    model = mlp(8, 8, 8, 2)
    hook = BDWP(n=1, m=4).hook(Context())
    at = moment(model, hook)
    model.block2.linear.forward = mine = lambda x: x  # somebody else's
    with pytest.raises(RuntimeError), hook.around_forward(at):
        assert model.block2.linear.forward is not mine
        model(torch.zeros(1, 5))
    assert model.block2.linear.forward is mine
    del model.block2.linear.forward
    assert all("forward" not in m.__dict__ for m in model.modules())


@dataclass(frozen=True)
class Zeros:
    """Share of zeros in the sparse layer after every update, as techniques behind in the list see it."""

    seen: list[float] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Zeros(self)


class _Zeros(Hook):
    def __init__(self, zeros: Zeros) -> None:
        self.zeros = zeros

    @phase("mask")
    def stepped(self, at: Any) -> None:
        self.zeros.seen.append(float((at.model.block2.linear.weight == 0).double().mean()))


def test_the_master_is_dense_until_the_last_update() -> None:
    zeros = Zeros()
    fit(mlp(8, 8, 8, 2), data(), Classification(2), techniques=[BDWP(n=1, m=4), zeros], budget=SGD)
    assert zeros.seen == [0.0] * 5 + [0.75]


def test_neutral_ratio_and_refusals() -> None:
    plain = fit(mlp(8, 8, 8, 2), data(), Classification(2), budget=SGD)
    shelf = Shelf()
    same = fit(mlp(8, 8, 8, 2), data(), Classification(2), techniques=[BDWP(n=4, m=4)], budget=SGD, shelf=shelf)
    assert dict(shelf.get(MASKS)) == {}
    pairs = zip(plain.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ParamError, match="n of bdwp must be at most m, 4; got 5"):
        BDWP(n=5, m=4).hook(Context())
    with pytest.raises(PlanError, match="a multiple of 16 inputs"):
        fit(mlp(8, 8, 8, 2), data(), Classification(2), techniques=[BDWP(n=2, m=16)], budget=SGD)


def test_the_network_is_stored_without_its_zeros(tmp_path: Path) -> None:
    dense, made = (
        fit(mlp(8, 64, 64, 2), data(), Classification(2), techniques=t, budget=SGD) for t in ([], [BDWP(n=1, m=8)])
    )
    assert size_of(dense) - size_of(made) > 64 * 64 * (4 * 7 / 8 - 1 / 8) - 300
    save_model(made, tmp_path / "made")
    again = load_into(mlp(8, 64, 64, 2), tmp_path / "made")
    assert torch.equal(again(data()[0]), made(data()[0]))


# What it saves: counts of products, and the array.


@pytest.mark.parametrize(("n", "m"), [(2, 8), (1, 4), (2, 4)])
def test_counted_training_work_is_that_of_the_stored_weights(n: int, m: int) -> None:
    net = ConvNet(1, 10, 8)
    products = ledger_of(net, torch.rand(3, 1, 8, 8)).products()
    for i, (name, p) in enumerate(products):
        w = net.get_submodule(name).weight
        dense = training_macs(p, None, None, first=i == 0)
        if name not in sparse_layers(net, m):
            continue
        ff, bp = both_masks(w.detach(), n, m)
        both, forward = (sum(training_macs(p, ff, b).values()) for b in (bp, None))
        total = sum(dense.values())
        assert both / total == pytest.approx((2 * n / m + 1) / 3)
        assert forward / total == pytest.approx((n / m + 2) / 3)
        stored = int((w * ff != 0).sum())
        assert training_macs(p, ff, bp)["forward"] == stored * p.cols and p.cols * w.numel() == p.macs
    assert len(sparse_layers(net, m)) == 2


def test_dense_training_work_is_what_torch_counts() -> None:
    net, x = mlp(8, 12, 16, 4), torch.rand(5, 8)
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    products = ledger_of(net, x).products()
    mine = sum(sum(training_macs(p, None, None, first=i == 0).values()) for i, (_, p) in enumerate(products))
    assert 2 * mine == counter.get_total_flops()
    steps = passes_of(products[1][1]).each()
    assert {s.macs for s in steps.values()} == {5 * 12 * 16}
    assert (steps["backward"].inputs, steps["backward"].outputs) == (5 * 16, 5 * 12)
    assert (steps["backward"].weights, steps["update"].weights, steps["update"].outputs) == (192, 0, 192)


FREE = {"bytes_a_cycle": 1e9}


def array(r: int, c: int, **more: float) -> Device:
    found = device("sat-vcu1525")
    return Device("test", "", 1.0, {**found.figures, **FREE, "rows": r, "columns": c, **more})


def beats_of(r: int, c: int, high: int, deep: int, wide: int) -> tuple[int, int]:
    """Cycles of both ways to walk a product, one beat after the other."""

    def tiles(size: int, side: int) -> Iterator[int]:
        yield from range(0, size, side)

    outputs = sum(1 for _ in tiles(high, r) for _ in tiles(wide, c) for _ in range(deep))
    weights = sum(1 for _ in tiles(deep, r) for _ in tiles(high, c) for _ in range(max(wide, r)))
    return outputs + r + c, weights + r + c


@pytest.mark.parametrize("sizes", [(5, 24, 3), (9, 8, 40), (16, 40, 1), (3, 16, 7)])
def test_the_array_takes_the_shorter_of_two_walks(sizes: tuple[int, int, int]) -> None:
    p, on = Product(*sizes), array(4, 3)
    assert sat(p, on).cycles == min(beats_of(4, 3, *sizes))
    kept = beats_of(4, 3, sizes[0], sizes[1] // 8 * 2, sizes[2])
    assert sat(p, on, 2, 8).cycles == min(kept)
    slow = beats_of(4, 3, sizes[0], sizes[1] * 4, sizes[2])[0], beats_of(4, 3, *sizes)[1]
    assert sat(p, on, interleave=False).cycles == min(slow)
    assert sat(p, on, 2, 8).macs * 4 == sat(p, on).macs == p.macs
    assert sat(replace(p, groups=3), on).cycles - 7 == 3 * (sat(p, on).cycles - 7)
    assert sat(p, array(4, 3, rows=2)).memory_bytes < sat(p, on).memory_bytes < sat(p, on, 2, 8).memory_bytes


def test_both_walks_are_really_chosen() -> None:
    shapes = [(5, 24, 3), (9, 8, 40)]
    kinds = [int(np.argmin(beats_of(4, 3, *s))) for s in shapes]
    assert kinds == [0, 1]


def test_memory_bounds_what_arithmetic_does_not() -> None:
    p = Product(32, 64, 2, 1, 1, inputs=128, outputs=64, weights=2048)
    on = array(8, 8, bytes_a_cycle=4)
    dense, sparse = sat(p, on), sat(p, on, 2, 8)
    assert dense.traffic_bytes == 2 * (128 + 64 + 2048) and dense.cycles == ceil(dense.traffic_bytes / 4)
    assert sparse.traffic_bytes == 2 * (128 + 64) + 512 * 2 + 512 * 3 / 8  # values, and three bits of place for each
    assert dense.joules == pytest.approx(p.macs * on["mac_joules"] + dense.traffic_bytes * on["byte_joules"])
    update, lean = sat_update(800, on), sat_update(800, on, 2, 8)
    assert update.traffic_bytes == 800 * (16 + 2) and lean.traffic_bytes == 800 * 16 + 400 * 2 + 400 * 3 / 8
    assert update.cycles == update.traffic_bytes / 4
    assert sat_update(800, array(8, 8)).cycles == ceil(800 / on["update_lanes"])


def test_a_step_uses_n_of_m_where_the_method_does() -> None:
    net = mlp(8, 16, 16, 2)
    products = ledger_of(net, torch.rand(16, 8)).products()
    on, sparse = array(4, 4), dict.fromkeys(sparse_layers(net, 8), (2, 8))
    assert list(sparse) == ["block2.linear"]
    dense, both, ste = (sat_step(products, on, *s) for s in ((), (sparse,), (sparse, ("forward",))))
    assert set(dense["block1.linear"]) == {"forward", "update"} and len(dense["block2.linear"]) == 3
    fill = 8
    for name, used in (("forward", both), ("backward", both), ("forward", ste)):
        here = used["block2.linear"][name].cycles - fill
        assert 4 * here == dense["block2.linear"][name].cycles - fill
    assert ste["block2.linear"]["backward"] == dense["block2.linear"]["backward"]
    assert both["block2.linear"]["update"] == dense["block2.linear"]["update"]
    assert all(both[n] == dense[n] for n in ("block1.linear", "head"))
