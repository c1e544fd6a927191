"""Probe `latency`: how long one forward takes, for one input and for 64."""

from __future__ import annotations

import gc
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings
from cupel.core.types import Subject, still

CARD = Card(
    name="latency",
    family="cost",
    source="interval of a quantile: H. A. David, H. N. Nagaraja, Order Statistics, 3rd edition, 2003, section 7.1",
    tags=("time", "speed"),
    readings=("latency_1_ms", "latency_1_p95_ms", "latency_64_ms", "latency_64_p95_ms"),
    timed=True,
    tiny={"repeats": 5, "warm": 1},
)


def quantile_reading(values: Sequence[float], q: float) -> Reading:
    """The q-quantile of times in ms, with an interval of at least 95% from order statistics.

    The number of values below the true quantile is binomial(n, q), so the r-th and s-th smallest
    enclose it with chance P(r <= B < s). Where n is too small for a side, that side is the extreme.

    >>> r = quantile_reading([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], 0.5); (r.low, r.value, r.high)
    (2.0, 5.0, 8.0)
    """
    ranked = sorted(values)
    n = len(ranked)
    below = [math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)]  # P(B = k)
    up, down = accumulate(below), accumulate(reversed(below))  # P(B <= k) and P(B >= n - k)
    low = max(sum(chance <= 0.025 for chance in up) - 1, 0)
    high = min(n - sum(chance <= 0.025 for chance in down), n - 1)
    place = q * (n - 1)
    floor = math.floor(place)
    value = ranked[floor] + (place - floor) * (ranked[min(floor + 1, n - 1)] - ranked[floor])
    return Reading(value, "ms", "lower", n, min(ranked[low], value), max(ranked[high], value))


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread and no garbage collection inside: what is timed is the network."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def times_of(call: Callable[[], object], repeats: int, warm: int, seconds: float) -> list[float]:
    """Milliseconds of each call after `warm` untimed ones; stops early after `seconds`, but never under 5 calls."""
    for _ in range(warm):
        call()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < repeats and (len(found) < 5 or time.perf_counter() < end):
        start = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - start))
    return found


def first_rows(inputs: Any, size: int) -> Any:
    """Exactly `size` rows of inputs, repeated from the start where there are fewer; a graph stays as it is."""
    if isinstance(inputs, Tensor):
        return inputs[torch.arange(size, device=inputs.device) % len(inputs)].contiguous()
    if isinstance(inputs, Mapping):
        return {name: first_rows(value, size) for name, value in inputs.items()}
    return inputs


def machine(device: torch.device) -> str:
    """Name of the processor that runs on `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Latency:
    """Median and 95th percentile of the time of one forward, for one input and for a batch of 64.

    Inputs are test inputs, on the device before the clock starts. On the CPU everything runs in one
    thread, so that numbers of different networks compare; on a GPU the clock stops when the device has
    finished. Times depend on the machine and on what else it does: compare inside one run.

    Source: intervals as in David and Nagaraja 2003, section 7.1.

    Departs: where the data are one graph, both sizes time the whole graph, and a note says so.

    Example:
        >>> Latency(repeats=30).warm
        10
    """

    repeats: int = param(200, "timed forwards of each batch size", ge=5)
    warm: int = param(10, "forwards before the clock starts", ge=1)
    seconds: float = param(3.0, "time after which a batch size stops early, at 5 forwards or more", gt=0, unit="s")

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        model = subject.model
        if not len(subject.data.test):
            raise NotApplicable("latency must have a test input to time; there are none. Give data for the test split.")
        device = next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))
        whole = next(iter(subject.data.test.batches(64))).to(device).inputs
        found: dict[str, Reading] = {}
        with still(model), torch.inference_mode(), one_thread(), ctx.scope("forward"):
            for size in (1, 64):
                inputs = first_rows(whole, size)

                def call(inputs: Any = inputs) -> None:
                    model(inputs)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)

                times = times_of(call, self.repeats, self.warm, self.seconds)
                found[f"latency_{size}_ms"] = quantile_reading(times, 0.5)
                found[f"latency_{size}_p95_ms"] = quantile_reading(times, 0.95)
        notes = [f"{machine(device)}, one thread, torch {torch.__version__}"]
        if not isinstance(whole, (Tensor, Mapping)):
            notes.append("the data are one graph: both batch sizes time all of it")
        return Readings(found, tuple(notes))
