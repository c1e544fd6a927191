"""Evolutionary search over named choices under constraints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
Genome = dict[str, object]


@dataclass(frozen=True)
class Evolved:
    """What a search found.

    Args:
        best: `None` if nothing it tried was allowed.
        score: of the best.
        history: the best score after every generation, the random first one included.
        tried: different genomes that were judged; `allowed`: how many of them fulfilled the constraints.
    """

    best: Genome | None
    score: float
    history: tuple[float, ...]
    tried: int
    allowed: int


def evolve(
    choices: Mapping[str, Sequence[object]],
    judge: Callable[[Genome], float | None],
    draw: torch.Generator,
    population: int = 16,
    generations: int = 8,
    rate: float = 0.2,
) -> Evolved:
    """Keep the best quarter of what is allowed; children are changed copies of one, or mixtures of two, of them.

    Args:
        choices: values of every gene.
        judge: the score of a genome, higher is better, or `None` where it breaks a constraint; asked once a genome.
        population: allowed genomes a generation; a generation gives up after twenty times as many draws.
        rate: chance of a gene to be drawn anew in a changed copy.
    """
    seen: dict[tuple[object, ...], float | None] = {}
    history: list[float] = []

    def allowed() -> list[tuple[float, tuple[object, ...]]]:
        return sorted(((s, g) for g, s in seen.items() if s is not None), key=lambda found: -found[0])

    for generation in range(generations + 1):
        parents = [g for _, g in allowed()[: max(2, population // 4)]]
        fresh = 0
        for _ in range(20 * population):
            if fresh == population:
                break
            genome = _child(choices, parents, draw, rate) if generation and parents else _random(choices, draw)
            if genome not in seen:
                seen[genome] = judge(dict(zip(choices, genome, strict=True)))
                fresh += seen[genome] is not None
        history.append(allowed()[0][0] if allowed() else float("-inf"))
    ranked = allowed()
    best = dict(zip(choices, ranked[0][1], strict=True)) if ranked else None
    return Evolved(best, history[-1], tuple(history), len(seen), len(ranked))


def _pick(values: Sequence[T], draw: torch.Generator) -> T:
    return values[int(torch.randint(len(values), (), generator=draw))]


def _random(choices: Mapping[str, Sequence[object]], draw: torch.Generator) -> tuple[object, ...]:
    return tuple(_pick(values, draw) for values in choices.values())


def _child(
    choices: Mapping[str, Sequence[object]], parents: Sequence[tuple[object, ...]], draw: torch.Generator, rate: float
) -> tuple[object, ...]:
    first, second = _pick(parents, draw), _pick(parents, draw)
    if float(torch.rand((), generator=draw)) < 0.5:
        return tuple(_pick(pair, draw) for pair in zip(first, second, strict=True))
    return tuple(
        _pick(values, draw) if float(torch.rand((), generator=draw)) < rate else gene
        for gene, values in zip(first, choices.values(), strict=True)
    )
