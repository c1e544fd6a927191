"""Claim of `latency`: its medians repeat, and show what a batch saves."""

from __future__ import annotations

from cupel.core.context import Context
from cupel.core.steps import build
from cupel.probes.cost.latency import Latency
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="latency",
    statement="One input of a batch of 64 takes less time than one input alone, on one thread; and the intervals of "
    "two measurements of the same network overlap or lie within 20% of each other",
    paper="none: order statistics (David and Nagaraja 2003) promise an interval, not that a shared machine repeats it",
    bounds={"batch_64_per_input": "< 1", "repeats_within": "<= 0.2"},
)


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(DigitsCnn(), Context(seed=seed))
    probe = Latency(repeats=100 if quick else 400)
    first, second = (probe.measure(subject, Context()) for _ in range(2))
    one, many = first["latency_1_ms"], first["latency_64_ms"]
    apart = []
    for name in ("latency_1_ms", "latency_64_ms"):
        a, b = first[name], second[name]
        gap = max(0.0, a.low - b.high, b.low - a.high)
        apart.append(gap / min(a.value, b.value))
    return {
        "batch_64_per_input": many.value / 64 / one.value,
        "repeats_within": max(apart),
        "latency_1_ms": one.value,
        "latency_64_ms": many.value,
        "interval_width_1": (one.high - one.low) / one.value,
        "interval_width_64": (many.high - many.low) / many.value,
        "p95_over_median_1": first["latency_1_p95_ms"].value / one.value,
    }
