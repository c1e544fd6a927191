"""Technique `tscnc`: shape weights for pruning, and keep their matrices well conditioned, before and after it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.ops.conditioning import conditioning, lipschitz_bound, short_side, transformed_l1, unevenness

CARD = Card(
    name="tscnc",
    family="compress",
    source="Y. Feng, S.-H. J. Lin, B. Gao, X. Wei, Lipschitz Constant Meets Condition Number: Learning Robust and "
    "Compact Deep Neural Networks, 2025, arXiv 2503.20454",
    tags=("pruning", "sparsity", "robustness", "condition number", "lipschitz", "regularisation"),
    needs=("weights", "gradients"),
    neutral={"sparse_weight": 0.0, "condition_weight": 0.0},
)


def sparse_term(weights: Iterable[Tensor], a: float) -> Tensor:
    """Sum over layers of the mean transformed l1 of their entries, a scalar."""
    return torch.stack([transformed_l1(w, a) for w in weights]).sum()


def condition_term(weights: Iterable[Tensor], ridge: float) -> Tensor:
    """Sum over layers of how uneven their singular values are, a scalar; 0 where all are sqrt(1 - ridge)."""
    return torch.stack([unevenness(w, ridge) - (1 - ridge) / 2 for w in weights]).sum()


@dataclass(frozen=True)
class TSCNC:
    r"""Train a network that survives heavy pruning: small weights go to zero, and no matrix becomes ill-conditioned.

    To the loss are added, over all weight matrices W of n entries, m singular values:

        sparse_weight * sum_W mean_i (a + 1) |u_i| / (a + |u_i|),  u = w / std(w)        until `sparse_until`
        condition_weight * sum_W (||W||_F^2 - log det(ridge I + W W^T)) / 2m             during the whole fit

    The first pushes small weights down and leaves large ones; the second is least where all singular values are
    equal, and grows without bound, up to the ridge, as one of them vanishes. A layer amplifies the relative size of
    a perturbation by at most kappa = s_max / s_min; pruning lowers s_max, but s_min faster.

    Use: beside `adversarial-training` and a pruner, in one fit: `magnitude-prune: {start: 0.5, ramp: 0}` with
    `sparse_until: 0.5`, or in two, the second with `sparse_weight: 0`. A `condition_weight` of 0.03 lowers the
    condition numbers of a dense network tenfold and more at no cost; where 98% are cut, larger weights than the
    defaults lose accuracy. Not without a pruner, nor as a defence by itself.

    Costs: a product and a Cholesky factor of the shorter side m per matrix and step, O(m^2 n + m^3), in training
    alone; nothing at inference and no bytes. `every` makes the second term rarer.

    Shapes: weights `[out, in, ...]`, taken as `[out, in * ...]`; biases and norms are left alone.

    Raises:
        ParamError: a value outside its range.

    Source: Feng, Lin, Gao, Wei 2025, arXiv 2503.20454. No code is published, and the formulas here are
    reconstructed from the paper's description. Transformed l1: Zhang and Xin, Math. Programming 169, 2018.

    Departs: both penalties are means per matrix, so that their weights do not depend on the size of the network; the
    pruning itself is another technique's. Rows that a pruner empties stay empty, where the paper's masks may keep
    one entry in each: the log counts them. Both terms see the stored weights, and not what a soft mask or a quantizer
    makes of them in the forward.

    Example:
        >>> TSCNC(condition_weight=0.03, sparse_until=0.5).ridge
        0.01
    """

    sparse_weight: float = param(0.03, "of the transformed l1 term in the loss", ge=0)
    condition_weight: float = param(0.003, "of the condition term in the loss", ge=0)
    sparse_until: float = param(1.0, "share of the fit in which the first term acts: until weights are cut", ge=0, le=1)
    a: float = param(1.0, "form of the first term: near 0 it counts weights, large it sums their size", gt=0)
    ridge: float = param(0.01, "added to squared singular values: below its root they count as zero", gt=0, lt=1)
    every: int = param(1, "steps between two uses of the second term, each as strong as the ones left out", ge=1)
    max_side: int = param(1024, "matrices with more singular values are left out of the second term", ge=1)

    def hook(self, ctx: Context) -> Hook:
        return _Shaped(self, ctx)


class _Shaped(Hook):
    def __init__(self, p: TSCNC, ctx: Context) -> None:
        self.p, self.ctx = p, ctx

    def start(self, at: Moment) -> None:
        out = [n for n, w in at.weights() if short_side(w) > self.p.max_side]
        if out and self.p.condition_weight:
            text = f"tscnc: {', '.join(out)} have more than {self.p.max_side} singular values and are left out of the"
            self.ctx.log(kind="note", text=f"{text} condition term. Raise max_side, and every, to take them in.")

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: object, at: Moment) -> Tensor:
        p, learning = self.p, [w for _, w in at.weights() if w.requires_grad]
        if p.sparse_weight and learning and at.progress < p.sparse_until:
            loss = loss + p.sparse_weight * sparse_term(learning, p.a)
        small = [w for w in learning if short_side(w) <= p.max_side]
        if p.condition_weight and small and at.step % p.every == 0:
            loss = loss + p.condition_weight * p.every * condition_term(small, p.ridge)
        return loss

    def end(self, at: Moment) -> None:
        """Tell how well conditioned the fit leaves the matrices."""
        if not (self.p.sparse_weight or self.p.condition_weight):
            return
        named = {n: w for n, w in at.weights() if short_side(w) <= self.p.max_side}
        found = {n: conditioning(w) for n, w in named.items()}
        for name, c in found.items():
            self.ctx.log(
                kind="conditioning", layer=name, kappa=c.effective, rank=c.rank, of=c.full, lost=c.lost, norm=c.largest
            )
        if found:
            mean = sum(math.log10(c.effective) for c in found.values()) / len(found)
            ranks = f"{sum(c.rank for c in found.values())} of {sum(c.full for c in found.values())}"
            text = (
                f"tscnc: mean log10 of the condition numbers {mean:.2f} over {ranks} singular values that are not zero"
            )
            bound = f"product of the layers' norms {lipschitz_bound(named.values()):.3g}"
            self.ctx.log(kind="note", text=f"{text}; {bound}")
