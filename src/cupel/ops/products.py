"""The matrix product behind a call of the dispatcher: what an accelerator, or a count of data reuse, has to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Product:
    """`groups` independent products of a weight matrix `[rows, depth]` with `[depth, cols]` values.

    A convolution counts as the product of its flattened kernel with its unfolded input, padded borders included.

    Args:
        rows: output features of a group.
        depth: length of the sums: input channels of a group times the kernel's positions.
        cols: output positions, over the whole batch.
        groups: products of this size that share nothing.
        kernel: positions of the kernel, 1 for a plain product.
        inputs, outputs: values read and written, each once, whatever the unfolding repeats.
        weights: values of the first factor; zero where both factors are activations, as in attention.
    """

    rows: int
    depth: int
    cols: int
    groups: int = 1
    kernel: int = 1
    inputs: int = 0
    outputs: int = 0
    weights: int = 0

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.groups * self.rows * self.depth * self.cols

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads one input channel."""
        return self.groups > 1 and self.depth == self.kernel


def product_of(name: str, args: Sequence[Any], out: Any, fixed: Callable[[Tensor], bool]) -> Product | None:
    """The product that one call computes, or `None` if it multiplies no matrices.

    Args:
        name: of the call without its overload, such as `aten.addmm`.
        args: it was called with.
        out: it returned.
        fixed: whether a tensor is one of the network's own weights.
    """
    short = name.removeprefix("aten.")
    if short == "convolution":
        return _convolution(args, out)
    if name.startswith("quantized.") and len(args) > 1 and hasattr(args[1], "unpack"):
        weight = args[1].unpack()[0]
        return _kernel(args[0], weight, out, args[0].shape[1] // weight.shape[1] if weight.ndim > 2 else 1)
    if short in ("addmm", "mm", "addmv", "mv"):
        left, right = args[1:3] if short.startswith("add") else args[:2]
        # A layer's bias is its own, and so then is the matrix beside it, also where views of it cannot be recognised.
        layer = short == "addmm" and fixed(args[0]) and not fixed(left)
        return _plain(left, right if right.ndim > 1 else right[:, None], out, fixed, layer)
    if short in ("bmm", "baddbmm"):
        left, right = args[1:3] if short == "baddbmm" else args[:2]
        batch, rows, depth = left.shape
        return Product(rows, depth, right.shape[-1], batch, 1, left.numel() + right.numel(), out.numel())
    if short == "mkldnn_rnn_layer":
        into, again = args[1:3]  # [gates, features], [gates, hidden]: one product on both, step after step
        cols = prod(args[0].shape[:-1])
        weights = into.numel() + again.numel()
        return Product(
            into.shape[0], into.shape[1] + again.shape[1], cols, 1, 1, args[0].numel(), out[0].numel(), weights
        )
    if "_scaled_dot_product" in short:
        return _attention(args)
    return None


def _convolution(args: Sequence[Any], out: Tensor) -> Product:
    x, weight, transposed, groups = args[0], args[1], args[6], args[8]
    if not transposed:
        return _kernel(x, weight, out, groups)
    kernel = prod(weight.shape[2:])  # every input value meets the kernel once: the same products, scattered
    rows, depth, cols = weight.shape[1] * kernel, weight.shape[0] // groups, x.shape[0] * prod(x.shape[2:])
    return Product(rows, depth, cols, groups, kernel, x.numel(), out.numel(), weight.numel())


def _kernel(x: Tensor, weight: Tensor, out: Tensor, groups: int) -> Product:
    cols = out.numel() // weight.shape[0]
    size = weight.numel() // weight.shape[0]
    return Product(
        weight.shape[0] // groups, size, cols, groups, prod(weight.shape[2:]), x.numel(), out.numel(), weight.numel()
    )


def _plain(left: Tensor, right: Tensor, out: Tensor, fixed: Callable[[Tensor], bool], layer: bool) -> Product:
    first, second = fixed(left), layer or fixed(right)
    depth, weights = left.shape[-1], (left.numel() if first else right.numel() if second else 0)
    read = left.numel() + right.numel() - weights
    rows, cols = (left.shape[0], right.shape[-1]) if first else (right.shape[-1], left.shape[0])
    return Product(rows, depth, cols, 1, 1, read, out.numel(), weights)


def _attention(args: Sequence[Any]) -> Product:
    query, key, value = (tuple(t.shape) for t in args[:3])  # [..., L, D]
    read = sum(prod(s) for s in (query, key, value))
    depth = query[-1] + value[-1]  # two products of one size, for heads whose values are as wide as their queries
    return Product(key[-2], depth, query[-2], prod(query[:-2]), 1, read, prod(query[:-1]) * value[-1])
