"""Technique `mt-dnn-kd`: one network learns from the averaged predictions of several, on the tasks that have them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import PlanError, nearest
from cupel.core.fit import fit
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import SOFT_TARGETS
from cupel.core.slots import phase
from cupel.core.types import Batch, Budget, Examples, Task, TrainView, outputs_on
from cupel.ops.redraw import redraw
from cupel.ops.task_rows import tasks_of

CARD = Card(
    name="mt-dnn-kd",
    family="compress",
    source="X. Liu, P. He, W. Chen, J. Gao, Improving Multi-Task Deep Neural Networks via Knowledge Distillation for "
    "Natural Language Understanding, 2019, arXiv 1904.09482, section 3",
    tags=("distillation", "ensemble", "multi-task", "text", "teacher"),
    needs=("weights", "gradients", "classes"),
    writes=("soft_targets",),
    tiny={"teachers": 2, "epochs": 1, "tune": 0},
    neutral={"weight": 0.0},
)


def mean_shares(logits: Sequence[Tensor]) -> Tensor:
    """Q = mean_k softmax(z_k): K tensors `[N, C]` -> `[N, C]`."""
    return torch.stack([z.softmax(-1) for z in logits]).mean(0)


def soft_losses(shares: Tensor, out: Tensor) -> Tensor:
    """-sum_c Q_c log softmax(z)_c of every row: `[B, C]`, `[B, C]` -> `[B]`."""
    return -(shares * F.log_softmax(out, dim=-1)).sum(-1)


def found_rows(index: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `wanted` `[B]` are in the sorted `index` `[M]`, and where: bool `[B]`, int64 `[B]`."""
    place = torch.searchsorted(index, wanted).clamp(max=max(len(index) - 1, 0))
    return index[place] == wanted, place


@dataclass(frozen=True)
class MTDNNKD:
    r"""Train on the labels, and on the tasks with teachers also on what an ensemble says of each training example.

    When the fit starts, `teachers` networks like the student are trained on all tasks, each with first weights, order
    and dropout of its own, then tuned on the task they teach. Q = mean_k softmax(z_k) is computed once for every
    training example of these tasks and kept by the example's index. The student's loss is, with weight w,
    mean_i [(1 - w) CE(y_i, z_i) + w CE(Q_i, z_i)] on the examples that have a Q, and CE(y_i, z_i) on the others.

    Use: when an ensemble is better than one network and too dear to run, and when its gain on some tasks shall reach
    the others through what they share. Where a single good teacher is at hand, `distill` saves the ensemble. With one
    task (any classifier) it is plain ensemble distillation.

    Costs: `teachers` fits more, and their tuning; K numbers for each training example of the tasks with teachers.
    Nothing at inference: one network in place of `teachers` ones.

    Shapes: logits `[B, K]`; soft targets on the shelf: `index` `[M]`, ascending, and `shares` `[M, K]`.

    Raises:
        PlanError: a task to be taught is none of the data's, or the data are no independent examples.

    Source: Liu, He, Chen, Gao 2019, arXiv 1904.09482, section 3 and Algorithm 1, equations 6 and 7.

    Departs: all teachers that are trained teach (the authors keep the best three of six); they start from fresh weights
    in place of a pre-trained encoder (`fresh=False`: from the student's); they differ in weights, order and dropout,
    not in the case of the text. They are fitted without the other techniques of the student's fit. The soft targets
    go by example: they stay what they are when a batch hook changes the input.

    Example:
        >>> mean_shares([torch.zeros(1, 2), torch.tensor([[0.0, 100.0]])])
        tensor([[0.2500, 0.7500]])
    """

    teachers: int = param(3, "networks in the ensemble", ge=1, le=32)
    weight: float = param(0.5, "share of the soft targets in the loss of an example that has one", ge=0, le=1)
    tasks: tuple[str, ...] = param((), "tasks with teachers, by name; none named: all")
    dropout: tuple[float, ...] = param((0.1, 0.2, 0.3), "dropout of the teachers by turns; none: the network's own")
    fresh: bool = param(True, "teachers draw first weights of their own instead of the student's")
    epochs: int = param(0, "of a teacher on all tasks (0: the student's)", ge=0)
    tune: int = param(1, "epochs of a teacher on the task it teaches, where there are several", ge=0)
    tune_lr: float = param(0.1, "learning rate of these epochs as a share of the other", gt=0, le=1)
    batch_size: int = param(64, "examples in a teacher's update", ge=1)
    optimizer: str = param("adam", "a teacher's update rule", choices=("sgd", "adam", "adamw"))

    def hook(self, ctx: Context) -> Hook:
        return _Taught(self, ctx)


class _Taught(Hook):
    def __init__(self, p: MTDNNKD, ctx: Context) -> None:
        self.p, self.ctx = p, ctx
        self.index = self.shares = torch.empty(0)

    def start(self, at: Moment) -> None:
        if self.p.weight == 0:
            return
        found = self._asked(at)
        self.ctx.shelf.put(SOFT_TARGETS, found)
        self.index, self.shares = (found[name].to(self.ctx.device) for name in ("index", "shares"))

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        if self.p.weight == 0:
            return loss
        has, place = found_rows(self.index, batch.index)
        if not bool(has.any()):
            return loss
        swap = soft_losses(self.shares[place], out) - at.task.losses(out, batch)
        # As a difference, so that terms that other techniques added before stay as they are.
        return loss + self.p.weight * (swap * has).mean()

    def _asked(self, at: Moment) -> dict[str, Tensor]:
        """Train the ensemble and ask it: the soft targets of the tasks it teaches, by example."""
        assert self.ctx.train is not None
        chosen = taught_rows(self.ctx.train.train, self.p.tasks)
        budget = Budget(
            epochs=self.p.epochs or at.epochs,
            batch_size=self.p.batch_size,
            optimizer=self.p.optimizer,
            lr=at.lr,  # at the start of a fit, the rate of its budget
            schedule="cosine",
        )
        said: dict[str, list[Tensor]] = {name: [] for name in chosen}
        for k in range(self.p.teachers):
            whole = trained(self.p, k, at.model, self.ctx.train, at.task, budget, self.ctx)
            for name, part in chosen.items():
                # Tuning on a task that is all there is would only be a longer fit.
                alone = len(part) == len(self.ctx.train.train) or not self.p.tune
                net = whole if alone else tuned(self.p, f"teacher-{k}/{name}", whole, part, at.task, budget, self.ctx)
                said[name].append(outputs_on(net, part).float())
        index = torch.cat([part.index for part in chosen.values()])
        order = index.argsort()
        return {"index": index[order], "shares": torch.cat([mean_shares(z) for z in said.values()])[order]}


def taught_rows(data: object, wanted: Sequence[str]) -> dict[str, Examples]:
    """The training examples of every task with teachers, by its name."""
    if not isinstance(data, Examples):
        raise PlanError(
            f"mt-dnn-kd must have independent examples to keep soft targets for; got {type(data).__name__}. "
            "Use a workload of images, series or sentences."
        )
    numbers, names = tasks_of(data)
    known = ", ".join(name for name in names if name) or "one unnamed task"
    for name in wanted:
        if name not in names:
            raise PlanError(
                f"tasks of mt-dnn-kd must be among the data's: {known}; got {name!r}.{nearest(name, names)} "
                "Leave `tasks` out to teach all."
            )
    chosen = {}
    for k, name in enumerate(names):
        part = data.take((numbers == k).nonzero().flatten())
        if len(part) and (not wanted or name in wanted):
            chosen[name] = Examples(part.inputs, part.targets, part.index)
    return chosen


def teacher_like(p: MTDNNKD, k: int, model: nn.Module, ctx: Context) -> nn.Module:
    """An untrained copy of `model` with the k-th dropout and, if fresh, first weights of its own."""
    net = copy.deepcopy(model)
    with ctx.scope(f"teacher-{k}/init"):
        if p.fresh:
            redraw(net)
    for module in net.modules():
        if isinstance(module, nn.Dropout) and p.dropout:
            module.p = float(p.dropout[k % len(p.dropout)])
    return net


def trained(
    p: MTDNNKD, k: int, model: nn.Module, data: TrainView, task: Task, budget: Budget, ctx: Context
) -> nn.Module:
    """The k-th teacher after its fit on all tasks."""
    net = teacher_like(p, k, model, ctx)
    return fit(net, data, task, budget=budget, seed=_seed(ctx, f"teacher-{k}"), device=ctx.device)


def tuned(
    p: MTDNNKD, name: str, whole: nn.Module, part: Examples, task: Task, budget: Budget, ctx: Context
) -> nn.Module:
    """A copy of a teacher after its fit on the task it teaches."""
    short = replace(budget, epochs=p.tune, lr=budget.lr * p.tune_lr)
    return fit(copy.deepcopy(whole), part, task, budget=short, seed=_seed(ctx, name), device=ctx.device)


def _seed(ctx: Context, name: str) -> int:
    return int(torch.randint(2**31, (), generator=ctx.rng(name)))
