"""Run a program in NumPy with memory of known size: maps are allocated, overwritten and freed as a schedule says.

Results are worked out a few hundred values at a time, so that what is allocated beside the maps stays small.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from cupel.ops.map_memory import Part, Plan, plan
from cupel.ops.map_numbers import Array, Numbers, elementwise
from cupel.ops.map_program import Clip, Kernel
from cupel.ops.receptive import Box

SCRATCH = 512  # values worked out at once
COVERED = 1024  # values under a convolution's kernel at once
_STAGE = -1  # the map that the patches' results are put together in
Watch = Callable[[int, Array], None]
T = TypeVar("T")


@dataclass
class Held:
    """The part `box` of a map, in a block of memory of its own."""

    flat: Array
    channels: int
    box: Box

    def view(self) -> Array:
        """As `[channels, rows, columns]`."""
        used = self.channels * self.box.area
        return self.flat[:used].reshape(self.channels, self.box.height, self.box.width)

    def part(self, channels: slice, rows: tuple[int, int], cols: tuple[int, int]) -> Array:
        """Rows and columns counted on the whole map; they must be held."""
        b = self.box
        if rows[0] < b.top or rows[1] > b.bottom or cols[0] < b.left or cols[1] > b.right:
            raise ValueError(f"a kernel must read inside what is held, {b}; it asked for rows {rows}, columns {cols}.")
        return self.view()[channels, rows[0] - b.top : rows[1] - b.top, cols[0] - b.left : cols[1] - b.left]

    def shrink(self, channels: int, box: Box) -> None:
        """Keep `box` alone and give the rest of the memory back; what stays only ever moves forward."""
        if box != self.box:
            old, width = self.view(), box.width
            for c in range(channels):
                for y in range(box.height):
                    begin = (c * box.height + y) * width
                    left = box.left - self.box.left
                    self.flat[begin : begin + width] = old[c, y + box.top - self.box.top, left : left + width]
            del old
        self.resize(channels, box)

    def resize(self, channels: int, box: Box) -> None:
        self.channels, self.box = channels, box
        self.flat.resize(channels * box.area, refcheck=False)  # no view of it is left


class Run:
    """One image through a program.

    Args:
        numbers: the program in one format.
        watch: called with the number and the values of every map that is made.
    """

    def __init__(self, numbers: Numbers, watch: Watch | None = None) -> None:
        self.numbers, self.program, self.watch = numbers, numbers.program, watch
        self.maps: dict[int, Held] = {}
        self.macs = 0

    def follow(self, plan: Plan, image: Array) -> Array:
        """The values of the result, flat. `image` `[C, H, W]` is in the maps' type, and is read where it lies."""
        if not plan.cut:
            self._take(image, plan.rest.boxes[0])
        else:
            made = self.program.kernels[plan.cut - 1].writes
            self.maps[_STAGE] = self._new(made, plan.rest.boxes[made])
            for box, part in zip(plan.tiles, plan.patches, strict=True):
                self._take(image, part.boxes[0])
                self._steps(part)
                done = self.maps.pop(made)
                whole = self.maps[_STAGE].part(slice(None), (box.top, box.bottom), (box.left, box.right))
                whole[...] = done.view()
                del done, whole
            self.maps[made] = self.maps.pop(_STAGE)
        self._steps(plan.rest)
        return self.maps.pop(self.program.output).flat

    def _take(self, image: Array, box: Box) -> None:
        crop = image[:, box.top : box.bottom, box.left : box.right]
        self.maps[0] = Held(crop.flatten(), len(crop), box)

    def _new(self, number: int, box: Box) -> Held:
        channels = self.program.shapes[number][0]
        return Held(np.empty(channels * box.area, self.numbers.dtype), channels, box)

    def _steps(self, part: Part) -> None:
        for step in part.steps:
            kernel = self.program.kernels[step.kernel]
            box = part.boxes[kernel.writes]
            into = self._new(kernel.writes, box) if step.into is None else self.maps[step.into]
            _RUNS[kernel.kind](self, step.kernel, kernel, into, box)
            if step.into is not None:
                del self.maps[step.into]
                if not kernel.depthwise or kernel.onto:
                    into.shrink(self.program.shapes[kernel.writes][0], box)
            self.maps[kernel.writes] = into
            for m in step.frees:
                del self.maps[m]
            if self.watch is not None:
                self.watch(kernel.writes, into.flat)
            del into

    # What the kinds of kernels do: from maps that are held into `into`, the part `box` of the result.

    def _conv(self, k: int, kernel: Kernel, into: Held, box: Box) -> None:
        if kernel.depthwise and not kernel.onto:
            return self._channels(k, kernel, into, box)
        weights, source = self.numbers.weights[k], kernel.reads[0]
        depth = weights.matrix.shape[1]
        per = len(weights.matrix) // kernel.groups
        wide = max(1, COVERED // depth)
        high = max(1, SCRATCH // min(wide, box.width))
        for group in range(kernel.groups):
            inputs = slice(group * kernel.weight.shape[1], (group + 1) * kernel.weight.shape[1])  # type: ignore[union-attr]
            for y, a, b in _pieces(box, wide):
                under = self._under(kernel, source, inputs, (y, a, b), weights.matrix.dtype)
                for first in range(group * per, (group + 1) * per, high):
                    rows = slice(first, min(first + high, (group + 1) * per))
                    total = weights.matrix[rows] @ under  # [rows, n]
                    self.macs += total.size * depth
                    self._finish(kernel, weights_of(weights, rows, total), rows, (y, a, b), into)
        return None

    def _under(self, kernel: Kernel, source: int, channels: slice, piece: tuple[int, int, int], dtype: Any) -> Array:
        """What the kernel covers at outputs a to b of row y, `[channels * positions, n]`; zero is padding."""
        w, held, zero = kernel.window, self.maps[source], self.numbers.zeros[source]
        (_, height, width), (y, a, b) = self.program.shapes[source], piece
        found = np.zeros((channels.stop - channels.start, *w.kernel, b - a), dtype)
        for i in range(w.kernel[0]):
            row = y * w.stride[0] - w.pad[0] + i * w.dilation[0]
            if not 0 <= row < height:
                continue
            for j in range(w.kernel[1]):
                at = j * w.dilation[1] - w.pad[1]
                low, high = _inside(a, b, w.stride[1], at, width)
                if low < high:
                    cols = (low * w.stride[1] + at, (high - 1) * w.stride[1] + at + 1)
                    part = found[:, i, j, low - a : high - a]
                    part[...] = held.part(channels, (row, row + 1), cols)[:, 0, :: w.stride[1]]
                    part -= zero
        return found.reshape(-1, b - a)

    def _channels(self, k: int, kernel: Kernel, into: Held, box: Box) -> None:
        """A depthwise convolution, one channel after the other, over its own input where `into` is that."""
        weights, source, own = self.numbers.weights[k], kernel.reads[0], into is self.maps[kernel.reads[0]]
        beside = np.empty((box.height, box.width), self.numbers.dtype) if own else None
        rows = max(1, SCRATCH // box.width)
        target = into.flat[: into.channels * box.area].reshape(into.channels, box.height, box.width)
        for c in range(into.channels):
            place = target[c] if beside is None else beside
            for top in range(box.top, box.bottom, rows):
                block = Box(top, min(top + rows, box.bottom), box.left, box.right)
                total = self._slid(kernel, weights.matrix[c], source, c, block)
                self.macs += total.size * weights.matrix.shape[1]
                real = _bounded(weights_of(weights, slice(c, c + 1), total), kernel.clip)
                place[block.top - box.top : block.bottom - box.top] = self.numbers.held(real, kernel.writes)
            if beside is not None:
                target[c] = beside
        del target
        if own:
            into.resize(into.channels, box)

    def _slid(self, kernel: Kernel, taps: Array, source: int, channel: int, box: Box) -> Array:
        """Channel `channel` of the input under `taps`, summed, for the outputs in `box`."""
        w, (_, height, width) = kernel.window, self.program.shapes[source]
        held, zero = self.maps[source], self.numbers.zeros[source]
        found = np.zeros((box.height, box.width), taps.dtype)
        for i in range(w.kernel[0]):
            down = i * w.dilation[0] - w.pad[0]
            a, b = _inside(box.top, box.bottom, w.stride[0], down, height)
            for j in range(w.kernel[1]):
                right = j * w.dilation[1] - w.pad[1]
                c, d = _inside(box.left, box.right, w.stride[1], right, width)
                if a >= b or c >= d:
                    continue
                rows = (a * w.stride[0] + down, (b - 1) * w.stride[0] + down + 1)
                cols = (c * w.stride[1] + right, (d - 1) * w.stride[1] + right + 1)
                seen = held.part(slice(channel, channel + 1), rows, cols)[0, :: w.stride[0], :: w.stride[1]]
                part = seen.astype(taps.dtype)
                part -= zero
                part *= taps[i * w.kernel[1] + j]
                found[a - box.top : b - box.top, c - box.left : d - box.left] += part
        return found

    def _finish(self, kernel: Kernel, real: Array, rows: slice, piece: tuple[int, int, int], into: Held) -> None:
        y, a, b = piece
        real = _bounded(real, kernel.clip)
        if kernel.onto:
            short = self.maps[kernel.reads[-1]].part(rows, (y, y + 1), (a, b))[:, 0]
            real += self.numbers.real(short, kernel.reads[-1])
        real = _bounded(real, kernel.after)
        into.part(rows, (y, y + 1), (a, b))[:, 0] = self.numbers.held(real, kernel.writes)

    def _pool(self, k: int, kernel: Kernel, into: Held, box: Box) -> None:
        source, w = kernel.reads[0], kernel.window
        channels = self.program.shapes[source][0]
        for y, a, b in _pieces(box, max(1, SCRATCH // channels)):
            best = np.full((channels, b - a), -np.inf if kernel.kind == "max" else 0.0, np.float64)
            count = np.zeros(b - a)
            for row, low, high, cols in self._positions(kernel, source, y, a, b):
                seen = self.maps[source].part(slice(None), (row, row + 1), cols)[:, 0, :: w.stride[1]]
                part = best[:, low - a : high - a]
                if kernel.kind == "max":
                    np.maximum(part, seen, out=part)
                else:
                    part += seen
                    part -= self.numbers.zeros[source]
                    count[low - a : high - a] += 1
            if kernel.kind == "mean":
                best *= self.numbers.scales[source] / (w.kernel[0] * w.kernel[1] if kernel.padded else count)
                best = self.numbers.held(best, kernel.writes)
            into.part(slice(None), (y, y + 1), (a, b))[:, 0] = best

    def _positions(self, kernel: Kernel, source: int, y: int, a: int, b: int) -> Iterator[tuple[Any, ...]]:
        """Input row, first and last output, and input columns, for every position of the kernel inside the map."""
        w, (_, height, width) = kernel.window, self.program.shapes[source]
        for i in range(w.kernel[0]):
            row = y * w.stride[0] - w.pad[0] + i * w.dilation[0]
            for j in range(w.kernel[1]):
                at = j * w.dilation[1] - w.pad[1]
                low, high = _inside(a, b, w.stride[1], at, width)
                if 0 <= row < height and low < high:
                    yield row, low, high, (low * w.stride[1] + at, (high - 1) * w.stride[1] + at + 1)

    def _pick(self, k: int, kernel: Kernel, into: Held, box: Box) -> None:
        source, w = kernel.reads[0], kernel.window
        into.flat[:] = self.numbers.zeros[source]  # beyond the borders, and in channels the input does not have
        channels = slice(0, self.program.shapes[source][0])
        for y in range(box.top, box.bottom):
            for row, low, high, cols in self._positions(kernel, source, y, box.left, box.right):
                seen = self.maps[source].part(channels, (row, row + 1), cols)[:, 0, :: w.stride[1]]
                into.part(channels, (y, y + 1), (low, high))[:, 0] = seen

    def _map(self, k: int, kernel: Kernel, into: Held, box: Box) -> None:
        source, channels = self.maps[kernel.reads[0]], into.channels
        lines = np.arange(channels)[:, None]
        for y, a, b in _pieces(box, max(1, SCRATCH // channels)):
            seen = source.part(slice(None), (y, y + 1), (a, b))[:, 0]
            if self.numbers.coded:
                made = self.numbers.tables[k][lines, seen.astype(np.int64) + 128]
            else:
                made = elementwise(kernel, seen)
            into.part(slice(None), (y, y + 1), (a, b))[:, 0] = made

    def _add(self, k: int, kernel: Kernel, into: Held, box: Box) -> None:
        channels = slice(0, into.channels)
        for y, a, b in _pieces(box, max(1, SCRATCH // into.channels)):
            parts = [self.numbers.real(self.maps[m].part(channels, (y, y + 1), (a, b))[:, 0], m) for m in kernel.reads]
            real = _bounded(parts[0] + parts[1], kernel.after)
            into.part(channels, (y, y + 1), (a, b))[:, 0] = self.numbers.held(real, kernel.writes)

    def _cat(self, k: int, kernel: Kernel, into: Held, box: Box) -> None:
        first = 0
        for m in kernel.reads:
            count = self.program.shapes[m][0]
            for y, a, b in _pieces(box, max(1, SCRATCH // count)):
                seen = self.numbers.real(self.maps[m].part(slice(None), (y, y + 1), (a, b))[:, 0], m)
                made = self.numbers.held(seen, kernel.writes)
                into.part(slice(first, first + count), (y, y + 1), (a, b))[:, 0] = made
            first += count

    def _reshape(self, k: int, kernel: Kernel, into: Held, box: Box) -> None:
        source = self.maps[kernel.reads[0]]
        if into is source:
            into.resize(self.program.shapes[kernel.writes][0], box)
        else:
            into.flat[:] = source.flat

    def _torch(self, k: int, kernel: Kernel, into: Held, box: Box) -> None:
        assert kernel.call is not None
        given = [
            torch.from_numpy(self.numbers.real(self.maps[m].flat, m).astype(np.float32)).view(self.program.whole[m])
            for m in kernel.reads
        ]
        with torch.no_grad():
            made = kernel.call(*given)
        into.flat[:] = self.numbers.held(made.reshape(-1).numpy(), kernel.writes)


_RUNS: dict[str, Callable[[Run, int, Kernel, Held, Box], None]] = {
    "conv": Run._conv,
    "max": Run._pool,
    "mean": Run._pool,
    "pick": Run._pick,
    "map": Run._map,
    "add": Run._add,
    "cat": Run._cat,
    "reshape": Run._reshape,
    "torch": Run._torch,
}


def weights_of(weights: Any, rows: slice, total: Array) -> Array:
    """Sums as real values: times the gain, plus the bias."""
    if weights.gain is None:
        total += weights.bias[rows]
        return total
    real: Array = total.astype(np.float64)
    real *= weights.gain[rows]
    real += weights.bias[rows]
    return real


def _bounded(real: Array, clip: Clip | None) -> Array:
    return real if clip is None else np.clip(real, *clip, out=real)


def _pieces(box: Box, most: int) -> Iterator[tuple[int, int, int]]:
    """Row, first and last column of pieces of at most `most` positions of one row."""
    for y in range(box.top, box.bottom):
        for a in range(box.left, box.right, most):
            yield y, a, min(a + most, box.right)


def _inside(low: int, high: int, stride: int, offset: int, size: int) -> tuple[int, int]:
    """Those outputs o of low to high for which 0 <= o * stride + offset < size."""
    return max(low, -(offset // stride)), min(high, (size - 1 - offset) // stride + 1)


def ranges_of(numbers: Numbers, images: Sequence[Array]) -> tuple[dict[int, Clip], list[Array]]:
    """Least and largest value of every map over some images, run plainly in float, and the results."""
    found = {0: (float(min(i.min() for i in images)), float(max(i.max() for i in images)))}

    def watch(number: int, values: Array) -> None:
        low, high = found.get(number, (np.inf, -np.inf))
        found[number] = (min(low, float(values.min())), max(high, float(values.max())))

    whole = plan(numbers.program)
    results = [Run(numbers, watch).follow(whole, image) for image in images]
    return found, results


@dataclass(frozen=True)
class Executed:
    """What running a plan gave.

    Args:
        results: what the result's values stand for, flat, one image after the other.
        macs: multiply-adds carried out for one image.
        most: bytes that Python and NumPy held for the first image at once.
    """

    results: list[Array]
    macs: int
    most: int


def executed(numbers: Numbers, way: Plan, images: Sequence[Array]) -> Executed:
    """Run images `[C, H, W]`, in float, along a plan."""
    taken = [numbers.held(image, 0) for image in images]
    run = Run(numbers)
    first, most = traced(lambda: run.follow(way, taken[0]))
    found = [first, *(Run(numbers).follow(way, image) for image in taken[1:])]
    return Executed([numbers.real(values, numbers.program.output) for values in found], run.macs, most)


def traced(work: Callable[[], T]) -> tuple[T, int]:
    """What `work` returns, and the most bytes that Python and NumPy held for it at once."""
    fresh = not tracemalloc.is_tracing()
    if fresh:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = work()
        return result, tracemalloc.get_traced_memory()[1] - before
    finally:
        if fresh:
            tracemalloc.stop()
