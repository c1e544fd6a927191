"""Where a network can be disturbed: the smallest mask under which a free perturbation silences it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.descend import adam_move, descend
from cupel.core.types import Bounds
from cupel.ops.patches import on_channels

Scores = Callable[[Tensor, Tensor], Tensor]  # (scenes, their numbers) -> confidences [N, D]


@dataclass(frozen=True)
class Search:
    """How a map is found.

    Args:
        steps: gradient steps.
        coarse: pixels of the edge of one square of the mask.
        weight: of the mask's mean.
        lr: Adam's step, for mask logits and (in shares of the range) for the perturbation.
        enough: mean confidence below which only the mask shrinks further.
    """

    steps: int = 150
    coarse: int = 4
    weight: float = 1.0
    lr: float = 0.05
    enough: float = 0.01

    def maps(self, x: Tensor, channels: Sequence[int], scores: Scores, bounds: Bounds, draw: torch.Generator) -> Tensor:
        """A mask in [0, 1] for every scene, `[N, C, H, W]` -> `[N, H, W]`: large where its scores hang on the input.

        Lowers log mean scores(x (1 - m) + p m) + weight * mean m over p (from uniform noise) and m = (tanh(m0) + 1) / 2
        (from m0 = 0, one logit for a square of pixels), each scene by itself, on `channels` alone.

        Source: Cheng et al., ICLR 2024, arXiv 2304.14614, section 3 and equation 1.
        """
        n, _, h, w = x.shape
        size = (-(-h // self.coarse), -(-w // self.coarse))
        span, cut = bounds.high - bounds.low, len(channels) * h * w
        noise = torch.rand(n, cut, generator=draw).to(x)
        start = torch.cat([noise, noise.new_zeros(n, size[0] * size[1])], 1)  # shares of the range, mask logits

        def objective(both: Tensor, which: Tensor) -> tuple[Tensor, None]:
            free = bounds.low + both[:, :cut].view(-1, len(channels), h, w) * span
            mask = self.spread(both[:, cut:].view(-1, *size), h, w)
            here = on_channels(x[which], channels, lambda part: part * (1 - mask[:, None]) + free * mask[:, None])
            mean = scores(here, which).mean(1)
            silenced = (mean > self.enough) * mean.clamp_min(1e-12).log()
            return silenced + self.weight * mask.mean((1, 2)), None

        def back(both: Tensor, _: Tensor) -> Tensor:
            return torch.cat([both[:, :cut].clamp(0.0, 1.0), both[:, cut:]], 1)

        found = descend(start, objective, self.steps, adam_move(start, self.lr, (0.5, 0.9)), back)
        return self.spread(found[:, cut:].view(n, *size), h, w)

    def spread(self, logits: Tensor, height: int, width: int) -> Tensor:
        """Mask logits `[N, h, w]` -> masks `[N, H, W]`, each square one value."""
        mask = logits.tanh() * 0.5 + 0.5
        wide = F.interpolate(mask[:, None], scale_factor=float(self.coarse), mode="nearest")[:, 0]
        return wide[:, :height, :width]


def mass_inside(maps: Tensor, boxes: Tensor, there: Tensor) -> Tensor:
    """Share of each map's mass that lies in boxes: `[N, H, W]`, `[N, M, 4]` in pixels, `[N, M]` bool -> `[N]`.

    A pixel lies in a box that holds its middle. Near 1: the network is disturbed on the objects themselves; near the
    share of the scene that boxes cover: anywhere.
    """
    y = (torch.arange(maps.shape[1], device=maps.device) + 0.5).view(1, 1, -1, 1)
    x = (torch.arange(maps.shape[2], device=maps.device) + 0.5).view(1, 1, 1, -1)
    left, top, right, bottom = (boxes[..., k, None, None] for k in range(4))
    inside = ((x > left) & (x < right) & (y > top) & (y < bottom) & there[..., None, None]).any(1)
    share: Tensor = (maps * inside).sum((1, 2)) / maps.sum((1, 2)).clamp_min(1e-12)
    return share
