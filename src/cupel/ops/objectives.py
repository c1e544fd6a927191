"""Holding a latency objective on a machine that others use: a measured profile, and a monitor of the load."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class LatencyProfile:
    """What a query takes, in seconds, by load and level; neither falls as level or load rises.

    Args:
        mean: `[loads][levels]`, the first load being the idle machine.
        tail: the same for the quantile that an objective is about.
    """

    mean: tuple[tuple[float, ...], ...]
    tail: tuple[tuple[float, ...], ...]

    @property
    def slowdowns(self) -> list[float]:
        """How many times slower each load makes a query, in the geometric mean over levels; 1 for the first."""
        idle = self.mean[0]
        logs = [[math.log(m / i) for m, i in zip(row, idle, strict=True)] for row in self.mean]
        return [math.exp(sum(row) / len(row)) for row in logs]

    def expected(self, level: int, slowdown: float) -> float:
        """The tail at a level when queries take `slowdown` times what they take idle.

        Between measured loads on a line, beyond the last in proportion.
        """
        s = self.slowdowns
        rows = [row[level] for row in self.tail]
        if slowdown <= s[0] or len(s) == 1:
            return rows[0] * max(1.0, slowdown / s[0])
        for (low, high), (a, b) in zip(pairwise(s), pairwise(rows), strict=True):
            if slowdown <= high:
                return a + (b - a) * (slowdown - low) / (high - low)
        return rows[-1] * slowdown / s[-1]


def monotone(values: Sequence[float]) -> list[float]:
    """The nearest sequence (least squares) that never falls: pool neighbours that are out of order.

    >>> monotone([1.0, 3.0, 2.0, 4.0])
    [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, size = float(value), 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), size + count
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


def fitted(mean: Sequence[Sequence[float]], tail: Sequence[Sequence[float]]) -> LatencyProfile:
    """A profile from measured tables `[loads][levels]`: monotone over levels, then never below the lighter load."""

    def rising(table: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        rows: list[tuple[float, ...]] = []
        for row in table:
            fresh = monotone(row)
            rows.append(tuple(max(pair) for pair in zip(fresh, rows[-1], strict=True)) if rows else tuple(fresh))
        return tuple(rows)

    return LatencyProfile(rising(mean), rising(tail))


def measured_profile(
    query: Callable[[int], object], levels: int, loads: Sequence[int] = (0, 1, 2), repeats: int = 50, tail: float = 0.95
) -> LatencyProfile:
    """Time `query(level)` beside 0, 1, 2, ... busy processes; levels take turns, so that a disturbance hits all alike.

    Args:
        loads: numbers of competing processes, ascending.
        repeats: queries of each level and load.
        tail: the quantile that objectives are about.
    """
    means, tails = [], []
    for load in loads:
        taken: list[list[float]] = [[] for _ in range(levels)]
        with competing(load):
            for _ in range(repeats):
                for level in range(levels):
                    began = time.perf_counter()
                    query(level)
                    taken[level].append(time.perf_counter() - began)
        means.append([sum(t) / len(t) for t in taken])
        tails.append([sorted(t)[min(len(t) - 1, int(tail * len(t)))] for t in taken])
    return fitted(means, tails)


@contextmanager
def competing(count: int) -> Iterator[None]:
    """Inside, `count` other processes compute without pause on the processors that this one may use."""
    spin = "print(flush=True)\nx = 1.0\nwhile True: x = x * 1.0000001 % 7.0"
    others: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            others.append(subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE, text=True))
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()  # it runs
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
            if other.stdout is not None:
                other.stdout.close()


class LatencyObjective:
    """Before each query the largest level whose expected tail meets `target`; after it, the load is estimated anew.

    slowdown <- memory * slowdown + (1 - memory) * measured / expected when idle.

    Args:
        target: seconds.
        memory: weight of the past in the moving average, in [0, 1).

    >>> idle = LatencyProfile(((1.0, 2.0, 4.0), (2.0, 4.0, 8.0)), ((1.0, 2.0, 4.0), (2.0, 4.0, 8.0)))
    >>> control = LatencyObjective(idle, target=5.0, memory=0.5)
    >>> control.level(), control.saw(2, 12.0), control.level()
    (2, None, 1)
    """

    def __init__(self, profile: LatencyProfile, target: float, memory: float = 0.8) -> None:
        self.profile, self.target, self.memory, self.slowdown = profile, target, memory, 1.0

    def level(self) -> int:
        """The level for the next query; where none can meet the target, the largest of the quickest."""
        times = [self.profile.expected(i, self.slowdown) for i in range(len(self.profile.mean[0]))]
        met = [i for i, t in enumerate(times) if t <= max(self.target, min(times))]
        return max(met)

    def saw(self, level: int, seconds: float) -> None:
        """A query at `level` took so long."""
        ratio = seconds / self.profile.mean[0][level]
        self.slowdown = self.memory * self.slowdown + (1 - self.memory) * ratio
