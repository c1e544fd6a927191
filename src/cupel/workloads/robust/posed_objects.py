"""Workload `posed-objects`: tell eight things apart from pictures of their 3-D models near one known pose."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cupel.core.context import Context, seeded
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.shelf import SCENE, Shelf
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Bounds, Budget, Examples, Splits, Subject
from cupel.nets.poolnet import PoolNet
from cupel.ops.poses import Scene, Space, canonical_meshes
from cupel.ops.render import Camera

CARD = Card(
    name="posed-objects",
    family="robust",
    source="M. A. Alcorn, Q. Li, Z. Gong, C. Wang, L. Mai, W.-S. Ku, A. Nguyen, Strike (with) a Pose: Neural Networks "
    "Are Easily Fooled by Strange Poses of Familiar Objects, CVPR 2019, arXiv 1811.11553 (camera, light, pose space); "
    "objects of our own",
    tags=("image", "small", "3d", "pose", "renderer"),
    gives=("weights", "gradients", "members", "classes", "images", "bounded", "blocks", "batchnorm", "renders"),
    writes=("scene",),
    expects="0.95 test accuracy or more near the canonical pose: the objects of the paper were chosen so that the "
    "networks know them there",
    tiny={"width": 4, "examples": 32},
)


@dataclass(frozen=True)
class PosedObjects:
    r"""Classify pictures of a car, a table, a chair, a mug, an aeroplane, a house, a tower and a bracket.

    A camera at (0, 0, 2) with an angle of view of 16.426 degrees sees an object, which fits into the unit ball, at
    R v + (x, y, z), R = R_yaw R_pitch R_roll. Each corner v is projected, each face lit by ambient and direct light
    (albedo (a + d max(n . l, 0))), the nearest face is shown. z is uniform in [-14, -5], |x| and |y| at most 0.3 of
    the half width that is seen, and each angle uniform within `turn` degrees of the canonical view. Light and
    background vary. All splits are drawn alike.

    Use: to ask how a network takes poses it was not trained on: the scene lies on the shelf, and `strike-pose` renders
    with it. Not as a test of recognition in photographs.

    Costs: some 0.4 ms a picture on one core when the data are made; a fit takes 10 s.

    Shapes: inputs `[B, 1, 32, 32]` in [0, 1], targets `[B]` in 0..7, logits `[B, 8]`.

    Source: Alcorn et al. 2019, section 2 and the released renderer.

    Departs: grey objects of our own in place of textured ones; flat shading without highlights; 32 pixels a side, each
    the mean of 4 samples, in place of 299. x, y and z stay where an object is in view and neither a speck nor larger
    than the picture (the paper goes to z in [-28, 0] and to the edges), so that what fails over all poses fails by its
    rotation.

    Example:
        >>> subject = PosedObjects(width=4, examples=2).build(Context())
        >>> subject.data.train.targets.bincount().tolist()
        [2, 2, 2, 2, 2, 2, 2, 2]
    """

    width: int = param(8, "channels of the first block", ge=1, le=512)
    turn: float = param(20.0, "largest angle from the canonical pose in degrees", ge=0, le=180)
    examples: int = param(1000, "training pictures of each class; a tenth as many validate, and as many test", ge=1)
    data_seed: int = param(0, "which poses, lights and backgrounds", ge=0)

    def build(self, ctx: Context) -> Subject:
        scene = Scene(canonical_meshes(), Camera(), Space(), Space(turn=self.turn))
        classes, few = len(scene.meshes), max(1, self.examples // 10)
        with ctx.scope("init"):
            net = PoolNet(channels=1, side=scene.camera.size, classes=classes, width=self.width)
        parts, first = [], 0
        for part, each in (("train", self.examples), ("valid", few), ("test", few)):
            parts.append(_examples(scene, each, first, seeded(self.data_seed, "posed-objects", part)))
            first += classes * each
        shelf = Shelf(maker="posed-objects")
        shelf.put(SCENE, scene)
        return Subject(
            net,
            Splits(*parts),
            Classification(classes),
            Anatomy(blocks=("block1", "block2", "block3"), head="head"),
            Budget(epochs=6, batch_size=64, optimizer="adam", lr=3e-3, schedule="cosine"),
            Bounds(0.0, 1.0),
            shelf=shelf,
        )


def _examples(scene: Scene, each: int, first: int, draw: torch.Generator) -> Examples:
    """`each` pictures of every class in known poses, shuffled."""
    count = each * len(scene.meshes)
    kinds = (torch.arange(count) % len(scene.meshes))[torch.randperm(count, generator=draw)]
    poses = scene.known.drawn(count, scene.camera, draw)
    looks = scene.looks(count, scene.camera, draw)
    return Examples(scene.pictures(kinds, poses, looks).clamp(0, 1), kinds, first + torch.arange(count))
