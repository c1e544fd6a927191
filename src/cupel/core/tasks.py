"""Tasks that more than one workload poses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from cupel.core.types import Batch


@dataclass(frozen=True)
class Classification:
    """Choose one of `classes`; outputs are logits `[B, classes]`, judged by cross-entropy."""

    classes: int

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(out, batch.targets, reduction="none")

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(out, batch.targets)

    def predict(self, out: Tensor) -> Tensor:
        return out.argmax(-1)

    def scores(self, out: Tensor) -> Tensor:
        return out.softmax(-1)
