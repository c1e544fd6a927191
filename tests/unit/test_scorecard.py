"""Readings, intervals and the gate against independent answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy import stats

from cupel.core.scorecard import Reading, Readings, difference, exact, mean_of, median_of, over_seeds, share, t95
from cupel.report.words import best, number, rows_of, rows_shown, worse
from cupel.runner.gate import judge
from cupel.runner.recipe import recipe_of


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (1, 10), (97, 100), (50, 50), (123, 4567)])
def test_share_has_wilson_interval(hits: int, count: int) -> None:
    oracle = stats.binomtest(hits, count).proportion_ci(method="wilson")
    r = share(hits, count)
    assert r.low is not None and r.high is not None
    assert math.isclose(r.low, max(0.0, min(oracle.low, r.value)), abs_tol=1e-6)
    assert math.isclose(r.high, oracle.high, abs_tol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5, 16, 17, 30, 200])
def test_student_quantiles(count: int) -> None:
    assert math.isclose(t95(count), stats.t.ppf(0.975, count - 1), rel_tol=0.01)


def test_mean_interval() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    low, high = stats.t.interval(0.95, 3, stats.tmean(values), stats.sem(values))
    r = mean_of(values, "ms")
    assert r.low is not None and r.high is not None
    assert math.isclose(r.low, low, rel_tol=1e-3) and math.isclose(r.high, high, rel_tol=1e-3)


@pytest.mark.parametrize("count", [10, 25, 60, 201])
def test_the_median_lies_between_its_order_statistics_in_95_of_100_draws(count: int) -> None:
    told = median_of(list(range(count, 0, -1)), "x")
    assert told.value == (count + 1) // 2 and told.low is not None and told.high is not None
    # X_(l) <= median <= X_(h) where at least l and fewer than h of n fair coins show heads
    within = stats.binom(count, 0.5)
    assert 0.94 < within.cdf(told.high - 1) - within.cdf(told.low - 1) < 0.99


def test_the_median_of_one_and_of_nothing() -> None:
    one, none = median_of([3], "x"), median_of([], "x")
    assert (one.value, one.low, one.high) == (3, 3, 3) and math.isnan(none.value) and none.count == 0


def test_over_seeds_joins_both_sources_of_doubt() -> None:
    cell = over_seeds([Reading(0.5, "x", "higher", 9, 0.4, 0.6), Reading(0.7, "x", "higher", 9, 0.6, 0.8)])
    seeds = t95(2) * math.sqrt(0.02) / math.sqrt(2)
    assert math.isclose(cell["high"] - cell["value"], math.hypot(seeds, 0.1))
    assert over_seeds([exact(5, "bytes")] * 3)["low"] == 5


def cell(values: list[float], unit: str = "x", better: str = "higher") -> dict[str, Any]:
    return over_seeds([exact(v, unit, better) for v in values])


def test_differences_are_paired_by_seed() -> None:
    gap, low, high = difference(cell([0.9, 0.5, 0.7]), cell([0.8, 0.4, 0.6]))
    assert math.isclose(gap, 0.1) and math.isclose(low, 0.1) and math.isclose(high, 0.1)


def card(**variants: dict[str, Any]) -> dict[str, Any]:
    return {"variants": {v: {"probes": {"p": {"readings": {"r": c}}}} for v, c in variants.items()}}


def verdict(rule: str, content: dict[str, Any]) -> bool:
    recipe = recipe_of(workload="digits-cnn", variants={"a": ["fit"], "b": ["fit"]}, gate={"a": {"r": rule}})
    from dataclasses import asdict

    return bool(judge([asdict(r) for r in recipe.gate], content)[0]["passed"])


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        (">= 0.9", False), (">= 0.5", True), ("<= 2", True), ("< 1.0", False),
        (">= b", True), (">= b + 0.05", True), (">= b + 0.2", False), (">= b - 0.2", True),
        ("<= b * 2", True), ("<= b / 2", False), ("> b*1.01", True),
    ],
)  # fmt: skip
def test_gate(rule: str, passes: bool) -> None:
    content = card(a=cell([0.9, 1.0, 1.1]), b=cell([0.8, 0.9, 1.0]))
    assert verdict(rule, content) is passes


def test_gate_judges_the_worse_end() -> None:
    wide = card(a=over_seeds([Reading(0.95, "share", "higher", 10, 0.80, 0.99)]), b=cell([1.0]))
    assert not verdict(">= 0.9", wide) and verdict(">= 0.79", wide)


def test_nan_and_missing_fail() -> None:
    assert not verdict(">= 0", card(a=cell([math.nan]), b=cell([1.0])))
    assert not verdict(">= 0", {"variants": {"a": {"probes": {}}, "b": {"probes": {}}}})


def test_marks() -> None:
    a, b = cell([0.9, 0.91, 0.92]), cell([0.5, 0.51, 0.52])
    assert best({"a": a, "b": b}) == {"a"} and worse(b, a) and not worse(a, b)
    assert best({"a": cell([1.0]), "b": cell([1.0])}) == set()
    assert not worse(cell([0.9, 0.95, 0.85]), cell([0.91, 0.93, 0.9]))


def test_numbers_are_short() -> None:
    shown = [
        number(v, u)
        for v, u in [
            (0.5, "share"),
            (1.0, "share"),
            (123456, "bytes"),
            (999, "params"),
            (0.12345, "ms"),
            (math.nan, ""),
        ]
    ]
    assert shown == [".500", "1.000", "123k", "999", ".123", "-"]


def test_readings_take_short_forms() -> None:
    r = Readings.of(a=(3, "params"), b=share(1, 2))
    assert r["a"].low == 3 and r["b"].value == 0.5 and list(r) == ["a", "b"]


def test_readings_without_any_value_are_not_shown_and_not_lost() -> None:
    both, never, nan = {"value": 0.5}, {"value": None}, {"value": math.nan}
    readings = [{"a": both, "b": never, "c": never}, {"a": both, "b": both, "c": nan}]
    variants = {str(k): {"probes": {"p": {"readings": r}}} for k, r in enumerate(readings)}
    told = {"recipe": {"probes": ["p"]}, "variants": variants}
    assert [name for _, name, _ in rows_of(told)] == ["a", "b", "c"]
    assert [name for _, name, _ in rows_shown(told)] == ["a", "b"]
