"""Networks that accelerators are compared on, at their published sizes; build them on torch's meta device to count."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cupel.ops.ledger import ledger_of
from cupel.ops.products import Product


def _conv(fan_in: int, fan_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(fan_out),
        nn.ReLU(),
    )


def vgg16(classes: int = 1000) -> nn.Sequential:
    """Simonyan and Zisserman 2015, configuration D, for `[B, 3, 224, 224]`."""
    layers: list[nn.Module] = []
    fan_in = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(fan_in, width, 3, padding=1), nn.ReLU()]
            fan_in = width
        layers.append(nn.MaxPool2d(2))
    head = (nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, classes))
    return nn.Sequential(*layers, nn.Flatten(), *head)


class _Block(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _conv(fan_in, fan_out, 3, stride), _conv(fan_out, fan_out, 3)[:2]
        self.short = _conv(fan_in, fan_out, 1, stride)[:2] if stride > 1 or fan_in != fan_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.short(x))


def resnet18(classes: int = 1000) -> nn.Sequential:
    """He et al. 2016, 18 layers with projections, for `[B, 3, 224, 224]`."""
    layers: list[nn.Module] = [_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    fan_in = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(fan_in, width, stride), _Block(width, width, 1)]
        fan_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def mobilenet(classes: int = 1000) -> nn.Sequential:
    """Howard et al. 2017 (the first version, width 1), for `[B, 3, 224, 224]`."""
    layers: list[nn.Module] = [_conv(3, 32, 3, 2)]
    fan_in = 32
    plan = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
    for width, stride in plan:
        layers += [_conv(fan_in, fan_in, 3, stride, groups=fan_in), _conv(fan_in, width, 1)]
        fan_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, classes))


NETWORKS = {"vgg16": vgg16, "resnet18": resnet18, "mobilenet": mobilenet}


def products_of(name: str, batch: int = 1) -> list[tuple[str, Product]]:
    """The matrix products of one of `NETWORKS`, layer by layer, without computing anything.

    >>> sum(p.macs for _, p in products_of("resnet18"))  # 1.8 G, as published
    1814073344
    """
    with torch.device("meta"):
        net, inputs = NETWORKS[name]().eval(), torch.empty(batch, 3, 224, 224)
    return ledger_of(net, inputs).products()
