"""Technique `boundary-unlearning`: make a trained network forget a class by moving its decision boundary."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError
from cupel.core.fit import train
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import FORGETTING
from cupel.core.slots import Hooks
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Bounds, Budget, Examples, Subject, Task, still
from cupel.core.update import TorchUpdate
from cupel.ops.attacks import fgsm, pgd
from cupel.ops.threats import Threat

CARD = Card(
    name="boundary-unlearning",
    family="privacy",
    source="M. Chen, W. Gao, G. Liu, K. Peng, C. Wang, Boundary Unlearning: Rapid Forgetting of Deep Networks via "
    "Shifting the Decision Boundary, CVPR 2023, arXiv 2303.11570, sections 4.2 and 4.3",
    tags=("unlearning", "forgetting", "class-removal"),
    needs=("gradients", "classes", "bounded"),
    writes=("forgetting",),
    tiny={"forget": 1, "epochs": 1},
    neutral={"epochs": 0},
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def crossed(model: nn.Module, batch: Batch, threat: Threat) -> Tensor:
    """Logits of `model` at the adversarial neighbours of a batch: `[N, K]`.

    x' = clip(x + eps * sign(grad_x CE)) for one step; more are projected steps from x itself. `model` must be
    frozen (see `still`).
    """
    found = []
    for x, y in zip(batch.inputs.split(1024), batch.targets.split(1024), strict=True):
        # Starting at x and not at a random point of the ball keeps the boundary that is met the nearest one.
        moved = fgsm(model, x, y, threat) if threat.steps == 1 else pgd(model, x, y, threat, torch.Generator(), start=x)
        with torch.no_grad():
            found.append(model(moved))
    return torch.cat(found)


def nearest_wrong(logits: Tensor, targets: Tensor) -> Tensor:
    """The likeliest class other than the true one: `[N, K]`, `[N]` -> `[N]`."""
    return logits.scatter(1, targets[:, None], -torch.inf).argmax(1)


def hit_rate(logits: Tensor, targets: Tensor) -> float:
    """Share of neighbours that lie across the boundary."""
    return float((logits.argmax(1) != targets).double().mean())


class _FrozenNorms(Hook):
    """Batch norms use their stored statistics: batches of one class alone would replace them."""

    def start(self, at: Moment) -> None:
        for module in at.model.modules():
            if isinstance(module, _NORMS):
                module.eval()


@dataclass(frozen=True)
class BoundaryUnlearning:
    r"""Forget one class with its own training examples alone, in seconds.

    Shrink: each forget example x of class y is relabelled with the class its nearest boundary leads to,
    y' = argmax_{k != y} f0_k(clip(x + eps * sign(grad_x CE(f0(x), y)))), f0 the frozen network, and the
    network is fine-tuned on (x, y') by plain SGD. Expanding: a row is added to the last layer, forget examples are
    trained into that extra class, and the row is cut off. The rest of the data is never touched.
    Shrink works only if most steps do cross the boundary: their share is measured, and eps is raised by
    a quarter (beyond `eps_max` ten steps are made) until it reaches `hit_rate`; see the artefact `forgetting`.

    Use: when a whole class must be forgotten faster than by training anew; ask `membership` afterwards. Not for single
    examples.

    Costs: a short fit on the examples to forget; the remaining classes lose a little.

    Shapes: any classifier of bounded inputs with logits `[B, K]`; the output shape stays.

    Raises:
        ParamError: no training example has the class `forget`.
        PlanError: form `expanding` without a linear last layer.

    Source: Chen, Gao, Liu, Peng, Wang, CVPR 2023, arXiv 2303.11570.

    Departs: batch norms stay in evaluation mode (`norms: updated` does as the released code): in training
    mode the forget batches alone shift the statistics, which forgets much, but not by the method. An
    example whose step does not cross gets its runner-up class and not its own label. eps grows until
    steps cross. No momentum, a larger lr and more epochs than the code's 10: with momentum 0.9 the short
    fine-tuning overshoots, and 3 to 6 points more of the other classes were lost at equal forgetting.
    No curvature penalty and no weights by margin.

    Example:
        >>> BoundaryUnlearning(forget=3).form
        'shrink'
    """

    forget: int = param(0, "class to forget", ge=0)
    form: str = param("shrink", "how the boundary moves", choices=("shrink", "expanding"))
    eps: float = param(0.1, "first step towards the boundary (form shrink)", gt=0, unit="input units")
    eps_max: float = param(0.6, "largest step tried", gt=0, unit="input units")
    hit_rate: float = param(0.8, "share of steps that must cross the boundary (form shrink)", ge=0, le=1)
    lr: float = param(1e-3, "learning rate of the fine-tuning", gt=0)
    epochs: int = param(30, "passes over the forget examples", ge=0)
    norms: str = param("frozen", "batch-norm statistics while forgetting", choices=("frozen", "updated"))

    def procedure(self, subject: Subject, ctx: Context) -> nn.Module:
        examples = subject.data.train.where(lambda b: b.targets == self.forget)
        if not len(examples):
            raise ParamError(
                f"forget must be a class of the training data; got {self.forget}. "
                f"Choose one of {subject.data.train.targets.unique().tolist()}."
            )
        form = self._shrink if self.form == "shrink" else self._expanding
        return form(subject, examples, ctx)

    def _shrink(self, subject: Subject, examples: Examples, ctx: Context) -> nn.Module:
        model = subject.model
        with still(copy.deepcopy(model)) as before:
            labels, notes = self._relabelled(before, examples, subject.bounds or Bounds(), ctx)
        ctx.shelf.put(FORGETTING, notes)
        self._tune(model, examples.having(targets=labels), subject.task, ctx)
        return model

    def _relabelled(
        self, frozen: nn.Module, examples: Examples, bounds: Bounds, ctx: Context
    ) -> tuple[Tensor, dict[str, float]]:
        """Nearest wrong class of every forget example, and how it was found."""
        batch = examples.whole().to(ctx.device)
        eps, steps = self.eps, 1
        while True:
            logits = crossed(frozen, batch, Threat("linf", eps, bounds, steps))
            hits = hit_rate(logits, batch.targets)
            if hits >= self.hit_rate or steps > 1:
                break
            # Past eps_max a single step overshoots; ten steps inside that ball are the last resort.
            eps, steps = (1.25 * eps, 1) if 1.25 * eps <= self.eps_max else (max(eps, self.eps_max), 10)
        notes = {"unlearning_hit_rate": hits, "unlearning_eps": eps, "unlearning_steps": float(steps)}
        return nearest_wrong(logits, batch.targets).cpu(), notes

    def _expanding(self, subject: Subject, examples: Examples, ctx: Context) -> nn.Module:
        model, name = subject.model, subject.anatomy.head
        head = model.get_submodule(name) if name else None
        if not isinstance(head, nn.Linear):
            raise PlanError(
                f"form expanding must find a linear last layer; the workload names {name or 'none'!r} as its head. "
                "Use form shrink."
            )
        wide = self._widened(head, ctx)
        extra = torch.full_like(examples.targets, head.out_features)
        model.set_submodule(name, wide)
        try:
            self._tune(model, examples.having(targets=extra), Classification(wide.out_features), ctx)
        finally:
            model.set_submodule(name, head)
        with torch.no_grad():
            head.weight.copy_(wide.weight[:-1])
            if head.bias is not None:
                head.bias.copy_(wide.bias[:-1])
        ctx.shelf.put(FORGETTING, {"unlearning_rows_added": 1.0})
        return model

    def _widened(self, head: nn.Linear, ctx: Context) -> nn.Linear:
        """`head` with one more row, drawn as torch draws fresh layers."""
        with ctx.scope("row"):
            wide = nn.Linear(head.in_features, head.out_features + 1, head.bias is not None)
        wide = wide.to(head.weight.device, head.weight.dtype)
        with torch.no_grad():
            wide.weight[:-1] = head.weight
            if head.bias is not None:
                wide.bias[:-1] = head.bias
        return wide

    def _tune(self, model: nn.Module, examples: Examples, task: Task, ctx: Context) -> None:
        budget = Budget(self.epochs, 64, optimizer="sgd", lr=self.lr, momentum=0.0)
        hooks = Hooks([("norms", _FrozenNorms())] if self.norms == "frozen" else [])
        update = TorchUpdate({n: p for n, p in model.named_parameters() if p.requires_grad}, budget)
        train(model, examples, task, update, hooks, budget, ctx)
