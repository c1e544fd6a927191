"""The smallest graph on which something still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from cupel.ops.graph_resizing import smaller_sizes
from cupel.ops.tensor_graph import Call, Graph


def minimised(graph: Graph, fails: Callable[[Graph], bool], most: int = 150) -> Graph:
    """The smallest graph reached from `graph` by one change at a time that still fails.

    Changes: the calls at the end go; a call's result becomes an input; a call is passed by; sizes are halved.

    Args:
        fails: on the new graph; an exception counts as no.
        most: how often it is asked.
    """
    asked, shrunk = 0, True
    while shrunk and asked < most:
        shrunk = False
        for smaller in _smaller(graph):
            if asked >= most:
                break
            asked += 1
            if _quietly(fails, smaller):
                graph, shrunk = smaller, True
                break
    return graph


def _quietly(fails: Callable[[Graph], bool], graph: Graph) -> bool:
    try:
        return fails(graph)
    except Exception:  # a change may give a graph that no longer runs
        return False


def _smaller(graph: Graph) -> Iterator[Graph]:
    """Graphs that are simpler by one change, the largest changes first."""
    if graph.head:
        yield replace(graph, head=0)
    count = len(graph.calls)
    for end in range(1, count):  # everything after the first `end` calls goes
        yield replace(graph, calls=graph.calls[:end]).without_unused()
    read = {v for call in graph.calls for v in call.inputs}
    for call in graph.calls:
        if call.output not in read and count > 1:
            yield replace(graph, calls=tuple(c for c in graph.calls if c is not call)).without_unused()
    for k, call in enumerate(graph.calls):
        passed = _bypassed(graph, k, call)
        if passed is not None:
            yield passed
        begun = _begun(graph, call)
        if begun is not None:
            yield begun
    yield from smaller_sizes(graph)


def _bypassed(graph: Graph, k: int, call: Call) -> Graph | None:
    """The graph with readers of a call reading one of its inputs of the same type."""
    alike = [v for v in call.inputs if graph.types[v] == graph.types[call.output]]
    if not alike or len(graph.calls) < 2:
        return None
    swapped = [
        replace(c, inputs=tuple(alike[0] if v == call.output else v for v in c.inputs))
        for c in graph.calls
        if c is not call
    ]
    return replace(graph, calls=tuple(swapped)).without_unused()


def _begun(graph: Graph, call: Call) -> Graph | None:
    """The graph with a call's result as an input in place of all that made it."""
    if graph.rows and graph.types[call.output].dtype != "f":
        return None
    rest = tuple(c for c in graph.calls if c is not call)
    if not any(call.output in c.inputs for c in rest):
        return None
    if graph.rows:  # there is one input: whatever else still reads the old one must go
        (old,) = graph.inputs
        rest = _not_reading(rest, {old})
        if not rest or not any(call.output in c.inputs for c in rest):
            return None
        return replace(graph, calls=rest, inputs=(call.output,)).without_unused()
    return replace(graph, calls=rest, inputs=(*graph.inputs, call.output)).without_unused()


def _not_reading(calls: Sequence[Call], gone: set[int]) -> tuple[Call, ...]:
    kept = []
    for call in calls:
        if gone & set(call.inputs):
            gone = gone | {call.output}
        else:
            kept.append(call)
    return tuple(kept)
