"""Layers that compute with integers alone: products in few bits, sums in 32, and codes for the next layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.ops.lowered import Conv, conv_forward, conv_shape
from cupel.ops.multipliers import dot, requantized, wrapped
from cupel.ops.products import Product


@dataclass(frozen=True)
class IntLayer:
    """A convolution or a linear layer in integers.

    Args:
        name: for the trace.
        weight: codes `[Cout, Cin/G, kh, kw]` or `[out, in]`, signed, of `bits[1]` bits.
        bias: `[Cout]`, added to the sums.
        bits: of the entering codes (unsigned, after `pool`) and of the weights.
        scale: (mult, shift) that takes sums to the codes that leave; `None` leaves the sums.
        high: largest code that leaves; the lowest is 0, which is a ReLU.
        conv: geometry; `None` for a linear layer, which flattens what enters.
        pool: sides of the squares whose codes are added before the product.
    """

    name: str
    weight: Tensor
    bias: Tensor
    bits: tuple[int, int]
    scale: tuple[int, int] | None = None
    high: int = 0
    conv: Conv | None = None
    pool: int = 1


def sums_of(layer: IntLayer, codes: Tensor, digit: int = 2) -> Tensor:
    """The 32-bit sums of `layer` on unsigned codes `[B, Cin, H, W]` or `[B, in]`, through digit products.

    Raises:
        ValueError: a code or a weight outside the bits of the layer.
    """

    def multiply(weights: Tensor, columns: Tensor) -> Tensor:
        return dot(weights, columns.long(), (layer.bits[1], layer.bits[0]), digit, (True, False))

    codes = pooled(layer, codes)
    _inside(layer.name, codes, 0, 2 ** layer.bits[0])
    _inside(f"weight of {layer.name}", layer.weight, -(2 ** (layer.bits[1] - 1)), 2 ** (layer.bits[1] - 1))
    if layer.conv is None:
        found = multiply(layer.weight, codes.flatten(1).T).T + layer.bias
    else:  # unfolding moves values and computes none: it may carry them as doubles
        found = conv_forward(codes.double(), layer.weight, layer.conv, multiply) + layer.bias[:, None, None]
    return wrapped(found)


def _inside(name: str, codes: Tensor, low: int, high: int) -> None:
    if codes.numel() and (codes.min() < low or codes.max() >= high):
        raise ValueError(
            f"codes of {name} must be in [{low}, {high}); got {codes.min()} to {codes.max()}. Clip them, or use more "
            "bits."
        )


def pooled(layer: IntLayer, codes: Tensor) -> Tensor:
    """Sums over squares of `layer.pool`."""
    if layer.pool == 1:
        return codes
    n, side = layer.pool, codes.shape[:2]
    return codes.view(*side, codes.shape[2] // n, n, codes.shape[3] // n, n).sum((3, 5))


def codes_of(layer: IntLayer, sums: Tensor) -> Tensor:
    """What leaves the layer: the sums, or their codes."""
    if layer.scale is None:
        return sums
    return requantized(sums, *layer.scale, zero=0, low=0, high=layer.high)


def plain_sums_of(layer: IntLayer, codes: Tensor) -> Tensor:
    """The same sums by torch's own convolution of doubles, which are exact below 2^53: a check on `sums_of`."""
    x, weight = pooled(layer, codes).double(), layer.weight.double()
    if layer.conv is None:
        return (F.linear(x.flatten(1), weight) + layer.bias).long()
    conv = layer.conv
    found = F.conv2d(x, weight, layer.bias.double(), conv.stride, conv.padding, 1, conv.groups)
    return found.to(torch.int64)


def product_of(layer: IntLayer, codes: Tensor) -> Product:
    """The sizes of what `layer` computes on `codes`, which are pooled already."""
    if layer.conv is None:
        rows, depth = layer.weight.shape
        return Product(rows, depth, len(codes), 1, 1, codes.numel(), rows * len(codes), layer.weight.numel())
    groups, (rows, deep, *kernel) = layer.conv.groups, layer.weight.shape
    area, places = kernel[0] * kernel[1], len(codes) * conv_shape(codes.shape[2:], kernel, layer.conv)[2]
    numbers = (codes.numel(), rows * places, layer.weight.numel())
    return Product(rows // groups, deep * area, places, groups, area, *numbers)
