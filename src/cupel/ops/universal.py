"""Universal perturbations: one shift of the inputs that makes a network err on most of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.descend import descend
from cupel.core.types import Batch, Examples
from cupel.ops.attacks import stepping
from cupel.ops.projections import into_ball, random_in_ball
from cupel.ops.threats import Model, Threat


def clamped_loss(logits: Tensor, y: Tensor, most: float) -> Tensor:
    """min(CE, most) per row: rows that are lost already stop pulling."""
    return F.cross_entropy(logits, y, reduction="none").clamp_max(most)


def universal(
    model: Model,
    data: Examples,
    threat: Threat,
    draw: torch.Generator,
    *,
    target: int | None = None,
    most: float = 9.0,
    passes: int = 10,
    batch: int = 128,
) -> Tensor:
    """One delta `[1, ...]` in the ball that raises mean min(CE(f(x + delta), y), most) over `data`.

    delta <- P(delta + s sign(grad)) on one shuffled batch after the other, s = `threat.step` or eps / 10;
    steps of unit length times s in an `l2` ball. With a `target` t the same loss towards t falls. Inputs
    are clipped into the threat's bounds before the model sees them. The first of `threat.restarts` starts
    at zero, the others at random points of the ball; the best pass of each run is kept by its loss, and
    of the runs the one that evades on most of `data`.

    Args:
        model: the whole of what is attacked: for an ensemble its joint output.
        data: what the attacker holds; perturbations are judged on other inputs (`evaded`).
        passes: over `data`, one gradient an input each.

    Source: Shafahi et al., AAAI 2020, arXiv 1811.11304, algorithm 2 (stochastic, clamped); Co, Munoz-Gonzalez,
    Kanthan, Glocker, Lupu, ICANN 2021, arXiv 2104.10459.
    """
    like, found, most_evaded = data.inputs[:1], torch.zeros_like(data.inputs[:1]), -1.0
    for k in range(threat.restarts):
        start = random_in_ball(like, threat.eps, threat.norm, draw) if k else torch.zeros_like(like)
        delta = _Ascent(model, data, threat, draw, target, most, batch).run(start, passes)
        hits = float(evaded(model, data, delta, threat, target).double().mean()) if threat.restarts > 1 else 0.0
        if hits > most_evaded:
            found, most_evaded = delta, hits
    return found


class _Ascent:
    """One run: the batches that are still to come in this pass, and the best pass so far."""

    def __init__(
        self,
        model: Model,
        data: Examples,
        threat: Threat,
        draw: torch.Generator,
        target: int | None,
        most: float,
        batch: int,
    ) -> None:
        self.model, self.data, self.threat, self.draw = model, data, threat, draw
        self.target, self.most, self.batch = target, most, batch
        self.queue: list[Batch] = []
        self.total, self.best = torch.zeros((), device=data.inputs.device), -math.inf

    def run(self, start: Tensor, passes: int) -> Tensor:
        self.found = start
        steps = passes * math.ceil(len(self.data) / self.batch)
        descend(
            start, self.objective, steps, stepping(self.threat, self.threat.step or self.threat.eps / 10), self.back
        )
        return self.found

    def objective(self, delta: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        self.queue = self.queue or _batches(self.data, self.batch, self.draw)
        b = self.queue.pop()
        goal = b.targets if self.target is None else torch.full_like(b.targets, self.target)
        values = clamped_loss(self.model(moved(b.inputs, delta, self.threat)), goal, self.most)
        values = values if self.target is None else -values
        self.total += values.detach().sum()
        return -values.mean()[None], None

    def back(self, new: Tensor, rows: Tensor) -> Tensor:
        here = cut(new, self.threat)
        if not self.queue:  # the pass is judged by what it met on its way, which costs no further forward
            if float(self.total) > self.best:
                self.best, self.found = float(self.total), here.clone()
            self.total.zero_()
        return here


def cut(delta: Tensor, threat: Threat) -> Tensor:
    """`delta` brought into the threat's ball around no shift at all."""
    return into_ball(delta, torch.zeros_like(delta), threat.eps, threat.norm, -math.inf, math.inf)


def _batches(data: Examples, size: int, draw: torch.Generator) -> list[Batch]:
    order = torch.randperm(len(data), generator=draw).to(data.targets.device)
    return [Batch(data.inputs[r], data.targets[r], data.index[r.cpu()]) for r in order.split(size)]


def moved(x: Tensor, delta: Tensor, threat: Threat) -> Tensor:
    """`x` `[N, ...]` shifted by `delta` `[1, ...]`, inside the bounds of the inputs."""
    return (x + delta).clamp(threat.bounds.low, threat.bounds.high)


@torch.no_grad()
def evaded(
    model: Model, data: Examples, delta: Tensor, threat: Threat, target: int | None = None, batch: int = 1024
) -> Tensor:
    """`[N]` bool: the model errs under the shift, or says `target`; delta is brought into the ball first."""
    delta = cut(delta, threat)
    said = torch.cat([model(moved(x, delta, threat)).argmax(1) for x in data.inputs.split(batch)])
    return said != data.targets if target is None else said == target
