"""Opening an ONNX file: parsed as data, checked for everything that points outside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cupel.core.errors import CupelError, MissingExtra

MAX_BYTES = 2_000_000_000  # what one protobuf message can hold
MAX_VALUES = 1 << 30  # elements of one tensor inside the network
# Operators of onnxruntime's own domain that open files or hand the work to other libraries.
_OUTSIDE = {"EPContext", "ExternalCustomOp", "Snpe", "PyOp", "TritonOp", "TorchEmbedding", "ATen"}
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}


def libraries() -> tuple[Any, Any]:
    """The modules `onnx` and `onnxruntime`.

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise MissingExtra("onnx", "onnx") from None
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnxruntime", "onnx") from None
    return onnx, onnxruntime


def parsed(path: Path) -> Any:
    """The `ModelProto` of a file, with tensors from files beside it taken in; none of its operators has run.

    Raises:
        CupelError: not whole, too large, custom operators, or tensors that lie outside the file's folder.
    """
    onnx, _ = libraries()
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise CupelError(f"{path.name} must have 1 to {MAX_BYTES} bytes; it has {size}. Take another copy.")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf has several decode errors, by its implementation
        raise CupelError(
            f"{path.name} must be a whole ONNX file; reading it failed: {str(error)[:120]}. Take another copy."
        ) from None
    if not model.graph.node or not model.opset_import:
        raise CupelError(f"{path.name} must hold a graph; it holds none. Take another copy, or export it again.")
    _check_operators(model, path)
    room = MAX_BYTES - size
    for tensor in tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            room -= _take_in(tensor, path)
            if room < 0:
                raise CupelError(
                    f"{path.name} and the tensors beside it must stay under {MAX_BYTES} bytes; they do not. "
                    "Bring the network as pkg.module:factory with --weights."
                )
    return model


def nodes_of(graph: Any) -> Iterator[Any]:
    """All nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from nodes_of(inner)


def _graphs_of(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs_of(inner)


def tensors_of(model: Any) -> Iterator[Any]:
    """Every tensor in the file, also those in attributes, inner graphs and functions."""
    for graph in _graphs_of(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in (*nodes_of(model.graph), *(n for f in model.functions for n in nodes_of(f))):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
                           *attribute.sparse_tensors):  # fmt: skip
                yield from (sparse.values, sparse.indices)


def _check_operators(model: Any, path: Path) -> None:
    own = {(f.domain, f.name) for f in model.functions}
    for node in (*nodes_of(model.graph), *(n for f in model.functions for n in nodes_of(f))):
        known = node.domain in _DOMAINS and node.op_type not in _OUTSIDE
        if not known and (node.domain, node.op_type) not in own:
            raise CupelError(
                f"operators of {path.name} must be ONNX's own; it uses {node.op_type[:60]!r} of {node.domain[:60]!r}, "
                "for which a library would have to be loaded. Export the network with standard operators."
            )


def _take_in(tensor: Any, path: Path) -> int:
    """Read the values of an external tensor into the model; returns their bytes."""
    told = {entry.key: entry.value for entry in tensor.external_data}
    place = told.get("location", "")
    folder = path.resolve().parent
    file = (folder / place).resolve() if place and "\0" not in place else folder
    inside = not Path(place).is_absolute() and "\\" not in place and file.is_relative_to(folder) and file != folder
    if not inside:
        raise CupelError(
            f"tensors of {path.name} must lie in its folder; {tensor.name[:60]!r} points to {place[:80]!r}. "
            "Take the model from its source together with its data file."
        )
    if not file.is_file():
        raise CupelError(
            f"{place[:80]} must lie beside {path.name}, which keeps its tensors there; it does not. Copy it too."
        )
    begin, size = (told.get(key, "0") for key in ("offset", "length"))
    whole = file.stat().st_size
    good = begin.isascii() and begin.isdigit() and size.isascii() and size.isdigit() and len(begin + size) < 30
    length = (int(size) or whole - int(begin)) if good else -1
    if not good or length < 0 or int(begin) + length > whole or length > MAX_BYTES:
        raise CupelError(
            f"{tensor.name[:60]!r} of {path.name} must lie within {place[:80]} ({whole} bytes); it claims {size[:20]} "
            f"bytes at {begin[:20]}. Take another copy of both files."
        )
    with file.open("rb") as data:
        data.seek(int(begin))
        tensor.raw_data = data.read(length)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    return length
