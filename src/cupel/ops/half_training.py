"""Forward and backward of any network in emulated 16-bit floating point, through matrix products in SIMD order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cupel.ops.half import FP32, Form, on_grid, quick_product, rounded, simd_product
from cupel.ops.lowered import Conv, conv_forward, conv_input_grad, conv_weight_grad, rows

# Calls that move or choose values and compute none, so that nothing has to be rounded.
# fmt: off
_MOVES = {
    "__get__", "__set__", "__getitem__", "view", "reshape", "flatten", "unflatten", "transpose", "permute",
    "squeeze", "unsqueeze", "expand", "contiguous", "detach", "clone", "pad", "zero_pad2d", "narrow",
    "chunk", "split", "select", "float", "double", "to", "requires_grad_", "relu", "max_pool2d",
}
# fmt: on


@dataclass
class Numerics:
    """How products are computed, and what was lost on the way.

    Args:
        form: of operands, activations and gradients.
        wide: sums in float32; otherwise in `form`.
        ordered: wide sums in the order of the SIMD instructions too, not in torch's own.
        underflowed: gradients of weights and activations that are not zero and became zero.
        gradients: all gradients of weights and activations.
        saved_bytes: of values that the forward kept for the backward, each once.
    """

    form: Form
    wide: bool = True
    ordered: bool = False
    underflowed: int = 0
    gradients: int = 0
    saved_bytes: int = 0

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a b as the cores compute it; a and b are values of `form`."""
        if self.wide and not self.ordered:
            return quick_product(a, b, self.form)
        return simd_product(a, b, self.form, self.wide)

    def counted(self, a: Tensor, b: Tensor) -> Tensor:
        """The same for gradients, with the count of those that exact sums would keep and `form` does not."""
        found = self.multiply(a, b)
        self.count(a.double() @ b.double(), found)
        return found

    def count(self, exact: Tensor, kept: Tensor) -> None:
        self.underflowed += int(((exact != 0) & (kept == 0)).sum())
        self.gradients += kept.numel()


class _Rounded(torch.autograd.Function):
    """Rounds to the format on the way forward, and the gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Numerics) -> Tensor:
        ctx.how = how
        return on_grid(x, how.form)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        kept = on_grid(grads[0], ctx.how.form)
        ctx.how.count(grads[0], kept)
        return kept, None


def _ones(flat: Tensor) -> Tensor:
    return flat.new_ones(*flat.shape[:-2], flat.shape[-1], 1)


class _HalfConv(torch.autograd.Function):
    """A convolution as three matrix products; the gradient of the bias is a product with ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, how: Numerics) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.conv, ctx.how = conv, how
        out = conv_forward(x, weight, conv, how.multiply)
        return out if bias is None else on_grid(out + bias[:, None, None], how.form)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        conv, how, grad = ctx.conv, ctx.how, on_grid(grads[0], ctx.how.form)
        to_input = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_input = conv_input_grad(grad, weight, (x.shape[2], x.shape[3]), conv, how.counted)
        if ctx.needs_input_grad[1]:
            to_weight = conv_weight_grad(x, grad, (weight.shape[2], weight.shape[3]), conv, how.counted)
        if ctx.needs_input_grad[2]:
            flat = rows(grad, 1)
            to_bias = how.counted(flat, _ones(flat)).flatten()
        return to_input, to_weight, to_bias, None, None


class _HalfLinear(torch.autograd.Function):
    """Y = X W^T + b, dW = dY^T X, dX = dY W, db = dY^T 1. Shapes: x `[B, in]`, weight `[out, in]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: Numerics) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how
        out = how.multiply(weight, x.T).T
        return out if bias is None else on_grid(out + bias, how.form)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight), how = ctx.saved_tensors, ctx.how
        flat = on_grid(grads[0], how.form).T
        to_input = how.counted(weight.T, flat).T if ctx.needs_input_grad[0] else None
        to_weight = how.counted(flat, x) if ctx.needs_input_grad[1] else None
        to_bias = how.counted(flat, _ones(flat)).flatten() if ctx.needs_input_grad[2] else None
        return to_input, to_weight, to_bias, None


def _pair(value: Any) -> tuple[int, int]:
    first, last = (value, value) if isinstance(value, int) else (value[0], value[-1])
    return first, last


class _Emulation(TorchFunctionMode):
    """Calls of torch's functions inside compute in the format; what only moves values is left alone."""

    def __init__(self, how: Numerics) -> None:
        super().__init__()
        self.how = how

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, torch.conv2d):
            return self._conv(*args, **(kwargs or {}))
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        moved = getattr(func, "__name__", "") in _MOVES
        if moved or not isinstance(out, Tensor) or out.dtype != torch.float32:
            return out
        return _Rounded.apply(out, self.how)  # type: ignore[no-untyped-call]

    def _conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Any:  # fmt: skip
        if _pair(dilation) != (1, 1) or isinstance(padding, str):
            raise ValueError(
                f"a convolution must have dilation 1 and padding in numbers; got {dilation}, {padding!r}. Replace it."
            )
        conv = Conv(_pair(stride), _pair(padding), groups)
        return _HalfConv.apply(x, weight, bias, conv, self.how)  # type: ignore[no-untyped-call]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        out = _HalfLinear.apply(x.flatten(0, -2), weight, bias, self.how)  # type: ignore[no-untyped-call]
        return out.unflatten(0, x.shape[:-1])


@contextmanager
def emulated(how: Numerics) -> Iterator[None]:
    """Inside, forwards compute in `how.form`, and so do the backwards of what was computed inside.

    Convolutions and linear layers are matrix products with the given sums; every other result is rounded once, and
    so is its gradient. What the backward needs is kept in the bytes of the format. In `fp32` nothing changes but
    that bytes are counted.
    """
    seen: dict[tuple[int, int], Tensor] = {}  # held, so that an address names one tensor

    def keep(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or isinstance(x, torch.nn.Parameter):
            return x
        if (x.data_ptr(), x.numel()) not in seen:
            seen[x.data_ptr(), x.numel()] = x
            how.saved_bytes += x.numel() * how.form.bytes
        return x if how.form == FP32 else x.to(how.form.dtype)

    def back(x: Tensor) -> Tensor:
        return x.float() if x.dtype == how.form.dtype else x

    with torch.autograd.graph.saved_tensors_hooks(keep, back):
        if how.form == FP32:
            yield
        else:
            with _Emulation(how):
                yield


def updated(weight: Tensor, grad: Tensor, rate: float, form: Form) -> Tensor:
    """w - rate g with one rounding to `form`, a fused multiply-add; the rate stays in float32."""
    if form == FP32:
        return weight.add(grad, alpha=-rate)
    factor = float(torch.tensor(rate, dtype=torch.float32))
    return rounded(weight.double() - factor * grad.double(), form).float()
