"""Technique `gsm`: momentum SGD in which only the most salient weights learn and all others slide to zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment, Update
from cupel.core.shelf import MASKS
from cupel.core.update import TorchUpdate
from cupel.ops.masks import keep_count, largest, zero_where

CARD = Card(
    name="gsm",
    family="compress",
    source="X. Ding, G. Ding, X. Zhou, Y. Guo, J. Han, J. Liu, Global Sparse Momentum SGD for Pruning Very Deep "
    "Neural Networks, NeurIPS 2019, arXiv 1909.12778, section 3",
    tags=("pruning", "sparsity", "optimizer", "lottery ticket"),
    needs=("weights", "gradients"),
    writes=("masks",),
    tiny={"sparsity": 0.5},
    neutral={"sparsity": 0.0},
)


def top(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Which entries are among the `keep` largest of all tensors together: bool, one of each tensor's shape."""
    if not scores:
        return []
    chosen = largest(torch.cat([s.flatten() for s in scores]), keep)
    parts = chosen.split([s.numel() for s in scores])
    return [part.view_as(s) for part, s in zip(parts, scores, strict=True)]


def active(weights: Sequence[Tensor], grads: Sequence[Tensor], keep: int) -> list[Tensor]:
    """B: the `keep` weights of all layers whose removal would change the loss most, by T = |w dL/dw|."""
    return top([(w.detach() * g).abs() for w, g in zip(weights, grads, strict=True)], keep)


def shrinkage(lr: float, decay: float, momentum: float, steps: int) -> float:
    """Exponent of passive decay: a weight without gradients ends at about exp(-this) of its value.

    >>> round(shrinkage(0.005, 1e-4, 0.98, 400_000), 3)
    10.0
    """
    return steps * lr * decay / (1 - momentum)


def prunable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trained parameters with two or more dimensions; biases and norms stay dense."""
    return [(n, p) for n, p in model.named_parameters() if p.ndim > 1 and n.endswith("weight") and p.requires_grad]


class SparseMomentum(torch.optim.SGD):
    """Momentum SGD that hands the gradients of `pruned` on for the `keep` most salient of their entries alone."""

    def __init__(
        self, params: Sequence[nn.Parameter], pruned: Sequence[nn.Parameter], keep: int, **rule: float
    ) -> None:
        super().__init__(params, **rule)  # type: ignore[arg-type]
        self.pruned, self.keep = list(pruned), keep

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        # The mask falls on the gradient, before momentum: what an entry has gathered goes on moving it. A weight the
        # loss did not reach has no gradient at all and would be left out by torch; here it decays like the others.
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.pruned]
        for w, g, learns in zip(self.pruned, grads, active(self.pruned, grads, self.keep), strict=True):
            w.grad = g * learns
        super().step(closure)


@dataclass(frozen=True)
class GSM:
    r"""Prune by an update rule: each step the most salient weights of the network learn and the others only decay.

    Of all weights P together, Q = (1 - sparsity) |P| are active in a step, those with the largest T(w) = |w dL/dw|:

        z <- momentum z + weight_decay w + B dL/dw,   w <- w - lr z,   B = 1 where T(w) is among the Q largest.

    Passive weights shrink by exp(-lr weight_decay / (1 - momentum)) a step and may become active again at any step. At
    the end the Q largest |w| stay and the rest is cut, which changes little once the sum of lr weight_decay /
    (1 - momentum) over the fit passes 6; the log tells that sum. Start from a trained network, and set lr, epochs and
    `weight_decay` for it. How much each layer loses comes out by itself. Masks go to the shelf: they are also lottery
    tickets.

    Use: to cut nine weights in ten or more from a trained network in one further fit, without fine-tuning and without
    choosing shares by layer; not with Adam, and not where the fit is too short for the decay.

    Costs: one ranking of all weights a step; afterwards zeros, which shrink the file but not the time.

    Shapes: weights `[out, in, ...]`; biases and norms learn as usual and stay dense.

    Raises:
        ParamError: a value outside its range.
        PlanError: another update rule hides the one to be replaced.

    Source: Ding, Ding, Zhou, Guo, Han, Liu, NeurIPS 2019, arXiv 1909.12778, section 3.

    Departs: exactly Q weights are active, the earlier ones among equals, where a threshold lets all equals through.
    Optimiser, momentum and weight decay of the fit's budget do not count: they are this rule's own, and so wherever
    the technique stands among other update rules of a fit it is the innermost. Its default decay is that of short fits;
    the paper's is 1e-4 over 600 epochs.

    Example:
        >>> GSM(sparsity=0.98)
        GSM(sparsity=0.98, momentum=0.98, weight_decay=0.005)
    """

    sparsity: float = param(0.9, "share of weights that end at zero, over all layers", ge=0, lt=1)
    momentum: float = param(0.98, "of the update rule; high values let passive weights slide to zero", ge=0, lt=1)
    weight_decay: float = param(5e-3, "L2 pull on every parameter", ge=0)

    def update(self, inner: Update, model: nn.Module, ctx: Context) -> Update:
        if self.sparsity:
            base = _base(inner)
            weights = [w for _, w in prunable(model)]
            base.optimizer = SparseMomentum(
                list(base.params.values()),
                weights,
                keep_count(sum(w.numel() for w in weights), 1 - self.sparsity),
                lr=base.optimizer.param_groups[0]["lr"],
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
        return inner

    def hook(self, ctx: Context) -> Hook:
        return _Cut(self, ctx)


def _base(rule: object) -> TorchUpdate:
    """The innermost rule of a chain of wraps."""
    outer = type(rule).__name__
    while not isinstance(rule, TorchUpdate):
        rule = getattr(rule, "inner", None)
        if rule is None:
            raise PlanError(f"gsm must find the optimiser it replaces; got {outer}. Put gsm before it in the list.")
    if isinstance(rule.optimizer, SparseMomentum):
        raise PlanError("gsm must stand once in a fit; got it twice. Remove one.")
    return rule


def cut(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """0/1 masks that keep the largest magnitudes of all layers together."""
    keep = keep_count(sum(w.numel() for w in weights.values()), 1 - sparsity)
    kept = top([w.detach().abs() for w in weights.values()], keep)
    return {name: mask.to(w.dtype) for (name, w), mask in zip(weights.items(), kept, strict=True)}


class _Cut(Hook):
    def __init__(self, p: GSM, ctx: Context) -> None:
        self.p, self.ctx = p, ctx

    def start(self, at: Moment) -> None:
        """Tell how far passive weights will slide if lr stays as it is; below 6 the cut will cost accuracy."""
        if self.p.sparsity:
            decay = shrinkage(at.lr, self.p.weight_decay, self.p.momentum, at.steps)
            self.ctx.log(kind="gsm", shrinkage=decay, enough=decay >= 6)
            if decay < 6:
                text = (
                    f"gsm: passive weights shrink by exp(-{decay:.2g}) only, so the cut will cost accuracy; it wants 6"
                )
                self.ctx.log(kind="note", text=f"{text}. Raise epochs, lr, weight_decay or momentum.")

    @torch.no_grad()
    def end(self, at: Moment) -> None:
        weights = dict(prunable(at.model)) if self.p.sparsity else {}
        masks = cut(weights, self.p.sparsity)
        before = sum(float(w.abs().sum()) for w in weights.values())
        for name, mask in masks.items():
            zero_where(weights[name], mask)
        if masks and before:
            lost = 1 - sum(float(w.abs().sum()) for w in weights.values()) / before
            self.ctx.log(kind="gsm", cut=lost, kept={n: float(m.mean()) for n, m in masks.items()})
        self.ctx.shelf.put(MASKS, masks)
