"""NSGA-II: a population that spreads over the best trade-offs of several costs. Genomes are rows of small numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Genome = tuple[tuple[int, ...], ...]  # blocks of genes; a block is inherited whole
Costs = tuple[float, ...]  # lower is better in each


def dominates(a: Costs, b: Costs) -> bool:
    """Nowhere worse, and better somewhere.

    >>> dominates((1.0, 2.0), (1.0, 3.0)), dominates((1.0, 2.0), (1.0, 2.0))
    (True, False)
    """
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def ranks(costs: Sequence[Costs]) -> list[int]:
    """The front that each belongs to: 0 if nobody dominates it, 1 if only those of front 0 do, and so on."""
    beaten = [[j for j, b in enumerate(costs) if dominates(a, b)] for a in costs]
    over = [sum(dominates(b, a) for b in costs) for a in costs]
    found, front, rank = [0] * len(costs), [i for i, n in enumerate(over) if not n], 0
    while front:
        later = []
        for i in front:
            found[i] = rank
            for j in beaten[i]:
                over[j] -= 1
                if not over[j]:
                    later.append(j)
        front, rank = later, rank + 1
    return found


def crowding(costs: Sequence[Costs]) -> list[float]:
    """Sum over the costs of the gap between both neighbours, in units of the range; infinite at the ends.

    >>> crowding([(0.0, 4.0), (1.0, 2.0), (4.0, 0.0)])
    [inf, 2.0, inf]
    """
    found = [0.0] * len(costs)
    for k in range(len(costs[0]) if costs else 0):
        order = sorted(range(len(costs)), key=lambda i: costs[i][k])
        low, high = costs[order[0]][k], costs[order[-1]][k]
        found[order[0]] = found[order[-1]] = torch.inf
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            found[i] += (costs[after][k] - costs[before][k]) / (high - low) if high > low else 0.0
    return found


def standing(costs: Sequence[Costs]) -> list[tuple[int, float]]:
    """(rank, minus crowding in the own front) of each: lower is better in every comparison of the search."""
    rank, found = ranks(costs), [(0, 0.0)] * len(costs)
    for r in set(rank):
        members = [i for i, own in enumerate(rank) if own == r]
        for i, gap in zip(members, crowding([costs[i] for i in members]), strict=True):
            found[i] = (r, -gap)
    return found


@dataclass(frozen=True)
class Front:
    """What a search found.

    Args:
        best: genomes that nothing judged dominates, with their costs, by the first cost.
        judged: all genomes that were judged, in order.
        history: least first cost after every generation.
    """

    best: tuple[tuple[Genome, Costs], ...]
    judged: dict[Genome, Costs]
    history: tuple[float, ...]


def nsga2(
    sizes: Sequence[Sequence[int]],
    judge: Callable[[Genome], Costs],
    draw: torch.Generator,
    population: int = 40,
    generations: int = 20,
    normal: Callable[[Genome], Genome] = lambda genome: genome,
    first: Sequence[Genome] = (),
) -> Front:
    """Parents by binary tournament on (rank, crowding), children by one cut between blocks and by mutation.

    Each block of a child mutates with chance 1 / blocks: one of its genes is drawn anew. The best `population` of
    parents and children go on. A genome is judged once.

    Args:
        sizes: values of every gene of every block.
        normal: brings genomes that mean the same into one form.
        first: genomes of the first generation, which random ones fill up.

    Source: Deb, Pratap, Agarwal, Meyarivan, IEEE Transactions on Evolutionary Computation 6(2), 2002.
    """
    seen: dict[Genome, Costs] = {}
    history: list[float] = []

    def judged(genome: Genome) -> Genome:
        if genome not in seen:
            seen[genome] = judge(genome)
        return genome

    def least() -> float:
        return min(costs[0] for costs in seen.values())

    begun = [*first, *(_random(sizes, draw) for _ in range(population - len(first)))][:population]
    people = [judged(normal(genome)) for genome in begun]
    history.append(least())
    for _ in range(generations):
        fit = standing([seen[g] for g in people])
        couples = [(people[_winner(fit, draw)], people[_winner(fit, draw)]) for _ in range(population)]
        children = [judged(normal(_mutated(_crossed(a, b, draw), sizes, draw))) for a, b in couples]
        pool = list(dict.fromkeys(people + children))  # twins would crowd out what differs
        fit = standing([seen[g] for g in pool])
        people = [pool[i] for i in sorted(range(len(pool)), key=lambda i: fit[i])][:population]
        history.append(least())
    free = [g for g, own in seen.items() if not any(dominates(other, own) for other in seen.values())]
    best = sorted(((g, seen[g]) for g in free), key=lambda found: found[1])
    return Front(tuple(best), seen, tuple(history))


def _below(count: int, draw: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=draw))


def _random(sizes: Sequence[Sequence[int]], draw: torch.Generator) -> Genome:
    return tuple(tuple(_below(n, draw) for n in block) for block in sizes)


def _winner(fit: Sequence[tuple[int, float]], draw: torch.Generator) -> int:
    one, other = _below(len(fit), draw), _below(len(fit), draw)
    return one if fit[one] <= fit[other] else other


def _crossed(a: Genome, b: Genome, draw: torch.Generator) -> Genome:
    cut = 1 + _below(len(a) - 1, draw) if len(a) > 1 else 1
    return a[:cut] + b[cut:]


def _mutated(genome: Genome, sizes: Sequence[Sequence[int]], draw: torch.Generator) -> Genome:
    made = []
    for block, counts in zip(genome, sizes, strict=True):
        new = list(block)
        if float(torch.rand((), generator=draw)) < 1 / len(genome):
            at = _below(len(new), draw)
            new[at] = _below(counts[at], draw)
        made.append(tuple(new))
    return tuple(made)
