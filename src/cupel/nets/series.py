"""A plain convolutional network for time series."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


class SeriesNet(nn.Module):
    """Three 1-D convolution blocks with batch norm, the mean over time, one linear head.

    Shapes: `[B, channels, T]` -> logits `[B, classes]`, any T.
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()

        def block(fan_in: int, fan_out: int, kernel: int) -> nn.Sequential:
            return nn.Sequential(
                OrderedDict(
                    conv=nn.Conv1d(fan_in, fan_out, kernel, padding=kernel // 2, bias=False),
                    norm=nn.BatchNorm1d(fan_out),
                    relu=nn.ReLU(),
                )
            )

        self.block1 = block(channels, width, 7)
        self.block2 = block(width, 2 * width, 5)
        self.block3 = block(2 * width, width, 3)
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T]
        x = self.block3(self.block2(self.block1(x)))
        return self.head(self.flat(self.pool(x)))
