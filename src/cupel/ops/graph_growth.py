"""Random graphs that are valid by construction: every call is placed by a constraint solver.

A graph begins as one input of unknown sizes. A call is put behind values that are there, or before an input, which it
then makes from inputs of its own; it stays if the solver finds sizes for all calls together.

Source: J. Liu et al., NNSmith, ASPLOS 2023, arXiv 2207.13066, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from cupel.ops.growth import Growth as Growth  # part of this module's vocabulary
from cupel.ops.operator_specs import Operator, Picks, Size, product
from cupel.ops.solver import EFFORT, binned, solver_module
from cupel.ops.tensor_graph import Call, Graph, Type

MOST_ELEMENTS = 65_536
MOST_SIZE = 64  # of an axis of an input
FLOATS = "ffffffddib"  # types of a first input, by how often


def grown(growth: Growth, seed: int) -> Graph:
    """One random valid graph; the same seed gives the same graph."""
    garden = Garden(growth, Random(seed))
    garden.plant()
    failed, known = 0, growth.chosen()
    while len(garden.calls) < growth.nodes and failed < growth.tries:
        operator = garden.draw.choice(known)
        way = garden.before if garden.draw.random() < 0.5 else garden.behind
        failed = 0 if any(way(operator) for _ in range(3)) else failed + 1
    return garden.harvest()


@dataclass
class _Value:
    shape: list[Size]
    dtype: str
    lead: int  # whether its first axis is the batch


@dataclass
class Garden:
    """A graph whose sizes are still expressions."""

    growth: Growth
    draw: Random
    values: dict[int, _Value] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    symbols: list[tuple[Any, int, int]] = field(default_factory=list)  # with least and largest value

    def __post_init__(self) -> None:
        self.z3 = solver_module()
        self.context = self.z3.Context()
        self.solver = self.z3.Solver(ctx=self.context)
        self.solver.set("rlimit", EFFORT)
        self.solver.set("random_seed", self.draw.randrange(1 << 30))
        self.sizes: Any = None  # the solver's last ones

    def plant(self, like: tuple[list[int], str] | None = None) -> None:
        """The first input; `like` gives its sizes and type."""
        rows = self.growth.rows
        if like is not None:
            self.inputs.append(self.add(list(like[0]), like[1], rows))
            return
        rank = self.draw.choice((2, 2, 3, 4, 4, 4) if rows else (0, 1, 2, 2, 3, 3, 4, 4, 4))
        types = {t[k] for o in self.growth.chosen() for t in o.types for k in range(o.arity)}
        dtype = "f" if rows else self.draw.choice([t for t in FLOATS if t in types])
        conditions, shape = self._fresh(rank, rows)
        self.solver.add(*conditions)
        self.inputs.append(self.add(shape, dtype, rows))

    def add(self, shape: list[Size], dtype: str, lead: bool) -> int:
        number = len(self.values)
        self.values[number] = _Value(shape, dtype, int(lead))
        return number

    def _symbol(self, low: int, high: int, conditions: list[Any]) -> Any:
        made = self.z3.Int(f"s{len(self.symbols)}", self.context)
        self.symbols.append((made, low, high))
        conditions += [made >= low, made <= high]
        return made

    def _fresh(self, rank: int, lead: bool) -> tuple[list[Any], list[Size]]:
        conditions: list[Any] = []
        shape: list[Size] = [self.growth.batch] if lead else []
        shape += [self._symbol(1, MOST_SIZE, conditions) for _ in range(rank - int(lead))]
        return [*conditions, product(shape) <= MOST_ELEMENTS], shape

    def behind(self, operator: Operator) -> bool:
        """Put a call behind values that are there; in a network of rows its other inputs may be new weights."""
        types = self.draw.choice(operator.types)
        taken: list[int] = []
        fresh: list[tuple[int, list[Any], _Value]] = []
        for k, dtype in enumerate(types[:-1]):
            there = [v for v, value in self.values.items() if value.dtype == dtype]
            there = [v for v in there if self.values[v].lead or not self.growth.rows]
            if k and self.growth.rows and dtype in "fd" and (operator.ranks or self.draw.random() < 0.4):
                rank = self.draw.randrange(len(self.values[taken[0]].shape)) if taken and taken[0] >= 0 else 1
                rank = operator.ranks[k] if operator.ranks else rank
                conditions, shape = self._fresh(rank, False)
                fresh.append((k, conditions, _Value(shape, dtype, 0)))
                taken.append(-1)
            elif there:
                # The newest half more often: depth as well as width.
                taken.append(self.draw.choice(there if self.draw.random() < 0.5 else there[len(there) // 2 :]))
            else:
                return False
        new = {k: value for k, _, value in fresh}
        given = [new[k] if v < 0 else self.values[v] for k, v in enumerate(taken)]
        placed = self._placed(operator, given, [c for _, more, _ in fresh for c in more])
        if placed is None:
            return False
        attributes, shape = placed
        for k, value in new.items():
            taken[k] = self.add(value.shape, value.dtype, False)
            self.weights.append(taken[k])
        lead = any(value.lead for value in given)
        self.calls.append(Call(operator.name, tuple(taken), attributes, self.add(shape, types[-1], lead)))
        return True

    def before(self, operator: Operator) -> bool:
        """Let a call make what was an input, from inputs (or weights) of its own."""
        v = self.draw.choice(self.inputs)
        value, rows = self.values[v], self.growth.rows
        types = self.draw.choice([t for t in operator.types if t[-1] == value.dtype] or [""])
        if not types or (rows and (types[0] != "f" or not value.lead)):
            return False
        given, conditions = list[_Value](), list[Any]()
        for k, dtype in enumerate(types[:-1]):
            first = k == 0
            rank = (
                self.draw.randint(1 + rows, 4)
                if first
                else self.draw.choice((len(given[0].shape), len(given[0].shape), self.draw.randrange(5)))
            )
            if rows and not first:
                rank = self.draw.randrange(len(given[0].shape))
            rank = operator.ranks[k] if operator.ranks else rank
            if rows and first and not rank:
                return False
            more, shape = self._fresh(rank, rows and first)
            conditions += more
            given.append(_Value(shape, dtype, int(rows and first)))
        placed = self._placed(operator, given, conditions, value.shape)
        if placed is None:
            return False
        made = [self.add(g.shape, g.dtype, bool(g.lead)) for g in given]
        self.inputs.remove(v)
        self.inputs.append(made[0])
        (self.weights if rows else self.inputs).extend(made[1:])
        self.calls.insert(0, Call(operator.name, tuple(made), placed[0], v))
        return True

    def _placed(
        self, operator: Operator, given: Sequence[_Value], conditions: list[Any], like: list[Size] | None = None
    ) -> tuple[Picks, list[Size]] | None:
        """Attributes and shape of a call that the solver finds room for, its conditions kept."""
        picks = operator.pick(self.draw, [len(g.shape) for g in given], [g.lead for g in given])
        if picks is None:
            return None
        known = len(self.symbols)
        extra = list(conditions)
        attributes = picks | {n: self._symbol(*span, extra) for n, span in operator.attributes.items()}
        told, shape = operator.rule([g.shape for g in given], attributes)
        extra += told
        if like is not None:
            extra += [False] if len(like) != len(shape) else [a == b for a, b in zip(like, shape, strict=True)]
        extra += [size >= 1 for size in shape] + [product(shape) <= MOST_ELEMENTS]
        if not self._holds(extra):
            del self.symbols[known:]
            return None
        return attributes, shape

    def _holds(self, conditions: Sequence[Any]) -> bool:
        """Whether the solver finds sizes; the conditions stay if it does."""
        if any(c is False for c in conditions):
            return False
        self.solver.push()
        self.solver.add(*(c for c in conditions if c is not True))
        if self.solver.check() == self.z3.sat:
            self.sizes = self.solver.model()
            return True
        self.solver.pop()
        return False

    def type_of(self, v: int) -> Type:
        """Of a value whose sizes are numbers."""
        return Type(tuple(self.values[v].shape), self.values[v].dtype)

    def settle(self) -> None:
        """Let all sizes so far become numbers, from bins; the solver forgets what led to them."""
        if self.symbols:
            number = self._solved()
            for value in self.values.values():
                value.shape = [number(s) for s in value.shape]
            self.calls = [replace(c, attributes=_numbers(c.attributes, number)) for c in self.calls]
            self.symbols.clear()
            self.solver.reset()

    def harvest(self) -> Graph:
        """The graph with sizes from bins of the solver's choice: a random power of two to the next for each symbol."""
        number = self._solved()
        types = {v: Type(tuple(number(s) for s in value.shape), value.dtype) for v, value in self.values.items()}
        calls = tuple(replace(c, attributes=_numbers(c.attributes, number)) for c in self.calls)
        inputs, weights = list(self.inputs), list(self.weights)
        if not self.growth.rows:  # an input more than one becomes a weight or stays one, as a coin falls
            more = [v for v in inputs[1:] if types[v].dtype in "fd" and self.draw.random() < 0.5]
            inputs, weights = [v for v in inputs if v not in more], weights + more
        head = self.draw.choice((0, 4, 10)) if self.growth.rows else 0
        return Graph(types, tuple(inputs), tuple(weights), calls, self.growth.rows, head)

    def _solved(self) -> Callable[[Any], int]:
        """Sizes as numbers, under as many random bins as hold together."""
        used = self._used()
        bins = [binned(s, low, high, self.draw, self.z3) for s, low, high in self.symbols if s.get_id() in used]
        self.draw.shuffle(bins)
        self._keep(bins)
        # What held when it was added may be beyond the solver's effort now; the sizes it found then still hold.
        model = self.solver.model() if self.solver.check() == self.z3.sat else self.sizes

        def number(size: Any) -> int:
            return size if isinstance(size, int) else model.eval(size, model_completion=True).as_long()

        return number

    def _keep(self, bins: Sequence[Any]) -> None:
        """Add as many conditions as hold together, by halves."""
        if bins and not self._holds(bins) and len(bins) > 1:
            self._keep(bins[: len(bins) // 2])
            self._keep(bins[len(bins) // 2 :])

    def _used(self) -> set[int]:
        found: set[int] = set()
        waiting = [s for v in self.values.values() for s in v.shape if not isinstance(s, int)]
        waiting += [s for c in self.calls for s in c.attributes.values() if self.z3.is_expr(s)]
        while waiting:
            expression = waiting.pop()
            if expression.get_id() not in found:
                found.add(expression.get_id())
                waiting += expression.children()
        return found


def _numbers(attributes: Picks, number: Any) -> Picks:
    return {k: v if isinstance(v, (tuple, str)) else number(v) for k, v in attributes.items()}
