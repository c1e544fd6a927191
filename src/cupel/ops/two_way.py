"""Layers that compute forward with a weight under one mask, and backward with the same weight under another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Window = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # stride, padding, dilation, groups


class _TwoWay(torch.autograd.Function):
    """y = x (W o ff)^T + b; dx = dy (W o bp); dW = dy^T x, dense, as if W had not been masked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, ff: Tensor, bp: Tensor, bias: Tensor | None, window: Window | None
    ) -> Tensor:
        if window is None:
            return F.linear(x, weight * ff, bias)
        stride, padding, dilation, groups = window
        none = [0] * len(stride)
        found: Tensor = torch.ops.aten.convolution(x, weight * ff, bias, stride, padding, dilation, False, none, groups)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, bp, bias, window = inputs
        ctx.save_for_backward(x, weight, bp)
        ctx.window, ctx.biased = window, bias is not None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight, bp) = grads, ctx.saved_tensors
        x_too, w_too = ctx.needs_input_grad[:2]
        if ctx.window is None:
            rows = dy.reshape(-1, dy.shape[-1])  # [B, out]
            dx = dy @ (weight * bp) if x_too else None
            dw = rows.T @ x.reshape(-1, x.shape[-1]) if w_too else None
            return dx, dw, None, None, rows.sum(0) if ctx.biased else None, None

        def sides(w: Tensor, wanted: list[bool]) -> Any:
            stride, padding, dilation, groups = ctx.window
            size, none = [len(w)], [0] * len(stride)
            return torch.ops.aten.convolution_backward(
                dy, x, w, size, stride, padding, dilation, False, none, groups, wanted
            )

        dx = sides(weight * bp, [True, False, False])[0] if x_too else None
        _, dw, db = sides(weight, [False, w_too, ctx.biased]) if w_too or ctx.biased else (None, None, None)
        return dx, dw, None, None, db, None


def two_way(
    x: Tensor, weight: Tensor, ff: Tensor, bp: Tensor, bias: Tensor | None = None, window: Window | None = None
) -> Tensor:
    """A layer that computes with `weight` under mask `ff` and sends gradients to `x` through `weight` under `bp`.

    The gradient of the weight is the dense one. `window` is None for a linear layer, and stride, padding, dilation and
    groups of a convolution. Under autocast all of it runs in autocast's type, as the plain layer does.

    Shapes: linear: x `[..., in]`, weight and masks `[out, in]`; convolution: x `[B, in, ...]`, weight
    `[out, in / groups, ...]`.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(low), weight.to(low), None if bias is None else bias.to(low)
    found: Tensor = _TwoWay.apply(x, weight, ff, bp, bias, window)  # type: ignore[no-untyped-call]
    return found


def run_two_way(layer: Any, x: Tensor, ff: Tensor, bp: Tensor) -> Tensor:
    """What a linear or convolution layer computes on `x`, with its weight under two masks (see `two_way`)."""
    if isinstance(layer, nn.Linear):
        return two_way(x, layer.weight, ff, bp, layer.bias)
    alone = x.ndim < layer.weight.ndim
    x = x.unsqueeze(0) if alone else x
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode), (0,) * len(layer.stride)
    y = two_way(x, layer.weight, ff, bp, layer.bias, (layer.stride, padding, layer.dilation, layer.groups))
    return y.squeeze(0) if alone else y
