"""Technique `nn-factory`: a network of modules, and a generator that assembles one of them for a task and a budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import PlanError, refusing
from cupel.core.fit import Named, run_fit
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.core.types import Batch, Subject, still
from cupel.ops.assembled import Assembler, ModularNet, is_held_out, parts_of, straight_through
from cupel.ops.channels import traced_on

CARD = Card(
    name="nn-factory",
    family="compress",
    source="W. Xu, Y. Li, J. Liu, Y. Sun, Z. Cao, Y. Li, H. Wen, Y. Liu, Generative Model for Models: Rapid DNN "
    "Customization for Diverse Tasks and Resource Constraints, 2023, arXiv 2308.15003",
    tags=("modular", "supernet", "generator", "customisation", "channels"),
    needs=("weights", "gradients", "classes", "blocks"),
    removes=("blocks",),
    tiny={"epochs": 1, "parts": 2, "measured": 4},
    neutral={"epochs": 0},
)


def task_loss(out: Tensor, targets: Tensor, task: Tensor) -> Tensor:
    """Cross-entropy among the classes of a task alone: logits `[B, C]`, targets `[B]`, task `[C]` of 0 and 1."""
    return F.cross_entropy(out.masked_fill(task == 0, -1e9), targets)


def over_budget(gates: Tensor, costs: Tensor, share: float) -> Tensor:
    """max(0, mean(g cost) - share)^2, costs having mean one. `[G]`, `[G]` -> scalar."""
    return ((gates * costs).mean() - share).clamp_min(0).square()


def likeness(a: Tensor, b: Tensor, tasks: tuple[Tensor, Tensor]) -> Tensor:
    """Modules that two tasks share, weighed by how little the tasks have in common. Scores `[G]`, tasks `[C]`."""
    together, either = (tasks[0] * tasks[1]).sum(), torch.maximum(*tasks).sum()
    return (torch.sigmoid(a) * torch.sigmoid(b)).mean() * (1 - together / either)


@dataclass(frozen=True)
class NNFactory:
    r"""Split a trained network into modules, and train a generator that picks them for any task and budget at once.

    The channels of every block are cut into `parts` modules with gates g of 0 or 1. A task is a set of classes, t in
    {0, 1}^C; a share a in (0, 1] limits how many modules may be on. scores = MLP([t, a]); the best a-th of them are on
    (one of every block always), with the sigmoid's gradient. Network and generator learn together:

    min CE_t(f(x; g(t, a)), y) + budget_weight * max(0, mean(g cost) - a)^2 + overlap * likeness + CE(f(x; 1), y).

    The result runs whole and knows all classes. Ask it for a small network, without training, like this:
    `small, modules = net.query((2, 5, 7), budget=2e5, score=accuracy_on_some_validation_rows)`. Candidates at sixteen
    shares go through a linear predictor of multiply-adds, fitted on `measured` sliced networks (`net.macs`, with its
    R^2); the largest that fit are cut out, counted and scored. For seconds on a device: `net.fit_cost(measure, ...)`.

    Use: when many small networks for changing subsets of classes and budgets are wanted within a second each. For a
    single one, prune and train it: that is more accurate.

    Costs: one fit with two forwards a step; at a query `finalists` short evaluations. Bytes: the whole network and a
    small MLP; a network that is handed out holds only its own channels and classes.

    Shapes: any network that torch.export can trace; logits `[B, C]`.

    Raises:
        PlanError: the network cannot be traced, or none of its channels can go.

    Source: Xu, Li, Liu, Sun, Cao, Li, Wen, Liu 2023, arXiv 2308.15003; no code was released.

    Departs: one optimiser moves network and generator in every step, not by turns; the whole network's loss is added,
    so that it stays of use; batch norms keep the backbone's statistics, which otherwise differ by gates; costs of
    modules are shares of the multiply-adds that go when one is cut out; gates are logistic noise and top-k.

    Example:
        >>> NNFactory(parts=8).held
        0.2
    """

    epochs: int = param(60, "of the fit; 0 leaves the network as it is", ge=0)
    parts: int = param(8, "modules of a block", ge=2, le=64)
    lr: float = param(3e-3, "learning rate (Adam, cosine)", gt=0)
    batch_size: int = param(32, "examples a step, of which those of the task's classes count", ge=2)
    most: int = param(4, "most classes of a task in training", ge=1)
    held: float = param(0.2, "share of all sets of classes that training never sees", ge=0, lt=1)
    budget_weight: float = param(10.0, "weight of what the gates cost above their share", ge=0)
    overlap: float = param(1.0, "weight of modules shared by unlike tasks", ge=0)
    hidden: int = param(64, "width of the generator", ge=1)
    measured: int = param(24, "sliced networks whose cost the predictor is fitted on", ge=2)

    def procedure(self, subject: Subject, ctx: Context) -> nn.Module:
        if not self.epochs:
            return subject.model
        with refusing():
            structure, inputs = traced_on(subject.model, subject.data.view(), ctx.device)
        if not structure.count:
            raise PlanError("a network for nn-factory must have channels that can go; it has none. Take a wider one.")
        parts = parts_of(structure, self.parts)
        classes = _classes(subject, inputs)
        with ctx.scope("assembler"):
            assembler = Assembler(classes, len(parts.block), self.hidden).to(ctx.device)
        net = ModularNet(subject.model, assembler, structure, parts, subject.anatomy.head, inputs[:1])
        with still(net):
            net.settle(inputs)
        budget = replace(subject.budget, epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, optimizer="adam")
        budget = replace(budget, schedule="cosine", weight_decay=0.0)
        inner = Named("assembler", _Learner(self, net, _costs(net)), ctx.child("assembler"))
        run_fit(net.backbone, subject.data.view(), subject.task, budget, [inner], ctx.child("fit"))
        net.macs = net.fit_cost(net.macs_of, self.measured, ctx.rng("sets"))
        ctx.log(
            kind="note", text=f"{len(parts.block)} modules; multiply-adds are linear in them with R^2 {net.macs.r2:.3f}"
        )
        return net


def _classes(subject: Subject, inputs: Tensor) -> int:
    with still(subject.model), torch.no_grad():
        return int(subject.model(inputs).shape[1])


def _costs(net: ModularNet) -> Tensor:
    """What cutting out each module saves, over the mean, `[G]`."""
    count = len(net.parts.block)
    whole, everything = net.macs_of(net.backbone), torch.ones(count, dtype=torch.bool)
    saved = []
    for b in net.parts.block.unique().tolist():
        first = int((net.parts.block == b).nonzero()[0])
        alone = int((net.parts.block == b).sum()) == 1
        on = everything.clone()
        on[first] = alone
        saved.append(max(whole - net.macs_of(net.sliced(on)), 1))
    costs = torch.tensor(saved, dtype=torch.float)[net.parts.block]
    return costs / costs.mean()


@dataclass(frozen=True)
class _Learner:
    p: NNFactory
    net: ModularNet
    costs: Tensor

    def hook(self, ctx: Context) -> Hook:
        return _Assemble(self.p, self.net, self.costs.to(ctx.device), ctx)


class _Assemble(Hook):
    """Draws a task and a share for each step, and runs the backbone under the gates the generator gives."""

    def __init__(self, p: NNFactory, net: ModularNet, costs: Tensor, ctx: Context) -> None:
        self.p, self.net, self.costs = p, net, costs
        self.draw = ctx.rng("tasks")
        self.whole: Batch | None = None
        self.gates: Tensor | None = None
        self.before: tuple[Tensor, Tensor] | None = None  # scores and task of the step before

    def trains(self) -> dict[str, nn.Module]:
        return {"assembler": self.net.assembler}

    def start(self, at: Moment) -> None:
        for module in at.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def _sampled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A task that is not held out, `[C]`, and the rows of its classes; all rows if there are fewer than two."""
        present = batch.targets.unique().cpu()
        for _ in range(50):
            count = int(torch.randint(1, min(self.p.most, len(present)) + 1, (1,), generator=self.draw))
            classes = present[torch.randperm(len(present), generator=self.draw)[:count]].tolist()
            task = self.net.task(classes)
            rows = task[batch.targets] > 0
            if not is_held_out(classes, self.p.held) and int(rows.sum()) > 1:
                return task, rows.nonzero().flatten()
        return torch.ones_like(task), torch.arange(len(batch), device=rows.device)

    @phase("select")
    def batch(self, batch: Batch, at: Moment) -> Batch:
        self.whole = batch
        self.task, rows = self._sampled(batch)
        self.share = 0.2 + 0.8 * float(torch.rand(1, generator=self.draw))
        self.scores = self.net.assembler(self.task, self.share)
        noise = torch.rand(len(self.scores), generator=self.draw).clamp(1e-6, 1 - 1e-6).logit().to(self.scores)
        noisy = self.scores + noise
        self.gates = straight_through(noisy, self.net.chosen(noisy.detach(), self.share))
        return Batch(batch.inputs[rows], batch.targets[rows], batch.index[rows])

    @phase("mask")
    @contextmanager
    def around_forward(self, at: Moment) -> Iterator[None]:
        with nullcontext() if self.gates is None else self.net.gated(self.gates):
            yield

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        assert self.gates is not None and self.whole is not None
        total = task_loss(out, batch.targets, self.task)
        total = total + self.p.budget_weight * over_budget(self.gates, self.costs, self.share)
        if self.before is not None and self.p.overlap:
            total = total + self.p.overlap * likeness(self.scores, self.before[0], (self.task, self.before[1]))
        self.before, self.gates = (self.scores.detach(), self.task), None
        return total + at.loss_of(self.whole)
