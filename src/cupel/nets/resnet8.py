"""The eight-layer residual network of the tiny benchmarks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def _layer(fan_in: int, fan_out: int, kernel: int, stride: int, norm: bool) -> nn.Sequential:
    conv = nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=not norm)
    return nn.Sequential(conv, nn.BatchNorm2d(fan_out)) if norm else nn.Sequential(conv)


class Projected(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes.

    Shapes: `[B, fan_in, S, S]` -> `[B, fan_out, S / stride, S / stride]`.
    """

    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.first = _layer(fan_in, fan_out, 3, stride, norm)
        self.second = _layer(fan_out, fan_out, 3, 1, norm)
        same = stride == 1 and fan_in == fan_out
        self.short = nn.Identity() if same else _layer(fan_in, fan_out, 1, stride, norm)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.second(self.relu(self.first(x))) + self.short(x))
        return y


class ResNet8(nn.Module):
    """A stem and three residual blocks of `width`, 2 and 4 times `width` channels, and a pooled linear head.

    With width 16 on 32x32 images it is the network of MLPerf Tiny: 12.5 million multiply-adds. Without norms every
    convolution has a bias; `without_norms` makes that of a trained one.

    Shapes: `[B, channels, S, S]` -> logits `[B, classes]`, S divisible by 4.
    """

    def __init__(self, channels: int, classes: int, width: int = 16, norm: bool = True) -> None:
        super().__init__()
        self.sizes = (channels, classes, width)
        self.stem = _layer(channels, width, 3, 1, norm)
        self.relu = nn.ReLU()
        self.block1 = Projected(width, width, 1, norm)
        self.block2 = Projected(width, 2 * width, 2, norm)
        self.block3 = Projected(2 * width, 4 * width, 2, norm)
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        x = self.block3(self.block2(self.block1(self.relu(self.stem(x)))))
        logits: Tensor = self.head(self.flat(self.pool(x)))
        return logits


def without_norms(net: ResNet8) -> ResNet8:
    """The same function with every norm folded into the convolution before it; `net` must be in evaluation mode."""
    folded = ResNet8(*net.sizes, norm=False).eval()
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Sequential):
            plain, (conv, norm) = folded.get_submodule(name), layer
            plain.add_module("0", fuse_conv_bn_eval(conv, norm))  # type: ignore[type-var, arg-type]
    folded.head.load_state_dict(net.head.state_dict())
    return folded.requires_grad_(True)
