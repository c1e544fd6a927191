"""The one-forward-one-backward schedule of a pipeline, and how long it takes on a described cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cupel.core.errors import ContractError
from cupel.ops.layer_costs import LayerCost
from cupel.ops.partition import Level, Stage, sent_bytes

FORWARD_SHARE = 1 / 3  # of a layer's time; its backward is two products where the forward is one


def warm_ups(replicas: Sequence[int], pipelined: bool = True) -> tuple[int, ...]:
    """Forwards that a worker of each stage does before it starts to alternate: ceil(workers behind it / m).

    With the one it then does first, ceil(machines / m) mini-batches enter a worker of the first stage. Without
    pipelining one is in flight. Rounding up matters: then ceil(after / m) * m falls from stage to stage, so the
    backward of mini-batch t and its averaging wait for no later backward, and the schedule cannot stand still.

    >>> warm_ups([1, 1, 1]), warm_ups([2, 1]), warm_ups([1, 1], pipelined=False)
    ((2, 1, 0), (1, 0), (0, 0))
    """
    after = [sum(replicas[k + 1 :]) for k in range(len(replicas))]
    return tuple(-(-a // m) if pipelined else 0 for a, m in zip(after, replicas, strict=True))


def order(replica: int, replicas: int, warm_up: int, batches: int) -> Iterator[tuple[str, int]]:
    """What one worker does, in order: `("forward", t)` and `("backward", t)` for the mini-batches that are its own.

    >>> " ".join(f"{kind[0]}{t}" for kind, t in order(0, 1, 1, 3))
    'f0 f1 b0 f2 b1 b2'
    """
    own = range(replica, batches, replicas)
    for t in own[:warm_up]:
        yield "forward", t
    for k, t in enumerate(own):
        if k + warm_up < len(own):
            yield "forward", own[k + warm_up]
        yield "backward", t


@dataclass(frozen=True)
class Simulated:
    """What a simulated run shows.

    Args:
        seconds: from the first forward to the last update.
        throughput: mini-batches a second over the middle half of the run.
        sent_bytes: by all workers, for one mini-batch.
        busy: share of the time that each stage's workers compute.
    """

    seconds: float
    throughput: float
    sent_bytes: float
    busy: tuple[float, ...]


def link_bandwidth(levels: Sequence[Level], one: int, other: int) -> float:
    """Bandwidth between two workers, numbered through the cluster: that of the lowest level they share."""
    size = 1
    for level in levels:
        size *= level.count
        if one // size == other // size:
            return level.bandwidth
    raise ContractError(f"workers must lie in the cluster of {size}; got {one} and {other}. Use fewer replicas.")


class _Clock:
    """When each worker is free, and when each message arrives."""

    def __init__(self, layers: Sequence[LayerCost], stages: Sequence[Stage], levels: Sequence[Level]) -> None:
        self.stages, self.levels = stages, levels
        self.base = [sum(s.replicas for s in stages[:k]) for k in range(len(stages))]  # each stage's first worker
        self.cost = [math.fsum(c.seconds for c in layers[s.first : s.last]) for s in stages]
        self.cut = [layers[s.last - 1].output_bytes for s in stages]
        self.weights = [math.fsum(c.weight_bytes for c in layers[s.first : s.last]) for s in stages]
        self.free = [0.0] * sum(s.replicas for s in stages)
        self.link: dict[tuple[int, int], float] = {}  # sender, receiver -> when the last message is through
        self.arrived: dict[tuple[str, int, int], float] = {}  # kind, stage, mini-batch
        self.ended: dict[tuple[int, int], list[float]] = {}  # stage, round -> ends of its backwards
        self.worked = [0.0] * len(stages)

    def worker(self, stage: int, t: int) -> int:
        return self.base[stage] + t % self.stages[stage].replicas

    def send(self, kind: str, source: int, target: int, t: int, at: float) -> None:
        one, other = self.worker(source, t), self.worker(target, t)
        size = self.cut[min(source, target)]
        began = max(at, self.link.get((one, other), 0.0))
        self.link[one, other] = began + size / link_bandwidth(self.levels, one, other)
        self.arrived[kind, target, t] = self.link[one, other]

    def compute(self, kind: str, stage: int, t: int, batches: int) -> bool:
        """Do one piece of work if its input has arrived."""
        last = len(self.stages) - 1
        fed = (kind == "forward" and stage > 0) or (kind == "backward" and stage < last)
        ready = self.arrived.get((kind, stage, t)) if fed else 0.0
        who = self.worker(stage, t)
        if ready is None or self.free[who] == math.inf:
            return False
        spent = self.cost[stage] * (FORWARD_SHARE if kind == "forward" else 1 - FORWARD_SHARE)
        end = max(self.free[who], ready) + spent
        self.free[who] = end
        self.worked[stage] += spent
        if kind == "forward" and stage < last:
            self.send("forward", stage, stage + 1, t, end)
        elif kind == "backward":
            if stage > 0:
                self.send("backward", stage, stage - 1, t, end)
            self._average(stage, t, batches, end)
        return True

    def _average(self, stage: int, t: int, batches: int, end: float) -> None:
        """The round's last backward starts the averaging; all replicas wait for it."""
        m = self.stages[stage].replicas
        ends = self.ended.setdefault((stage, t // m), [])
        ends.append(end)
        if m == 1 or len(ends) < min(m, batches - t // m * m):
            if m > 1:
                self.free[self.worker(stage, t)] = math.inf  # until the others are done
            return
        span = link_bandwidth(self.levels, self.base[stage], self.base[stage] + m - 1)
        done = max(ends) + 4 * (m - 1) * self.weights[stage] / (span * m)
        self.free[self.base[stage] : self.base[stage] + m] = [done] * m


def simulate(
    layers: Sequence[LayerCost], stages: Sequence[Stage], levels: Sequence[Level], batches: int, pipelined: bool = True
) -> Simulated:
    """Run `batches` mini-batches through the stages by the schedule, event by event.

    Transfers overlap with computing but queue between two workers; averaging among replicas does not
    overlap. Workers are numbered stage by stage through the cluster's levels.

    Raises:
        ContractError: the schedule stands still (a defect).
    """
    clock = _Clock(layers, stages, levels)
    warm = warm_ups([s.replicas for s in stages], pipelined)
    queues = [
        (k, list(order(r, s.replicas, warm[k], batches))[::-1]) for k, s in enumerate(stages) for r in range(s.replicas)
    ]
    while any(work for _, work in queues):
        moved = False
        for k, work in queues:
            while work and clock.compute(work[-1][0], k, work[-1][1], batches):
                work.pop()
                moved = True
        if not moved:
            raise ContractError("the schedule must keep moving; it stands still. Report these stages.")
    ends = sorted(end for (stage, _), found in clock.ended.items() if stage == 0 for end in found)
    low, high = len(ends) // 4, len(ends) * 3 // 4
    total = max(clock.free)
    steady = (high - low) / (ends[high] - ends[low]) if ends[high] > ends[low] else batches / total
    busy = tuple(w / (s.replicas * total) for w, s in zip(clock.worked, stages, strict=True))
    return Simulated(total, steady, sent_bytes(layers, stages), busy)
