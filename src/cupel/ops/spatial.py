"""Turn and move images until the network errs: an attack without a norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.ops.threats import Model, Tally, Threat


def turned(x: Tensor, angle: Tensor, shift: Tensor, fill: float = 0.0) -> Tensor:
    """Images `[N, C, H, W]` turned counter-clockwise by `angle` `[N]` (radians), then moved by `shift` `[N, 2]`.

    `shift` is down and right, in pixels; what comes in from outside is `fill`. Bilinear.
    """
    height, width = x.shape[2:]
    cos, sin = angle.cos(), angle.sin()
    # Where every output pixel comes from: the inverse turn of the position minus the move, in units of half a side.
    down, right = shift[:, 0] * 2 / height, shift[:, 1] * 2 / width
    ratio = height / width
    rows = torch.stack(
        [
            torch.stack([cos, -sin * ratio, -cos * right + sin * ratio * down], 1),
            torch.stack([sin / ratio, cos, -sin / ratio * right - cos * down], 1),
        ],
        1,
    )
    grid = F.affine_grid(rows.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + fill


def spatial(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    degrees: float = 30.0,
    pixels: float = 0.1,
    tally: Tally | None = None,
) -> Tensor:
    """The worst of `threat.steps` random turns and moves of every image; an image drops out once it is fooled.

    Give the threat an infinite `eps`, or the judge draws the turned image back into the ball.

    Args:
        degrees: largest turn to either side.
        pixels: largest move, as a share of the side.

    Source: Engstrom et al., ICML 2019, arXiv 1712.02779, section 3 (worst-of-k).
    """
    if x.ndim != 4:
        raise ValueError(f"inputs of the spatial attack must be images [N, C, H, W]; got {x.ndim} dimensions.")
    best, least = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    rows = torch.arange(len(x), device=x.device)
    reach = torch.tensor([x.shape[2] * pixels, x.shape[3] * pixels])
    with torch.no_grad():
        for _ in range(threat.steps):
            angle = (torch.rand(len(rows), generator=draw) * 2 - 1) * math.radians(degrees)
            shift = (torch.rand(len(rows), 2, generator=draw) * 2 - 1) * reach
            tried = turned(x[rows], angle.to(x), shift.to(x), threat.bounds.low)
            logits = model(tried)
            if tally is not None:
                tally.queries[rows.cpu()] += 1
            gap = threat.gap(logits, y[rows])
            won = gap < least[rows]
            best[rows[won]], least[rows[won]] = tried[won], gap[won]
            rows = rows[~threat.reached(logits, y[rows])]
            if not len(rows):
                break
    return best
