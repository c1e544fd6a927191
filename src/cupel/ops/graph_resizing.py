"""The same calls on smaller tensors: sizes and attributes solved anew under a bound on their sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from cupel.ops.operator_specs import Picks, Size
from cupel.ops.solver import EFFORT, solver_module
from cupel.ops.tensor_graph import Call, Graph, Type


def smaller_sizes(graph: Graph) -> Iterator[Graph]:
    """Graphs of the same calls with a smaller sum of sizes and attributes: a half, three quarters, one less."""
    problem = _Problem(graph)
    for bound in dict.fromkeys((problem.total // 2, problem.total * 3 // 4, problem.total - 1)):
        found = problem.within(bound)
        if found is not None:
            yield found


class _Problem:
    """All conditions of a graph, with a symbol for every size of its inputs and every attribute."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.z3 = graph, solver_module()
        self.context = self.z3.Context()
        self.solver = self.z3.Solver(ctx=self.context)
        self.solver.set("rlimit", EFFORT)
        self.symbols: list[Any] = []
        self.total = 0
        self.shapes: dict[int, list[Size]] = {}
        for v in (*graph.inputs, *graph.weights):
            keep = 1 if graph.rows and v in graph.inputs else 0  # the batch
            shape = graph.types[v].shape
            self.shapes[v] = [*shape[:keep], *(self._symbol(s, 1) for s in shape[keep:])]
        self.attributes = [self._placed(call) for call in graph.calls]

    def _symbol(self, now: int, low: int) -> Any:
        made = self.z3.Int(f"s{len(self.symbols)}", self.context)
        self.symbols.append(made)
        self.total += now
        self.solver.add(made >= low, made <= max(now, low))
        return made

    def _placed(self, call: Call) -> Picks:
        operator = self.graph.operator(call.op)
        fresh = {n: self._symbol(call.attributes[n], span[0]) for n, span in operator.attributes.items()}
        attributes = {**call.attributes, **fresh}
        told, shape = operator.rule([self.shapes[v] for v in call.inputs], attributes)
        self._add(told)
        self._add([size >= 1 for size in shape])
        self.shapes[call.output] = shape
        return attributes

    def _add(self, conditions: Sequence[Any]) -> None:
        for condition in conditions:
            if condition is not True:
                self.solver.add(self.z3.BoolVal(False, self.context) if condition is False else condition)

    def within(self, bound: int) -> Graph | None:
        """The graph with sizes that sum to `bound` at most."""
        if not self.symbols:
            return None
        self.solver.push()
        try:
            self.solver.add(self.z3.Sum(self.symbols) <= bound)
            if self.solver.check() != self.z3.sat:
                return None
            model = self.solver.model()
        finally:
            self.solver.pop()

        def number(size: Any) -> Any:
            if not self.z3.is_expr(size):
                return size
            return model.eval(size, model_completion=True).as_long()

        types = {
            v: Type(tuple(number(s) for s in shape), self.graph.types[v].dtype) for v, shape in self.shapes.items()
        }
        pairs = zip(self.graph.calls, self.attributes, strict=True)
        calls = tuple(replace(c, attributes={k: number(v) for k, v in a.items()}) for c, a in pairs)
        return replace(self.graph, types=types, calls=calls)
