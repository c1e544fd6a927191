"""`riscv-precision-scalable`: arithmetic against numpy bit for bit, layers against torch, cycles by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.engines.riscv_precision_scalable import HalfJob, IntegerJob, RiscvPrecisionScalable, ShapeJob
from cupel.nets.references import products_of
from cupel.nets.stepped import Entry, SteppedLayer, SteppedNet, in_integers
from cupel.ops.accelerator import device
from cupel.ops.integer_layers import IntLayer, codes_of, plain_sums_of, sums_of
from cupel.ops.lowered import Conv
from cupel.ops.multipliers import (
    digits,
    dot,
    fp16_dot,
    fp16_multiply,
    fp16_multiply_add,
    multiplier_of,
    patterns_of,
    product,
    requantized,
    values_of,
    wrapped,
)
from cupel.ops.precisions import FP16, macs_per_cycle, processor_time, simd_time, traffic_bytes
from cupel.ops.products import Product

torch.set_num_threads(1)
ON, RIVAL = device("precision-scalable-riscv"), device("xpulpnn")


def halves(pattern: torch.Tensor) -> np.ndarray:
    return pattern.numpy().astype(np.uint16).view(np.float16)


def same_bits(got: torch.Tensor, want: np.ndarray) -> bool:
    mine = halves(got)
    return bool(np.all((mine.view(np.uint16) == want.view(np.uint16)) | (np.isnan(mine) & np.isnan(want))))


def all_of(bits: int, signed: bool) -> torch.Tensor:
    return torch.arange(2**bits) - (2 ** (bits - 1) if signed else 0)


@pytest.mark.parametrize("digit", [1, 2, 3, 4])
@pytest.mark.parametrize("signed", [(True, True), (False, True), (False, False)])
def test_every_pair_of_narrow_integers(digit, signed):
    for bits in ((2, 2), (4, 4), (2, 6), (6, 4)):
        a, b = all_of(bits[0], signed[0])[:, None], all_of(bits[1], signed[1])[None]
        assert torch.equal(product(a, b, bits, digit, signed), a * b)


@pytest.mark.parametrize("bits", [(8, 8), (16, 16), (16, 4), (10, 8)])
def test_random_pairs_of_wide_integers(bits):
    draw = torch.Generator().manual_seed(bits[0])
    a, b = (torch.randint(-(2 ** (n - 1)), 2 ** (n - 1), (50_000,), generator=draw) for n in bits)
    a[0], b[0] = -(2 ** (bits[0] - 1)), -(2 ** (bits[1] - 1))
    assert torch.equal(product(a, b, bits), a * b)


def test_only_the_top_digit_is_signed():
    cut = digits(torch.tensor([-1, -128, 127]), 8)
    assert cut.tolist() == [[3, 0, 3], [3, 0, 3], [3, 0, 3], [-1, -2, 1]]
    assert digits(torch.tensor([255]), 8, signed=False).flatten().tolist() == [3, 3, 3, 3]


def test_dot_adds_in_32_bits_and_wraps():
    draw = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (3, 5, 40), generator=draw)
    b = torch.randint(0, 256, (3, 40, 7), generator=draw)
    want = torch.from_numpy(a.numpy() @ b.numpy())
    assert all(torch.equal(dot(a, b, (8, 8), digit, (True, False)), want) for digit in (2, 3, 4))
    large = torch.full((1, 4), -(2**15))
    got = dot(large, large.T, (16, 16))  # 4 * 2^30 = 2^32 is 0 in 32 bits
    assert got.item() == 0 and wrapped(torch.tensor(2**31)).item() == -(2**31)
    three = dot(large[:, :3], large.T[:3], (16, 16))
    assert three.item() == int(np.array(3 * 2**30).astype(np.int32))


def test_requantised_is_the_exact_quotient_with_halves_up():
    totals = torch.tensor([-5, -4, -3, 0, 3, 4, 5, 1000, -(2**31), 2**31 - 1])
    for scale in (0.5, 0.125, 0.3, 0.0007, 3.0):
        mult, shift = multiplier_of(scale)
        assert 2**30 <= mult < 2**31 and math.isclose(mult / 2**shift, scale, rel_tol=2**-31)
        want = [
            min(max(math.floor(Fraction(t * mult, 2**shift) + Fraction(1, 2)) + 3, -20), 100) for t in totals.tolist()
        ]
        assert requantized(totals, mult, shift, 3, -20, 100).tolist() == want
    with pytest.raises(ValueError, match="scale must be"):
        multiplier_of(0.0)


def patterns(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 65536, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_half_products_and_sums_are_numpys():
    a, b, c = (patterns(150_000, seed) for seed in range(3))
    assert same_bits(fp16_multiply(a, b), halves(a) * halves(b))
    one = patterns_of(torch.ones(()))
    assert same_bits(fp16_multiply_add(a, one, c), halves(a) + halves(c))
    fused = (halves(a).astype(np.float64) * halves(b).astype(np.float64) + halves(c).astype(np.float64)).astype(
        np.float16
    )
    assert same_bits(fp16_multiply_add(a, b, c), fused)
    assert not same_bits(fp16_multiply_add(a, b, c), halves(a) * halves(b) + halves(c))  # two roundings differ


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_half_products_of_subnormals_and_ties():
    small = torch.arange(1, 1024)  # every subnormal number, by numbers around one and around the largest
    for other in (patterns_of(torch.tensor(v)) for v in (0.5, 1.5, 0.4998, 1000.0, 65504.0, -3.0)):
        assert same_bits(fp16_multiply(small, other), halves(small) * halves(other.expand(1023)))
    # 1.5 * (1 + 1/1024): halfway between two halves, to even; next to the border of overflow: 65519.99 stays finite
    tie = fp16_multiply(patterns_of(torch.tensor(1 + 2.0**-10)), patterns_of(torch.tensor(1.5)))
    assert values_of(tie).item() == 1.5 + 2 * 2.0**-10
    assert (
        values_of(fp16_multiply(patterns_of(torch.tensor(256.0)), patterns_of(torch.tensor(256.0)))).item() == math.inf
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_half_sums_of_all_special_numbers():
    parts = [0.0, 2.0**-24, 1023 * 2.0**-24, 2.0**-14, 1.0, 1 + 2.0**-10, 1023.5, 65504.0, math.inf]
    special = patterns_of(torch.tensor([*parts, *(-v for v in parts), math.nan]))
    a, b, c = (m.flatten() for m in torch.meshgrid(special, special, special, indexing="ij"))
    fused = (halves(a).astype(np.float64) * halves(b).astype(np.float64) + halves(c).astype(np.float64)).astype(
        np.float16
    )
    assert same_bits(fp16_multiply_add(a, b, c), fused)
    assert same_bits(fp16_multiply_add(a, b, c, digit=3), fused)


def test_flushing_reads_and_writes_subnormals_as_zeros():
    one, small, least = (patterns_of(torch.tensor(v)) for v in (1.0, 2.0**-15, 2.0**-14))
    assert values_of(fp16_multiply(one, small)).item() == 2.0**-15
    assert fp16_multiply(one, small, flush=True).item() == 0
    assert fp16_multiply(patterns_of(torch.tensor(4.0)), small, flush=True).item() == 0
    assert math.isnan(values_of(fp16_multiply(patterns_of(torch.tensor(math.inf)), small, flush=True)).item())
    assert fp16_multiply(patterns_of(torch.tensor(-0.5)), least, flush=True).item() == 0x8000
    assert fp16_multiply_add(one, one, small, flush=True).item() == one.item()


def test_half_dot_products_with_wide_and_narrow_sums():
    draw = torch.Generator().manual_seed(4)
    a, b = torch.randn(3, 50, generator=draw).half(), torch.randn(50, 4, generator=draw).half()
    wide, narrow = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float16)
    for k in range(50):
        exact = a[:, k : k + 1].double().numpy() * b[k : k + 1].double().numpy()
        wide = (wide.astype(np.float64) + exact).astype(np.float32)
        narrow = (narrow.astype(np.float64) + exact).astype(np.float16)
    pa, pb = patterns_of(a), patterns_of(b)
    run = RiscvPrecisionScalable().run(HalfJob(pa, pb), Context())
    assert np.array_equal(run.numpy(), wide)
    assert np.array_equal(RiscvPrecisionScalable(accumulate="fp16").run(HalfJob(pa, pb), Context()).numpy(), narrow)
    assert torch.equal(fp16_dot(pa, pb, digit=4), run)
    assert fp16_dot(patterns_of(torch.tensor([[math.inf, 1.0]])), patterns_of(torch.ones(2, 1))).item() == math.inf


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_integers_are_those_of_the_fake_quantised_network(bits):
    with Context(seed=bits).scope("net"):
        convs = [torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)]
        layers = [SteppedLayer(conv, bits, bits) for conv in convs]
        net = SteppedNet([*layers, SteppedLayer(torch.nn.Linear(24, 5), bits, 0, pool=2)], Entry(1 / 16, 6))
        x = torch.randint(0, 17, (30, 1, 8, 8)).float() / 16
    for layer in net.layers:
        layer.weight.data.view(-1)[0] = -10.0  # the lowest code of each
    net.calibrate(x)
    layers = in_integers(net)
    assert all(layer.weight.min() == -(2 ** (bits - 1)) for layer in layers)
    trace = RiscvPrecisionScalable().run(IntegerJob(layers, (x * 16).long()), Context())
    with torch.no_grad():
        walked = net.double().walk(x.double())
    for codes, (value, step) in zip(trace.codes, walked[1:], strict=True):
        assert torch.equal(codes, (value / step).round().long())
    assert [len(set(codes.unique().tolist())) > 1 for codes in trace.codes] == [True] * 3
    assert layers[2].bits == (bits + 2, bits)
    assert [t.widths for t in trace.forecast.layers] == [(6, bits), (bits, bits), (bits + 2, bits)]
    assert trace.forecast.layers[2].product == Product(5, 24, 30, 1, 1, 30 * 24, 30 * 5, 24 * 5)
    assert trace.forecast.layers[1].product == Product(3, 18, 30 * 16, 2, 9, 30 * 4 * 64, 30 * 6 * 16, 6 * 2 * 9)


def test_sums_of_a_layer_are_torchs():
    draw = torch.Generator().manual_seed(1)
    layer = IntLayer(
        "conv",
        torch.randint(-128, 128, (6, 4, 3, 3), generator=draw),
        torch.randint(-999, 999, (6,), generator=draw),
        (8, 8),
        multiplier_of(0.01),
        255,
        Conv((2, 1), (1, 0), 2),
    )
    codes = torch.randint(0, 256, (3, 8, 7, 6), generator=draw)
    sums = sums_of(layer, codes)
    assert torch.equal(sums, plain_sums_of(layer, codes)) and sums.shape == (3, 6, 4, 4)
    with pytest.raises(ValueError, match="codes of conv must be in"):
        sums_of(layer, codes + 1)
    with pytest.raises(ValueError, match="codes of weight of conv must be in"):
        sums_of(replace(layer, weight=2 * layer.weight), codes)
    out = codes_of(layer, sums)
    assert out.min() == 0 and torch.equal(out, (sums * 0.01 + 0.5).floor().clamp(0, 255).long())


def test_lanes_make_four_times_more_at_half_the_bits():
    assert [macs_per_cycle((b, b), ON) for b in (16, 8, 4, 2)] == [1, 4, 16, 64]
    assert macs_per_cycle((8, 4), ON) == 8 and macs_per_cycle((6, 4), ON) == 10 and macs_per_cycle(FP16, ON) == 1


def test_cycles_by_hand():
    p = Product(5, 70, 10, kernel=1, inputs=700, outputs=50, weights=350)
    quick = replace(ON, figures={**ON.figures, "bytes_per_cycle": 1e9, "vector_cycles": 1e9, "vector_bytes": 1e9})
    # 70 deep in steps of 16 are 5. Outputs on two lanes: 3 turns of 10 * 5 + 6; positions: 5 turns of 5 * 5 + 6
    estimate, bound, used = processor_time(p, (4, 4), quick)
    assert (estimate.cycles, bound) == (155 + 8, "multipliers")
    assert used == pytest.approx(5 * 70 * 10 * 4 / (163 * 2 * 64))
    assert processor_time(replace(p, rows=6), (4, 4), quick)[0].cycles == 3 * (50 + 6) + 8
    assert processor_time(replace(p, rows=1, cols=5), (4, 4), quick)[0].cycles == 3 * 5 + 6 + 8
    slow = replace(ON, figures={**ON.figures, "bytes_per_cycle": 0.5})
    moved = 700 // 2 + 350 // 2 + 25
    estimate, bound, _ = processor_time(p, (4, 4), slow)
    assert (estimate.cycles, bound, estimate.traffic_bytes) == (moved * 2 + 8, "memory", moved)
    assert estimate.joules == pytest.approx(p.macs * 4 * ON["joules_per_digit"] + moved * ON["joules_per_byte"])
    busy = replace(ON, figures={**ON.figures, "vector_cycles": 0.5, "bytes_per_cycle": 1e9})
    estimate, bound, _ = processor_time(p, (4, 4), busy)
    assert (estimate.cycles, bound) == (250 + math.ceil(moved / 64) + 8, "instructions")


def test_what_does_not_fit_is_read_again():
    half = int(ON["buffer_bytes"] / 2)
    p = Product(1, 1, 1, inputs=10, outputs=4, weights=2 * half)
    assert traffic_bytes(p, (8, 8), ON) == 2 * half + 10 + 4  # the inputs stay, the weights pass by
    assert traffic_bytes(replace(p, inputs=3 * half), (8, 8), ON) == 2 * half + 2 * 3 * half + 4
    assert traffic_bytes(replace(p, inputs=3 * half), (8, 2), ON) == half // 2 + 3 * half + 4
    assert traffic_bytes(p, FP16, ON) == 4 * half + 20 + 8


def test_the_rival_by_hand():
    p = Product(8, 20, 6, 1, 9, inputs=200, outputs=48, weights=160)
    # 3 dots of 8 nibbles, and 1/4 + 1/2 loads, for 48 outputs with 4 cycles each; 20 * 6 / 8 words unfolded by 2
    assert simd_time(p, (4, 4), RIVAL).cycles == 48 * (3 * 1.75 + 4) + 30
    assert simd_time(p, (2, 4), RIVAL).cycles == simd_time(p, (4, 4), RIVAL).cycles
    assert simd_time(p, (6, 4), RIVAL).cycles == simd_time(p, (8, 8), RIVAL).cycles
    plain = replace(p, kernel=1)
    assert simd_time(plain, (8, 8), RIVAL).cycles == 48 * (5 * 1.75 + 4)
    assert simd_time(plain, FP16, RIVAL).cycles == 48 * (20 * 8.75 + 4)


def test_a_network_in_mixed_widths():
    layers = tuple(products_of("resnet18"))
    engine, ctx = RiscvPrecisionScalable(), Context()
    runs = {b: engine.run(ShapeJob(layers, (b, b)), ctx) for b in (16, 8, 4, 2)}
    assert runs[16].estimate.cycles > runs[8].estimate.cycles > runs[4].estimate.cycles > runs[2].estimate.cycles
    assert all(runs[2 * b].estimate.cycles / runs[b].estimate.cycles <= 4 for b in (8, 4, 2))
    mixed = engine.run(ShapeJob(layers, {"": (4, 4), layers[0][0]: (8, 8)}), ctx)
    gap = runs[8].layers[0].estimate.cycles - runs[4].layers[0].estimate.cycles
    assert mixed.estimate.cycles == runs[4].estimate.cycles + gap
    assert runs[2].layers[-1].bound == "memory" and runs[2].ridge == {(2, 2): 16.0}
    for t in runs[2].layers:  # no point of the roofline lies above the roof
        rate = t.estimate.macs / t.estimate.cycles
        assert rate <= min(128, t.intensity * ON["bytes_per_cycle"]) and 0 < t.used <= 1
        assert t.intensity == t.product.macs / traffic_bytes(t.product, t.widths, ON)
    with pytest.raises(PlanError, match="must name every layer"):
        engine.run(ShapeJob(layers, {"other": (4, 4)}), ctx)
    with pytest.raises(PlanError, match="even numbers from 2 to 16"):
        engine.run(ShapeJob(layers, (3, 4)), ctx)


def test_training_takes_the_two_gradients_as_well():
    layers = tuple(products_of("resnet18"))[:3]
    run = RiscvPrecisionScalable().run(ShapeJob(layers, FP16, training=True), Context())
    kinds = [t.kind for t in run.layers]
    assert kinds == ["FW"] * 3 + ["WG", "IG", "WG", "IG", "WG"]
    assert {t.estimate.macs for t in run.layers if t.name == layers[2][0]} == {layers[2][1].macs}
    assert run.speed_up > 1
