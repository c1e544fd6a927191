"""Small members of well-known families of networks, for reading architectures off a graph; weights are random.

`variants()` lists them: a family, a name, what builds it for a number of classes, and the shape of one input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from cupel.core.context import global_seed
from cupel.nets.ds_cnn import DsCnn
from cupel.nets.kws import Gru, Lstm, Recurrent
from cupel.nets.mlp import Mlp
from cupel.nets.mobilenet import Block, MobileNet
from cupel.nets.resnet import ResNet
from cupel.nets.separable import SeparableNet
from cupel.nets.series import SeriesNet
from cupel.nets.squeezenet import SqueezeNet, fires
from cupel.nets.vit import ViT
from cupel.ops.graph_reader import read_graph


@dataclass(frozen=True)
class Variant:
    """One network of a family; `build` takes the number of classes."""

    family: str
    name: str
    build: Callable[[int], nn.Module]
    shape: tuple[int, ...]


def _conv(fan_in: int, fan_out: int, kernel: int = 3, stride: int = 1, norm: bool = True) -> nn.Sequential:
    made = [nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=not norm)]
    return nn.Sequential(*made, *([nn.BatchNorm2d(fan_out)] if norm else []), nn.ReLU())


def vgg(channels: int, classes: int, width: int, depth: int, norm: bool) -> nn.Sequential:
    """Plain 3x3 convolutions, `depth` between two poolings, and two hidden layers (Simonyan and Zisserman 2015)."""
    parts: list[nn.Module] = []
    last = channels
    for stage in range(3):
        for _ in range(depth):
            parts.append(_conv(last, width * 2**stage, norm=norm))
            last = width * 2**stage
        parts.append(nn.MaxPool2d(2))
    hidden = [nn.Linear(16 * last // 4, 4 * width), nn.ReLU(), nn.Dropout(), nn.Linear(4 * width, 4 * width), nn.ReLU()]
    parts += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), *hidden, nn.Dropout()]
    return nn.Sequential(*parts, nn.Linear(4 * width, classes))


class Dense(nn.Module):
    """Every layer reads all before it in its stage (Huang et al. 2017)."""

    def __init__(self, channels: int, classes: int, growth: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 2 * growth, 3, 1, 1, bias=False)
        self.stages, self.between, width = nn.ModuleList(), nn.ModuleList(), 2 * growth
        for k, count in enumerate(layers):
            stage = nn.ModuleList()
            for _ in range(count):
                layer = nn.Conv2d(width, growth, 3, 1, 1, bias=False)
                stage.append(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), layer))
                width += growth
            self.stages.append(stage)
            if k + 1 < len(layers):
                half = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1), nn.AvgPool2d(2))
                self.between.append(half)
                width //= 2
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        x = self.stem(x)
        for k, stage in enumerate(self.stages):
            for layer in stage:  # type: ignore[attr-defined]
                x = torch.cat([x, layer(x)], 1)
            x = self.between[k](x) if k < len(self.between) else x
        out: Tensor = self.head(torch.relu(self.norm(x)).mean((2, 3)))
        return out


class Mixer(nn.Module):
    """Two-layer networks over patches and over channels in turn (Tolstikhin et al. 2021)."""

    def __init__(self, channels: int, side: int, classes: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        count = (side // patch) ** 2
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.tokens = nn.ModuleList(_mlp(count, width // 2) for _ in range(depth))
        self.channels = nn.ModuleList(_mlp(width, 4 * width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        x = self.patches(x).flatten(2).transpose(1, 2)  # [B, T, D]
        for k, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * k](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * k + 1](x))
        out: Tensor = self.head(self.norms[-1](x).mean(1))
        return out


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Inception(nn.Module):
    """Branches of 1x1, 3x3 and 5x5 convolutions and of pooling, joined (Szegedy et al. 2015)."""

    def __init__(self, channels: int, classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.stem, self.blocks, last = _conv(channels, 2 * width), nn.ModuleList(), 2 * width
        for _ in range(depth):
            branches = [
                _conv(last, width, 1),
                nn.Sequential(_conv(last, width, 1), _conv(width, width, 3)),
                nn.Sequential(_conv(last, width // 2, 1), _conv(width // 2, width // 2, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(last, width // 2, 1)),
            ]
            self.blocks.append(nn.ModuleList(branches))
            last = 3 * width
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        x = self.stem(x)
        for k, branches in enumerate(self.blocks):
            x = torch.cat([branch(x) for branch in branches], 1)  # type: ignore[attr-defined]
            x = self.pool(x) if k % 2 else x
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Bottlenecks(nn.Module):
    """Residual blocks of 1x1, 3x3 and 1x1 convolutions (He et al. 2016)."""

    def __init__(self, channels: int, classes: int, width: int, layers: Sequence[int], groups: int = 1) -> None:
        super().__init__()
        self.stem, self.bodies, self.ways, last = _conv(channels, width), nn.ModuleList(), nn.ModuleList(), width
        for stage, count in enumerate(layers):
            for k in range(count):
                inner, stride = width * 2**stage, 2 if stage and not k else 1
                body = nn.Sequential(
                    _conv(last, inner, 1), nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False),
                    nn.BatchNorm2d(inner), nn.ReLU(),
                    nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner),
                )  # fmt: skip
                fits = last == 4 * inner and stride == 1
                way = nn.Sequential(nn.Conv2d(last, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner))
                self.bodies.append(body)
                self.ways.append(nn.Identity() if fits else way)
                last = 4 * inner
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        x = self.stem(x)
        for body, way in zip(self.bodies, self.ways, strict=True):
            x = torch.relu(body(x) + way(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


Shape = tuple[int, ...]
_MONO, _COLOUR, _SOUND = (1, 28, 28), (3, 32, 32), (1, 49, 10)


def _mlps(classes: int, shape: Shape, hidden: Shape) -> nn.Module:
    return Mlp(shape[0] * shape[1] * shape[2], hidden, classes)


def _inverted(classes: int, shape: Shape, width: int, count: int, expansion: int) -> nn.Module:
    blocks = [Block(width * (1 + k // 2), 1 if not k else expansion, 3, 1 + k % 2) for k in range(count)]
    return MobileNet(shape[0], classes, blocks, stem=width, last=8 * width, stride=1)


def _fire(classes: int, shape: Shape, base: int, count: int, bypass: str) -> nn.Module:
    return SqueezeNet(shape[0], classes, (2 * base, 3, 1), fires(count, 2 * base, base, 2, 0.25), (2,), bypass)


def _recurrent(classes: int, shape: Shape, kind: str, cells: int, layers: int) -> nn.Module:
    made = Lstm if kind == "lstm" else Gru
    return Recurrent([made(shape[2] if not k else cells, cells) for k in range(layers)], classes)


def _residual(classes: int, shape: Shape, kind: str, width: int, count: int) -> nn.Module:
    if kind == "basic":
        return ResNet(shape[0], classes, width, count)
    return Bottlenecks(shape[0], classes, width, (count, count, 1), 4 if kind == "grouped" else 1)


def _vgg(classes: int, shape: Shape, width: int, depth: int, norm: bool) -> nn.Module:
    return vgg(shape[0], classes, width, depth, norm)


def _dense(classes: int, shape: Shape, growth: int, layers: Shape) -> nn.Module:
    return Dense(shape[0], classes, growth, layers)


def _mixer(classes: int, shape: Shape, patch: int, width: int, depth: int) -> nn.Module:
    return Mixer(shape[0], shape[1], classes, patch, width, depth)


def _vit(classes: int, shape: Shape, patch: int, width: int, depth: int) -> nn.Module:
    return ViT(shape[0], shape[1], classes, patch, width, depth, 4)


def _inception(classes: int, shape: Shape, width: int, depth: int) -> nn.Module:
    return Inception(shape[0], classes, width, depth)


def _separable(classes: int, shape: Shape, width: int, depth: int) -> nn.Module:
    return SeparableNet(shape[0], classes, width, depth)


def _ds_cnn(classes: int, shape: Shape, size: str, width: int) -> nn.Module:
    return DsCnn(classes, size, width)


def _series(classes: int, shape: Shape, width: int) -> nn.Module:
    return SeriesNet(shape[0], classes, width)


_IMAGES = (_COLOUR, _MONO)
_Grid = tuple[Callable[..., nn.Module], tuple[Shape, ...], tuple[tuple[object, ...], ...]]
_GRIDS: dict[str, _Grid] = {
    "mlp": (_mlps, _IMAGES, (((64,), (256,), (64, 64), (300, 100), (128, 128, 128), (32, 32, 32, 32)),)),
    "vgg": (_vgg, _IMAGES, ((16, 32), (1, 2, 3), (False, True))),
    "resnet": (_residual, _IMAGES, (("basic", "bottleneck", "grouped"), (16, 32), (1, 2, 3))),
    "densenet": (_dense, _IMAGES, ((8, 12, 16), ((2, 2, 2), (3, 3, 3), (4, 4), (6, 6)))),
    "mobilenet": (_inverted, _IMAGES, ((8, 16, 24), (3, 5), (3, 6))),
    "separable": (_separable, _IMAGES, ((12, 24, 32), (2, 3, 4, 5))),
    "squeezenet": (_fire, _IMAGES, ((16, 32, 48), (4, 6), ("none", "simple"))),
    "inception": (_inception, _IMAGES, ((8, 16, 24), (2, 3, 4, 5))),
    "vit": (_vit, _IMAGES, ((4,), (32, 48, 64), (2, 3, 4, 6))),
    "mixer": (_mixer, _IMAGES, ((4,), (32, 48, 64), (2, 3, 4, 6))),
    "ds-cnn": (_ds_cnn, (_SOUND,), (("S", "M", "L"), (32, 64, 96, 128))),
    "lstm": (_recurrent, (_SOUND,), (("lstm",), (32, 64, 128, 192), (1, 2, 3))),
    "gru": (_recurrent, (_SOUND,), (("gru",), (32, 64, 128, 192), (1, 2, 3))),
    "fcn": (_series, ((1, 96), (3, 128), (6, 64)), ((8, 16, 24, 32),)),
}
FAMILIES = tuple(_GRIDS)
MOST = 12  # variants of one family


def variants() -> list[Variant]:
    """All networks of the corpus, at most `MOST` a family, input shapes and settings spread over their grids.

    >>> len({v.name for v in variants()}) == len(variants()), len(FAMILIES)
    (True, 14)
    """
    found = []
    for family, (make, shapes, axes) in _GRIDS.items():
        rows = list(product(shapes, *axes))
        for k in range(min(MOST, len(rows))):
            row = rows[k * len(rows) // min(MOST, len(rows))]
            shape, values = shapes[shapes.index(row[0])], row[1:]
            label = "-".join(_text(v) for v in (*values, shape))
            found.append(
                Variant(family, f"{family}-{label}", partial(make, shape=shape, **_named(make, values)), shape)
            )
    return found


def _text(value: object) -> str:
    return "x".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def _named(make: Callable[..., nn.Module], values: Sequence[object]) -> dict[str, object]:
    names = make.__code__.co_varnames[2 : 2 + len(values)]
    return dict(zip(names, values, strict=True))


def corpus(classes: Sequence[int] = (10,)) -> list[tuple[Variant, int, dict[str, int], int]]:
    """Every variant for every number of classes: it, the classes, its graph's tokens, its number of parameters."""
    found = []
    for variant in variants():
        for count in classes:
            with global_seed(0):
                model = variant.build(count).eval()
            tokens = dict(sorted(read_graph(model, torch.zeros(2, *variant.shape)).tokens().items()))
            found.append((variant, count, tokens, sum(p.numel() for p in model.parameters())))
    return found


def main() -> None:
    """Write the table of tokens that probe `dara` learns families from: python -m cupel.nets.families."""
    rows = corpus((10, 37))
    words = sorted({word for _, _, tokens, _ in rows for word in tokens})
    number = {word: k for k, word in enumerate(words)}
    networks = [[v.family, v.name, size, [[number[w], n] for w, n in t.items()]] for v, _, t, size in rows]
    table = {"families": list(FAMILIES), "words": words, "networks": networks}
    path = Path(__file__).parents[1] / "ops" / "architectures.json"
    path.write_text(json.dumps(table, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
