"""A microbial genetic algorithm on the signs of a perturbation: scores alone, one query for every new individual."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cupel.ops.attacks import Loss, cross_entropy
from cupel.ops.threats import Model, Tally, Threat, errs


class Seeds(Protocol):
    """Makes the first individuals: bits `[P, N, ...]` for inputs `[N, ...]` of classes `[N]`. Never asks the target."""

    def __call__(self, x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator) -> Tensor: ...


def random_seeds(x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator, population: int = 5) -> Tensor:
    """`population` individuals of random bits for every input."""
    return (torch.rand(population, *x.shape, generator=draw) < 0.5).to(x.device)


def decoded(bits: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """What an individual looks like: x + r (2 b - 1) in the box, r = eps for `linf` and eps / sqrt(D) for `l2`.

    >>> decoded(torch.tensor([[True, False]]), torch.tensor([[0.5, 0.05]]), Threat(eps=0.1))
    tensor([[0.6000, 0.0000]])
    """
    reach = threat.eps if threat.norm == "linf" else threat.eps / x[0].numel() ** 0.5
    return threat.admit(x + reach * (2.0 * bits.to(x.dtype) - 1.0), x)


def infected(loser: Tensor, winner: Tensor, cross: float, flip: float, draw: torch.Generator) -> Tensor:
    """The loser after it took each gene from the winner with chance `cross` and flipped each with chance `flip`."""
    take = (torch.rand(loser.shape, generator=draw) < cross).to(loser.device)
    turn = (torch.rand(loser.shape, generator=draw) < flip).to(loser.device)
    return torch.where(take, winner, loser) ^ turn


def rivals(population: int, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two different individuals, drawn for each of `count` inputs."""
    first = torch.randint(population, (count,), generator=draw)
    gap = torch.randint(1, population, (count,), generator=draw)
    return first, (first + gap) % population


def microbial(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    seeds: Seeds = random_seeds,
    cross: float = 0.7,
    flip: float = 0.02,
    loss: Loss = cross_entropy,
    tally: Tally | None = None,
) -> Tensor:
    """Pairs of sign patterns compete for every input by itself; the loser is rewritten and asked about again.

    The seeds are asked about first, one by one. Then two individuals are drawn: the one whose scores give the lower
    `loss` takes each gene of the other with chance `cross`, then flips each with chance `flip`; it alone is evaluated
    anew, so a generation costs one query. An input leaves as soon as it is fooled; `threat.steps` is its budget of
    queries. Few flips stall the search: `flip` times the number of entries should be 1 or more.

    Returns:
        `[N, ...]`: the individual that fooled, or the fittest one met.

    Source: Harvey, The Microbial Genetic Algorithm, ECAL 2009; Wang et al., MGAAttack: Toward More Query-efficient
    Black-box Attack by Microbial Genetic Algorithm, ACM MM 2020, section 3.

    Departs: inputs advance side by side, each with its own pool; an `l2` ball is met by shorter signs.
    """
    if threat.targeted:
        raise ValueError("the microbial attack must have no target: it only raises the loss. Use an untargeted threat.")
    bits = seeds(x, y, threat, draw).clone()  # [P, N, ...]
    population = len(bits)
    fitness = torch.full(bits.shape[:2], -torch.inf, dtype=x.dtype, device=x.device)
    best, top = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    rows = torch.arange(len(x), device=x.device)
    with torch.no_grad():
        for k in range(threat.steps if population > 1 else min(threat.steps, 1)):
            if not len(rows):
                break
            if k < population:
                at, child = torch.full_like(rows, k), bits[k, rows]
            else:
                one, other = (pick.to(x.device) for pick in rivals(population, len(rows), draw))
                lost = fitness[one, rows] < fitness[other, rows]
                at, winner = torch.where(lost, one, other), torch.where(lost, other, one)
                child = infected(bits[at, rows], bits[winner, rows], cross, flip, draw)
            tried = decoded(child, x[rows], threat)
            logits = model(tried)
            if tally is not None:
                tally.queries[rows.cpu()] += 1
            value, fooled = loss(logits, y[rows]), errs(logits, y[rows])
            bits[at, rows], fitness[at, rows] = child, value
            keep = fooled | (value > top[rows])
            best[rows[keep]], top[rows[keep]] = tried[keep], value[keep]
            rows = rows[~fooled]
    return best
