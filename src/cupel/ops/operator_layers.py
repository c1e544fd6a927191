"""Layers of `torch.nn`, described for a solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from torch import nn

from cupel.ops.operator_specs import Operator, Picks, Shape, Size, product, quotient

_WINDOW = {"kernel": (1, 5), "stride": (1, 3), "padding": (0, 2)}


def _rank(*allowed: int) -> Callable[[Random, Sequence[int], Sequence[int]], Picks | None]:
    return lambda draw, ranks, leads: {} if ranks[0] in allowed else None


def _slid(size: Size, a: Picks, dilation: Size = 1) -> Size:
    """Positions of a window along an axis."""
    return quotient(size + 2 * a["padding"] - dilation * (a["kernel"] - 1) - 1, a["stride"]) + 1


def _fits(sizes: Shape, a: Picks, dilation: Size = 1) -> list[Any]:
    return [size + 2 * a["padding"] >= dilation * (a["kernel"] - 1) + 1 for size in sizes]


def _conv(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    batch, channels, *sizes = shapes[0]
    groups = a["groups"]
    shared = [channels == groups * a["per_group"], a["out"] == groups * a["out_per_group"]]
    out = [_slid(s, a, a["dilation"]) for s in sizes]
    return [*shared, *_fits(sizes, a, a["dilation"])], [batch, a["out"], *out]


def _pool(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    lead, sizes = list(shapes[0][:2]), shapes[0][2:]
    return [*_fits(sizes, a), 2 * a["padding"] <= a["kernel"]], lead + [_slid(s, a) for s in sizes]


def _transposed(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    batch, _, *sizes = shapes[0]
    return [], [batch, a["out"], *((s - 1) * a["stride"] - 2 * a["padding"] + a["kernel"] for s in sizes)]


def _linear(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    return [], [*shapes[0][:-1], a["out"]]


def _same(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    return [], list(shapes[0])


def _biased(layer: nn.Module, key: int) -> nn.Module:
    """With every buffer and parameter away from its usual start, so that nothing that is dropped goes unseen."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.endswith("bias") or p.ndim == 1:
                p.copy_(0.5 + torch.rand_like(p) * (1 if key % 2 else -1))
        for name, b in layer.named_buffers():
            if b.is_floating_point():
                # Variances over five decades: where they are small, what is added to them counts.
                b.copy_(10 ** (-5 * torch.rand_like(b)) if name.endswith("var") else torch.rand_like(b) - 0.5)
    return layer


def _make_conv(kind: Any) -> Callable[[list[Sequence[int]], Picks], nn.Module]:
    def make(shapes: list[Sequence[int]], a: Picks) -> nn.Module:
        sizes = (a["kernel"], a["stride"], a["padding"], a["dilation"], a["groups"])
        return _biased(kind(shapes[0][1], a["out"], *sizes, bias=bool(a["biased"])), a["out"])

    return make


def _window(kind: Any) -> Callable[[list[Sequence[int]], Picks], nn.Module]:
    return lambda shapes, a: kind(a["kernel"], a["stride"], a["padding"])


def _norm(kind: Any) -> Callable[[list[Sequence[int]], Picks], nn.Module]:
    return lambda shapes, a: _biased(kind(shapes[0][1]), 1)


def _entrywise(name: str, make: Callable[[], nn.Module]) -> Operator:
    return Operator(name, ("ff",), _same, layer=lambda shapes, a: make())


def _upsampled(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    return [], [*shapes[0][:2], *(s * a["scale"] for s in shapes[0][2:])]


def _grouped(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    shape = list(shapes[0])
    # Torch refuses to normalise one single value.
    return [shape[1] == a["groups"] * a["per_group"], product([shape[0], a["per_group"], *shape[2:]]) >= 2], shape


def _shuffled(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    batch, channels, high, wide = shapes[0]
    times = a["times"]
    return [channels == a["left"] * times * times], [batch, a["left"], high * times, wide * times]


def layers() -> tuple[Operator, ...]:
    """Layers with weights, pooling, norms, and activations as modules."""
    conv = _WINDOW | {"dilation": (1, 2), "groups": (1, 8), "per_group": (1, 16), "out": (1, 16),
                      "out_per_group": (1, 16), "biased": (0, 1)}  # fmt: skip
    out = {"out": (1, 16), "biased": (0, 1)}
    turned = {"kernel": (1, 4), "stride": (1, 3), "padding": (0, 1)} | out
    return (
        Operator("conv1d", ("ff",), _conv, layer=_make_conv(nn.Conv1d), attributes=conv, pick=_rank(3)),
        Operator("conv2d", ("ff",), _conv, layer=_make_conv(nn.Conv2d), attributes=conv, pick=_rank(4)),
        Operator("conv_transpose2d", ("ff",), _transposed, attributes=turned, pick=_rank(4),
                 layer=lambda s, a: _biased(nn.ConvTranspose2d(s[0][1], a["out"], a["kernel"], a["stride"],
                                                               a["padding"], bias=bool(a["biased"])), a["out"])),
        Operator("linear", ("ff",), _linear, attributes=out, pick=_rank(2, 3),
                 layer=lambda s, a: _biased(nn.Linear(s[0][-1], a["out"], bias=bool(a["biased"])), a["out"])),
        Operator("batch_norm1d", ("ff",), _same, layer=_norm(nn.BatchNorm1d), pick=_rank(2, 3)),
        Operator("batch_norm2d", ("ff",), _same, layer=_norm(nn.BatchNorm2d), pick=_rank(4)),
        Operator("layer_norm", ("ff",), _same, layer=lambda s, a: _biased(nn.LayerNorm(s[0][-1]), 0),
                 pick=_rank(2, 3, 4)),
        Operator("group_norm", ("ff",), _grouped, attributes={"groups": (1, 8), "per_group": (1, 16)}, pick=_rank(3, 4),
                 layer=lambda s, a: _biased(nn.GroupNorm(a["groups"], s[0][1]), 0)),
        Operator("max_pool2d", ("ff",), _pool, layer=_window(nn.MaxPool2d), attributes=_WINDOW, pick=_rank(4)),
        Operator("avg_pool2d", ("ff",), _pool, layer=_window(nn.AvgPool2d), attributes=_WINDOW, pick=_rank(4)),
        Operator("adaptive_pool2d", ("ff",), lambda s, a: ([], [*s[0][:2], a["high"], a["wide"]]),
                 layer=lambda s, a: nn.AdaptiveAvgPool2d((a["high"], a["wide"])),
                 attributes={"high": (1, 4), "wide": (1, 4)}, pick=_rank(4)),
        Operator("upsample", ("ff",), _upsampled, layer=lambda s, a: nn.Upsample(scale_factor=a["scale"]),
                 attributes={"scale": (1, 3)}, pick=_rank(3, 4)),
        Operator("pixel_shuffle", ("ff",), _shuffled, layer=lambda s, a: nn.PixelShuffle(a["times"]),
                 attributes={"times": (1, 3), "left": (1, 8)}, pick=_rank(4)),
        _entrywise("relu_layer", nn.ReLU),
        _entrywise("relu6_layer", nn.ReLU6),
        _entrywise("gelu_layer", nn.GELU),
        _entrywise("silu_layer", nn.SiLU),
        _entrywise("dropout", nn.Dropout),
        _entrywise("identity", nn.Identity),
    )  # fmt: skip
