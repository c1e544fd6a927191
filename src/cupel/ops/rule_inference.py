"""From calls that worked and calls that were refused: the shape a function gives, and the conditions it makes.

Both are small arithmetic trees over the symbols of a call, found by enumeration: a tree for every size of the result
that is right on all calls that worked, and conditions `e == 0`, `e > 0`, `e >= 0` that hold on all of them and fail on
some that were refused.

Source: J. Liu et al., NeuRI, ESEC/FSE 2023, arXiv 2302.02261, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cupel.ops.call_mutation import Row, Samples
from cupel.ops.expressions import LINEAR, Array, Bank, Tree, combined, text_of, values_of
from cupel.ops.preconditions import conditions, satisfied


@dataclass(frozen=True)
class Rule:
    """Sizes of the result, and conditions `(tree, sign)`; both over the symbols of an instance."""

    sizes: tuple[Tree, ...]
    conditions: tuple[tuple[Tree, str], ...]

    def holds(self, rows: Array) -> Array:
        """Which rows `[N, S]` satisfy all conditions, bool `[N]`."""
        good = np.ones(len(rows), dtype=np.int64)
        for tree, sign in self.conditions:
            good &= satisfied(values_of(tree, rows), sign)
        return good.astype(np.int64)

    def shape(self, row: Row) -> tuple[int, ...]:
        rows = np.array([row], dtype=np.int64).reshape(1, -1)
        return tuple(int(values_of(tree, rows)[0]) for tree in self.sizes)

    def text(self, names: Sequence[str]) -> str:
        sizes = ", ".join(text_of(t, names) for t in self.sizes)
        return f"[{sizes}] if " + (" and ".join(f"{text_of(t, names)} {s}" for t, s in self.conditions) or "always")


def matrix(rows: Sequence[Row]) -> Array:
    width = len(rows[0]) if rows else 0
    return np.array(rows, dtype=np.int64).reshape(len(rows), width)


def infer(samples: Samples, depth: int = 3) -> Rule | None:
    """The rule that explains the samples; `None` if some size of the result has no tree within `depth`.

    Levels up to `depth` are enumerated whole; two more only along the forms e - c, e + c, e // s and e // s + c.
    """
    if not samples.passed:
        return None
    passed, shapes = matrix(list(samples.passed)), list(samples.passed.values())
    ranks = {len(s) for s in shapes}
    if len(ranks) != 1:
        return None
    sizes = []
    for d in range(ranks.pop()):
        tree = size_tree(passed, np.array([s[d] for s in shapes], dtype=np.int64), depth)
        if tree is None:
            return None
        sizes.append(tree)
    failed = matrix(list(samples.failed)) if samples.failed else np.zeros((0, passed.shape[1]), dtype=np.int64)
    return Rule(tuple(sizes), conditions(passed, failed, sizes))


def size_tree(rows: Array, wanted: Array, depth: int) -> Tree | None:
    """The first tree, by depth, with the values `wanted` `[N]` on symbols `[N, S]`."""
    symbols = _distinct(rows)
    if len(symbols) > 6 and depth > 1:
        close = _relevant(rows, wanted)
        symbols = [k for k in symbols if k in close] or symbols
    bank = Bank(rows, symbols)
    if wanted.tobytes() in bank.known:
        return bank.trees[bank.known[wanted.tobytes()]]
    if len(wanted) > 3 and bool((wanted == wanted[0]).all()):
        return ("c", int(wanted[0]))
    goals = _goals(bank, wanted)
    for level in range(2, depth + 1):
        found = _match(bank.values, bank.trees.__getitem__, goals)
        if found is not None:
            return found
        for made, values in bank.next_level():  # only looked through: the last level is too large to keep
            found = _match(values, made, goals)
            if found is not None:
                return found
        if level < depth:
            bank.deepen(most=1200)
    return _joined(rows, symbols, goals)


def _distinct(rows: Array) -> list[int]:
    """Symbols with values of their own: of those that are always equal, the first."""
    seen: dict[bytes, int] = {}
    for k in range(rows.shape[1]):
        seen.setdefault(rows[:, k].tobytes(), k)
    return list(seen.values())


def _relevant(rows: Array, wanted: Array) -> set[int]:
    """Symbols that change the result when they change alone, and those that never change alone."""
    found, alone = set[int](), set[int]()
    for i in range(len(rows)):
        differs = rows != rows[i]
        for j in np.flatnonzero(differs.sum(1) == 1):
            k = int(differs[j].argmax())
            alone.add(k)
            if wanted[j] != wanted[i]:
                found.add(k)
    return found | (set(range(rows.shape[1])) - alone)


@dataclass(frozen=True)
class _Goal:
    """A form around a tree e, right if e (over `divisor`, where there is one) takes the values `target`."""

    target: Array
    divisor: Array | None
    whole: Callable[[Tree], Tree]


def _goals(bank: Bank, wanted: Array) -> list[_Goal]:
    found = [_Goal(wanted, None, lambda e: e)]
    for c in (1, 2):
        found.append(_Goal(wanted - c, None, partial(_around, "+", ("c", c))))
        found.append(_Goal(wanted + c, None, partial(_around, "-", ("c", c))))
    for leaf, values in zip(bank.trees, bank.rows, strict=True):
        if leaf != ("c", 1) and bool((values >= 1).all()):
            found.append(_Goal(wanted, values, partial(_around, "//", leaf)))
            found.append(_Goal(wanted - 1, values, lambda e, leaf=leaf: ("+", ("//", e, leaf), ("c", 1))))  # type: ignore[misc]
    return found


def _around(operation: str, leaf: Tree, e: Tree) -> Tree:
    return (operation, e, leaf)


def _match(values: Array, made: Callable[[int], Tree], goals: Sequence[_Goal]) -> Tree | None:
    """The first tree that reaches a goal with a row of `values` `[M, N]`."""
    for goal in goals:
        rest = np.arange(len(values))
        for part in (slice(0, 2), slice(None)):  # most rows are out after two values
            some = values[rest][:, part]
            if goal.divisor is not None:
                some = combined("//", some, np.broadcast_to(goal.divisor[None, part], some.shape))
            rest = rest[(some == goal.target[None, part]).all(1)]
            if not len(rest):
                break
        if len(rest):
            return goal.whole(made(int(rest[0])))
    return None


def _joined(rows: Array, symbols: Sequence[int], goals: Sequence[_Goal]) -> Tree | None:
    """A difference of two trees of additions and products that reaches a goal, found by looking up one half.

    Under a division the halves meet on the rows where the divisor is 1.
    """
    bank = Bank(rows, symbols)
    for _ in range(2):
        bank.deepen(LINEAR, most=2500)
    values = bank.values
    for goal in goals:
        some = np.ones(len(rows), dtype=bool) if goal.divisor is None else goal.divisor == 1
        if int(some.sum()) < 5:
            continue
        part = np.ascontiguousarray(values[:, some])
        where: dict[bytes, int] = {}
        for k, row in enumerate(part):
            where.setdefault(row.tobytes(), k)
        for k, row in enumerate(part):
            other = where.get((goal.target[some] + row).tobytes())
            if other is not None:
                found = values[other] - values[k]
                found = found if goal.divisor is None else combined("//", found, goal.divisor)
                if (found == goal.target).all():
                    return goal.whole(("-", bank.trees[other], bank.trees[k]))
    return None
