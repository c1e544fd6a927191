"""The nodes of an exported graph, read from JSON as data: names, numbers, and operators from a closed list."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cupel.core.errors import CupelError
from cupel.intake.networks.archive import DTYPES, number
from cupel.intake.networks.functions import check_target
from cupel.intake.networks.lifted import Place, Value

_NAME = re.compile(r"[A-Za-z_]\w{0,200}\Z")
PATH = re.compile(r"\w{1,120}(\.\w{1,120}){0,40}\Z")
_MEMORY = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format}
# Checks of sizes that the exporter adds: they compute nothing.
_CHECKS = re.compile(r"torch\.ops\.aten\.(_assert\w*|sym_constrain_range\w*)\.\w+\Z")


@dataclass(frozen=True)
class Node:
    """One call of the graph: arguments by the operator's own names, and where in the network it stood."""

    target: str
    args: Mapping[str, Any]
    positional: tuple[str, ...]
    out: str | tuple[str | None, ...]
    path: str = ""
    kind: str = ""


def made_by(node: Node) -> set[str]:
    return {node.out} if isinstance(node.out, str) else {name for name in node.out if name is not None}


def only(union: Mapping[str, Any]) -> tuple[str, Any]:
    """The kind and the value of a union in JSON: an object with one key."""
    given = [(kind, value) for kind, value in union.items() if value is not None or kind == "as_none"]
    if len(given) != 1:
        raise ValueError(f"a union must have one member, got {len(given)}")
    return given[0]


def name_of(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.match(name):
        raise ValueError(f"names must be plain words, got {str(name)[:80]!r}")
    return name


def nodes_of(raw: list[Mapping[str, Any]], known: set[str]) -> Iterator[Node]:
    for entry in raw:
        target = str(entry["target"])
        if _CHECKS.match(target):
            continue
        if target.startswith("torch.ops.higher_order."):
            raise CupelError(
                f"a program must be one plain graph; it calls {target[:100]}, which runs a graph of its own. "
                "Export without autocast, no_grad blocks, cond or map inside forward."
            )
        check_target(target)
        given = [
            (str(i["name"]), _decoded(i["arg"], known), i.get("kind"))
            for i in entry["inputs"]
            if i["arg"] != {"as_layout": 7}
        ]
        plain = not target.startswith("torch.ops.") or target.endswith((".sym_size.int", ".sym_numel.default"))
        if plain:
            given = [(f"arg{n}", value, 1) for n, (_, value, _) in enumerate(given)]
        out = _made(entry["outputs"])
        path, kind = _place(str(entry.get("metadata", {}).get("nn_module_stack", "")))
        positional = tuple(name for name, _, form in given if form == 1)
        node = Node(target, {name: value for name, value, _ in given}, positional, out, path, kind)
        if known & made_by(node):
            raise ValueError(f"values must have names of their own, got {sorted(known & made_by(node))[0]} twice")
        known |= made_by(node)
        yield node


def _made(outputs: list[Mapping[str, Any]]) -> str | tuple[str | None, ...]:
    parts = [only(o) for o in outputs]
    if len(parts) == 1 and parts[0][0] == "as_tensors":
        return tuple(name_of(t["name"]) for t in parts[0][1])
    names = tuple(name_of(v.get("name") or v.get("as_name")) if kind != "as_none" else None for kind, v in parts)
    return names[0] if len(names) == 1 and names[0] is not None else names


def _place(stack: str) -> tuple[str, str]:
    """Path and class name of the innermost module a call stood in."""
    parts = stack.split(";")[-1].split(",")
    path = re.sub(r"@\d+", "", parts[1]) if len(parts) == 3 else ""
    return (path, parts[2].rpartition(".")[2]) if path and PATH.match(path) else ("", "")


def _decoded(arg: Mapping[str, Any], known: set[str]) -> Any:
    kind, value = only(arg)

    def value_of(entry: Mapping[str, Any]) -> Value:
        name = name_of(entry["name"])
        if name not in known:
            raise ValueError(f"{name} is used before it is made")
        return Value(name)

    def symbol(entry: Mapping[str, Any]) -> Any:
        form, inner = only(entry)
        return value_of({"name": inner}) if form == "as_name" else _plain(form, inner)

    def maybe(entry: Mapping[str, Any]) -> Any:
        return value_of(entry["as_tensor"]) if "as_tensor" in entry else None

    each: dict[str, Callable[[Any], Any]] = {"as_tensor": value_of, "as_optional_tensor": maybe}
    each |= dict.fromkeys(("as_sym_int", "as_sym_float", "as_sym_bool"), symbol)
    many = {"as_tensors": value_of, "as_optional_tensors": maybe}
    many |= dict.fromkeys(("as_sym_ints", "as_sym_floats", "as_sym_bools"), symbol)
    if kind in each:
        return each[kind](value)
    if kind in many:
        return tuple(many[kind](v) for v in value)
    if kind in ("as_ints", "as_floats", "as_bools"):
        return tuple(_plain(kind[:-1], v) for v in value)
    return _plain(kind, value)


def _plain(kind: str, value: Any) -> Any:
    if kind == "as_none":
        return None
    if kind == "as_int":
        return number(value, "a number of the graph")
    if kind == "as_float":
        return float(value)
    if kind == "as_bool":
        return bool(value)
    if kind == "as_string" and len(value) <= 200:
        return str(value)
    if kind == "as_scalar_type":
        return DTYPES[value]
    if kind == "as_memory_format":
        return _MEMORY[value]
    if kind == "as_device":
        return Place()
    raise ValueError(f"arguments of kind {kind[:40]} cannot be read")
