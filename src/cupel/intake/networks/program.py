"""Opening a `.pt2` file of `torch.export.save` without torch's own loader.

`torch.export.load` unpickles sample inputs, weights and constants, evaluates the text of symbolic sizes with
sympy, resolves operator names through any attribute of `torch`, imports modules that a tree spec names and
loads compiled libraries. Here none of that is done: the graph is read from its JSON as data, operators come
from a closed list, tensors are bytes with a checked shape, and sample inputs, guards, call specs and metadata
other than module names are not read at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cupel.core.errors import CupelError
from cupel.intake.networks.archive import DTYPES, Archive, number, payloads
from cupel.intake.networks.graph import PATH, Node, made_by, name_of, nodes_of, only

SCHEMA = 8  # major version of the schema that this reader knows
_READ = ("models/model.json", "data/weights/", "data/constants/")
_IDLE = ("archive_format", "archive_version", "byteorder", "version", ".data/", ".format_version", ".storage_alignment")
_UNREAD = ("data/sample_inputs/", "extra/")


@dataclass(frozen=True)
class Tied:
    """A parameter or buffer by its name in the network."""

    name: str
    tensor: Tensor
    is_param: bool
    trains: bool = True
    persistent: bool = True


@dataclass(frozen=True)
class Program:
    """The content of one `.pt2` file, as data."""

    held: Mapping[str, Tied]  # by the name of the graph's placeholder
    input: str
    shape: tuple[int | None, ...]
    hints: tuple[int, ...]
    dtype: torch.dtype
    nodes: tuple[Node, ...]
    output: str
    ranks: Mapping[str, int]  # number of dimensions of every value, as declared


def read_program(path: Path) -> Program:
    """Read a `.pt2` file; nothing in it runs.

    Raises:
        CupelError: not whole, of another format, or with content that only code could read.
    """
    with path.open("rb") as file:
        archive = Archive(file, path.name)
        _check_entries(archive)
        whole = archive.json("models/model.json")
        try:
            version = number(whole["schema_version"]["major"], "schema_version")
            _need(version == SCHEMA, archive, f"have schema {SCHEMA}; it has {version}", "Export it with this torch")
            return _program(archive, whole["graph_module"])
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
            raise CupelError(
                f"{path.name} must be a program of torch.export; its graph cannot be read "
                f"({type(error).__name__}: {str(error)[:120]}). Export it again with torch.export.save."
            ) from None


def _need(holds: bool, archive: Archive, what: str, do: str) -> None:
    if not holds:
        raise CupelError(f"{archive.name} must {what}. {do}.")


def _check_entries(archive: Archive) -> None:
    if "serialized_exported_program.json" in archive:
        _need(False, archive, "be in torch's archive format; it is of torch 2.7 or older",
              "Load it with the torch that wrote it and save it again with torch 2.9 or newer")  # fmt: skip
    _need("models/model.json" in archive and "archive_format" in archive, archive,
          "be a program written by torch.export.save; it is another zip archive",
          "A file of torch.save goes in with pkg.module:factory and --weights")  # fmt: skip
    for name in archive.names:
        if name.startswith(("data/aotinductor/", "data/executorch/", "mtia/", "xl_model")):
            _need(False, archive, f"be a plain program; it holds compiled code ({name[:80]})",
                  "Save the exported program itself with torch.export.save")  # fmt: skip
        known = name.startswith((*_READ, *_IDLE, *_UNREAD))
        _need(known, archive, f"hold one program and its tensors; it holds {name[:80]!r}", "Export the network alone")
    _need(archive.read("archive_format") == b"pt2", archive, "say `pt2` in archive_format", "Take another copy")
    order = archive.read("byteorder") if "byteorder" in archive else b"little"
    _need(order == b"little", archive, "hold little-endian numbers", "Write it on a little-endian machine")


def _program(archive: Archive, module: Mapping[str, Any]) -> Program:
    graph, signature = module["graph"], module["signature"]
    held, inputs = _inputs(archive, signature["input_specs"])
    _need(len(inputs) == 1, archive, f"take one tensor; it takes {len(inputs)} ({', '.join(inputs)[:80]})",
          "Export a module whose forward takes one tensor")  # fmt: skip
    specs = [only(spec) for spec in signature["output_specs"]]
    mutated = sorted({kind for kind, _ in specs} - {"user_output"})
    _need(not mutated, archive, f"only return its result; it also writes back ({', '.join(mutated)})",
          "Export it in evaluation mode, and without run_decompositions")  # fmt: skip
    outputs = [only(spec["arg"]) for _, spec in specs]
    results = [arg["name"] for kind, arg in outputs if kind == "as_tensor"]
    _need(len(results) == 1 == len(outputs), archive, f"return one tensor; it returns {len(outputs)} values",
          "Export a module whose forward returns the scores alone")  # fmt: skip
    meta = graph["tensor_values"][inputs[0]]
    sizes = [_size(size) for size in meta["sizes"]]
    _need(bool(sizes), archive, "take a tensor with rows; its input is a scalar", "Export it with a batch")
    nodes = tuple(nodes_of(graph["nodes"], {*held, inputs[0]}))
    known = {*held, inputs[0]}.union(*(made_by(node) for node in nodes))
    _need(results[0] in known, archive, "compute its output; no step does", "Export it again")
    shape, hints = (tuple(pair[i] for pair in sizes) for i in (0, 1))
    ranks = {str(name): len(value["sizes"]) for name, value in graph["tensor_values"].items()}
    return Program(held, inputs[0], shape, hints, DTYPES[meta["dtype"]], nodes, results[0], ranks)  # type: ignore[arg-type]


def _size(size: Mapping[str, Any]) -> tuple[int | None, int]:
    """One dimension of the input: its size if fixed, and a size to try. The text of expressions is never read."""
    kind, value = only(size)
    if kind == "as_int":
        fixed = number(value, "a size of the input")
        if fixed < 1:
            raise ValueError(f"sizes of the input must be at least 1, got {fixed}")
        return fixed, fixed
    hint = value.get("hint")
    many = number(only(hint)[1], "a size of the input") if hint else 8
    return None, min(max(many, 1), 4096)


def _inputs(archive: Archive, specs: list[Mapping[str, Any]]) -> tuple[dict[str, Tied], list[str]]:
    tensors = payloads(archive, "weights", "weight")
    extra = payloads(archive, "constants", "constant")
    held: dict[str, Tied] = {}
    inputs = []
    for union in specs:
        kind, spec = only(union)
        if kind == "user_input":
            form, value = only(spec["arg"])
            if form == "as_tensor":
                inputs.append(name_of(value["name"]))
            continue
        if kind == "constant_input" or kind == "token":
            continue
        field_name = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
        if kind not in field_name:
            _need(False, archive, f"hold tensors alone; it holds a {kind}", "Export a network of plain tensors")
        name = str(spec[field_name[kind]])
        if not PATH.match(name) or name.split(".")[0] == "_plan":
            raise ValueError(f"parameters must have plain names, got {name[:80]!r}")
        stored = tensors.get(name) or extra.get(name)
        if stored is None:
            _need(False, archive, f"hold the values of {name}; it does not", "Take another copy")
            continue
        tensor, meta = stored
        held[name_of(spec["arg"]["name"])] = Tied(
            name,
            tensor,
            kind == "parameter",
            bool(meta.get("requires_grad", True)),
            spec.get("persistent") is not False,
        )
    return held, inputs
