"""Technique `label-smoothing`: train towards labels that leave a share of doubt to every class."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.core.types import Batch

CARD = Card(
    name="label-smoothing",
    family="train",
    source="C. Szegedy et al., Rethinking the Inception Architecture, CVPR 2016, arXiv 1512.00567, section 7",
    tags=("regularisation", "calibration"),
    needs=("gradients", "classes"),
    tiny={"doubt": 0.2},
    neutral={"doubt": 0.0},
)


@dataclass(frozen=True)
class LabelSmoothing:
    """Mix every label with the uniform distribution over classes.

    L = (1 - doubt) * CE(p, y) + doubt * mean over k of CE(p, k).

    Use: against over-confidence on clean labels; not below `distill`, whose students learn less from smoothed teachers.

    Costs: nothing worth counting.

    Shapes: logits `[B, K]`, targets `[B]`.

    Source: Szegedy et al., CVPR 2016, section 7.

    Example:
        >>> LabelSmoothing(doubt=0.1)
        LabelSmoothing(doubt=0.1)
    """

    doubt: float = param(0.1, "share of the label spread over all classes", ge=0, lt=1)

    def hook(self, ctx: Context) -> Hook:
        return _Smooth(self.doubt)


class _Smooth(Hook):
    def __init__(self, doubt: float) -> None:
        self.doubt = doubt

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        if self.doubt == 0:
            return loss
        uniform = -F.log_softmax(out, dim=-1).mean()
        return loss + self.doubt * (uniform - F.cross_entropy(out, batch.targets))
