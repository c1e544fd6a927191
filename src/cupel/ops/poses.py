"""Where an object can stand before a camera: six numbers a pose, drawn, bounded, and carried as nine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.ops.meshes import OBJECTS, Mesh, fitted, turned
from cupel.ops.render import Camera, Looks, rendered, rotation

NAMES = ("x", "y", "z", "yaw", "pitch", "roll")
CANONICAL = (-35.0, 25.0)  # yaw and pitch in degrees under which things are known: from the side and from above


@dataclass(frozen=True)
class Space:
    """The pyramid before a camera, and all rotations.

    Args:
        far, near: least and largest z.
        shift: share of the half width and height of what is seen that x and y may reach, in (0, 1].
        turn: largest angle of yaw, pitch and roll in degrees.
    """

    far: float = -14.0
    near: float = -5.0
    shift: float = 0.3
    turn: float = 180.0

    def drawn(self, count: int, camera: Camera, draw: torch.Generator) -> Tensor:
        """Poses `[count, 6]`: z uniform, x and y uniform within the pyramid at that z, angles uniform."""
        u = torch.rand(count, 6, generator=draw)
        z = self.far + (self.near - self.far) * u[:, 2]
        return self.placed(u, z, camera)

    def placed(self, u: Tensor, z: Tensor, camera: Camera) -> Tensor:
        """Poses at depth `z` `[N]`; the other five come from `u` `[N, 6]`, shares in [0, 1)."""
        side = 2 * u - 1
        xy = side[:, :2] * (self.shift * reach(z, camera))[:, None]
        return torch.cat([xy, z[:, None], side[:, 3:] * math.radians(self.turn)], 1)

    def spans(self, poses: Tensor, camera: Camera) -> Tensor:
        """How far each of the six can be moved at most, `[N, 6]`; half a turn for angles."""
        wide = 2 * self.shift * reach(poses[:, 2], camera)
        deep = torch.full_like(wide, self.near - self.far)
        half = torch.full_like(wide, math.pi)
        return torch.stack([wide, wide, deep, half, half, half], 1)

    def holds(self, poses: Tensor, camera: Camera) -> Tensor:
        """Whether x, y and z lie inside, `[N]`."""
        return (self.within(poses, camera) - poses).abs().amax(1) <= 1e-5

    def within(self, poses: Tensor, camera: Camera, slack: Tensor | float = 0.0) -> Tensor:
        """x, y and z drawn back to the nearest place inside; the bounds are moved by `slack` `[N]`."""
        z = torch.minimum(torch.maximum(poses[:, 2], self.far + torch.as_tensor(slack)),
                          self.near + torch.as_tensor(slack))  # fmt: skip
        most = (self.shift * reach(z, camera))[:, None]
        moved = torch.as_tensor(slack).expand(len(poses))[:, None]
        xy = torch.minimum(torch.maximum(poses[:, :2], moved - most), moved + most)
        return torch.cat([xy, z[:, None], poses[:, 3:]], 1)


def reach(z: Tensor, camera: Camera) -> Tensor:
    """Half the width of what is seen at `z`."""
    return (camera.distance - z).abs() * camera.slope


def carried(poses: Tensor) -> Tensor:
    """Poses `[N, 6]` as x, y, z and (cos, sin) of every angle, `[N, 9]`: no seam at 180 degrees."""
    angles = poses[:, 3:]
    return torch.cat([poses[:, :3], torch.stack([angles.cos(), angles.sin()], 2).flatten(1)], 1)


def as_poses(nine: Tensor) -> Tensor:
    """The poses `[N, 6]` of any nine numbers `[N, 9]`; the lengths of the pairs do not matter."""
    pairs = nine[:, 3:].unflatten(1, (3, 2))
    return torch.cat([nine[:, :3], torch.atan2(pairs[..., 1], pairs[..., 0])], 1)


def renewed(nine: Tensor) -> Tensor:
    """The pairs scaled back to length 1."""
    pairs = nine[:, 3:].unflatten(1, (3, 2))
    return torch.cat([nine[:, :3], F.normalize(pairs, dim=2).flatten(1)], 1)


def drawn_looks(count: int, camera: Camera, draw: torch.Generator) -> Looks:
    """Lights and backgrounds as they vary in pictures of one scene.

    The light comes from the camera's side, up to 60 degrees off to the sides and up to 75 above; it is dark, medium
    or bright. Half the backgrounds are one dark grey, half are smooth dark clouds.
    """
    u = torch.rand(count, 4, generator=draw)
    level = torch.randint(3, (count,), generator=draw)
    side, up = (2 * u[:, 0] - 1) * math.radians(60), u[:, 1] * math.radians(75)
    light = torch.stack([side.sin() * up.cos(), up.sin(), side.cos() * up.cos()], 1)
    ambient, direct = torch.tensor([[0.35, 0.45], [0.5, 0.6], [0.6, 0.8]])[level].unbind(1)
    grey = (0.05 + 0.4 * u[:, 2])[:, None, None].expand(count, 5, 5)
    clouds = torch.rand(count, 5, 5, generator=draw) * 0.4 + 0.05
    coarse = torch.where((u[:, 3] < 0.5)[:, None, None], grey, clouds)
    size = (camera.size, camera.size)
    smooth = F.interpolate(coarse[:, None], size, mode="bilinear", align_corners=True)[:, 0]
    return Looks(light, ambient, direct, smooth)


@dataclass(frozen=True)
class Scene:
    """What makes a picture of a class in a pose, laid on the shelf by a workload whose inputs are such pictures.

    Args:
        meshes: one object for each class.
        camera: takes the pictures.
        space: all poses.
        known: the poses that the workload's own pictures were drawn from.
        looks: draws light and background as the workload's own pictures have them.
    """

    meshes: tuple[Mesh, ...]
    camera: Camera
    space: Space
    known: Space
    looks: Callable[[int, Camera, torch.Generator], Looks] = drawn_looks

    def pictures(self, kinds: Tensor, poses: Tensor, looks: Looks) -> Tensor:
        """Pictures `[N, 1, S, S]` of the objects of classes `[N]` in poses `[N, 6]`."""
        made = poses.new_zeros(len(poses), 1, self.camera.size, self.camera.size)
        for kind in kinds.unique().tolist():
            rows = (kinds == kind).nonzero().flatten()
            made[rows] = rendered(self.meshes[kind], poses[rows], looks.take(rows), self.camera)
        return made


def canonical_meshes() -> tuple[Mesh, ...]:
    """The eight objects, fitted into the unit ball and turned so that all angles are 0 in the canonical view."""
    yaw, pitch = (torch.tensor(math.radians(a)) for a in CANONICAL)
    # Turn first, tilt second: the object keeps standing on the ground that is seen from above.
    none = torch.zeros(())
    matrix = rotation(none, pitch, none) @ rotation(yaw, none, none)
    return tuple(turned(fitted(make()), matrix) for make in OBJECTS.values())
