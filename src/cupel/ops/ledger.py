"""What one forward of a network does: multiply-adds by module, and how long every buffer lives.

One run is recorded at torch's dispatcher, below all modules, so that a functional call counts as much
as a layer, and quantised kernels as much as float ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from cupel.ops.products import Product, product_of


@dataclass(frozen=True)
class Op:
    """One call of the dispatcher.

    Args:
        module: path of the innermost module that was running.
        unit: number of the kernel it belongs to: one layer of `torch.nn`, or one functional call.
        name: such as `aten.addmm`.
        macs: multiply-adds.
        buffers: numbers of the buffers it reads or writes, parameters left out.
        product: sizes of the matrix product it computes, if it is one.
    """

    module: str
    unit: int
    name: str
    macs: int
    buffers: frozenset[int]
    product: Product | None = None


@dataclass
class Ledger:
    """All calls of one forward, and the size in bytes of every buffer they touch."""

    ops: list[Op] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    kernels: set[int] = field(default_factory=set)  # units in which several ops may run
    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()

    def macs(self) -> dict[str, int]:
        """Multiply-adds by path of the module that ran them."""
        found: dict[str, int] = {}
        for op in self.ops:
            found[op.module] = found.get(op.module, 0) + op.macs
        return found

    def products(self) -> list[tuple[str, Product]]:
        """The matrix products in the order they ran, each with the path of its module."""
        return [(op.module, op.product) for op in self.ops if op.product is not None]

    def live_bytes(self) -> list[int]:
        """Bytes of activations that must be held while each unit runs, in order.

        A buffer lives from the unit that makes it to the last that uses it; the inputs from the start,
        the outputs to the end. What begins and ends inside one layer's kernel is its workspace and is
        left out, and so are parameters.
        """
        units = 1 + max((op.unit for op in self.ops), default=0)
        first = dict.fromkeys(self.inputs, 0)
        last = dict.fromkeys(self.inputs, 0)
        for op in self.ops:
            for b in op.buffers:
                first.setdefault(b, op.unit)
                last[b] = op.unit
        last |= dict.fromkeys(self.outputs, units - 1)
        change = [0] * (units + 1)
        for b, begin in first.items():
            workspace = begin == last[b] and begin in self.kernels and b not in self.inputs | self.outputs
            if not workspace:
                change[begin] += self.sizes[b]
                change[last[b] + 1] -= self.sizes[b]
        live, held = 0, []
        for step in change[:-1]:
            live += step
            held.append(live)
        return held


def ledger_of(model: nn.Module, inputs: Any) -> Ledger:
    """Record one forward of `model` on `inputs`, without gradients; modules keep their modes.

    Multiply-adds are those of matrix products, convolutions, recurrent layers and attention, with
    padded borders counted; a product with a sparse matrix counts its stored entries. Elementwise work,
    normalisation, pooling and transforms count none. A weight of zero in a dense matrix is multiplied
    like any other.
    """
    inputs = tree_map_only(Tensor, torch.clone, inputs)  # a row of a data set is a view of all of it
    recorder = _Recorder(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one fused call would hide every product in it
    try:
        with torch.no_grad(), _tracked(model, recorder), recorder:
            out = model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    recorder.ledger.inputs = recorder.buffers_of(inputs)
    recorder.ledger.outputs = recorder.buffers_of(out)
    return recorder.ledger


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = Ledger()
        self.stack: list[tuple[str, int | None]] = []  # path, and unit if the module is one kernel
        self.units = 0
        # Storages are kept, so that an address names one buffer during the whole run.
        self.kept: list[torch.UntypedStorage] = []
        self.numbers: dict[int, int] = {}
        fixed = chain(model.parameters(), model.buffers())
        self.fixed = {s._cdata for t in fixed for s in _storages(t)}

    def buffers_of(self, values: object) -> frozenset[int]:
        found = set()
        for leaf in tree_leaves(values):
            for storage in _storages(leaf) if isinstance(leaf, Tensor) else ():
                if storage._cdata in self.fixed:
                    continue
                if storage._cdata not in self.numbers:
                    self.numbers[storage._cdata] = len(self.kept)
                    self.kept.append(storage)
                    self.ledger.sizes.append(storage.nbytes())
                found.add(self.numbers[storage._cdata])
        return frozenset(found)

    def new_unit(self) -> int:
        self.units += 1
        return self.units - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        path, unit = self.stack[-1] if self.stack else ("", None)
        touched = self.buffers_of((args, kwargs or {}, out))
        here = self.new_unit() if unit is None else unit
        macs = macs_of(func, args, kwargs or {}, out)
        name = str(func.overloadpacket)
        product = product_of(name, args, out, self.is_fixed) if macs else None
        self.ledger.ops.append(Op(path, here, name, macs, touched, product))
        return out

    def is_fixed(self, t: Tensor) -> bool:
        return any(storage._cdata in self.fixed for storage in _storages(t))


def _storages(t: Tensor) -> Iterator[torch.UntypedStorage]:
    if t.layout == torch.strided:
        yield t.untyped_storage()
    elif t.layout == torch.sparse_coo:
        yield t._indices().untyped_storage()
        yield t._values().untyped_storage()
    elif t.layout == torch.sparse_csr:
        for part in (t.crow_indices(), t.col_indices(), t.values()):
            yield part.untyped_storage()


@contextmanager
def _tracked(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Keep the recorder's stack of running modules; the hooks are removed at the end."""
    handles = []
    for path, module in model.named_modules():
        # Layers of torch.nn are one kernel each; a module of one's own can say so with `one_kernel`.
        plain = type(module).__module__.startswith("torch.") and not any(module.children())
        kernel = path != "" and (plain or getattr(module, "one_kernel", False))
        handles.append(module.register_forward_pre_hook(_entering(recorder, path, kernel), prepend=True))
        handles.append(module.register_forward_hook(_leaving(recorder)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(recorder: _Recorder, path: str, kernel: bool) -> Callable[[nn.Module, Any], None]:
    def called(_: nn.Module, args: Any) -> None:
        unit = recorder.stack[-1][1] if recorder.stack else None
        if unit is None and kernel:
            unit = recorder.new_unit()
            recorder.ledger.kernels.add(unit)
        recorder.stack.append((path, unit))

    return called


def _leaving(recorder: _Recorder) -> Callable[[nn.Module, Any, Any], None]:
    def called(_: nn.Module, args: Any, out: Any) -> None:
        recorder.stack.pop()

    return called


def macs_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Multiply-adds of one call of the dispatcher."""
    packet = func.overloadpacket
    name = str(packet)
    matrix = next((a for a in args if isinstance(a, Tensor) and a.layout != torch.strided), None)
    if matrix is not None:
        products = ("mm", "addmm", "mv", "_sparse_mm", "_sparse_addmm", "_sparse_mm_reduce_impl")
        columns = out.shape[-1] if isinstance(out, Tensor) and out.ndim > 1 else 1
        return int(matrix._nnz() * columns) if name.removeprefix("aten.") in products else 0
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
    if name.startswith("quantized.") and len(args) > 1 and hasattr(args[1], "unpack"):
        weight = args[1].unpack()[0]
        return int(out.numel() * (weight.numel() // weight.shape[0]))
    return _OTHER[name](args) if name in _OTHER else 0


def _attention(args: Any) -> int:
    query, key, value = (tuple(t.shape) for t in args[:3])  # [..., L, D]
    return int(prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _recurrent(args: Any) -> int:
    weights = args[1:3] if isinstance(args[1], Tensor) else [w for w in args[1] if w.ndim > 1]
    return int(prod(args[0].shape[:-1]) * sum(w.numel() for w in weights))  # inputs [T, B, D]


_OTHER: dict[str, Callable[[Any], int]] = {  # what torch's own registry of formulas leaves out
    "aten.mv": lambda args: args[0].numel(),
    "aten.addmv": lambda args: args[1].numel(),
    "aten.dot": lambda args: args[0].numel(),
    "aten.vdot": lambda args: args[0].numel(),
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten.mkldnn_rnn_layer": _recurrent,
    "aten._cudnn_rnn": _recurrent,
}
