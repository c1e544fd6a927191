"""Operators described so that a solver can place them: which inputs they take, and the shape they give.

A size is a number or an expression of the solver; the same rule serves for both. A rule returns conditions, which must
all hold, and the sizes of the result. What must be a plain number (an axis, an order of axes) is picked beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

import torch

Size = Any  # int, or an expression of the solver
Shape = Sequence[Size]
Picks = dict[str, Any]
DTYPES = {"f": torch.float32, "d": torch.float64, "i": torch.int64, "b": torch.bool}


@dataclass(frozen=True)
class Operator:
    """One operator.

    Args:
        name: unique.
        types: combinations it takes, one letter of `DTYPES` an input, and the result's at the end: `"fff"`.
        rule: shapes of the inputs and attributes -> conditions, sizes of the result.
        call: tensors and attributes -> tensor; `None` where `layer` makes a module.
        layer: shapes of the inputs and attributes (numbers) -> a module called on the inputs.
        attributes: symbols with their least and largest value.
        pick: draw, ranks of the inputs, axes of each that are the batch (0 or 1) -> plain numbers, or `None` if these
            ranks do not fit.
        ranks: of the inputs, where only these fit; inputs after the first are then never rows of a batch.
        finite: whether finite inputs can give infinite or undefined results.
        smooth: whether a small change of the inputs makes a small change of the result.
    """

    name: str
    types: tuple[str, ...]
    rule: Callable[[list[Shape], Picks], tuple[list[Any], list[Size]]]
    call: Callable[[list[Any], Picks], Any] | None = None
    layer: Callable[[list[Sequence[int]], Picks], torch.nn.Module] | None = None
    attributes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    pick: Callable[[Random, Sequence[int], Sequence[int]], Picks | None] = lambda draw, ranks, leads: {}
    ranks: tuple[int, ...] = ()
    finite: bool = True
    smooth: bool = True

    @property
    def arity(self) -> int:
        return len(self.types[0]) - 1


def quotient(a: Size, b: Size) -> Size:
    """Floor of a / b for positive b; the solver writes whole division as `/`.

    >>> quotient(7, 2)
    3
    """
    return a // b if isinstance(a, int) and isinstance(b, int) else a / b


def product(sizes: Shape) -> Size:
    found: Size = 1
    for size in sizes:
        found = size if isinstance(found, int) and found == 1 else found * size
    return found


def unary(name: str, function: Callable[..., Any], types: str = "ff dd", **facts: Any) -> Operator:
    """An operator on every entry for itself."""
    return Operator(
        name,
        tuple(types.split()),
        lambda shapes, a: ([], list(shapes[0])),
        lambda x, a: function(x[0]),
        **facts,
    )


def binary(name: str, function: Callable[..., Any], types: str = "fff ddd iii", **facts: Any) -> Operator:
    """An operator on pairs of entries of two tensors that are broadcast."""
    return Operator(
        name,
        tuple(types.split()),
        lambda shapes, a: broadcast(shapes, a["ones"]),
        lambda x, a: function(*x),
        pick=pick_ones,
        **facts,
    )


def pick_ones(draw: Random, ranks: Sequence[int], leads: Sequence[int]) -> Picks | None:
    """For each operand, which axes, counted from the last, have size one and are spread over the others'."""
    rank = max(ranks)
    if any(leads) and (ranks[0] != rank or any(r != rank if lead else r >= rank for r, lead in zip(ranks, leads))):  # noqa: B905
        return None
    ones = [[False] * r for r in ranks]
    for axis in range(rank):
        there = [k for k, r in enumerate(ranks) if axis < r]
        held = axis == rank - 1 and any(leads)
        if len(there) > 1 and not held and draw.random() < 0.25:
            for k in draw.sample(there, len(there) - 1):
                ones[k][axis] = True
    return {"ones": tuple(tuple(o) for o in ones)}


def broadcast(shapes: Sequence[Shape], ones: Sequence[Sequence[bool]]) -> tuple[list[Any], list[Size]]:
    """Conditions and shape of tensors spread over each other; axes marked in `ones` have size one."""
    conditions, out = list[Any](), list[Size]()
    for axis in range(max(len(s) for s in shapes)):
        sizes = [(s[-1 - axis], o[axis]) for s, o in zip(shapes, ones, strict=True) if axis < len(s)]
        conditions += [size == 1 for size, one in sizes if one]
        full = [size for size, one in sizes if not one] or [1]
        conditions += [size == full[0] for size in full[1:]]
        out.insert(0, full[0])
    return conditions, out


@cache
def operators() -> Mapping[str, Operator]:
    """All operators that are described here, by name."""
    from cupel.ops.operator_layers import layers
    from cupel.ops.operator_shapes import shape_operators

    return {o.name: o for o in (*entrywise(), *shape_operators(), *layers())}


def entrywise() -> tuple[Operator, ...]:
    """Operators on entries: elementary functions, arithmetic, comparisons."""
    rough: Mapping[str, Any] = {"smooth": False}
    risky: Mapping[str, Any] = {"finite": False}
    whole = (("floor", torch.floor), ("ceil", torch.ceil), ("round", torch.round), ("sign", torch.sign))
    tame = (
        ("relu", torch.relu), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("sin", torch.sin), ("cos", torch.cos),
        ("atan", torch.atan), ("gelu", torch.nn.functional.gelu), ("silu", torch.nn.functional.silu),
    )  # fmt: skip
    wild = (
        ("exp", torch.exp), ("sqrt", torch.sqrt), ("log", torch.log), ("asin", torch.asin), ("acos", torch.acos),
        ("rsqrt", torch.rsqrt), ("reciprocal", torch.reciprocal),
    )  # fmt: skip
    pairs = (("add", torch.add), ("sub", torch.sub), ("mul", torch.mul))
    order = (("gt", torch.gt), ("le", torch.le), ("eq", torch.eq))
    return (
        *(unary(name, f) for name, f in tame),
        *(unary(name, f, **rough) for name, f in whole),
        *(unary(name, f, **risky) for name, f in wild),
        unary("abs", torch.abs, "ff dd ii"),
        unary("neg", torch.neg, "ff dd ii"),
        unary("clamp", lambda x: torch.clamp(x, -1.0, 1.5), "ff dd"),
        unary("not", torch.logical_not, "bb", **rough),
        unary("to_double", lambda x: x.double(), "fd id bd"),
        unary("to_float", lambda x: x.float(), "df if bf"),
        *(binary(name, f) for name, f in pairs),
        binary("div", torch.div, "fff ddd", **risky),
        binary("pow", torch.pow, "fff ddd", **risky),
        binary("maximum", torch.maximum),
        binary("minimum", torch.minimum),
        *(binary(name, f, "ffb iib", **rough) for name, f in order),
        binary("and", torch.logical_and, "bbb", **rough),
        Operator(
            "where",
            ("bfff", "biii"),
            lambda shapes, a: broadcast(shapes, a["ones"]),
            lambda x, a: torch.where(*x),
            pick=pick_ones,
            smooth=False,
        ),
    )
