"""latency: the clock against known waits, the interval against its definition, and a machine left as it was."""

from __future__ import annotations

import gc
import itertools
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.scorecard import Readings
from cupel.core.steps import build
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject
from cupel.probes.cost.latency import Latency, first_rows, one_thread, quantile_reading, times_of
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


class Waits(nn.Module):
    """Sleeps a known time for every row."""

    def __init__(self, fixed: float, row: float) -> None:
        super().__init__()
        self.fixed, self.row = fixed, row
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        time.sleep(self.fixed + self.row * len(x))
        return x


def bench(net: nn.Module, rows: int = 100) -> Subject:
    data = Examples(torch.rand(rows, 3), torch.zeros(rows, dtype=torch.long), torch.arange(rows))
    return Subject(net, Splits(data, data, data), Classification(2))


def measure(subject: Subject, **params: object) -> Readings:
    return Latency(**params).measure(subject, Context())  # type: ignore[arg-type]


def test_known_waits_are_measured() -> None:
    net = Waits(0.002, 0.0003)
    found = measure(bench(net), repeats=9, warm=2)
    one, many = found["latency_1_ms"], found["latency_64_ms"]
    assert 2.3 <= one.value < 8 and 21.2 <= many.value < 40
    assert one.low is not None and one.high is not None and 2.3 <= one.low <= one.value <= one.high
    assert found["latency_1_p95_ms"].value >= one.value and found["latency_64_p95_ms"].value >= many.value
    assert net.sizes == [1] * 11 + [64] * 11  # warm-up runs are not counted
    assert one.count == 9 and one.unit == "ms" and one.better == "lower"


def test_warm_up_is_left_out() -> None:
    class Cold(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            time.sleep(0.05 if self.calls <= 2 else 0.0)
            return x

    assert measure(bench(Cold()), repeats=5, warm=2)["latency_1_p95_ms"].value < 40


def test_a_slow_network_stops_early() -> None:
    net = Waits(0.01, 0.0)
    assert measure(bench(net), repeats=1000, warm=1, seconds=0.02)["latency_64_ms"].count == 5
    assert len(times_of(lambda: time.sleep(0.001), 1000, 0, 0.02)) < 30


@pytest.mark.parametrize(("n", "q"), [(9, 0.5), (20, 0.5), (51, 0.5), (100, 0.95), (200, 0.95)])
def test_interval_covers_the_quantile_as_often_as_it_says(n: int, q: float) -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        reading = quantile_reading(draw.exponential(size=n).tolist(), q)
        hits += reading.low <= -np.log(1 - q) <= reading.high  # type: ignore[operator]
    assert hits / 400 >= 0.93  # at least 95%, less three standard errors
    narrow = quantile_reading(list(np.linspace(0, 1, n)), q)
    assert narrow.value == pytest.approx(q)


def test_interval_of_the_median_is_the_table_of_order_statistics() -> None:
    # Ranks of the 95% interval of a median, as printed in tables: n -> (rank from below, rank from above).
    for n, rank in ((6, 1), (9, 2), (10, 2), (20, 6), (50, 18), (100, 40)):
        reading = quantile_reading([float(k) for k in range(1, n + 1)], 0.5)
        assert (reading.low, reading.high) == (rank, n + 1 - rank)
    few = quantile_reading([3.0, 1.0, 2.0], 0.5)
    assert (few.low, few.value, few.high) == (1.0, 2.0, 3.0)


def test_rows_repeat_up_to_the_size() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert first_rows(x, 64)[:, 0].tolist() == list(itertools.islice(itertools.cycle([0.0, 2.0, 4.0]), 64))
    assert first_rows({"a": x, "b": x + 1}, 2)["b"].tolist() == [[1, 2], [3, 4]]
    net = Waits(0, 0)
    measure(bench(net, rows=7), repeats=5, warm=1)
    assert set(net.sizes) == {1, 64}


def test_the_machine_and_the_subject_are_left_as_they_were() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    subject.model.train()
    before = {k: v.clone() for k, v in subject.model.state_dict().items()}
    state = torch.get_rng_state()
    found = measure(subject, repeats=5, warm=1)
    assert all(torch.equal(v, before[k]) for k, v in subject.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and gc.isenabled()
    assert all(m.training for m in subject.model.modules())
    assert all(p.requires_grad for p in subject.model.parameters())
    assert "one thread" in found.notes[0]

    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(1)

    noisy = bench(Draws())
    state = torch.get_rng_state()
    measure(noisy, repeats=5, warm=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_thread_inside_and_the_old_number_after_an_error() -> None:
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="inside"), one_thread():
            assert torch.get_num_threads() == 1 and not gc.isenabled()
            raise ValueError("inside")
        assert torch.get_num_threads() == 2 and gc.isenabled()
    finally:
        torch.set_num_threads(1)
