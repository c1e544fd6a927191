"""Real calls of torch's functions, recorded, and the same calls with other sizes and numbers.

Calls of one function with the same layout of arguments, ranks and types are one *instance*. Its symbols are the sizes
of its tensors and its whole-number arguments; arguments named `dim` or `axis` stay what they are.

Source: J. Liu et al., NeuRI, ESEC/FSE 2023, arXiv 2302.02261, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_unflatten

from cupel.ops.operator_specs import DTYPES

AXES = {"dim", "dims", "axis", "dim0", "dim1", "start_dim", "end_dim", "axes", "source", "destination"}
MOST_ELEMENTS = 1 << 18  # of a tensor that is tried
_LETTERS = {dtype: letter for letter, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """One leaf of the arguments: a tensor of a type and rank, a whole number, or something that stays."""

    kind: str  # "tensor", "number", "constant"
    dtype: str = ""
    rank: int = 0
    value: Any = None


@dataclass(frozen=True)
class Instance:
    """One way to call a function; `rows` are the symbols of calls that worked, `results` the shapes they gave."""

    name: str
    function: Callable[..., Any]
    slots: tuple[Slot, ...]
    spec: TreeSpec
    symbols: tuple[str, ...]
    dtype: str  # of the result
    rows: tuple[tuple[int, ...], ...] = ()

    @property
    def key(self) -> str:
        told = [
            s.dtype + str(s.rank) if s.kind == "tensor" else "n" if s.kind == "number" else repr(s.value)
            for s in self.slots
        ]
        return f"{self.name}({', '.join(told)})"

    @property
    def tensors(self) -> tuple[Slot, ...]:
        return tuple(s for s in self.slots if s.kind == "tensor")

    def shapes(self, row: Sequence[Any]) -> list[list[Any]]:
        """Shapes of the tensors for values of the symbols."""
        at, found = 0, []
        for slot in self.slots:
            width = slot.rank if slot.kind == "tensor" else slot.kind == "number"
            if slot.kind == "tensor":
                found.append(list(row[at : at + width]))
            at += width
        return found

    def call(self, tensors: Sequence[Any], row: Sequence[int]) -> Any:
        """The function on tensors, with the whole numbers of `row`."""
        at, leaves, given = 0, [], iter(tensors)
        for slot in self.slots:
            if slot.kind == "tensor":
                leaves.append(next(given))
                at += slot.rank
            elif slot.kind == "number":
                leaves.append(int(row[at]))
                at += 1
            else:
                leaves.append(slot.value)
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)

    def tried(self, row: Sequence[int]) -> tuple[int, ...] | None:
        """Shape of the result for these symbols; `None` if torch refuses, or the result or an input is empty."""
        shapes = self.shapes(row)
        if any(n < 1 for s in shapes for n in s) or any(_count(s) > MOST_ELEMENTS for s in shapes):
            return None
        tensors = [torch.ones(s, dtype=DTYPES[slot.dtype]) for s, slot in zip(shapes, self.tensors, strict=True)]
        try:
            with torch.no_grad():
                out = self.call(tensors, row)
        except Exception:  # torch refuses in many ways
            return None
        good = isinstance(out, Tensor) and out.numel() and _LETTERS.get(out.dtype) == self.dtype
        return tuple(out.shape) if good else None


def _count(shape: Iterable[int]) -> int:
    found = 1
    for n in shape:
        found *= n
    return found


@dataclass
class Recorder:
    """Calls of the functions that are watched, gathered by instance."""

    watched: Mapping[Callable[..., Any], str]
    found: dict[str, tuple[Instance, dict[tuple[int, ...], None]]] = field(default_factory=dict)

    def note(self, function: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        if not isinstance(out, Tensor) or out.dtype not in _LETTERS:
            return
        leaves, spec = tree_flatten_with_path((args, kwargs))
        slots, symbols, row = list[Slot](), list[str](), list[int]()
        for path, leaf in leaves:
            words = [str(getattr(p, "key", getattr(p, "idx", ""))) for p in path[1:]]
            name = "_".join(w if w.isidentifier() else f"a{w}" for w in words)
            if isinstance(leaf, Tensor):
                if leaf.dtype not in _LETTERS:
                    return
                slots.append(Slot("tensor", _LETTERS[leaf.dtype], leaf.ndim))
                symbols += [f"{name}_{d}" for d in range(leaf.ndim)]
                row += list(leaf.shape)
            elif type(leaf) is int and not AXES & set(words):
                slots.append(Slot("number"))
                symbols.append(name)
                row.append(leaf)
            else:
                slots.append(Slot("constant", value=leaf))
        if not any(s.kind == "tensor" for s in slots):
            return
        made = Instance(self.watched[function], function, tuple(slots), spec, tuple(symbols), _LETTERS[out.dtype])
        key = made.key + str(spec) + made.dtype
        self.found.setdefault(key, (made, {}))[1][tuple(row)] = None

    def instances(self) -> list[Instance]:
        return [Instance(**{**vars(i), "rows": tuple(rows)}) for i, rows in self.found.values()]


class _Watching(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder, self.inside = recorder, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside or func not in self.recorder.watched:
            return func(*args, **kwargs)
        self.inside = True  # what a function calls itself is not the user's call
        try:
            with self:
                out = func(*args, **kwargs)
        finally:
            self.inside = False
        self.recorder.note(func, args, kwargs, out)
        return out


@contextmanager
def recording(functions: Mapping[str, Callable[..., Any]]) -> Iterator[Recorder]:
    """Inside, calls of these functions (by name) that return one tensor are recorded; nothing else changes."""
    recorder = Recorder({function: name for name, function in functions.items()})
    with _Watching(recorder):
        yield recorder
