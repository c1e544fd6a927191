"""A residual encoder with pixel-shuffle upsampling that returns an image of its input's size: what to take away."""

from __future__ import annotations

from torch import Tensor, nn

from cupel.nets.resnet import Residual


class Up(nn.Module):
    """3x3 convolution, pixel shuffle to twice the size, batch norm, PReLU.

    Shapes: `[B, fan_in, H, W]` -> `[B, fan_out, 2 H, 2 W]`.
    """

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(fan_in, 4 * fan_out, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.norm = nn.BatchNorm2d(fan_out)
        self.act = nn.PReLU(fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.shuffle(self.conv(x))))


class ResUpNet(nn.Module):
    """ResNet features brought back to full size, with the encoder's own features added at every size on the way.

    So nothing has to pass a bottleneck: the first features, at full size, reach the last convolution directly.
    The last convolution starts at zero: an untrained network takes nothing away.

    Args:
        channels: of input and output.
        width: channels at full size; they double where the sides are halved.
        depth: how often the sides are halved.

    Shapes: `[B, channels, H, W]` -> `[B, channels, H, W]`, any H and W.

    Source: Pestana et al., arXiv 2003.00883, 2020 (the abstract's description).
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        sizes = [width * 2**k for k in range(depth + 1)]
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.down = nn.ModuleList(Residual(sizes[k], sizes[k + 1], 2) for k in range(depth))
        self.up = nn.ModuleList(Up(sizes[k + 1], sizes[k]) for k in reversed(range(depth)))
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        skips = []
        for stage in self.down:
            skips.append(x)
            x = stage(x)
        for stage, skip in zip(self.up, reversed(skips), strict=True):
            # An odd side is halved upwards, so what comes back may be one row or column too large.
            x = stage(x)[..., : skip.shape[-2], : skip.shape[-1]] + skip
        return self.last(x)
