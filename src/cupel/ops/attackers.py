"""Thirty-two base attackers by name, as links of a sequence, and the space of sequences that a search looks through.

Source: Mao et al., Composite Adversarial Attacks, AAAI 2021, arXiv 2012.05434, table 1; `frost` and `snow` are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from cupel.ops.apgd import apgd
from cupel.ops.attacks import fgsm, momentum, negative_margin
from cupel.ops.carlini import carlini
from cupel.ops.composite import Composite, Link
from cupel.ops.ddn import ddn
from cupel.ops.image_damage import DAMAGES, damaged
from cupel.ops.multi_target import multi_target
from cupel.ops.nsga2 import Genome
from cupel.ops.odi import odi
from cupel.ops.spatial import spatial
from cupel.ops.spsa import spsa
from cupel.ops.threats import Attack, Model, Tally, Threat

SKIP = "skip"
# Attack, how it keeps to its ball (see `Link`), gradients a step (negative: in all).
GRADIENT: dict[str, tuple[Attack, str, float]] = {
    "fgsm": (fgsm, "nested", -1.0),
    "pgd": (apgd, "began", 1.0),
    "mpgd": (momentum, "began", 1.0),
    "cw-linf": (partial(apgd, loss=negative_margin), "began", 1.0),
    "multi-target": (multi_target, "nested", 4.8),  # nine targets for a fifth of the steps, three for all
    "odi-cosine": (partial(odi, schedule="cosine"), "began", 1.0),
    "odi-cyclical": (partial(odi, schedule="cyclical"), "began", 1.0),
    "odi-step": (partial(odi, schedule="step"), "began", 1.0),
}
NEAREST: dict[str, tuple[Attack, str, float]] = {"cw-l2": (carlini, "after", 5.0), "ddn": (ddn, "after", 1.0)}
SCORES: dict[str, tuple[Attack, str, float]] = {"spsa": (spsa, "nested", 0.0)}
IMAGES = ("spatial", *DAMAGES)
PEOPLE = (*GRADIENT, *NEAREST, *SCORES, *IMAGES, SKIP)
QUERIES = 10  # forwards that a score-based attack gets for every step it is given


def link(name: str, share: float, steps: int) -> Link:
    """The attacker `name` with strength `share` in (0, 1] and a budget of `steps`.

    `share` is a radius as a share of eps for attacks in a ball, and a strength for damage to images, whose result
    the ball of the original alone holds. A score-based attack gets ten forwards for a step.

    >>> link("multi-target", 1.0, 100).gradients, link("fog", 0.5, 100).gradients
    (480.0, 0.0)
    """
    table = GRADIENT | NEAREST | SCORES
    if name in table:
        attack, how, cost = table[name]
        return Link(attack, share, QUERIES * steps if name in SCORES else steps, how, name, cost)
    if name == "spatial":
        return Link(partial(spatial, degrees=60 * share, pixels=0.2 * share), share, steps, "free", name, 0.0)
    return Link(partial(_damage, kind=name, strength=share), share, 1, "free", name, 0.0)


def _damage(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    kind: str,
    strength: float,
    tally: Tally | None = None,
) -> Tensor:
    return damaged(x, kind, strength, threat.bounds, draw)


@dataclass(frozen=True)
class Space:
    """Sequences of `links` attackers out of `names`: each a block (attacker, strength level, steps level).

    Args:
        steps: of the highest of eight levels.
    """

    names: Sequence[str]
    links: int = 3
    steps: int = 100
    LEVELS: ClassVar[int] = 8

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        return [(len(self.names), self.LEVELS, self.LEVELS)] * self.links

    def normal(self, genome: Genome) -> Genome:
        """One form for genomes that mean the same: skips last, genes that nothing reads at zero."""
        made, skips = [], []
        for who, strength, steps in genome:
            name = self.names[who]
            if name == SKIP:
                skips.append((who, 0, 0))
            else:
                made.append((who, strength, 0 if name == "fgsm" or name in DAMAGES else steps))
        return (*made, *skips)

    def alone(self, budget: float) -> list[Genome]:
        """Every gradient attacker by itself at full strength, with the most steps that `budget` allows."""
        found: list[Genome] = []
        for who, name in enumerate(self.names):
            if name in GRADIENT and SKIP in self.names:
                skip = (self.names.index(SKIP), 0, 0)
                made = [((who, self.LEVELS - 1, s), *[skip] * (self.links - 1)) for s in range(self.LEVELS)]
                fits = [g for g in made if sum(k.gradients for k in self.links_of(g)) <= budget]
                found += [self.normal(fits[-1])] if fits else []
        return found

    def links_of(self, genome: Genome) -> tuple[Link, ...]:
        """The attackers of a genome, without the skips."""
        return tuple(
            link(self.names[who], (strength + 1) / self.LEVELS, max(1, round(self.steps * (level + 1) / self.LEVELS)))
            for who, strength, level in genome
            if self.names[who] != SKIP
        )


def written(links: Sequence[Link]) -> tuple[str, ...]:
    """Links as words that `read` understands: attacker:strength:steps.

    >>> written(read(["multi-target:1:50", "fog:0.5:1"]))
    ('multi-target:1:50', 'fog:0.5:1')
    """
    return tuple(f"{k.name}:{k.share:g}:{k.steps // QUERIES if k.name in SCORES else k.steps}" for k in links)


def read(words: Sequence[str]) -> tuple[Link, ...]:
    """The links that `words` name.

    Raises:
        ValueError: a word is not attacker:strength:steps with a known attacker, a strength in (0, 1], steps >= 1.
    """
    found = []
    for word in words:
        name, *rest = word.split(":")
        share, steps = (float(rest[0]), int(rest[1])) if len(rest) == 2 else (0.0, 0)
        if name not in PEOPLE[:-1] or not 0 < share <= 1 or steps < 1:
            raise ValueError(word)
        found.append(link(name, share, steps))
    return tuple(found)


def singles(budget: float, restarts: int) -> dict[str, Composite]:
    """Every gradient attacker alone at full strength, with all of `budget` in one run and in `restarts` runs."""
    made = {}
    for name in GRADIENT:
        for runs in {1, restarts} if name != "fgsm" else {1}:
            steps = max(1, int(budget / max(GRADIENT[name][2], 1.0) / runs))
            made[f"{name}:1:{steps} x{runs}"] = Composite((link(name, 1.0, steps),) * runs, chained=False)
    return made


def ensemble(steps: int, restarts: int) -> Composite:
    """The union it is compared with: auto-step PGD on cross-entropy and on the margin, and towards nine targets."""
    pair = tuple(link(name, 1.0, steps) for name in ("pgd", "cw-linf") for _ in range(restarts))
    return Composite((*pair, link("multi-target", 1.0, steps)), chained=False)
