"""Probe `model-parsing`: does an adversarial example tell which kind of network it was made on?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable, ParamError
from cupel.core.fit import fit
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, mean_of, share
from cupel.core.types import Budget, Examples, Subject, outputs_on
from cupel.ops.attacks import fgsm, pgd
from cupel.ops.labelled import evenly, labelled_inputs
from cupel.ops.masking import has_gradients
from cupel.ops.parsing import ACTIVATIONS, Attributes, Parser, PrunedOnce, Traces, Victim, compressed, traces
from cupel.ops.threats import Attack, Model, Tally, Threat, WholeThreat

CARD = Card(
    name="model-parsing",
    family="robust",
    source="Y. Yao, J. Liu, Y. Gong, X. Liu, Y. Wang, X. Lin, S. Liu, Can Adversarial Examples Be Parsed to Reveal "
    "Victim Model Information?, 2023, arXiv 2303.07474",
    tags=("evasion", "adversarial", "forensics", "fingerprint", "model parsing", "compression"),
    needs=("classes", "bounded", "gradients", "images"),
    readings=(
        "kernel", "activation", "sparsity", "kernel_raw", "activation_raw", "sparsity_raw", "kernel_half_eps",
        "kernel_fgsm", "kernel_new_seed", "activation_new_seed", "sparsity_new_seed", "recognised_pruned",
        "recognised_int8", "recognised_int4", "recognised_dense", "subject_called_sparse", "victim_accuracy",
    ),
    tiny={"kernels": [1, 3], "activations": ["relu"], "sparsities": [0.0], "epochs": 3, "images": 60, "steps": 3,
          "parser_epochs": 1, "eps": 0.4},
)  # fmt: skip
NAMES = ("kernel", "activation", "sparsity")
Victims = list[tuple[nn.Module, list[int]]]  # networks, and the place of each attribute in its list
COMPRESSIONS = ("dense", "pruned", "int8", "int4")


@dataclass(frozen=True)
class ModelParsing:
    r"""Train a grid of victims, attack them, and train a network that names their attributes from the perturbations.

    Victims: small networks on the subject's data, one for each kernel x activation x sparsity and seed (one-shot global
    pruning of convolutions, retrained under the mask). Every image is attacked on every victim; perturbations of
    inputs that were right and are fooled, over eps, are the parser's data: mean over attributes of CE. Images it is
    trained on are never those it is judged on. `kernel`, `activation`, `sparsity`: share named rightly, same victims
    and attack; `..._raw`: from the attacked image instead; `kernel_half_eps`, `kernel_fgsm`: parser as trained, other
    radius or attack; `..._new_seed`: victims of another seed, so that what is named is the attribute and not the
    one network. `recognised_...`: a second parser, of how a dense victim was compressed after training (nothing,
    pruned by 60%, 8 or 4 bits), on new seeds: share of each kind named rightly, guessing is 0.25.
    `subject_called_sparse`: share of the subject's own perturbations whose victim is called sparse.

    Use: to ask what an attack on a deployed network tells a finder about it, and whether compression can be seen from
    outside. It judges the subject's data and attack surface, and the subject's own network only in the last reading.

    Costs: two trainings a cell of the grid, `steps` gradients an image for each victim (five times for dense ones),
    three small parsers. Nothing at inference.

    Shapes: inputs `[N, C, H, W]` within the subject's bounds, 4 or more pixels a side.

    Raises:
        NotApplicable: no bounds, classes, images, gradients or training examples; no victim could be fooled.
        ParamError: an unknown activation, an even kernel, or an empty grid.

    Source: Yao et al. 2023, sections 3 and 4.

    Departs: two-block parser and one small architecture, as fits small images; pruning within one fit instead of
    rewinding; no denoiser that estimates perturbations. Held-out seeds and compression without retraining are
    added.

    Example:
        >>> ModelParsing(kernels=(3, 5)).sparsities
        (0.0, 0.6)
    """

    kernels: tuple[int, ...] = param((1, 3, 5), "kernel sizes of victims (odd)")
    activations: tuple[str, ...] = param(("relu", "tanh", "elu"), "activations of victims")
    sparsities: tuple[float, ...] = param((0.0, 0.6), "shares of their convolutions' weights that are zero")
    eps: float = param(0.2, "radius of the attack, linf, in input units", gt=0)
    steps: int = param(10, "projected steps of the attack", ge=1)
    images: int = param(600, "images that are attacked, two thirds of them for training the parser", ge=6)
    epochs: int = param(12, "passes in which a victim is trained", ge=1)
    parser_epochs: int = param(10, "passes in which a parser is trained", ge=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        threat, x, y = self._inputs(subject, ctx)
        order = torch.randperm(len(y), generator=ctx.rng("images"))
        taught, held = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
        victims = {seed: list(self._victims(subject, seed, ctx)) for seed in ("own", "new")}
        made = partial(_attacked, x=x, y=y, threat=threat, ctx=ctx)
        own, sizes = made(victims["own"]), (len(self.kernels), len(self.activations), len(self.sparsities))
        learnt, known = own.of_images(taught), own.of_images(held)
        parser = self._parser(learnt, sizes, ctx)
        told = _accuracies(parser, known, sizes)
        told |= _accuracies(self._parser(learnt, sizes, ctx, raw=True), known, sizes, "_raw", raw=True)
        others = {
            "_new_seed": made(victims["new"]),
            "_half_eps": made(victims["own"], threat=replace(threat, eps=threat.eps / 2)),
            "_fgsm": made(victims["own"], attack=fgsm),
        }
        for name, other in others.items():
            told |= _accuracies(parser, other.of_images(held), sizes, name)
        told |= self._compressions(victims, made, taught, held, ctx)
        mine = made([(subject.model, [0, 0, 0])])
        told["subject_called_sparse"] = self._called_sparse(parser, mine, sizes)
        told["victim_accuracy"] = mean_of([_right(v, subject) for v, _ in victims["own"]], "1")
        note = (
            f"{len(victims['own'])} victims, each of 2 seeds; {len(own.image)} perturbations by {threat.steps} steps, "
            f"linf {threat.eps:g}, 1 start; {len(taught)} images to learn from, {len(held)} others to judge"
        )
        guess = "guessing: " + ", ".join(f"{name} {1 / n:.2f}" for name, n in zip(NAMES, sizes, strict=True))
        return Readings.of((note, guess), None, **{name: told[name] for name in CARD.readings})

    def _inputs(self, subject: Subject, ctx: Context) -> tuple[Threat, Tensor, Tensor]:
        if not (self.kernels and self.activations and self.sparsities) or any(k % 2 == 0 for k in self.kernels):
            raise ParamError(f"a grid must have odd kernels, activations, sparsities; got {self}. Name some of each.")
        if not set(self.activations) <= set(ACTIVATIONS):
            raise ParamError(
                f"activations must be among {', '.join(ACTIVATIONS)}; got {self.activations}. Choose some."
            )
        if subject.bounds is None:
            raise NotApplicable("attacks must know the range of the inputs; this workload gives none. Set its bounds.")
        x, y = labelled_inputs(subject, "model-parsing")
        train = subject.data.train
        if x.ndim != 4 or min(x.shape[2:]) < 4 or not has_gradients(subject.model, x[:2].to(ctx.device)):
            raise NotApplicable("model-parsing must have images of 4 pixels or more and input gradients; it has not.")
        if not isinstance(train, Examples) or len(train) < 2:
            raise NotApplicable("model-parsing must have training examples for its victims; there are none. Name them.")
        pool, labels = torch.cat([train.inputs, x]), torch.cat([train.targets.long(), y])
        rows = evenly(len(labels), self.images)
        threat = Threat("linf", self.eps, subject.bounds, self.steps)
        return threat, pool[rows].to(ctx.device), labels[rows].to(ctx.device)

    def _victims(self, subject: Subject, name: str, ctx: Context) -> Iterator[tuple[nn.Module, list[int]]]:
        """Trained victims of one seed with the place of each attribute in its list."""
        given, classes = subject.data.train, subject.outputs("test").shape[1]
        train = Examples(
            given.inputs, given.targets, given.index
        )  # in the victims' own batches, whatever the data's are
        grid = product(*(range(len(v)) for v in (self.kernels, self.activations, self.sparsities)))
        for k, place in enumerate(grid):
            sparsity = self.sparsities[place[2]]
            with ctx.scope(f"{name}-{k}"):
                net = Victim(self.kernels[place[0]], self.activations[place[1]], train.inputs.shape[1], classes)
            seed = int(torch.randint(2**31, (1,), generator=ctx.rng(f"{name}-{k}")))
            budget = Budget(self.epochs, 64, lr=5e-3, schedule="cosine")
            techniques = [PrunedOnce(sparsity)] if sparsity else []
            made = fit(net, train, subject.task, techniques=techniques, budget=budget, seed=seed, device=ctx.device)
            yield made, list(place)

    def _parser(self, data: Traces, sizes: tuple[int, ...], ctx: Context, raw: bool = False) -> nn.Module:
        """A network that names attributes, trained on perturbations or, with `raw`, on attacked images."""
        if len(data.image) < 2:
            raise NotApplicable(
                f"model-parsing must fool its victims to learn from it; {len(data.image)} were. Raise eps or steps."
            )
        side = (data.delta.shape[2], data.delta.shape[3])
        with ctx.scope("parser"):
            net = Parser(data.delta.shape[1], sizes, side)
        budget = Budget(self.parser_epochs, 128, lr=2e-3, schedule="cosine")
        seed = int(torch.randint(2**31, (1,), generator=ctx.rng("parser")))
        return fit(net, data.examples(raw), Attributes(sizes), budget=budget, seed=seed, device=ctx.device)

    def _compressions(
        self, victims: dict[str, Victims], made: Callable[[Victims], Traces], taught: Tensor, held: Tensor, ctx: Context
    ) -> dict[str, Reading]:
        """How often each way to compress a dense victim is named, on victims of another seed."""
        seen = {}
        for seed, members in (("own", victims["own"]), ("new", victims["new"])):
            dense = [v for v, place in members if not self.sparsities[place[2]]] or [members[0][0]]
            seen[seed] = made([(compressed(v, how), [k]) for v in dense for k, how in enumerate(COMPRESSIONS)])
        parser = self._parser(seen["own"].of_images(taught), (len(COMPRESSIONS),), ctx.child("compression"))
        data = seen["new"].of_images(held)
        said = outputs_on(parser, data.examples()).argmax(1) if len(data.image) else data.labels[:, 0]
        right = said == data.labels[:, 0]
        return {
            f"recognised_{how}": _share(right[data.labels[:, 0] == k]) for k, how in enumerate(COMPRESSIONS)
        }  # fmt: skip

    def _called_sparse(self, parser: nn.Module, mine: Traces, sizes: tuple[int, ...]) -> Reading:
        if not len(mine.image):
            return share(0, 1, "none")
        said = Attributes(sizes).predict(outputs_on(parser, mine.examples()))[:, 2]
        sparse = torch.tensor([s > 0 for s in self.sparsities])[said]
        return share(int(sparse.sum()), len(sparse), "none")


def all_steps(
    model: Model, x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator, *, tally: Tally | None = None
) -> Tensor:
    """PGD that goes on when an input is fooled, as the source's does: its perturbation grows."""
    return pgd(model, x, y, WholeThreat.of(threat), draw, tally=tally)


def _attacked(
    victims: Victims, *, x: Tensor, y: Tensor, threat: Threat, ctx: Context, attack: Attack = all_steps
) -> Traces:
    """What one attack leaves on all `victims`, each with its own draw."""
    found = []
    with ctx.scope("attacks"):
        for k, (model, label) in enumerate(victims):
            found.append(traces(model, x, y, attack, threat, ctx.rng(f"attack-{k}"), label))
    return Traces.joined(found)


def _accuracies(
    parser: nn.Module, data: Traces, sizes: tuple[int, ...], suffix: str = "", raw: bool = False
) -> dict[str, Reading]:
    """Share named rightly of every attribute."""
    if not len(data.image):
        return {f"{name}{suffix}": share(0, 1, "none") for name in NAMES}
    right = Attributes(sizes).predict(outputs_on(parser, data.examples(raw))) == data.labels
    return {f"{name}{suffix}": _share(right[:, k]) for k, name in enumerate(NAMES)}


def _share(right: Tensor) -> Reading:
    return share(int(right.sum()), max(len(right), 1), "lower")


def _right(victim: nn.Module, subject: Subject) -> float:
    targets = torch.cat([b.targets for b in subject.data.test.batches(500)])
    return float((outputs_on(victim, subject.data.test).argmax(1) == targets).double().mean())
