"""Triangle meshes of eight things, built from solids: closed, wound outwards, inside the unit ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Mesh:
    """Triangles whose corners run counter-clockwise seen from outside.

    Shapes: vertices `[V, 3]`, faces `[F, 3]` rows of vertices, albedo `[F]` share of light that comes back.
    """

    vertices: Tensor
    faces: Tensor
    albedo: Tensor

    def __len__(self) -> int:
        return len(self.faces)

    def corners(self) -> Tensor:
        """Where the corners are, `[F, 3, 3]`."""
        return self.vertices[self.faces]

    def normals(self) -> Tensor:
        """Unit normals that point outwards, `[F, 3]`."""
        a, b, c = self.corners().unbind(1)
        return torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=1)

    def volume(self) -> float:
        """Of what is inside (solids that overlap count twice)."""
        a, b, c = self.corners().double().unbind(1)
        return float((a * torch.linalg.cross(b, c)).sum() / 6)


def mesh(vertices: Sequence[Sequence[float]], faces: Sequence[Sequence[int]], albedo: float) -> Mesh:
    made = torch.tensor(vertices, dtype=torch.float32)
    return Mesh(made, torch.tensor(faces), torch.full((len(faces),), albedo))


def box(sides: Triple, centre: Triple, albedo: float) -> Mesh:
    """A box with its sides along the axes.

    >>> round(box((1, 2, 3), (0, 0, 5), 0.5).volume(), 3)
    6.0
    """
    w, h, d = (s / 2 for s in sides)
    return prism([(-w, -h), (w, -h), (w, h), (-w, h)], 2 * d, centre, albedo)


def prism(outline: Sequence[tuple[float, float]], depth: float, centre: Triple, albedo: float) -> Mesh:
    """A convex outline in (x, y), counter-clockwise, drawn out along z."""
    n = len(outline)
    x, y, z = centre
    points = [(x + u, y + v, z + side * depth / 2) for side in (-1, 1) for u, v in outline]
    faces: list[tuple[int, int, int]] = []
    for k in range(1, n - 1):
        faces += [(n, n + k, n + k + 1), (0, k + 1, k)]
    for k in range(n):
        j = (k + 1) % n
        faces += [(k, j, n + j), (k, n + j, n + k)]
    return mesh(points, faces, albedo)


def lathe(profile: Sequence[tuple[float, float]], albedo: float, parts: int = 16) -> Mesh:
    """An outline of (radius, height) pairs from axis to axis, upwards outside, turned around the y axis.

    >>> cylinder = lathe([(0, 0), (1, 0), (1, 1), (0, 1)], 0.5, parts=200)
    >>> round(cylinder.volume(), 2) == round(math.pi, 2)
    True
    """
    points: list[Triple] = []
    rings: list[list[int]] = []
    for r, h in profile:
        count = 1 if r == 0 else parts
        ring = [len(points) + k for k in range(count)]
        points += [(r * math.cos(t), h, -r * math.sin(t)) for t in (2 * math.pi * k / parts for k in range(count))]
        rings.append(ring * (parts // count))
    faces = []
    for low, high in pairwise(rings):
        for k in range(parts):
            j = (k + 1) % parts
            quads = [(low[k], low[j], high[j]), (low[k], high[j], high[k])]
            faces += [f for f in quads if len(set(f)) == 3]
    return mesh(points, faces, albedo)


def ball(albedo: float, parts: int = 16) -> Mesh:
    """A sphere of radius 1."""
    steps = [math.pi * k / (parts // 2) for k in range(parts // 2 + 1)]
    profile = [(math.sin(t), -math.cos(t)) for t in steps]
    return lathe([(0.0, -1.0), *profile[1:-1], (0.0, 1.0)], albedo, parts)


def torus(radius: float, thick: float, albedo: float, parts: int = 16) -> Mesh:
    """A ring around the z axis: `radius` to the middle of a tube that is `thick` from its middle to its skin."""
    few = max(6, parts // 2)
    points, faces = [], []
    for k in range(parts):
        for j in range(few):
            u, v = 2 * math.pi * k / parts, 2 * math.pi * j / few
            out = radius + thick * math.cos(v)
            points.append((out * math.cos(u), out * math.sin(u), thick * math.sin(v)))
            a, b = k * few + j, ((k + 1) % parts) * few + j
            c, d = ((k + 1) % parts) * few + (j + 1) % few, k * few + (j + 1) % few
            faces += [(a, b, c), (a, c, d)]
    return mesh(points, faces, albedo)


def moved(part: Mesh, by: Triple) -> Mesh:
    return replace(part, vertices=part.vertices + torch.tensor(by))


def turned(part: Mesh, matrix: Tensor) -> Mesh:
    """Turned about the origin by a rotation `[3, 3]`."""
    return replace(part, vertices=part.vertices @ matrix.T)


def joined(*parts: Mesh) -> Mesh:
    """All parts as one mesh; where they overlap, the depth test decides what is seen."""
    starts = torch.tensor([0, *(len(p.vertices) for p in parts)]).cumsum(0).tolist()
    faces = torch.cat([p.faces + start for p, start in zip(parts, starts, strict=False)])
    return Mesh(torch.cat([p.vertices for p in parts]), faces, torch.cat([p.albedo for p in parts]))


def fitted(part: Mesh) -> Mesh:
    """Moved and scaled so that the middle of its bounding box is the origin and its farthest corner lies at 1."""
    low, high = part.vertices.amin(0), part.vertices.amax(0)
    centred = part.vertices - (low + high) / 2
    return replace(part, vertices=centred / centred.norm(dim=1).max())


_ON_SIDE = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])  # the y axis becomes the z axis
_ALONG = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # the y axis becomes the x axis


def _car() -> Mesh:
    wheel = turned(lathe([(0, -0.12), (0.3, -0.12), (0.3, 0.12), (0, 0.12)], 0.25, 12), _ON_SIDE)
    wheels = [moved(wheel, (x, -0.25, z)) for x in (-0.6, 0.6) for z in (-0.42, 0.42)]
    cabin = prism([(-0.55, 0), (0.45, 0), (0.25, 0.4), (-0.4, 0.4)], 0.75, (0, 0.2, 0), 0.45)
    return joined(box((2.0, 0.45, 0.85), (0, 0, 0), 0.8), cabin, *wheels)


def _table() -> Mesh:
    legs = [box((0.12, 1.0, 0.12), (x, -0.5, z), 0.45) for x in (-0.8, 0.8) for z in (-0.45, 0.45)]
    return joined(box((1.9, 0.12, 1.1), (0, 0.05, 0), 0.7), *legs)


def _chair() -> Mesh:
    legs = [box((0.12, 0.8, 0.12), (x, -0.45, z), 0.5) for x in (-0.35, 0.35) for z in (-0.35, 0.35)]
    return joined(box((0.85, 0.12, 0.85), (0, 0, 0), 0.75), box((0.85, 1.0, 0.1), (0, 0.5, -0.38), 0.65), *legs)


def _mug() -> Mesh:
    wall = [(0, -0.7), (0.55, -0.7), (0.55, 0.7), (0.46, 0.7), (0.46, -0.6), (0, -0.6)]
    return joined(lathe([(float(r), h) for r, h in wall], 0.8, 20), moved(torus(0.38, 0.09, 0.7), (0.62, 0, 0)))


def _aeroplane() -> Mesh:
    hull = [(0, -1.1), (0.08, -1.0), (0.17, -0.4), (0.17, 0.6), (0.1, 0.85), (0, 0.95)]
    flat = turned(prism([(-0.15, -1.0), (0.05, -1.0), (0.3, 0), (0.05, 1.0), (-0.15, 1.0), (-0.2, 0)], 0.05,
                        (0, 0, 0), 0.6), _ON_SIDE)  # fmt: skip
    tail = turned(prism([(-0.1, -0.4), (0.05, -0.4), (0.12, 0), (0.05, 0.4), (-0.1, 0.4)], 0.04, (0, 0, 0), 0.6),
                  _ON_SIDE)  # fmt: skip
    fin = prism([(-0.12, 0), (0.2, 0), (-0.02, 0.42), (-0.14, 0.42)], 0.05, (-0.92, 0.08, 0), 0.5)
    body = turned(lathe([(float(r), h) for r, h in hull], 0.85), _ALONG)
    return joined(body, flat, moved(tail, (-0.95, 0.05, 0)), fin)


def _house() -> Mesh:
    roof = prism([(-0.85, 0), (0.85, 0), (0, 0.65)], 1.2, (0, 0.4, 0), 0.35)
    return joined(box((1.4, 0.8, 1.1), (0, 0, 0), 0.85), roof, box((0.2, 0.5, 0.2), (0.45, 0.75, 0.25), 0.55))


def _tower() -> Mesh:
    body = [(0, -1.0), (0.42, -1.0), (0.32, -0.8), (0.3, 0.35), (0.42, 0.4), (0.42, 0.5), (0, 1.1)]
    return lathe([(float(r), h) for r, h in body], 0.7, 14)


def _bracket() -> Mesh:
    rib = prism([(-0.6, -0.6), (0.1, -0.6), (-0.6, 0.1)], 0.14, (0.04, 0.04, 0), 0.5)
    return joined(box((1.5, 0.2, 0.8), (0, -0.65, 0), 0.75), box((0.2, 1.5, 0.8), (-0.65, 0, 0), 0.65), rib)


OBJECTS: dict[str, Callable[[], Mesh]] = {
    "car": _car, "table": _table, "chair": _chair, "mug": _mug,
    "aeroplane": _aeroplane, "house": _house, "tower": _tower, "bracket": _bracket,
}  # fmt: skip
