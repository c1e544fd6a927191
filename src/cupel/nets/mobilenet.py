"""MobileNetV2, whole or in any other widths, depths and kernels, and the same with its receptive field moved back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """An inverted residual block.

    Args:
        width: channels it gives.
        expansion: channels inside, as a multiple of those it takes.
        kernel: side of the depthwise convolution, odd.
        stride: of the depthwise convolution.
    """

    width: int
    expansion: int = 6
    kernel: int = 3
    stride: int = 1


def _layer(fan_in: int, fan_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, groups=groups, bias=False),
            norm=nn.BatchNorm2d(fan_out),
            relu=nn.ReLU6(),
        )
    )


class Bottleneck(nn.Module):
    """Expand with 1x1, filter each channel, project with 1x1 without activation; add the input where shapes allow.

    Shapes: `[B, fan_in, S, S]` -> `[B, block.width, S / stride, S / stride]`.
    """

    def __init__(self, fan_in: int, block: Block) -> None:
        super().__init__()
        inner = fan_in * block.expansion
        self.expand = _layer(fan_in, inner) if block.expansion > 1 else nn.Identity()
        self.depth = _layer(inner, inner, block.kernel, block.stride, inner)
        self.project = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(inner, block.width, 1, bias=False), norm=nn.BatchNorm2d(block.width))
        )
        self.shortcut = block.stride == 1 and fan_in == block.width

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depth(self.expand(x)))
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """A stem, inverted residual blocks, a 1x1 layer, the mean over the map, a linear head.

    Args:
        channels: of the input.
        classes: outputs.
        blocks: in forward order.
        stem, last: channels of the 3x3 stem, and of the 1x1 layer before the mean.
        stride: of the stem.

    Shapes: `[B, channels, S, S]` -> logits `[B, classes]`.
    """

    def __init__(
        self, channels: int, classes: int, blocks: Sequence[Block], stem: int = 32, last: int = 1280, stride: int = 2
    ) -> None:
        super().__init__()
        self.stem = _layer(channels, stem, 3, stride)
        widths = [stem, *(b.width for b in blocks)]
        self.blocks = nn.Sequential(*(Bottleneck(w, b) for w, b in zip(widths, blocks, strict=False)))
        self.last = _layer(widths[-1], last)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        logits: Tensor = self.head(self.flat(self.pool(self.last(self.blocks(self.stem(x))))))
        return logits


def mobilenet_v2_blocks() -> tuple[Block, ...]:
    """Sandler et al. 2018, table 2."""
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    return tuple(
        Block(width, expansion, 3, stride if k == 0 else 1)
        for expansion, width, count, stride in rows
        for k in range(count)
    )


def mobilenet_v2(classes: int = 1000) -> MobileNet:
    """MobileNetV2 at width 1: 3.5 million weights, made for 224 x 224."""
    return MobileNet(3, classes, mobilenet_v2_blocks())


def receptive_field(blocks: Sequence[Block], stride: int = 2) -> int:
    """Side of the square of input pixels that one output of the last block sees, stem included."""
    seen, jump = 3, stride
    for block in blocks:
        seen += (block.kernel - 1) * jump
        jump *= block.stride
    return seen


def redistributed(blocks: Sequence[Block], first: int, stride: int = 2) -> tuple[Block, ...]:
    """The same network with less receptive field in its first `first` blocks and as much, or more, in all.

    In the first blocks, those with a shortcut move behind them (as many are added to the first run of equal blocks
    there), and the others keep a kernel only where they halve the map. Then later kernels grow, two a side and at most
    to seven, from the front, until the field is as large as it was.
    """
    head: list[Block] = []
    moved, width = 0, 0
    for block in blocks[:first]:
        if block.stride == 1 and block.width == width:
            moved += 1
        else:
            head.append(block if block.stride > 1 else replace(block, kernel=1))
        width = block.width
    tail = list(blocks[first:])
    at = next((k for k, b in enumerate(tail) if b.stride == 1 and k and tail[k - 1].width == b.width), len(tail))
    extra = replace(tail[at] if at < len(tail) else tail[-1], stride=1)
    tail[at:at] = [extra] * moved
    for size in (5, 7):
        for k, block in enumerate(tail):
            if receptive_field((*head, *tail), stride) >= receptive_field(blocks, stride):
                break
            tail[k] = replace(block, kernel=max(size, block.kernel))
    return (*head, *tail)
