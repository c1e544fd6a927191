"""Nineteen kinds of everyday damage to images `[N, C, H, W]`, each with one strength from 0 to 1.

Every function takes images scaled to [0, 1], a strength and a generator, and returns images that the caller clips.
Kinds: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR
2019, arXiv 1903.12261, appendix B; strengths here are scaled to the side of the image instead of five fixed levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.types import Bounds
from cupel.ops.corruptions import contrasted, gaussian_blur, shifted

Damage = Callable[[Tensor, float, torch.Generator], Tensor]

# Luminance table of the JPEG standard (ITU-T T.81, table K.1), rows of the eight by eight block.
JPEG = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip


def _normal(x: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=draw).to(x)


def _uniform(shape: torch.Size | tuple[int, ...], draw: torch.Generator, like: Tensor) -> Tensor:
    return torch.rand(shape, generator=draw).to(like)


def _cloud(x: Tensor, draw: torch.Generator, decay: float = 0.5) -> Tensor:
    """Random clouds in [0, 1], `[N, 1, H, W]`: octaves of noise, each finer and weaker by `decay`."""
    found = torch.zeros_like(x[:, :1])
    for octave in range(max(1, int(math.log2(max(2, min(x.shape[2:])))))):
        coarse = _uniform((len(x), 1, 2 ** (octave + 1), 2 ** (octave + 1)), draw, x)
        found = found + decay**octave * F.interpolate(coarse, x.shape[2:], mode="bilinear", align_corners=False)
    low, high = found.amin((1, 2, 3), keepdim=True), found.amax((1, 2, 3), keepdim=True)
    return (found - low) / (high - low).clamp_min(1e-12)


def _warped(x: Tensor, field: Tensor) -> Tensor:
    """`x` read at places moved by `field` `[N, H, W, 2]` (right, down), in shares of the side."""
    plain = torch.eye(2, 3, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(plain, list(x.shape), align_corners=False) + 2 * field
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _streaked(x: Tensor, length: float, way: Tensor) -> Tensor:
    """Mean of nine copies of `x` along `way` `[N, 2]`, `length` pixels from first to last."""
    return torch.stack([shifted(x, length * t / 8 * way) for t in range(-4, 5)]).mean(0)


def _ways(x: Tensor, draw: torch.Generator) -> Tensor:
    angle = 2 * math.pi * _uniform((len(x),), draw, x)
    return torch.stack([angle.sin(), angle.cos()], 1)


def _side(x: Tensor) -> int:
    return min(x.shape[2:])


def gaussian_noise(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    return x + 0.4 * s * _normal(x, draw)


def shot_noise(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    """Counts of photons: about 60 for white at strength 0, and 4 at strength 1."""
    photons = 60.0 * (1 / 15.0) ** s
    found: Tensor = torch.poisson(x.clamp_min(0).cpu() * photons, generator=draw).to(x) / photons
    return found


def impulse_noise(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    hit, white = _uniform(x.shape, draw, x) < 0.3 * s, _uniform(x.shape, draw, x) < 0.5
    return torch.where(hit, white.to(x.dtype), x)


def speckle_noise(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    return x + 0.6 * s * x * _normal(x, draw)


def blur(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    return gaussian_blur(x, 0.15 * s * _side(x))


def defocus(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    """Mean over a disc, whose edge is soft by one pixel."""
    radius = 0.25 * s * _side(x)
    reach = math.ceil(radius)
    at = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    disc = (radius + 0.5 - (at[:, None] ** 2 + at[None, :] ** 2).sqrt()).clamp(0, 1)
    kernel = (disc / disc.sum()).expand(x.shape[1], 1, *disc.shape)
    return F.conv2d(F.pad(x, (reach,) * 4, mode="replicate"), kernel, groups=x.shape[1])


def glass(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    """Every pixel is read from a random neighbour, then blurred a little."""
    field = (_uniform((len(x), *x.shape[2:], 2), draw, x) * 2 - 1) * 0.15 * s
    return gaussian_blur(_warped(x, field), 0.3 * s)


def motion(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    return _streaked(x, 0.4 * s * _side(x), _ways(x, draw))


def zoom(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    """Mean of the image and of five enlargements up to 1 + 0.6 s."""
    made = [x]
    for k in range(1, 6):
        size = torch.eye(2, 3, dtype=x.dtype, device=x.device) / (1 + 0.6 * s * k / 5)
        grid = F.affine_grid(size.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        made.append(F.grid_sample(x, grid, padding_mode="border", align_corners=False))
    return torch.stack(made).mean(0)


def fog(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    return (x + 1.5 * s * _cloud(x, draw, 0.6)) / (1 + 1.5 * s)


def frost(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    """Bright veins, where a cloud is near its middle, over a darker image."""
    vein = (1 - 4 * (_cloud(x, draw, 0.8) - 0.5).abs()).clamp_min(0)
    return (1 - 0.4 * s) * x + 0.8 * s * vein


def snow(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    """Rare bright flakes, drawn out along one direction, over a paler image."""
    flakes = (_uniform(x[:, :1].shape, draw, x) < 0.05 + 0.15 * s).to(x.dtype)
    fallen = _streaked(flakes, 0.25 * _side(x), _ways(x, draw))
    return (1 - 0.3 * s) * x + 0.3 * s * x.mean((1, 2, 3), keepdim=True) + s * fallen


def spatter(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    """Drops of white cover the tenth to half of the image where a cloud is highest."""
    cloud = _cloud(x, draw, 0.7)
    edge = torch.quantile(cloud.flatten(1), 1 - (0.1 + 0.4 * s), dim=1).view(-1, 1, 1, 1)
    drop = ((cloud - edge) * 8).clamp(0, 1) * s
    return (1 - drop) * x + drop


def brightness(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    return x + 0.6 * s


def contrast(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    return contrasted(x, 1 - 0.9 * s)


def saturate(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    """Distance of every channel to grey times up to five; grey images have none."""
    grey = x.mean(1, keepdim=True)
    return grey + (1 + 4 * s) * (x - grey)


def elastic(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    """Places move by a smooth random field, up to 0.15 of the side."""
    coarse = (_uniform((len(x), 2, 4, 4), draw, x) * 2 - 1) * 0.15 * s
    field = F.interpolate(coarse, x.shape[2:], mode="bilinear", align_corners=False)
    return _warped(x, field.permute(0, 2, 3, 1))


def jpeg(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    """Blocks of 8 x 8 rounded in their cosine transform, each channel as if it were luminance: quality 90 down to 5."""
    quality = 90 - 85 * s
    factor = (5000 / quality if quality < 50 else 200 - 2 * quality) / 100
    table = (torch.tensor(JPEG, dtype=x.dtype, device=x.device) * factor).clamp(1, 255)
    at = torch.arange(8, dtype=x.dtype, device=x.device)
    cosines = torch.cos(math.pi / 8 * (at[None, :] + 0.5) * at[:, None]) / 2
    cosines[0] /= math.sqrt(2)
    height, width = x.shape[2:]
    full = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate") * 255 - 128
    blocks = full.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # [N, C, rows, columns, 8, 8]
    kept = ((cosines @ blocks @ cosines.T) / table).round() * table
    found = (cosines.T @ kept @ cosines).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    back: Tensor = (found[:, :, :height, :width] + 128) / 255
    return back


def pixelate(x: Tensor, s: float, draw: torch.Generator) -> Tensor:
    high, wide = (max(1, round(n * (1 - 0.8 * s))) for n in x.shape[2:])
    return F.interpolate(F.adaptive_avg_pool2d(x, (high, wide)), x.shape[2:], mode="nearest")


DAMAGES: dict[str, Damage] = {
    "gaussian-noise": gaussian_noise, "shot-noise": shot_noise, "impulse-noise": impulse_noise,
    "speckle-noise": speckle_noise, "gaussian-blur": blur, "defocus-blur": defocus, "glass-blur": glass,
    "motion-blur": motion, "zoom-blur": zoom, "fog": fog, "frost": frost, "snow": snow, "spatter": spatter,
    "brightness": brightness, "contrast": contrast, "saturate": saturate, "elastic": elastic, "jpeg": jpeg,
    "pixelate": pixelate,
}  # fmt: skip


def damaged(x: Tensor, kind: str, strength: float, bounds: Bounds, draw: torch.Generator) -> Tensor:
    """`x` after one kind of damage of `strength` in [0, 1], inside `bounds`; shape and dtype stay."""
    span = bounds.high - bounds.low
    with torch.no_grad():
        found = DAMAGES[kind]((x - bounds.low) / span, strength, draw)
    return (found * span + bounds.low).clamp(bounds.low, bounds.high).to(x.dtype)
