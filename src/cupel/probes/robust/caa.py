"""Probe `caa`: which short sequence of attacks breaks this network best, and how cheaply?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import NotApplicable, ParamError, nearest
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, mean_of, share
from cupel.core.types import Subject, still
from cupel.ops.attackers import GRADIENT, IMAGES, NEAREST, PEOPLE, SKIP, Space, ensemble, read, singles, written
from cupel.ops.composite import Composite, Link, spent
from cupel.ops.eot import expected, is_random
from cupel.ops.folding import folded
from cupel.ops.labelled import classes_of, evenly, labelled_inputs
from cupel.ops.masking import Sign, has_gradients
from cupel.ops.nsga2 import Front, Genome, nsga2
from cupel.ops.panel import Panel, median_margin
from cupel.ops.threats import Attack, Model, Outcome, Threat, attacked

CARD = Card(
    name="caa",
    family="robust",
    source="X. Mao, Y. Chen, S. Wang, H. Su, Y. He, H. Xue, Composite Adversarial Attacks, AAAI 2021, arXiv 2012.05434",
    tags=("evasion", "adversarial", "composite", "search", "nsga-ii", "gradient masking"),
    needs=("classes", "bounded", "gradients"),
    readings=(
        "robust_accuracy", "chain_accuracy", "apart_accuracy", "single_accuracy", "union_accuracy", "clean_accuracy",
        "chain_gradients", "single_gradients", "union_gradients", "chain_most", "union_most", "length",
        "search_accuracy", "masking_signs",
    ),
    ordered={"robust_accuracy": "trained"},
    tiny={"eps": 0.02, "examples": 16, "search_examples": 12, "steps": 2, "population": 3, "generations": 1,
          "restarts": 1, "budget": 8},
)  # fmt: skip
DAMAGE = ("gaussian-noise", "gaussian-blur", "contrast", "fog")  # of the default pool, where inputs are images
DRAWS = 20  # forwards that answer for a network that draws at random


@dataclass(frozen=True)
class Found:
    """A policy, and the search behind it (none if the policy was given)."""

    links: tuple[Link, ...]
    front: Front | None = None
    space: Space | None = None
    inputs: int = 0  # of the search

    @property
    def accuracy(self) -> Reading:
        """What stands on the search split: too low by what the choice among many policies gains there."""
        if self.front is None or not self.links:
            return share(0, 0)
        return share(round(self.front.best[0][1][0] * self.inputs), self.inputs)


@dataclass(frozen=True)
class Arena:
    """One network and the inputs it is attacked on: `x` `[N, ...]`, `y` `[N]`."""

    model: Model
    quick: Model  # the same function, for the attacks' own calls
    x: Tensor
    y: Tensor
    threat: Threat

    def run(self, attack: Attack, draw: torch.Generator) -> Outcome:
        return attacked(attack, self.model, self.x, self.y, self.threat, draw, fast=self.quick)


def searched(p: CAA, arena: Arena, names: Sequence[str], ctx: Context) -> Found:
    """NSGA-II over (robust accuracy, gradients per input) on the search split; the strongest within the budget."""
    space = Space(names, p.links, p.steps)

    def judge(genome: Genome) -> tuple[float, float]:
        links = space.links_of(genome)
        most = Composite(links).gradients
        if most > p.budget:  # worse than all that keep to the budget, and better the nearer it is
            return 1.0 + most / p.budget, most
        outcome = arena.run(Composite(links), ctx.rng("search"))
        return outcome.robust, spent(outcome)

    first, draw = space.alone(p.budget)[: p.population], ctx.rng("genes")
    front = nsga2(space.sizes, judge, draw, p.population, p.generations, space.normal, first)
    best, costs = front.best[0]
    return Found(space.links_of(best) if costs[0] <= 1 else (), front, space, len(arena.y))


@dataclass(frozen=True)
class CAA:
    r"""Search the sequence of attackers that breaks the network best for its gradients, and compare it with its peers.

    A policy is up to `links` triples (attacker, strength in eighths of eps, steps in eighths of `steps`), run as one
    attack: x_k = P(a_k(x_(k-1))), each on what still stands, within its own radius of x_(k-1) and within eps of the
    original. NSGA-II lowers robust accuracy on the search split (validation, else training inputs) and gradients per
    input together; the strongest policy of at most `budget` gradients is then judged on test inputs, by itself
    (`chain`), with every link begun anew from the clean input (`apart`), against the best of every single gradient
    attacker given as many gradients (`single`, chosen on the test inputs themselves), and against the union of three
    strong attacks with `restarts` (`union`). `..._gradients`: spent per input; `..._most`: by an input that never
    falls. `robust_accuracy`: what stands under all of them. `masking_signs` and its notes are those of `evasion`.

    Use: to find a cheap strong attack for a defence that will be judged many times (give it back as `policy`), and to
    see what only a mixture of attackers breaks. For one verdict on one network `evasion` is simpler.

    Costs: about `population` x (`generations` + 1) runs of at most `budget` gradients on `search_examples` inputs, then
    eighteen runs on the test inputs. Nothing in training or at inference.

    Shapes: inputs `[N, ...]` floats within the subject's bounds, logits `[N, K]`.

    Raises:
        NotApplicable: no bounds, no classes, no gradients, or nothing to search on.
        ParamError: an attacker that does not exist, or a policy that cannot be read.

    Source: Mao et al. 2021, sections 3 and 4; NSGA-II: Deb et al. 2002. Attackers as cited in `cupel.ops`.

    Departs: the policy must keep to `budget`; the first generation holds every gradient attacker alone; a forward
    counts as half a gradient, or attacks by scores would be free; later links begin exactly where the last ended,
    without a random start; momentum steps have a fixed length; frost and snow fill the pool of 32.

    Example:
        >>> CAA(policy=("multi-target:1:50", "cw-linf:1:125")).links
        3
    """

    eps: float = param(0.1, "how far an input may be moved, in input units", gt=0)
    norm: str = param("linf", "how the distance is measured", choices=("linf", "l2"))
    links: int = param(3, "most attackers of a policy", ge=1)
    steps: int = param(100, "steps of an attacker at its highest level, and of those of the union", ge=1)
    budget: int = param(480, "gradients that an input may cost the policy", ge=1)
    population: int = param(12, "policies of a generation", ge=2)
    generations: int = param(8, "generations after the first, random one", ge=0)
    search_examples: int = param(200, "inputs that the search attacks (0: all)", ge=0)
    examples: int = param(200, "test inputs that are attacked (0: all)", ge=0)
    restarts: int = param(5, "runs of the attacks of the union", ge=1)
    pool: tuple[str, ...] = param((), "attackers to choose from; none: as told under Departs")
    policy: tuple[str, ...] = param((), "a policy to judge in place of a search: attacker:strength:steps, in order")

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        if subject.bounds is None:
            raise NotApplicable("caa must know the range of the inputs; this workload gives none. Set its bounds.")
        x, y = self._taken(*labelled_inputs(subject, "caa"), self.examples, ctx)
        with still(subject.model) as model, ctx.scope("attacks"):
            if not has_gradients(model, x[:2]):
                raise NotApplicable("caa must have input gradients; this network has none. Use black-box.")
            both: tuple[Model, Model] = (model, folded(model, x[:16]))
            if is_random(model, x[:16]):
                both = (expected(both[0], DRAWS), expected(both[1], DRAWS))
            arena = Arena(*both, x, y, Threat(self.norm, self.eps, subject.bounds))
            return self.judged(arena, self.found(subject, arena, ctx), ctx)

    def found(self, subject: Subject, arena: Arena, ctx: Context) -> Found:
        """The given policy, or the one that the search finds."""
        if self.policy:
            try:
                links = read(self.policy)
            except ValueError as error:
                raise ParamError(
                    f"policy of caa must hold words such as pgd:0.5:25 (attacker, strength in (0, 1], steps); got "
                    f"{error}. Attackers are {', '.join(PEOPLE[:-1])}. Correct the word."
                ) from error
        else:
            data = getattr(subject.data, split := "valid" if len(subject.data.valid) else "train")
            if not len(data):
                raise NotApplicable(
                    "caa must have examples beside the test split to search on; got none. Give a policy."
                )
            inputs, classes = torch.cat([b.inputs for b in data.batches(500)]), classes_of(data, "caa", split)
            x, y = self._taken(inputs, classes, self.search_examples, ctx)
            return searched(self, replace(arena, x=x, y=y), self._names(x), ctx)
        self._fits([k.name for k in links], arena.x)
        return Found(links)

    def _names(self, x: Tensor) -> tuple[str, ...]:
        if not self.pool:
            extra = DAMAGE if x.ndim == 4 else ()
            return (*GRADIENT, *(NEAREST if self.norm == "l2" else ()), *extra, SKIP)
        for name in self.pool:
            if name not in PEOPLE:
                near = nearest(name, PEOPLE)
                raise ParamError(f"pool of caa must name attackers; got {name!r}.{near} Take {', '.join(PEOPLE)}.")
        self._fits(self.pool, x)
        return tuple(dict.fromkeys((*self.pool, SKIP)))

    def _fits(self, names: Sequence[str], x: Tensor) -> None:
        if (wrong := [name for name in names if name in IMAGES]) and x.ndim != 4:
            raise NotApplicable(f"{wrong[0]} must have images [N, C, H, W]; inputs have {x.ndim} axes. Leave it out.")

    def _taken(self, x: Tensor, y: Tensor, most: int, ctx: Context) -> tuple[Tensor, Tensor]:
        rows = evenly(len(y), most)
        return x[rows].to(ctx.device), y[rows].to(ctx.device)

    def judged(self, arena: Arena, found: Found, ctx: Context) -> Readings:
        """All readings of a policy on one network."""
        whole, single = Composite(found.links), Composite(found.links, chained=False)
        chain, apart = arena.run(whole, ctx.rng("chain")), arena.run(single, ctx.rng("apart"))
        rivals = singles(whole.gradients, self.restarts)
        alone = {name: arena.run(attack, ctx.rng(name)) for name, attack in rivals.items()}
        best = min(alone, key=lambda name: alone[name].robust)
        union = arena.run(ensemble(self.steps, self.restarts), ctx.rng("union"))
        others, signs = self._panel(arena, union, ctx)
        n = len(arena.y)
        fallen = torch.stack([o.fooled for o in (chain, apart, union, *alone.values(), *others)]).any(0)
        parts = {"chain": chain, "apart": apart, "single": alone[best], "union": union}
        named = {f"{name}_accuracy": share(int((~outcome.fooled).sum()), n) for name, outcome in parts.items()}
        costs = {name: o.tally.gradients.double().tolist() for name, o in parts.items()}
        shown = [sign.words for sign in signs if sign.shows]
        named |= {f"{name}_gradients": mean_of(costs[name], "gradients") for name in ("chain", "single", "union")}
        named |= {f"{name}_most": exact(max(costs[name]), "gradients") for name in ("chain", "union")}
        named |= {
            "robust_accuracy": share(int((~fallen).sum()), n),
            "clean_accuracy": share(int(chain.clean.sum()), n),
            "length": exact(len(found.links), "attackers"),
            "search_accuracy": found.accuracy,
            "masking_signs": exact(len(shown), "signs", "lower"),
        }
        policy = written(found.links)
        notes = [
            f"{n} inputs, {self.norm} ball of radius {self.eps:g}; policy: {' then '.join(policy) or 'none'}",
            f"best single attacker of as many gradients: {best}",
            f"union: auto-step PGD on two losses, {self.steps} steps x{self.restarts}, and nine targets",
        ]
        if found.front is not None:
            notes.append(f"{len(found.front.judged)} policies judged, {len(found.front.best)} of them on the front")
        notes += [f"sign of masked gradients: {words}" for words in shown]
        if shown:
            notes.append("with masked gradients the robust accuracy is an upper bound that other attacks may lower")
        figures = {"policy": list(policy), **_front(found), "single": {n: o.robust for n, o in alone.items()}}
        return Readings.of(notes, figures, **{name: named[name] for name in CARD.readings})

    def _panel(self, arena: Arena, union: Outcome, ctx: Context) -> tuple[list[Outcome], list[Sign]]:
        """What the attacks of the verdict did, and the signs of hidden gradients."""
        threat, heat = replace(arena.threat, steps=min(40, self.steps)), median_margin(arena.model, arena.x, arena.y)
        panel = Panel(arena.model, arena.quick, arena.x, arena.y, threat, ctx.rng, heat)  # type: ignore[arg-type]
        made = panel.gradient_attacks()
        # All that many steps on the network's own loss can do, against which the weaker attacks are held.
        many = replace(made["pgd"], fooled=made["pgd"].fooled | union.fooled)
        return list(made.values()), panel.signs(made | {"pgd": many}, min(100, self.budget))


def _front(found: Found) -> dict[str, object]:
    """The trade-offs found, as [robust accuracy, gradients per input, policy], and the best after each generation."""
    front, space = found.front, found.space
    best = [[*c, list(written(space.links_of(g)))] for g, c in front.best] if front and space else []
    return {"front": best, "history": list(front.history) if front else []}
