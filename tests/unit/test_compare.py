"""Differences between runs: paired where the seeds are the same, never where they are not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cupel.core.scorecard import Reading, mean_of, over_seeds
from cupel.report.compare import beyond, differences


def card(values: dict[str, list[float]], seeds: list[int], better: str = "higher", failed: str = "") -> dict[str, Any]:
    """A scorecard with one reading, `accuracy`, of each variant."""
    cells = {v: over_seeds([Reading(x, "1", better) for x in xs]) for v, xs in values.items()}
    return {
        "recipe": {"workload": "w", "variants": {v: ["fit"] for v in values}, "probes": ["accuracy"]},
        "seeds": seeds,
        "variants": {
            v: {"probes": {"accuracy": {"readings": {"accuracy": c}, "notes": []}},
                "failures": ["lost"] if v == failed else []}
            for v, c in cells.items()
        },
    }  # fmt: skip


A = card({"plain": [1.0, 2.0, 3.0], "lean": [5.0, 6.0, 7.0]}, [0, 1, 2])


def test_same_seeds_are_paired() -> None:
    b = card({"plain": [1.5, 2.5, 3.5]}, [0, 1, 2])
    (row,) = differences([A, b], ["a", "b"])
    assert (row["gap"], row["low"], row["high"]) == (0.5, 0.5, 0.5)  # each seed moved by the same
    assert (row["run"], row["first"], row["value"]) == ("b", 2.0, 2.5)
    assert beyond(row) == "better"


@pytest.mark.parametrize("b", [
    card({"plain": [1.5, 2.5, 3.5]}, [3, 4, 5]),
    card({"plain": [1.5, 2.5, 3.5]}, [0, 1, 2], failed="plain"),
])  # fmt: skip
def test_other_seeds_are_independent(b: dict[str, Any]) -> None:
    (row,) = differences([A, b], ["a", "b"])
    half = mean_of([1.0, 2.0, 3.0], "")
    assert half.high is not None
    expected = math.hypot(half.high - 2.0, half.high - 2.0)  # the same spread on both sides
    assert row["gap"] == pytest.approx(0.5) and row["high"] - 0.5 == pytest.approx(expected)
    assert beyond(row) == ""


def test_one_variant_of_any_run_may_be_the_base() -> None:
    b = card({"plain": [0.0, 1.0, 2.0]}, [0, 1, 2])
    rows = differences([A, b], ["a", "b"], base=0, variant="lean")
    assert {(r["run"], r["variant"]): r["gap"] for r in rows} == {("a", "plain"): -4.0, ("b", "plain"): -5.0}
    assert {r["run"] for r in differences([A, b], ["a", "b"], base=1)} == {"a"}


def test_what_cannot_be_subtracted_says_so() -> None:
    b = card({"other": [1.0, 2.0, 3.0]}, [0, 1, 2])
    assert [r["gap"] for r in differences([A, b], ["a", "b"])] == [None]
    b = card({"plain": [1.0, 2.0, 3.0]}, [0, 1, 2])
    b["variants"]["plain"]["probes"]["accuracy"]["readings"]["accuracy"]["value"] = None
    assert differences([A, b], ["a", "b"])[0]["gap"] is None


def test_lower_is_better_turns_the_mark() -> None:
    b = card({"plain": [1.5, 2.5, 3.5]}, [0, 1, 2], better="lower")
    assert beyond(differences([A, b], ["a", "b"])[0]) == "worse"
    b = card({"plain": [1.5, 2.5, 3.5]}, [0, 1, 2], better="none")
    assert beyond(differences([A, b], ["a", "b"])[0]) == ""
