"""Technique `distill`: learn from a trained teacher's softened predictions beside the labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import TEACHER
from cupel.core.slots import phase
from cupel.core.types import Batch, still
from cupel.ops.divergences import soft_target_loss

CARD = Card(
    name="distill",
    family="compress",
    source="G. Hinton, O. Vinyals, J. Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531, "
    "section 2",
    tags=("distillation", "teacher", "baseline"),
    needs=("gradients", "classes"),
    reads=("teacher",),
    neutral={"weight": 0.0},
)


@dataclass(frozen=True)
class Distill:
    r"""Train on a frozen teacher's softened predictions and on the labels together.

    loss = (1 - weight) CE(z_s, y) + weight T^2 KL(softmax(z_t / T) || softmax(z_s / T)). The teacher sees
    the very batch the student sees, in evaluation mode.

    Use: when a small network shall learn from a good, trained one on the same data and classes.

    Costs: one forward of the teacher a step; nothing at inference.

    Shapes: logits of teacher and student `[B, K]`, of the same K classes in the same order.

    Raises:
        MissingArtefact: no teacher on the shelf, or one made for other data.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.

    Departs: the paper's soft loss is a cross-entropy; the KL divergence has the same gradient and is
    zero for a perfect student. Terms of other techniques keep their full weight.

    Example:
        >>> Distill(temperature=2.0).weight
        0.7
    """

    temperature: float = param(4.0, "softens both predictions; 1 leaves them as they are", gt=0)
    weight: float = param(0.7, "share of the loss that comes from the teacher, the rest from the labels", ge=0, le=1)

    def hook(self, ctx: Context) -> Hook:
        return _Taught(self, ctx)


class _Taught(Hook):
    def __init__(self, p: Distill, ctx: Context) -> None:
        self.p, self.teacher = p, ctx.shelf.get(TEACHER).to(ctx.device)

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        if self.p.weight == 0:
            return loss
        with still(self.teacher), torch.no_grad():
            target = self.teacher(batch.inputs)
        # As a difference, so that terms that other techniques added before stay as they are.
        return loss + self.p.weight * (soft_target_loss(target, out, self.p.temperature) - at.task.loss(out, batch))
