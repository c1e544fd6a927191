"""Chains of layers with learned quantisation steps, and their twins in integers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.ops.integer_layers import IntLayer
from cupel.ops.lowered import Conv
from cupel.ops.multipliers import multiplier_of
from cupel.ops.quantize import round_through


def stepped(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """step * clip(round(x / step), low, high), straight-through in x and with the step's own gradient.

    The step's gradient is divided by sqrt(count * high), which keeps it in proportion to its size.
    Source: Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv 1902.08153, equations 1 to 5.
    """
    by = 1 / math.sqrt(x.numel() * high)
    held = (step - step * by).detach() + step * by
    return round_through((x / held).clamp(low, high)) * held


class SteppedLayer(nn.Module):
    """A convolution or linear layer with `bits` for its weights; what leaves is a ReLU in `out_bits`, or sums (0).

    Args:
        layer: its weight and bias are taken over as they are.
        bits: of the weights.
        out_bits: of the codes that leave.
        pool: sides of the squares over which what enters is averaged first.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, bits: int, out_bits: int, pool: int = 1) -> None:
        super().__init__()
        self.bits, self.out_bits, self.pool = bits, out_bits, pool
        self.conv: tuple[Any, Any, int] | None = None
        if isinstance(layer, nn.Conv2d):
            self.conv = (layer.stride, layer.padding, layer.groups)
        self.weight = nn.Parameter(layer.weight.detach().clone())
        bias = layer.bias if layer.bias is not None else torch.zeros(len(layer.weight))
        self.bias = nn.Parameter(bias.detach().clone())
        high = 2 ** (bits - 1) - 1
        self.step = nn.Parameter(2 * self.weight.detach().abs().mean() / math.sqrt(high))
        self.out_step = nn.Parameter(torch.tensor(1.0)) if out_bits else None

    def steps(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        """Of the weights, and of the sums: the product of both that meet."""
        step = self.step.abs()
        return step, entering / self.pool**2 * step

    def summed(self, x: Tensor, entering: Tensor) -> Tensor:
        x = F.avg_pool2d(x, self.pool) if self.pool > 1 else x
        step, unit = self.steps(entering)
        weight = stepped(self.weight, step, -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        bias = round_through(self.bias / unit) * unit
        if self.conv is None:
            return F.linear(x.flatten(1), weight, bias)
        stride, padding, groups = self.conv
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)

    def forward(self, x: Tensor, entering: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves, and its step."""
        y = self.summed(x, entering)
        if self.out_step is None:
            return y, self.steps(entering)[1]
        out = self.out_step.abs()
        return stepped(y, out, 0, 2**self.out_bits - 1), out


@dataclass(frozen=True)
class Entry:
    """Codes of the images themselves: unsigned, `bits` wide, in steps of `step`."""

    step: float
    bits: int


class SteppedNet(nn.Module):
    """A chain of `SteppedLayer`, from images in fixed steps to logits.

    Shapes: `[B, C, H, W]` -> `[B, classes]`.
    """

    def __init__(self, layers: Sequence[SteppedLayer], entry: Entry) -> None:
        super().__init__()
        self.layers, self.entry = nn.ModuleList(layers), entry

    def chain(self) -> list[SteppedLayer]:
        """The layers in order."""
        return [layer for layer in self.layers if isinstance(layer, SteppedLayer)]

    def forward(self, x: Tensor) -> Tensor:
        return self.walk(x)[-1][0]

    def walk(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What enters and what leaves every layer, each with its step."""
        step = torch.tensor(self.entry.step, dtype=x.dtype, device=x.device)
        passed = [((x / step).round().clamp(0, 2**self.entry.bits - 1) * step, step)]
        for layer in self.chain():
            passed.append(layer(*passed[-1]))
        return passed

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the steps of what leaves every layer to twice its mean over the root of the largest code."""
        step = torch.tensor(self.entry.step, dtype=x.dtype)
        for layer in self.chain():
            if layer.out_step is not None:
                y = layer.summed(x, step).clamp_min(0)
                layer.out_step.copy_(2 * y.mean() / math.sqrt(2**layer.out_bits - 1))
            x, step = layer(x, step)


@torch.no_grad()
def in_integers(net: SteppedNet) -> tuple[IntLayer, ...]:
    """The layers of `net` with codes in place of values and 31-bit factors in place of steps."""
    net = copy.deepcopy(net).double()
    step, bits, found = torch.tensor(net.entry.step, dtype=torch.float64), net.entry.bits, []
    for i, layer in enumerate(net.chain()):
        own, unit = layer.steps(step)
        top = 2 ** (layer.bits - 1)
        weight = (layer.weight / own).clamp(-top, top - 1).round().long()
        bias = (layer.bias / unit).round().long()
        entering = bits + 2 * math.ceil(math.log2(layer.pool)) if layer.pool > 1 else bits
        conv = None if layer.conv is None else Conv(*layer.conv)
        scale, high = None, 0
        if layer.out_step is not None:
            scale, high = multiplier_of(float(unit / layer.out_step.abs())), 2**layer.out_bits - 1
            step, bits = layer.out_step.abs(), layer.out_bits
        found.append(IntLayer(f"layer{i}", weight, bias, (entering, layer.bits), scale, high, conv, layer.pool))
    return tuple(found)
