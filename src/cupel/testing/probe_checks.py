"""What every probe must do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from cupel.core.catalogue import Entry, entries
from cupel.core.errors import MissingData, NotApplicable, PlanError
from cupel.core.scorecard import Readings
from cupel.core.steps import FitStep, run_steps
from cupel.core.types import Subject
from cupel.runner.bench import Bench
from cupel.runner.plan import make_plan
from cupel.runner.recipe import recipe_of
from cupel.testing import harness as h


def _measured(entry: Entry, on: Entry | None = None) -> tuple[Readings, Subject, Bench]:
    workload = on or h.workload_for(entry)
    laid = h.fresh(workload.name).shelf  # a workload may bring an artefact itself
    given = {k: v for k, v in h.given_for(entry, workload).items() if laid is None or k not in laid.entries}
    bench = Bench(h.tiny(workload), [FitStep(h.ONE_EPOCH)], given=given)
    subject = bench.start()
    assert subject.shelf is not None
    subject = run_steps(subject, bench.steps, bench.context(subject.shelf))
    assert subject.shelf is not None
    ctx = bench.context(subject.shelf, forks=True).child(f"probe-{entry.name}")
    with h.watching(subject):
        readings = h.tiny(entry).measure(subject, ctx)
    return readings, subject, bench


def leaves_subject(entry: Entry) -> None:
    """The subject, its data, its shelf and all globals are bit for bit as before."""
    _measured(entry)


def reads_what_it_declares(entry: Entry) -> None:
    """Readings have the declared names, sound values and intervals; figures are JSON."""
    readings, _, _ = _measured(entry)
    assert set(readings) == set(entry.card().readings), set(readings) ^ set(entry.card().readings)
    for name, r in readings.items():
        assert math.isfinite(r.value), name
        assert r.low is not None and r.high is not None and r.low <= r.value <= r.high, (name, r)
        if r.unit == "share":
            assert 0 <= r.value <= 1, (name, r)
    assert len(json.dumps(readings.figures)) < 200_000


def same_seed_same_readings(entry: Entry) -> None:
    """Measured twice, the same values (times excepted)."""
    first, second = _measured(entry)[0], _measured(entry)[0]
    if not entry.card().timed:
        assert dict(first) == dict(second)
        assert first.figures == second.figures


def forks_as_declared(entry: Entry) -> None:
    """No more forks than the card says."""
    _, _, bench = _measured(entry)
    forks = entry.card().forks
    most = getattr(h.tiny(entry), forks) if isinstance(forks, str) else forks
    assert bench.forks_made <= most


def ignores_batch_size(entry: Entry) -> None:
    """Reading the data in batches of seven changes nothing but rounding."""
    readings, subject, bench = _measured(entry)
    small = h.in_small_batches(subject)
    if small is None or entry.card().timed or entry.card().forks:
        return
    assert subject.shelf is not None
    again = h.tiny(entry).measure(small, bench.context(subject.shelf, forks=True).child(f"probe-{entry.name}"))
    for name, r in readings.items():
        assert math.isclose(r.value, again[name].value, rel_tol=1e-3, abs_tol=1e-3), (name, r.value, again[name].value)


def runs_or_is_refused(entry: Entry) -> None:
    """On every workload: the plan refuses it, it says why it does not apply, or it measures."""
    for on in entries("workload"):
        try:
            make_plan(recipe_of(workload=on.name, steps=["fit"], probes=[{entry.name: dict(entry.card().tiny)}]))
            _measured(entry, on)
        except (PlanError, NotApplicable, MissingData):
            continue


def orders_subjects(entry: Entry) -> None:
    """The reading the card names is better on the subject the card names: trained for long, or fresh."""
    ordered: dict[str, Any] = dict(entry.card().ordered)
    for reading, winner in ordered.items():
        workload = h.workload_for(entry)
        values = {}
        for label, epochs in (("trained", 12), ("fresh", 0)):
            bench = Bench(h.tiny(workload), [FitStep({"epochs": epochs})])
            subject = bench.start()
            assert subject.shelf is not None
            subject = run_steps(subject, bench.steps, bench.context(subject.shelf))
            ctx = bench.context(subject.shelf or h.fresh(workload.name).shelf, forks=True).child("ordered")  # type: ignore[arg-type]
            values[label] = h.tiny(entry).measure(subject, ctx)[reading]
        better = values["trained"].better
        gap = values["trained"].value - values["fresh"].value
        gap = gap if better == "higher" else -gap
        assert gap > 0 if winner == "trained" else gap < 0, values


CHECKS: list[Callable[[Entry], None]] = [
    leaves_subject,
    reads_what_it_declares,
    same_seed_same_readings,
    forks_as_declared,
    ignores_batch_size,
    runs_or_is_refused,
    orders_subjects,
]
