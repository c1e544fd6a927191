"""A panel of attacks on one network, with the attack that rescales its logits and a verdict on hidden gradients.

For probes that compare networks under the same attacks: a defence and what it defends, a source and its copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from cupel.ops.attacks import fgsm, pgd, tempered
from cupel.ops.folding import folded
from cupel.ops.masking import Sign, signs_of, zero_gradients
from cupel.ops.square import square
from cupel.ops.threats import Attack, Model, Outcome, Tally, Threat, attacked, margin

Draws = Callable[[str], torch.Generator]  # a generator for every name


def borrowed(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    source: Model,
    tally: Tally | None = None,
) -> Tensor:
    """What one step on `source` makes of the inputs, to be judged on a network that is never asked.

    Inputs that `source` reads wrongly as they are stay where they are.
    """
    return fgsm(source, x, y, threat, draw, tally=tally)


def median_margin(model: Model, x: Tensor, y: Tensor) -> float:
    """Median margin of the inputs that are labelled rightly, or 1 if none is: the scale of the logits."""
    with torch.no_grad():
        gap = margin(model(x), y)
    right = gap[gap > 0]
    return max(float(right.median()), 1e-12) if len(right) else 1.0


def top_k_error(model: Model, outcome: Outcome, y: Tensor, k: int = 5) -> float:
    """Share of inputs whose label is not among the `k` largest logits after the attack."""
    with torch.no_grad():
        out = model(outcome.x)
    best = out.topk(min(k, out.shape[1]), dim=1).indices
    return 1.0 - float((best == y[:, None]).any(dim=1).double().mean())


@dataclass(frozen=True)
class Panel:
    """One frozen network under attack.

    Args:
        model: judged; `quick` is the same function for the attacks' own calls.
        x, y: inputs `[N, ...]` and their classes `[N]`.
        threat: norm, radius, steps, restarts of the iterated attacks.
        draws: randomness by name.
        temperature: what the attacker who knows about saturation divides the logits by.
    """

    model: nn.Module
    quick: nn.Module
    x: Tensor
    y: Tensor
    threat: Threat
    draws: Draws
    temperature: float

    @classmethod
    def of(
        cls, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, draws: Draws, temperature: float | None = None
    ) -> Panel:
        """A panel on `model`; without a `temperature` its median margin is taken."""
        heat = median_margin(model, x, y) if temperature is None else temperature
        return cls(model, folded(model, x[:16]), x, y, threat, draws, heat)

    def run(self, name: str, attack: Attack, rows: int | None = None, **changes: float) -> Outcome:
        """`attack` on the first `rows` inputs, under the panel's threat with `changes`."""
        threat = replace(self.threat, **changes)  # type: ignore[arg-type]
        draw = self.draws(f"{name}-{threat.eps:g}")
        return attacked(attack, self.model, self.x[:rows], self.y[:rows], threat, draw, fast=self.quick)

    def gradient_attacks(self, eps: float | None = None) -> dict[str, Outcome]:
        """`adaptive` (projected steps on logits / T), `fgsm` and `pgd`, at another radius if one is given."""
        eps = self.threat.eps if eps is None else eps
        knowing = partial(pgd, loss=partial(tempered, temperature=self.temperature))
        return {
            "adaptive": self.run("adaptive", knowing, eps=eps),
            "fgsm": self.run("fgsm", fgsm, eps=eps, restarts=1),
            "pgd": self.run("pgd", pgd, eps=eps),
        }

    def zero(self) -> Tensor:
        """`[N]` bool: inputs at which the cross-entropy has no gradient."""
        return zero_gradients(self.quick, self.x, self.y)

    def signs(self, found: Mapping[str, Outcome], queries: int) -> list[Sign]:
        """The five signs of hidden gradients, from `gradient_attacks` and two further attacks."""
        blind = self.run("square", square, steps=queries, restarts=1)
        side = self.threat.bounds.high - self.threat.bounds.low
        far = side if self.threat.norm == "linf" else side * self.x[0].numel() ** 0.5
        unbounded = self.run("unbounded", pgd, eps=far, restarts=1)
        zero = self.zero() & found["pgd"].clean
        fooled = {name: outcome.fooled for name, outcome in found.items()}
        return signs_of(zero, fooled["fgsm"], fooled["pgd"], blind.fooled, unbounded.fooled, fooled["adaptive"])
