"""The one training loop.

A fit goes through fixed times: data forms, model forms, the update rule and its wraps, the loop with
its hooks, seals. Only hooks of the same fit are ever active together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.context import Context, derive, global_seed
from cupel.core.errors import CupelError
from cupel.core.params import check, check_values, specs_of
from cupel.core.protocols import Update, card_of
from cupel.core.shelf import Shelf
from cupel.core.slots import Hooks, SlotUse, refuse_sharing, uses_of
from cupel.core.spread import spread
from cupel.core.types import Batch, Bounds, Budget, Dataset, Examples, Splits, Task, TrainView
from cupel.core.update import TorchUpdate, lr_at


@dataclass(frozen=True)
class Named:
    """A technique in a fit, with the label its randomness and its messages go by, and its own context."""

    label: str
    method: Any
    ctx: Context


class Loop:
    """The `Moment` of a running fit (see `core.protocols.Moment`)."""

    def __init__(self, model: nn.Module, task: Task, hooks: Hooks, budget: Budget, steps: int, ctx: Context) -> None:
        self.model, self.task, self.hooks = model, task, hooks
        self.step, self.steps = 0, max(steps, 1)
        self.epoch, self.epochs = 0, budget.epochs
        self.lr = budget.lr
        self.batch = Batch(torch.empty(0), torch.empty(0), torch.empty(0))  # until the first step
        self.world, self.kind = ctx.world, ctx.device.type
        self.call: Callable[[Any], Tensor] = model if budget.precision == "32-true" else self._in_half
        self._seed = derive(ctx.seed, *ctx.path, "inside", *self.world.name)
        self._calls = 0

    @property
    def progress(self) -> float:
        return self.step / self.steps

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.ndim > 1 and name.endswith("weight"))

    def forward(self, batch: Batch) -> Tensor:
        with self.hooks.around_forward(self) if self.hooks.wraps_forward else nullcontext():
            return self.call(batch.inputs)

    def _in_half(self, inputs: Any) -> Tensor:
        with torch.autocast(self.kind, torch.bfloat16):
            out: Tensor = self.model(inputs)
        return out.float()  # losses, of the task and of hooks, keep their precision

    def output_of(self, batch: Batch) -> Tensor:
        # Dropout in a hook's forward draws from a stream of its own: the main one stays where it was.
        self._calls += 1
        with global_seed(self._seed + self._calls):
            return self.forward(batch)

    def loss_of(self, batch: Batch) -> Tensor:
        return self.task.loss(self.output_of(batch), batch)

    def objective(self, batch: Batch) -> Tensor:
        out = self.forward(batch)
        return self.hooks.loss(self.task.loss(out, batch), out, batch, self)

    def draw(self, like: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        return self.world.draw(like, make)

    def whole(self, rows: Tensor) -> Tensor:
        return self.world.whole(rows)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def train(
    model: nn.Module, data: Dataset, task: Task, update: Update, hooks: Hooks, budget: Budget, ctx: Context
) -> None:
    """Move `model` over `data` for `budget.epochs`, in place."""
    params = trained_parameters(model, hooks)
    at = Loop(model, task, hooks, budget, budget.epochs * sum(1 for _ in data.batches(budget.batch_size)), ctx)
    order, world = ctx.rng("order"), ctx.world
    model.train()
    with ctx.scope("/".join(("fit", *world.name))), world.together():
        world.agree(model, *hooks.partners.values())
        hooks.mark("start", at)
        for at.epoch in range(budget.epochs):
            began, total, count = time.perf_counter(), torch.zeros((), device=ctx.device), 0
            hooks.mark("epoch", at)
            for fresh in world.shares(data.batches(budget.batch_size, order)):
                total += _advance(at, fresh.to(ctx.device), params, update, hooks, budget)
                count += 1
            mean = float(world.sum([total])[0]) / max(count, 1)
            if mean != mean:
                raise CupelError(
                    f"the training loss must stay finite; it is NaN in epoch {at.epoch + 1}. "
                    f"Lower lr (now {budget.lr:g}) or the strength of a technique in this fit."
                )
            ctx.log(kind="epoch", epoch=at.epoch + 1, loss=mean, lr=at.lr, seconds=time.perf_counter() - began)
        world.agree(model, *hooks.partners.values())
        hooks.mark("end", at)
    model.eval()


def _advance(
    at: Loop, fresh: Batch, params: dict[str, nn.Parameter], update: Update, hooks: Hooks, budget: Budget
) -> Tensor:
    """One update; returns the objective, detached."""
    at.lr = lr_at(budget, at.progress)
    at.batch = fresh
    with update.ahead():
        at.batch = batch = hooks.batch(fresh, at)
        if hooks.makes_gradients:
            with torch.no_grad():
                loss = at.objective(batch)
            grads: dict[str, Tensor] = {}
        else:
            loss = at.objective(batch)
            at.world.weigh(loss).backward()
            grads = at.world.gradients(params)
        grads = hooks.grads(grads, at)
    update.step(grads, at.lr)
    at.step += 1
    hooks.stepped(at)
    return at.world.weigh(loss.detach())


def trained_parameters(model: nn.Module, hooks: Hooks) -> dict[str, nn.Parameter]:
    """Parameters the update moves: the model's own, and those of networks that hooks train beside it."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for label, partner in hooks.partners.items():
        params |= {f"{label}/{name}": p for name, p in partner.named_parameters() if p.requires_grad}
    return params


def run_fit(
    model: nn.Module, data: TrainView, task: Task, budget: Budget, named: Sequence[Named], ctx: Context
) -> nn.Module:
    """One whole fit on `model` (changed in place unless a technique makes another, or other processes train it)."""
    for t in named:
        refuse_sharing(max(budget.devices, ctx.world.size), t.label, card_of(t.method), ())
    if budget.devices > 1:
        return spread(run_fit, model, data, task, budget, named, ctx)
    for t in named:
        if hasattr(t.method, "data"):
            data = t.method.data(data, t.ctx)
    seen = [replace(t, ctx=replace(t.ctx, train=data)) for t in named]
    model.to(ctx.device)
    for t in seen:
        if hasattr(t.method, "model"):
            model = t.method.model(model, t.ctx).to(ctx.device)
    having = [(t.label, t.method.hook(t.ctx)) for t in seen if hasattr(t.method, "hook")]
    for label, hook in having:
        refuse_sharing(ctx.world.size, label, None, uses_of(hook, label))
    hooks = Hooks(having)
    update: Update = TorchUpdate(trained_parameters(model, hooks), budget)
    for t in seen:
        if hasattr(t.method, "update"):
            update = t.method.update(update, model, t.ctx)
    train(model, data.train, task, update, hooks, budget, ctx)
    for t in sorted((t for t in seen if hasattr(t.method, "seal")), key=_seal_rank):
        model = t.method.seal(model, t.ctx)
    return model


def _seal_rank(t: Named) -> int:
    return SlotUse(t.label, "seal", getattr(t.method.seal, "phase", "")).rank


def fit(
    model: nn.Module,
    data: Splits | TrainView | Examples | tuple[Tensor, Tensor],
    task: Task,
    *,
    techniques: Sequence[Any] = (),
    budget: Budget = Budget(),
    bounds: Bounds | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    shelf: Shelf | None = None,
) -> nn.Module:
    """Train `model` with any techniques, without a recipe.

    Args:
        model: called with one batch of inputs; trained in place where no technique replaces it and
            `budget.devices` is 1.
        data: splits, examples, or a pair of tensors (inputs `[N, ...]`, targets `[N]`).
        task: such as `Classification(classes=10)`.
        techniques: method objects such as `PDP(sparsity=0.9)`, in list order within a phase.
        budget: epochs, batch size, optimiser, devices, precision.
        bounds: the range of the inputs, for techniques that move inputs: `Bounds(0.0, 1.0)`.
        seed: of every draw. Same seed on CPU: same bits.
        shelf: artefacts that techniques read (a teacher) and write (masks); a fresh one if none is given.

    Returns:
        The trained network in evaluation mode.

    Raises:
        ParamError: a technique holds a value outside its range.
        PlanError: two techniques take the same single place.
    """
    if isinstance(data, tuple):
        data = Examples(data[0], data[1], torch.arange(len(data[1])))
    if isinstance(data, Examples):
        data = TrainView(data, data)
    view = data.view() if isinstance(data, Splits) else data
    where = {name: getattr(budget, name) for name in ("devices", "strategy", "precision")}
    check_values("Budget", specs_of(Budget), where)
    device, shelf = torch.device(device), Shelf() if shelf is None else shelf
    ctx = Context(seed=seed, path=("fit",), shelf=shelf, device=device, train=view, task=task, bounds=bounds)
    named: list[Named] = []
    for technique in techniques:
        check(technique)
        label = type(technique).__name__.lower()
        twins = sum(t.label.split("-")[0] == label for t in named)
        label = f"{label}-{twins + 1}" if twins else label
        named.append(Named(label, technique, ctx.child(label)))
    return run_fit(model, view, task, budget, named, ctx)
