"""A perceptron that looks at images through their discrete cosine transform."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cupel.nets.mlp import Mlp


def cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, `[size, size]`: rows are frequencies."""
    at, wave = torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)[:, None]
    table = (math.pi / size * (at + 0.5) * wave).cos() * math.sqrt(2 / size)
    table[0] /= math.sqrt(2)
    return table


class SpectralMlp(nn.Module):
    """The two-dimensional DCT of every channel, and a perceptron on its coefficients.

    Shapes: `[B, C, H, W]` -> logits `[B, classes]`.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, shape: Sequence[int], hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.register_buffer("rows", cosines(height).float())
        self.register_buffer("columns", cosines(width).float())
        self.norm = nn.BatchNorm1d(channels * height * width)  # coefficients differ by orders of magnitude
        self.body = Mlp(channels * height * width, hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        waves = self.rows @ x @ self.columns.T  # [B, C, H, W]
        logits: Tensor = self.body(self.norm(waves.flatten(1)))
        return logits
