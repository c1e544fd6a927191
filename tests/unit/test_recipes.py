"""Every recipe that ships runs, at the tiny size of its methods' cards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import cupel
from cupel.core.catalogue import find
from cupel.runner.recipe import Recipe, Ref, StepSpec, read_recipe
from cupel.runner.run import run

RECIPES = sorted((Path(cupel.__file__).parent / "recipes").glob("*.yaml"))


def tiny(kind: str, ref: Ref) -> Ref:
    return replace(ref, params={**ref.params, **find(kind, ref.name).card().tiny})


def shrunk(recipe: Recipe) -> Recipe:
    def step(spec: StepSpec) -> StepSpec:
        refs = tuple(tiny("technique", r) for r in spec.refs)
        return replace(spec, refs=refs, budget={**spec.budget, "epochs": 1} if spec.kind == "fit" else {})

    return replace(
        recipe,
        workload=tiny("workload", recipe.workload),
        seeds=recipe.seeds[:1],
        given={
            name: replace(g, workload=tiny("workload", g.workload), steps=tuple(step(s) for s in g.steps))
            for name, g in recipe.given.items()
        },
        variants={name: tuple(step(s) for s in steps) for name, steps in recipe.variants.items()},
        probes=tuple(tiny("probe", p) for p in recipe.probes),
    )


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_recipe_runs(path: Path) -> None:
    recipe = shrunk(read_recipe(path))
    card = run(recipe)
    for name, variant in card["variants"].items():
        assert not variant["failures"], name
        for probe, found in variant["probes"].items():
            told = any(note.startswith("not applicable: ") for note in found["notes"])  # int8 has no gradients
            assert found["readings"] or told, (name, probe, found["notes"])
    variants = card["variants"].values()
    for probe in (p.label for p in recipe.probes):  # what one network does not allow, another here does
        assert any(v["probes"][probe]["readings"] for v in variants), probe
    assert len(card["gate"]) == len(recipe.gate)
