"""Small arithmetic trees over whole numbers: enumerated without doubles, and evaluated on numbers or in a solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]
Tree = tuple[Any, ...]  # ("s", number of a symbol), ("c", number), or (operation, tree, tree)
UNDEFINED = np.int64(-(2**40))  # a division by what is not positive
OPERATIONS = ("+", "-", "*", "//", "%", "min", "max")
LINEAR = ("+", "-", "*")
CONSTANTS = (1, 2)


def text_of(tree: Tree, names: Sequence[str]) -> str:
    """As a person writes it.

    >>> text_of(("+", ("//", ("s", 0), ("c", 2)), ("c", 1)), ["h"])
    '((h // 2) + 1)'
    """
    if tree[0] == "s":
        return names[tree[1]]
    if tree[0] == "c":
        return str(tree[1])
    a, b = (text_of(t, names) for t in tree[1:])
    return f"{tree[0]}({a}, {b})" if tree[0] in ("min", "max") else f"({a} {tree[0]} {b})"


def size_of(tree: Tree) -> int:
    """Leaves of a tree."""
    return 1 if tree[0] in "sc" else size_of(tree[1]) + size_of(tree[2])


def symbols_of(tree: Tree) -> set[int]:
    if tree[0] in "sc":
        return {tree[1]} if tree[0] == "s" else set()
    return symbols_of(tree[1]) | symbols_of(tree[2])


def combined(operation: str, a: Array, b: Array) -> Array:
    """One operation on values `[..., N]`; what is undefined in a part stays undefined."""
    if operation in ("//", "%"):
        good = b > 0
        with np.errstate(all="ignore"):
            out = np.where(
                good, a // np.where(good, b, 1) if operation == "//" else a % np.where(good, b, 1), UNDEFINED
            )
    else:
        apply: dict[str, Callable[..., Any]] = {
            "+": np.add, "-": np.subtract, "*": np.multiply, "min": np.minimum, "max": np.maximum,
        }  # fmt: skip
        out = apply[operation](a, b)
    lost = (a == UNDEFINED) | (b == UNDEFINED)
    return np.where(lost, UNDEFINED, out)


def values_of(tree: Tree, rows: Array) -> Array:
    """Values `[N]` of a tree on symbols `[N, S]`."""
    if tree[0] == "s":
        return rows[:, tree[1]]
    if tree[0] == "c":
        return np.full(len(rows), tree[1], dtype=np.int64)
    return combined(tree[0], values_of(tree[1], rows), values_of(tree[2], rows))


def in_solver(tree: Tree, symbols: Sequence[Any], z3: Any) -> tuple[Any, list[Any]]:
    """A tree on sizes (numbers or expressions of the solver), and conditions: divisors are positive."""
    if tree[0] == "s":
        return symbols[tree[1]], []
    if tree[0] == "c":
        return tree[1], []
    (a, more), (b, also) = (in_solver(t, symbols, z3) for t in tree[1:])
    conditions = more + also
    plain = isinstance(a, int) and isinstance(b, int)
    if tree[0] in ("//", "%"):
        conditions.append(b >= 1)
        if plain:
            return ((a // b, a % b)[tree[0] == "%"] if b else 0), conditions
        return (a / b if tree[0] == "//" else a % b), conditions
    if tree[0] in ("min", "max"):
        if plain:
            return (min(a, b) if tree[0] == "min" else max(a, b)), conditions
        return z3.If((a <= b) if tree[0] == "min" else (a >= b), a, b), conditions
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b}[tree[0]](), conditions


class Bank:
    """Trees with the values they take on given symbols `[N, S]`; of trees with equal values the first, and no other."""

    def __init__(self, rows: Array, symbols: Sequence[int], constants: Sequence[int] = CONSTANTS) -> None:
        self.trees: list[Tree] = []
        self.rows: list[Array] = []
        self.known: dict[bytes, int] = {}
        for leaf in (*(("s", k) for k in symbols), *(("c", c) for c in constants)):
            self.add(leaf, values_of(leaf, rows))
        self.levels = [len(self.trees)]

    def add(self, tree: Tree, values: Array) -> bool:
        key = values.tobytes()
        if key in self.known or bool((values == UNDEFINED).any()):
            return False
        self.known[key] = len(self.trees)
        self.trees.append(tree)
        self.rows.append(values)
        return True

    @property
    def values(self) -> Array:
        return np.stack(self.rows)

    def deepen(self, operations: Sequence[str] = OPERATIONS, most: int = 4000) -> None:
        """Add the trees that are one level deeper, up to `most` in all."""
        for made, values in self.next_level(operations):
            for k in range(len(values)):
                if len(self.trees) >= most:
                    break
                self.add(made(k), values[k])
        self.levels.append(len(self.trees))

    def next_level(self, operations: Sequence[str] = OPERATIONS) -> Iterator[tuple[Callable[[int], Tree], Array]]:
        """Blocks `[M, N]` of values of trees one level deeper, with a function that tells the tree of a row.

        No constants alone; of what commutes one order.
        """
        held, trees = self.values, list(self.trees)
        fresh = self.levels[-2] if len(self.levels) > 1 else 0
        for operation in operations:
            commutes = operation in ("+", "*", "min", "max")
            for i in range(len(trees)):
                begin = i if commutes else 0
                begin = begin if i >= fresh else max(begin, fresh)
                if trees[i][0] == "c" and operation in ("min", "max", "//", "%"):
                    continue
                if begin < len(trees):
                    yield _maker(operation, trees, i, begin), combined(operation, held[i][None], held[begin:])


def _maker(operation: str, trees: Sequence[Tree], i: int, begin: int) -> Callable[[int], Tree]:
    return lambda k: (operation, trees[i], trees[begin + k])
