"""A small depthwise-separable network with signed activations."""

from __future__ import annotations

from torch import Tensor, nn


def _separable(fan_in: int, fan_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_in, 3, stride=stride, padding=1, groups=fan_in, bias=False),
        nn.BatchNorm2d(fan_in),
        nn.ELU(),
        nn.Conv2d(fan_in, fan_out, 1, bias=False),
        nn.BatchNorm2d(fan_out),
        nn.ELU(),
    )


class SeparableNet(nn.Module):
    """A 3x3 stem, `depth` depthwise-separable blocks of one width, a pooled linear head.

    Every activation is signed (ELU, Clevert et al. 2016): one range must serve both signs, which is
    what makes few-bit activations hard in networks of this kind. The second block halves the map.

    Shapes: `[B, channels, S, S]` -> logits `[B, classes]`, S >= 4.
    """

    def __init__(self, channels: int, classes: int, width: int = 24, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ELU())
        self.blocks = nn.Sequential(*(_separable(width, width, 2 if i == 1 else 1) for i in range(depth)))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flat = nn.Flatten()
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        logits: Tensor = self.head(self.flat(self.pool(self.blocks(self.stem(x)))))
        return logits
