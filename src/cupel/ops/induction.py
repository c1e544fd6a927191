"""Rules of functions from recorded calls, checked on calls that were not used, and made into operators for a solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from cupel.ops.call_mutation import Row, Samples, augmented, fresh_rows, results
from cupel.ops.call_records import Instance
from cupel.ops.expressions import in_solver
from cupel.ops.operator_specs import Operator, Picks, Shape, Size
from cupel.ops.rule_inference import Rule, infer, matrix
from cupel.ops.solver import solver_module

MOST_NUMBER = 9  # of a whole-number argument in a generated call


@dataclass(frozen=True)
class Induced:
    """An instance and its rule; `agreement` is the share of unseen calls of which the rule tells the truth."""

    instance: Instance
    rule: Rule
    agreement: float

    def __str__(self) -> str:
        return f"{self.instance.key} = {self.rule.text(self.instance.symbols)}"


def induced(instance: Instance, draw: Random, depth: int = 3, rounds: int = 3, checks: int = 60) -> Induced | None:
    """The rule of one instance; `None` if there is none within `depth`, or it is right on too few unseen calls.

    Unseen calls on which a rule is wrong join the samples, and it is inferred again, up to `rounds` times.
    """
    samples = augmented(instance, draw)
    for last in range(rounds):
        rule, plain = _explained(samples, depth)
        if rule is None:
            return None
        rows = fresh_rows(list(samples.passed), instance, draw, checks)
        rows = [row for row in rows if not plain or 1 not in row]
        if not rows:
            return Induced(instance, rule, 1.0)
        told = results(instance, rows)
        wrong = [(row, shape) for row, shape in zip(rows, told, strict=True) if not _right(rule, row, shape)]
        agreement = 1 - len(wrong) / len(rows)
        if not wrong or last == rounds - 1:
            return Induced(instance, rule, agreement) if agreement >= 0.8 else None
        for row, shape in wrong:
            samples.add(row, shape)
    return None


def _right(rule: Rule, row: Row, shape: tuple[int, ...] | None) -> bool:
    holds = bool(rule.holds(matrix([row]))[0])
    return holds == (shape is not None) and (shape is None or rule.shape(row) == shape)


def _explained(samples: Samples, depth: int) -> tuple[Rule | None, bool]:
    """The rule of all samples, or of those without a size of one (and whether) if it explains the refusals better.

    Where sizes of one are spread, a condition reads *equal or one*, which no single tree says.
    """
    rule = infer(samples, depth)
    if not samples.failed:
        return rule, False
    missed = 1.0 if rule is None else float(rule.holds(matrix(list(samples.failed))).mean())
    plain = Samples({r: s for r, s in samples.passed.items() if 1 not in r}, samples.failed)
    if missed <= 0.1 or len(plain.passed) < 5:
        return rule, False
    other = infer(plain, depth)
    better = other is not None and float(other.holds(matrix(list(samples.failed))).mean()) < missed
    return (other, True) if better else (rule, False)


def inferred_operator(found: Induced, number: int) -> Operator:
    """An instance with its rule, for a generator: whole-number arguments become attributes."""
    instance = found.instance
    numbers = [name for name, kind in _places(instance) if kind == "number"]

    def row_of(shapes: Sequence[Shape], a: Picks) -> list[Size]:
        sizes = (size for shape in shapes for size in shape)
        return [a[name] if kind == "number" else next(sizes) for name, kind in _places(instance)]

    def rule(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
        z3, row = solver_module(), row_of(shapes, a)
        told, out = list[Any](), list[Size]()
        for tree in found.rule.sizes:
            size, more = in_solver(tree, row, z3)
            out.append(size)
            told += more
        for tree, sign in found.rule.conditions:
            value, more = in_solver(tree, row, z3)
            told += [*more, value == 0 if sign == "== 0" else value > 0 if sign == "> 0" else value >= 0]
        return told, out

    def call(tensors: list[Any], a: Picks) -> Any:
        row = [a[name] if kind == "number" else 0 for name, kind in _places(instance)]
        return instance.call(tensors, row)

    low = min((min(r) for r in instance.rows), default=0)
    types = "".join(s.dtype for s in instance.tensors) + instance.dtype
    spans = {name: (min(0, low), MOST_NUMBER) for name in numbers}
    return Operator(f"{instance.name}~{number}", (types,), rule, call, attributes=spans, pick=_ranks(instance),
                    ranks=tuple(s.rank for s in instance.tensors), smooth=False)  # fmt: skip


def recorded_operator(instance: Instance, row: Row, shape: tuple[int, ...], number: int) -> Operator:
    """One call exactly as it was recorded: its conditions are its sizes."""
    wanted = instance.shapes(row)

    def rule(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
        told = [x == y for s, w in zip(shapes, wanted, strict=True) for x, y in zip(s, w, strict=True)]
        return told, list(shape)

    types = "".join(s.dtype for s in instance.tensors) + instance.dtype
    return Operator(
        f"{instance.name}!{number}",
        (types,),
        rule,
        lambda x, a: instance.call(x, row),
        pick=_ranks(instance),
        smooth=False,
    )


def _ranks(instance: Instance) -> Any:
    """Ranks as recorded; the first input may be rows of a batch if every row of the result comes from its own."""
    wanted, apart = [s.rank for s in instance.tensors], row_by_row(instance)

    def pick(draw: Random, ranks: Sequence[int], leads: Sequence[int]) -> Picks | None:
        good = list(ranks) == wanted and not any(leads[1:]) and (apart or not leads[0])
        return {} if good else None

    return pick


def _places(instance: Instance) -> list[tuple[str, str]]:
    """Every symbol with what it is: a size of a tensor, or a number."""
    at, found = 0, []
    for slot in instance.slots:
        width = slot.rank if slot.kind == "tensor" else int(slot.kind == "number")
        found += [(name, slot.kind) for name in instance.symbols[at : at + width]]
        at += width
    return found


def row_by_row(instance: Instance) -> bool:
    """Whether the rows of the first tensor are worked on each for itself, seen on the recorded calls."""
    seen = 0
    for row in instance.rows:
        shapes, types = instance.shapes(row), instance.tensors
        if not shapes[0] or shapes[0][0] < 2 or any(s.dtype != "f" for s in types):
            continue
        draw = torch.Generator().manual_seed(len(row))
        given = [torch.rand(shape, generator=draw) for shape in shapes]
        try:
            with torch.no_grad():
                whole = instance.call(given, row)
                rows = [instance.call([one, *given[1:]], row) for one in given[0].split(1)]
                same = whole.ndim and len(whole) == len(given[0]) and torch.allclose(whole, torch.cat(rows), atol=1e-5)
        except Exception:  # torch refuses one row, or the results do not fit together
            return False
        if not same:
            return False
        seen += 1
    return seen > 0
