"""The places of given images that excite a channel most: pictures of what it looks for."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import torch
from torch import Tensor

from cupel.ops.channel_flow import Layer

Patch = tuple[int, int, int, int]  # row of the image, top, left, side in pixels


def patches_of(layer: Layer, maps: Tensor, channel: int, size: Sequence[int], most: int) -> list[Patch]:
    """The `most` images on which a channel is highest, each with a square of what its highest number sees.

    Args:
        maps: the layer's numbers on all images, `[N, P]`.
        size: rows and columns of an image.

    Returns:
        Squares that lie within the image; the whole image where a number sees all of it.
    """
    entries = (layer.channels == channel).nonzero().flatten()
    peak, place = maps[:, entries].max(dim=1)
    rows = peak.argsort(descending=True, stable=True)[:most].tolist()
    return [(row, *_square(layer, int(entries[place[row]]), size)) for row in rows]


def _square(layer: Layer, entry: int, size: Sequence[int]) -> tuple[int, int, int]:
    side = min(*size, layer.field or max(size))
    if len(layer.shape) != 3 or layer.shape[0] != layer.count or side == min(size):
        return 0, 0, min(size)
    across = entry % (layer.shape[1] * layer.shape[2])
    places = divmod(across, layer.shape[2])
    low = [
        max(0, min(pixels - side, round((place + 0.5) * pixels / cells - side / 2)))
        for place, cells, pixels in zip(places, layer.shape[1:], size, strict=True)
    ]
    return low[0], low[1], side


def packed(images: Tensor, low: float, high: float) -> dict[str, object]:
    """Images `[N, C, H, W]` as 8 bits a value, base64, one or three channels last: small enough for a page."""
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    codes = ((images - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    texts = [base64.b64encode(image.contiguous().cpu().numpy().tobytes()).decode() for image in codes]
    return {"width": images.shape[3], "height": images.shape[2], "channels": images.shape[1], "bytes": texts}
