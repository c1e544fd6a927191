"""Readings, and the scorecard that holds them: the one record that terminal, page and gate draw from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cupel.core.errors import ContractError

FORMAT = 1
BETTER = ("higher", "lower", "none")
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def t95(count: int) -> float:
    """Two-sided 95% quantile of Student's t for a mean of `count` values."""
    if count < 2:
        return math.inf
    return _T95[count - 2] if count - 2 < len(_T95) else 1.96 + 2.4 / (count - 1)


@dataclass(frozen=True)
class Reading:
    """One measured number.

    Args:
        value: the number itself.
        unit: `share`, `bytes`, `ms`, `params`, `ops`, `nats`, `1`, ...
        better: `higher`, `lower` or `none`.
        count: how many inputs (or repeats) it rests on.
        low, high: 95% interval from those inputs alone; equal to `value` for exact counts.
    """

    value: float
    unit: str
    better: str = "none"
    count: int = 1
    low: float | None = None
    high: float | None = None


def share(hits: int, count: int, better: str = "higher") -> Reading:
    """A share of `count` inputs with its Wilson interval (Wilson 1927).

    >>> r = share(90, 100); round(r.low, 3), round(r.high, 3)
    (0.826, 0.945)
    """
    if count == 0:
        return Reading(math.nan, "share", better, 0)
    p, z = hits / count, 1.959964
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return Reading(p, "share", better, count, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def mean_of(values: Sequence[float], unit: str, better: str = "none") -> Reading:
    """The mean of values over inputs or repeats, with its Student interval."""
    n = len(values)
    if n == 0:
        return Reading(math.nan, unit, better, 0)
    m = math.fsum(values) / n
    if n == 1:
        return Reading(m, unit, better, 1, m, m)
    half = t95(n) * math.sqrt(math.fsum((v - m) ** 2 for v in values) / (n - 1) / n)
    return Reading(m, unit, better, n, m - half, m + half)


def median_of(values: Sequence[float], unit: str, better: str = "none") -> Reading:
    """The median (the lower of two middle ones) with the order statistics that hold it with 95%.

    >>> median_of(range(101), "1")
    Reading(value=50.0, unit='1', better='none', count=101, low=40.0, high=61.0)
    """
    n, ranked = len(values), sorted(values)
    if n == 0:
        return Reading(math.nan, unit, better, 0)
    reach = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return Reading(float(ranked[(n - 1) // 2]), unit, better, n, float(ranked[low]), float(ranked[high]))


def exact(value: float, unit: str, better: str = "none") -> Reading:
    """A count or size that has no sampling error."""
    return Reading(float(value), unit, better, 1, float(value), float(value))


@dataclass(frozen=True)
class Readings(Mapping[str, Reading]):
    """What a probe found: readings by name, notes in words, and figures as plain JSON for the page."""

    by_name: Mapping[str, Reading]
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, notes: Sequence[str] = (), figures: Mapping[str, Any] | None = None, **named: Reading | tuple[float, str]
    ) -> Readings:
        """`Readings.of(accuracy=share(90, 100), params=(1200, "params"))`."""
        made = {}
        for name, value in named.items():
            reading = value if isinstance(value, Reading) else exact(*value)
            if reading.better not in BETTER:
                raise ContractError(f"`better` of {name} must be one of {BETTER}; got {reading.better!r}. Name one.")
            made[name] = reading
        return cls(made, tuple(notes), dict(figures or {}))

    def __getitem__(self, name: str) -> Reading:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)


def over_seeds(per_seed: Sequence[Reading]) -> dict[str, Any]:
    """One scorecard cell: mean over seeds with an interval that covers seeds and inputs.

    The half width joins the Student half width over seeds with the mean half width over inputs
    (root of the sum of squares): either alone would flatter a result.
    """
    values = [r.value for r in per_seed]
    n = len(values)
    m = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - m) ** 2 for v in values) / (n - 1) / n) * t95(n) if n > 1 else 0.0
    down = math.fsum(r.value - (r.value if r.low is None else r.low) for r in per_seed) / n
    up = math.fsum((r.value if r.high is None else r.high) - r.value for r in per_seed) / n
    low, high = m - math.hypot(spread, down), m + math.hypot(spread, up)
    first = per_seed[0]
    if first.unit == "share":
        low, high = max(0.0, low), min(1.0, high)
    return {
        "value": m, "unit": first.unit, "better": first.better, "count": first.count,
        "low": low, "high": high, "seeds": values,
    }  # fmt: skip


def difference(cell: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[float, float, float]:
    """Mean and 95% interval of `cell - base`, paired by seed where both have the same seeds.

    >>> difference({"value": 2, "seeds": [1, 3]}, {"value": 1, "seeds": [0, 2]})
    (1.0, 1.0, 1.0)
    """
    a, b = cell["seeds"], base["seeds"]
    if len(a) == len(b) and len(a) > 1:
        r = mean_of([x - y for x, y in zip(a, b, strict=True)], "")
        return r.value, float(r.low or 0.0), float(r.high or 0.0)
    gap = float(cell["value"]) - float(base["value"])
    half = math.hypot(cell["value"] - cell["low"], base["high"] - base["value"])
    return gap, gap - half, gap + half
