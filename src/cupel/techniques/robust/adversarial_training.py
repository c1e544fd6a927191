"""Technique `adversarial-training`: learn from the worst inputs of a ball around every training input."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.descend import descend
from cupel.core.errors import PlanError
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.core.types import Batch, Bounds
from cupel.ops.attacks import stepping
from cupel.ops.divergences import kl
from cupel.ops.projections import random_in_ball
from cupel.ops.threats import Threat

CARD = Card(
    name="adversarial-training",
    family="robust",
    source="A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, Towards Deep Learning Models Resistant to "
    "Adversarial Attacks, ICLR 2018, arXiv 1706.06083, equation 2.1; H. Zhang et al., Theoretically Principled "
    "Trade-off between Robustness and Accuracy, ICML 2019, arXiv 1901.08573, algorithm 1",
    tags=("robustness", "adversarial training", "pgd", "trades"),
    needs=("gradients", "classes", "bounded"),
    tiny={"eps": 0.05, "steps": 2},
    neutral={"eps": 0.0},
)


@dataclass(frozen=True)
class AdversarialTraining:
    r"""Replace training inputs by, or tie them to, the worst inputs within eps.

    pgd: min over w of E max over ||d|| <= eps of CE(f_w(x + d), y): the batch is moved by projected steps
    up the task's loss before the update sees it.
    trades: min over w of E [CE(f_w(x), y) + beta max over ||d|| <= eps of KL(f_w(x) || f_w(x + d))]: the
    batch stays clean and the second term ties its prediction to that on the moved batch.

    Attacks run in evaluation mode; the update's forwards in training mode. eps grows linearly over the
    first `warmup` of the fit.

    Use: when inputs may be moved on purpose by a known radius; the only training defence here that adaptive attacks
    leave standing. Not for noise that nobody chooses, which augmentation meets more cheaply.

    Costs: `steps` more forwards and backwards a step; some points of clean accuracy; nothing at inference.

    Shapes: inputs `[B, ...]` floats within the workload's bounds; logits `[B, K]`.

    Raises:
        PlanError: the fit does not know the bounds of the inputs.

    Source: Madry et al. 2018, equation 2.1 and section 4; Zhang et al. 2019, equation 5 and algorithm 1.

    Departs: TRADES starts its steps uniformly in the ball instead of from a Gaussian of width 0.001; the
    step is `stride` times eps, so that eps alone sets the scale; eps may be warmed up.

    Example:
        >>> AdversarialTraining(method="trades").beta
        6.0
    """

    eps: float = param(0.1, "how far an input is moved, in input units", ge=0)
    norm: str = param("linf", "how the distance is measured", choices=("linf", "l2"))
    steps: int = param(7, "gradient steps of the inner attack", ge=1)
    stride: float = param(0.25, "length of one step as a share of eps", gt=0, le=2)
    method: str = param(
        "pgd", "train on moved inputs, or tie their predictions to the clean ones", choices=("pgd", "trades")
    )
    beta: float = param(6.0, "weight of the divergence term (trades)", ge=0)
    warmup: float = param(0.0, "share of the fit over which eps grows from 0", ge=0, le=1)

    def hook(self, ctx: Context) -> Hook:
        return _Adversary(self, ctx)


def moved(batch: Batch, p: AdversarialTraining, bounds: Bounds, draw: torch.Generator, at: Moment) -> Tensor:
    """The inputs of `batch` after the inner attack on the model as it is trained now, `[B, ...]`."""
    eps = p.eps * min(1.0, at.progress / p.warmup) if p.warmup else p.eps
    x: Tensor = batch.inputs
    if eps == 0:
        return x
    threat = Threat(p.norm, eps, bounds, p.steps, p.stride * eps)
    with at.evaluating():
        with torch.no_grad():
            clean = at.output_of(batch) if p.method == "trades" else None

        def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            out = at.output_of(replace(batch, inputs=here))
            return -(at.task.losses(out, batch) if clean is None else kl(clean, out)), None

        start = threat.admit(x + at.draw(x, lambda like: random_in_ball(like, eps, p.norm, draw)), x)
        return descend(
            start, objective, p.steps, stepping(threat, threat.stride), lambda new, rows: threat.admit(new, x)
        )


class _Adversary(Hook):
    def __init__(self, p: AdversarialTraining, ctx: Context) -> None:
        self.p, self.bounds, self.draw = p, ctx.bounds, ctx.rng("start")
        self.off = p.eps == 0 or (p.method == "trades" and p.beta == 0)
        self.index, self.inputs = torch.zeros(0), torch.zeros(0)  # of the present batch: identities, moved inputs

    def start(self, at: Moment) -> None:
        if self.bounds is None and not self.off:
            raise PlanError(
                "adversarial-training must know the range of the inputs; this fit has none. "
                "Give the workload bounds, or call fit(..., bounds=Bounds(0.0, 1.0))."
            )

    @phase("attack")
    def batch(self, batch: Batch, at: Moment) -> Batch:
        if self.off:
            return batch
        self.index, self.inputs = batch.index, moved(batch, self.p, self.bounds or Bounds(), self.draw, at)
        return replace(batch, inputs=self.inputs) if self.p.method == "pgd" else batch

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        if self.off or self.p.method == "pgd":
            return loss
        # Another hook may ask for the objective of a part of the batch; identities say which rows those are.
        rows = (batch.index[:, None] == self.index[None, :]).int().argmax(dim=1)
        far = at.output_of(replace(batch, inputs=self.inputs[rows]))
        return loss + self.p.beta * kl(out, far).mean()
