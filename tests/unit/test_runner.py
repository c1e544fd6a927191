"""Running recipes: shared beginnings, processes, forks, gates, the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cupel
from cupel.core.errors import PlanError, RecipeError
from cupel.core.steps import FitStep
from cupel.report.html import page
from cupel.runner.bench import prepare
from cupel.runner.describe import describe
from cupel.runner.plan import make_plan
from cupel.runner.recipe import read_recipe, recipe_of
from cupel.runner.run import exit_code, run
from cupel.testing.harness import same_bits, state
from cupel.workloads.vision.digits_cnn import DigitsCnn

SMALL = {"digits-cnn": {"width": 4, "examples": 96}}
INT8 = [{"fit": {"epochs": 1}}, {"apply": "int8-ptq"}]
VARIANTS: dict[str, Any] = {
    "plain": [{"fit": {"epochs": 1}}],
    "longer": [{"fit": {"epochs": 1}}, {"fit": {"epochs": 1}}],
    "lean": [{"fit": {"epochs": 1, "techniques": [{"pdp": {"sparsity": 0.5}}]}}],
}


def stripped(card: dict[str, Any]) -> str:
    """A scorecard without what may differ between equal runs."""
    plain = json.loads(json.dumps(card, default=str))
    for key in ("date", "seconds"):
        plain.pop(key)
    for variant in plain["variants"].values():
        for probe in variant["probes"].values():
            probe.pop("seconds")
        for curve in variant["curves"].values():
            for epoch in curve:
                epoch.pop("seconds")
    return json.dumps(plain, sort_keys=True)


def test_shared_beginnings_are_trained_once() -> None:
    plan = make_plan(recipe_of(workload=SMALL, variants=VARIANTS, seeds=[0, 1], probes=["accuracy"]))
    told = describe(plan)["cost"]
    assert told["fits"] == 6 and told["fits saved by shared beginnings"] == 2
    assert len({plan.leaves["plain", s] for s in (0, 1)}) == 2


def test_same_bits_for_any_number_of_processes() -> None:
    parts: dict[str, Any] = {
        "workload": SMALL,
        "variants": VARIANTS | {"int8": INT8},
        "seeds": [0, 1],
        "probes": ["accuracy", "calibration", "fidelity"],
    }
    told = run(jobs=1, **parts)
    assert stripped(told) == stripped(run(jobs=2, **parts))
    notes = {v: told["variants"][v]["probes"]["fidelity"]["notes"] for v in ("plain", "int8", "longer")}
    assert "'original'" in str(notes["int8"]) and "'original'" in str(notes["longer"])
    assert "not applicable" in str(notes["plain"])


def test_run_folder_holds_what_is_promised(tmp_path: Path) -> None:
    out = tmp_path / "run"
    card = run(workload=SMALL, variants=VARIANTS, probes=["accuracy"], out=out, gate={"lean": {"accuracy": ">= 0.0"}})
    assert exit_code(card) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "artefacts",
        "log.jsonl",
        "models",
        "recipe.yaml",
        "scorecard.html",
        "scorecard.json",
    ]
    assert {p.name for p in (out / "models").iterdir()} == {
        f"{v}-0.{end}" for v in VARIANTS for end in ("safetensors", "json")
    }
    assert [p.name for p in (out / "artefacts").iterdir()] == ["masks-lean-0.npz"]
    assert len((out / "log.jsonl").read_text().splitlines()) == 3
    again = read_recipe(out / "recipe.yaml")
    assert (
        again.plain()
        == recipe_of(**{k: card["recipe"][k] for k in ("workload", "variants", "seeds", "probes", "gate")}).plain()
    )
    with pytest.raises(RecipeError, match="new or empty"):
        run(workload=SMALL, variants=VARIANTS, out=out)


def test_page_is_self_contained_and_escapes() -> None:
    card = run(workload=SMALL, variants={"plain": [{"fit": {"epochs": 0}}]}, probes=["accuracy"])
    card["variants"]["plain"]["probes"]["accuracy"]["notes"] = ["<b>bold</b>", "</script><script>alert(1)</script>"]
    card["variants"]["plain"]["failures"] = ["<img src=x>"]
    text = page(card)
    assert "<b>bold</b>" not in text and "&lt;b&gt;bold&lt;/b&gt;" in text
    assert "<script>alert" not in text and "<img" not in text
    assert len(text) < 2_000_000


def test_names_that_would_leave_the_folder_are_refused() -> None:
    for name in ("../up", "a/b", "<b>", ".hidden", "x" * 80):
        with pytest.raises(RecipeError, match="a name must be"):
            recipe_of(workload=SMALL, variants={name: ["fit"]})


def test_a_fork_without_change_is_the_subject() -> None:
    subject, ctx = prepare(DigitsCnn(width=4, examples=96), [FitStep({"epochs": 1})])
    assert same_bits(state(ctx.fork().model), state(subject.model))


def test_forks_change_what_they_are_asked_to_and_are_cached() -> None:
    subject, ctx = prepare(DigitsCnn(width=4, examples=96), [FitStep({"epochs": 1})])
    half = ctx.fork(data=lambda view: view.with_train(view.train.take(torch.arange(48))))
    assert len(half.data.train) == 48 and len(half.data.test) == 96
    assert not same_bits(state(half.model), state(subject.model))
    assert same_bits(
        state(ctx.fork(seed=5).model),
        state(prepare(DigitsCnn(width=4, examples=96), [FitStep({"epochs": 1})], 5)[0].model),
    )
    bench = ctx.forker.__self__  # type: ignore[union-attr]
    made = bench.forks_made
    ctx.fork(data=lambda view: view.with_train(view.train.take(torch.arange(48))))
    assert bench.forks_made == made


def test_forks_of_networks_that_differ_in_no_number_are_not_taken_for_each_other() -> None:
    _, ctx = prepare(DigitsCnn(width=4, examples=96), [FitStep({"epochs": 1})])

    def leaky(rate: float) -> torch.nn.Module:
        found = ctx.fork(model=lambda net: torch.nn.Sequential(net, torch.nn.Dropout(rate)))
        return found.model[1]  # type: ignore[index,no-any-return]

    assert [leaky(rate).p for rate in (0.1, 0.5)] == [0.1, 0.5]


def test_teacher_of_other_data_is_refused() -> None:
    with pytest.raises(Exception, match="same data"):
        card = run(
            workload=SMALL,
            given={"teacher": {"workload": {"digits-cnn": {"width": 4, "examples": 96, "data_seed": 1}}, "steps": []}},
            steps=[{"fit": {"epochs": 1, "techniques": ["distill"]}}],
            probes=["accuracy"],
        )
        raise RuntimeError(card["variants"]["model"]["failures"][0])


def test_a_failing_variant_does_not_stop_the_others() -> None:
    card = run(
        workload=SMALL,
        variants={"good": [{"fit": {"epochs": 1}}], "bad": [{"fit": {"epochs": 1, "optimizer": "sgd", "lr": 1e30}}]},
        probes=["accuracy"],
        gate={"bad": {"accuracy": ">= 0.0"}},
    )
    assert "must stay finite" in card["variants"]["bad"]["failures"][0]
    assert not card["variants"]["good"]["failures"] and card["variants"]["good"]["probes"]["accuracy"]["readings"]
    assert exit_code(card) == 1 and not card["gate"][0]["passed"]


def test_methods_may_be_objects() -> None:
    card = cupel.run(
        workload=DigitsCnn(width=4, examples=96),
        variants={"lean": [{"fit": {"epochs": 1, "techniques": [cupel.PDP(sparsity=0.5)]}}]},
        probes=[cupel.Accuracy()],
    )
    assert card["recipe"]["variants"]["lean"][0]["fit"]["techniques"] == [{"pdp": {"sparsity": 0.5}}]


def test_unknown_probe_parameter_is_refused_by_the_plan() -> None:
    with pytest.raises(PlanError, match="accuracy"):
        make_plan(recipe_of(workload=SMALL, steps=["fit"], probes=["acuracy"]))


def test_settings_reach_their_place(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("workload: digits-cnn\nsteps:\n  - fit: {techniques: [pdp]}\n")
    changes = ("workload.digits-cnn.width=8", "steps.0.fit.techniques.0.pdp.sparsity=0.25", "steps.0.fit.lr=1e-2")
    recipe = read_recipe(path, changes)
    assert recipe.workload.params == {"width": 8}
    step = recipe.variants["model"][0]
    assert step.refs[0].params == {"sparsity": 0.25} and step.budget == {"lr": 0.01}
    with pytest.raises(RecipeError, match="Did you mean 'steps'"):
        read_recipe(path, ("stepss.0=fit",))
