"""Probe `cost`: parameters, multiply-adds, bytes on disk and bytes of activations, all counted, none timed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.protocols import Card
from cupel.core.scorecard import Readings, exact
from cupel.core.shelf import BITS
from cupel.core.types import Subject, still
from cupel.ops.ledger import Ledger, ledger_of
from cupel.storage.state import size_of

CARD = Card(
    name="cost",
    family="cost",
    source="counted, not estimated: multiply-adds at torch's dispatcher; activation liveness as in J. Lin, W.-M. Chen, "
    "H. Cai, C. Gan, S. Han, MCUNetV2, NeurIPS 2021, arXiv 2110.15352, section 3",
    tags=("size", "operations", "memory"),
    readings=("params", "nonzero_params", "operations", "size_bytes", "peak_activation_bytes"),
)


def stored_values(module: nn.Module) -> dict[str, Tensor]:
    """The learned numbers a module itself holds, by name: parameters, or the weights inside torch's int8 kernels."""
    found = {name: p.detach() for name, p in module._parameters.items() if p is not None}
    for name in ("weight", "bias"):
        kernel = getattr(module, name, None)
        if callable(kernel) and "quantized" in type(module).__module__:
            value = kernel()
            if value is not None:
                found[name] = value.dequantize() if value.is_quantized else value.detach()
    return found


def stored_bits(module: nn.Module, own: Mapping[str, Tensor]) -> float | None:
    """Bits of a value of a module's weight matrices where the network is stored; `None` without matrices.

    Codes count, and not the few scales beside them.
    """
    matrices = {name: t for name, t in own.items() if t.ndim > 1}
    if not matrices:
        return None
    if "quantized" in type(module).__module__:
        return 8.0
    if not hasattr(module, "packed_state"):
        return float(8 * next(iter(matrices.values())).element_size())
    codes = [t for t in module.packed_state().values() if not t.is_floating_point()]
    if not codes:  # it does not pack at present
        return float(8 * next(iter(matrices.values())).element_size())
    return 8 * sum(t.numel() * t.element_size() for t in codes) / sum(t.numel() for t in matrices.values())


def by_bits(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Multiply-adds of one forward by the width of the weights they read, narrowest first."""
    found: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row["bits"] or math.inf):
        width = "no weights" if row["bits"] is None else f"{row['bits']:.3g}"
        found[width] = found.get(width, 0) + row["macs"]
    return [{"bits": width, "operations": macs} for width, macs in found.items() if macs]


def layer_table(model: nn.Module, ledger: Ledger, bits: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row a module that holds weights or multiplies: params, sparsity of its matrices, bits, macs.

    A weight that several modules share counts in the first of them.
    """
    macs, rows, seen = ledger.macs(), [], set()
    for path, module in model.named_modules():
        own = {name: t for name, t in stored_values(module).items() if id(module._parameters.get(name, t)) not in seen}
        seen |= {id(p) for p in module._parameters.values() if p is not None}
        if not own and not macs.get(path):
            continue
        matrices = [t for t in own.values() if t.ndim > 1]
        entries = sum(t.numel() for t in matrices)
        rows.append(
            {
                "layer": path or "(model)",
                "kind": type(module).__name__,
                "params": sum(t.numel() for t in own.values()),
                "nonzero": sum(int(t.count_nonzero()) for t in own.values()),
                "sparsity": 1 - sum(int(t.count_nonzero()) for t in matrices) / entries if entries else 0.0,
                "bits": bits.get(path, stored_bits(module, own)),
                "macs": macs.get(path, 0),
            }
        )
    return rows


def _from_graph(found: Mapping[str, Any]) -> Readings:
    """Readings from the counts of a graph; a missing one is not a number, and a note says why."""
    units = {"params": "params", "nonzero_params": "params", "operations": "ops"}
    numbers = {name: math.nan if found[name] is None else found[name] for name in CARD.readings}
    return Readings(
        {name: exact(value, units.get(name, "bytes"), "lower") for name, value in numbers.items()},
        ("counted from the graph in the file, not from modules", *found["notes"]),
        {"layers": found["layers"]},
    )


@dataclass(frozen=True)
class Cost:
    """What the network costs to store and to run on one input, without a clock.

    - `params`: learned numbers it stores, tied ones once; `nonzero_params`: those that are not zero.
    - `operations`: multiply-adds of one forward of one input (one graph, where the data are one graph),
      counted from the calls that reach torch's dispatcher: matrix products, convolutions, recurrent
      layers and attention, in float or int8. Zeros in a dense matrix are multiplied like other numbers,
      so masks lower `size_bytes` and not `operations`.
    - `size_bytes`: bytes that `storage.state` really writes for the network.
    - `peak_activation_bytes`: the most bytes of activations that must be held at once, from the liveness
      of every buffer in the recorded forward: a buffer is held from the call that makes it to the last
      one that reads it, inputs and outputs of the running call included, parameters not. A layer's inner
      workspace is left out. Values are counted in the bytes that torch holds them in: activations that
      are only computed on a coarse grid (`dqa`) stay float here; their effective bits are in the table.

    The table of layers tells the bits of a weight as stored (or as the technique that quantised it tells), and a
    second one the operations by these widths.

    A network that is no modules but a graph (an ONNX file) says its own cost, counted node by node from the
    shapes in it, with `graph_cost(inputs)`; `size_bytes` is then the file, and what cannot be counted is a note.

    Source: liveness as in Lin et al. 2021, section 3.

    Departs: no in-place depthwise convolution; torch has none.

    Example:
        >>> Cost()
        Cost()
    """

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        model = subject.model
        if not len(subject.data.test):
            raise NotApplicable("cost must have a test input to count on; there is none. Give test data.")
        if callable(getattr(model, "graph_cost", None)):
            return _from_graph(model.graph_cost(next(iter(subject.data.test.batches(1))).inputs))  # type: ignore[operator]
        tensors = chain(model.parameters(), model.buffers())
        device = next((t.device for t in tensors), torch.device("cpu"))
        inputs = next(iter(subject.data.test.batches(1))).to(device).inputs
        with still(model), ctx.scope("forward"):
            ledger = ledger_of(model, inputs)
        if not ledger.ops:
            raise NotApplicable("cost must see what the network computes; this one runs outside torch. Leave it out.")
        known = subject.shelf is not None and BITS in subject.shelf
        bits = subject.shelf.get(BITS) if known and subject.shelf is not None else {}
        rows = layer_table(model, ledger, bits)
        return Readings.of(
            params=exact(sum(r["params"] for r in rows), "params", "lower"),
            nonzero_params=exact(sum(r["nonzero"] for r in rows), "params", "lower"),
            operations=exact(sum(op.macs for op in ledger.ops), "ops", "lower"),
            size_bytes=exact(size_of(model), "bytes", "lower"),
            peak_activation_bytes=exact(max(ledger.live_bytes()), "bytes", "lower"),
            figures={"layers": rows, "operations by bits": by_bits(rows)},
        )
