"""A plain multi-layer perceptron."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


class Mlp(nn.Module):
    """Fully connected blocks with ReLU, `block1`, `block2`, ..., and one linear head.

    Shapes: `[B, ...]` with `features` values an example (flattened inside) -> logits `[B, classes]`.
    """

    def __init__(self, features: int, hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.blocks = tuple(f"block{k}" for k in range(1, len(hidden) + 1))
        fan_in = features
        for name, width in zip(self.blocks, hidden, strict=True):
            self.add_module(name, nn.Sequential(OrderedDict(linear=nn.Linear(fan_in, width), relu=nn.ReLU())))
            fan_in = width
        self.head = nn.Linear(fan_in, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, ...]
        x = self.flat(x)  # [B, features]
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.head(x)
        return logits
