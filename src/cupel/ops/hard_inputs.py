"""Images a classifier should be careful with: damaged ones, and ones without any class."""

from __future__ import annotations

import torch
from torch import Tensor

from cupel.core.types import Bounds
from cupel.ops.corruptions import contrasted, gaussian_blur, shifted, with_noise


def damaged(x: Tensor, bounds: Bounds, draw: torch.Generator) -> Tensor:
    """Noise, blur, shift and weak contrast in turn, at the fourth of the five strengths of `corruption`."""
    angle = 2 * torch.pi * torch.rand(len(x), generator=draw)
    way = torch.stack([angle.sin(), angle.cos()], dim=1).to(x)
    side, span = min(x.shape[2:]), bounds.high - bounds.low
    kinds = [
        with_noise(x, torch.randn(x.shape, generator=draw), 0.18 * span),
        gaussian_blur(x, 0.09 * side),
        shifted(x, 0.15 * side * way),
        contrasted(x, 0.3),
    ]
    return torch.cat([kind[k :: len(kinds)] for k, kind in enumerate(kinds)]).clamp(bounds.low, bounds.high)


def shuffled(x: Tensor, draw: torch.Generator) -> Tensor:
    """Every image with its own pixels in an order of its own: no class is left."""
    order = torch.rand(len(x), x[0, 0].numel(), generator=draw).argsort(1)
    return x.flatten(2).gather(2, order[:, None].expand(-1, x.shape[1], -1).to(x.device)).view_as(x)
