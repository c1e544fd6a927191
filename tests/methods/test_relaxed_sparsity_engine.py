"""relaxed-sparsity-engine against simulators that move every value of every cycle, and products by other means."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from math import ceil, isnan, log2
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import CupelError, ParamError, PlanError
from cupel.engines.relaxed_sparsity_engine import ENGINES, MatrixJob, NetworkJob, RelaxedSparsityEngine
from cupel.nets.vit import ViT
from cupel.ops.accelerator import Device, device
from cupel.ops.integer_run import codes, on_integers
from cupel.ops.masks import keep_n_of_m
from cupel.ops.products import Product
from cupel.ops.row_wise import decoupled, fine_beats, latency, multiply, pack, systolic

torch.set_num_threads(1)
Array = np.ndarray[Any, Any]


def matrices(rows: int, depth: int, cols: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randint(-127, 128, (rows, depth), generator=draw)
    a = a * (torch.rand(rows, depth, generator=draw) < share)
    return a, torch.randint(-127, 128, (depth, cols), generator=draw)


def on(**figures: float) -> Device:
    found = device("demm")
    return replace(found, figures={**found.figures, **figures})


def of(a: Tensor, b: Tensor) -> Product:
    return Product(len(a), a.shape[1], b.shape[1])


def decoupled_by_events(a: Array, b: Array, ports: int, block: int, columns: int, buffered: bool) -> tuple[Array, int]:
    """The engine's registers, cycle by cycle: one write and at most `ports` reads each."""
    rows, depth = a.shape
    width = b.shape[1]
    tiles = [(i, j) for j in range(0, width, columns) for i in range(0, depth, block)]
    most = max(int((a[r, i : i + block] != 0).sum()) for r in range(rows) for i in range(0, depth, block))
    passes = max(1, ceil(most / ports))
    out = np.zeros((rows, width), np.int64)
    memory = {bank: np.zeros((block, columns), np.int64) for bank in range(1 + buffered)}
    holds: dict[int, int] = {}  # bank -> tile that is complete in it
    writing, row_in, reading, read, cycle = 0, 0, 0, 0, 0
    pipe: list[tuple[int, int, int, list[Array]]] = []  # cycles to go, row, first column, terms
    while reading < len(tiles) or pipe:
        # Registers move first: what is read in this cycle is worked on from the next.
        for k, (left, r, j, terms) in enumerate(pipe):
            if left > 1 and len(terms) > 1 and left < latency(ports):
                terms = [sum(terms[t : t + 2]) for t in range(0, len(terms), 2)]  # one level of the tree
            pipe[k] = (left - 1, r, j, terms)
        for left, r, j, terms in pipe:
            if left == 0:
                assert len(terms) == 1
                wide = min(columns, width - j)
                out[r, j : j + wide] += terms[0][:wide]
        pipe = [stage for stage in pipe if stage[0] > 0]
        finished = None
        if reading < len(tiles) and holds.get(reading % len(memory)) == reading:
            i, j = tiles[reading]
            r, k = read // passes, read % passes
            here = np.flatnonzero(a[r, i : i + block])[k * ports : (k + 1) * ports]
            assert len(here) <= ports
            tile = memory[reading % len(memory)]
            terms = [a[r, i + p] * tile[p] for p in here] + [np.zeros(columns, np.int64)] * (ports - len(here))
            pipe.append((latency(ports), r, j, terms))
            read += 1
            if read == rows * passes:
                finished = reading % len(memory)
                reading, read = reading + 1, 0
        if writing < len(tiles) and (writing % len(memory)) not in holds:
            i, j = tiles[writing]
            bank = memory[writing % len(memory)]
            bank[row_in] = 0
            if i + row_in < depth:
                bank[row_in, : min(columns, width - j)] = b[i + row_in, j : j + columns]
            row_in += 1
            if row_in == block:
                holds[writing % len(memory)] = writing
                writing, row_in = writing + 1, 0
        if finished is not None:
            del holds[finished]
        cycle += 1
    return out, cycle


SHAPES = [(5, 16, 6, 0.2), (3, 20, 9, 0.5), (12, 8, 4, 0.9), (1, 3, 1, 0.4), (20, 24, 7, 0.0)]


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(("ports", "block", "columns"), [(2, 8, 4), (1, 4, 3), (4, 8, 2), (3, 8, 8)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_is_the_count_of_events(
    shape: tuple[int, int, int, float], ports: int, block: int, columns: int, buffered: bool
) -> None:
    a, b = matrices(*shape)
    slow, cycles = decoupled_by_events(a.numpy(), b.numpy(), ports, block, columns, buffered)
    assert np.array_equal(slow, a.numpy() @ b.numpy())
    packed = pack(a, ports, block)
    sizes = on(ports=ports, block=block, columns=columns)
    assert decoupled(of(a, b), sizes, packed.passes, buffered).cycles == cycles
    assert np.array_equal(multiply(packed, b).numpy(), slow)


def systolic_by_events(a: Array, b: Array, r: int, c: int, n: int) -> tuple[Array, int]:
    """A weight-stationary array, cycle by cycle: operands move right, sums move down; n = 4 is the plain one."""
    deep = r if n == 4 else 4 * r // n
    out, cycles = np.zeros((len(a), b.shape[1]), np.int64), 0
    for j in range(0, b.shape[1], c):
        for i in range(0, a.shape[1], deep):
            tile = np.zeros((deep, c), np.int64)
            part = b[i : i + deep, j : j + c]
            tile[: part.shape[0], : part.shape[1]] = part
            beats: list[tuple[int, list[tuple[int, int]]]] = []  # row, and (value, row of the tile) for each array row
            for row in range(len(a)):
                values = np.zeros(deep, np.int64)
                values[: len(a[row, i : i + deep])] = a[row, i : i + deep]
                if n == 4:
                    beats.append((row, [(int(values[q]), q) for q in range(r)]))
                    continue
                queues = [[(int(values[q]), q) for q in range(g, g + 4) if values[q]] for g in range(0, deep, 4)]
                while True:
                    turn = [[*q[:n], *[(0, 4 * g)] * (n - len(q[:n]))] for g, q in enumerate(queues)]
                    beats.append((row, [item for group in turn for item in group]))
                    queues = [q[n:] for q in queues]
                    if not any(queues):
                        break
            cycles += r  # the tile is loaded, a row of the array a cycle
            held: list[list[Any]] = [[None] * c for _ in range(r)]  # operand in each unit
            sums = np.zeros((r, c), np.int64)
            arrived, clock = 0, 0
            while arrived < len(beats) * c:
                new: list[list[Any]] = [[None] * c for _ in range(r)]
                made = np.zeros((r, c), np.int64)
                for x in range(r):
                    for y in range(c):
                        beat = clock - x
                        item = held[x][y - 1] if y else ((beats[beat], beat) if 0 <= beat < len(beats) else None)
                        if item is None:
                            continue
                        new[x][y] = item
                        value, place = item[0][1][x]
                        made[x, y] = (sums[x - 1, y] if x else 0) + value * tile[place, y]
                        if x == r - 1:
                            arrived += 1
                            if j + y < b.shape[1]:
                                out[item[0][0], j + y] += made[x, y]
                held, sums = new, made
                clock += 1
            cycles += clock
    return out, cycles


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("shape", [(5, 16, 6, 0.2), (3, 21, 5, 0.6), (6, 32, 3, 0.9), (2, 3, 1, 0.0)])
def test_the_rivals_formulas_are_counts_of_events_too(shape: tuple[int, int, int, float], n: int) -> None:
    a, b = matrices(*shape)
    slow, cycles = systolic_by_events(a.numpy(), b.numpy(), 4, 3, n)
    assert np.array_equal(slow, a.numpy() @ b.numpy())
    sizes = on(ports=2, columns=6, array_rows=4)
    beats = None if n == 4 else fine_beats(a, n, 4)
    assert systolic(of(a, b), sizes, n, beats).cycles == cycles


@pytest.mark.parametrize(("ports", "block"), [(2, 8), (3, 4), (1, 16), (8, 128)])
def test_packing_keeps_every_value_at_its_place(ports: int, block: int) -> None:
    a, _ = matrices(7, 37, 1, 0.3)
    packed = pack(a, ports, block)
    back = np.zeros((7, ceil(37 / block) * block), np.int64)
    fullest = 0
    for r in range(7):
        for i in range(packed.values.shape[1]):
            used = 0
            for v, p in zip(packed.values[r, i].tolist(), packed.places[r, i].tolist(), strict=True):
                assert 0 <= p < block and (v or not p)
                back[r, i * block + p] += v
                used += v != 0
            fullest = max(fullest, used)
    assert np.array_equal(back[:, :37], a.numpy()) and not back[:, 37:].any()
    assert packed.values.shape[2] == ports * packed.passes and packed.passes == ceil(fullest / ports)
    assert packed.nonzeros == int((a != 0).sum())
    assert packed.bytes == ceil(packed.values.numel() * (1 + log2(block) / 8))


def test_denser_patterns_take_turns_at_the_same_ports() -> None:
    dense, b = matrices(256, 512, 64, 2.0)
    found = []
    for k in (1, 2, 4, 8):
        a = dense * keep_n_of_m(dense.double(), 8 * k, 128).long()
        trace = RelaxedSparsityEngine().run(MatrixJob(a, b), Context())
        layer = trace.layers[0]
        assert torch.equal(trace.result, a @ b) and layer.passes == k
        assert layer.cost["decoupled"].cycles == 128 + 4 * k * 256 + 5
        assert 0.88 < trace.utilisation < 1 and layer.cost["decoupled"].macs == layer.nonzeros * 64
        found.append(layer.cost)
    assert len({c["systolic"].cycles for c in found}) == 1  # zeros cost it as much as values
    assert all(x["fine_1_of_4"].cycles < y["fine_1_of_4"].cycles for x, y in pairwise(found))


def test_a_pattern_of_fours_is_ideal_for_the_fine_arrays_and_a_wide_one_is_not() -> None:
    dense, _ = matrices(64, 256, 1, 2.0)
    fours, wide = (dense * keep_n_of_m(dense.double(), n, m).long() for n, m in ((1, 4), (32, 128)))
    assert int((fours != 0).sum()) == int((wide != 0).sum())
    assert fine_beats(fours, 1, 16) == 64 * 4 and fine_beats(wide, 1, 16) > 2 * 64 * 4
    assert fine_beats(torch.zeros(64, 256), 1, 16) == 64 * 4  # an empty row passes as well
    p = Product(64, 256, 64)
    assert systolic(p, on(), 1).cycles * 4 == systolic(p, on(), 2).cycles * 2 == systolic(p, on()).cycles


def test_costs_count_what_is_moved_and_held() -> None:
    p, sizes = Product(10, 40, 9), on(ports=2, block=8, columns=4, array_rows=4)
    found = decoupled(p, sizes, passes=2)
    slots = 10 * 5 * 4  # rows, blocks, two ports in two passes
    assert found.traffic_bytes == ceil(slots * (1 + 3 / 8) * 3 + 40 * 9 + 10 * 9 * 4)  # A again for each of 3 columns
    assert found.memory_bytes == 2 * 8 * 4 + 10 * 4 * 4 and found.macs == slots * 9
    assert decoupled(p, sizes, 2, buffered=False).memory_bytes == 8 * 4 + 10 * 4 * 4
    assert decoupled(replace(p, groups=3), sizes, 2).cycles == 3 * found.cycles
    plain, fine = systolic(p, sizes), systolic(p, sizes, 1)
    assert plain.traffic_bytes == 10 * 10 * 4 * 5 + 40 * 9 + 10 * 9 * 4  # ten tiles deep, five across of two columns
    assert fine.traffic_bytes == 10 * 3 * 4 * 1.25 * 5 + 40 * 9 + 10 * 9 * 4
    assert (plain.memory_bytes, fine.memory_bytes) == (4 * 2 + 10 * 2 * 4, 4 * 4 * 2 + 10 * 2 * 4)
    assert plain.macs == 10 * 10 * 4 * 2 * 5 and isnan(found.joules) and isnan(plain.joules)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 4, 3, padding="same", dilation=2)
        self.two = nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
        self.three = nn.Conv2d(6, 4, 2, groups=2, padding=1, padding_mode="circular")
        self.drop, self.head = nn.Dropout(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, 2, L]
        x = self.drop(self.one(x)).relu()[:, None]  # [B, 1, 4, L]
        return self.head(self.three(self.two(x).relu()))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        net = Convolutions().double()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(5)) < 0.3)
    return net


def rounded(layer: Any, args: Any) -> Any:
    """The same layer on values of 255 levels, by torch's own convolution."""
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        top = layer.weight.abs().max() / 127
        plain.weight.copy_((layer.weight / top).round() * top)
        step = args[0].abs().max() / 127
        return plain((args[0] / step).round() * step)


def test_a_network_runs_on_the_engine_in_integers() -> None:
    net, x = network().train(), torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    trace = RelaxedSparsityEngine(ports=2, block=8).run(NetworkJob(net, x), Context())
    y = rounded(net.one, (x,)).relu()[:, None]
    y = rounded(net.three, (rounded(net.two, (y,)).relu(),))
    assert torch.allclose(trace.result, rounded(net.head, (y,)), atol=1e-9)
    assert [layer.name for layer in trace.layers] == ["one", "two", "three", "three", "head"]  # one for each group
    a = codes(net.three.weight, 8)[0].chunk(2)[1].flatten(1)
    found = trace.layers[3]
    assert (found.product.rows, found.product.depth, found.nonzeros) == (2, 12, int((a != 0).sum()))
    assert found.product.cols == 3 * y.shape[2] * y.shape[3] and found.passes == pack(a, 2, 8).passes
    assert found.cost["fine_1_of_4"].cycles == systolic(found.product, trace.device, 1, fine_beats(a, 1, 16)).cycles
    assert found.utilisation == pytest.approx(
        found.nonzeros * found.product.cols / (found.cost["decoupled"].cycles * 128)
    )
    useful = sum(layer.nonzeros * layer.product.cols for layer in trace.layers)
    for engine in ENGINES:
        assert trace.cost(engine).cycles == sum(layer.cost[engine].cycles for layer in trace.layers)
    assert trace.utilisation == pytest.approx(useful / (trace.cost().cycles * 2 * 64))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules()) and all(p.requires_grad for p in net.parameters())


def test_products_without_weights_are_left_out_and_said_so() -> None:
    net = ViT(1, 8, 10, 2, 8, 1, 2).eval()
    x = torch.rand(2, 1, 8, 8)
    trace = RelaxedSparsityEngine().run(NetworkJob(net, x), Context())
    assert len(trace.layers) == 8 and trace.left_out and all("attention" in name for name in trace.left_out)
    assert (trace.result - net(x)).abs().max() < 0.05 * net(x).abs().max()


def test_hooks_leave_also_after_an_error() -> None:
    net = network()

    def broken(name: str, a: Tensor, b: Tensor) -> Tensor:
        raise ValueError(name)

    with pytest.raises(ValueError, match="one"), on_integers(net, broken):
        net(torch.zeros(1, 2, 5, dtype=torch.float64))
    assert not any(m._forward_hooks for m in net.modules())


def test_jobs_and_sizes_that_do_not_fit_are_refused() -> None:
    a, b = matrices(3, 8, 2, 0.5)
    run = RelaxedSparsityEngine().run
    for job in (MatrixJob(a.float(), b), MatrixJob(a, b[1:]), MatrixJob(a[0], b)):
        with pytest.raises(PlanError, match="matrices must be of integers"):
            run(job, Context())
    with pytest.raises(PlanError, match="calls none"):
        run(NetworkJob(nn.ReLU(), torch.rand(2)), Context())
    with pytest.raises(ParamError, match="ports must be at most block, 4; got 8"):
        RelaxedSparsityEngine(block=4).run(MatrixJob(a, b), Context())
    with pytest.raises(ParamError, match="a multiple of 16"):
        RelaxedSparsityEngine(ports=3, columns=3).run(MatrixJob(a, b), Context())
    with pytest.raises(ParamError, match="device must be one of"):
        RelaxedSparsityEngine(device="none").run(MatrixJob(a, b), Context())
    with pytest.raises(CupelError, match="32 bits"):
        run(MatrixJob(torch.tensor([[2**16]]), torch.tensor([[2**15]])), Context())
