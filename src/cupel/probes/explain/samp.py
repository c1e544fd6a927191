"""Probe `samp`: which pixels made the prediction, along a path that is searched for clear maps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Readings
from cupel.core.types import Subject, still
from cupel.ops.attribution import completeness_gap, path_map
from cupel.ops.explaining import Scene, gallery, judged, scene_of

CARD = Card(
    name="samp",
    family="explain",
    source="B. Zhang, W. Zheng, J. Zhou, J. Lu, Path Choice Matters for Clear Attribution in Path Methods, ICLR 2024, "
    "arXiv 2401.10442",
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
    tiny={"inputs": 4, "share": 0.25, "fragments": 3, "points": 4},
)


def samp_maps(scene: Scene, pixels: int, fragments: int | None, smooth: float) -> tuple[Tensor, Tensor, int]:
    """Maps `[B, *space]` from the deletion and insertion paths, completeness errors `[B]`, gradients taken.

    The map is the insertion map minus the deletion map; the error is the mean of the two paths'.
    """
    ways = ((scene.inputs, scene.black, False), (scene.blurred, scene.inputs, True))
    found = [path_map(scene.value, a, b, pixels, rising, fragments, smooth) for a, b, rising in ways]
    gaps = [completeness_gap(scene.value, m, a, b) for (m, _), (a, b, _) in zip(found, ways, strict=True)]
    return found[1][0] - found[0][0], (gaps[0] + gaps[1]) / 2, found[0][1] + found[1][1]


@dataclass(frozen=True)
class Samp:
    r"""Attribute each prediction along a path that moves the most telling pixels first, and judge the maps.

    Two paths: from the input to black (deletion), and from a blurred input to the input (insertion).
    At each step g is the gradient of the predicted class's probability f, d the way still to go, and
    P = sum over channels of g d ranks the pixels: the s largest move (insertion), or the s smallest
    (deletion). What they add, g times the move, is their attribution. SAMP++ also cuts a move longer
    than 1/n of the whole way in L1 (infinitesimal constraint) and replaces g by the running mean
    g_k = mu grad f + (1 - mu) g_{k-1} (momentum strategy). Readings as in `integrated-gradients`;
    `completeness_error` is the mean of the two paths'.

    Shapes: inputs `[N, C, H, W]` or `[N, C, T]`, maps `[B, H, W]` or `[B, T]`.

    Raises:
        NotApplicable: inputs are no images or series, or no gradient reaches them.

    Source: Zhang, Zheng, Zhou, Lu, ICLR 2024, arXiv 2401.10442 (SAMP, infinitesimal constraint, momentum
    strategy).

    Departs: s is a share of the pixels, so that it fits any size of image; the two maps are added as
    they are, without rescaling each to [0, 1], which would break the sum rule.

    Example:
        >>> Samp(form="samp").fragments
        25
    """

    form: str = param("samp++", "plain search, or with the two additions", choices=("samp", "samp++"))
    inputs: int = param(60, "test inputs that are explained", ge=1)
    share: float = param(0.03125, "share of the pixels that one step may move", gt=0, le=1)
    fragments: int = param(25, "a step goes at most one over this of the way (samp++)", ge=1)
    smooth: float = param(0.5, "weight mu of the new gradient (samp++)", gt=0, le=1)
    points: int = param(32, "steps of the deletion and insertion curves", ge=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        plus = self.form == "samp++"
        with still(subject.model):
            scene = scene_of(subject, self.inputs, ctx.rng("inputs"))
            pixels = max(1, round(self.share * scene.inputs[0, 0].numel()))
            parts = (self.fragments, self.smooth) if plus else (None, 1.0)
            maps, gaps, passes = samp_maps(scene, pixels, *parts)
            found = judged(scene, maps, gaps, passes, self.points, ctx.rng("chance"))
        return Readings(found, figures={"attributions": gallery(scene, maps)})
