"""Technique `fitact`: activations with a bound for every neuron, learned after training, that stop bit flips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.fit import train, trained_parameters
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import Hooks, phase
from cupel.core.types import Batch, Budget, Dataset, Task, outputs_on, still
from cupel.core.update import TorchUpdate
from cupel.ops.bounded import activations, bounded_copy, bounds_of, maxima

CARD = Card(
    name="fitact",
    family="compress",
    source="B. Ghavami, M. Sadati, Z. Fang, L. Shannon, FitAct: Error Resilient Deep Neural Networks via Fine-Grained "
    "Post-Trainable Activation Functions, DATE 2022, arXiv 2112.13544",
    tags=("robustness", "hardware", "bit flip", "soft error", "activation"),
    needs=("gradients", "classes"),
    tiny={"epochs": 2},
)


def mean_square(bounds: list[Tensor]) -> Tensor:
    """mean_i lambda_i^2 over the neurons of all layers, a scalar."""
    return torch.cat([b.flatten() for b in bounds]).square().mean()


@dataclass(frozen=True)
class FitAct:
    r"""Bound the activation of every neuron, learn the bounds on the trained network, and change nothing else.

    FitReLU_i(x) = max(0, x - x * sigmoid(slope * (x - lambda_i))): about x below lambda_i, about 0 above, so that a
    value blown up by a flipped bit is dropped. lambda_i starts as the neuron's maximum over the training data.
    Then Adam lowers CE + weight * mean_i lambda_i^2 over the bounds alone. After each epoch the accuracy on the
    validation split is compared with that of the plain network: training ends when it has fallen by more than
    `tolerance`, and the last bounds that kept to it stay.

    Use: where weights lie in memory that flips bits and the network cannot be trained again; Clip-Act's layer bounds,
    `per` layer and `beyond` zero, are nearly as good at low rates and far fewer.

    Costs: one value a neuron in memory, one sigmoid an activation at inference, a short fit of the bounds.

    Shapes: activations `[B, ...]`; bounds `[...]` (neuron), `[C, 1, ...]` (channel) or one value (layer).

    Raises:
        PlanError: no activation module is called (`F.relu` in a forward cannot be replaced), no training or
            validation data, or later inputs of another size than the bounds were made for.

    Source: Ghavami, Sadati, Fang, Shannon, DATE 2022, arXiv 2112.13544; equations as in a public toolbox.

    Departs: ReLU6, GELU and SiLU modules are bounded likewise, as act(x) - act(x) * sigmoid(slope * (act(x) -
    lambda_i)), which for ReLU is the formula above; infinite and NaN values count as past the bound; where the
    network is too far off already with the maxima as bounds, training goes on, and if no bounds ever keep to the
    tolerance the most accurate stay (the log says so); batch norm and dropout stay in evaluation mode; calls
    of one module with several shapes have bounds of their own.

    Example:
        >>> FitAct(tolerance=0.01).slope
        20.0
    """

    weight: float = param(0.01, "of the mean squared bound in the loss (zeta)", ge=0)
    tolerance: float = param(0.005, "share of validation accuracy that may be lost (delta)", ge=0, le=1)
    slope: float = param(20.0, "steepness of the fall at the bound (k), per unit of activation", gt=0)
    epochs: int = param(10, "most epochs of training the bounds; 0 keeps the maxima", ge=0)
    lr: float = param(1e-3, "learning rate of the bounds (Adam)", gt=0)
    per: str = param("neuron", "what has a bound of its own", choices=("neuron", "channel", "layer"))

    @phase("shrink")
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        if ctx.train is None or ctx.task is None or not len(ctx.train.valid):
            raise PlanError(
                "fitact must have training and validation data; it has not. Run it in a recipe or with `apply`."
            )
        batches = ctx.train.train.batches(500)
        tops = maxima(model, activations(model), (b.to(ctx.device).inputs for b in batches), self.per)
        if not tops:
            raise PlanError(
                "a network for fitact must call a ReLU, ReLU6, GELU or SiLU module; it calls none without a bound "
                "(functions such as F.relu cannot be replaced). Use nn.ReLU() in its forward, or leave fitact out."
            )
        made = bounded_copy(model, tops, self.per, "fade", self.slope)
        floor = accuracy(model, ctx.train.valid, ctx.task) - self.tolerance
        with still(made):
            bounds = list(bounds_of(made))
            for b in bounds:
                b.requires_grad_(True)
            self._learn(made, bounds, floor, ctx)
        return made.eval()

    def _learn(self, net: nn.Module, bounds: list[nn.Parameter], floor: float, ctx: Context) -> None:
        """Train `bounds` in place; they end as the last that were accurate enough."""
        assert ctx.train is not None and ctx.task is not None
        budget = Budget(epochs=1, batch_size=64, optimizer="adam", lr=self.lr)
        hooks = Hooks([("frozen", _Frozen())])
        update = TorchUpdate(trained_parameters(net, hooks), budget)
        task = cast(Task, _Priced(ctx.task, list(bounds), self.weight))
        best = score = accuracy(net, ctx.train.valid, ctx.task)
        kept = [b.detach().clone() for b in bounds]
        for epoch in range(1, self.epochs + 1):
            train(net, ctx.train.train, task, update, hooks, budget, ctx.child(f"epoch-{epoch}"))
            score = accuracy(net, ctx.train.valid, ctx.task)
            ctx.log(kind="fitact", epoch=epoch, accuracy=score, mean_square=float(mean_square([*bounds]).detach()))
            if score < floor <= best:
                break
            if score >= min(floor, best):
                best, kept = score, [b.detach().clone() for b in bounds]
        if best < floor:
            ctx.log(kind="note", text=f"no bounds keep the accuracy within {self.tolerance:g}; the best has {best:.4f}")
        with torch.no_grad():
            for b, value in zip(bounds, kept, strict=True):
                b.copy_(value)


class _Frozen(Hook):
    """Keeps batch norm and dropout as they are in use."""

    def start(self, at: Moment) -> None:
        at.model.eval()


@dataclass(frozen=True)
class _Priced:
    """A task whose loss also counts the bounds."""

    task: Task
    bounds: list[Tensor]
    weight: float

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        return self.task.loss(out, batch) + self.weight * mean_square(self.bounds)


def accuracy(model: nn.Module, data: Dataset, task: Task) -> float:
    """Share of right answers."""
    targets = torch.cat([b.targets for b in data.batches(500)]).cpu()
    return float((task.predict(outputs_on(model, data)) == targets).double().mean())
