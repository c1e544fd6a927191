"""Patches: printed rectangles in a scene, optimised over scenes and over how they may look there.

Rectangles are `[N, 4]` (left, top, right, bottom) in pixels, fractions allowed. A patch touches the channels it is
given, no other, and no pixel outside its rectangle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.descend import Move, adam_move, descend
from cupel.core.types import Bounds

# (scenes with the patch, their numbers) -> what the adversary lowers, one value a scene
Goal = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Looks:
    """In how many ways a printed patch may come out in a scene: the transformations an expectation is taken over.

    Args:
        brightness: its values are multiplied by 1 +- this.
        contrast: their distances from their mean are multiplied by 1 +- this.
        scale: least and largest size, of the nominal one, about its middle.
        shift: how far it is moved, in pixels, along each axis.
    """

    brightness: float = 0.5
    contrast: float = 0.1
    scale: tuple[float, float] = (0.7, 1.05)
    shift: float = 1.0

    def drawn(self, patch: Tensor, rects: Tensor, bounds: Bounds, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """A look for every scene: `[C, h, w]`, `[N, 4]` -> patches `[N, C, h, w]` within the bounds, `[N, 4]`."""
        u = torch.rand(len(rects), 5, generator=draw).to(rects) * 2 - 1
        bright, contrast = (1 + a * u[:, k].view(-1, 1, 1, 1) for k, a in enumerate((self.brightness, self.contrast)))
        many = bounds.low + (patch[None] - bounds.low) * bright
        mean = many.mean((1, 2, 3), keepdim=True)
        many = (mean + (many - mean) * contrast).clamp(bounds.low, bounds.high)
        low, high = self.scale
        half = (rects[:, 2:] - rects[:, :2]) / 2 * (low + (high - low) * (u[:, 2:3] + 1) / 2)
        middle = (rects[:, :2] + rects[:, 2:]) / 2 + self.shift * u[:, 3:]
        return many, torch.cat([middle - half, middle + half], 1)


def placed(patches: Tensor, rects: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Patches stretched over their rectangles: `[N, C, h, w]`, `[N, 4]` -> `[N, C, H, W]` and where, `[N, 1, H, W]`.

    A pixel belongs to the rectangle that holds its middle. At its own size and whole pixels a patch comes out as it is.
    """
    axes = [(torch.arange(size, device=rects.device) + 0.5).to(rects) for size in (width, height)]
    at = []
    for k, axis in enumerate(axes):
        low, high = rects[:, k, None], rects[:, k + 2, None]
        at.append((axis - low) / (high - low).clamp_min(1e-6) * 2 - 1)  # -1 and 1 are the rectangle's edges
    x, y = at[0][:, None, :].expand(-1, height, -1), at[1][:, :, None].expand(-1, -1, width)
    inside = ((x > -1) & (x < 1) & (y > -1) & (y < 1))[:, None]
    made = F.grid_sample(patches, torch.stack([x, y], -1), padding_mode="border", align_corners=False)
    return made, inside.to(patches.dtype)


def on_channels(x: Tensor, channels: Sequence[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """`x` `[N, C, ...]` with `change` applied to some channels, and the others as they are.

    >>> on_channels(torch.ones(1, 3), (2, 0), lambda part: part + torch.tensor([1.0, 2.0])).tolist()
    [[3.0, 1.0, 2.0]]
    """
    at = torch.tensor(channels, device=x.device)
    return x.index_copy(1, at, change(x.index_select(1, at)))


def pasted(x: Tensor, patches: Tensor, rects: Tensor, channels: Sequence[int]) -> Tensor:
    """Scenes `[N, C, H, W]` with patches `[N, c, h, w]` over their rectangles, on `channels` alone."""
    made, inside = placed(patches, rects, *x.shape[-2:])
    return on_channels(x, channels, lambda part: part * (1 - inside) + made * inside)


def free_places(boxes: Tensor, there: Tensor, height: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """Where a square of `size` pixels covers no box, nearest to the scene's middle.

    Args:
        boxes: `[N, M, 4]` in pixels.
        there: `[N, M]` bool: which of them exist.

    Returns:
        `[N, 4]`, and `[N]` bool: whether there is such a place; the middle of the scene where there is none.
    """
    rows = torch.arange(height, device=boxes.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, 1, -1)
    low, high = boxes[..., :2, None, None].unbind(2), boxes[..., 2:, None, None].unbind(2)
    covers = (columns + 1 > low[0]) & (columns < high[0]) & (rows + 1 > low[1]) & (rows < high[1])
    taken = (covers & there[..., None, None]).any(1, keepdim=True).to(torch.float32)  # [N, 1, H, W]
    blocked = F.max_pool2d(taken, size, 1)[:, 0]  # by the square's upper left corner
    tall, wide = blocked.shape[1:]
    far = (torch.arange(tall) - (tall - 1) / 2).square()[:, None] + (torch.arange(wide) - (wide - 1) / 2).square()
    cost, best = (far.to(blocked) + blocked * 1e9).flatten(1).min(1)
    corner = torch.stack([best % wide, best // wide], 1).to(torch.float32)
    return torch.cat([corner, corner + size], 1), cost < 1e9


def on_objects(boxes: Tensor, share: float) -> Tensor:
    """Rectangles in the middle of boxes, `share` of their edges: `[N, 4]` -> `[N, 4]`."""
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * share
    return torch.cat([middle - half, middle + half], 1)


def total_variation(patch: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, `[..., h, w]` -> a scalar."""
    down, right = patch.diff(dim=-2).abs(), patch.diff(dim=-1).abs()
    return (down.sum() + right.sum()) / max(1, down.numel() + right.numel())


def random_patch(like: Tensor, bounds: Bounds, draw: torch.Generator) -> Tensor:
    """Uniform noise of the same shape: the control that shows what covering the area does by itself."""
    noise = torch.rand(like.shape, generator=draw).to(like)
    return bounds.low + noise * (bounds.high - bounds.low)


def cooled(move: Move, every: int, factor: float) -> Move:
    """`move` with a length that falls by `factor` after each `every` steps."""

    def shorter(x: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        return x + (move(x, grad, rows, k) - x) * factor ** (k // every)

    return shorter


@dataclass(frozen=True)
class Press:
    """How a patch is made: Adam on the mean goal over drawn scenes and looks.

    Args:
        steps: gradient steps.
        batch: scenes of a step, each under a look of its own.
        lr: Adam's step in shares of the range; it falls by 3% after each 100 steps.
        smooth: weight of the total variation.
        looks: the transformations.
    """

    steps: int = 1000
    batch: int = 5
    lr: float = 0.01
    smooth: float = 1e-4
    looks: Looks = Looks()

    def made(
        self,
        x: Tensor,
        rects: Tensor,
        channels: Sequence[int],
        start: Tensor,
        goal: Goal,
        bounds: Bounds,
        draw: torch.Generator,
    ) -> Tensor:
        """The patch `[c, h, w]` that lowers E[goal(scene with the patch under a drawn look)], within the bounds.

        Source: Athalye et al., ICML 2018, arXiv 1707.07397, for the expectation; Cheng et al., ICLR 2024, arXiv
        2304.14614, section 4 and its settings of Adam.
        """
        span = bounds.high - bounds.low

        def objective(patch: Tensor, _: Tensor) -> tuple[Tensor, None]:
            rows = torch.randint(len(x), (self.batch,), generator=draw).to(x.device)
            looks, where = self.looks.drawn(patch[0], rects[rows], bounds, draw)
            value = goal(pasted(x[rows], looks, where, channels), rows).mean()
            return (value + self.smooth * total_variation(patch) / span)[None], None

        move = cooled(adam_move(start[None], self.lr * span, (0.5, 0.9)), 100, 0.97)
        found = descend(start[None], objective, self.steps, move, lambda p, _: p.clamp(bounds.low, bounds.high))
        return found[0]
