"""Claim of `integrated-gradients`: maps add up to the change of the output, and rank pixels better than the slope."""

from __future__ import annotations

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import still
from cupel.ops.attribution import area, completeness_gap, gini, integrated_gradients, ranked_curve
from cupel.ops.explaining import scene_of
from cupel.probes.explain.integrated_gradients import IntegratedGradients
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="integrated-gradients",
    statement="On digits 50 gradients on the line miss the change of the output by less than 5% of it, one gradient "
    "times input misses it by far more, and removing the highest pixels of the map hurts more than those of that rival",
    paper="20 to 300 steps bring the sum within 5% of the change of the output (section 5); plain gradients break "
    "sensitivity where the output is saturated",
    bounds={"gap_50_share": "<= 0.05", "gap_1_share": ">= 0.2", "deletion_ratio": "<= 0.9"},
)


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject, ctx = build(DigitsCnn(), Context(seed=seed)), Context(seed=seed)
    subject = subject.with_model(fit(subject.model, subject.data, subject.task, budget=subject.budget, seed=seed))
    count = 50 if quick else 200
    probe = IntegratedGradients(inputs=count).measure(subject, ctx)
    found: dict[str, float] = {}
    with still(subject.model):
        scene = scene_of(subject, count, ctx.rng("inputs"))
        rows = scene.classes.new_tensor(range(count))
        change = (scene.value(scene.inputs, rows) - scene.value(scene.black, rows)).abs().mean()
        for steps in (5, 50, 300):
            maps = integrated_gradients(scene.value, scene.inputs, scene.black, steps)
            gap = completeness_gap(scene.value, maps, scene.black, scene.inputs).mean()
            found[f"gap_{steps}_share"] = float(gap / change)
        # Gradient times input is a sum of one step taken at the input itself.
        plain = integrated_gradients(scene.value, 2 * scene.inputs, scene.black, 1) / 2
        found["gap_1_share"] = float(completeness_gap(scene.value, plain, scene.black, scene.inputs).mean() / change)
        rival = float(area(ranked_curve(scene.value, scene.inputs, scene.black, plain, 32)).mean())
        found["rival_deletion"], found["rival_gini"] = rival, float(gini(plain).mean())
    return found | {
        "deletion_ratio": probe["deletion_auc"].value / rival,
        "deletion": probe["deletion_auc"].value,
        "insertion": probe["insertion_auc"].value,
        "random_deletion": probe["deletion_auc_random"].value,
        "random_insertion": probe["insertion_auc_random"].value,
        "gini": probe["sparsity_gini"].value,
    }
