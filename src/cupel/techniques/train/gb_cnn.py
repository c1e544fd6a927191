"""Technique `gb-cnn`: grow a network by boosting, one dense layer a round."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.fit import train, trained_parameters
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.slots import Hooks
from cupel.core.types import Batch, Budget, Examples, Subject, outputs_on
from cupel.core.update import TorchUpdate
from cupel.ops.swap import owner_of

CARD = Card(
    name="gb-cnn",
    family="train",
    source="S. Emami, G. Martinez-Munoz, A Gradient Boosting Approach for Training Convolutional and Deep Neural "
    "Networks, IEEE Open Journal of Signal Processing 4, 2023, arXiv 2302.11327, algorithms 1 and 2",
    tags=("boosting", "anytime", "layer-wise"),
    needs=("weights", "gradients", "classes"),
    removes=("blocks",),
    tiny={"rounds": 2, "units": 4, "epochs": 2},
    neutral={"rounds": 0},
)


def newton_step(h: Tensor, residual: Tensor, p: Tensor) -> float:
    """rho = sum(h r) / sum(h^2 p (1 - p)): how far to go along h, from the diagonal of the Hessian.

    Shapes: all `[N, K]`; r is the one-hot target minus p.
    """
    return float((h * residual).sum() / (h.square() * p * (1 - p)).sum().clamp_min(1e-12))


class Boosted(nn.Module):
    """F(x) = sum_t scale_t h_t(x), where h_t stands on the dense layers of the rounds before it.

    Args:
        trunks: what runs before the dense layers: one for all rounds, or one snapshot a round.
        dense: hidden layers, one a round.
        heads: output layers, one a round.
        scale: shrinkage times Newton step of every round, `[T]`.

    Shapes: inputs as the first trunk takes them -> logits `[B, K]`.
    """

    scale: Tensor

    def __init__(
        self, trunks: Sequence[nn.Module], dense: Sequence[nn.Module], heads: Sequence[nn.Module], scale: Tensor
    ) -> None:
        super().__init__()
        self.trunks, self.dense, self.heads = nn.ModuleList(trunks), nn.ModuleList(dense), nn.ModuleList(heads)
        self.register_buffer("scale", scale)

    def staged(self, x: Tensor) -> Tensor:
        """Logits after each round: an exit for every budget. `[T, B, K]`."""
        total, found = torch.zeros((), device=self.scale.device), []
        z = x
        for t, (layer, head) in enumerate(zip(self.dense, self.heads, strict=True)):
            if t == 0 or len(self.trunks) > 1:  # a shared trunk is run once, and its dense chain goes on
                z = _chain(self.trunks[min(t, len(self.trunks) - 1)], self.dense[:t], x)
            z = layer(z).relu()
            total = total + self.scale[t] * head(z)
            found.append(total)
        return torch.stack(found)

    def forward(self, x: Tensor) -> Tensor:
        return self.staged(x)[-1]


def _chain(trunk: nn.Module, dense: Iterable[nn.Module], x: Tensor) -> Tensor:
    z = trunk(x).flatten(1)  # [B, d]
    for layer in dense:
        z = layer(z).relu()
    return cast(Tensor, z)


class _Round(nn.Module):
    """h_t while it is trained."""

    def __init__(self, trunk: nn.Module, frozen: Sequence[nn.Module], layer: nn.Linear, head: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.frozen, self.layer, self.head = trunk, nn.ModuleList(frozen), layer, head

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.layer(_chain(self.trunk, self.frozen, x)).relu()))


@dataclass(frozen=True)
class _Residuals:
    """Regression on pseudo-residuals `[B, K]`."""

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        return (out - batch.targets).square().mean(1)

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(out, batch.targets)

    def predict(self, out: Tensor) -> Tensor:
        return out

    def scores(self, out: Tensor) -> Tensor:
        return out


@dataclass(frozen=True)
class GbCnn:
    r"""Boost a network: every round adds one dense layer that fits what the sum so far gets wrong.

    With F_0 = 0, round t takes P = softmax(F) and fits h_t = head(relu(dense_t(... relu(dense_1(trunk(x)))))) to Y - P
    by squared error. Dense layers of former rounds are frozen, their heads are dropped from h_t. Then
    F <- F + nu rho_t h_t, with the Newton step rho_t = sum(h (Y - P)) / sum(h^2 P (1 - P)). The result is a network
    whose `staged(x)` gives the logits after every round, `[T, B, K]`.

    `trunk: network` (GB-CNN) starts from the network without its head, whose weights go on learning in every round;
    train it first (`fit`, then `apply`). `trunk: none` (GB-DNN) works on the flattened inputs.

    Use: where a network may grow by rounds and early exits come for free; rarely better than one network trained as
    long.

    Costs: one fit a round, each on top of what stands; parameters add up.

    Shapes: inputs `[B, ...]`, class numbers `[B]`, logits `[B, K]`.

    Raises:
        PlanError: the training data are not plain examples, or the network names no head.

    Source: Emami, Martinez-Munoz, 2023, arXiv 2302.11327.

    Departs: a round stops early on its training error, looked at every `patience` epochs; the trunk of each round is
    kept as a snapshot, so predictions are the sums that were fitted (`snapshots: false` shares the last one and
    accepts its drift).

    Example:
        >>> GbCnn(rounds=20, trunk="none").units
        20
    """

    rounds: int = param(10, "boosting rounds, one dense layer each; 0 leaves the network as it is", ge=0, le=200)
    units: int = param(20, "width of every dense layer", ge=1)
    shrinkage: float = param(0.1, "share of the Newton step that a round takes (nu)", gt=0, le=1)
    trunk: str = param("network", "what the dense layers stand on", choices=("network", "none"))
    snapshots: bool = param(True, "keep each round's own trunk, not only the last")
    epochs: int = param(40, "most epochs of a round", ge=1)
    patience: int = param(5, "epochs without a lower training error that end a round", ge=1)
    lr: float = param(1e-3, "learning rate of Adam", gt=0)

    def procedure(self, subject: Subject, ctx: Context) -> nn.Module:
        if not self.rounds:
            return subject.model
        data = subject.data.train
        if not isinstance(data, Examples):
            raise PlanError(
                f"gb-cnn must have independent examples to boost on; got {type(data).__name__}. "
                "Use a workload of images, series or tables."
            )
        trunk = nn.Flatten() if self.trunk == "none" else headless(subject)
        return _grow(self, trunk.to(ctx.device), data, subject, ctx)


def headless(subject: Subject) -> nn.Module:
    """A copy of the subject's network whose head passes its input on."""
    name = subject.anatomy.head
    if not name:
        raise PlanError(
            'gb-cnn must know the network\'s head to take it off; the anatomy names none. Use trunk: "none".'
        )
    trunk = copy.deepcopy(subject.model)
    module, leaf = owner_of(trunk, name)
    setattr(module, leaf, nn.Identity())
    return trunk


def _grow(p: GbCnn, trunk: nn.Module, data: Examples, subject: Subject, ctx: Context) -> Boosted:
    learns = p.trunk == "network"
    classes = outputs_on(subject.model, data.take(torch.arange(2))).shape[1]
    truth = F.one_hot(data.targets, classes).float()  # [N, K]
    total = torch.zeros_like(truth)
    seen = data if learns else data.having(inputs=outputs_on(trunk, data))
    trunks, dense, heads, scale = [], list[nn.Linear](), list[nn.Linear](), []
    for t in range(p.rounds):
        probability = subject.task.scores(total)
        here, frozen = (trunk, dense) if learns else (nn.Identity(), [])
        # Fixed features are computed once a round; a moving trunk needs the whole chain in every step.
        width = (
            p.units if frozen else outputs_on(nn.Sequential(here, nn.Flatten()), seen.take(torch.arange(2))).shape[1]
        )
        with ctx.scope(f"init-{t}"):
            stage = _Round(here, frozen, nn.Linear(width, p.units), nn.Linear(p.units, classes)).to(ctx.device)
        _fit_round(p, stage, seen.having(targets=truth - probability), ctx.child(f"round-{t}"))
        h = outputs_on(stage, seen)
        rho = newton_step(h, truth - probability, probability)
        total = total + p.shrinkage * rho * h
        dense.append(stage.layer.requires_grad_(False))
        heads.append(stage.head)
        scale.append(p.shrinkage * rho)
        if learns and p.snapshots:
            trunks.append(copy.deepcopy(trunk))
        if not learns:
            seen = seen.having(inputs=outputs_on(nn.Sequential(stage.layer, nn.ReLU()), seen))
        loss = float(subject.task.loss(total, data.whole()))
        ctx.log(kind="round", round=t + 1, loss=loss, rho=rho)
    for layer in dense:
        layer.requires_grad_(True)  # frozen for the rounds only: a later fit may tune the whole sum
    return Boosted(trunks or [trunk], dense, heads, torch.tensor(scale, device=ctx.device))


def _fit_round(p: GbCnn, stage: _Round, data: Examples, ctx: Context) -> None:
    """Train one round until its error stops falling, or for `epochs`."""
    budget = Budget(epochs=p.patience, batch_size=128, optimizer="adam", lr=p.lr)
    hooks, task = Hooks([]), _Residuals()
    update = TorchUpdate(trained_parameters(stage, hooks), budget)
    best = float("inf")
    for k, start in enumerate(range(0, p.epochs, p.patience)):
        part = replace(budget, epochs=min(p.patience, p.epochs - start))
        train(stage, data, task, update, hooks, part, ctx.child(f"part-{k}"))
        error = float(task.loss(outputs_on(stage, data), data.whole()))
        if error >= best:
            break
        best = error
