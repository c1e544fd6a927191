"""Probe `fusion-attack`: how much does a printed patch in one sensor's view cost a detector of several sensors?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, mean_of
from cupel.core.shelf import SENSORS
from cupel.core.types import Dataset, Subject, still
from cupel.ops.detection import BOX, object_scores
from cupel.ops.fused_views import Scenes, Stage
from cupel.ops.image_damage import damaged
from cupel.ops.labelled import evenly
from cupel.ops.patches import Looks, Press, free_places, on_channels, on_objects, pasted, random_patch
from cupel.ops.preprocess import fewer_bits
from cupel.ops.sensitivity import Search, mass_inside

CARD = Card(
    name="fusion-attack",
    family="robust",
    source="Z. Cheng, H. Choi, J. Liang, S. Feng, G. Tao, D. Liu, M. Zuzak, X. Zhang, Fusion is Not Enough: Single "
    "Modal Attacks on Fusion Models for 3D Object Detection, ICLR 2024, arXiv 2304.14614",
    tags=("evasion", "adversarial", "patch", "physical", "white-box", "untargeted", "detection", "fusion", "images"),
    needs=("detection", "sensors", "bounded", "gradients"),
    reads=("sensors",),
    readings=(
        "map_patch", "map_clean", "map_random", "map_drop", "random_drop", "map_looks", "target_patch", "target_clean",
        "target_random", "object_share", "area_share", "global_type", "map_sensor_dark", "map_others_dark", "map_bits",
        "map_jpeg", "map_blur", "map_noise",
    ),
    tiny={"steps": 4, "map_steps": 4, "map_scenes": 4, "examples": 16, "patch": 8},
)  # fmt: skip
DEFENCES = {"jpeg": ("jpeg", 0.5), "blur": ("gaussian-blur", 0.1), "noise": ("gaussian-noise", 0.25)}


@dataclass(frozen=True)
class FusionAttack:
    r"""Print one patch into one sensor's view, leave the others alone, and count what the detector still finds.

    1. Where is it sensitive? A mask m and a perturbation p of the sensor's view lower log mean(scores) + mean m in
    x (1 - m) + p m. `object_share` is the share of the mask's mass that lies in the objects' boxes, beside
    `area_share`, the boxes' share of the scene. Above `threshold` the detector is of the object type, below of the
    global type (`global_type` 1): there the scene patch is the paper's choice, else the object patch.
    2. Scene patch: one square of `patch` pixels on free ground, which covers no object, lowers log mean(scores)
    of all cells. Object patch: glued to the middle of the first object, it lowers log of that object's score.
    Both are optimised on training scenes over drawn looks (brightness, contrast, scale, shift), and judged on test
    scenes. `map_...`: mean average precision at overlap 0.5, unattacked, under the scene patch, under uniform noise
    of the same area (`random`), under the patch in drawn looks, without the sensor (`sensor_dark`), without all others
    (`others_dark`), and under the patch after rounding to 4 bits, JPEG, blur and noise on the attacked sensor, which
    the patch does not know. `map_drop` and `random_drop` are shares of `map_clean`. `target_...`: the score of the
    first object under the object patch.

    Use: to ask whether a second sensor keeps a detector safe when the first is lied to. Not for digital changes of
    every pixel.

    Costs: `steps` x `batch` gradients for each of two patches and `map_steps` for each of `map_scenes` scenes.

    Shapes: inputs `[N, C, H, W]` within the bounds, outputs `[N, 5 + K, G, G]` (see `ops.detection`).

    Raises:
        NotApplicable: no such sensor, no other sensor, no bounds, no grid of boxes, or no free ground for the patch.

    Source: Cheng et al., ICLR 2024, arXiv 2304.14614, sections 3 and 4.

    Departs: flat scenes, so a patch is scaled and shifted in place of a projection through a camera; no saturation, as
    for grey images; the scene patch lies on the free ground nearest to the middle of each scene; maps take 150 steps of
    Adam at 0.05 in place of 5,000 at 0.001, and patches 500 in place of 1,000 to 1,500.

    Example:
        >>> FusionAttack(sensor="lidar").patch
        12
    """

    sensor: str = param("camera", "which sensor is lied to; the others stay as they are")
    patch: int = param(12, "edge of the scene patch, in pixels", ge=2)
    object_edge: float = param(0.5, "edge of the object patch, in shares of the object's", gt=0, le=1)
    steps: int = param(500, "gradient steps for a patch", ge=1)
    batch: int = param(5, "scenes of a step, each under a look of its own", ge=1)
    map_steps: int = param(150, "gradient steps for a sensitivity map", ge=1)
    map_scenes: int = param(16, "test scenes that get a sensitivity map", ge=1)
    threshold: float = param(0.5, "share of the mask in boxes from which the type is `object`", ge=0, le=1)
    examples: int = param(500, "most scenes of each split (0: all)", ge=0)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        with still(subject.model):
            stage = self.staged(subject, ctx)
            return self.judged(stage)

    def staged(self, subject: Subject, ctx: Context) -> Stage:
        """The victim and the scenes; free ground decides which scenes take part."""
        sensors = ctx.shelf.get(SENSORS) if SENSORS in ctx.shelf else {}
        if self.sensor not in sensors or len(sensors) < 2 or subject.bounds is None:
            raise NotApplicable(
                f"fusion-attack must have bounded inputs of two sensors or more, {self.sensor!r} among them; got "
                f"{sorted(sensors)}. Set sensor: to one of them."
            )
        out, held = subject.outputs(), self._scenes(subject.data.test)
        if out.ndim != 4 or out.shape[1] <= BOX or held.x.ndim != 4 or held.truth.shape[2:] != (5,):
            raise NotApplicable(
                "fusion-attack must have images [N, C, H, W] whose objects are found on a grid of cells, [N, 5 + K, G, "
                f"G]; got inputs {tuple(held.x.shape)} and outputs {tuple(out.shape)}. Use it on such a workload."
            )
        parts = []
        for part in (self._scenes(subject.data.train), held):
            fit = self.patch <= min(part.x.shape[2:])
            free = self.places(part)[1] if fit else torch.zeros(len(part.x), dtype=torch.bool)
            keep = free & part.there[:, 0]
            if not bool(keep.any()):
                raise NotApplicable(
                    f"a patch of {self.patch} pixels must find free ground; there is none. Take a smaller one."
                )
            part = part.take(keep)
            parts.append(Scenes(part.x.to(ctx.device), part.truth.to(ctx.device)))
        rows = tuple(sensors[self.sensor])
        others = tuple(k for own in sensors.values() for k in own if k not in rows)
        return Stage(subject.model, subject.task, subject.bounds, rows, others, parts[0], parts[1], ctx.rng)

    def _scenes(self, data: Dataset) -> Scenes:
        parts = list(data.batches(500))
        if not parts or not isinstance(parts[0].inputs, Tensor):
            raise NotApplicable("fusion-attack must have training and test scenes, as tensors; got none. Give them.")
        x, truth = (torch.cat([getattr(b, k) for b in parts]) for k in ("inputs", "targets"))
        rows = evenly(len(x), self.examples)
        return Scenes(x[rows], truth[rows])

    def places(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Where the scene patch lies in each scene, and whether there is room."""
        height, width = scenes.x.shape[2:]
        return free_places(scenes.boxes, scenes.there, height, width, self.patch)

    def press(self) -> Press:
        return Press(self.steps, self.batch, looks=Looks())

    def scene_patch(self, stage: Stage) -> Tensor:
        """One patch that costs all objects of a scene, `[c, patch, patch]`."""
        seen = stage.seen

        def goal(x: Tensor, rows: Tensor) -> Tensor:
            return stage.task.scores(stage.model(x)).mean(1).log()

        start = random_patch(stage.blank(self.patch), stage.bounds, stage.draw("scene start"))
        rects, draw = self.places(seen)[0], stage.draw("scene patch")
        return self.press().made(seen.x, rects, stage.rows, start, goal, stage.bounds, draw)

    def object_patch(self, stage: Stage) -> Tensor:
        """One patch that costs the object it is glued to, `[c, 8, 8]`, stretched to the object's size."""
        seen = stage.seen

        def goal(x: Tensor, rows: Tensor) -> Tensor:
            return object_scores(stage.model(x), seen.truth[rows])[:, 0].clamp_min(1e-12).log()

        start = random_patch(stage.blank(8), stage.bounds, stage.draw("object start"))
        rects, draw = on_objects(seen.boxes[:, 0], self.object_edge), stage.draw("object patch")
        return self.press().made(seen.x, rects, stage.rows, start, goal, stage.bounds, draw)

    def maps(self, stage: Stage) -> tuple[Scenes, Tensor]:
        """Some test scenes and their sensitivity maps `[N, H, W]`."""
        some = stage.held.take(evenly(len(stage.held.x), self.map_scenes).to(stage.held.x.device))
        search = Search(steps=self.map_steps)

        def scores(x: Tensor, rows: Tensor) -> Tensor:
            return stage.task.scores(stage.model(x))

        return some, search.maps(some.x, stage.rows, scores, stage.bounds, stage.draw("maps"))

    def judged(self, stage: Stage) -> Readings:
        """Both patches and the maps, counted on held-out scenes."""
        some, maps = self.maps(stage)
        inside, area = (mass_inside(m, some.boxes, some.there).tolist() for m in (maps, torch.ones_like(maps)))
        found = {"object_share": mean_of(inside, "share"), "area_share": mean_of(area, "share")}
        spread = found["object_share"].value < self.threshold
        found["global_type"] = exact(float(spread), "1")
        patch, glued = self.scene_patch(stage), self.object_patch(stage)
        found |= self.counted(stage, patch) | self.aimed(stage, glued)
        notes = (
            f"{self.sensor} alone, any values of its range inside the patch; {self.steps} steps x {self.batch} looks, "
            f"1 start each; {len(stage.held.x)} held-out scenes have free ground",
            f"{'global' if spread else 'object'} type: of the two the {'scene' if spread else 'object'} patch fits",
        )
        return Readings({name: found[name] for name in CARD.readings}, notes, _shown(stage, some, maps, patch, glued))

    def counted(self, stage: Stage, patch: Tensor) -> dict[str, Reading]:
        """Mean average precision without and with the scene patch, and what else may be done to the sensor."""
        held, where = stage.held, self.places(stage.held)[0]
        noise = random_patch(patch, stage.bounds, stage.draw("scene noise"))
        looks = self.press().looks.drawn(patch, where, stage.bounds, stage.draw("looks"))
        views = {
            "clean": held.x, "patch": stage.shown(patch, where), "random": stage.shown(noise, where),
            "looks": pasted(held.x, *looks, stage.rows), "sensor_dark": stage.dark(stage.rows),
            "others_dark": stage.dark(stage.others),
        }  # fmt: skip
        for name, (kind, strength) in DEFENCES.items():
            change = partial(damaged, kind=kind, strength=strength, bounds=stage.bounds, draw=stage.draw(name))
            views[name] = on_channels(views["patch"], stage.rows, change)
        views["bits"] = on_channels(views["patch"], stage.rows, partial(fewer_bits, bounds=stage.bounds))
        found = {}
        for name, x in views.items():
            p = stage.precision(x)
            found[f"map_{name}"] = Reading(p.value, "share", "higher", len(x), p.low, p.high)
        clean = found["map_clean"].value
        for name, after in (("map_drop", found["map_patch"]), ("random_drop", found["map_random"])):
            # A detector that finds nothing has nothing to lose.
            value, low, high = (
                1 - float(x or 0.0) / clean if clean else 0.0 for x in (after.value, after.high, after.low)
            )
            found[name] = Reading(value, "1", "lower", after.count, low, high)
        return found

    def aimed(self, stage: Stage, patch: Tensor) -> dict[str, Reading]:
        """The score of the object that carries the object patch, or noise, or nothing."""
        on = on_objects(stage.held.boxes[:, 0], self.object_edge)
        noise = random_patch(patch, stage.bounds, stage.draw("object noise"))
        views = {"clean": stage.held.x, "patch": stage.shown(patch, on), "random": stage.shown(noise, on)}
        return {f"target_{name}": stage.target(x) for name, x in views.items()}


def _shown(stage: Stage, some: Scenes, maps: Tensor, patch: Tensor, glued: Tensor) -> dict[str, object]:
    """Both patches, and up to four scenes with their maps where they are small enough for a page."""

    def grid(image: Tensor) -> object:
        return ((image.double().cpu() * 1e3).round() / 1e3).tolist()

    rows = range(min(4, len(maps)) if maps[0].numel() <= 4096 else 0)
    return {
        "patches": [{"scene_patch": grid(patch[:1]), "object_patch": grid(glued[:1])}],
        "sensitivity": [{"scene": grid(some.x[r, stage.rows[0]][None]), "map": grid(maps[r : r + 1])} for r in rows],
    }
