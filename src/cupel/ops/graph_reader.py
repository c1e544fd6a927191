"""The graph of one forward: operations with their settings and shapes, which feeds which, and counts of its tokens.

One run is recorded at torch's dispatcher, so that a functional call counts as much as a layer, and a network read
from a file as much as one built in Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cupel.core.types import still

# Operations that only rename or copy what they are given: no nodes of the graph.
_PASSING = frozenset({
    "alias", "as_strided", "clone", "contiguous", "copy_", "detach", "detach_", "expand", "expand_copy", "lift_fresh",
    "permute", "reshape", "slice", "squeeze", "squeeze_", "t", "transpose", "transpose_", "unsqueeze", "unsqueeze_",
    "view", "_unsafe_view", "_reshape_alias", "_to_copy", "to_dense",
})  # fmt: skip
_SOURCES = frozenset({
    "empty", "zeros", "ones", "full", "arange", "zeros_like", "ones_like", "empty_like", "new_zeros", "rand", "randn",
})  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One operation: `kind` such as `convolution`, its settings, the shapes it makes, and the nodes that feed it."""

    kind: str
    settings: str
    shapes: tuple[tuple[int, ...], ...]
    fed_by: tuple[int, ...]


@dataclass
class Graph:
    """Nodes in the order they ran; -1 among `fed_by` is the network's input. `last`: nodes that make the output."""

    nodes: list[Node] = field(default_factory=list)
    last: tuple[int, ...] = ()

    def pairs(self) -> Counter[str]:
        """How often each kind feeds each kind, with the ends marked: `[input]>convolution`, `addmm>[output]`."""
        found: Counter[str] = Counter()
        for node in self.nodes:
            for before in node.fed_by:
                found[f"{self._kind(before)}>{node.kind}"] += 1
        found.update(f"{self._kind(n)}>[output]" for n in self.last)
        return found

    def settings(self) -> Counter[str]:
        """How often each operation runs with each settings: `convolution k3x3 s1x1 p1x1`."""
        return Counter(f"{node.kind} {node.settings}".strip() for node in self.nodes)

    def dimensions(self) -> Counter[str]:
        """How often each size stands in the shapes that operations make, the batch left out: `d64`."""
        return Counter(f"d{size}" for node in self.nodes for shape in node.shapes for size in shape[1:])

    def tokens(self) -> Counter[str]:
        """All three counts in one; their names do not meet."""
        return self.pairs() + self.settings() + self.dimensions()

    def _kind(self, number: int) -> str:
        return "[input]" if number < 0 else self.nodes[number].kind


def read_graph(model: nn.Module, inputs: Any) -> Graph:
    """The graph of `model` on `inputs` (a few examples), in evaluation mode, without gradients.

    Operations on parameters alone are left out, and so are views and copies.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one fused call would hide every product in it
    recorder = _Recorder(inputs)
    try:
        with still(model), torch.no_grad(), recorder:
            out = model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    recorder.graph.last = recorder.makers(out)
    return recorder.graph


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.kept: list[Tensor] = []  # an id is only unique while its object lives
        self.maker: dict[int, tuple[int, ...]] = {}
        self.note(inputs, (-1,))

    def note(self, values: Any, makers: tuple[int, ...]) -> None:
        for leaf in _tensors(values):
            self.kept.append(leaf)
            self.maker[id(leaf)] = makers

    def makers(self, values: Any) -> tuple[int, ...]:
        """Nodes that made these values, each once, in the order they are given."""
        return tuple(dict.fromkeys(n for leaf in _tensors(values) for n in self.maker.get(id(leaf), ())))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).partition(".")[2]
        fed_by = self.makers((args, kwargs or {}))
        if name in _PASSING or not fed_by or name in _SOURCES:
            self.note(out, fed_by)
            return out
        # What is written in place is the same operation.
        kind = name.rstrip("_") if name.endswith("_") and not name.startswith("_") else name
        shapes = tuple(tuple(t.shape) for t in _tensors(out) if t.numel())
        self.graph.nodes.append(Node(kind, settings_of(kind, args), shapes, fed_by))
        self.note(out, (len(self.graph.nodes) - 1,))
        return out


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def settings_of(kind: str, args: Sequence[Any]) -> str:
    """Settings of a call in short: kernel, stride, padding and groups of a convolution, plain numbers of others."""
    if kind == "convolution" and len(args) > 8:
        x, weight, groups = args[0], args[1], args[8]
        how = "depthwise" if groups == x.shape[1] > 1 else "grouped" if groups > 1 else "dense"
        sizes = " ".join(f"{k}{_by(v)}" for k, v in (("k", weight.shape[2:]), ("s", args[3]), ("p", args[4])))
        return f"{sizes} {how}{' bias' if args[2] is not None else ''}"
    plain = [a for a in args[1:] if isinstance(a, (bool, int, str)) or _sizes(a)]
    return " ".join(_by(a) if isinstance(a, (list, tuple)) else str(a) for a in plain)[:40]


def _sizes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and 0 < len(value) <= 3 and all(isinstance(v, int) for v in value)


def _by(sizes: Sequence[int]) -> str:
    return "x".join(str(int(s)) for s in sizes)


def vector(counts: Mapping[str, int], vocabulary: Sequence[str]) -> Tensor:
    """log(1 + count) of every word of a vocabulary, `[V]`."""
    return torch.tensor([counts.get(word, 0) for word in vocabulary], dtype=torch.float32).log1p()
