"""A graph of operators with all sizes known: what a generator makes, a harness runs and a minimiser cuts down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from cupel.ops.operator_specs import DTYPES, Operator, Picks, operators

Describe = Callable[[str], Operator]


@dataclass(frozen=True)
class Type:
    """Shape and type of a tensor: `Type((2, 3), "f")`."""

    shape: tuple[int, ...]
    dtype: str = "f"


@dataclass(frozen=True)
class Call:
    """One call: values by number, attributes by name, and the number of the value it makes."""

    op: str
    inputs: tuple[int, ...]
    attributes: Picks
    output: int


@dataclass(frozen=True)
class Graph:
    """Calls in an order in which they can run.

    Args:
        types: of every value, by number.
        inputs, weights: values that are given, and values that the network owns.
        calls: the rest.
        rows: whether there is one input whose first axis is the batch, and every row is for itself. The results are
            then flattened and joined to one `[B, K]`.
        head: outputs of a linear layer on top of that; 0 for none.
        own: operators beyond those of `operators()`, by name.
    """

    types: Mapping[int, Type]
    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    calls: tuple[Call, ...]
    rows: bool = False
    head: int = 0
    own: Mapping[str, Operator] = field(default_factory=dict)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Results that no call reads."""
        read = {v for call in self.calls for v in call.inputs}
        found = tuple(call.output for call in self.calls if call.output not in read)
        return found or self.inputs[:1]

    def operator(self, name: str) -> Operator:
        return self.own[name] if name in self.own else operators()[name]

    @property
    def smooth(self) -> bool:
        """Whether small changes of the inputs make small changes of the outputs."""
        return all(self.operator(call.op).smooth for call in self.calls)

    def without_unused(self) -> Graph:
        """The same graph without values that nobody reads; the first input stays."""
        read = {v for call in self.calls for v in call.inputs} | set(self.outputs)
        made = {call.output for call in self.calls}
        inputs = tuple(v for v in self.inputs if v in read) or self.inputs[:1]
        kept = read | made | set(inputs)
        return replace(
            self,
            inputs=inputs,
            weights=tuple(v for v in self.weights if v in read),
            types={v: t for v, t in self.types.items() if v in kept},
        )

    def __str__(self) -> str:
        """One line a value, as a person would write it."""
        lines = [
            f"v{v} = {word}{_told(self.types[v])}"
            for word, held in (("input", self.inputs), ("weight", self.weights))
            for v in held
        ]
        for call in self.calls:
            words = [f"v{v}" for v in call.inputs] + [f"{k}={v}" for k, v in call.attributes.items()]
            lines.append(f"v{call.output} = {call.op}({', '.join(words)}){_told(self.types[call.output])}")
        end = "rows of " if self.rows else ""
        head = f" -> linear to {self.head}" if self.head else ""
        return "\n".join([*lines, f"return {end}{', '.join(f'v{v}' for v in self.outputs)}{head}"])


def _told(t: Type) -> str:
    return f" : {t.dtype}{list(t.shape)}"


def module_of(graph: Graph, weights: Mapping[int, Tensor] | None = None, seed: int = 0) -> fx.GraphModule:
    """The graph as a network in evaluation mode; the same seed gives the same weights.

    Args:
        weights: values for those the graph owns; drawn where they are not given.
    """
    root, built = nn.Module(), fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(built)
    made: dict[int, fx.Proxy] = {v: fx.Proxy(built.placeholder(f"v{v}"), tracer) for v in graph.inputs}
    state = torch.get_rng_state()
    try:
        for v in graph.weights:
            torch.default_generator.manual_seed(seed * 7919 + v)
            value = weights[v] if weights and v in weights else drawn(graph.types[v])
            if value.is_floating_point():
                root.register_parameter(f"w{v}", nn.Parameter(value))
            else:
                root.register_buffer(f"w{v}", value)
            made[v] = fx.Proxy(built.get_attr(f"w{v}"), tracer)
        for call in graph.calls:
            torch.default_generator.manual_seed(seed * 7919 + call.output)
            made[call.output] = _called(graph, call, made, root, tracer)
            made[call.output].node.meta["value"] = call.output
        built.output(_returned(graph, made, root, tracer))
    finally:
        torch.set_rng_state(state)
    return fx.GraphModule(root, built, "Fuzzed").eval()


def _called(
    graph: Graph, call: Call, made: Mapping[int, fx.Proxy], root: nn.Module, tracer: fx.proxy.TracerBase
) -> fx.Proxy:
    operator, given = graph.operator(call.op), [made[v] for v in call.inputs]
    if operator.layer is None:
        assert operator.call is not None
        found: fx.Proxy = operator.call(given, call.attributes)
        return found
    name = f"{call.op}_{call.output}"
    root.add_module(name, operator.layer([graph.types[v].shape for v in call.inputs], call.attributes))
    return fx.Proxy(tracer.graph.call_module(name, tuple(p.node for p in given)), tracer)


def _returned(graph: Graph, made: Mapping[int, fx.Proxy], root: nn.Module, tracer: fx.proxy.TracerBase) -> Any:
    outputs = [made[v] for v in graph.outputs]
    if not graph.rows:
        return tuple(p.node for p in outputs)
    flat: list[Any] = []
    total = 0
    for v, p in zip(graph.outputs, outputs, strict=True):
        t = graph.types[v]
        row: Any = p if t.dtype == "f" else p.float()
        row = row if len(t.shape) == 2 else row.unsqueeze(1) if len(t.shape) == 1 else torch.flatten(row, 1)
        flat.append(row)
        total += _count(t.shape[1:])
    joined: Any = torch.cat(flat, 1) if len(flat) > 1 else flat[0]
    if graph.head:
        torch.default_generator.manual_seed(total)
        root.add_module("head", nn.Linear(total, graph.head))
        return tracer.graph.call_module("head", (joined.node,))
    return joined.node


def _count(shape: Sequence[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def drawn(t: Type, draw: torch.Generator | None = None, low: float = 3.0, high: float = 7.0) -> Tensor:
    """Random values of a type: floats uniform in [low, high], small integers, coin flips."""
    if t.dtype == "b":
        return torch.rand(t.shape, generator=draw) < 0.5
    if t.dtype == "i":
        return torch.randint(-3, 6, t.shape, generator=draw)
    return (low + (high - low) * torch.rand(t.shape, generator=draw)).to(DTYPES[t.dtype])


def recorded_types(module: fx.GraphModule, graph: Graph, inputs: Sequence[Tensor]) -> dict[int, Type]:
    """The types that the calls really gave, by number of the value."""
    letters = {dtype: letter for letter, dtype in DTYPES.items()}
    found: dict[int, Type] = {}

    class Reader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if "value" in n.meta:
                found[n.meta["value"]] = Type(tuple(out.shape), letters.get(out.dtype, str(out.dtype)))
            return out

    with torch.no_grad():
        Reader(module).run(*inputs)
    return found


def shapes_hold(graph: Graph) -> bool:
    """Whether all conditions of all calls hold for the numbers of a graph, as its operators' rules tell."""
    for call in graph.calls:
        told, shape = graph.operator(call.op).rule([graph.types[v].shape for v in call.inputs], call.attributes)
        if not all(told) or tuple(shape) != graph.types[call.output].shape:
            return False
    return True
