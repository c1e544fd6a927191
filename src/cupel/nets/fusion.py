"""Detectors that see a scene through several sensors, merged early (features) or late (scores)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.ops.detection import BOX


def _block(fan_in: int, fan_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False),
            norm=nn.BatchNorm2d(fan_out),
            relu=nn.ReLU(),
        )
    )


class Branch(nn.Module):
    """Features of one sensor on the grid of cells: `[B, C, S, S]` -> `[B, 4 * width, S / 8, S / 8]`.

    Args:
        coarse: the sensor's own grid has half the resolution; its 2x2 repeats are undone first.
    """

    def __init__(self, channels: Sequence[int], width: int, coarse: bool) -> None:
        super().__init__()
        self.low, self.high = min(channels), max(channels) + 1
        self.own = nn.AvgPool2d(2) if coarse else nn.Identity()
        self.near = _block(self.high - self.low, width, 1 if coarse else 2)
        self.middle = _block(width, 2 * width, 2)
        self.far = _block(2 * width, 4 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.far(self.middle(self.near(self.own(x[:, self.low : self.high]))))
        return features


class Trunk(nn.Module):
    """From features of all sensors to the answer of every cell: `[B, C, G, G]` -> `[B, 5 + classes, G, G]`.

    Args:
        pyramid: whether cells also get what a coarse grid of half the cells makes of the whole scene.
    """

    def __init__(self, channels: int, width: int, classes: int, pyramid: bool) -> None:
        super().__init__()
        self.near = _block(channels, width, 1)
        coarse = [_block(width, width, 2), _block(width, width, 1), _block(width, width, 1)]
        self.wide = nn.Sequential(*coarse, nn.Upsample(scale_factor=2)) if pyramid else None
        self.far = _block(width * (1 + pyramid), width, 1)
        self.head = nn.Conv2d(width, BOX + classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.near(x)
        if self.wide is not None:
            x = torch.cat([x, self.wide(x)], 1)
        answer: Tensor = self.head(self.far(x))
        return answer


def merged(one: Tensor, other: Tensor) -> Tensor:
    """Two detectors' answers as one: means of their probabilities, boxes weighted by how sure each is.

    Shapes: `[B, 5 + K, G, G]` twice -> the same; its logits give back the means.
    """
    a, b = one[:, :1], other[:, :1]
    yes = torch.logaddexp(F.logsigmoid(a), F.logsigmoid(b))
    no = torch.logaddexp(F.logsigmoid(-a), F.logsigmoid(-b))
    share = (F.logsigmoid(a) - yes).exp()
    boxes = torch.logit(share * one[:, 1:BOX].sigmoid() + (1 - share) * other[:, 1:BOX].sigmoid(), eps=1e-6)
    names = torch.logaddexp(one[:, BOX:].log_softmax(1), other[:, BOX:].log_softmax(1))
    return torch.cat([yes - no, boxes, names], 1)


class FusionNet(nn.Module):
    """A detector on a grid of cells of 8 pixels, for scenes whose channels come from a camera and a LiDAR.

    Args:
        channels: which channels of the input belong to each sensor that is used; the others are not read.
        coarse: sensors of half the resolution.
        fusion: `early` (one trunk on the features of all sensors) or `late` (a detector each, their scores averaged).
        pyramid: whether a cell hears of the whole scene through a coarser grid, or of its neighbours alone.

    Shapes: `[B, C, S, S]` -> `[B, 5 + classes, S / 8, S / 8]`; S a multiple of 16.
    """

    def __init__(
        self,
        channels: Mapping[str, tuple[int, ...]],
        coarse: tuple[str, ...],
        fusion: str,
        classes: int,
        width: int,
        pyramid: bool,
    ) -> None:
        super().__init__()
        self.late = fusion == "late"
        self.branches = nn.ModuleDict({name: Branch(c, width, name in coarse) for name, c in channels.items()})
        parts = len(channels) if self.late else 1
        fan_in = 4 * width * (1 if self.late else len(channels))
        self.trunks = nn.ModuleList(Trunk(fan_in, 4 * width, classes, pyramid) for _ in range(parts))

    def forward(self, x: Tensor) -> Tensor:
        features = [branch(x) for branch in self.branches.values()]
        if not self.late:
            features = [torch.cat(features, 1)]
        answer: Tensor = self.trunks[0](features[0])
        for trunk, own in zip(list(self.trunks)[1:], features[1:], strict=True):
            answer = merged(answer, trunk(own))
        return answer
