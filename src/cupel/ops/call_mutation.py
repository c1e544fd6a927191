"""Variants of recorded calls, executed: which sizes and numbers a function takes, and which it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from cupel.ops.call_records import Instance
from cupel.ops.isolated import can_isolate, isolated

Row = tuple[int, ...]


@dataclass
class Samples:
    """Symbols of calls that worked, with the shape they gave, and of calls that were refused."""

    passed: dict[Row, tuple[int, ...]] = field(default_factory=dict)
    failed: dict[Row, None] = field(default_factory=dict)

    def add(self, row: Row, shape: tuple[int, ...] | None) -> None:
        if shape is None:
            self.failed[row] = None
        else:
            self.passed[row] = shape


def augmented(instance: Instance, draw: Random, passes: int = 100, most: int = 400, seconds: float = 30.0) -> Samples:
    """Recorded calls of an instance and their variants, executed in a process of their own.

    Args:
        passes: successes after which to stop.
        most: executions.
    """
    samples = Samples()
    rows = list(dict.fromkeys(instance.rows))
    tried = list(itertools.islice(dict.fromkeys(itertools.chain(rows, _interleaved(instance, rows, draw))), most))
    for row, shape in zip(tried, results(instance, tried, seconds), strict=False):
        if len(samples.passed) >= passes and shape is not None:
            continue
        samples.add(row, shape)
    return samples


def results(instance: Instance, rows: Sequence[Row], seconds: float = 30.0) -> list[tuple[int, ...] | None]:
    """What `instance.tried` gives for each row; a row at which the process dies counts as refused."""
    if not can_isolate():
        return [instance.tried(row) for row in rows]
    outcome = isolated(lambda: [instance.tried(row) for row in rows], seconds)
    if outcome.kind == "returned":
        found: list[tuple[int, ...] | None] = outcome.value
        return found
    if len(rows) == 1:
        return [None]
    half = len(rows) // 2
    return results(instance, rows[:half], seconds / 2) + results(instance, rows[half:], seconds / 2)


def _interleaved(instance: Instance, rows: Sequence[Row], draw: Random) -> Iterator[Row]:
    """Variants of all recorded rows in turn, so that a limit does not leave one out."""
    sources = [_variants(instance, row, draw) for row in rows]
    while sources:
        for source in list(sources):
            row = next(source, None)
            if row is None:
                sources.remove(source)
            else:
                yield row


def _variants(instance: Instance, row: Row, draw: Random) -> Iterator[Row]:
    """Changed rows: numbers 0 and -2, symbols of one value together, one or two symbols larger, swapped, any subset."""
    count = len(row)
    numbers = _number_places(instance)
    ties = [[k for k in range(count) if row[k] == v] for v in dict.fromkeys(row)]
    ways = [
        (_with(row, {k: v}) for k in numbers for v in (0, -2)),
        (_with(row, {k: row[k] + by for k in tie}) for by in (1, 2, 3) for tie in ties if len(tie) > 1),
        (_with(row, {k: row[k] + by}) for by in (1, 2, 3) for k in range(count)),
        (_two(row, *ab, *xy) for ab in itertools.combinations(range(count), 2) for xy in ((1, 1), (2, 1), (1, 2))),
        (_with(row, {a: row[b], b: row[a]}) for (a, b) in itertools.combinations(range(count), 2) if row[a] != row[b]),
        (_with(row, {k: row[k] + 2 for k in part}) for part in _subsets(count)),
        (_with(row, {k: max(1 if k not in numbers else 0, row[k] - by)}) for by in (1, 2) for k in range(count)),
        (_random(row, numbers, ties, draw) for _ in range(400)),
    ]  # fmt: skip
    while ways:  # a little of each, the most telling changes first
        for way in list(ways):
            found = list(itertools.islice(way, 4))
            if not found:
                ways.remove(way)
            yield from found


def _two(row: Row, a: int, b: int, x: int, y: int) -> Row:
    return _with(row, {a: row[a] + x, b: row[b] + y})


def _random(row: Row, numbers: Sequence[int], ties: Sequence[Sequence[int]], draw: Random) -> Row:
    """New values for some of the values in a row; symbols of one value usually stay equal."""
    changed: dict[int, int] = {}
    for tie in ties:
        if draw.random() < 0.4:
            together = draw.random() < 0.8
            value = draw.randint(1, 9)
            for k in tie:
                changed[k] = (value if together else draw.randint(1, 9)) - (k in numbers and draw.random() < 0.3)
    return _with(row, changed)


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    if count <= 8:
        for size in range(2, count + 1):
            yield from itertools.combinations(range(count), size)


def _with(row: Row, changes: dict[int, int]) -> Row:
    return tuple(changes.get(k, v) for k, v in enumerate(row))


def _number_places(instance: Instance) -> list[int]:
    at, found = 0, []
    for slot in instance.slots:
        if slot.kind == "number":
            found.append(at)
        at += slot.rank if slot.kind == "tensor" else slot.kind == "number"
    return found


def fresh_rows(known: Sequence[Row], instance: Instance, draw: Random, count: int) -> list[Row]:
    """Rows that are not among `known`: random new values for symbols of calls that worked."""
    numbers, seen, found = _number_places(instance), set(known), dict[Row, None]()
    for _ in range(4 * count):
        row = draw.choice(list(known))
        ties = [[k for k in range(len(row)) if row[k] == v] for v in dict.fromkeys(row)]
        new = _random(row, numbers, ties, draw)
        if new not in seen and len(found) < count:
            found[new] = None
    return list(found)
