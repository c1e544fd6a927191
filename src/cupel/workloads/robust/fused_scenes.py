"""Workload `fused-scenes`: find and name handwritten digits that a camera and a LiDAR see together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.context import Context, seeded
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.shelf import SENSORS, Shelf
from cupel.core.types import Anatomy, Bounds, Budget, Examples, Splits, Subject
from cupel.data.digits import digits
from cupel.nets.fusion import FusionNet
from cupel.ops.detection import Detection
from cupel.ops.patches import placed

CARD = Card(
    name="fused-scenes",
    family="robust",
    source="setting: Z. Cheng, H. Choi, J. Liang, S. Feng, G. Tao, D. Liu, M. Zuzak, X. Zhang, Fusion is Not Enough: "
    "Single Modal Attacks on Fusion Models for 3D Object Detection, ICLR 2024, arXiv 2304.14614; head: J. Redmon, S. "
    "Divvala, R. Girshick, A. Farhadi, You Only Look Once, CVPR 2016, arXiv 1506.02640; digits: E. Alpaydin, C. "
    "Kaynak, UCI 1998",
    tags=("image", "lidar", "detection", "sensor fusion", "small"),
    gives=("weights", "gradients", "members", "bounded", "batchnorm", "detection", "sensors"),
    writes=("sensors",),
    expects="not published for these scenes; a detector of both sensors must find more than one of either",
    tiny={"width": 4, "examples": 48},
)
SIDE, OBJECTS, SIGNS = 48, 3, 0.1  # pixels of a scene's edge, digits in a scene, share of scenes with a sign
CHANNELS = {"camera": (0,), "lidar": (1,)}


def places(count: int, draw: torch.Generator) -> Tensor:
    """Squares of 12 to 16 pixels that touch nowhere: `[count, 3, 4]` (left, top, right, bottom) in pixels."""
    found = torch.zeros(count, OBJECTS, 4, dtype=torch.long)
    left = torch.arange(count)
    while len(left):  # drawn anew where two touch
        edge = torch.randint(12, 17, (len(left), OBJECTS, 1), generator=draw)
        share = torch.rand(len(left), OBJECTS, 2, generator=draw)
        corner = (share * (SIDE + 1 - edge)).long()
        found[left] = boxes = torch.cat([corner, corner + edge], 2)
        a, b = boxes[:, [0, 0, 1]], boxes[:, [1, 2, 2]]
        touch = (torch.maximum(a[..., :2], b[..., :2]) < torch.minimum(a[..., 2:], b[..., 2:])).all(2)
        left = left[touch.any(1)]
    return found


def seen_by_camera(glyphs: Tensor, boxes: Tensor, draw: torch.Generator) -> Tensor:
    """Bright digits on an uneven ground with a sign, and noise: `[N, 3, 8, 8]`, `[N, 3, 4]` -> `[N, 48, 48]`.

    The sign is a square of random texture; digits stand before it.
    """
    n = len(glyphs)
    ground = F.interpolate(torch.rand(n, 1, 6, 6, generator=draw), (SIDE, SIDE), mode="bilinear")[:, 0] * 0.3
    edge = 8 + 8 * torch.rand(n, 1, generator=draw)
    corner = torch.rand(n, 2, generator=draw) * (SIDE - edge)
    sign, covers = placed(torch.rand(n, 1, 10, 10, generator=draw), torch.cat([corner, corner + edge], 1), SIDE, SIDE)
    shown = torch.rand(n, 1, 1, generator=draw) < SIGNS
    ground = torch.where((covers[:, 0] > 0) & shown, sign[:, 0], ground)
    ink = torch.zeros(n, SIDE, SIDE)
    for k in range(OBJECTS):
        drawn, inside = placed(glyphs[:, k, None], boxes[:, k].float(), SIDE, SIDE)
        ink = torch.maximum(ink, (drawn * inside)[:, 0])
    light = 0.5 + 0.5 * torch.rand(n, 1, 1, generator=draw)
    return (ground + (light - ground) * ink + 0.1 * torch.randn(n, SIDE, SIDE, generator=draw)).clamp(0.0, 1.0)


def seen_by_lidar(glyphs: Tensor, boxes: Tensor, points: int, stray: int, draw: torch.Generator) -> Tensor:
    """Points of each digit, three in ten lost, and stray ones: a 24x24 grid of intensities, repeated to 48x48.

    A point falls on a pixel of the glyph with a chance in proportion to its ink, anywhere in that pixel; its intensity
    is the ink. A cell keeps its strongest point.
    """
    n, grid = len(glyphs), SIDE // 2
    ink = glyphs.flatten(0, 1).flatten(1)  # [N * 3, 64]
    hit = torch.multinomial(ink, points, replacement=True, generator=draw)  # [N * 3, P]
    jitter = torch.rand(*hit.shape, 2, generator=draw)
    within = (torch.stack([hit % 8, hit // 8], -1) + jitter) / 8
    low, high = boxes.flatten(0, 1)[:, None, :2], boxes.flatten(0, 1)[:, None, 2:]
    at = ((low + within * (high - low)) / 2).long().clamp(0, grid - 1)
    power = ink.gather(1, hit) * (torch.rand(hit.shape, generator=draw) >= 0.3)
    ghosts = torch.randint(grid**2, (n, stray), generator=draw)
    cells = torch.cat([(at[..., 1] * grid + at[..., 0]).view(n, -1), ghosts], 1)
    power = torch.cat([power.view(n, -1), torch.rand(n, stray, generator=draw)], 1)
    scan = torch.zeros(n, grid * grid).scatter_reduce(1, cells, power, "amax")
    return scan.view(n, grid, grid).repeat_interleave(2, 1).repeat_interleave(2, 2)


@lru_cache(maxsize=8)
def scenes(data_seed: int, part: str, count: int, points: int, stray: int, first: int) -> Examples:
    """`count` scenes of the digits of one split of the images, numbered from `first`."""
    real, draw = getattr(digits(data_seed), part), seeded(data_seed, "fused scenes", part)
    which = torch.randint(len(real), (count, OBJECTS), generator=draw)
    glyphs, boxes = real.inputs[which][:, :, 0], places(count, draw)
    camera = seen_by_camera(glyphs, boxes, draw)
    lidar = seen_by_lidar(glyphs, boxes, points, stray, draw)
    targets = torch.cat([real.targets[which][..., None].float(), boxes.float() / SIDE], 2)
    return Examples(torch.stack([camera, lidar], 1), targets, first + torch.arange(count))


@dataclass(frozen=True)
class FusedScenes:
    """Find three handwritten digits in scenes of a camera and a LiDAR, and name them.

    The camera sees 48x48 pixels with uneven ground, changing light, noise and, in one scene of ten, a textured sign.
    The LiDAR sees points of each digit, 30% of them lost, and stray ones, on a 24x24 grid. `early`: features of both
    sensors side by side, then one trunk; `late`: a detector for each sensor, their scores averaged. One sensor alone
    makes the single-sensor twin. The three splits are scenes of different digit images.

    Use: for attacks on one sensor of two, and wherever boxes are found. Not for depth: the scenes are flat.

    Costs: 4,000 training scenes take a second to make; a fit takes 10 to 30 s on one core.

    Shapes: inputs `[B, 2, 48, 48]` in [0, 1], camera and LiDAR (its cells repeated); targets `[B, 3, 5]`: class, left,
    top, right, bottom in shares of the scene; outputs `[B, 15, 6, 6]` (see `ops.detection`).

    Source: Cheng et al., ICLR 2024, for two sensors; Redmon et al., CVPR 2016, for the head; Alpaydin and Kaynak 1998
    for the digits.

    Departs: flat scenes of digits in place of nuScenes; box edges through a sigmoid, and a loss of absolute errors.

    Example:
        >>> subject = FusedScenes(width=4, examples=8).build(Context())
        >>> tuple(subject.data.train.inputs.shape), tuple(subject.data.test.targets.shape)
        ((8, 2, 48, 48), (8, 3, 5))
    """

    sensors: str = param("both", "what the detector sees", choices=("both", "camera", "lidar"))
    fusion: str = param("early", "how two sensors are joined", choices=("early", "late"))
    width: int = param(16, "channels of a branch's first layer", ge=1, le=256)
    pyramid: bool = param(True, "tell every cell of the whole scene, through a coarser grid")
    points: int = param(100, "LiDAR points of a digit before losses", ge=1, le=1024)
    stray: int = param(20, "LiDAR points of nothing", ge=0, le=256)
    examples: int = param(4000, "training scenes; each other split holds an eighth, 8 at least", ge=1, le=100000)
    data_seed: int = param(0, "which scenes", ge=0)

    def build(self, ctx: Context) -> Subject:
        used = CHANNELS if self.sensors == "both" else {self.sensors: CHANNELS[self.sensors]}
        with ctx.scope("init"):
            net = FusionNet(used, ("lidar",), self.fusion, 10, self.width, self.pyramid)
        held, parts, first = max(8, self.examples // 8), [], 0
        for part, count in (("train", self.examples), ("valid", held), ("test", held)):
            parts.append(scenes(self.data_seed, part, count, self.points, self.stray, first))
            first += count
        shelf = Shelf(maker="fused-scenes")
        shelf.put(SENSORS, dict(CHANNELS))
        return Subject(
            net,
            Splits(*parts),
            Detection(10),
            Anatomy(),
            Budget(epochs=6, batch_size=64, optimizer="adam", lr=4e-3, schedule="cosine"),
            Bounds(0.0, 1.0),
            shelf=shelf,
        )
