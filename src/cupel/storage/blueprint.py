"""A network as plain data: which modules it is made of, and its tensors. Nothing is pickled.

`drawn` turns a value (a module, a mapping of tensors, numbers, a small dataclass) into JSON and named
tensors; `built` is the way back. Only classes of torch, of cupel and of packages named by the caller are
ever constructed, without calling their constructors; functions inside a traced graph must be operations
on tensors. So a file from a stranger can at worst be refused.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from cupel.core.errors import CupelError
from cupel.storage.graphs import check_call, function_named, name_of_function

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_KINDS = {"tuple": tuple, "set": set, "frozenset": frozenset, "size": torch.Size}


class NotDrawable(CupelError):
    """A value that cannot be written as plain data, and why."""


@dataclass
class _Pen:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    known: dict[int, int] = field(default_factory=dict)  # id of a tensor or module -> its number
    alive: list[object] = field(default_factory=list)  # an id is only unique while its object lives
    stored: set[int] = field(default_factory=set)  # addresses of storages

    def number(self, value: object) -> tuple[int, bool]:
        fresh = id(value) not in self.known
        if fresh:
            self.known[id(value)] = len(self.known)
            self.alive.append(value)
        return self.known[id(value)], fresh


def drawn(value: object) -> tuple[Any, dict[str, Tensor]]:
    """`value` as JSON and tensors.

    Raises:
        NotDrawable: it holds something that has no plain form: a closure, a local class, a hook.
    """
    pen = _Pen()
    return _draw(value, pen, "it"), pen.tensors


def built(plain: Any, tensors: Mapping[str, Tensor], packages: frozenset[str] = frozenset()) -> Any:
    """The value that `drawn` took apart.

    Args:
        packages: top-level packages of the user's whose classes may be constructed; importing them runs their code.

    Raises:
        CupelError: the description is damaged, or asks for something outside the allowed packages.
    """
    try:
        return _build(plain, _Hand(tensors, packages | {"torch", "cupel"}))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ImportError) as error:
        raise CupelError(
            f"the description of a network must be whole; it is not ({type(error).__name__}: {error}). "
            "Take another copy, or run the recipe again."
        ) from None


def _draw(value: Any, pen: _Pen, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        return _draw_tensor(value, pen, where)
    if isinstance(value, nn.Module):
        number, fresh = pen.number(value)
        return {"module": _draw_module(value, pen, where), "as": number} if fresh else {"same": number}
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, Mapping):
        kind = "dict" if type(value) is dict else "ordered"
        return {kind: [[_draw(k, pen, where), _draw(v, pen, f"{where}[{k!r}]")] for k, v in value.items()]}
    if isinstance(value, list):
        return [_draw(v, pen, f"{where}[{i}]") for i, v in enumerate(value)]
    for name, cls in _KINDS.items():
        if type(value) is cls:
            items = sorted(value, key=repr) if name in ("set", "frozenset") else value
            return {name: [_draw(v, pen, where) for v in items]}
    if isinstance(value, slice):
        return {"slice": [_draw(v, pen, where) for v in (value.start, value.stop, value.step)]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        state = {f.name: _draw(getattr(value, f.name), pen, f"{where}.{f.name}") for f in dataclasses.fields(value)}
        return {"record": _class_name(type(value), where), "state": state}
    if isinstance(value, torch.ScriptObject) and str(value._type()).endswith("LinearPackedParamsBase"):
        return {"packed_linear": [_draw(v, pen, where) for v in torch.ops.quantized.linear_unpack(value)]}
    if callable(value) and not isinstance(value, type):
        return {"function": name_of_function(value, where)}
    raise NotDrawable(f"{where} must be plain data, a tensor or a module; it is a {type(value).__name__}")


def _draw_tensor(value: Tensor, pen: _Pen, where: str) -> Any:
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
        raise NotDrawable(f"{where} must be a dense tensor; it is a {type(value).__name__} of layout {value.layout}")
    number, fresh = pen.number(value)
    if not fresh:
        return {"same": number}
    if not value.is_quantized and value.numel():
        address = value.untyped_storage().data_ptr()
        if address in pen.stored:
            raise NotDrawable(f"{where} must hold its own memory; it is a view into another tensor")
        pen.stored.add(address)
    pen.tensors[str(number)] = value.detach()
    told: dict[str, Any] = {"tensor": number, "parameter": isinstance(value, nn.Parameter), "grad": value.requires_grad}
    if not value.is_quantized and not value.is_contiguous():
        told["stride"] = list(value.stride())  # memory formats choose other kernels, hence other last bits
    return told


def _class_name(cls: type, where: str) -> str:
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        raise NotDrawable(f"{where} must be of a class at the top of an importable module; it is {cls!r}")
    return f"{cls.__module__}:{cls.__qualname__}"


def _draw_module(module: nn.Module, pen: _Pen, where: str) -> Any:
    if isinstance(module, fx.GraphModule):
        own = dict(module.__dict__)
        steps = [_draw_node(node, pen, where) for node in module.graph.nodes]
        parts = {k: _draw(own[k], pen, f"{where}.{k}") for k in ("_parameters", "_buffers", "_modules")}
        rest = {k: v for k, v in own.items() if isinstance(v, Tensor)}
        return {"graph": steps, "training": module.training, "parts": parts, "tensors": _draw(rest, pen, where)}
    cls = type(module)
    custom = cls.__getstate__ not in (object.__getstate__, nn.Module.__getstate__)
    state = module.__getstate__() if custom else dict(module.__dict__)
    if not custom:
        if any(state.get(k) for k in _HOOKS):
            raise NotDrawable(f"{where} must carry no hooks; it does")
        state = {k: v for k, v in state.items() if k not in _HOOKS}
    return {"class": _class_name(cls, where), "state": _draw(state, pen, where), "custom": custom}


def _draw_node(node: fx.Node, pen: _Pen, where: str) -> Any:
    target = name_of_function(node.target, where) if node.op == "call_function" else str(node.target)
    return [node.op, node.name, target, _draw(_plain_args((node.args, dict(node.kwargs))), pen, where)]


def _plain_args(value: Any) -> Any:
    """Immutable lists and dicts of torch.fx as plain ones; results of earlier nodes as one-entry mappings."""
    if isinstance(value, fx.Node):
        return {"\0link": value.name}
    if isinstance(value, Mapping):
        return {k: _plain_args(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain_args(v) for v in value)
    return [_plain_args(v) for v in value] if isinstance(value, list) else value


@dataclass
class _Hand:
    tensors: Mapping[str, Tensor]
    packages: frozenset[str]
    made: dict[int, Any] = field(default_factory=dict)


def _build(plain: Any, hand: _Hand) -> Any:
    if isinstance(plain, list):
        return [_build(v, hand) for v in plain]
    if not isinstance(plain, dict):
        return plain
    kind = next(iter(plain), "")
    body = plain[kind]
    if kind == "same":
        return hand.made[body]
    if kind == "tensor":
        return hand.made.setdefault(body, _build_tensor(plain, hand))
    if kind == "module":
        return _build_module(body, hand, plain["as"])
    if kind in ("dict", "ordered"):
        pairs = [(_build(k, hand), _build(v, hand)) for k, v in body]
        return dict(pairs) if kind == "dict" else OrderedDict(pairs)
    if kind in _KINDS:
        return _KINDS[kind](_build(v, hand) for v in body)
    if kind == "slice":
        return slice(*(_build(v, hand) for v in body))
    if kind == "record":
        record: Any = object.__new__(_class(body, hand, dataclasses.is_dataclass))
        for name, value in plain["state"].items():
            object.__setattr__(record, name, _build(value, hand))
        return record
    makers: dict[str, Any] = {
        "float": float, "device": torch.device, "function": function_named,
        "packed_linear": lambda parts: torch.ops.quantized.linear_prepack(*(_build(v, hand) for v in parts)),
        "dtype": lambda n: _of_type(n, torch.dtype), "memory_format": lambda n: _of_type(n, torch.memory_format),
    }  # fmt: skip
    return makers[kind](body)


def _of_type(name: str, kind: type) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, kind):
        raise ValueError(f"torch.{name} is no {kind.__name__}")
    return found


def _build_tensor(plain: Mapping[str, Any], hand: _Hand) -> Tensor:
    value = hand.tensors[str(plain["tensor"])]
    if "stride" in plain:
        reach = sum((n - 1) * s for n, s in zip(value.shape, plain["stride"], strict=True)) + 1
        if reach > 4 * value.numel() or min(plain["stride"]) < 0:
            raise ValueError(f"strides {plain['stride']} do not fit shape {tuple(value.shape)}")
        value = torch.empty_strided(value.shape, plain["stride"], dtype=value.dtype).copy_(value)
    if plain["parameter"]:
        return nn.Parameter(value, requires_grad=plain["grad"])
    return value.requires_grad_(plain["grad"])


def _class(name: str, hand: _Hand, fits: Any) -> type:
    module_name, _, path = name.partition(":")
    if module_name.split(".")[0] not in hand.packages:
        raise ValueError(f"{name} is outside the packages {', '.join(sorted(hand.packages))}")
    found: Any = importlib.import_module(module_name)
    for part in path.split("."):
        found = getattr(found, part)
    if not isinstance(found, type) or found.__module__ != module_name or not fits(found):
        raise ValueError(f"{name} is not a class that a network is made of")
    return found


def _build_module(body: Mapping[str, Any], hand: _Hand, number: int) -> nn.Module:
    if "graph" in body:
        root = nn.Module()
        for key, value in body["parts"].items():
            root.__dict__[key] = _build(value, hand)
        root.__dict__ |= _build(body["tensors"], hand)
        made: nn.Module = fx.GraphModule(root, _build_graph(body["graph"], hand))
        for key in ("_parameters", "_buffers", "_modules"):
            made.__dict__[key] = root.__dict__[key]
        made.training = body["training"]
        hand.made[number] = made
        return made
    cls = _class(body["class"], hand, lambda c: issubclass(c, nn.Module))
    module: nn.Module = object.__new__(cls)
    hand.made[number] = module
    nn.Module.__init__(module)
    state = _build(body["state"], hand)
    if body["custom"] and hasattr(cls, "__setstate__"):
        module.__setstate__(state)
    else:
        module.__dict__.update(state)
    return module


def _build_graph(steps: list[Any], hand: _Hand) -> fx.Graph:
    graph, nodes = fx.Graph(), dict[str, fx.Node]()

    def linked(value: Any) -> Any:
        if isinstance(value, dict):
            return nodes[value["\0link"]] if "\0link" in value else {k: linked(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(linked(v) for v in value)
        return value

    for op, name, target, drawn_args in steps:
        args, kwargs = linked(_build(drawn_args, hand))
        check_call(op, name, target, args, kwargs)
        wanted = function_named(target) if op == "call_function" else target
        nodes[name] = graph.create_node(op, wanted, args, kwargs, name=name)
    graph.lint()
    return graph
