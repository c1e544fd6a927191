"""Conditions that separate calls that worked from calls that were refused: `e == 0`, `e > 0`, `e >= 0` over symbols.

Source: J. Liu et al., NeuRI, ESEC/FSE 2023, arXiv 2302.02261, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cupel.ops.expressions import LINEAR, UNDEFINED, Array, Bank, Tree, size_of, values_of

MOST_CONDITIONS = 50


def satisfied(values: Array, sign: str) -> Array:
    good = values == 0 if sign == "== 0" else values > 0 if sign == "> 0" else values >= 0
    found: Array = (good & (values != UNDEFINED)).astype(np.int64)
    return found


@dataclass(frozen=True)
class _Candidate:
    tree: Tree
    sign: str
    breaks: Array  # [F] which refused calls do not satisfy it


def conditions(passed: Array, failed: Array, sizes: Sequence[Tree] = ()) -> tuple[tuple[Tree, str], ...]:
    """Conditions that all calls `passed` `[N, S]` satisfy, chosen greedily until the calls `failed` are explained.

    Of inequalities only those that some call just satisfies: a limit that nothing comes near is no evidence.
    """
    candidates = list(_candidates(passed, failed, sizes)) if len(failed) else []
    open_, chosen = np.ones(len(failed), dtype=bool), list[tuple[Tree, str]]()
    while open_.any() and len(chosen) < MOST_CONDITIONS and candidates:
        gains = np.array(
            [int((c.breaks & open_).sum()) - 0.02 * size_of(c.tree) - 0.3 * (c.sign != "== 0") for c in candidates]
        )
        best = candidates[int(gains.argmax())]
        gain = int((best.breaks & open_).sum())
        if gain < 1:
            break
        chosen.append((best.tree, best.sign))
        open_ &= ~best.breaks
        candidates = [c for c in candidates if (c.breaks & open_).any()]
    return tuple(chosen)


def _candidates(passed: Array, failed: Array, sizes: Sequence[Tree]) -> Iterator[_Candidate]:
    every = range(passed.shape[1])
    singles: list[Tree] = [*(("s", k) for k in every), ("c", 1), ("c", 2)]
    both = np.concatenate([passed, failed])
    bank = Bank(both, every)
    bank.deepen(LINEAR, most=400)
    count = len(passed)
    for tree in [*sizes, *(t for t in singles if t[0] == "s")]:
        yield from _signed(tree, values_of(tree, both), count)
    small = [(t, values_of(t, both)) for t in singles]
    values = bank.values
    for other, row in zip(bank.trees, bank.rows, strict=True):
        simple = other[0] in "sc"
        difference = values - row[None]
        low, high = difference[:, :count].min(1), difference[:, :count].max(1)
        equal = (low == 0) & (high == 0)
        tight = ((low == 0) | (low == 1)) & simple
        broken = (difference[:, count:] != 0).any(1) & equal | (difference[:, count:] < low[:, None]).any(1) & tight
        for k in np.flatnonzero((equal | tight) & broken):
            if bank.trees[k] != other:
                yield from _signed(("-", bank.trees[k], other), difference[k], count)
    for tree, row in small:  # against the size itself: a window that must fit
        for whole in sizes:
            yield from _signed(("-", tree, whole), row - values_of(whole, both), count)


def _signed(tree: Tree, values: Array, count: int) -> Iterator[_Candidate]:
    """The strongest of the signs that all of the first `count` values satisfy, if a later one does not."""
    here, there = values[:count], values[count:]
    if bool((here == UNDEFINED).any()):
        return
    low = int(here.min())
    sign = "== 0" if low == 0 == int(here.max()) else "> 0" if low == 1 else ">= 0" if low == 0 else ""
    if sign:
        breaks = satisfied(there, sign) == 0
        if breaks.any():
            yield _Candidate(tree, sign, breaks)
