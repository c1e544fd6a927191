"""Pictures of triangle meshes in perspective: depth test, faces that look away left out, Lambert and ambient light."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.ops.meshes import Mesh

SLACK = 1e-5  # barycentric: two faces that share an edge leave no gap between them
AT_ONCE = 64  # pictures whose fragments are held in memory together


@dataclass(frozen=True)
class Camera:
    """A pinhole at (0, 0, `distance`) that looks along -z, with a square picture.

    Args:
        view: angle of view in degrees, over the side of the picture.
        size: pixels a side.
        samples: points a pixel side at which faces are tested; their mean is the pixel.
    """

    distance: float = 2.0
    view: float = 16.426
    size: int = 32
    samples: int = 2

    @property
    def slope(self) -> float:
        """Half the height of what is seen at depth 1."""
        return math.tan(math.radians(self.view) / 2)

    def onto_screen(self, points: Tensor) -> Tensor:
        """Points `[..., 3]` to column, row (of samples, from the upper left corner) and depth, `[..., 3]`."""
        half = self.size * self.samples / 2
        depth = self.distance - points[..., 2]
        across = points[..., :2] / (depth * self.slope).unsqueeze(-1)
        return torch.stack([(across[..., 0] + 1) * half, (1 - across[..., 1]) * half, depth], -1)


@dataclass(frozen=True)
class Looks:
    """All of a picture that is not the object and its pose.

    Shapes: light `[N, 3]` unit vectors towards the light, ambient `[N]`, direct `[N]` (brightness of either light),
    background `[N, S, S]`.
    """

    light: Tensor
    ambient: Tensor
    direct: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.light)

    def take(self, rows: Tensor) -> Looks:
        return Looks(self.light[rows], self.ambient[rows], self.direct[rows], self.background[rows])


def rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """R_yaw R_pitch R_roll: about y, then x, then z; radians `[N]` -> `[N, 3, 3]`."""
    cy, sy, cp, sp, cr, sr = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin(), roll.cos(), roll.sin()
    rows = [
        [cy * cr + sy * sp * sr, sy * sp * cr - cy * sr, sy * cp],
        [cp * sr, cp * cr, -sp],
        [cy * sp * sr - sy * cr, sy * sr + cy * sp * cr, cy * cp],
    ]
    return torch.stack([torch.stack(r, -1) for r in rows], -2)


def rendered(mesh: Mesh, poses: Tensor, looks: Looks, camera: Camera) -> Tensor:
    """Grey pictures in [0, 1], `[N, 1, S, S]`, of one mesh in poses `[N, 6]`: x, y, z, yaw, pitch, roll.

    Raises:
        ValueError: a corner of the object is not in front of the camera.
    """
    parts = [torch.arange(len(poses), device=poses.device)[k : k + AT_ONCE] for k in range(0, len(poses), AT_ONCE)]
    made = [_some(mesh, poses[rows], looks.take(rows), camera) for rows in parts]
    return torch.cat(made) if made else poses.new_zeros(0, 1, camera.size, camera.size)


def _some(mesh: Mesh, poses: Tensor, looks: Looks, camera: Camera) -> Tensor:
    turn = rotation(poses[:, 3], poses[:, 4], poses[:, 5])
    points = torch.einsum("nij,vj->nvi", turn, mesh.vertices) + poses[:, None, :3]
    face = nearest_faces(camera.onto_screen(points)[:, mesh.faces], camera.size * camera.samples)  # [N, R, R]
    normals = torch.einsum("nij,fj->nfi", turn, mesh.normals())
    direct = torch.einsum("nfi,ni->nf", normals, looks.light).clamp_min(0) * looks.direct[:, None]
    bright = (mesh.albedo * (looks.ambient[:, None] + direct)).clamp(0, 1)  # [N, F]
    seen = face >= 0
    value = bright.gather(1, face.flatten(1).clamp_min(0)).view(face.shape) * seen
    both = F.avg_pool2d(torch.stack([value, seen.to(value.dtype)], 1), camera.samples)  # [N, 2, S, S]
    return both[:, :1] + (1 - both[:, 1:]) * looks.background[:, None]


def nearest_faces(corners: Tensor, side: int) -> Tensor:
    """Which face every sample point shows, -1 for none: `[N, F, 3, 3]` (column, row, depth) -> `[N, side, side]`.

    Only faces whose corners run counter-clockwise as seen by the camera are drawn. Along straight lines on the
    screen 1 / depth changes evenly, so it is what is interpolated and compared. Of equal faces the first is shown.

    Raises:
        ValueError: a depth is not positive.
    """
    if bool((corners[..., 2] <= 0).any()):
        raise ValueError(
            f"objects must lie in front of the camera; got a corner at depth {float(corners[..., 2].min()):.3g}. "
            "Move them away."
        )
    count, faces = corners.shape[:2]
    flat = corners.flatten(0, 1)  # [N * F, 3, 3]
    low = (flat[..., :2].amin(1) - 0.5).ceil().clamp(0, side)
    high = (flat[..., :2].amax(1) - 0.5).floor().clamp(-1, side - 1)
    a, b, c = flat[..., :2].unbind(1)
    twice = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1])
    span = (high - low + 1).clamp_min(0).long()  # [N * F, 2] columns, rows of the bounding box
    drawn = ((twice < 0) & (span.prod(1) > 0)).nonzero().flatten()  # rows grow downwards: front faces are negative
    planes = _planes(flat[drawn], low[drawn] + 0.5, twice[drawn])
    owner, dx, dy = _fragments(span[drawn])
    p = planes[owner]  # [M, 3, 3]
    u, v, inverse = (p[..., 0] * dx[:, None] + p[..., 1] * dy[:, None] + p[..., 2]).unbind(1)
    inside = (u >= -SLACK) & (v >= -SLACK) & (u + v <= 1 + SLACK)
    owner, inverse = owner[inside], inverse[inside]
    which, (left, top) = drawn[owner], low[drawn][owner].long().unbind(1)
    image = which // faces
    place = (image * side + top + dy[inside].long()) * side + left + dx[inside].long()
    nearest = inverse.new_zeros(count * side * side).scatter_reduce_(0, place, inverse, "amax")
    top_most = inverse >= nearest[place]
    shown = torch.full((count * side * side,), faces, device=corners.device)
    shown.scatter_reduce_(0, place[top_most], (which % faces)[top_most], "amin")
    return torch.where(shown == faces, -1, shown).view(count, side, side)


def _planes(corners: Tensor, origin: Tensor, twice: Tensor) -> Tensor:
    """Two barycentric coordinates and 1 / depth as planes over steps from `origin` `[M, 2]`: `[M, 3, 3]`."""
    a, b, c = (corners[:, k, :2] for k in range(3))
    p, q = b - a, c - a
    off = origin - a
    u = torch.stack([q[:, 1], -q[:, 0], off[:, 0] * q[:, 1] - off[:, 1] * q[:, 0]], 1) / twice[:, None]
    v = torch.stack([-p[:, 1], p[:, 0], off[:, 1] * p[:, 0] - off[:, 0] * p[:, 1]], 1) / twice[:, None]
    near = 1 / corners[..., 2]
    inverse = u * (near[:, 1] - near[:, 0])[:, None] + v * (near[:, 2] - near[:, 0])[:, None]
    inverse[:, 2] += near[:, 0]
    return torch.stack([u, v, inverse], 1)


def _fragments(span: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All sample points of boxes `[M, 2]` (columns, rows): whose box, and the steps right and down in it."""
    size = span.prod(1)
    owner = torch.arange(len(span), device=span.device).repeat_interleave(size)
    within = torch.arange(len(owner), device=span.device) - (size.cumsum(0) - size)[owner]
    width = span[:, 0][owner]
    return owner, (within % width).float(), (within // width).float()
