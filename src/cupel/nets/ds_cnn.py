"""Depthwise-separable networks for short sounds, seen as small images of cepstral coefficients."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Plan:
    """One size: channels, strides (time, coefficients) of the first convolution and of block 1, number of blocks."""

    width: int
    stem: tuple[int, int]
    first: tuple[int, int]
    blocks: int


SIZES = {
    "S": Plan(64, (2, 2), (1, 1), 4),
    "M": Plan(172, (2, 1), (2, 2), 4),
    "L": Plan(276, (2, 1), (2, 2), 5),
}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, so that ceil(size / stride) positions come out; the odd one stands behind.

    >>> same_padding(49, 10, 2), same_padding(10, 4, 1)
    ((4, 5), (1, 2))
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def same_conv(
    fan_in: int,
    fan_out: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    side: tuple[int, int],
    groups: int = 1,
    bias: bool = False,
) -> OrderedDict[str, nn.Module]:
    """A convolution that keeps ceil(side / stride) positions, as `pad` (only where it is lopsided) and `conv`."""
    (top, bottom), (left, right) = (same_padding(*axis) for axis in zip(side, kernel, stride, strict=True))
    parts = OrderedDict[str, nn.Module]()
    even = top == bottom and left == right
    if not even:
        parts["pad"] = nn.ZeroPad2d((left, right, top, bottom))
    padding = (top, left) if even else (0, 0)
    parts["conv"] = nn.Conv2d(fan_in, fan_out, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
    return parts


def shrunk(side: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Positions that `same_conv` leaves of `side`."""
    return -(-side[0] // stride[0]), -(-side[1] // stride[1])


class Separable(nn.Sequential):
    """A 3x3 convolution of every channel alone, then a 1x1 convolution, each with batch norm and ReLU."""

    def __init__(self, width: int, stride: tuple[int, int], side: tuple[int, int]) -> None:
        super().__init__(
            OrderedDict(
                depthwise=nn.Sequential(
                    OrderedDict(
                        **same_conv(width, width, (3, 3), stride, side, groups=width),
                        norm=nn.BatchNorm2d(width),
                        relu=nn.ReLU(),
                    )
                ),
                pointwise=nn.Sequential(
                    OrderedDict(
                        conv=nn.Conv2d(width, width, 1, bias=False),
                        norm=nn.BatchNorm2d(width),
                        relu=nn.ReLU(),
                    )
                ),
            )
        )


class DsCnn(nn.Module):
    """DS-CNN of Zhang et al. (arXiv 1711.07128): a wide convolution, separable blocks, the mean over all positions.

    Args:
        classes: outputs.
        size: `S`, `M` or `L`: 64, 172 or 276 channels in 4, 4 or 5 blocks.
        width: other channels than those of the size; 0 for its own.
        frames, coefficients: of the input image.
        channels: images an example, 1 for sound.

    Shapes: `[B, channels, frames, coefficients]` -> logits `[B, classes]`.
    """

    def __init__(
        self,
        classes: int,
        size: str = "S",
        width: int = 0,
        frames: int = 49,
        coefficients: int = 10,
        channels: int = 1,
    ) -> None:
        super().__init__()
        plan = SIZES[size]
        wide = width or plan.width
        side = (frames, coefficients)
        self.stem = nn.Sequential(
            OrderedDict(
                **same_conv(channels, wide, (10, 4), plan.stem, side),
                norm=nn.BatchNorm2d(wide),
                relu=nn.ReLU(),
            )
        )
        side = shrunk(side, plan.stem)
        self.blocks = nn.Sequential()
        for k in range(plan.blocks):
            stride = plan.first if k == 0 else (1, 1)
            self.blocks.append(Separable(wide, stride, side))
            side = shrunk(side, stride)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T, F]
        logits: Tensor = self.head(self.flat(self.pool(self.blocks(self.stem(x)))))
        return logits
