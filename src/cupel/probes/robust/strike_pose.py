"""Probe `strike-pose`: in how much of the space of poses does the network not know its own objects?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.fit import fit
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, mean_of, median_of, share
from cupel.core.shelf import SCENE
from cupel.core.types import Examples, Subject, still
from cupel.nets.convnet import ConvNet
from cupel.ops.labelled import classes_of, judged_classes
from cupel.ops.pose_search import (
    Trail,
    evolution_search,
    explored,
    least_changes,
    random_search,
    slope_search,
    z_search,
)
from cupel.ops.pose_survey import Survey, figures_of, seen_by
from cupel.ops.poses import NAMES, Scene, reach
from cupel.ops.render import Looks

Sees = Callable[[Tensor], Tensor]  # pictures [N, 1, S, S] -> outputs [N, K]

CARD = Card(
    name="strike-pose",
    family="robust",
    source="M. A. Alcorn, Q. Li, Z. Gong, C. Wang, L. Mai, W.-S. Ku, A. Nguyen, Strike (with) a Pose: Neural Networks "
    "Are Easily Fooled by Strange Poses of Familiar Objects, CVPR 2019, arXiv 1811.11553",
    tags=("evasion", "targeted", "black-box", "images", "3d", "pose", "renderer", "transfer"),
    needs=("classes", "images", "renders"),
    reads=("scene",),
    readings=(
        "pose_accuracy", "known_accuracy", "failing_share", "confident_share", "transfer", "witness_accuracy",
        "change_x", "change_y", "change_z", "change_yaw", "change_pitch", "change_roll", "random_renders",
        "zrs_renders", "fd_renders", "cma_renders", "random_reached", "zrs_reached", "fd_reached", "cma_reached",
    ),
    tiny={"poses": 24, "lines": 2, "steps": 2, "targets": 2, "renders": 24, "depths": 2, "each": 2},
)  # fmt: skip


@dataclass(frozen=True)
class StrikePose:
    r"""Render the workload's objects in poses from the whole pose space and count how often they are misread.

    A pose is (x, y, z, yaw, pitch, roll), uniform in the scene's part of the camera's pyramid and over all angles;
    light and background vary as in training. `failing_share` of `poses` is misread, `confident_share` of those with a
    probability of `sure` or more; `transfer` of those are misread by a second architecture, trained on the same
    pictures. `change_...`: from known poses that are read rightly one number is moved alone until the label flips,
    median of `lines` (pixels, share of the distance, degrees). `..._renders`: mean pictures until an object is read
    as a chosen wrong class with probability `sure`, all `renders` where it never was; `..._reached`: how often it was.
    Four searches: random; ZRS (the two best of `depths` z values bound the rest); FD-G, p <- p - lr g with
    g_i = (l(p + h e_i / 2) - l(p - h e_i / 2)) / h, angles carried as (cos, sin); CMA-ES on the same nine numbers. The
    last two start where the exploration of ZRS saw the least loss, and its pictures count.

    Use: to ask how a classifier of objects takes views that its training pictures did not show. Only on workloads
    that bring a renderer.

    Costs: training a second network, and about half a millisecond a picture: `poses`, some 260 a line, and up to four
    times `renders` a target. Nothing at inference, no bytes.

    Shapes: inputs `[N, 1, S, S]`; outputs `[N, K]`, one for each object of the scene.

    Raises:
        NotApplicable: there is no scene on the shelf, or it does not fit the classes.

    Source: Alcorn et al. 2019, sections 2 and 3; the released optimiser's settings.

    Departs: the pose space is the scene's; h and lr are larger, as 32 pixels show no change of 0.001; losses compare
    z values by their least (the released search keeps their order by mistake), each angle is displaced alone; CMA-ES
    is shown inside the pyramid; a target counts once it has probability `sure`, as one of few classes is met by chance.

    Example:
        >>> StrikePose(poses=100).sure
        0.9
    """

    poses: int = param(2000, "poses of the survey", ge=10)
    sure: float = param(0.9, "probability from which on the network is sure", ge=0, lt=1)
    lines: int = param(40, "known poses from which each number is moved alone", ge=1)
    steps: int = param(18, "steps of such a move in each direction", ge=1)
    targets: int = param(56, "pairs of object and wrong class that are searched for (0: all)", ge=0)
    renders: int = param(600, "most pictures of one search", ge=1)
    depths: int = param(10, "z values that ZRS compares", ge=2)
    each: int = param(2, "pictures at each of them", ge=1)
    slope_step: float = param(0.1, "h, the width of a finite difference", gt=0)
    lr: float = param(0.05, "length of a step of FD-G for each unit of the slope", gt=0)
    sigma: float = param(1.0, "first step of CMA-ES", gt=0)
    population: int = param(18, "pictures in a generation of CMA-ES", ge=2)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        scene, witness = self.scene(subject, ctx), self.witness(subject, ctx)
        with still(subject.model) as model, still(witness):
            sees = partial(seen_by, model, ctx.device)
            survey = self.surveyed(sees, scene, ctx)
            told = self.failures(subject, survey, partial(seen_by, witness, ctx.device))
            told |= changes(self.changed(sees, scene, ctx))
            trails = self.searched(sees, scene, ctx)
        told |= successes(trails)
        note = (
            f"{self.poses} poses; a change that never flips the label counts as the whole range; "
            f"{len(trails['random'].first)} targets, probability {self.sure:g}, at most {self.renders} renders, 1 run"
        )
        asked = {name: spent(trail).sort().values.tolist() for name, trail in trails.items()}
        named = {name: told[name] for name in CARD.readings}
        return Readings(named, (note,), {**figures_of(survey), "renders": asked})

    def failures(self, subject: Subject, survey: Survey, witness: Sees) -> dict[str, Reading]:
        """What is misread, how surely, and by whom else."""
        (out, y), fail = judged_classes(subject, "strike-pose"), survey.failing
        beside = witness(_inputs(subject.data.test)).argmax(1)
        return {
            "pose_accuracy": share(int((~fail).sum()), len(fail)),
            "known_accuracy": share(int((out.argmax(1) == y).sum()), len(y)),
            "failing_share": share(int(fail.sum()), len(fail), "lower"),
            "confident_share": _of(survey.scores.amax(1) >= self.sure, fail),
            "transfer": _of(witness(survey.pictures).argmax(1) != survey.kinds, fail),
            "witness_accuracy": share(int((beside == y).sum()), len(y), "none"),
        }

    def scene(self, subject: Subject, ctx: Context) -> Scene:
        """The renderer that the workload laid on the shelf."""
        found = ctx.shelf.get(SCENE) if SCENE in ctx.shelf else None
        if not isinstance(found, Scene):
            raise NotApplicable("strike-pose must find a scene on the shelf; there is none. Use it on posed-objects.")
        classes = judged_classes(subject, "strike-pose")[0].shape[1]
        if classes != len(found.meshes):
            raise NotApplicable(
                f"strike-pose must have an object for each class; got {len(found.meshes)} for {classes}. "
                "Lay a scene on the shelf that has one for each."
            )
        return found

    def witness(self, subject: Subject, ctx: Context) -> nn.Module:
        """A network of another shape, trained on the same pictures for as long as the subject would be by default."""
        train = subject.data.train
        parts = list(train.batches(500))
        seen = Examples(
            _inputs(train), classes_of(train, "strike-pose", "training"), torch.cat([b.index for b in parts])
        )
        with ctx.scope("witness"):
            net = ConvNet(seen.inputs.shape[1], subject.outputs().shape[1], width=8)
        seed = int(torch.randint(2**31, (1,), generator=ctx.rng("witness")))
        budget = replace(subject.budget, lr=1e-2)
        return fit(net, seen, subject.task, budget=budget, seed=seed, device=ctx.device)

    def surveyed(self, sees: Sees, scene: Scene, ctx: Context) -> Survey:
        """Every object equally often, in poses from the whole space."""
        draw = ctx.rng("poses")
        kinds = torch.arange(self.poses) % len(scene.meshes)
        poses = scene.space.drawn(self.poses, scene.camera, draw)
        made = scene.pictures(kinds, poses, scene.looks(self.poses, scene.camera, draw))
        return Survey(kinds, poses, made, sees(made).softmax(1))

    def changed(self, sees: Sees, scene: Scene, ctx: Context) -> Tensor:
        """Least change of each number that flips the label, `[lines, 6]`, in pixels, shares and degrees."""
        draw = ctx.rng("lines")
        many = 4 * self.lines
        kinds = torch.arange(many) % len(scene.meshes)
        poses = scene.known.drawn(many, scene.camera, draw)
        looks = scene.looks(many, scene.camera, draw)
        right = sees(scene.pictures(kinds, poses, looks)).argmax(1) == kinds
        rows = right.nonzero().flatten()[: self.lines]
        kinds, poses, looks = kinds[rows], poses[rows], looks.take(rows)

        def wrong(there: Tensor, which: Tensor) -> Tensor:
            return sees(scene.pictures(kinds[which], there, looks.take(which))).argmax(1) != kinds[which]

        far = least_changes(wrong, poses, scene.space, scene.camera, self.steps)
        far = torch.minimum(far, scene.space.spans(poses, scene.camera))
        pixel = 2 * reach(poses[:, 2], scene.camera) / scene.camera.size
        deep = scene.camera.distance - poses[:, 2]
        return torch.cat([far[:, :2] / pixel[:, None], far[:, 2:3] / deep[:, None], far[:, 3:].rad2deg()], 1)

    def searched(self, sees: Sees, scene: Scene, ctx: Context) -> dict[str, Trail]:
        """The four searches, each for the same pairs of object and wrong class, in the same light."""
        classes = len(scene.meshes)
        pairs = torch.tensor([(k, t) for k in range(classes) for t in range(classes) if t != k])
        order = torch.randperm(len(pairs), generator=ctx.rng("targets"))
        kinds, wanted = pairs[order[: self.targets or len(pairs)].sort().values].unbind(1)
        looks = scene.looks(len(kinds), scene.camera, ctx.rng("target looks"))
        judge = partial(self._judged, sees, scene, kinds, wanted, looks)
        made = {name: Trail(judge, len(kinds), self.renders) for name in ("random", "zrs", "fd", "cma")}
        space, camera = scene.space, scene.camera
        draw = {name: ctx.rng(name) for name in made}
        random_search(made["random"], space, camera, draw["random"])
        z_search(made["zrs"], space, camera, draw["zrs"], self.depths, self.each)
        for name in ("fd", "cma"):
            explored(made[name], space, camera, draw[name], self.depths, self.each)
        slope_search(made["fd"], space, camera, draw["fd"], self.slope_step, self.lr)
        evolution_search(made["cma"], space, camera, draw["cma"], self.sigma, self.population)
        return made

    def _judged(
        self, sees: Sees, scene: Scene, kinds: Tensor, wanted: Tensor, looks: Looks, poses: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = sees(scene.pictures(kinds[rows], poses, looks.take(rows))).log_softmax(1)
        own = scores.gather(1, wanted[rows, None])[:, 0]
        return -own, (scores.argmax(1) == wanted[rows]) & (own >= math.log(max(self.sure, 1e-12)))


def changes(moved: Tensor) -> dict[str, Reading]:
    """Medians of least changes `[N, 6]`."""
    units = ("px", "px", "share", "degrees", "degrees", "degrees")
    columns = zip(NAMES, moved.T, units, strict=True)
    return {f"change_{name}": median_of(column.tolist() or [0.0], unit, "higher") for name, column, unit in columns}


def successes(trails: dict[str, Trail]) -> dict[str, Reading]:
    """What each search took, and how often it succeeded."""
    told = {f"{k}_renders": mean_of(spent(t).tolist(), "renders", "higher") for k, t in trails.items()}
    return told | {f"{k}_reached": share(int((t.first > 0).sum()), len(t.first), "lower") for k, t in trails.items()}


def spent(trail: Trail) -> Tensor:
    """Pictures until success; the whole budget where there was none."""
    return torch.where(trail.first > 0, trail.first, trail.budget).double()


def _of(hits: Tensor, among: Tensor) -> Reading:
    """Share of `hits` among rows; nothing to count is no failure."""
    n, hit = int(among.sum()), int((hits & among).sum())
    return share(hit, n, "lower") if n else Reading(0.0, "share", "lower", 0, 0.0, 1.0)


def _inputs(data: Examples) -> Tensor:
    return torch.cat([b.inputs for b in data.batches(500)])
