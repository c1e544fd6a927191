"""SqueezeNet: fire modules, late downsampling, no fully connected layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor, nn

BYPASSES = ("none", "simple", "complex")


@dataclass(frozen=True)
class Shape:
    """Filters of one fire module."""

    squeeze: int
    expand1: int
    expand3: int

    @property
    def outputs(self) -> int:
        return self.expand1 + self.expand3


def fires(
    count: int = 8,
    base_e: int = 128,
    incr_e: int = 128,
    freq: int = 2,
    squeeze_ratio: float = 0.125,
    pct3x3: float = 0.5,
) -> list[Shape]:
    """The family of section 5: fire i has e_i = base_e + incr_e floor(i / freq) expand filters, i from 0.

    A share `pct3x3` of them is 3x3, and squeeze_ratio * e_i filters squeeze, at least one.

    >>> fires()[0], fires()[7]
    (Shape(squeeze=16, expand1=64, expand3=64), Shape(squeeze=64, expand1=256, expand3=256))
    """
    made = []
    for i in range(count):
        expand = base_e + incr_e * (i // freq)
        wide = floor(expand * pct3x3 + 0.5)
        made.append(Shape(max(1, floor(expand * squeeze_ratio + 0.5)), expand - wide, wide))
    return made


def _conv(fan_in: int, fan_out: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(fan_in, fan_out, kernel, stride=stride, padding=padding), relu=nn.ReLU())
    )


class Fire(nn.Module):
    """A 1x1 convolution to few channels, then 1x1 and 3x3 convolutions side by side.

    Args:
        fan_in: channels of the input.
        shape: filters; without 1x1 or 3x3 ones that side is left out.
        bypass: what is added to the outputs: nothing, the input (where it has as many channels), or the input or,
            where it has not, a 1x1 convolution of it.

    Shapes: `[B, fan_in, S, S]` -> `[B, expand1 + expand3, S, S]`.
    """

    def __init__(self, fan_in: int, shape: Shape, bypass: str = "none") -> None:
        super().__init__()
        self.squeeze = _conv(fan_in, shape.squeeze, 1)
        sides = OrderedDict[str, nn.Module]()
        if shape.expand1:
            sides["one"] = _conv(shape.squeeze, shape.expand1, 1)
        if shape.expand3:
            sides["three"] = _conv(shape.squeeze, shape.expand3, 3, padding=1)
        self.expand = nn.ModuleDict(sides)
        same = fan_in == shape.outputs
        self.across: nn.Module | None = None
        if bypass != "none" and same:
            self.across = nn.Identity()
        elif bypass == "complex":
            self.across = nn.Conv2d(fan_in, shape.outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        few = self.squeeze(x)
        out = torch.cat([side(few) for side in self.expand.values()], 1)
        return out if self.across is None else out + self.across(x)


class SqueezeNet(nn.Module):
    """A convolution, fire modules with max pooling between them, a 1x1 convolution to the classes and its mean.

    Args:
        channels: of the input.
        classes: outputs.
        stem: the first convolution; its padding is left to it.
        shapes: of the fire modules `fire2`, `fire3`, ...
        pools: numbers of the parts behind which a 3x3 maximum of stride 2 stands; 1 is the first convolution.
        bypass: see `Fire`.
        dropout: share of the last features dropped in training.
        rectified: the scores of every position pass a ReLU before their mean, as in the paper.

    Shapes: `[B, channels, S, S]` -> logits `[B, classes]`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        stem: tuple[int, int, int],
        shapes: Sequence[Shape],
        pools: Collection[int],
        bypass: str = "none",
        dropout: float = 0.5,
        rectified: bool = True,
    ) -> None:
        super().__init__()
        width, kernel, stride = stem
        # The large-image networks do not pad their first layer; a small image cannot spare its border.
        parts = OrderedDict[str, nn.Module](
            conv1=_conv(channels, width, kernel, stride, kernel // 2 if stride == 1 else 0)
        )
        fan_in = width
        for number in range(1, len(shapes) + 2):
            if number > 1:
                shape = shapes[number - 2]
                parts[f"fire{number}"] = Fire(fan_in, shape, bypass)
                fan_in = shape.outputs
            if number in pools:
                parts[f"pool{number}"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.features = nn.Sequential(parts)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(fan_in, classes, 1)
        self.relu = nn.ReLU() if rectified else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.01)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the first convolution and of the fire modules."""
        return tuple(f"features.{name}" for name, _ in self.features.named_children() if not name.startswith("pool"))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        x = self.relu(self.head(self.dropout(self.features(x))))
        logits: Tensor = self.flat(self.pool(x))
        return logits


def squeezenet1_0(classes: int = 1000, bypass: str = "none") -> SqueezeNet:
    """The network of the paper, for images of 224 pixels: 1,248,424 parameters at 1,000 classes without bypass."""
    return SqueezeNet(3, classes, (96, 7, 2), fires(), (1, 4, 8), bypass)


def squeezenet1_1(classes: int = 1000, bypass: str = "none") -> SqueezeNet:
    """The authors' later network, 2.4 times cheaper: a smaller first convolution and earlier pooling."""
    return SqueezeNet(3, classes, (64, 3, 2), fires(), (1, 3, 5), bypass)
