"""Technique `xgrad`: take each gradient where the optimiser's last move would lead next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card, Update

CARD = Card(
    name="xgrad",
    family="train",
    source="L. Guan, D. Li, Y. Shi, J. Meng, XGrad: Boosting Gradient-Based Optimizers With Weight Prediction, "
    "IEEE TPAMI 2024, arXiv 2305.18240, algorithm 1 and table 1",
    tags=("optimizer", "weight prediction", "look-ahead"),
    needs=("weights", "gradients"),
    tiny={"steps": 1},
    neutral={"steps": 0},
)


@contextmanager
def moved(params: Sequence[Tensor], directions: Sequence[Tensor], distance: float) -> Iterator[None]:
    """Inside, `params` stand at w - distance * direction; afterwards each holds its old bits, also after an error.

    Shapes: one direction for each parameter, of its shape.
    """
    saved = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, direction in zip(params, directions, strict=True):
                p.sub_(direction, alpha=distance)
        yield
    finally:
        # Copied back, not moved back: subtracting and adding again would round.
        with torch.no_grad():
            for p, old in zip(params, saved, strict=True):
                p.copy_(old)


@dataclass(frozen=True)
class XGrad:
    r"""Compute every gradient at the weights that the optimiser's state predicts, then step from the true ones.

    From the second step on, forward and backward run at w_t - s lr Delta_t, where Delta_t is the present direction
    of the inner rule: the momentum buffer of SGD, or m / (sqrt(v) + eps) with bias correction for Adam. Then w_t is
    put back and the inner rule steps with that gradient. Running statistics of batch norm see the predicted weights.

    Use: in a pipeline whose gradients are late, or as a look-ahead around any rule with momentum; no gain without it.

    Costs: a copy of the weights and one addition a step.

    Shapes: parameters of any shape.

    Raises:
        ParamError: `steps` is negative.

    Source: Guan, Li, Shi, Meng, TPAMI 2024, arXiv 2305.18240, algorithm 1.

    Departs: lr is the one of the step before, which differs from the present one only while a schedule moves; an
    inner rule without a memory of its direction (SGD without momentum) is left as it is; parameters of partner
    networks that hooks co-train are not moved ahead.

    Example:
        >>> XGrad(steps=2)
        XGrad(steps=2)
    """

    steps: int = param(1, "how many of the optimiser's moves to look ahead; 0 leaves the rule as it is", ge=0, le=16)

    def update(self, inner: Update, model: nn.Module, ctx: Context) -> Update:
        return _Ahead(self.steps, inner, model)


class _Ahead:
    def __init__(self, steps: int, inner: Update, model: nn.Module) -> None:
        self.steps, self.inner, self.model = steps, inner, model
        self.lr: float | None = None  # of the last step; none yet

    @contextmanager
    def ahead(self) -> Iterator[None]:
        with self.inner.ahead():
            if not self.steps or self.lr is None:
                yield
                return
            directions = self.inner.direction()
            pairs = [(p, directions[name]) for name, p in self.model.named_parameters() if name in directions]
            with moved([p for p, _ in pairs], [d for _, d in pairs], self.steps * self.lr):
                yield

    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        self.inner.step(grads, lr)
        self.lr = lr

    def direction(self) -> dict[str, Tensor]:
        return self.inner.direction()
