"""mcunetv2: boxes by autograd, outputs by torch, integers by a slow sum, memory by hand and by the allocator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.engines.mcunetv2 import MCUNetV2, PatchJob, PatchTrace, SearchJob, SearchTrace
from cupel.nets.convnet import ConvNet
from cupel.nets.mobilenet import (
    Block,
    MobileNet,
    mobilenet_v2,
    mobilenet_v2_blocks,
    receptive_field,
    redistributed,
)
from cupel.nets.resnet import ResNet
from cupel.ops.evolve import evolve
from cupel.ops.ledger import ledger_of
from cupel.ops.map_memory import chosen, footprint, multiply_adds, plan, whole_boxes
from cupel.ops.map_numbers import codes, floats
from cupel.ops.map_program import program_of
from cupel.ops.map_runs import Run, executed, ranges_of
from cupel.ops.receptive import Box, Window, field_of, tiles

torch.set_num_threads(1)


def settled(net: nn.Module) -> nn.Module:
    """Norms that move values, so that padding before and behind them differs."""
    draw = torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in (
                (m.running_mean, -0.5, 0.5),
                (m.running_var, 0.5, 2),
                (m.weight, 0.5, 2),
                (m.bias, -1, 1),
            ):
                t.data.uniform_(low, high, generator=draw)  # type: ignore[union-attr]
    return net.eval()


class Dense(nn.Module):
    """Norm first, a map read three times, concatenation, grouped, dilated and even kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 2, 1))
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 5, padding=2, groups=2)
        self.dilated = nn.Conv2d(10, 4, (3, 1), padding=(2, 0), dilation=(2, 1))
        self.even = nn.Conv2d(4, 5, 2, stride=2, padding=1)
        self.depth = nn.Conv2d(5, 10, 3, padding=1, groups=5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.pad(x))
        y = torch.cat([x, self.grouped(torch.relu(self.norm(x)))], 1)
        y = torch.nn.functional.silu(self.dilated(y)) * 1.5
        return self.depth(self.even(x + y + 0.25))


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1), nn.ReLU6(inplace=True),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


class Shortcuts(nn.Module):
    """Both operands of a sum are convolutions; a sum of a map with its own convolution; clipping before and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.e, self.f = nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x)) + self.b(x)
        y = torch.relu(y + torch.clamp(self.c(y), -0.2, 0.3))
        y = y + y
        return self.d(self.e(y) + self.f(y))


def tiny_mobile() -> MobileNet:
    return MobileNet(3, 5, (Block(8, 1), Block(12, 3, 3, 2), Block(12, 3, 5), Block(16, 3, 3, 2)), 8, 24, 1)


NETS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: ConvNet(3, 4, 4),
    "mobile": tiny_mobile,
    "residual": lambda: ResNet(3, 4, 4, 1),
    "dense": Dense,
    "pools": Pools,
    "shortcuts": Shortcuts,
}


def made(name: str) -> nn.Module:
    with Context(seed=3).scope(name):
        return settled(NETS[name]())


def images(count: int, rows: int = 11, cols: int = 10) -> Tensor:
    return torch.rand(count, 3, rows, cols, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("seed", range(12))
def test_a_box_is_what_autograd_says_it_reads(seed):
    draw = np.random.default_rng(seed)
    kernel, stride, dilation = (tuple(int(v) for v in draw.integers(1, high, 2)) for high in (5, 4, 3))
    pad = tuple(int(draw.integers(0, d * (k - 1) // 2 + 1)) for k, d in zip(kernel, dilation, strict=True))
    window = Window(kernel, stride, pad, dilation)  # type: ignore[arg-type]
    size = (13, 11)
    x = torch.ones(1, 1, *size, requires_grad=True)
    out = torch.nn.functional.conv2d(x, torch.ones(1, 1, *kernel), None, stride, pad, dilation)[0, 0]
    for box in tiles(out.shape, 3):  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(out[box.top : box.bottom, box.left : box.right].sum(), x, retain_graph=True)
        rows, cols = (grad[0, 0].sum(axis).nonzero().flatten() for axis in (1, 0))
        want = Box(int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1)
        found = window.under(box, size)
        assert found | want == found  # gaps of a dilated kernel at a border are read for nothing
        assert found == want if dilation == (1, 1) else found.area <= (want.height + 1) * (want.width + 1)
    assert sum(b.area for b in tiles(out.shape, 3)) == out.numel()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETS)
def test_every_cut_gives_torchs_outputs_and_equal_integers(name):
    net, x = made(name), images(1)
    program = program_of(net, x[:1])
    assert len(program.cuts()) >= 2
    plain, taken = floats(program), [i.numpy() for i in x]
    ranges, _ = ranges_of(plain, taken)
    want = net(x).detach().flatten(1).numpy()
    for numbers in (plain, codes(program, ranges)):
        whole = executed(numbers, plan(program), taken)
        bound = 1e-5 if numbers is plain else 0.05 * np.ptp(want)
        assert max(abs(a - b).max() for a, b in zip(whole.results, want, strict=True)) < bound
        for cut in program.cuts()[-2:]:
            part = executed(numbers, plan(program, cut, 3), taken)
            gap = max(abs(a - b).max() for a, b in zip(part.results, whole.results, strict=True))
            assert gap == 0 if numbers.coded else gap < 1e-5, (cut, numbers.dtype)
            assert part.macs == footprint(program, plan(program, cut, 3)).macs >= whole.macs
        assert whole.macs == sum(op.macs for op in ledger_of(net, x[:1]).ops)


def test_recording_keeps_the_model_and_what_it_cannot_fold():
    net = made("dense")
    program = program_of(net, images(1))
    kinds = [k.kind for k in program.kernels]
    assert "torch" not in kinds and kinds.count("map") >= 2 and kinds.count("cat") == 1  # the first norm has no conv
    assert [k.kind for k in program_of(made("conv"), images(1, 8, 8)).kernels] == ["conv"] * 3 + [
        "mean",
        "reshape",
        "conv",
    ]
    assert not net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    shuffled = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 3, padding=1))
    program = program_of(shuffled, images(1))  # channels change places: no window, so nothing may be cut behind it
    assert program.cuts() == [1] and "torch" in [k.kind for k in program.kernels]
    [result] = executed(floats(program), plan(program), [images(1)[0].numpy()]).results
    assert abs(result - shuffled(images(1)).detach().flatten().numpy()).max() < 1e-5


def test_int8_sums_are_those_of_integers():
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1)), images(1)
    program = program_of(net, x)
    numbers = codes(program, ranges_of(floats(program), [x[0].numpy()])[0])
    taken = numbers.held(x[0].numpy(), 0)
    q = taken.astype(np.int64) - numbers.zeros[0]
    weight = numbers.weights[0].matrix.reshape(4, 3, 3, 3).astype(np.int64)
    assert abs(weight).max() == 127
    padded = np.zeros((3, 13, 12), np.int64)
    padded[:, 1:-1, 1:-1] = q  # zero is a code: a padded border is exactly zero
    whole = Run(numbers).follow(plan(program), taken).reshape(4, 6, 5)
    bias = net[0].bias.tolist()  # type: ignore[union-attr]
    for o, r, c in itertools.product(range(4), range(6), range(5)):
        total = int((weight[o] * padded[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3]).sum())
        real = total * float(numbers.weights[0].gain[o, 0]) + bias[o]
        code = min(127, max(-128, round(real / numbers.scales[1]) + numbers.zeros[1]))
        assert whole[o, r, c] == code
    assert abs(numbers.real(whole, 1) - net(x)[0].detach().numpy()).max() < 2 * numbers.scales[1]


def test_mobilenet_v2_takes_the_papers_memory():
    net = mobilenet_v2()
    assert sum(p.numel() for p in net.parameters()) == 3504872  # as torchvision's
    program = program_of(net.eval(), torch.zeros(1, 3, 224, 224))
    plain = footprint(program, plan(program))
    assert plain.peak == (16 + 96) * 112 * 112 == 1404928
    assert plain.macs == 300774272  # as published: 300 million
    cut = next(c for c in program.cuts() if program.kernels[c - 1].module == "blocks.3.project.norm")
    patched = footprint(program, plan(program, cut, 4))
    # Later: expansion of a 32-channel block with its shortcut, and one channel beside the depthwise convolution.
    assert patched.later == patched.peak == (32 + 192 + 1) * 28 * 28
    assert patched.stage < 172 * 1024 and 0.08 < patched.overhead < 0.11
    assert footprint(program, plan(program, cut, 4), resident=True).stage == patched.stage + 3 * 224 * 224
    more = [footprint(program, plan(program, c, 4)).overhead for c in (cut, cut + 3, cut + 6)]
    assert more[1] > 2.5 * more[0] and more[2] > 1.5 * more[1]


def test_memory_and_halos_by_hand():
    parts = [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, 2, 1, groups=6), nn.Conv2d(6, 4, 3, padding=1)]
    net = nn.Sequential(*parts, nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(2, 1, 1))
    program = program_of(net, torch.zeros(1, 3, 8, 8))
    held = [s.held for s in plan(program).rest.steps]
    # A depthwise convolution: its own input and one channel.
    assert held == [(3 + 6) * 64, 6 * 64 + 16, (6 + 4) * 16, (4 + 2) * 16, (2 + 1) * 16]
    # Four tiles of 2 x 2: three rows and columns of the layer before, four of the one before that, all of the first.
    made = plan(program, 4, 2)
    assert [s.held for s in made.patches[0].steps] == [8 * 8 * 9, 6 * 64 + 16, 6 * 16 + 4 * 9, 4 * 9 + 2 * 4]
    assert footprint(program, made).stage == 2 * 16 + 8 * 8 * 9  # beside the whole map at the cut
    want = 4 * (64 * 18 + 16 * 54 + 9 * 216 + 4 * 72) + 16 * 2
    assert footprint(program, made).macs == want == executed(floats(program), made, [np.zeros((3, 8, 8))]).macs
    both = program_of(made_sum(), torch.zeros(1, 3, 8, 8))
    a, b, c = (s.held for s in plan(both).rest.steps)
    assert (a, b, c) == ((3 + 4) * 64, (4 + 8) * 64, (4 + 8) * 64)  # the sum goes into the shortcut
    assert [k.onto for k in both.kernels] == [False, False, True]


def made_sum() -> nn.Module:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x + self.c(self.b(x))

    return Sum()


def test_the_allocator_sees_what_the_model_says():
    # The depthwise convolution leaves a quarter of the memory it stands in, and the widest layer comes after it.
    layers = [nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, 2, 1, groups=24), nn.Conv2d(24, 96, 1), nn.Conv2d(96, 4, 1)]
    x = images(1, 48, 48)
    trace = MCUNetV2(patches=4, numbers="float32").run(PatchJob(nn.Sequential(*layers), x, "2"), Context())
    assert isinstance(trace, PatchTrace)
    assert trace.plain_memory.peak == 4 * (24 + 96) * 24 * 24
    net = settled(MobileNet(3, 4, (Block(8, 1), Block(12, 4, 3, 2), Block(12, 4)), 16, 16, 1))
    small = MCUNetV2(patches=4, numbers="float32").run(PatchJob(net, images(1, 40, 40), "blocks.1"), Context())
    assert isinstance(small, PatchTrace)
    assert small.plain_memory.peak == 4 * (8 + 32) * 40 * 40 and small.traced_bytes < 0.65 * small.plain_traced_bytes
    for t in (trace, small):
        for real, model in ((t.plain_traced_bytes, t.plain_memory.peak), (t.traced_bytes, t.memory.peak)):
            assert model <= real <= model + 28_000, (real, model)
        assert t.macs == t.memory.macs and t.plain_macs == t.memory.plain_macs


def test_the_engine_runs_images_and_says_where_it_cut():
    net, x = made("mobile"), images(2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    trace = MCUNetV2(patches=2, numbers="float32").run(PatchJob(net.train(), x, "blocks.2"), Context())
    assert isinstance(trace, PatchTrace) and net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert trace.split == "blocks.2" and trace.patches == 2
    assert (trace.outputs - net.eval()(x)).abs().max() < 1e-5 and trace.gap < 1e-5 and trace.model_gap < 1e-5
    coded = MCUNetV2(patches=3).run(PatchJob(net, x), Context())
    assert isinstance(coded, PatchTrace)
    assert coded.gap == 0 and coded.memory.peak < coded.plain_memory.peak and coded.split
    assert coded.outputs.argmax(1).tolist() == net(x).argmax(1).tolist()


def test_refusals_say_what_to_do():
    with pytest.raises(PlanError, match=r"split must be .*got 'stage1.0.conv2'"):  # a shortcut passes it by
        MCUNetV2().run(PatchJob(made("residual"), images(1), "stage1.0.conv2"), Context())

    class Noisy(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.sum() + len(seen.append(1) or seen))

    seen: list[int] = []
    with pytest.raises(PlanError, match="network's own outputs"):
        MCUNetV2().run(PatchJob(Noisy(3, 2, 3), images(1)), Context())
    with pytest.raises(PlanError, match="recording it failed"):
        MCUNetV2().run(PatchJob(nn.LSTM(3, 4), images(1)), Context())


def test_the_choice_is_the_best_of_all():
    program = program_of(made("mobile"), images(1))
    every = {(c, p): footprint(program, plan(program, c, p)) for c in program.cuts() for p in (2, 3, 4)} | {
        (0, 1): footprint(program, plan(program))
    }
    _, least, _ = chosen(program, 4, program.cuts())
    assert least.peak == min(f.peak for f in every.values()) < every[0, 1].peak
    limit = (least.peak + every[0, 1].peak) // 2
    way, found, patches = chosen(program, 4, program.cuts(), limit)
    assert found.macs == min(f.macs for f in every.values() if f.peak <= limit)
    assert found == every[way.cut, patches] and found.peak <= limit
    assert chosen(program, 4, program.cuts(), every[0, 1].peak)[0].cut == 0  # no patches where none are needed
    assert chosen(program, 4, program.cuts(), 1)[1] == least


CHOICES = {"kernel": (3, 5), "width": (4, 8, 12), "depth": (1, 2), "side": (12, 16)}


def built(genome: dict[str, object]) -> tuple[nn.Module, tuple[int, int, int]]:
    kernel, width, depth, side = (int(genome[k]) for k in CHOICES)  # type: ignore[call-overload]
    blocks = (Block(width, 2, kernel, 2), *(Block(width, 2, kernel) for _ in range(depth - 1)))
    return MobileNet(3, 4, blocks, width, 16, 1), (3, side, side)


def test_the_search_finds_what_trying_everything_finds():
    limits = {"peak_bytes": 2600.0, "flash_bytes": 2200.0, "macs": 200_000.0}
    job = SearchJob(CHOICES, built, **limits, population=5, generations=3)
    found = MCUNetV2(patches=3).run(job, Context(seed=1))
    assert isinstance(found, SearchTrace) and found.best is not None and found.memory is not None
    scores = {}
    for values in itertools.product(*CHOICES.values()):
        net, shape = built(dict(zip(CHOICES, values, strict=True)))
        program = program_of(net.eval(), torch.zeros(1, *shape))
        _, memory, _ = chosen(program, 3, program.cuts(), limits["peak_bytes"])
        flash = sum(k.weight.numel() + 4 * len(k.weight) for k in program.kernels if k.weight is not None)
        if memory.peak <= limits["peak_bytes"] and flash <= limits["flash_bytes"] and memory.macs <= limits["macs"]:
            scores[values] = math.log(multiply_adds(program, range(len(program.kernels)), whole_boxes(program)))
    assert 3 < len(scores) < 20 and found.allowed <= len(scores)
    assert found.score == pytest.approx(max(scores.values())) and scores[tuple(found.best.values())] == found.score
    assert found.patches > 1 and found.memory.peak <= 2600 and found.flash_bytes <= 2200
    again = MCUNetV2(patches=3).run(job, Context(seed=1))
    assert again == found
    none = MCUNetV2().run(SearchJob(CHOICES, built, peak_bytes=10, population=2, generations=1), Context())
    assert isinstance(none, SearchTrace) and none.best is None and none.allowed == 0 and none.tried > 2


def test_evolution_climbs_where_chance_does_not():
    choices = {str(k): range(10) for k in range(12)}
    asked: list[tuple[object, ...]] = []

    def judge(genome: dict[str, object]) -> float | None:
        asked.append(tuple(genome.values()))
        total = sum(int(v) for v in genome.values())  # type: ignore[call-overload]
        return None if total > 100 else float(total)

    found = evolve(choices, judge, torch.Generator().manual_seed(0), population=20, generations=12)
    assert len(asked) == len(set(asked)) == found.tried
    assert found.history == tuple(sorted(found.history)) and len(found.history) == 13
    assert found.score >= 92 > found.history[0] + 9  # 260 draws by chance reach about 82
    assert found.best is not None and sum(int(v) for v in found.best.values()) == found.score  # type: ignore[call-overload]


def test_the_receptive_field_moves_back():
    blocks = mobilenet_v2_blocks()
    moved = redistributed(blocks, 4)
    assert receptive_field(moved) >= receptive_field(blocks) == 491
    # 3 for the stem, then (kernel - 1) times the step: 2, 2, 4, 4 of the four first blocks; now 0, 2 and 4.
    assert receptive_field(blocks[:4]) == 3 + 4 + 4 + 8 + 8 and receptive_field(moved[:3]) == 3 + 4 + 8
    assert len(moved) == len(blocks) and [b.stride for b in moved].count(2) == 4
    # The field by autograd, far from the borders.
    small = (Block(4, 1), Block(4, 2, 3, 2), Block(4, 2, 5))
    net = MobileNet(3, 2, small, 4, 4, 1).eval()
    x = torch.rand(1, 3, 40, 40, requires_grad=True)
    out = net.blocks(net.stem(x))
    (grad,) = torch.autograd.grad(out[0, :, 10, 10].sum(), x)
    rows = grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == receptive_field(small, 1)
    windows = [Window((3, 3)), Window((3, 3)), Window((3, 3), (2, 2)), Window((5, 5))]
    assert field_of(windows) == (receptive_field(small, 1),) * 2
