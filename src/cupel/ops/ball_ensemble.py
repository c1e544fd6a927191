"""The attacks of one norm ball on one model, worst case by input: gradients, scores alone, and what to try next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from cupel.ops.apgd import apgd
from cupel.ops.attacks import fgsm, logits_ratio, pgd, tempered
from cupel.ops.carlini import carlini
from cupel.ops.eot import expected, is_random
from cupel.ops.folding import folded
from cupel.ops.masking import Sign, has_gradients, signs_of, zero_gradients
from cupel.ops.multi_target import multi_target
from cupel.ops.panel import median_margin
from cupel.ops.projections import size_of
from cupel.ops.square import square
from cupel.ops.threats import Attack, Model, Outcome, Tally, Threat, attacked

LONG, QUERIES = 100, 5000  # AutoAttack's steps of a run, and its queries
DRAWS = 20  # forwards that answer for a network that draws at random
PER_STEP = 4  # of them in one step of an attack: its many steps average the rest


@dataclass(frozen=True)
class Ensemble:
    """One network under attack.

    Args:
        threat: norm, radius, range, levels and steps.
        queries: of the attack that sees scores alone.
        nearest: how many of the inputs the search for the nearest adversarial input takes.
        model, quick: the judge, and the same as attacks may ask it faster.
        x, y: inputs `[N, ...]` and classes `[N]`.
        draw: a generator for an attack's name.
        random: the network draws at random, and both are means over draws.
    """

    threat: Threat
    queries: int
    nearest: int
    model: Model
    quick: Model
    x: Tensor
    y: Tensor
    draw: Callable[[str], torch.Generator]
    random: bool

    def found(self, thorough: bool) -> tuple[dict[str, Outcome], list[Sign]]:
        """Every outcome by attack, and the signs of masked gradients; Square alone where there are no gradients.

        Args:
            thorough: go on with what still stands, to at least the budgets of AutoAttack.
        """
        if not has_gradients(self.quick, self.x[:2]):
            alone = self.run("square", square, steps=4 * self.queries)
            return {"square": alone}, [Sign(True, "the model has no input gradients, so scores alone were used")]
        found, signs, zero = self.white_box()
        return found | (self.further(found, signs, zero) if thorough else {}), signs

    def run(self, name: str, attack: Attack, rows: Tensor | None = None, **changes: float) -> Outcome:
        """The outcome on all inputs; those not among `rows` were left alone, and count as standing."""
        threat = replace(self.threat, **changes)  # type: ignore[arg-type]
        if rows is None:
            return attacked(attack, self.model, self.x, self.y, threat, self.draw(name), fast=self.quick)
        part = attacked(attack, self.model, self.x[rows], self.y[rows], threat, self.draw(name), fast=self.quick)
        nowhere = torch.zeros(len(self.y), dtype=torch.bool, device=self.y.device)
        whole = Outcome(self.x.clone(), nowhere, nowhere.clone(), Tally.of(len(self.y)))
        whole.x[rows], whole.fooled[rows], whole.clean[rows] = part.x, part.fooled, part.clean
        whole.tally.add_at(rows.cpu(), part.tally)
        return whole

    def white_box(self) -> tuple[dict[str, Outcome], list[Sign], Tensor]:
        """Every attack of the ensemble by name, the signs of masking, and which inputs have no gradient, `[N]`."""
        cooled = partial(tempered, temperature=median_margin(self.model, self.x, self.y))
        side = self.threat.bounds.high - self.threat.bounds.low
        far = side if self.threat.norm == "linf" else side * math.sqrt(self.x[0].numel())
        found = {
            "fgsm": self.run("fgsm", fgsm),
            "pgd": self.run("pgd", pgd),
            "rescaled": self.run("rescaled", partial(pgd, loss=cooled)),
            "apgd": self.run("apgd", apgd),
            "apgd-dlr": self.run("apgd-dlr", partial(apgd, loss=logits_ratio)),
            "square": self.run("square", square, steps=self.queries),
            "cw": self.run("cw", carlini, torch.arange(min(self.nearest, len(self.y))), steps=50, eps=math.inf),
        }
        unbounded = self.run("unbounded", pgd, eps=far)
        zero = zero_gradients(self.quick, self.x, self.y) & found["pgd"].clean
        fooled = {name: outcome.fooled for name, outcome in found.items()}
        many = fooled["pgd"] | fooled["apgd"]  # all that many steps on the network's own loss can do
        signs = signs_of(zero, fooled["fgsm"], many, fooled["square"], unbounded.fooled, fooled["rescaled"])
        return found, signs, zero

    def further(self, found: dict[str, Outcome], signs: list[Sign], zero: Tensor) -> dict[str, Outcome]:
        """Longer attacks on what every attack before left standing."""
        more: dict[str, Outcome] = {}
        plans: list[tuple[str, Attack, int]] = [("targets", multi_target, LONG), ("restart", apgd, LONG)]
        if any(sign.shows for sign in signs):  # where gradients can be believed, scores alone find nothing more
            plans.append(("square-long", square, QUERIES))
        blind = zero | any(sign.shows for sign in signs[1:])  # the first sign is of each input for itself
        for name, attack, steps in plans:
            fallen = torch.stack([self.within(outcome) for outcome in (found | more).values()]).any(0)
            rows = (~fallen & blind if name == "square-long" else ~fallen).nonzero().flatten()
            more[name] = self.run(name, attack, rows, steps=max(steps, self.threat.steps))
        return more

    def within(self, outcome: Outcome) -> Tensor:
        """`[N]` bool: fooled inside the ball; a distance-minimising attack counts where it stayed inside."""
        return outcome.fooled & (size_of(outcome.x - self.x, self.threat.norm) <= self.threat.eps * (1 + 1e-4))

    def spent(self, found: Mapping[str, Outcome]) -> list[str]:
        """The budget of what was found, in words."""
        n, t = len(self.y), self.threat
        gradients, queries = (
            sum(float(getattr(o.tally, kind).sum()) for o in found.values()) / n for kind in ("gradients", "queries")
        )
        words = [f"{n} inputs, {t.norm} ball of radius {t.eps:g}"]
        words.append(f"{gradients:.0f} gradients and {queries:.0f} further forwards per input")
        if self.random:
            words.append(f"the network answers at random: judged by the mean log-probability of {DRAWS} draws")
        if "targets" in found:
            long = f" and {QUERIES} queries" if "square-long" in found else ""
            words.append(f"what stood met {LONG} auto-steps towards nine targets, a restart{long}")
        return words


def ensemble(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    queries: int,
    nearest: int,
    draw: Callable[[str], torch.Generator],
) -> Ensemble:
    """The ensemble on a network; one that draws at random is judged by the mean of `DRAWS` draws."""
    quick: Model = folded(model, x[:16]) if has_gradients(model, x[:2]) else model
    if not is_random(model, x[:16]):
        return Ensemble(threat, queries, nearest, model, quick, x, y, draw, random=False)
    judge, quick = expected(model, DRAWS), expected(quick, PER_STEP)
    return Ensemble(threat, queries, nearest, judge, quick, x, y, draw, random=True)
