"""Residual networks for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut without parameters.

    Where the shape changes, the shortcut takes every `stride`-th pixel and fills new channels with zeros.

    Shapes: `[B, fan_in, S, S]` -> `[B, fan_out, S / stride, S / stride]`.
    """

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.relu = nn.ReLU()
        self.stride, self.grown = stride, fan_out - fan_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        if self.grown:
            short = F.pad(short, (0, 0, 0, 0, 0, self.grown))
        return self.relu(y + short)


class ResNet(nn.Module):
    """The CIFAR network of He et al.: three stages of `n` residual blocks, 6n + 2 weighted layers.

    Args:
        channels: of the input.
        classes: outputs.
        width: channels of the first stage (16 in the paper); 2 and 4 times that in the next.
        n: blocks of a stage.

    Shapes: `[B, channels, S, S]` -> logits `[B, classes]`, S divisible by 4.
    """

    def __init__(self, channels: int, classes: int, width: int, n: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

        def stage(fan_in: int, fan_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                Residual(fan_in, fan_out, stride), *(Residual(fan_out, fan_out, 1) for _ in range(n - 1))
            )

        self.stage1 = stage(width, width, 1)
        self.stage2 = stage(width, 2 * width, 2)
        self.stage3 = stage(2 * width, 4 * width, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        x = self.relu(self.norm(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(self.flat(self.pool(x)))
