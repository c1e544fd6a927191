"""The threat model that all evasion attacks share, and the judge of what they return.

An attack is `attack(model, x, y, threat, draw, tally=None) -> Tensor`: it never says whether it
succeeded. `attacked` clips what comes back into the ball and the box and asks the model again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from cupel.core.types import Bounds
from cupel.ops.projections import along, into_ball, size_of

Model = Callable[[Tensor], Tensor]  # inputs [N, ...] -> logits [N, K]


@dataclass(frozen=True)
class Threat:
    """What an adversary may do to one input.

    Args:
        norm: `linf` or `l2`.
        eps: radius of the ball around the input, in input units.
        bounds: the range that inputs live in.
        steps: gradient steps (or, for score-based attacks, queries) for every start.
        step: length of one step in input units; 0 takes a quarter of `eps`, or 2.5 `eps` / `steps` if
            that is longer, so that the steps cross the ball.
        restarts: how often the judge repeats the attack on inputs that still stand.
        targeted: the labels handed to the attack are the classes that inputs shall be read as, and only that is
            success.
        levels: values an input can be stored in over its range (256: 8 bits), to which the judge rounds; 0: any.
    """

    norm: str = "linf"
    eps: float = 0.1
    bounds: Bounds = Bounds()
    steps: int = 40
    step: float = 0.0
    restarts: int = 1
    targeted: bool = False
    levels: int = 0

    @property
    def stride(self) -> float:
        return self.step or max(self.eps / 4, 2.5 * self.eps / max(self.steps, 1))

    def admit(self, x: Tensor, centre: Tensor) -> Tensor:
        """`x` moved to where this adversary may go from `centre`."""
        return into_ball(x, centre, self.eps, self.norm, self.bounds.low, self.bounds.high)

    def stored(self, x: Tensor, centre: Tensor) -> Tensor:
        """`x` as it comes back from a file of `levels` values: the nearest level, or the next one towards `centre`."""
        if not self.levels:
            return x
        low, width = self.bounds.low, (self.bounds.high - self.bounds.low) / (self.levels - 1)
        at = (x - low) / width
        near, inner = at.round(), torch.where(x >= centre, (at - 1e-4).floor(), (at + 1e-4).ceil())
        towards = torch.where(at.sub(near).abs() < 1e-4, near, inner) * width + low
        nearest = near * width + low
        if self.norm == "linf":
            return torch.where((nearest - centre).abs() <= self.eps * (1 + 1e-6), nearest, towards)
        fits = size_of(nearest - centre, self.norm) <= self.eps
        return torch.where(along(fits, x), nearest, towards)

    def reached(self, logits: Tensor, y: Tensor) -> Tensor:
        """`[N]` bool: the goal is met by more than rounding, so that another batch size cannot undo it."""
        return reads(logits, y) if self.targeted else errs(logits, y)

    def gap(self, logits: Tensor, y: Tensor) -> Tensor:
        """How far the goal is, `[N]`: negative once it is met."""
        return -margin(logits, y) if self.targeted else margin(logits, y)


@dataclass(frozen=True)
class WholeThreat(Threat):
    """A threat whose goal is never met, so that an attack spends all of its steps.

    For inputs that shall fool another network than the one attacked: one that only just crosses the boundary is
    undone by any change, and a defence that is judged on such inputs looks strong for nothing.
    """

    def reached(self, logits: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(y, dtype=torch.bool)

    @classmethod
    def of(cls, threat: Threat) -> WholeThreat:
        return cls(**{f.name: getattr(threat, f.name) for f in fields(Threat)})


@dataclass
class Tally:
    """What every input cost: `gradients` `[N]` (forward and backward) and `queries` `[N]` (forward alone)."""

    gradients: Tensor
    queries: Tensor

    @classmethod
    def of(cls, count: int) -> Tally:
        return cls(torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long))

    def add_at(self, rows: Tensor, part: Tally) -> None:
        self.gradients[rows] += part.gradients
        self.queries[rows] += part.queries


class Attack(Protocol):
    """Moves inputs so that the model errs. May claim nothing: `attacked` judges."""

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator, *, tally: Tally | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Outcome:
    """What an attack achieved, as the judge saw it.

    Args:
        x: `[N, ...]` the attacked inputs, inside ball and box; the clean one where the attack failed.
        fooled: `[N]` bool: the model errs on `x`, or reads it as the target. Inputs on which it did so unattacked
            count as fooled.
        clean: `[N]` bool: it did not on the clean input.
        tally: gradients and queries per input, the judge's own forwards not counted.
    """

    x: Tensor
    fooled: Tensor
    clean: Tensor
    tally: Tally

    @property
    def robust(self) -> float:
        """Share of all inputs that stand before and after."""
        return 1.0 - float(self.fooled.double().mean())


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - max over the other classes, `[N, K]`, `[N]` -> `[N]`: negative where the model errs."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    return own - logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)


def errs(logits: Tensor, y: Tensor) -> Tensor:
    """`[N]` bool: wrong by more than rounding, so that another batch size cannot undo it."""
    with torch.no_grad():
        return margin(logits, y) < -1e-5 * logits.abs().amax(dim=1)


def reads(logits: Tensor, y: Tensor) -> Tensor:
    """`[N]` bool: read as `y` by more than rounding."""
    with torch.no_grad():
        return margin(logits, y) > 1e-5 * logits.abs().amax(dim=1)


def attacked(
    attack: Attack,
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    fast: Model | None = None,
    batch: int = 1024,
) -> Outcome:
    """Run `attack` on every input that `model` gets right, `threat.restarts` times, and judge the result.

    A targeted threat takes target classes for `y`, and every input that is not read so already.

    Args:
        fast: the same function as `model` in a quicker form (`ops.folding.folded`), for the attack's own
            calls; the judge always asks `model`.
        batch: most inputs in one forward.

    Returns:
        The outcome on `x` `[N, ...]`, `y` `[N]`.
    """
    clean = _stands(model, x, y, threat, batch)
    found, standing, tally = x.clone(), clean.clone(), Tally.of(len(x))
    for _ in range(threat.restarts):
        left = standing.nonzero().flatten()
        for rows in left.chunk(-(-len(left) // batch)) if len(left) else ():
            part = Tally.of(len(rows))
            tried = attack(fast or model, x[rows], y[rows], threat, draw, tally=part)
            tried = threat.stored(threat.admit(tried.detach().to(x.dtype), x[rows]), x[rows])
            tally.add_at(rows.cpu(), part)
            hit = rows[~_stands(model, tried, y[rows], threat, batch)]
            found[hit] = tried[torch.isin(rows, hit)]
            standing[hit] = False
    return Outcome(found, ~standing, clean, tally)


@torch.no_grad()
def _stands(model: Model, x: Tensor, y: Tensor, threat: Threat, batch: int) -> Tensor:
    if not len(x):
        return torch.zeros(0, dtype=torch.bool, device=x.device)
    hit = torch.cat(
        [model(part).argmax(1) == labels for part, labels in zip(x.split(batch), y.split(batch), strict=True)]
    )
    return ~hit if threat.targeted else hit


def distances(outcome: Outcome, x: Tensor, norm: str) -> Tensor:
    """How far every fooled input was moved, `[N]`; infinite where the attack failed."""
    far = size_of(outcome.x - x, norm)
    return torch.where(outcome.fooled, far, torch.full_like(far, torch.inf))
