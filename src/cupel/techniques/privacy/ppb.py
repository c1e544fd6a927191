"""Technique `ppb`: train so that the ranked predictions of any two examples look alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.core.types import Batch
from cupel.ops.divergences import kl

CARD = Card(
    name="ppb",
    family="privacy",
    source="X. Yuan, L. Zhang, Membership Inference Attacks and Defenses in Neural Network Pruning, USENIX Security "
    "2022, arXiv 2202.03335, section 7 (pair-based posterior balancing)",
    tags=("defence", "membership-inference", "regularisation"),
    needs=("gradients", "classes"),
    tiny={"weight": 1.0},
    neutral={"weight": 0.0},
)


def pair_divergence(logits: Tensor) -> Tensor:
    """Mean KL divergence between the ranked predictions of the first and the second half of a batch.

    Row i is paired with row i + B // 2; of an odd batch the last row is left out.

    Shapes: `[B, K]` -> a scalar; zero for fewer than two rows.
    """
    half = len(logits) // 2
    if half == 0:
        return logits.sum() * 0.0
    ranked = logits.sort(dim=1, descending=True).values
    return kl(ranked[:half], ranked[half : 2 * half]).mean()


@dataclass(frozen=True)
class PPB:
    r"""Add to the loss how far the ranked predictions of pairs of training examples are apart.

    L = CE + weight * mean_i KL(softmax(sort(z_i)) || softmax(sort(z_{i + B/2}))), with batches in random
    order. Members betray themselves by more confident predictions than the rest; a network whose
    predictions all have one profile keeps their classes, and says less about who was trained on.

    Use: against simple membership attacks on a small or pruned network, at a price in accuracy that grows with
    `weight`; for a guarantee, train with differential privacy.

    Costs: one sort of each prediction a step; nothing at inference.

    Shapes: logits `[B, K]`.

    Source: Yuan and Zhang, USENIX Security 2022, arXiv 2202.03335.

    Departs: acts in any fit, and not only while a pruned network is retrained.

    Example:
        >>> PPB(weight=4.0)
        PPB(weight=4.0)
    """

    weight: float = param(4.0, "weight of the term; 1 to 16 in the paper", ge=0)

    def hook(self, ctx: Context) -> Hook:
        return _Balance(self.weight)


class _Balance(Hook):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        return loss + self.weight * pair_divergence(at.whole(out)) if self.weight else loss
