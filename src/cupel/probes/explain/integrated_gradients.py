"""Probe `integrated-gradients`: which pixels made the prediction, by gradients along a straight line."""

from __future__ import annotations

from dataclasses import dataclass

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Readings
from cupel.core.types import Subject, still
from cupel.ops.attribution import completeness_gap, integrated_gradients
from cupel.ops.explaining import gallery, judged, scene_of

CARD = Card(
    name="integrated-gradients",
    family="explain",
    source="M. Sundararajan, A. Taly, Q. Yan, Axiomatic Attribution for Deep Networks, ICML 2017, arXiv 1703.01365, "
    "equations 1 and 3",
    tags=("attribution", "explanation", "saliency", "path"),
    needs=("classes", "gradients"),
    readings=(
        "deletion_auc",
        "insertion_auc",
        "deletion_auc_random",
        "insertion_auc_random",
        "completeness_error",
        "sparsity_gini",
        "passes",
    ),
    ordered={"insertion_auc": "trained"},
    tiny={"inputs": 4, "steps": 4, "points": 4},
)


@dataclass(frozen=True)
class IntegratedGradients:
    r"""Attribute each prediction to pixels by the gradients on the way from black, and judge the maps.

    map = (x - x0) (1/m) sum_k grad f(x0 + (k - 1/2)/m (x - x0)), summed over channels, where f is the
    probability of the predicted class and x0 the lower bound of the inputs (0 without bounds).
    `deletion_auc`: area under f while the highest pixels turn black first. `insertion_auc`: the same
    while they replace a blurred image. `completeness_error`: |sum of the map - (f(x) - f(x0))|.
    `sparsity_gini`: how few pixels hold the map. `..._random`: areas of random maps, for comparison.

    Shapes: inputs `[N, C, H, W]` or `[N, C, T]`, maps `[B, H, W]` or `[B, T]`.

    Raises:
        NotApplicable: inputs are no images or series, or no gradient reaches them.

    Source: Sundararajan, Taly, Yan, ICML 2017, arXiv 1703.01365; deletion and insertion: Petsiuk, Das,
    Saenko, RISE, BMVC 2018, arXiv 1806.07421.

    Departs: midpoints instead of right end points in the sum: the same cost, a smaller error.

    Example:
        >>> IntegratedGradients(steps=20).inputs
        60
    """

    inputs: int = param(60, "test inputs that are explained", ge=1)
    steps: int = param(50, "gradients on the line from black to the input", ge=1)
    points: int = param(32, "steps of the deletion and insertion curves", ge=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        with still(subject.model):
            scene = scene_of(subject, self.inputs, ctx.rng("inputs"))
            maps = integrated_gradients(scene.value, scene.inputs, scene.black, self.steps)
            gaps = completeness_gap(scene.value, maps, scene.black, scene.inputs)
            found = judged(scene, maps, gaps, self.steps, self.points, ctx.rng("chance"))
        return Readings(found, figures={"attributions": gallery(scene, maps)})
