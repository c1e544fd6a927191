"""How the values of a program are held: as floats, or as eight-bit codes with a scale and a zero point a map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cupel.ops.map_program import Clip, Kernel, Program
from cupel.ops.quantize import symmetric_codes

Array = np.ndarray[Any, np.dtype[Any]]
_KEEPS = ("max", "pick", "reshape")  # kinds whose result is made of values of their input


@dataclass(frozen=True)
class Weights:
    """A convolution or linear layer, made ready.

    Args:
        matrix: `[out, depth]` in the type that sums are carried out in.
        gain: what a sum is multiplied with, `[out, 1]`; `None` for one.
        bias: `[out, 1]`.
    """

    matrix: Array
    gain: Array | None
    bias: Array


@dataclass(frozen=True)
class Numbers:
    """A program with its weights in read-only memory, in one format.

    Args:
        dtype: of the maps: float32 or int8.
        scales, zeros: of every map; a code q stands for (q - zero) * scale.
        weights: by position of the kernel.
        tables: results of elementwise kernels for all 256 codes, `[C or 1, 256]`, by position of the kernel.
    """

    program: Program
    dtype: Any
    scales: tuple[float, ...]
    zeros: tuple[int, ...]
    weights: Mapping[int, Weights]
    tables: Mapping[int, Array]

    @property
    def coded(self) -> bool:
        return bool(self.dtype == np.int8)

    def real(self, values: Array, number: int) -> Array:
        """What values of map `number` stand for, in the type that results are worked out in."""
        found: Array = values.astype(np.float64 if self.coded else np.float32)
        if self.coded:
            found -= self.zeros[number]
            found *= self.scales[number]
        return found

    def held(self, real: Array, number: int) -> Array:
        """Values of map `number` that stand for `real`, as nearly as they can."""
        if not self.coded:
            found: Array = real.astype(np.float32, copy=False)
            return found
        scaled = real / self.scales[number]
        np.rint(scaled, out=scaled)
        scaled += self.zeros[number]
        return np.clip(scaled, -128, 127, out=scaled).astype(np.int8)


def floats(program: Program) -> Numbers:
    """The program in float32; sums are carried out in float64, so that the order of their terms does not show."""
    weights = {
        k: Weights(_matrix(kernel.weight), None, _column(kernel.bias))
        for k, kernel in enumerate(program.kernels)
        if kernel.weight is not None
    }
    count = len(program.shapes)
    return Numbers(program, np.float32, (1.0,) * count, (0,) * count, weights, {})


def codes(program: Program, ranges: Mapping[int, Clip]) -> Numbers:
    """The program in eight-bit codes: weights symmetric, one scale an output channel; maps with a zero point.

    Sums of products of codes are integers below 2^53 and are carried out in floats that hold them exactly: the same
    sums as in 32-bit integers, in whatever order.

    Args:
        ranges: least and largest value of every map on some inputs.
    """
    wide = dict(ranges)
    for kernel in program.kernels:
        if kernel.kind in _KEEPS:
            wide[kernel.writes] = wide[kernel.reads[0]]
    spans = [(min(low, 0.0), max(high, 0.0)) for low, high in (wide[m] for m in range(len(program.shapes)))]
    scales = tuple(max(high - low, 1e-12) / 255 for low, high in spans)
    zeros = tuple(round(-128 - low / scale) for (low, _), scale in zip(spans, scales, strict=True))
    weights = {k: _coded(kernel, scales) for k, kernel in enumerate(program.kernels) if kernel.weight is not None}
    bare = Numbers(program, np.int8, scales, zeros, weights, {})
    tables = {k: _table(bare, kernel) for k, kernel in enumerate(program.kernels) if kernel.kind == "map"}
    return Numbers(program, np.int8, scales, zeros, weights, tables)


def _coded(kernel: Kernel, scales: tuple[float, ...]) -> Weights:
    assert kernel.weight is not None
    weight = kernel.weight.detach().double()
    limit = weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    matrix = _matrix(symmetric_codes(weight, limit, 8))
    # A product of codes is at most 127 * 255: float32 holds integers below 2^24.
    wide = np.float32 if matrix.shape[1] * 127 * 255 < 2**24 else np.float64
    gain = limit.flatten().numpy()[:, None] / 127 * scales[kernel.reads[0]]
    return Weights(matrix.astype(wide), gain, _column(kernel.bias).astype(np.float64))


def _table(numbers: Numbers, kernel: Kernel) -> Array:
    every = numbers.real(np.arange(-128, 128, dtype=np.int8), kernel.reads[0])
    channels = numbers.program.shapes[kernel.writes][0]
    return numbers.held(elementwise(kernel, np.broadcast_to(every, (channels, 256))), kernel.writes)


def elementwise(kernel: Kernel, values: Array) -> Array:
    """The kernel's function on values `[C, n]`."""
    assert kernel.call is not None
    with torch.no_grad():
        made: Tensor = kernel.call(torch.from_numpy(values.astype(np.float32))[None, :, None, :])
    found: Array = made[0, :, 0, :].numpy()
    return found


def _matrix(weight: Tensor | None) -> Array:
    assert weight is not None
    found: Array = weight.detach().flatten(1).double().numpy()
    return found


def _column(bias: Tensor | None) -> Array:
    assert bias is not None
    found: Array = bias.detach().double().numpy()[:, None]
    return found
