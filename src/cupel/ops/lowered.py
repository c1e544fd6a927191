"""Convolutions and linear layers as matrix products: forward, gradient of the weights, gradient of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.ops.products import Product

Multiply = Callable[[Tensor, Tensor], Tensor]  # [G, M, K], [G, K, N] -> [G, M, N]


@dataclass(frozen=True)
class Conv:
    """Geometry of a 2-d convolution without dilation; `stride` and `padding` by axis."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1


def columns(x: Tensor, kernel: tuple[int, int], conv: Conv) -> Tensor:
    """The unfolded input: every kernel position's values, `[B, C, H, W]` -> `[G, C/G * kh * kw, B * Ho * Wo]`."""
    unfolded = F.unfold(x, kernel, padding=conv.padding, stride=conv.stride)  # [B, C * kh * kw, Ho * Wo]
    batch, size, places = unfolded.shape
    return unfolded.view(batch, conv.groups, size // conv.groups, places).permute(1, 2, 0, 3).flatten(2)


def rows(y: Tensor, groups: int) -> Tensor:
    """`[B, C, H, W]` -> `[G, C/G, B * H * W]`."""
    return y.permute(1, 0, 2, 3).reshape(groups, y.shape[1] // groups, -1)


def images(flat: Tensor, batch: int, height: int, width: int) -> Tensor:
    """The inverse of `rows`."""
    return flat.reshape(-1, batch, height, width).permute(1, 0, 2, 3)


def conv_shape(size: Sequence[int], kernel: Sequence[int], conv: Conv) -> tuple[int, int, int]:
    """Height and width of what leaves a convolution, and their product."""
    high, wide = ((size[i] + 2 * conv.padding[i] - kernel[i]) // conv.stride[i] + 1 for i in (0, 1))
    return high, wide, high * wide


def conv_forward(x: Tensor, weight: Tensor, conv: Conv, multiply: Multiply = torch.matmul) -> Tensor:
    """Y = W im2col(X). Shapes: x `[B, Cin, H, W]`, weight `[Cout, Cin/G, kh, kw]` -> `[B, Cout, Ho, Wo]`."""
    kernel = (weight.shape[2], weight.shape[3])
    high, wide = ((x.shape[2 + i] + 2 * conv.padding[i] - kernel[i]) // conv.stride[i] + 1 for i in (0, 1))
    flat = weight.reshape(conv.groups, weight.shape[0] // conv.groups, -1)
    return images(multiply(flat, columns(x, kernel, conv)), len(x), high, wide)


def conv_weight_grad(
    x: Tensor, grad: Tensor, kernel: tuple[int, int], conv: Conv, multiply: Multiply = torch.matmul
) -> Tensor:
    """dW = dY im2col(X)^T. Shapes: x `[B, Cin, H, W]`, grad `[B, Cout, Ho, Wo]` -> `[Cout, Cin/G, kh, kw]`."""
    found = multiply(rows(grad, conv.groups), columns(x, kernel, conv).transpose(1, 2))
    return found.reshape(grad.shape[1], x.shape[1] // conv.groups, *kernel)


def conv_input_grad(
    grad: Tensor, weight: Tensor, size: tuple[int, int], conv: Conv, multiply: Multiply = torch.matmul
) -> Tensor:
    """dX = W' im2col(dY, full padding), W' the kernels turned by 180 degrees with inputs and outputs exchanged.

    With a stride, dY has zeros between its rows and columns. Shapes: grad `[B, Cout, Ho, Wo]`, weight
    `[Cout, Cin/G, kh, kw]`, size `(H, W)` -> `[B, Cin, H, W]`.
    """
    groups, kernel = conv.groups, (weight.shape[2], weight.shape[3])
    outs, ins = weight.shape[0] // groups, weight.shape[1]
    wide = [(n - 1) * s + 1 for n, s in zip(grad.shape[2:], conv.stride, strict=True)]
    spread = grad.new_zeros(*grad.shape[:2], *wide)
    spread[:, :, :: conv.stride[0], :: conv.stride[1]] = grad
    before = [k - 1 - p for k, p in zip(kernel, conv.padding, strict=True)]
    after = [n - w + k - 1 - b for n, w, k, b in zip(size, wide, kernel, before, strict=True)]
    padded = F.pad(spread, (before[1], after[1], before[0], after[0]))  # a negative margin crops
    turned = weight.flip(2, 3).reshape(groups, outs, ins, *kernel).transpose(1, 2)  # [G, Cin/G, Cout/G, kh, kw]
    found = multiply(turned.reshape(groups, ins, -1), columns(padded, kernel, Conv(groups=groups)))
    return images(found, len(grad), *size)


@dataclass(frozen=True)
class Step:
    """One matrix product of a training step: `kind` FW, WG (of the weights) or IG (of the inputs)."""

    name: str
    kind: str
    product: Product


def backward_of(product: Product) -> tuple[Product, Product]:
    """The products of the two gradients of a layer with weights: of the weights, and of the inputs.

    >>> weights, inputs = backward_of(Product(rows=8, depth=27, cols=16, kernel=9, inputs=48, outputs=128, weights=216))
    >>> (weights.rows, weights.depth, weights.cols), (inputs.rows, inputs.depth, inputs.cols)
    ((8, 16, 27), (3, 72, 16))
    """
    p = product
    channels = p.depth // p.kernel  # inputs of a group
    to_weights = Product(p.rows, p.cols, p.depth, p.groups, 1, p.inputs + p.outputs, p.weights)
    places = p.inputs // (channels * p.groups)
    to_inputs = Product(channels, p.rows * p.kernel, places, p.groups, p.kernel, p.outputs, p.inputs, p.weights)
    return to_weights, to_inputs


def training_steps(products: Iterable[tuple[str, Product]], frozen: Collection[str] = ()) -> list[Step]:
    """The products of one training step in the order they run: all forward, then from the last layer back.

    A frozen layer has no gradient of its weights, and layers up to the first trained one none of their inputs.
    """
    layers = list(products)
    trained = [i for i, (name, p) in enumerate(layers) if p.weights and name not in frozen]
    first = min(trained, default=len(layers))
    steps = [Step(name, "FW", p) for name, p in layers]
    for i in range(len(layers) - 1, first - 1, -1):
        name, p = layers[i]
        to_weights, to_inputs = backward_of(p)
        steps += [Step(name, "WG", to_weights)] if i in trained else []
        steps += [Step(name, "IG", to_inputs)] if i > first else []
    return steps
