"""Probe `quscore`: can someone who sees scores alone fool the network and leave its explanation as it was?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.descend import descend
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, mean_of, median_of, share
from cupel.core.types import Bounds, Subject, still
from cupel.ops.attacks import cross_entropy, stepping, tempered
from cupel.ops.folding import folded
from cupel.ops.labelled import evenly, labelled_inputs
from cupel.ops.masking import has_gradients
from cupel.ops.microbial import microbial, random_seeds
from cupel.ops.panel import median_margin
from cupel.ops.preprocess import fewer_bits, median_filtered
from cupel.ops.projections import random_in_ball, size_of
from cupel.ops.saliency import Interpreter, activation_maps, correlation, gradient_maps, smoothed, top_overlap
from cupel.ops.threats import Outcome, Threat, attacked

Shown = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]  # inputs, classes, again -> logits, maps

CARD = Card(
    name="quscore",
    family="robust",
    source="E. Abdukhamidov, M. Abuhamad, G. K. Thiruvathukal, H. Kim, T. Abuhmed, Microbial Genetic Algorithm-based "
    "Black-box Attack against Interpretable Deep Learning Systems, 2023, arXiv 2307.06496; L. Wang and others, "
    "MGAAttack, ACM MM 2020",
    tags=("evasion", "adversarial", "black box", "genetic", "queries", "transfer", "explanation"),
    needs=("classes", "bounded", "gradients", "images"),
    forks=1,
    readings=(
        "joint_success", "joint_queries", "joint_queries_median", "joint_overlap", "joint_correlation",
        "plain_success", "plain_queries", "plain_overlap", "plain_correlation", "random_success", "random_queries",
        "random_overlap", "random_correlation", "joint_source_overlap", "plain_source_overlap", "noise_l2",
        "source_fooled", "survives_bits", "survives_median",
    ),
    tiny={"examples": 12, "queries": 8, "population": 2, "seed_steps": 2, "eps": 0.1},
)  # fmt: skip


@dataclass(frozen=True)
class TransferSeeds:
    """First individuals for `microbial` from a source network: the signs of what fools it and keeps its maps.

    Maximises CE(f(x'), y) - weight ||g(x') - g(x)||^2 over the ball, from `population` random points; g(x) explains
    class y, g(x') the wrong class with the largest logit. Weight 0 leaves the maps alone.
    """

    source: nn.Module
    maps: Interpreter
    weight: float
    steps: int
    population: int

    def __call__(self, x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator) -> Tensor:
        many, labels = x.repeat(self.population, *[1] * (x.ndim - 1)), y.repeat(self.population)
        goal = self.maps(self.source, x, y, False)[1].detach().repeat(self.population, *[1] * (x.ndim - 2))

        def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            if not self.weight:
                return -cross_entropy(self.source(here), labels[rows]), None
            with torch.no_grad():
                wrong = self.source(here).scatter(1, labels[rows, None], -torch.inf).argmax(1)
            logits, maps = self.maps(self.source, here, wrong, True)
            change = (maps - goal[rows]).flatten(1).square().sum(1)
            return self.weight * change - cross_entropy(logits, labels[rows]), None

        start = threat.admit(many + random_in_ball(many, threat.eps, threat.norm, draw), many)
        move = stepping(threat, max(threat.eps / 4, 2.5 * threat.eps / self.steps))
        end = descend(start, objective, self.steps, move, lambda new, rows: threat.admit(new, many[rows]))
        return (end > many).view(self.population, *x.shape)


@dataclass(frozen=True)
class QuScore:
    r"""Fool the network by its scores alone, starting from what fools a copy of it and keeps the copy's explanations.

    The copy (source) is this recipe trained again from another seed. On it, `population` perturbations maximise
    CE(f'(x'), y) - weight ||g'(x') - g'(x)||^2, g' a map in [0, 1]: `cam`, class activation maps of the last block, or
    `grad`, input gradients. Their signs are bits b, x' = clip(x + eps (2 b - 1)), and seed a microbial genetic
    algorithm on the network itself: of two individuals the one with the lower CE copies genes of the other with
    chance `cross`, flips each with chance `flip`, and is asked about again. Three starts are compared: `joint`
    (above), `plain` (weight 0) and `random` bits. `..._success`: share of inputs read rightly that are fooled;
    `..._queries`: mean questions an input, the whole budget where it failed; `..._overlap`: intersection over union
    of the quarter of pixels that matter most to the class shown, before and after; `..._correlation`: of the two
    maps; `..._source_overlap`: the same overlap on the copy. On the joint examples: `noise_l2`, `source_fooled`, and
    `survives_bits`, `survives_median` (still misread after rounding to 4 bits and after a 3x3 median).

    Use: to ask whether showing an explanation beside a prediction would give an attack away, and how much a copy of
    the recipe helps an attacker. For the hardest score-based attack alone use `black-box`.

    Costs: one more training of the recipe, 3 `queries` forwards an input at most, and `population` x `seed_steps`
    double gradients an input on the copy. Nothing at inference.

    Shapes: inputs `[N, C, H, W]` within the subject's bounds, logits `[N, K]`.

    Raises:
        NotApplicable: no bounds, classes, images or gradients; for `cam` no block with feature maps.

    Source: Abdukhamidov et al. 2023 (partly reconstructed); Wang et al., MGAAttack, ACM MM 2020.

    Departs: untargeted; maps of the target are used to judge and never to attack; the copy's ReLU modules are softened
    (beta = 10) while seeds are made; fitness is the CE of z / T, T the median clean margin, as saturated scores would
    hide the way; `flip` 0 takes 0.001 or 1.28 flips an input, whichever is more; no JPEG.

    Example:
        >>> QuScore(maps="grad").cross
        0.7
    """

    eps: float = param(0.2, "how far every entry of an input may be moved, in input units", gt=0)
    maps: str = param("cam", "how predictions are explained", choices=("cam", "grad"))
    weight: float = param(0.1, "weight of the change of the map while seeds are made", ge=0)
    queries: int = param(1000, "questions for scores an input", ge=1)
    population: int = param(5, "individuals an input", ge=2)
    cross: float = param(0.7, "chance of a gene to be taken from the winner", ge=0, le=1)
    flip: float = param(0.0, "chance of a gene to flip (0: by the size of the input)", ge=0, le=1)
    seed_steps: int = param(10, "gradient steps on the copy for a seed", ge=1)
    examples: int = param(120, "test inputs that are attacked (0: all)", ge=0)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        x, y = self._inputs(subject, ctx)
        maps = self._interpreter(subject, x)
        seed = int(torch.randint(2**31, (1,), generator=ctx.rng("source")))
        source = ctx.fork(seed=seed).model
        return self.judged(subject, source, x, y, maps, ctx)

    def _inputs(self, subject: Subject, ctx: Context) -> tuple[Tensor, Tensor]:
        if subject.bounds is None:
            raise NotApplicable("quscore must know the range of the inputs; this workload gives none. Set its bounds.")
        x, y = labelled_inputs(subject, "quscore")
        if x.ndim != 4 or not has_gradients(subject.model, x[:2].to(ctx.device)):
            raise NotApplicable(
                "quscore must have images [N, C, H, W] and input gradients to judge explanations by; this subject has "
                "not. Use black-box."
            )
        rows = evenly(len(y), self.examples)
        return x[rows].to(ctx.device), y[rows].to(ctx.device)

    def _interpreter(self, subject: Subject, x: Tensor) -> Interpreter:
        if self.maps == "grad":
            return gradient_maps
        blocks = subject.anatomy.blocks
        if not blocks or blocks[-1] not in dict(subject.model.named_modules()):
            raise NotApplicable(
                'class activation maps must be taken from the last block; this network names none. Set maps: "grad".'
            )
        maps = partial(activation_maps, block=blocks[-1])
        try:
            with still(subject.model) as model:
                maps(model, x[:1], torch.zeros(1, dtype=torch.long, device=x.device), False)
        except ValueError as error:
            raise NotApplicable(f'class activation maps: {error} Or set maps: "grad".') from error
        return maps

    def judged(
        self, subject: Subject, source: nn.Module, x: Tensor, y: Tensor, maps: Interpreter, ctx: Context
    ) -> Readings:
        """The readings, with seeds from any `source`, which must have the modules that `maps` names."""
        assert subject.bounds is not None
        threat = Threat("linf", self.eps, subject.bounds, self.queries)
        flip = self.flip or min(0.5, max(0.001, 1.28 / x[0].numel()))
        outcomes: dict[str, Outcome] = {}
        found: dict[str, Reading] = {}
        with still(subject.model) as model, still(source), still(smoothed(source)) as soft, ctx.scope("attacks"):
            quick = folded(model, x[:16])
            loss = partial(tempered, temperature=median_margin(model, x, y))
            for name, weight in (("joint", self.weight), ("plain", 0.0), ("random", None)):
                made = partial(random_seeds, population=self.population)
                seeds = made if weight is None else TransferSeeds(soft, maps, weight, self.seed_steps, self.population)
                attack = partial(microbial, seeds=seeds, cross=self.cross, flip=flip, loss=loss)
                outcomes[name] = attacked(attack, model, x, y, threat, ctx.rng(name), fast=quick)
                found |= _told(name, outcomes[name], x, y, partial(maps, model))
                if weight is not None:
                    found[f"{name}_source_overlap"] = _overlaps(outcomes[name], x, y, partial(maps, source))[0]
            found |= _after(outcomes["joint"], model, source, x, y, subject.bounds)
        note = (
            f"{len(y)} inputs, linf {self.eps:g}, {self.queries} queries, 1 run from {self.population} individuals; "
            f"seeds: {self.seed_steps} steps on one copy, map weight {self.weight:g}; flip {flip:.3g}"
        )
        asked = {name: sorted(o.tally.queries[(o.fooled & o.clean).cpu()].tolist()) for name, o in outcomes.items()}
        return Readings.of((note,), {"queries": asked}, **{name: found[name] for name in CARD.readings})


def _told(name: str, outcome: Outcome, x: Tensor, y: Tensor, shown: Shown) -> dict[str, Reading]:
    """Success, questions, and the maps before and after, of one way to start."""
    right, won = outcome.clean, outcome.fooled & outcome.clean
    asked = outcome.tally.queries[right.cpu()].double()
    overlap, alike = _overlaps(outcome, x, y, shown)
    told = {
        f"{name}_success": share(int(won.sum()), max(int(right.sum()), 1), "lower"),
        f"{name}_queries": mean_of(asked.tolist() or [0.0], "queries", "higher"),
        f"{name}_overlap": overlap,
        f"{name}_correlation": alike,
    }
    if name == "joint":
        told["joint_queries_median"] = median_of(asked.tolist() or [0.0], "queries", "higher")
    return told


def _overlaps(outcome: Outcome, x: Tensor, y: Tensor, shown: Shown) -> tuple[Reading, Reading]:
    """Overlap and correlation of the maps of the class shown, of inputs that were right and then fooled."""
    won = outcome.fooled & outcome.clean
    largest = torch.full_like(y[won], -1)
    before, after = (shown(part, largest, False)[1].detach() for part in (x[won], outcome.x[won]))
    # With no input fooled every map is as it was.
    return (
        mean_of(top_overlap(before, after).tolist() or [1.0], "1"),
        mean_of(correlation(before, after).tolist() or [1.0], "1"),
    )


def _after(
    outcome: Outcome, model: nn.Module, source: nn.Module, x: Tensor, y: Tensor, bounds: Bounds
) -> dict[str, Reading]:
    """How large the changes are, and who else misreads the examples."""
    won = outcome.fooled & outcome.clean
    near, labels = outcome.x[won], y[won]

    def misread(net: nn.Module, inputs: Tensor) -> Reading:
        with torch.no_grad():
            wrong = net(inputs).argmax(1) != labels if len(inputs) else torch.zeros(0, dtype=torch.bool)
        return share(int(wrong.sum()), max(len(wrong), 1), "lower")

    return {
        "noise_l2": mean_of(size_of(near - x[won], "l2").tolist() or [0.0], "l2"),
        "source_fooled": misread(source, near),
        "survives_bits": misread(model, fewer_bits(near, bounds)),
        "survives_median": misread(model, median_filtered(near)),
    }
