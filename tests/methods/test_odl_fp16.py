"""`odl-fp16`: primitives against autograd, sums against numpy's float16, steps against the core, cycles by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.fit import fit
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Budget, Examples
from cupel.engines.odl_fp16 import MOST_SCALE, OdlFp16, ShapeJob, StepJob
from cupel.nets.ds_cnn import DsCnn
from cupel.nets.resnet8 import ResNet8, without_norms
from cupel.ops.accelerator import device
from cupel.ops.cluster import moved_values, multiply_cycles, step_time
from cupel.ops.half import BF16, FP16, FP32, on_grid, quick_product, rounded, simd_product
from cupel.ops.half_training import Numerics, emulated, updated
from cupel.ops.ledger import ledger_of
from cupel.ops.lowered import Conv, Step, backward_of, conv_forward, conv_input_grad, conv_weight_grad, training_steps
from cupel.ops.products import Product

torch.set_num_threads(1)
ON = device("pulp-cluster")
TASK = Classification(5)


def random(*shape: int, seed: int = 0, **how: object) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **how)


CASES = [  # channels in and out, kernel, stride, padding, groups
    (3, 4, (3, 3), (1, 1), (1, 1), 1),
    (4, 6, (3, 3), (2, 2), (1, 1), 2),
    (5, 5, (3, 3), (1, 1), (1, 1), 5),
    (6, 12, (3, 3), (2, 1), (0, 1), 6),
    (4, 3, (1, 1), (1, 1), (0, 0), 1),
    (4, 3, (1, 1), (2, 2), (0, 0), 1),
    (2, 3, (4, 2), (2, 2), (2, 0), 1),
    (2, 3, (2, 2), (3, 3), (0, 0), 1),
]


@pytest.mark.parametrize("case", CASES)
def test_three_products_of_a_convolution_are_autograds(case):
    ins, outs, kernel, stride, padding, groups = case
    x = random(2, ins, 9, 8, dtype=torch.float64).requires_grad_()
    w = random(outs, ins // groups, *kernel, seed=1, dtype=torch.float64).requires_grad_()
    y = F.conv2d(x, w, None, stride, padding, 1, groups)
    grad = random(*y.shape, seed=2, dtype=torch.float64)
    to_x, to_w = torch.autograd.grad(y, (x, w), grad)
    conv = Conv(stride, padding, groups)
    assert torch.allclose(conv_forward(x, w, conv), y, atol=1e-8)
    assert torch.allclose(conv_weight_grad(x, grad, kernel, conv), to_w, atol=1e-8)
    assert torch.allclose(conv_input_grad(grad, w, (9, 8), conv), to_x, atol=1e-8)


def test_rounding_is_numpys():
    draw = np.random.default_rng(0)
    x = draw.standard_normal(20_000) * np.exp2(draw.integers(-30, 18, 20_000))
    x = np.concatenate([x, [0.0, -0.0, 65519.9, 65520.0, -65520.0, 2.0**-25, 2.0**-25 * 1.01, np.inf, -np.inf, 1e300]])
    with np.errstate(over="ignore"):
        want = x.astype(np.float16).astype(np.float64)
    got = rounded(torch.from_numpy(x.copy()), FP16).numpy()
    assert np.array_equal(got, want) and np.array_equal(np.signbit(got), np.signbit(want))
    assert math.isnan(rounded(torch.tensor([math.nan], dtype=torch.float64), FP16).item())
    floats = random(5000)
    assert torch.equal(rounded(floats.double(), BF16).float(), floats.bfloat16().float())
    assert torch.equal(rounded(floats.double(), FP32).float(), floats)


@pytest.mark.parametrize("depth", [1, 6, 31])
def test_sums_keep_the_order_of_simd_instructions(depth):
    a, b = random(3, depth).half(), random(depth, 4, seed=1).half()
    x, y = a.double().numpy(), b.double().numpy()
    lanes = [np.zeros((3, 4), np.float16), np.zeros((3, 4), np.float16)]
    wide = np.zeros((3, 4), np.float32)
    for k in range(0, depth - 1, 2):
        for lane in (0, 1):
            product = x[:, k + lane : k + lane + 1] * y[k + lane : k + lane + 1]
            lanes[lane] = (lanes[lane].astype(np.float64) + product).astype(np.float16)
        pair = x[:, k : k + 1] * y[k : k + 1] + x[:, k + 1 : k + 2] * y[k + 1 : k + 2]
        wide = (wide.astype(np.float64) + pair).astype(np.float32)
    narrow = lanes[0] + lanes[1]
    if depth % 2:
        last = x[:, -1:] * y[-1:]
        narrow, wide = last.astype(np.float16) + narrow, (wide.astype(np.float64) + last).astype(np.float32)
    assert np.array_equal(simd_product(a, b, FP16, wide=False).numpy(), narrow.astype(np.float32))
    assert np.array_equal(simd_product(a, b, FP16, wide=True).numpy(), wide.astype(np.float16).astype(np.float32))
    assert torch.allclose(quick_product(a, b, FP16), simd_product(a, b, FP16, wide=True), rtol=2e-3, atol=2e-3)


def test_narrow_sums_stand_still_where_wide_ones_go_on():
    ones = torch.ones(1, 10_000)
    assert simd_product(ones, ones.T, FP16, wide=False).item() == 4096  # two sums of at most 2048
    assert simd_product(ones, ones.T, FP16, wide=True).item() == 10_000
    assert simd_product(100 * ones[:, :64], 100 * ones.T[:64], FP16, wide=False).item() == math.inf


def small(seed: int = 0) -> nn.Sequential:
    with Context(seed=seed).scope("net"):
        layers = (
            nn.Conv2d(2, 6, 3, 2, 1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False),
        )
        return nn.Sequential(*layers, nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))


DATA = Examples(random(48, 2, 8, 8), torch.arange(48) % 5, torch.arange(48))


def batches(seed: int = 0, size: int = 16) -> list[Batch]:
    return list(DATA.batches(size, Context(seed=seed, path=("fit",)).rng("order")))


def test_steps_in_float32_are_those_of_the_core():
    budget = Budget(epochs=1, batch_size=16, optimizer="sgd", lr=0.1, momentum=0.0)
    want = fit(small(), DATA, TASK, budget=budget, seed=3).state_dict()
    before = torch.get_rng_state()
    model = small()
    got = OdlFp16(form="fp32").run(StepJob(model, batches(3), TASK, 0.1), Context(seed=3, path=("fit",)))
    assert all(torch.equal(v, want[k]) for k, v in got.model.state_dict().items())
    assert torch.equal(before, torch.get_rng_state()) and not got.model.training
    fresh = small().state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("form", [FP16, BF16])
@pytest.mark.parametrize("sums", ["wide", "narrow"])
def test_everything_in_a_step_is_of_the_format(form, sums):
    seen: list[torch.Tensor] = []
    model = small()
    for layer in model:
        layer.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    trace = OdlFp16(form=form.name, sums=sums).run(StepJob(model, batches()[:2], TASK, 0.1), Context())
    seen += list(trace.model.parameters())
    assert len(seen) == 2 * 8 + 7 and all(torch.equal(on_grid(t, form), t) for t in seen)
    full = OdlFp16(form="fp32").run(StepJob(small(), batches()[:2], TASK, 0.1), Context())
    for p, q in zip(trace.model.parameters(), full.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=0.02 if form == FP16 else 0.1)
    assert any(not torch.equal(p, q) for p, q in zip(trace.model.parameters(), full.model.parameters(), strict=True))


def test_gradients_round_after_every_call():
    x = torch.tensor([1.0, 1 + 2.0**-10]).requires_grad_()
    with emulated(Numerics(FP16)):
        y = x * 3
        z = y / 7
    third = np.float16(np.float32(1) / np.float32(7))
    assert z.tolist() == [
        float(np.float16(np.float16(v) / np.float32(7))) for v in (np.float16(3), np.float16(3 + 3 * 2.0**-10))
    ]
    (grad,) = torch.autograd.grad(z.sum(), x)
    assert grad.tolist() == [float(np.float16(third * np.float32(3)))] * 2


def test_the_backward_meets_what_was_kept_in_the_format():
    x = on_grid(random(500), FP16).requires_grad_()
    with emulated(Numerics(FP16)):
        y = x.exp()
    (grad,) = torch.autograd.grad(y, x, torch.full((500,), 3.0))
    kept = np.exp(x.detach().numpy()).astype(np.float16).astype(np.float32)
    assert (grad.numpy() == 3 * kept).mean() > 0.99  # another library's exp may round differently


def test_layers_have_the_gradients_of_float32_to_rounding():
    x, image = on_grid(random(7, 6), FP16).requires_grad_(), on_grid(random(2, 4, 6, 6, seed=1), FP16).requires_grad_()
    for layer, into in ((nn.Linear(6, 5), x), (nn.Conv2d(4, 6, 3, 2, 1, groups=2), image)):
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(on_grid(p, FP16))
        want = torch.autograd.grad(layer(into).square().sum(), [into, *layer.parameters()])
        for sums in (True, False):
            with emulated(Numerics(FP16, wide=sums)):
                out = layer(into).square().sum()
            got = torch.autograd.grad(out, [into, *layer.parameters()])
            assert all(torch.allclose(g, w, rtol=0.01, atol=0.02) for g, w in zip(got, want, strict=True))


def test_sums_are_those_that_were_asked_for():
    a, b = on_grid(random(4, 301), FP16), on_grid(random(301, 5, seed=1), FP16)
    assert torch.equal(Numerics(FP16, wide=False).multiply(a, b), simd_product(a, b, FP16, wide=False))
    assert torch.equal(Numerics(FP16, ordered=True).multiply(a, b), simd_product(a, b, FP16, wide=True))
    assert torch.equal(Numerics(BF16).multiply(a, b), quick_product(a, b, BF16))
    assert not torch.equal(Numerics(FP16, wide=False).multiply(a, b), Numerics(FP16).multiply(a, b))


def test_one_step_of_a_linear_layer_by_hand():
    layer = nn.Linear(6, 5)
    x, y = random(4, 6, seed=5).half().numpy(), np.array([0, 3, 4, 1])
    w, b = (p.detach().half().numpy() for p in (layer.weight, layer.bias))
    logits = ((x.astype(np.float32) @ w.T.astype(np.float32)).astype(np.float16) + b).astype(np.float32)
    logged = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    slope = (np.exp(logged.astype(np.float16).astype(np.float32)) - np.eye(5, dtype=np.float32)[y]) / 4
    slope = slope.astype(np.float16).astype(np.float32)
    grad_w = (slope.T @ x.astype(np.float32)).astype(np.float16).astype(np.float64)
    grad_b = slope.sum(0).astype(np.float16).astype(np.float64)
    rate = float(np.float32(0.3))
    batch = Batch(torch.from_numpy(x).float(), torch.from_numpy(y), torch.arange(4))
    got = OdlFp16().run(StepJob(layer, [batch], TASK, 0.3), Context()).model
    for found, old, grad in ((got.weight, w, grad_w), (got.bias, b, grad_b)):
        want = (old.astype(np.float64) - rate * grad).astype(np.float16)
        # The exponential of another library may round one gradient differently.
        assert (found.detach().numpy() == want).mean() > 0.9 and np.allclose(found.detach().numpy(), want, atol=2e-3)


def test_updates_round_once_and_may_vanish():
    w, g = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([2.0**-11, 2.0**-11 * 1.5, 0.0])
    assert updated(w, g, 1.0, FP16).tolist() == [1 - 2.0**-11, 1 - 2.0**-11 * 2, -2.0]  # below one, halves lie closer
    assert updated(w, -g, 1.0, FP16).tolist() == [1.0, 1 + 2.0**-10, -2.0]  # a tie goes to the even one
    assert torch.equal(updated(w, g, 0.5, FP32), w - 0.5 * g)
    still = OdlFp16().run(StepJob(small(), batches()[:1], TASK, 1e-9), Context())
    assert still.unmoved > 0.99 and OdlFp16().run(StepJob(small(), batches()[:1], TASK, 1.0), Context()).unmoved < 0.1


def test_weights_without_a_gradient_are_not_counted_as_unmoved():
    batch = Batch(torch.zeros(8, 6), torch.arange(8) % 5, torch.arange(8))
    assert OdlFp16().run(StepJob(nn.Linear(6, 5), [batch], TASK, 1.0), Context()).unmoved == 0.0


class Faint(nn.Module):
    """A linear layer whose outputs, and so whose gradients, are divided by a large number."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by, self.layer = by, nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / self.by


def test_scaling_saves_faint_gradients_and_stops_at_the_first_overflow():
    batch = Batch(random(8, 6), torch.arange(8) % 5, torch.arange(8))
    faint = StepJob(Faint(2.0**19), [batch] * 6, TASK, 1.0)
    plain, scaled = (OdlFp16(scaling=s).run(faint, Context()) for s in ("none", "dynamic"))
    assert plain.scales == (1.0,) * 6 and scaled.scales == (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    assert plain.underflowed > 2 * scaled.underflowed > 0 and plain.skipped == scaled.skipped == 0
    fierce = OdlFp16(scaling="dynamic").run(StepJob(Faint(2.0**-12), [batch] * 9, TASK, 2.0**-20), Context())
    at = next(i for i in range(8) if fierce.scales[i + 1] < fierce.scales[i])
    assert fierce.skipped >= 1 and fierce.scales[: at + 1] == tuple(2.0**i for i in range(at + 1))
    assert max(fierce.scales[at + 1 :]) == fierce.scales[at] / 2  # never doubled again
    assert all(p.isfinite().all() for p in fierce.model.parameters())
    calm = OdlFp16(scaling="dynamic").run(StepJob(Faint(2.0**19), [batch] * 18, TASK, 1.0), Context())
    assert calm.scales[-1] == MOST_SCALE


def test_scaled_training_ends_where_plain_training_does():
    job = StepJob(small(), batches() * 2, TASK, 0.1)
    plain, scaled = (OdlFp16(scaling=s).run(job, Context()) for s in ("none", "dynamic"))
    assert scaled.scales[-1] == 32 and scaled.skipped == 0
    for p, q in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=5e-3)


def test_a_scaled_step_moves_weights_as_far():
    batch = Batch(random(8, 6), torch.arange(8) % 5, torch.arange(8))
    model = nn.Linear(6, 5)
    moved = []
    for scale in (1.0, 64.0):
        how = Numerics(FP16)
        with emulated(how):
            loss = TASK.loss(model(on_grid(batch.inputs, FP16)), batch)
        (grad,) = torch.autograd.grad(loss, [model.weight], torch.tensor(scale))
        moved.append(updated(on_grid(model.weight.detach(), FP16), on_grid(grad, FP16), 0.5 / scale, FP16))
    assert torch.equal(*moved)


def test_underflow_is_counted_against_exact_sums():
    how = Numerics(FP16)
    a, b = torch.tensor([[2.0**-14, 0.0], [0.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0**-12], [1.0]])
    assert how.counted(a, b).tolist() == [[0.0], [0.0], [1.0]]
    assert (how.underflowed, how.gradients) == (1, 3)


def test_what_is_kept_for_the_backward_takes_half_the_bytes():
    net = ResNet8(2, 5, width=4, norm=False)
    half, full = (OdlFp16(form=f).run(StepJob(net, batches()[:1], TASK), Context()) for f in ("fp16", "fp32"))
    inputs = 16 * (2 * 64 + 3 * 4 * 64 + 2 * 8 * 16 + 2 * 16 * 4 + 16)  # of all layers; the rest belongs to the loss
    assert 4 * inputs < full.saved_bytes < 4 * inputs * 1.02
    assert half.saved_bytes == pytest.approx(full.saved_bytes / 2, rel=0.01)


def test_products_by_hand():
    p = Product(16, 144, 100, 1, 9, 1600, 1600, 2304)
    # 2 rows a core; 25 tiles of 2 x 4 with 72 turns of 8 multiply-adds and 6 loads, 8 sums, 4 stores and 10 more
    quick = replace(ON, figures={**ON.figures, "fpus": 8})
    assert multiply_cycles(p, FP16, quick) == 25 * (72 * 14 + 8 + 4 + 10)
    assert multiply_cycles(p, FP32, quick) == 25 * (144 * 14 + 8 + 10)
    assert multiply_cycles(p, FP16, ON) == 16 * 100 * 73 / 4  # four shared units are the limit
    odd = Product(1, 9, 5, 8, 9, 100, 40, 72)  # a channel for every core: a tile of 1 x 4 and one of 1 x 1
    assert multiply_cycles(odd, FP16, quick) == math.ceil((5 * 9 + 4 + 2 + 10) + (5 * 3 + 1 + 0.5 + 10))
    assert multiply_cycles(replace(odd, groups=9), FP16, quick) == 2 * 88
    wide = Product(1, 10, 80, 1, 1, 800, 80, 10)  # one row: the columns are shared, 10 on a core
    assert multiply_cycles(wide, FP32, quick) == 2 * (10 * 9 + 4 + 10) + 10 * 5 + 2 + 10
    nine = Product(9, 10, 1, 1, 1, 10, 9, 90)  # nine rows on eight cores: one core has two
    assert multiply_cycles(nine, FP32, ON) == 10 * 5 + 2 + 10


def test_transforms_of_each_product():
    conv = Product(8, 36, 100, 1, 9, 400, 800, 288)
    steps = {kind: Step("c", kind, p) for kind, p in zip(("FW", "WG", "IG"), (conv, *backward_of(conv)), strict=True)}
    assert [moved_values(steps[k], conv, FP16, ON) for k in steps] == [[3600], [3600], [72 * 100, 288]]
    point = Product(8, 4, 100, 1, 1, 400, 800, 32)
    kinds = {kind: Step("p", kind, p) for kind, p in zip(("FW", "WG", "IG"), (point, *backward_of(point)), strict=True)}
    assert [moved_values(kinds[k], point, FP16, ON) for k in kinds] == [[400], [], [800, 32]]
    assert [moved_values(kinds[k], point, FP32, ON) for k in kinds] == [[], [], []]
    time = step_time(steps["IG"], conv, FP16, ON)
    assert time.transform == 900 * 6 + 200 + 36 * 6 + 200
    assert time.cycles == time.multiply + time.transform > time.transfer and time.macs == conv.macs
    assert step_time(steps["WG"], conv, FP16, ON).update == 18 * 4 + 200
    slow = replace(ON, figures={**ON.figures, "dma_bytes_per_cycle": 0.01})
    moved = (288 + 400 + 800) * 2 / 0.01
    assert step_time(steps["FW"], conv, FP16, slow).cycles == moved + 50
    assert (
        step_time(steps["FW"], conv, FP16, replace(slow, figures={**slow.figures, "l1_bytes": 4096})).cycles
        > moved + 50
    )


def test_products_of_a_training_step():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Flatten())
    net.append(nn.Linear(8 * 16, 5))
    products = ledger_of(net, torch.zeros(1, 3, 8, 8)).products()
    steps = training_steps(products)
    assert [(s.name, s.kind) for s in steps] == [
        *(("0", "FW"), ("2", "FW"), ("4", "FW"), ("4", "WG"), ("4", "IG"), ("2", "WG"), ("2", "IG"), ("0", "WG"))
    ]
    shapes = {(s.name, s.kind): (s.product.groups, s.product.rows, s.product.depth, s.product.cols) for s in steps}
    assert shapes["2", "IG"] == (8, 1, 9, 16) and shapes["2", "WG"] == (8, 1, 16, 9)
    assert shapes["4", "IG"] == (1, 128, 5, 1) and shapes["4", "WG"] == (1, 5, 1, 128)
    assert shapes["0", "WG"] == (1, 8, 16, 27)
    last = OdlFp16().run(ShapeJob(tuple(products), frozen=("0", "2")), Context())
    assert [(t.step.name, t.step.kind) for t in last.steps][3:] == [("4", "WG")]
    held = training_steps(products, frozen=("2",))
    assert [(s.name, s.kind) for s in held][3:] == [("4", "WG"), ("4", "IG"), ("2", "IG"), ("0", "WG")]
    assert backward_of(products[0][1])[1].cols == 64  # all positions of the input, where the output has a quarter
    whole = OdlFp16().run(ShapeJob(tuple(products)), Context())
    assert whole.memory.weights == 2 * (216 + 72 + 640) == last.memory.weights
    assert last.memory.gradients == 2 * 640 and last.memory.activations == 2 * 128
    assert whole.memory.unfolded == 2 * 8 * 9 * 16 and whole.cycles > last.cycles


def test_both_networks_of_the_paper():
    runs = {}
    for name, net, image in (("resnet8", ResNet8(3, 10), (3, 32, 32)), ("ds-cnn", DsCnn(12), (1, 49, 10))):
        products = tuple(ledger_of(net.eval(), torch.zeros(1, *image)).products())
        runs[name] = [OdlFp16(form=f).run(ShapeJob(products), Context()) for f in ("fp16", "fp32")]
        half, full = runs[name]
        assert full.memory.total == 2 * half.memory.total and 1 < full.cycles / half.cycles < 2
        assert half.milliseconds == pytest.approx(half.cycles / 3.7e5)
    assert runs["resnet8"][0].macs_per_cycle > runs["ds-cnn"][0].macs_per_cycle


def test_norms_fold_into_the_convolutions():
    net = ResNet8(1, 5, width=4).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = random(2, 1, 8, 8)
    assert torch.allclose(net(x), without_norms(net)(x), atol=1e-5)


def test_what_cannot_be_trained_is_refused():
    frozen = copy.deepcopy(small()).requires_grad_(False)
    with pytest.raises(PlanError, match="must have a parameter to train"):
        OdlFp16().run(StepJob(frozen, batches()[:1], TASK), Context())
    wide = nn.Sequential(nn.Conv2d(2, 5, 3, dilation=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="must have dilation 1"):
        OdlFp16().run(StepJob(wide, batches()[:1], TASK), Context())
    partly = small()
    partly[:4].requires_grad_(False)
    trace = OdlFp16().run(StepJob(partly, batches()[:2], TASK, 0.5), Context())
    assert torch.equal(trace.model[0].weight, on_grid(partly[0].weight, FP16))
    assert not torch.equal(trace.model[-1].weight, on_grid(partly[-1].weight, FP16))
