"""Cut a chain of layers into stages and share the machines among them: the exact optimum by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from cupel.core.errors import PlanError
from cupel.ops.layer_costs import LayerCost


@dataclass(frozen=True)
class Level:
    """One level of a cluster: `count` units, each of them one unit of the level below, joined by equal links.

    Args:
        count: units at this level (workers in a machine, machines in a rack).
        bandwidth: of each unit's link, in bytes a second.
    """

    count: int
    bandwidth: float


@dataclass(frozen=True)
class Stage:
    """Layers `first` to `last` (not included) on `replicas` workers, which take the mini-batches in turn."""

    first: int
    last: int
    replicas: int = 1


@dataclass(frozen=True)
class Plan:
    """Stages in order, and the seconds a mini-batch that the slowest of them (or a link) needs."""

    seconds: float
    stages: tuple[Stage, ...]


def replicated_seconds(seconds: float, weight_bytes: float, replicas: int, bandwidth: float) -> float:
    """Time a mini-batch of a stage on `replicas` workers that average their gradients after each round.

    T = (seconds + 4 (m - 1) w / (B m)) / m: each worker sends and receives (m - 1) / m of the weights twice.
    """
    return (seconds + 4 * (replicas - 1) * weight_bytes / (bandwidth * replicas)) / replicas


def stash_bytes(layers: Sequence[LayerCost], machines_after: int, replicas: int) -> float:
    """Weights and activations that a worker holds for the mini-batches in flight, its present weights included."""
    held = math.fsum(c.output_bytes + c.weight_bytes for c in layers)
    return (math.ceil(machines_after / replicas) + 1) * held


def partition(layers: Sequence[LayerCost], levels: Sequence[Level], memory: float = math.inf) -> Plan:
    """The stages whose bottleneck is smallest on at most all machines of the cluster.

    For layers from i on and exactly m machines, A(i, m) is the least over the next cut j and m' of
    max(T(i..j, m'), 2 a_(i-1) / (B m'), A(j, m - m')). Levels are solved from the innermost out: what the
    best plan of a unit needs for layers i..j is the next level's time for them.

    Args:
        layers: costs in forward order.
        levels: of the cluster, innermost first.
        memory: bytes of each worker. On one level a plan that does not fit is never considered; on several
            the best plan is checked afterwards.

    Raises:
        PlanError: no plan fits into `memory`.
    """
    size = len(layers)
    weights = (0.0, *accumulate(c.weight_bytes for c in layers))
    below = {
        (i, j): Plan(math.fsum(c.seconds for c in layers[i:j]), (Stage(i, j),))
        for i in range(size)
        for j in range(i + 1, size + 1)
    }
    for level in levels[:-1]:
        below = {ends: _best(ends, layers, weights, below, level, math.inf) for ends in below}
    found = _best((0, size), layers, weights, below, levels[-1], memory if len(levels) == 1 else math.inf)
    if not found.stages or not _fits(layers, found.stages, memory):
        raise PlanError(
            f"the stages must fit into {memory:g} bytes a worker; the best plan does not. "
            "Add machines, or cut the batch size."
        )
    return found


def _best(
    ends: tuple[int, int],
    layers: Sequence[LayerCost],
    weights: Sequence[float],
    below: Mapping[tuple[int, int], Plan],
    level: Level,
    memory: float,
) -> Plan:
    first, last = ends

    @cache
    def rest(start: int, machines: int) -> Plan:
        if start == last:
            return Plan(0.0 if machines == 0 else math.inf, ())
        found = Plan(math.inf, ())
        for end in range(start + 1, last + 1):
            for copies in range(1, machines + 1):
                after = rest(end, machines - copies)
                if after.seconds == math.inf or stash_bytes(layers[start:end], machines - copies, copies) > memory:
                    continue
                inner = below[start, end]
                needed = replicated_seconds(inner.seconds, weights[end] - weights[start], copies, level.bandwidth)
                fed = 2 * layers[start - 1].output_bytes / (level.bandwidth * copies) if start > first else 0.0
                slowest = max(needed, fed, after.seconds)
                if slowest < found.seconds:
                    here = tuple(replace(s, replicas=s.replicas * copies) for s in inner.stages)
                    found = Plan(slowest, here + after.stages)
        return found

    return min((rest(first, machines) for machines in range(1, level.count + 1)), key=lambda plan: plan.seconds)


def _fits(layers: Sequence[LayerCost], stages: Sequence[Stage], memory: float) -> bool:
    after = [sum(s.replicas for s in stages[k + 1 :]) for k in range(len(stages))]
    return all(
        stash_bytes(layers[s.first : s.last], later, s.replicas) <= memory
        for s, later in zip(stages, after, strict=True)
    )


def sent_bytes(layers: Sequence[LayerCost], stages: Sequence[Stage]) -> float:
    """Bytes that all workers together send for one mini-batch: activations and their gradients, and averaging.

    Averaging the gradients of m replicas moves 2 (m - 1) w bytes once in m mini-batches.
    """
    cuts = math.fsum(2 * layers[s.last - 1].output_bytes for s in stages[:-1])
    shared = math.fsum(
        2 * (s.replicas - 1) / s.replicas * math.fsum(c.weight_bytes for c in layers[s.first : s.last]) for s in stages
    )
    return cuts + shared
