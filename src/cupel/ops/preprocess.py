"""What is done to images before a network sees them in the hope that small perturbations do not survive it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cupel.core.types import Bounds


def fewer_bits(x: Tensor, bounds: Bounds, bits: int = 4) -> Tensor:
    """Inputs rounded to 2^bits levels of their range.

    Source: Xu, Evans and Qi, NDSS 2018, arXiv 1704.01155, section III-A.
    """
    levels, side = 2**bits - 1, bounds.high - bounds.low
    coarse: Tensor = ((x - bounds.low) / side * levels).round() / levels * side + bounds.low
    return coarse


def median_filtered(x: Tensor) -> Tensor:
    """Every pixel replaced by the median of the 3x3 around it, `[N, C, H, W]`; edges are repeated.

    Source: Xu, Evans and Qi, NDSS 2018, arXiv 1704.01155, section III-B.
    """
    n, c, h, w = x.shape
    patches: Tensor = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None], 3)
    middle: Tensor = patches.median(dim=1).values.view(n, c, h, w)
    return middle
