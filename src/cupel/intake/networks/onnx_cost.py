"""What an ONNX graph costs to run, from the shapes that onnx infers: the same counts as for a network of modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cupel.core.errors import CupelError
from cupel.intake.networks.onnx_file import MAX_VALUES, libraries

Shape = tuple[int, ...]
_VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"}
_NOT_LEARNED = {"QuantizeLinear": {1, 2}, "DequantizeLinear": {1, 2}, "BatchNormalization": {3, 4}, "Resize": {1, 2},
                "Pad": {2}, "Clip": {1, 2}, "QLinearConv": {1, 2, 4, 5, 6, 7},
                "QLinearMatMul": {1, 2, 4, 5, 6, 7}}  # fmt: skip
_UNCOUNTED = {"Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention", "Loop", "Scan", "If"}


def inferred(model: Any, shape: Sequence[int] | None = None) -> dict[str, tuple[int | None, ...]]:
    """Shapes of all values by name; with `shape` the input has that one."""
    onnx, _ = libraries()
    if shape is not None:
        dims = _inputs(model)[0].type.tensor_type.shape.dim
        for dim, size in zip(dims, shape, strict=True):
            dim.dim_value = size
        del model.graph.value_info[:]  # as recorded for other sizes
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # onnx raises kinds of its own, and plain ones
        raise CupelError(
            f"an ONNX graph must have shapes that can be inferred; onnx says: {str(error).splitlines()[0][:160]}. "
            "Export it again, or take another copy."
        ) from None
    found: dict[str, tuple[int | None, ...]] = {}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    return found


def _inputs(model: Any) -> list[Any]:
    held = {t.name for t in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in held]


def check_sizes(model: Any, name: str) -> None:
    """Refuse a graph that declares or makes a tensor no machine would hold."""
    held = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for value, shape in (inferred(model) | held).items():
        known = [n for n in shape if n is not None]
        if min(known, default=0) < 0 or math.prod(known) > MAX_VALUES:
            raise CupelError(
                f"tensors of {name} must have at most {MAX_VALUES} values; {value[:60]!r} has shape {list(shape)}. "
                "Take another copy, or export a smaller network."
            )


def cost_of(data: bytes, shape: Shape, batch: int | None) -> dict[str, Any]:
    """Costs of one input: `params`, `nonzero_params`, `operations`, `size_bytes`, `peak_activation_bytes`, rows, notes.

    Args:
        shape: of an input, `[1, ...]`.
        batch: the batch that the file is fixed at, if it is; operations are shared out among its rows.
    """
    onnx, _ = libraries()
    model = onnx.load_model_from_string(data)
    rows = batch or shape[0]
    shapes = inferred(model, (rows, *shape[1:]))
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            weights[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    known = shapes | {name: tuple(value.shape) for name, value in weights.items()}
    layers, seen, skipped = [], set[str](), set[str]()
    for node in model.graph.node:
        macs = _macs(node, known)
        if macs is None or node.op_type in _UNCOUNTED:
            skipped.add(node.op_type)
        own = _learned(node, weights, seen)
        seen |= own.keys()
        if own or macs:
            layers.append(_row(node, own, (macs or 0) // rows))
    notes = [f"not counted: {', '.join(sorted(skipped))}, whose work the graph does not tell"] if skipped else []
    if batch not in (None, 1):
        notes.append(f"operations are of one row of the fixed batch of {batch}; activations of all of it")
    peak = _peak(model, known, onnx)
    return {
        "params": sum(r["params"] for r in layers),
        "nonzero_params": sum(r["nonzero"] for r in layers),
        "operations": sum(r["macs"] for r in layers),
        "size_bytes": len(data),
        "peak_activation_bytes": peak,
        "layers": layers,
        "notes": notes + ([] if peak else ["activations are not counted: some shapes depend on values"]),
    }


def _learned(node: Any, weights: Mapping[str, np.ndarray], seen: set[str]) -> dict[str, np.ndarray]:
    """Learned numbers that a node is the first to read: floats, or integers in matrices; no scales, no statistics."""
    skip = _NOT_LEARNED.get(node.op_type, set())
    found = {}
    for place, name in enumerate(node.input):
        value = weights.get(name)
        if value is None or name in seen or place in skip or value.ndim == 0:
            continue
        floating = value.dtype.kind == "f" or value.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
        coded = value.ndim > 1 and value.dtype.name in ("int8", "uint8", "int4", "uint4")
        if floating or coded:
            found[name] = value
    return found


def _row(node: Any, own: Mapping[str, np.ndarray], macs: int) -> dict[str, Any]:
    matrices = [v for v in own.values() if v.ndim > 1]
    entries = sum(v.size for v in matrices)
    first = next(iter(own), "").rpartition(".")[0]
    return {
        "layer": first or node.name or node.output[0],
        "kind": node.op_type,
        "params": sum(int(v.size) for v in own.values()),
        "nonzero": sum(int(np.count_nonzero(v)) for v in own.values()),
        "sparsity": 1 - sum(int(np.count_nonzero(v)) for v in matrices) / entries if entries else 0.0,
        "bits": None,
        "macs": macs,
    }


def _macs(node: Any, shapes: Mapping[str, tuple[int | None, ...]]) -> int | None:
    """Multiply-adds of a node; `None` where a shape is missing."""
    rule = _RULES.get(node.op_type)
    if rule is None:
        return 0
    told = [shapes.get(name) for name in (*node.input, node.output[0])]
    if any(s is None or None in s for s, name in zip(told, (*node.input, node.output[0]), strict=True) if name):
        return None
    return rule(node, [tuple(n or 0 for n in s or ()) for s in told])


def _conv(weight: int) -> Callable[[Any, list[Shape]], int]:
    return lambda node, s: math.prod(s[-1]) * math.prod(s[weight][1:])


def _conv_transposed(node: Any, s: list[Shape]) -> int:
    return math.prod(s[0]) * math.prod(s[1][1:])


def _gemm(node: Any, s: list[Shape]) -> int:
    turned = next((a.i for a in node.attribute if a.name == "transA"), 0)
    return math.prod(s[-1]) * s[0][0 if turned else 1]


def _matmul(left: int) -> Callable[[Any, list[Shape]], int]:
    return lambda node, s: math.prod(s[-1]) * s[left][-1]


def _recurrent(node: Any, s: list[Shape]) -> int:
    steps, rows = s[0][:2]
    return steps * rows * (math.prod(s[1]) + math.prod(s[2]))


_RULES: Mapping[str, Callable[[Any, list[Shape]], int]] = {
    "Conv": _conv(1), "FusedConv": _conv(1), "ConvInteger": _conv(1), "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transposed, "Gemm": _gemm, "MatMul": _matmul(0), "FusedMatMul": _matmul(0),
    "MatMulInteger": _matmul(0), "QLinearMatMul": _matmul(0), "LSTM": _recurrent, "GRU": _recurrent, "RNN": _recurrent,
}  # fmt: skip


def _peak(model: Any, shapes: Mapping[str, tuple[int | None, ...]], onnx: Any) -> int | None:
    """The most bytes of values that must be held while a node runs, its inputs and outputs included."""
    graph, held = model.graph, {t.name for t in model.graph.initializer}
    held |= {n.output[0] for n in graph.node if n.op_type == "Constant"}
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    types |= {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    buffer: dict[str, str] = {}
    size: dict[str, int] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}

    def touch(name: str, at: int) -> bool:
        if not name or name in held:
            return True
        root = buffer.setdefault(name, name)
        if root not in size:
            shape, kind = shapes.get(name), types.get(name)
            if shape is None or None in shape or not kind:
                return False
            size[root] = math.prod(n or 0 for n in shape) * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
        first.setdefault(root, at)
        last[root] = at
        return True

    good = all(touch(value.name, 0) for value in graph.input)
    for at, node in enumerate(graph.node):
        if node.op_type in _VIEWS and node.input and node.input[0] not in held:
            buffer[node.output[0]] = buffer.get(node.input[0], node.input[0])
        good = good and all(touch(name, at) for name in (*node.input, *node.output))
    good = good and all(touch(value.name, len(graph.node) - 1) for value in graph.output)
    if not good:
        return None
    change = [0] * (len(graph.node) + 1)
    for root, begin in first.items():
        change[begin] += size[root]
        change[last[root] + 1] -= size[root]
    return int(max(np.cumsum(change[:-1])))
