"""One more probe on a finished run: the networks it kept are measured, and its scorecard and page written anew.

python -m cupel.testing.further RUN "irs: {sigma: 0.1}"

What is read is what the recipe with that probe would have read: the same networks, what the recipe gives, and, where
something was done after the first fit, the network that it left.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from cupel.core.errors import CupelError, PlanError
from cupel.core.shelf import ORIGINAL
from cupel.core.steps import FitStep, in_order
from cupel.core.types import Subject
from cupel.runner.bench import Bench, given_of, step_of
from cupel.runner.plan import make_plan, method_of
from cupel.runner.recipe import Recipe, recipe_of
from cupel.runner.run import cells, write_run
from cupel.runner.work import measured, one_thread
from cupel.storage.cards import read_scorecard
from cupel.storage.networks import load_network


def further(run: Path, probe: object, jobs: int = 2) -> dict[str, Any]:
    """Measure every network of the run in folder `run` with `probe`, as it would stand in the recipe."""
    card = read_scorecard(run)
    plain: Mapping[str, Any] = card["recipe"]
    recipe = recipe_of(**{**plain, "probes": [*plain["probes"], probe]})
    make_plan(recipe)
    card["recipe"] = recipe.plain()
    with ProcessPoolExecutor(jobs) as pool:
        found = list(pool.map(partial(_of_seed, recipe, run), recipe.seeds))
    for variant in recipe.variants:
        card["variants"][variant]["probes"][recipe.probes[-1].label] = cells([cell[variant] for cell in found])
    write_run(run, card)
    return card


def _of_seed(recipe: Recipe, run: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Variant -> what the recipe's last probe reads of its network of that seed."""
    given = {name: given_of(g, method_of) for name, g in recipe.given.items()}
    ref, found = recipe.probes[-1], {}
    with one_thread():
        first = Bench(method_of("workload", recipe.workload), [], seed, given)
        start = first.start()
        for variant, specs in recipe.variants.items():
            bench = Bench(first.workload, [step_of(s, method_of) for s in specs], seed, given)
            assert start.shelf is not None
            subject = replace(start, shelf=start.shelf.copy(), _memo={})
            left = _left_by_the_first_fit(recipe, variant, bench)
            if left and subject.shelf is not None and ORIGINAL not in subject.shelf:
                subject.shelf.put(ORIGINAL, _network(run, left, seed))
            try:
                subject = subject.with_model(_network(run, variant, seed))
            except CupelError:
                if not left:
                    raise
                subject = _from(subject.with_model(_network(run, left, seed)), bench)  # it has no plain form
            began = time.perf_counter()
            found[variant] = measured(ref, subject, bench)
            found[variant] |= {"seconds": time.perf_counter() - began, "forks": bench.forks_made}
    return found


def _network(run: Path, variant: str, seed: int) -> nn.Module:
    return load_network(run / "models", f"{variant}-{seed}")


def _from(subject: Subject, bench: Bench) -> Subject:
    """What the steps after the first fit make of what it left."""
    for name, (_, trained) in in_order(bench.steps).items():
        subject = bench.step(subject, name) if trained else subject
    return subject


def _left_by_the_first_fit(recipe: Recipe, variant: str, bench: Bench) -> str:
    """The variant that is this one's steps up to its first fit; nothing where no step follows it."""
    steps: Sequence[Any] = bench.steps
    first = next((k for k, s in enumerate(steps) if isinstance(s, FitStep)), len(steps))
    if first >= len(steps) - 1:
        return ""
    begun = [s.plain() for s in recipe.variants[variant][: first + 1]]
    for name, specs in recipe.variants.items():
        if [s.plain() for s in specs] == begun:
            return name
    raise PlanError(f"a variant must be the first fit of {variant} alone; the run has none. Measure it in a new run.")


if __name__ == "__main__":
    further(Path(sys.argv[1]), yaml.safe_load(sys.argv[2]))
