"""A convolutional network as a list of kernels over maps, recorded from one forward.

A kernel is what a small device runs in one go: a convolution with the norm folded into it, the clipping behind it and
the shortcut added to it; a pooling; an elementwise map. What is none of these is kept as a call of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from cupel.ops.receptive import Window
from cupel.ops.recorded import Call, Map, Recorder, paths

Clip = tuple[float, float]
Shape = tuple[int, int, int]  # channels, rows, columns


@dataclass(frozen=True)
class Kernel:
    """One step of a program.

    Args:
        kind: conv, max, mean, map (elementwise on one map), add, pick (a window of one position), cat, reshape, or
            torch (a call of torch on whole maps).
        reads: numbers of the maps; with `onto`, the last is added to the result.
        writes: number of the map.
        module: path of the module that ran it.
        window: how a conv, a pooling or a pick slides.
        weight, bias: of a conv, `[out, in / groups, rows, columns]` and `[out]`.
        clip, after: bounds before and after the addition.
        call: elementwise function of a `[1, C, 1, n]` tensor (map), or of the whole tensors (torch).
        padded: whether a mean counts padded positions.
    """

    kind: str
    reads: tuple[int, ...]
    writes: int
    module: str = ""
    window: Window = Window()
    weight: Tensor | None = None
    bias: Tensor | None = None
    groups: int = 1
    clip: Clip | None = None
    onto: bool = False
    after: Clip | None = None
    call: Callable[..., Tensor] | None = None
    padded: bool = True

    @property
    def depthwise(self) -> bool:
        """Whether channel k of the output reads channel k of the input alone."""
        return self.weight is not None and self.groups == self.weight.shape[0] and self.weight.shape[1] == 1

    @property
    def local(self) -> bool:
        """Whether a part of its output needs no more than a part of its input."""
        return self.kind not in ("torch", "reshape")


@dataclass(frozen=True)
class Program:
    """Kernels in order, and the maps between them; map 0 is the input.

    Args:
        shapes: channels, rows and columns of every map; what is not a map of an image counts as channels.
        whole: the tensors' full shapes.
        output: number of the map that is the result.
    """

    kernels: tuple[Kernel, ...]
    shapes: tuple[Shape, ...]
    whole: tuple[tuple[int, ...], ...]
    output: int

    def last_use(self) -> dict[int, int]:
        """Of every map, the position of the last kernel that reads it."""
        return {m: k for k, kernel in enumerate(self.kernels) for m in kernel.reads}

    def cuts(self) -> list[int]:
        """Counts of leading kernels after which only one map is alive and which are all local."""
        last, found = self.last_use(), []
        alive = {0}
        for k, kernel in enumerate(self.kernels):
            if not kernel.local:
                break
            alive = {m for m in alive | {kernel.writes} if last.get(m, len(self.kernels)) > k}
            if alive == {kernel.writes} and kernel.writes != self.output:
                found.append(k + 1)
        return found


def program_of(model: nn.Module, inputs: Tensor) -> Program:
    """The program of `model` on one image `[1, C, H, W]`; the model stays as it is and runs as its modes say."""
    recorder = Recorder(model, inputs)
    with torch.no_grad(), paths(model, recorder), recorder:
        out = model(recorder.start)
    if id(out) not in recorder.numbers:
        raise ValueError("a network must return one tensor made from its input; it returned something else.")
    return _Builder(recorder.shapes, recorder.calls).program(recorder.numbers[id(out)])


@dataclass
class _Builder:
    """Turns calls into kernels, and joins a kernel with the one before it where nothing else reads between them."""

    whole: list[tuple[int, ...]]
    calls: list[Call]
    kernels: list[Kernel] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)
    same: dict[int, int] = field(default_factory=dict)  # tensors that are another one under a new name

    def program(self, output: int) -> Program:
        self.uses = [0] * len(self.whole)
        for number in (output, *(m for call in self.calls for m in maps_of(call))):
            self.uses[number] += 1
        for call in self.calls:
            maps = [self.same.get(m, m) for m in maps_of(call)]
            lower = _LOWER.get(call.name)
            if not (lower and lower(self, call, *maps)) and not self._elementwise(call, maps):
                self._put(Kernel("torch", tuple(maps), call.out, call.module, call=_bound(call)))
        return self._numbered(self.same.get(output, output))

    def _numbered(self, output: int) -> Program:
        used = {0, output} | {m for k in self.kernels for m in (*k.reads, k.writes)}
        number = {m: i for i, m in enumerate(sorted(used))}
        kernels = tuple(
            replace(k, reads=tuple(number[m] for m in k.reads), writes=number[k.writes]) for k in self.kernels
        )
        whole = tuple(self.whole[m] for m in sorted(used))
        return Program(kernels, tuple(shape_of(w) for w in whole), whole, number[output])

    def _put(self, kernel: Kernel) -> bool:
        self.kernels.append(kernel)
        return True

    def _before(self, number: int, *kinds: str) -> int | None:
        """Position of the kernel that made a map for one reader alone, if it is one of `kinds`."""
        for k, kernel in enumerate(self.kernels):
            if kernel.writes == number and kernel.kind in kinds and self.uses[number] == 1:
                return k
        return None

    def _joined(self, at: int, call: Call, **changes: Any) -> bool:
        self.kernels[at] = replace(self.kernels[at], writes=call.out, module=call.module, **changes)
        return True

    def _clipped(self, call: Call, source: int, low: float, high: float) -> bool:
        at = self._before(source, "conv", "add")
        kernel = self.kernels[at] if at is not None else None
        if at is not None and kernel is not None and kernel.after is None:
            if kernel.onto or kernel.kind == "add":
                return self._joined(at, call, after=(low, high))
            if kernel.clip is None:
                return self._joined(at, call, clip=(low, high))
        clamp = Kernel("map", (source,), call.out, call.module, call=lambda t: t.clamp(low, high))
        return self._put(clamp)

    def _relu(self, call: Call, source: int) -> bool:
        return self._clipped(call, source, 0.0, float("inf"))

    def _hardtanh(self, call: Call, source: int) -> bool:
        low, high = _given(call, -1.0, 1.0)
        return self._clipped(call, source, float(low), float(high))

    def _clamp(self, call: Call, *maps: int) -> bool:
        low, high = _given(call, None, None)
        if isinstance(low, (Tensor, Map)) or isinstance(high, (Tensor, Map)):
            return False
        return self._clipped(call, maps[0], -math.inf if low is None else low, math.inf if high is None else high)

    def _convolution(self, call: Call, *maps: int) -> bool:
        _, weight, bias, stride, pad, dilation, transposed, _, groups = call.args
        if transposed or len(maps) != 1 or weight.ndim != 4 or isinstance(weight, Map):
            return False
        window = Window(tuple(weight.shape[2:]), tuple(stride), tuple(pad), tuple(dilation))
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return self._put(Kernel("conv", maps, call.out, call.module, window, weight, bias, groups))

    def _native_batch_norm(self, call: Call, *maps: int) -> bool:
        _, gain, shift, mean, var, training, _, eps = call.args
        return len(maps) == 1 and not training and self._normed(call, maps[0], gain, shift, mean, var, eps)

    def _native_batch_norm_now(self, call: Call, *maps: int) -> bool:
        _, gain, shift, mean, var, _, eps = call.args
        return len(maps) == 1 and self._normed(call, maps[0], gain, shift, mean, var, eps)

    def _normed(self, call: Call, source: int, *norm: Any) -> bool:
        gain, shift, mean, var, eps = norm
        scale = (var.double() + eps).rsqrt() * (1.0 if gain is None else gain.double())
        move = (0.0 if shift is None else shift.double()) - mean.double() * scale
        at = self._before(source, "conv")
        kernel = self.kernels[at] if at is not None else None
        if at is not None and kernel is not None and kernel.clip is None and not kernel.onto:
            assert kernel.weight is not None and kernel.bias is not None
            weight = (kernel.weight.double() * scale[:, None, None, None]).to(kernel.weight.dtype)
            return self._joined(at, call, weight=weight, bias=(kernel.bias.double() * scale + move).to(weight.dtype))
        a, b = (v.float().view(1, -1, 1, 1) for v in (scale, move))
        return self._put(Kernel("map", (source,), call.out, call.module, call=lambda t: t * a + b))

    def _add(self, call: Call, *maps: int) -> bool:
        if len(maps) != 2 or call.kwargs.get("alpha", 1) != 1 or self.whole[maps[0]] != self.whole[maps[1]]:
            return False
        made = {k.writes: i for i, k in enumerate(self.kernels)}
        late, early = sorted(maps, key=lambda m: -made.get(m, -1))
        at = self._before(late, "conv")
        if at is not None and late != early and not self.kernels[at].onto:
            return self._joined(at, call, reads=(*self.kernels[at].reads, early), onto=True)
        return self._put(Kernel("add", maps, call.out, call.module))

    def _max_pool2d_with_indices(self, call: Call, *maps: int) -> bool:
        return self._pooled("max", call, maps[0], call.args[1:])

    def _avg_pool2d(self, call: Call, *maps: int) -> bool:
        kernel, stride, pad, ceil, padded, divisor = _given(call, 0, [], 0, False, True, None)
        if ceil or divisor:
            return False
        return self._pooled("mean", call, maps[0], (kernel, stride, pad), bool(padded))

    def _pooled(self, kind: str, call: Call, source: int, args: Sequence[Any], padded: bool = True) -> bool:
        kernel = _pair(args[0])
        stride = _pair(args[1]) if len(args) > 1 and args[1] else kernel
        pad = _pair(args[2]) if len(args) > 2 else (0, 0)
        dilation = _pair(args[3]) if len(args) > 3 else (1, 1)
        if len(self.whole[source]) != 4:
            return False
        window = Window(kernel, stride, pad, dilation)
        return self._put(Kernel(kind, (source,), call.out, call.module, window, padded=padded))

    def _adaptive(self, call: Call, source: int) -> bool:
        sides, wanted = self.whole[source][-2:], call.args[1]
        if any(a % b for a, b in zip(sides, wanted, strict=True)):
            return False
        return self._pooled("mean", call, source, ([a // b for a, b in zip(sides, wanted, strict=True)],))

    def _mean(self, call: Call, source: int) -> bool:
        axes = [a % 4 for a in call.args[1]] if len(call.args) > 1 and call.args[1] else []
        if len(self.whole[source]) != 4 or sorted(axes) != [2, 3]:
            return False
        return self._pooled("mean", call, source, (self.whole[source][-2:],))

    def _slice(self, call: Call, source: int) -> bool:
        axis, start, end, step = _given(call, 0, None, None, 1)
        shape = self.whole[source]
        if shape == self.whole[call.out]:
            return self._view(call, source)
        if len(shape) != 4 or axis not in (2, 3) or start or (end is not None and end < shape[axis]):
            return False
        stride = (step, 1) if axis == 2 else (1, step)
        return self._put(Kernel("pick", (source,), call.out, call.module, Window(stride=stride)))

    def _constant_pad_nd(self, call: Call, source: int) -> bool:
        pads, value = (*call.args[1], *(0,) * 6)[:6], (*call.args[2:], 0.0)[0]
        if (
            len(self.whole[source]) != 4
            or value != 0
            or min(pads) < 0
            or (pads[4], len(call.args[1]) > 6) != (0, False)
        ):
            return False
        return self._put(Kernel("pick", (source,), call.out, call.module, Window(pad=(pads[2], pads[0]))))

    def _cat(self, call: Call, *maps: int) -> bool:
        (axis,) = _given(call, 0)
        if len(maps) != len(call.args[0]) or len(self.whole[maps[0]]) != 4 or axis != 1:
            return False
        return self._put(Kernel("cat", maps, call.out, call.module))

    def _addmm(self, call: Call, *maps: int) -> bool:
        bias, x, weight = call.args
        if not isinstance(x, Map) or len(maps) != 1 or call.kwargs or self.whole[x.number][0] != 1:
            return False
        return self._put(
            Kernel("conv", maps, call.out, call.module, weight=weight.T[:, :, None, None].contiguous(), bias=bias)
        )

    def _mm(self, call: Call, *maps: int) -> bool:
        x, weight = call.args
        if not isinstance(x, Map) or len(maps) != 1 or self.whole[x.number][0] != 1:
            return False
        square = weight.T[:, :, None, None].contiguous()
        return self._put(Kernel("conv", maps, call.out, call.module, weight=square, bias=square.new_zeros(len(square))))

    def _view(self, call: Call, source: int) -> bool:
        if self.whole[source] == self.whole[call.out]:
            self.same[call.out] = source
            self.uses[source] += self.uses[call.out] - 1
            return True
        return self._put(Kernel("reshape", (source,), call.out, call.module))

    def _elementwise(self, call: Call, maps: list[int]) -> bool:
        shape = self.whole[call.out]
        fixed = [t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
        plain = all(t.ndim == 0 or (t.ndim >= 3 and t.shape[-2:] == (1, 1)) for t in fixed)
        if not call.pointwise or len(maps) != 1 or not plain or self.whole[maps[0]] != shape or len(shape) != 4:
            return False
        return self._put(Kernel("map", tuple(maps), call.out, call.module, call=_bound(call)))


def _bound(call: Call) -> Callable[..., Tensor]:
    """The call as a function of its maps, in the order they stand in its arguments."""

    def run(*maps: Tensor) -> Tensor:
        given = iter([m.clone() for m in maps])  # a call in place must not reach the caller's values
        args, kwargs = tree_map_only(Map, lambda _: next(given), (call.args, call.kwargs))
        return call.run(*args, **kwargs)

    return run


def _given(call: Call, *defaults: Any) -> tuple[Any, ...]:
    """The arguments after the first, filled up from `defaults`."""
    return (*call.args[1:], *defaults[len(call.args) - 1 :])


def maps_of(call: Call) -> list[int]:
    """Numbers of the tensors a call reads, in the order of its arguments."""
    return [leaf.number for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Map)]


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])


def shape_of(whole: tuple[int, ...]) -> Shape:
    """Channels, rows and columns of a tensor of one image; anything else counts as channels."""
    if len(whole) == 4 and whole[0] == 1:
        return whole[1], whole[2], whole[3]
    count = 1
    for side in whole:
        count *= side
    return count, 1, 1


_LOWER: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "alias", "detach", "clone"), _Builder._view
    ),
    "convolution": _Builder._convolution,
    "native_batch_norm": _Builder._native_batch_norm,
    "_native_batch_norm_legit_no_training": _Builder._native_batch_norm_now,
    "relu": _Builder._relu,
    "hardtanh": _Builder._hardtanh,
    "clamp": _Builder._clamp,
    "add": _Builder._add,
    "max_pool2d_with_indices": _Builder._max_pool2d_with_indices,
    "avg_pool2d": _Builder._avg_pool2d,
    "_adaptive_avg_pool2d": _Builder._adaptive,
    "mean": _Builder._mean,
    "slice": _Builder._slice,
    "constant_pad_nd": _Builder._constant_pad_nd,
    "cat": _Builder._cat,
    "addmm": _Builder._addmm,
    "mm": _Builder._mm,
}
