"""A plain convolutional network for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three 3x3 convolution blocks with batch norm, 2x2 pooled features, one linear head.

    Shapes: `[B, channels, S, S]` -> logits `[B, classes]`, S >= 8.
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()

        def block(fan_in: int, fan_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False),
                    norm=nn.BatchNorm2d(fan_out),
                    relu=nn.ReLU(),
                )
            )

        self.block1 = block(channels, width, 1)
        self.block2 = block(width, 2 * width, 2)
        self.block3 = block(2 * width, 2 * width, 1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flat = nn.Flatten()
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        x = self.block3(self.block2(self.block1(x)))
        return self.head(self.flat(self.pool(x)))


def small() -> ConvNet:
    """A fresh network for one-channel images and ten classes: a factory as `own-model` takes one."""
    return ConvNet(channels=1, classes=10, width=4)
