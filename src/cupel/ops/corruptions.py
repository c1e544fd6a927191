"""Everyday damage to images `[B, C, H, W]` and series `[B, C, T]`: noise, blur, shift, contrast."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _as_images(x: Tensor) -> Tensor:
    """`[B, C, T]` -> `[B, C, 1, T]`; images stay."""
    return x.unsqueeze(2) if x.ndim == 3 else x


def gaussian_kernel(sigma: float, radius: int) -> Tensor:
    """A Gaussian of `sigma` samples on -radius..radius that sums to one, `[2 * radius + 1]` float64."""
    at = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weight = torch.exp(-0.5 * (at / sigma) ** 2)
    return weight / weight.sum()


def gaussian_blur(x: Tensor, sigma: float, radius: int | None = None) -> Tensor:
    """Blur every channel along all its axes; border values continue outside. Shape and dtype stay.

    Args:
        x: `[B, C, T]` or `[B, C, H, W]`.
        sigma: standard deviation in samples or pixels; 0 changes nothing.
        radius: where the kernel ends; four sigmas if not given.
    """
    if sigma == 0:
        return x.clone()
    reach = max(1, math.ceil(4 * sigma)) if radius is None else radius
    image = _as_images(x)
    channels = image.shape[1]
    kernel = gaussian_kernel(sigma, reach).to(x)
    for axis in (2, 3):
        if image.shape[axis] == 1:
            continue
        tall = axis == 2
        weight = kernel.view(1, 1, -1, 1) if tall else kernel.view(1, 1, 1, -1)
        pads = (0, 0, reach, reach) if tall else (reach, reach, 0, 0)
        padded = F.pad(image, pads, mode="replicate")
        image = F.conv2d(padded, weight.expand(channels, 1, *weight.shape[2:]), groups=channels)
    return image.view(x.shape)


def shifted(x: Tensor, offset: Tensor) -> Tensor:
    """Move every example by its own offset; border values continue into the gap. Shape and dtype stay.

    Args:
        x: `[B, C, T]` or `[B, C, H, W]`.
        offset: `[B, 1]` (time) or `[B, 2]` (down, right) in samples or pixels; parts of a sample are
            interpolated linearly.
    """
    image = _as_images(x)
    size = torch.tensor(image.shape[2:], dtype=x.dtype)
    moves = torch.cat([torch.zeros_like(offset), offset], dim=1) if x.ndim == 3 else offset
    # Grid coordinates run from -1 to 1 over the whole axis, x (right) before y (down).
    move = (2 * moves.to(x.dtype) / size).flip(1)
    plain = torch.eye(2, 3, dtype=x.dtype, device=x.device).repeat(len(x), 1, 1)
    plain[:, :, 2] = -move.to(x.device)
    grid = F.affine_grid(plain, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False).view(x.shape)


def contrasted(x: Tensor, factor: Tensor | float) -> Tensor:
    """Scale the distance to each channel's mean by `factor`; the mean stays. Shape and dtype stay."""
    mean = x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)
    return mean + factor * (x - mean)


def with_noise(x: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Add `sigma` times standard normal `noise` of `x`'s shape."""
    return x + sigma * noise.to(x)
