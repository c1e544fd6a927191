"""The constraint solver behind random graphs, an optional package."""

from __future__ import annotations

from random import Random
from typing import Any

from cupel.core.errors import MissingExtra

EFFORT = 300_000  # for one question, in the solver's own unit: the same answer on every machine


def solver_module() -> Any:
    """The constraint solver.

    Raises:
        MissingExtra: z3 is not installed.
    """
    try:
        import z3
    except ImportError:
        raise MissingExtra("z3-solver", "fuzz") from None
    return z3


def binned(symbol: Any, low: int, high: int, draw: Random, z3: Any) -> Any:
    """A range for one symbol: [2^i, 2^(i+1)), or its least value."""
    if low == 0 and draw.random() < 0.3:
        return symbol == 0
    top = max(1, high).bit_length() - 1
    at = 1 << draw.randint(0, top)
    return z3.And(symbol >= min(at, high), symbol < max(2 * at, low + 1))
