"""Which operations a traced graph from a file may hold: such a graph becomes Python code that runs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cupel.core.errors import CupelError

_OPERATORS = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "matmul", "getitem", "eq", "ne", "lt", "le",
    "gt", "ge", "and_", "or_", "not_", "invert", "iadd", "imul", "isub", "itruediv",
)  # fmt: skip
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "data", "real", "imag"}
_PLACES = {"placeholder", "get_attr", "call_module", "call_method", "call_function", "output"}


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Operations on tensors by name: those torch itself lists as overridable, and Python's operators."""
    found = {f"operator:{name}": getattr(operator, name) for name in _OPERATORS} | {"builtins:getattr": getattr}
    for function in torch.overrides.get_testing_overrides():
        for module in (torch, torch.nn.functional, torch.special, torch.linalg, torch.fft):
            name = getattr(function, "__name__", "")
            if name and getattr(module, name, None) is function:
                found.setdefault(f"{module.__name__}:{name}", function)
    for name in ("quantize_per_tensor", "quantize_per_channel"):
        found[f"torch:{name}"] = getattr(torch, name)
    return found


@functools.cache
def _names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in _functions().items()}


def name_of_function(function: object, where: str = "it") -> str:
    """The name under which `function_named` finds it again.

    Raises:
        CupelError: it is not an operation on tensors.
    """
    if isinstance(function, torch._ops.OpOverload) and function.namespace in ("aten", "quantized"):
        return f"aten:{function}" if function.namespace == "aten" else f"quantized:{function}"
    if isinstance(function, torch._ops.OpOverloadPacket) and f"{function}".startswith("quantized."):
        return f"quantized:{function}"  # int8 kernels of what joins two ways, as torch.fx calls them
    try:
        return _names()[function]  # type: ignore[index]
    except (KeyError, TypeError):
        raise CupelError(
            f"{where} must be an operation on tensors; it is {function!r:.80}. Write it as a module."
        ) from None


def function_named(name: str) -> Callable[..., Any]:
    """An operation on tensors by name.

    >>> function_named("torch:relu") is torch.relu
    True

    Raises:
        CupelError: there is none of that name; nothing else is ever looked up.
    """
    space, _, rest = name.partition(":")
    if space in ("aten", "quantized"):
        parts = rest.split(".")
        if parts[0] == space and all(p.isidentifier() for p in parts):
            packet = getattr(getattr(torch.ops, space), parts[1], None) if len(parts) in (2, 3) else None
            if len(parts) == 2 and space == "quantized" and isinstance(packet, torch._ops.OpOverloadPacket):
                return packet
            found = getattr(packet, parts[2], None) if len(parts) == 3 else None
            if isinstance(found, torch._ops.OpOverload):
                return found
    elif name in _functions():
        return _functions()[name]
    raise CupelError(f"a graph must hold operations on tensors; it asks for {name!r:.80}. Take another copy.")


def check_call(op: str, name: str, target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a node of a graph that could become anything else than a call on tensors.

    Raises:
        CupelError: with the node.
    """
    words = [name, *kwargs] if op != "placeholder" else [name, target.removeprefix("*").removeprefix("*"), *kwargs]
    good = op in _PLACES and all(isinstance(w, str) and w.isidentifier() for w in words)
    if op in ("get_attr", "call_module"):
        good &= all(f"_{atom}".isidentifier() and atom for atom in target.split("."))  # parts may begin with a digit
    elif op == "call_method":
        good &= not target.startswith("_") and callable(getattr(Tensor, target, None))
    elif target == "builtins:getattr":
        good &= len(args) == 2 and args[1] in _ATTRIBUTES
    if not good:
        raise CupelError(f"a graph must hold operations on tensors; node {name!r:.40} is {op!r:.20} {target!r:.60}. "
                         "Take another copy.")  # fmt: skip
