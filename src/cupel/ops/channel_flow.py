"""Which channel of which layer every number in a running network comes from.

One forward is followed at torch's dispatcher. Beside every tensor runs another of its shape that holds labels: what
only moves numbers is run on the labels too, a layer gives its outputs new ones, and a sum of two maps takes those of
the later layer and notes that the other came in beside it. So views, pads, joins and flattenings need no rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NONE = -1.0  # the label of what no layer made
_MOVES = {
    "alias", "cat", "channel_shuffle", "clone", "constant_pad_nd", "detach", "expand", "flip", "index_select",
    "native_channel_shuffle", "permute", "pixel_shuffle", "pixel_unshuffle", "reflection_pad1d",
    "reflection_pad2d", "repeat", "replication_pad2d", "reshape", "roll", "select", "slice", "split",
    "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unsqueeze", "_unsafe_view",
    "upsample_nearest2d", "view",
}  # fmt: skip
_POOLS = {
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "adaptive_max_pool2d",
}  # fmt: skip
_MEANS = {"mean", "amax", "sum"}
_SUMS = {"add", "add_", "sub", "sub_"}
_ENDS = {"_softmax", "_log_softmax", "bmm", "baddbmm", "sort", "topk", "cumsum"}  # their outputs belong to no channel


@dataclass(frozen=True)
class Layer:
    """One product of activations with weights.

    Args:
        path: of the module whose weight it is.
        first: label of its first channel; labels count over all layers in the order they run.
        count: channels.
        call: number of the dispatcher's call that computes it.
        seen: number of the last call that changes this layer's channels alone: after norms, sums and activation.
        channels: `[P]` int64: channel of every number of one image in the output of `seen`.
        reads: label behind every input channel of a convolution `[C_in]`, or feature of a matrix product `[F]`.
        field: pixels of the input that one number is computed from, on each side; 0 where it is all of them.
        shape: of one image's output of `seen`.
    """

    path: str
    first: int
    count: int
    call: int
    seen: int
    channels: Tensor
    reads: Tensor
    field: int = 0
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Skip:
    """An operand of a sum that comes from an earlier layer than the other one.

    Args:
        call: number of the sum.
        operand: 0 or 1.
        scale: what the sum multiplies it with.
        source, into: `[P]` int64 labels of every number of one image; `source` is -1 where it adds no earlier layer.
    """

    call: int
    operand: int
    scale: float
    source: Tensor
    into: Tensor


@dataclass(frozen=True)
class Flow:
    """The layers of a network in the order they run, the sums that join them, and how many calls one forward has."""

    layers: tuple[Layer, ...]
    skips: tuple[Skip, ...]
    calls: int

    def layer_of(self, label: int) -> int:
        """Number of the layer that a label belongs to."""
        return next(i for i, layer in enumerate(self.layers) if layer.first <= label < layer.first + layer.count)


def flow_of(model: nn.Module, inputs: Tensor) -> Flow:
    """Follow one forward of `model`, which must be in evaluation mode, on `inputs` `[B, ...]`.

    Gates and other products of two activations keep the labels of the first; attention and recurrent cells lose them.
    """
    tracer = _Tracer(model, len(inputs))
    _run(model, inputs.clone(), tracer)
    return Flow(tuple(tracer.layers), tuple(tracer.skips), tracer.calls)


def replay(model: nn.Module, inputs: Tensor, flow: Flow, seen: Mapping[int, Callable[[Any, Any], None]]) -> Tensor:
    """The outputs of `model` on `inputs`, where `seen[n](args, out)` is told call number n and may write into `out`.

    Raises:
        ValueError: the forward is not the one that `flow` was made from.
    """
    reader = _Reader(seen)
    out: Tensor = _run(model, inputs.clone(), reader)
    if reader.calls != flow.calls:
        raise ValueError(
            f"a network must run the same operations on every batch; got {reader.calls} calls in place of "
            f"{flow.calls}. Leave this probe out."
        )
    return out


def _run(model: nn.Module, inputs: Tensor, mode: TorchDispatchMode) -> Any:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one fused call would hide every product in it
    try:
        with torch.no_grad(), mode:
            return model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Reader(TorchDispatchMode):
    def __init__(self, seen: Mapping[int, Callable[[Any, Any], None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen, self.calls = seen, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tell, before = self.seen.get(self.calls), args
        self.calls += 1
        if tell and _name(func).endswith("_"):
            before = tree_map_only(Tensor, torch.clone, args)
        out = func(*args, **(kwargs or {}))
        if tell:
            tell(before, _first(out))
        return out


def _first(out: Any) -> Tensor | None:
    return next((t for t in tree_leaves(out) if isinstance(t, Tensor)), None)


def _name(func: Any) -> str:
    return str(func.overloadpacket).removeprefix("aten.")


@dataclass
class _Marks:
    """Labels of a tensor, and how much of the input one of its numbers sees: field and step in pixels (0: all)."""

    labels: Tensor
    field: int = 1
    step: int = 1


@dataclass
class _Seen:
    """Marks by tensor; the tensors are held, so that an identity names one of them."""

    marks: dict[int, _Marks] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)

    def of(self, t: Tensor) -> _Marks:
        found = self.marks.get(id(t))
        if found is None or found.labels.shape != t.shape:
            return _Marks(torch.full(t.shape, NONE, dtype=torch.float64))
        return found

    def put(self, t: Tensor, marks: _Marks) -> None:
        self.marks[id(t)] = marks
        self.held.append(t)


class _Tracer(TorchDispatchMode):
    def __init__(self, model: nn.Module, batch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch, self.calls, self.labels = batch, 0, 0
        self.layers: list[Layer] = []
        self.skips: list[Skip] = []
        self.seen = _Seen()
        self.names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters() if p.ndim > 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        marks = [self.seen.of(t) for t in _floats(args)]  # before an operation in place makes them another's
        out = func(*args, **kwargs)
        first = _first(out)
        if first is not None and first.is_floating_point():
            if name in _MOVES:
                self.move(func, args, kwargs, out, marks)
            elif name == "convolution" or (name in ("mm", "addmm") and len(first) % self.batch == 0):
                self.layer(name, args, first, marks)
            elif name in _POOLS or name in _MEANS:
                self.pool(name, args, first, marks[0])
            elif name not in _ENDS:
                self.change(name, args, kwargs, first, marks)
        self.calls += 1
        return out

    def move(self, func: Any, args: Any, kwargs: Any, out: Any, marks: Sequence[_Marks]) -> None:
        """The labels go the same way; padding belongs to nobody."""
        if _name(func) == "constant_pad_nd":
            args = (*args[:2], NONE)
        stand = iter([m.labels for m in marks])
        asked = tree_map_only(Tensor, lambda t: next(stand) if t.is_floating_point() else t, args)
        plain = {k: v for k, v in kwargs.items() if k != "memory_format"}
        if _name(func) in ("view", "_unsafe_view"):  # labels may lie in memory where no view of them exists
            moved = [asked[0].reshape(args[1])]
        else:
            moved = tree_leaves(func(*asked, **plain))
        whole = isinstance(out, Tensor) and out.ndim < args[0].ndim if isinstance(args[0], Tensor) else False
        size = max((m.field for m in marks), default=1) if marks and all(m.field for m in marks) and not whole else 0
        for t, labels in zip(tree_leaves(out), moved, strict=True):
            self.seen.put(t, _Marks(labels, size, max((m.step for m in marks), default=1)))

    def layer(self, name: str, args: Any, out: Tensor, marks: Sequence[_Marks]) -> None:
        """A product with weights: new labels along its channels."""
        left, weight, at = (args[1], args[2], 1) if name == "addmm" else (args[0], args[1], 0)
        axis = 1 if name == "convolution" else out.ndim - 1
        path = self.names.get(weight.untyped_storage()._cdata)
        if path is None and name != "convolution" and bool((marks[at + 1].labels >= 0).any()):
            return  # two activations
        path = (path or f"product {len(self.layers) + 1}").removesuffix(".weight")
        again = sum(layer.path.split(" (")[0] == path for layer in self.layers)
        own = marks[at].labels
        own = own[0].flatten(1).T if name == "convolution" else own.reshape(self.batch, -1, left.shape[-1])[0]  # [P, C]
        reads = torch.where(own.amin(0) == own.amax(0), own[0], torch.full_like(own[0], NONE)).long()
        count, numbers = out.shape[axis], torch.arange(out.shape[axis], dtype=torch.float64) + self.labels
        labels = numbers.view([-1 if d == axis else 1 for d in range(out.ndim)]).expand(out.shape)
        size, step = _widened(name, args, marks[at])
        path = f"{path} ({again + 1})" if again else path
        self.layers.append(Layer(path, self.labels, count, self.calls, self.calls, reads, reads, size))
        self.labels += count
        self.put(out, _Marks(labels, size, step))

    def pool(self, name: str, args: Any, out: Tensor, marks: _Marks) -> None:
        """The label of what is joined, where it is one."""
        if name in _MEANS:
            dims = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else None
            if not dims:
                return
            same = marks.labels.amin(dims, True) == marks.labels.amax(dims, True)
            kept = torch.where(same, marks.labels.amax(dims, True), torch.full_like(same, NONE, dtype=torch.float64))
            self.seen.put(out, _Marks(kept.reshape(out.shape), 0, 1))
            return
        flat = marks.labels.flatten(2)
        label = torch.where(flat.amin(2) == flat.amax(2), flat[:, :, 0], torch.full_like(flat[:, :, 0], NONE))
        size, step = _widened(name, args, marks, out)
        self.seen.put(out, _Marks(label.view(*label.shape, *[1] * (out.ndim - 2)).expand(out.shape), size, step))

    def change(self, name: str, args: Any, kwargs: Any, out: Tensor, marks: Sequence[_Marks]) -> None:
        """Number by number: a sum of two layers' maps goes on as the later one's, all else as what it was."""
        fit = [_fitted(m, out) for m in marks]
        size = 0 if any(not m.field for m in marks) else max((m.field for m in marks), default=1)
        step = max((m.step for m in marks), default=1)
        labels = [m for m in fit if m is not None and bool((m >= 0).any())]
        if not labels:
            return
        later = labels[0]
        if name in _SUMS and len(labels) == 2:
            later = torch.maximum(*labels)
            for k, own in enumerate(labels):
                source = torch.where((own >= 0) & (own < later), own, torch.full_like(own, NONE))[0].flatten().long()
                if bool((source >= 0).any()):
                    scale = float(kwargs.get("alpha", 1)) * (-1 if "sub" in name else 1) if k else 1.0
                    self.skips.append(Skip(self.calls, k, scale, source, later[0].flatten().long()))
        self.put(out, _Marks(later, size, step))

    def put(self, out: Tensor, marks: _Marks) -> None:
        """Note the marks, and that a layer can be looked at here if these are all its channels and no other's."""
        self.seen.put(out, marks)
        numbers = marks.labels[0].flatten().long() if len(out) == self.batch else marks.labels.flatten().long()
        low, high = int(numbers.min()), int(numbers.max())
        for i, layer in enumerate(self.layers):
            if low == layer.first and high == low + layer.count - 1 and len(numbers.unique()) == layer.count:
                numbers = numbers if len(out) == self.batch else numbers.view(self.batch, -1)[0]
                whole = len(out) == self.batch
                shape = tuple(out.shape[1:]) if whole else (len(numbers) // layer.count, layer.count)
                self.layers[i] = replace(
                    layer, seen=self.calls, channels=numbers - layer.first, field=marks.field, shape=shape
                )


def _floats(args: Any) -> list[Tensor]:
    return [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_floating_point()]


def _fitted(marks: _Marks, out: Tensor) -> Tensor | None:
    """The labels of an operand as wide as the result, if the operand varies along it."""
    try:
        return marks.labels.expand(out.shape)
    except RuntimeError:
        return None


def _widened(name: str, args: Any, marks: _Marks, out: Tensor | None = None) -> tuple[int, int]:
    """Field and step after a window slid over a map; the longer side counts."""
    if name in ("mm", "addmm") or not marks.field:
        return 0, 1
    if name == "convolution":
        if args[6]:
            return 0, 1
        kernel, stride, gaps = list(args[1].shape[2:]), args[3], args[5]
    elif out is not None and "adaptive" in name:
        kernel = stride = [-(-a // b) for a, b in zip(args[0].shape[2:], out.shape[2:], strict=True)]
        gaps = [1]
    else:
        kernel, stride, gaps = args[1], (args[2] if len(args) > 2 and args[2] else args[1]), [1]
    return marks.field + (max(kernel) - 1) * max(gaps) * marks.step, marks.step * max(stride)
