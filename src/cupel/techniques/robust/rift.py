"""Technique `rift`: fine-tune the one module robustness depends on least, and go towards it as far as it costs none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError, nearest
from cupel.core.fit import Named, run_fit
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import CRITICALITY
from cupel.core.slots import phase
from cupel.core.types import Batch, Examples, Subject, still
from cupel.ops.attacks import pgd
from cupel.ops.labelled import classes_of, evenly
from cupel.ops.threats import Threat, attacked
from cupel.ops.weight_ascent import movable, worst_weight

CARD = Card(
    name="rift",
    family="robust",
    source="K. Zhu, X. Hu, J. Wang, X. Xie, G. Yang, Improving Generalization of Adversarial Training via Robust "
    "Critical Fine-Tuning, ICCV 2023, arXiv 2308.02533, algorithm 1",
    tags=("robustness", "fine-tuning", "interpolation", "criticality", "weight ascent"),
    needs=("weights", "gradients", "classes", "bounded"),
    writes=("criticality",),
    tiny={"eps": 0.05, "steps": 2, "passes": 1, "epochs": 1, "points": 2, "restarts": 1},
    neutral={"epochs": 0},
)


@dataclass(frozen=True)
class RIFT:
    r"""Win back clean accuracy of an adversarially trained network in the one module that robustness can spare.

    Module robust criticality: MRC_i = max over ||dW_i||_F <= radius ||W_i||_F of L(W_i + dW_i; D) - L(W; D), where D
    are adversarial validation inputs made once for the network as it is. The module of least MRC alone is fine-tuned
    on clean training data, its best epoch kept, and all state entries (batch statistics too) are interpolated,
    theta(a) = (1 - a) theta_AT + a theta_FT, a = 0, 1 / points, ..., 1. The a of the highest clean accuracy is taken
    among those whose robust accuracy is at most `spare` below that of theta_AT; both are measured on the validation
    split. The criticality of every module goes to the shelf: what robustness can spare, a compressor can take first.

    Use: after adversarial training (`fit`, then `apply`), where clean accuracy was lost and the validation split has a
    few hundred examples or more: from fewer, a robust loss of a point cannot be seen. Not on a network that was trained
    plainly, which has no robustness to keep.

    Costs: `passes` forwards and backwards over the adversarial inputs for every module, a fit of one module, and
    `points` + 1 attacks on the validation split. Nothing at inference and no further byte: the network keeps its form.

    Shapes: inputs `[B, ...]` floats within the workload's bounds; logits `[B, K]`.

    Raises:
        PlanError: no bounds, no validation examples that are float tensors, no module to fine-tune, or an unknown one.

    Source: Zhu, Hu, Wang, Xie, Yang 2023, arXiv 2308.02533, section 3 and algorithm 1.

    Departs: the adversarial inputs and the choice of a come from validation data (the release uses the test split); an
    adversarial input stays where it first fools; the ascent is projected after every step, not every epoch; robust
    accuracy counts the worst of the restarts input by input, so no run can make up for another.

    Example:
        >>> RIFT(eps=0.2).radius
        0.1
    """

    eps: float = param(0.1, "how far an input may be moved, in input units", gt=0)
    norm: str = param("linf", "how the distance is measured", choices=("linf", "l2"))
    steps: int = param(10, "gradient steps of every attack", ge=1)
    restarts: int = param(3, "runs of the attack that robust accuracy is the worst of", ge=1)
    radius: float = param(0.1, "how far weights may move for the criticality, over their norm", gt=0)
    passes: int = param(10, "passes of the ascent over the adversarial inputs", ge=1)
    ascent_lr: float = param(1.0, "step of the ascent over the gradient", gt=0)
    module: str = param("", "module to fine-tune; none named: the one of least criticality")
    epochs: int = param(10, "of the fine-tuning; 0 leaves the network as it is", ge=0)
    lr: float = param(1e-3, "learning rate of the fine-tuning (SGD), a tenth of it in the second half", gt=0)
    weight_decay: float = param(5e-4, "L2 of the fine-tuning", ge=0)
    batch_size: int = param(128, "examples in an update of the fine-tuning", ge=1)
    points: int = param(10, "steps from the network to the fine-tuned one that are tried", ge=1)
    spare: float = param(0.001, "robust validation accuracy that may be lost", ge=0, le=1)
    examples: int = param(1000, "validation examples that are attacked (0: all)", ge=0)

    def procedure(self, subject: Subject, ctx: Context) -> nn.Module:
        data, threat = _attackable(subject, self, ctx)
        model, names = subject.model, movable(subject.model)
        if not names:
            raise PlanError("rift must find a linear layer or convolution to fine-tune; got none. Leave it out.")
        chosen = _parameter(self.module, names)
        found = criticality(self, model, data, threat, subject, ctx)
        ctx.shelf.put(CRITICALITY, found)
        if not self.epochs:
            return model
        chosen = chosen or min(found, key=lambda name: found[name])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        after = tuned(self, model, chosen, subject, ctx)
        line = []
        for k in range(self.points + 1):
            model.load_state_dict(between(before, after, k / self.points))
            line.append(judged(self, model, data, threat, ctx))
        share = best_on_line(line, self.spare) / self.points
        model.load_state_dict(between(before, after, share))
        ctx.log(kind="rift", module=chosen, share=share, line=line)
        ctx.log(kind="note", text=f"rift: fine-tuned {chosen}, kept {share:.0%} of the way to it")
        return model


def _attackable(subject: Subject, p: RIFT, ctx: Context) -> tuple[Examples, Threat]:
    """Validation examples to attack, on the device, and how."""
    if subject.bounds is None:
        raise PlanError("rift must know the range of the inputs; this workload gives none. Set its bounds.")
    data = subject.data.valid
    if not isinstance(data, Examples) or not len(data) or not data.inputs.is_floating_point():
        raise PlanError("rift must have validation examples that are float tensors; got none. Give a validation split.")
    part = data.take(evenly(len(data), p.examples))
    part = Examples(part.inputs.to(ctx.device), classes_of(part, "rift").to(ctx.device), part.index)
    return part, Threat(p.norm, p.eps, subject.bounds, p.steps, restarts=p.restarts)


def _parameter(module: str, names: Sequence[str]) -> str:
    """The weight of the module a user names; empty if none is named."""
    if not module or f"{module}.weight" in names:
        return f"{module}.weight" if module else ""
    known = [name.removesuffix(".weight") for name in names]
    raise PlanError(f"module of rift must be one of {', '.join(known)}; got {module!r}.{nearest(module, known)}")


def criticality(
    p: RIFT, model: nn.Module, data: Examples, threat: Threat, subject: Subject, ctx: Context
) -> dict[str, float]:
    """MRC by the name of every movable weight: how far its worst change raises the loss on adversarial inputs."""
    with still(model):
        x = pgd(model, data.inputs, data.targets, threat, ctx.rng("inputs"))
    batches = list(data.having(inputs=x).batches(512))
    found = {}
    for name in movable(model):
        ascent = worst_weight(model, name, batches, subject.task, p.radius, p.ascent_lr, p.passes)
        found[name] = ascent.rise
        ctx.log(kind="criticality", weight=name, rise=ascent.rise, reach=ascent.reach)
    return found


def judged(p: RIFT, model: nn.Module, data: Examples, threat: Threat, ctx: Context) -> tuple[float, float]:
    """Clean and robust accuracy; every call draws the same starts."""
    with still(model):
        outcome = attacked(pgd, model, data.inputs, data.targets, threat, ctx.rng("judge"))
    return float(outcome.clean.double().mean()), outcome.robust


def best_on_line(line: Sequence[tuple[float, float]], spare: float) -> int:
    """The point of highest clean accuracy that is at most `spare` less robust than the first; of equals, the nearest.

    >>> best_on_line([(0.90, 0.60), (0.91, 0.61), (0.92, 0.60), (0.95, 0.50)], spare=0.001)
    2
    """
    floor = line[0][1] - spare - 1e-9
    return max((k for k, (_, robust) in enumerate(line) if robust >= floor), key=lambda k: (line[k][0], -k))


def between(a: Mapping[str, Tensor], b: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) a + share b of all floating entries of two states; counters are those of the nearer state.

    >>> between({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, 0.25)
    {'w': tensor([1.])}
    """
    if share in (0.0, 1.0):
        return dict(b if share else a)
    near = b if share > 0.5 else a
    return {n: torch.lerp(v, b[n], share) if v.is_floating_point() else near[n] for n, v in a.items()}


def tuned(p: RIFT, model: nn.Module, name: str, subject: Subject, ctx: Context) -> dict[str, Tensor]:
    """The state of `model` after parameter `name` alone was fine-tuned on the clean training data, in place."""
    plain = replace(subject.budget, optimizer="sgd", momentum=0.9, schedule="constant")
    budget = replace(plain, epochs=p.epochs, batch_size=p.batch_size, lr=p.lr, weight_decay=p.weight_decay)
    with only(model, name):
        inner = Named("tune", _Tuning(), ctx.child("tune"))
        run_fit(model, subject.data.view(), subject.task, budget, [inner], ctx.child("fit"))
    return {n: v.clone() for n, v in model.state_dict().items()}


@contextmanager
def only(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, parameter `name` alone can learn."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for own, p in model.named_parameters():
        p.requires_grad_(own == name)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@dataclass(frozen=True)
class _Tuning:
    def hook(self, ctx: Context) -> Hook:
        return _Best(ctx)


class _Best(Hook):
    """Divides the rate by ten in the second half, and leaves the network at the epoch that validates best."""

    def __init__(self, ctx: Context) -> None:
        assert ctx.train is not None
        self.valid, self.device = ctx.train.valid, ctx.device
        self.score, self.state = (-1.0, 0.0), dict[str, Tensor]()

    @phase("augment")
    def batch(self, batch: Batch, at: Moment) -> Batch:
        if 2 * at.epoch >= at.epochs:
            at.lr = at.lr / 10
        return batch

    def epoch(self, at: Moment) -> None:
        if at.epoch:
            self._look(at)

    def end(self, at: Moment) -> None:
        self._look(at)
        at.model.load_state_dict(self.state)

    @torch.no_grad()
    def _look(self, at: Moment) -> None:
        right = loss = 0.0
        with at.evaluating():
            for b in self.valid.batches(500):
                batch = b.to(self.device)
                out = at.output_of(batch)
                right += float((at.task.predict(out) == batch.targets).sum())
                loss += float(at.task.losses(out, batch).double().sum())
        score = (right, -loss)  # among equally many right ones the surer
        if score > self.score or not self.state:
            self.score, self.state = score, {n: v.clone() for n, v in at.model.state_dict().items()}
