"""Probe `evasion`: how many test inputs stay right when an adversary may move them a little."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, median_of, share
from cupel.core.types import Bounds, Subject, still
from cupel.ops.apgd import apgd
from cupel.ops.attacks import fgsm, logits_ratio, pgd, tempered
from cupel.ops.carlini import carlini
from cupel.ops.eot import expected, is_random
from cupel.ops.folding import folded
from cupel.ops.labelled import labelled_inputs
from cupel.ops.masking import Sign, has_gradients, signs_of, zero_gradients
from cupel.ops.multi_target import multi_target
from cupel.ops.panel import median_margin
from cupel.ops.projections import size_of
from cupel.ops.square import square
from cupel.ops.threats import Attack, Model, Outcome, Tally, Threat, attacked

CARD = Card(
    name="evasion",
    family="robust",
    source="F. Croce, M. Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse "
    "Parameter-free Attacks, ICML 2020, arXiv 2003.01690; masking: A. Athalye, N. Carlini, D. Wagner, Obfuscated "
    "Gradients Give a False Sense of Security, ICML 2018, arXiv 1802.00420",
    tags=("evasion", "adversarial", "fgsm", "pgd", "apgd", "carlini-wagner", "square", "gradient masking"),
    needs=("classes", "bounded"),
    readings=("robust_accuracy", "clean_accuracy", "fgsm", "pgd", "apgd", "square", "cw_l2_median", "masking_signs"),
    ordered={"robust_accuracy": "trained"},
    tiny={"eps": 0.02, "examples": 24, "steps": 4, "queries": 8, "cw_examples": 4},
)
LONG, QUERIES = 100, 5000  # AutoAttack's steps of a run, and its queries
DRAWS = 20  # forwards that answer for a network that draws at random
PER_STEP = 4  # of them in one step of an attack: its many steps average the rest


@dataclass(frozen=True)
class Evasion:
    r"""Attack test inputs inside one threat model and keep the worst case of every input.

    robust_accuracy = share of inputs that stay right under every attack of the ensemble: one step (FGSM),
    projected steps (PGD), the same on logits / T, auto-step PGD on the cross-entropy and on the logits
    ratio, Square, and C&W where its distance is within eps. Every attack is judged on its final input,
    clipped into ball and box. `masking_signs` counts how many of five signs of hidden gradients show; the
    notes name them. T is the median margin of the clean inputs that are labelled rightly.

    Shapes: inputs `[N, ...]` floats within the subject's bounds, logits `[N, K]`.

    Raises:
        NotApplicable: inputs have no bounds, are no float tensor or have no single class; outputs are no scores.

    Source: Croce and Hein 2020 for the ensemble; Athalye et al. 2018 for the signs; FGSM, PGD, C&W and
    Square as cited in `cupel.ops`.

    Departs: fewer steps and queries than AutoAttack by default, and no FAB; `thorough` goes on with the
    inputs that still stand, by 100 auto-steps towards each of nine targets, a restart, and, where a sign of
    masking shows, 5,000 queries (where nothing shows but inputs without a gradient: those inputs alone).
    Robust accuracies are upper bounds as everywhere. A network that draws at random is judged by the mean of
    its log-probabilities over 20 draws, and attacked by that of 4 a step. Inputs are spread evenly over
    the test split instead of drawn, so that all models meet the same ones. Networks without input gradients
    are attacked by Square alone, with four times the queries, and that absence counts as one sign.

    Example:
        >>> Evasion(eps=0.2).norm
        'linf'
    """

    eps: float = param(0.1, "how far an input may be moved, in input units", gt=0)
    norm: str = param("linf", "how the distance is measured", choices=("linf", "l2"))
    steps: int = param(40, "gradient steps of every iterated attack", ge=1)
    queries: int = param(300, "forwards of the attack that sees scores alone", ge=1)
    examples: int = param(200, "test inputs that are attacked (0: all)", ge=0)
    cw_examples: int = param(50, "how many of them the search for the nearest adversarial input takes", ge=1)
    thorough: bool = param(False, "go on, with what still stands, to at least the budgets of AutoAttack")
    levels: int = param(
        0, "values a stored input can take (256: 8 bits), which attacked ones are rounded to; 0: any", ge=0
    )

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        bounds, x, y = self._inputs(subject, ctx)
        with still(subject.model) as model, ctx.scope("attacks"):
            if has_gradients(model, x[:2]):
                bench = self._bench(bounds, model, folded(model, x[:16]), x, y, ctx)
                found, signs, zero = bench.white_box()
                found |= bench.further(found, signs, zero) if self.thorough else {}
            else:
                bench = self._bench(bounds, model, model, x, y, ctx)
                found = {"square": bench.run("square", square, steps=4 * self.queries)}
                signs = [Sign(True, "the model has no input gradients, so scores alone were used")]
            return bench.readings(found, signs)

    def _bench(self, bounds: Bounds, model: Model, quick: Model, x: Tensor, y: Tensor, ctx: Context) -> _Bench:
        if not is_random(model, x[:16]):
            return _Bench(self, bounds, model, quick, x, y, ctx, random=False)
        return _Bench(self, bounds, expected(model, DRAWS), expected(quick, PER_STEP), x, y, ctx, random=True)

    def _inputs(self, subject: Subject, ctx: Context) -> tuple[Bounds, Tensor, Tensor]:
        if subject.bounds is None:
            raise NotApplicable("evasion must know the range of the inputs; this workload gives none. Set its bounds.")
        x, y = labelled_inputs(subject, "evasion")
        rows = torch.linspace(0, len(y) - 1, min(self.examples or len(y), len(y))).round().long().unique()
        return subject.bounds, x[rows].to(ctx.device), y[rows].to(ctx.device)


@dataclass(frozen=True)
class _Bench:
    """One model under attack."""

    p: Evasion
    bounds: Bounds
    model: Model
    quick: Model  # the same, and faster
    x: Tensor
    y: Tensor
    ctx: Context
    random: bool

    def run(self, name: str, attack: Attack, rows: Tensor | None = None, **changes: float) -> Outcome:
        """The outcome on all inputs; those not among `rows` were left alone, and count as standing."""
        p = self.p
        threat = replace(Threat(p.norm, p.eps, self.bounds, p.steps, levels=p.levels), **changes)  # type: ignore[arg-type]
        if rows is None:
            return attacked(attack, self.model, self.x, self.y, threat, self.ctx.rng(name), fast=self.quick)
        part = attacked(attack, self.model, self.x[rows], self.y[rows], threat, self.ctx.rng(name), fast=self.quick)
        nowhere = torch.zeros(len(self.y), dtype=torch.bool, device=self.y.device)
        whole = Outcome(self.x.clone(), nowhere, nowhere.clone(), Tally.of(len(self.y)))
        whole.x[rows], whole.fooled[rows], whole.clean[rows] = part.x, part.fooled, part.clean
        whole.tally.add_at(rows.cpu(), part.tally)
        return whole

    def white_box(self) -> tuple[dict[str, Outcome], list[Sign], Tensor]:
        """Every attack of the ensemble by name, the signs of masking, and which inputs have no gradient, `[N]`."""
        cooled = partial(tempered, temperature=median_margin(self.model, self.x, self.y))
        side = self.bounds.high - self.bounds.low
        far = side if self.p.norm == "linf" else side * math.sqrt(self.x[0].numel())
        found = {
            "fgsm": self.run("fgsm", fgsm),
            "pgd": self.run("pgd", pgd),
            "rescaled": self.run("rescaled", partial(pgd, loss=cooled)),
            "apgd": self.run("apgd", apgd),
            "apgd-dlr": self.run("apgd-dlr", partial(apgd, loss=logits_ratio)),
            "square": self.run("square", square, steps=self.p.queries),
            "cw": self.run("cw", carlini, torch.arange(min(self.p.cw_examples, len(self.y))), steps=50, eps=math.inf),
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
            fallen = torch.stack([self._within(outcome) for outcome in (found | more).values()]).any(0)
            rows = (~fallen & blind if name == "square-long" else ~fallen).nonzero().flatten()
            more[name] = self.run(name, attack, rows, steps=max(steps, self.p.steps))
        return more

    def readings(self, found: dict[str, Outcome], signs: list[Sign]) -> Readings:
        within = {name: self._within(outcome) for name, outcome in found.items()}
        worst = torch.stack(list(within.values())).any(dim=0)
        clean = found["square"].clean
        n = len(self.y)

        def stays(*names: str) -> Reading:
            here = [within[name] for name in names if name in within]
            return share(int((~torch.stack(here).any(dim=0)).sum()), n) if here else share(0, 0)

        shown = [sign.words for sign in signs if sign.shows]
        gradients, queries = (
            sum(float(getattr(o.tally, kind).sum()) for o in found.values()) / n for kind in ("gradients", "queries")
        )
        notes = [f"{n} inputs, {self.p.norm} ball of radius {self.p.eps:g}"]
        notes.append(f"{gradients:.0f} gradients and {queries:.0f} further forwards per input")
        if self.random:
            notes.append(f"the network answers at random: judged by the mean log-probability of {DRAWS} draws")
        if "targets" in found:
            long = f" and {QUERIES} queries" if "square-long" in found else ""
            notes.append(f"what stood met {LONG} auto-steps towards nine targets, a restart{long}")
        notes += [f"sign of masked gradients: {words}" for words in shown]
        if shown:
            notes.append("with masked gradients the robust accuracy is an upper bound that other attacks may lower")
        return Readings.of(
            notes=notes,
            figures={"adversarial": self._pictures(found)},
            robust_accuracy=share(int((~worst).sum()), n),
            clean_accuracy=share(int(clean.sum()), n),
            fgsm=stays("fgsm"),
            pgd=stays("pgd"),
            apgd=stays("apgd", "apgd-dlr"),
            square=stays("square"),
            cw_l2_median=self._median(found.get("cw")),
            masking_signs=exact(len(shown), "signs", "lower"),
        )

    def _within(self, outcome: Outcome) -> Tensor:
        """`[N]` bool: fooled inside the ball; a distance-minimising attack counts where it stayed inside."""
        return outcome.fooled & (size_of(outcome.x - self.x, self.p.norm) <= self.p.eps * (1 + 1e-4))

    def _median(self, outcome: Outcome | None) -> Reading:
        """Median distance to the nearest adversarial input: 0 where the model errs anyway, the diameter for none."""
        if outcome is None:
            return Reading(math.nan, "l2", "higher", 0)
        longest = (self.bounds.high - self.bounds.low) * math.sqrt(self.x[0].numel())
        count = min(self.p.cw_examples, len(self.y))
        far = size_of(outcome.x - self.x, "l2")[:count]
        far = torch.where(outcome.fooled[:count], far, torch.full_like(far, longest))
        return median_of(far.tolist(), "l2", "higher")

    def _pictures(self, found: dict[str, Outcome]) -> list[dict[str, object]]:
        """Up to six small images before and after, of different classes where possible."""
        if self.x.ndim != 4 or self.x[0].numel() > 4096:
            return []
        outcome = found["apgd"] if "apgd" in found else found["square"]
        rows = (outcome.fooled & outcome.clean).nonzero().flatten().tolist()
        first = {int(self.y[row]): row for row in reversed(rows)}
        chosen = sorted({*first.values()} | set(rows[: 6 - len(first)] if len(first) < 6 else []))[:6]
        if not chosen:
            return []
        with torch.no_grad():
            reads = self.model(outcome.x[chosen]).argmax(1).tolist()

        def grid(image: Tensor) -> list[object]:
            return [[[round(v, 3) for v in line] for line in plane] for plane in image.cpu().tolist()]

        keys = ("clean", "adversarial", "label", "read_as")
        return [
            dict(zip(keys, (grid(self.x[row]), grid(outcome.x[row]), int(self.y[row]), read), strict=True))
            for row, read in zip(chosen, reads, strict=True)
        ]
