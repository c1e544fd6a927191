"""Random graphs of three kinds of calls: recorded ones, ones by inferred rules, and ones by rules written by hand.

All sizes are numbers after each call, so that the solver only ever looks at one call; a recorded call fits where the
types of its tensors are there exactly.

Source: J. Liu et al., NeuRI, ESEC/FSE 2023, arXiv 2302.02261, section 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from cupel.ops.graph_growth import Garden, Growth
from cupel.ops.operator_specs import Operator
from cupel.ops.tensor_graph import Call, Graph, Type

CANDIDATES = 64  # operators that one step looks at
PLACES = 4  # choices of tensors for each


@dataclass(frozen=True)
class Recorded:
    """A recorded call as an operator, and the types of its tensors."""

    operator: Operator
    inputs: tuple[Type, ...]
    output: Type


@dataclass(frozen=True)
class Pools:
    """What a hybrid graph is made of."""

    recorded: tuple[Recorded, ...] = ()
    inferred: tuple[Operator, ...] = ()
    written: tuple[Operator, ...] = ()

    def own(self) -> Mapping[str, Operator]:
        return {o.name: o for o in (*self.inferred, *(r.operator for r in self.recorded))}


def grown_hybrid(pools: Pools, growth: Growth, seed: int) -> Graph:
    """One random graph; the same seed gives the same graph."""
    draw = Random(seed)
    garden = Garden(growth, draw)
    first = (
        draw.choice(pools.recorded).inputs[0] if pools.recorded and (draw.random() < 0.5 or not pools.written) else None
    )
    garden.plant(None if first is None else (list(first.shape), first.dtype))
    garden.settle()
    kinds = [kind for kind in ("recorded", "inferred", "written") if getattr(pools, kind)]
    failed = 0
    while len(garden.calls) < growth.nodes and failed < growth.tries:
        kind = draw.choice(kinds)
        placed = _recorded(garden, pools.recorded) if kind == "recorded" else _solved(garden, getattr(pools, kind))
        failed = 0 if placed else failed + 1
        if placed:
            garden.settle()
    graph = garden.harvest()
    used = {c.op for c in graph.calls}
    return replace(graph, own={n: o for n, o in pools.own().items() if n in used})


def _solved(garden: Garden, pool: Sequence[Operator]) -> bool:
    for operator in garden.draw.sample(pool, min(CANDIDATES, len(pool))):
        way = garden.before if garden.draw.random() < 0.5 else garden.behind
        if any(way(operator) for _ in range(PLACES)):
            return True
    return False


def _recorded(garden: Garden, pool: Sequence[Recorded]) -> bool:
    """Put a recorded call where its types are there exactly."""
    backward = garden.draw.random() < 0.5
    for one in garden.draw.sample(pool, min(CANDIDATES, len(pool))):
        if backward:
            there = [v for v in garden.inputs if garden.type_of(v) == one.output]
            if there:
                v = garden.draw.choice(there)
                made = [garden.add(list(t.shape), t.dtype, False) for t in one.inputs]
                garden.inputs.remove(v)
                garden.inputs.extend(made)
                garden.calls.insert(0, Call(one.operator.name, tuple(made), {}, v))
                return True
            continue
        taken = [[v for v in garden.values if garden.type_of(v) == t] for t in one.inputs]
        if taken[0]:
            # Further tensors that are not there become inputs: the first ties the call to the graph.
            inputs = []
            for t, choices in zip(one.inputs, taken, strict=True):
                if choices:
                    inputs.append(garden.draw.choice(choices))
                else:
                    inputs.append(garden.add(list(t.shape), t.dtype, False))
                    garden.inputs.append(inputs[-1])
            output = garden.add(list(one.output.shape), one.output.dtype, False)
            garden.calls.append(Call(one.operator.name, tuple(inputs), {}, output))
            return True
    return False
