"""Thin modules around a user's network, so that it takes plain inputs and gives logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalised(nn.Module):
    """A network behind the normalisation it was trained with: (x - mean) / std, a number a channel.

    Attacks and corruptions then act on the inputs as they are stored, in their true range.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float], axes: int) -> None:
        super().__init__()
        self.net = net
        shape = (-1, *[1] * (axes - 2))  # [C, 1, ...] over [N, C, ...]
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(shape))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).view(shape))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.net((inputs - self.mean) / self.std)
        return out


class Logits(nn.Module):
    """A network whose outputs are probabilities, with their logarithm in place of them: softmax gives them back."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.net(inputs)
        return out.clamp_min(1e-12).log()
