"""Probe `evasion`: how many test inputs stay right when an adversary may move them a little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context, derive
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, median_of, share
from cupel.core.shelf import LEXICON
from cupel.core.types import Bounds, Examples, Subject, still
from cupel.ops.ball_ensemble import Ensemble, ensemble
from cupel.ops.labelled import evenly, judged_classes, labelled_inputs
from cupel.ops.lexicon import Lexicon
from cupel.ops.masking import Sign, beats
from cupel.ops.node_attack import NodeThreat, fallen, holding, masked, siege
from cupel.ops.node_graph import NodeGraph
from cupel.ops.projections import size_of
from cupel.ops.threats import Outcome, Threat
from cupel.ops.word_attack import Study, attacked, swappable, texts_of
from cupel.ops.word_swaps import Victim

CARD = Card(
    name="evasion",
    family="robust",
    source="F. Croce, M. Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse "
    "Parameter-free Attacks, ICML 2020, arXiv 2003.01690; masking: A. Athalye, N. Carlini, D. Wagner, Obfuscated "
    "Gradients Give a False Sense of Security, ICML 2018, arXiv 1802.00420",
    tags=("evasion", "adversarial", "fgsm", "pgd", "apgd", "square", "gradient masking", "images", "graphs", "text"),
    needs=("classes",),
    reads=("lexicon",),
    readings=("robust_accuracy", "clean_accuracy", "fgsm", "pgd", "apgd", "square", "cw_l2_median", "masking_signs"),
    ordered={"robust_accuracy": "trained"},
    tiny={"eps": 0.02, "examples": 24, "steps": 4, "queries": 8, "cw_examples": 4},
)


@dataclass(frozen=True)
class Evasion:
    r"""Attack test inputs inside one threat model and keep the worst case of every input.

    robust_accuracy = share of inputs that stay right under every attack of the ensemble: one step (FGSM),
    projected steps (PGD), the same on logits / T, auto-step PGD on the cross-entropy and on the logits
    ratio, Square, and C&W where its distance is within eps. Every attack is judged on its final input,
    clipped into ball and box. `masking_signs` counts how many of five signs of hidden gradients show; the
    notes name them. T is the median margin of the clean inputs that are labelled rightly.

    On the nodes of a graph, degree + `flips` edges of a node are flipped by all attacks of `graph-evasion` on single
    nodes; in texts, `words` words are swapped as `arabic-synonym` does, by importance and at random, after a
    language model has read the training texts. One sign is looked for there: an adversary who knows less fools more.

    Shapes: inputs `[N, ...]` floats within the subject's bounds, node numbers `[N]`, or texts; logits `[N, K]`.

    Raises:
        NotApplicable: inputs are none of these, or have no single class; outputs are no scores; no text of 30 to 300
            letters has a word to swap.

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
    flips: int = param(2, "edges flipped at a node beyond its degree, on graphs", ge=0)
    words: int = param(1, "most words swapped in a text", ge=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        judged_classes(subject, "evasion")
        lexicon = ctx.shelf.get(LEXICON) if LEXICON in ctx.shelf else None
        if subject.bounds is not None:
            return self.ball(subject, subject.bounds, ctx)
        if any(isinstance(part, NodeGraph) for part in subject.model.modules()):
            return self.edges(subject, ctx)
        if isinstance(lexicon, Lexicon) and isinstance(subject.data.train, Examples):
            return self.texts(subject, subject.data.train, lexicon, ctx)
        raise NotApplicable(
            "evasion must get inputs in a known range, node numbers of a graph or texts; this workload gives none. "
            "Set its bounds."
        )

    def ball(self, subject: Subject, bounds: Bounds, ctx: Context) -> Readings:
        """Inputs moved inside a norm ball."""
        x, y = (part.to(ctx.device) for part in labelled_inputs(subject, "evasion"))
        rows = evenly(len(y), self.examples).to(ctx.device)
        threat = Threat(self.norm, self.eps, bounds, self.steps, levels=self.levels)
        with still(subject.model) as model, ctx.scope("attacks"):
            bench = ensemble(model, x[rows], y[rows], threat, self.queries, self.cw_examples, ctx.rng)
            return self._moved(bench, *bench.found(self.thorough))

    def edges(self, subject: Subject, ctx: Context) -> Readings:
        """Nodes some of whose edges are flipped."""
        threat = NodeThreat(extra=self.flips)
        seed = derive(ctx.seed, *ctx.path, "surrogate")
        ids, labels, told = siege(subject, threat, self.examples, "evasion", seed, ctx.rng("random"))
        hold = holding(told)
        notes = [f"{len(ids)} nodes, {threat}: {', '.join(name for name in told if name != 'clean')}"]
        if masked(hold):
            notes.append("sign of masked gradients: a surrogate clearly fools more nodes than the network's own slope")
        return worst_of(hold, notes, int(masked(hold)), {"flipped": fallen(told, ids, labels)})

    def texts(self, subject: Subject, train: Examples, lexicon: Lexicon, ctx: Context) -> Readings:
        """Texts some of whose words are swapped."""
        known = [text for text in texts_of(train, lexicon) if text]
        language = Study(most=self.words).language(known, derive(ctx.seed, *ctx.path), ctx.rng("meanings"))
        data = subject.data.test
        rows, texts = swappable(data, lexicon, language.content, self.examples, "evasion")
        victim = Victim(subject.model, subject.task, lexicon, data.inputs[rows, : lexicon.lead], ctx.device)
        swaps = attacked(victim, texts, data.targets[rows], language)
        control = attacked(victim, texts, data.targets[rows], language, ctx.rng("control"))
        hold = {"clean": swaps.right, "words": swaps.stands, "random": control.stands}
        some = "one word" if self.words == 1 else f"up to {self.words} words"
        fell = (swaps.right & ~swaps.stands).nonzero().flatten().tolist()[:6]
        shown = [{"before": " ".join(swaps.courses[k].before), "after": " ".join(swaps.courses[k].now)} for k in fell]
        notes = [
            f"{len(texts)} texts, {some} swapped in each, one run: by importance, and at random",
            f"{sum(swaps.queries) / len(texts):.0f} queries a text; no gradients are asked for",
        ]
        weak = beats(~control.stands, ~swaps.stands)
        if weak:
            notes.append("sign of a misled attack: random swaps clearly fool more texts than ranked ones")
        return worst_of(hold, notes, int(weak), {"swapped": shown})

    def _moved(self, bench: Ensemble, found: dict[str, Outcome], signs: list[Sign]) -> Readings:
        within = {name: bench.within(outcome) for name, outcome in found.items()}
        worst = torch.stack(list(within.values())).any(dim=0)
        clean = found["square"].clean
        n = len(bench.y)

        def stays(*names: str) -> Reading:
            here = [within[name] for name in names if name in within]
            return share(int((~torch.stack(here).any(dim=0)).sum()), n) if here else share(0, 0)

        shown = [sign.words for sign in signs if sign.shows]
        notes = bench.spent(found)
        notes += [f"sign of masked gradients: {words}" for words in shown]
        if shown:
            notes.append("with masked gradients the robust accuracy is an upper bound that other attacks may lower")
        return Readings.of(
            notes=notes,
            figures={"adversarial": _pictures(bench, found)},
            robust_accuracy=share(int((~worst).sum()), n),
            clean_accuracy=share(int(clean.sum()), n),
            fgsm=stays("fgsm"),
            pgd=stays("pgd"),
            apgd=stays("apgd", "apgd-dlr"),
            square=stays("square"),
            cw_l2_median=_median(bench, found.get("cw")),
            masking_signs=exact(len(shown), "signs", "lower"),
        )


def worst_of(hold: Mapping[str, Tensor], notes: list[str], signs: int, figures: dict[str, object]) -> Readings:
    """Readings where there is no ball: who stands under every attack of `hold`, `[N]` bool by name."""
    n = len(hold["clean"])
    single = {name: share(0, 0) for name in ("fgsm", "pgd", "apgd", "square")}
    return Readings.of(
        notes,
        figures,
        robust_accuracy=share(int(torch.stack(list(hold.values())).all(0).sum()), n),
        clean_accuracy=share(int(hold["clean"].sum()), n),
        cw_l2_median=Reading(math.nan, "l2", "higher", 0),
        masking_signs=exact(signs, "signs", "lower"),
        **single,
    )


def _median(bench: Ensemble, outcome: Outcome | None) -> Reading:
    """Median distance to the nearest adversarial input: 0 where the model errs anyway, the diameter for none."""
    if outcome is None:
        return Reading(math.nan, "l2", "higher", 0)
    longest = (bench.threat.bounds.high - bench.threat.bounds.low) * math.sqrt(bench.x[0].numel())
    count = min(bench.nearest, len(bench.y))
    far = size_of(outcome.x - bench.x, "l2")[:count]
    far = torch.where(outcome.fooled[:count], far, torch.full_like(far, longest))
    return median_of(far.tolist(), "l2", "higher")


def _pictures(bench: Ensemble, found: dict[str, Outcome]) -> list[dict[str, object]]:
    """Up to six small images before and after, of different classes where possible."""
    if bench.x.ndim != 4 or bench.x[0].numel() > 4096:
        return []
    outcome = found["apgd"] if "apgd" in found else found["square"]
    rows = (outcome.fooled & outcome.clean).nonzero().flatten().tolist()
    first = {int(bench.y[row]): row for row in reversed(rows)}
    chosen = sorted({*first.values()} | set(rows[: 6 - len(first)] if len(first) < 6 else []))[:6]
    if not chosen:
        return []
    with torch.no_grad():
        reads = bench.model(outcome.x[chosen]).argmax(1).tolist()

    def grid(image: Tensor) -> list[object]:
        return [[[round(v, 3) for v in line] for line in plane] for plane in image.cpu().tolist()]

    keys = ("clean", "adversarial", "label", "read_as")
    return [
        dict(zip(keys, (grid(bench.x[row]), grid(outcome.x[row]), int(bench.y[row]), read), strict=True))
        for row, read in zip(chosen, reads, strict=True)
    ]
