"""A sequence of attacks run as one: each gets what still stands, and starts where the one before it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from cupel.ops.attacks import at_once
from cupel.ops.projections import into_ball, random_in_ball
from cupel.ops.threats import Attack, Model, Outcome, Tally, Threat


@dataclass(frozen=True)
class Nested(Threat):
    """A ball of radius `eps` around where an attack starts, inside the ball of radius `whole` around the original.

    Rows carry both points, `[N, 2, ...]`: where the input is and where it came from. So an attack that moves only by
    `admit(new, x[rows])` meets the right original for every row, whichever rows it works on.
    """

    whole: float = 0.1

    @classmethod
    def within(cls, threat: Threat, radius: float, steps: int) -> Nested:
        kept = {f.name: getattr(threat, f.name) for f in fields(Threat)}
        return cls(**{**kept, "eps": radius, "steps": steps, "whole": threat.eps})

    def admit(self, x: Tensor, centre: Tensor) -> Tensor:
        (start, origin), low, high = centre.unbind(1), self.bounds.low, self.bounds.high
        # The second projection leaves the first ball nowhere: it cannot part `x` from `start`, which is in both.
        inner = into_ball(x[:, 0], start, self.eps, self.norm, low, high)
        return torch.stack([into_ball(inner, origin, self.whole, self.norm, low, high), origin], 1)


@dataclass(frozen=True)
class Link:
    """One attack of a sequence.

    Args:
        attack: what moves the inputs.
        share: radius around its own start point, as a share of the threat's `eps`.
        steps: its `threat.steps`.
        how: `nested` if it moves by `threat.admit` alone and knows nothing of the shape of inputs; `began` if it takes
            `start=` besides; `after` if it keeps to a ball of its own or to none, and is drawn back afterwards; `free`
            if it knows no radius at all (damage to images), so that the ball of the original alone holds it.
        name: for people.
        cost: gradients for every step that an input pays which never falls; 0 for attacks without gradients, negative
            for that many gradients whatever the steps.
    """

    attack: Attack
    share: float = 1.0
    steps: int = 40
    how: str = "began"
    name: str = ""
    cost: float = 1.0

    @property
    def gradients(self) -> float:
        """Gradients that an input pays which never falls."""
        return self.cost * self.steps if self.cost >= 0 else -self.cost

    def run(
        self, model: Model, x: Tensor, at: Tensor, y: Tensor, threat: Threat, draw: torch.Generator, tally: Tally
    ) -> Tensor:
        """Where the attack leads from `at` `[N, ...]`, in the ball of `threat` around the original `x` `[N, ...]`."""
        radius = self.share * threat.eps
        if self.how in ("nested", "began"):
            pairs = torch.stack([at, x], 1)  # [N, 2, ...]
            inner = Nested.within(threat, radius, self.steps)
            if self.how == "nested":
                return self.attack(lambda z: model(z[:, 0]), pairs, y, inner, draw, tally=tally)[:, 0].detach()
            fresh = at + random_in_ball(at, radius, threat.norm, draw) if bool((at == x).all()) else at
            begin = torch.stack([fresh, x], 1)
            found = self.attack(lambda z: model(z[:, 0]), pairs, y, inner, draw, start=begin, tally=tally)  # type: ignore[call-arg]
            return found[:, 0].detach()
        own = replace(threat, eps=radius if self.how == "after" else torch.inf, steps=self.steps)
        found = own.admit(self.attack(model, at, y, own, draw, tally=tally).detach().to(x.dtype), at)
        return threat.admit(found, x)


@dataclass(frozen=True)
class Composite:
    """Links run one after another as one attack, for `attacked` to judge.

    x_0 = x, x_k = P(a_k(x_(k-1))): a_k moves within `share_k` eps of x_(k-1), P projects on the eps-ball of x, and
    only inputs that the network still reads rightly after k - 1 links are handed on.

    Args:
        links: in order.
        chained: False starts every link from the clean input, which makes the union of separate attacks.

    Source: Mao et al., Composite Adversarial Attacks, AAAI 2021, arXiv 2012.05434, section 3.1.
    """

    links: Sequence[Link]
    chained: bool = True

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator, *, tally: Tally | None = None
    ) -> Tensor:
        at, rows = x.clone(), torch.arange(len(x), device=x.device)
        for k, link in enumerate(self.links):
            if k:
                rows = rows[~_reached(model, at[rows], y[rows], threat)]
                if tally is not None:
                    tally.queries[rows.cpu()] += 1
            if not len(rows):
                break
            spent, begin = Tally.of(len(rows)), at[rows] if self.chained else x[rows]
            at[rows] = link.run(model, x[rows], begin, y[rows], threat, draw, spent)
            if tally is not None:
                tally.add_at(rows.cpu(), spent)
        return at

    @property
    def gradients(self) -> float:
        """Gradients that an input pays which never falls."""
        return sum(link.gradients for link in self.links)


def spent(outcome: Outcome) -> float:
    """Gradients per input; a forward alone counts as half of one."""
    return float((outcome.tally.gradients + outcome.tally.queries / 2).double().mean())


@torch.no_grad()
def _reached(model: Model, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    size = at_once(x)
    parts = [threat.reached(model(here), labels) for here, labels in zip(x.split(size), y.split(size), strict=True)]
    return torch.cat(parts) if len(x) else torch.zeros(0, dtype=torch.bool, device=x.device)
