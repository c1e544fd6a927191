"""A convolutional network with max pooling for images of 28 pixels and more."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


class PoolNet(nn.Module):
    """Three 3x3 convolution blocks with batch norm, the first two followed by max pooling, one linear head.

    Shapes: `[B, channels, side, side]` -> logits `[B, classes]`; the head sees `2 * width` maps of side / 4.
    """

    def __init__(self, channels: int, side: int, classes: int, width: int) -> None:
        super().__init__()

        def block(fan_in: int, fan_out: int, pool: bool) -> nn.Sequential:
            parts = OrderedDict[str, nn.Module](
                conv=nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False),
                norm=nn.BatchNorm2d(fan_out),
                relu=nn.ReLU(),
            )
            return nn.Sequential(parts | {"pool": nn.MaxPool2d(2)} if pool else parts)

        self.block1 = block(channels, width, True)
        self.block2 = block(width, 2 * width, True)
        self.block3 = block(2 * width, 2 * width, False)
        self.flat = nn.Flatten()
        self.head = nn.Linear(2 * width * (side // 4) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        return self.head(self.flat(self.block3(self.block2(self.block1(x)))))
