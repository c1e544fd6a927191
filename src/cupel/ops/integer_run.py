"""A batch through a network whose linear and convolution layers multiply matrices of integers by a given function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.ops.quantize import symmetric_codes

Multiply = Callable[[str, Tensor, Tensor], Tensor]  # layer's name, [rows, depth], [depth, cols] -> [rows, cols]
RUNNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)


def runnable(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that `on_integers` runs: linear ones and convolutions over one or two axes, exactly of these kinds."""
    return {name: m for name, m in model.named_modules() if type(m) in RUNNABLE}


@contextmanager
def on_integers(model: nn.Module, multiply: Multiply, bits: int = 8) -> Iterator[nn.Module]:
    """Inside, every layer of `runnable` gives what `multiply` makes of its codes, in the units of the layer.

    Weight and input are rounded to signed codes of `bits` bits with one scale a tensor, the largest magnitude in it; a
    weight of zero is the code zero. Biases are added as they are. The groups of a convolution are products of their
    own. No layer is replaced, and nothing stays behind.
    """
    with ExitStack() as stack:
        for name, layer in runnable(model).items():
            stack.callback(layer.register_forward_hook(_instead(name, multiply, bits)).remove)
        yield model


def _instead(name: str, multiply: Multiply, bits: int) -> Callable[[nn.Module, Any, Any], Tensor]:
    def found(layer: Any, args: Any, out: Tensor) -> Tensor:
        (x,) = args
        a, a_step = codes(layer.weight, bits)
        b, b_step = codes(x, bits)
        if isinstance(layer, nn.Linear):
            sums = multiply(name, a, b.reshape(-1, b.shape[-1]).T).T.reshape(out.shape)
        else:
            sums = convolved(layer, a, b.to(x.dtype), out, lambda p, q: multiply(name, p, q))
        y = sums.double() * float(a_step) * float(b_step)
        if layer.bias is not None:
            y = y + layer.bias.double().view(-1, *[1] * (0 if isinstance(layer, nn.Linear) else layer.weight.ndim - 2))
        return y.to(out.dtype)

    return found


def codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Signed codes of `x`, int64, and the step between two of them."""
    limit = x.detach().abs().max() if x.numel() else x.new_zeros(())
    step = (limit / float(2 ** (bits - 1) - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    return symmetric_codes(x.detach(), limit, bits).long(), step


def convolved(layer: Any, a: Tensor, b: Tensor, out: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The integer sums of a convolution with weight codes `a` on input codes `b`, in the shape of `out`."""
    pads = layer._reversed_padding_repeated_twice  # both kinds of padding, last axis first
    b = F.pad(b, pads, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    spare = 4 - a.ndim  # a convolution over one axis is one over two, the first of size one

    def two(sizes: Any) -> tuple[int, ...]:
        return (1,) * spare + tuple(sizes)

    batched = b if b.ndim == a.ndim else b.unsqueeze(0)
    image = batched.view(*batched.shape[:2], *two(batched.shape[2:]))
    # Unfolding moves values and computes none: it may carry integers as floats.
    columns = F.unfold(image, two(a.shape[2:]), two(layer.dilation), 0, two(layer.stride))  # [B, in * k, places]
    flat = columns.permute(1, 0, 2).flatten(1).long().chunk(layer.groups)  # [in / G * k, B * places] each
    parts = [multiply(w.flatten(1), values) for w, values in zip(a.chunk(layer.groups), flat, strict=True)]
    found = torch.cat(parts)  # [out, B * places]
    return found.view(len(a), len(batched), -1).permute(1, 0, 2).reshape(out.shape)
