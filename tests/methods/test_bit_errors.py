"""bit-errors: flips by hand, the law of the faults, and networks whose accuracy under faults is known exactly."""

from __future__ import annotations

import copy
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject
from cupel.ops.bit_flips import crossing, fault_positions, flipped, from_fixed, part_of, to_fixed
from cupel.probes.robust.bit_errors import NAMED, RATES, BitErrors, joined, right_answers, stored_words
from cupel.storage.state import fill, state_of
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


class Signs(nn.Module):
    """Input i is answered by the sign of weight i alone; a weight of infinity gives an infinite output."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count))

    def forward(self, x: Tensor) -> Tensor:
        own = self.weight[x[:, 0].long()]
        return torch.stack([own, -own], dim=1)


def drawn(found, figure):
    """The values of a figure's first line."""
    return [y for _, y in next(iter(found.figures[figure]["series"].values()))]


def subject_of(model: nn.Module, count: int) -> Subject:
    data = Examples(torch.arange(count).float()[:, None], torch.zeros(count, dtype=torch.long), torch.arange(count))
    return Subject(model, Splits(data, data, data), Classification(2))


def turned(value: float, bit: int) -> float:
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    (made,) = struct.unpack("<f", struct.pack("<I", word ^ (1 << bit)))
    return made


def test_every_bit_of_a_float_is_the_one_that_struct_flips() -> None:
    values = torch.tensor([0.1, -3.0, 1.0])
    for bit in range(32):
        found = flipped(values, torch.tensor([32 + bit]))
        assert np.array_equal(found[1].numpy(), np.float32(turned(-3.0, bit)), equal_nan=True), bit
        assert found[0] == values[0] and found[2] == values[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32])
def test_flipping_all_bits_is_the_complement_and_twice_is_nothing(dtype: torch.dtype) -> None:
    x = (torch.arange(6).view(2, 3) - 2).to(dtype)
    every = torch.arange(x.numel() * x.element_size() * 8)
    once = flipped(x, every)
    raw, new = (t.contiguous().view(torch.uint8).numpy() for t in (x, once))
    assert np.array_equal(raw ^ 255, new)
    assert torch.equal(flipped(once, every).view(torch.uint8), x.view(torch.uint8))
    assert torch.equal(flipped(x.t(), torch.tensor([0])), flipped(x.t().contiguous(), torch.tensor([0])))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that quantised tensors will move
def test_quantised_tensors_flip_their_integers() -> None:
    x = torch.tensor([[0.5, -1.0], [0.25, 2.0]])
    one = torch.quantize_per_tensor(x, 0.1, 3, torch.qint8)
    many = torch.quantize_per_channel(x, torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8)
    for q, scale in ((one, 0.1), (many, 0.2)):
        made = flipped(q, torch.tensor([8 * 2 + 7]))
        change = (made.int_repr().int() - q.int_repr().int()).abs()
        assert change.tolist() == [[0, 0], [128, 0]] and made.qscheme() == q.qscheme()
        moved = (made.dequantize() - q.dequantize()).abs()
        assert moved.flatten().tolist() == pytest.approx([0, 0, 128 * scale, 0], rel=1e-4)


def test_faults_follow_the_binomial_law_and_are_spread_evenly() -> None:
    bits, rate, draws = 64_000, 2e-3, 200
    draw = torch.Generator().manual_seed(0)
    found = [fault_positions(bits, rate, draw)[0] for _ in range(draws)]
    assert all(bool((f.diff() > 0).all()) and int(f.max()) < bits and int(f.min()) >= 0 for f in found)
    counts = torch.tensor([len(f) for f in found]).double()
    spread = (bits * rate * (1 - rate)) ** 0.5
    assert abs(float(counts.mean()) - bits * rate) < 4 * spread / draws**0.5
    assert 0.8 < float(counts.std()) / spread < 1.2
    places = torch.cat(found)
    for slots in (places % 32, places * 32 // bits):  # over bit positions, and over the memory
        seen = slots.bincount(minlength=32).double()
        assert float(((seen - seen.mean()) ** 2 / seen.mean()).sum()) < 65  # chi square, 31 degrees: 0.0004


def test_faults_at_the_ends_and_at_a_lower_rate() -> None:
    draw = torch.Generator().manual_seed(1)
    assert len(fault_positions(1000, 0.0, draw)[0]) == 0
    assert fault_positions(1000, 1.0, draw)[0].tolist() == list(range(1000))
    at, marks = fault_positions(200_000, 1e-2, draw)
    assert abs(int((marks <= 0.1).sum()) - 200) < 60 and len(at) == len(marks)


def test_accuracy_under_faults_is_the_chance_that_a_sign_survives() -> None:
    """Weights of 1.0 turn wrong if the sign flips, or if bit 30 alone of the exponent does (infinity)."""
    found = BitErrors(draws=40, scan=1, examples=0).measure(subject_of(Signs(4000), 4000), Context())
    for name, p in NAMED.items():
        known = (1 - p) * (1 - p * (1 - p) ** 7)
        assert abs(found[name].value - known) < 5 * (2 * p / 160_000) ** 0.5 + 1e-5, name
    lost = [1 - a for a in drawn(found, "accuracy_by_bit")]
    assert [bit for bit, gone in enumerate(lost) if gone > 0] == [30, 31]
    assert found["worst_bit"].value in (30, 31) and found["stored_bits"].value == 128_000
    assert found["rate_half"].value == RATES[-1] and any("rate_half lies outside" in n for n in found.notes)


def test_faults_of_a_lower_rate_are_among_those_of_a_higher_one() -> None:
    """Signs that no other flip can mend: what is wrong at a rate stays wrong, so every draw's curve falls."""
    found = BitErrors(draws=3, examples=0).measure(subject_of(Signs(3000), 3000), Context(seed=3))
    assert all(b <= a + 1e-3 for a, b in pairwise(drawn(found, "accuracy_by_rate")))
    ratios = [b / a for a, b in pairwise(drawn(found, "bits_flipped")[2:])]
    assert all(1.8 < r < 6 for r in ratios)  # half decades: 3.16


def test_tied_weights_are_hit_together_and_counters_are_not_hit() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    net[2].weight = net[0].weight
    names = stored_words(net, state_of(net))
    assert names["2.weight"] == "0.weight" and "1.num_batches_tracked" not in names
    assert {"1.running_mean", "1.running_var", "1.weight"} <= set(names)


def test_outputs_that_are_no_numbers_are_wrong() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    x = torch.tensor([[3.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0], [1.0, 3.0]])
    batch = Examples(x, torch.zeros(4, dtype=torch.long), torch.arange(4)).whole()
    assert right_answers(Fixed(), [batch], Classification(2)).tolist() == [True, False, False, False]


def test_int8_networks_are_hit_in_their_codes() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    small = apply(Int8PTQ(examples=32), subject)
    state = state_of(small.model)
    names = [n for n in stored_words(small.model, state) if state[n].is_quantized]
    assert len(names) == 4  # three convolutions and the head
    twin = copy.deepcopy(small.model)
    fill(twin, {n: flipped(x, torch.tensor([7])) if n == names[0] else x for n, x in state.items()})
    after = state_of(twin)
    changed = {n: (after[n].int_repr().int() - state[n].int_repr().int()).abs() for n in names}
    assert int(changed[names[0]].sum()) == 128 and all(int(changed[n].sum()) == 0 for n in names[1:])
    found = BitErrors(draws=2, scan=1, examples=20).measure(small, Context())
    assert len(drawn(found, "accuracy_by_bit")) == 8
    plain = BitErrors(draws=2, scan=1, examples=20).measure(subject, Context())
    assert plain["stored_bits"].value > 3 * found["stored_bits"].value


def test_a_kernel_that_refuses_the_number_gives_no_right_answer() -> None:
    class Picky(Signs):
        def forward(self, x: Tensor) -> Tensor:
            if not bool(self.weight.isfinite().all() & (self.weight > 0).all()):
                raise RuntimeError("bad scale")
            return super().forward(x)

    found = BitErrors(draws=2, scan=1, examples=0).measure(subject_of(Picky(50), 50), Context())
    assert found["worst_bit_accuracy"].value == 0.0


def test_readings_about_rates() -> None:
    assert crossing((1e-6, 1e-4, 1e-2), (0.9, 0.9, 0.1), 0.5) == pytest.approx(1e-3)
    assert crossing((1e-6, 1e-4), (0.4, 0.3), 0.5) == 1e-6
    assert crossing((1e-6, 1e-4), (0.9, 0.8), 0.5) == 1e-4
    alone, both = joined([50, 50, 50], 100)
    assert (alone.low, alone.high) == (0.5, 0.5) and both.low < 0.41 and both.high > 0.59
    wide = joined([0, 100], 100)[1]
    assert (wide.low, wide.high) == (0.0, 1.0)


def test_fixed_point_goes_there_and_back() -> None:
    x = torch.tensor([0.0, 1.5, -2.25, 1e9, -1e9])
    codes = to_fixed(x)
    assert codes.tolist() == [0, 98304, -147456, 2**31 - 1, -(2**31)]
    assert from_fixed(codes)[:3].tolist() == x[:3].tolist()
    assert float(from_fixed(flipped(codes, torch.tensor([32 + 31])))[1]) == 1.5 - 32768
    assert part_of(31, x) == "the sign" and part_of(7, codes.to(torch.int8)) == "the highest bit of a code"


def test_a_black_box_has_no_memory_to_look_at() -> None:
    class Box(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, -x], dim=1)

    with pytest.raises(NotApplicable, match="holds none"):
        BitErrors().measure(subject_of(Box(), 8), Context())
