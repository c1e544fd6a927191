"""Technique `pdp`: parameter-free differentiable pruning with a soft mask made of the weights alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import MASKS
from cupel.core.slots import phase
from cupel.ops.masks import boundary, global_shares
from cupel.ops.swap import swapped

CARD = Card(
    name="pdp",
    family="compress",
    source="M. Cho, S. Adya, D. Naik, PDP: Parameter-free Differentiable Pruning is All You Need, "
    "NeurIPS 2023, arXiv 2305.11203, equations 1 to 4",
    tags=("pruning", "sparsity", "n:m", "channel"),
    needs=("weights", "gradients"),
    writes=("masks",),
    tiny={"sparsity": 0.5},
    neutral={"sparsity": 0.0},
)


def soft_mask(weight: Tensor, threshold: Tensor, tau: Tensor) -> Tensor:
    """m = exp(w^2/tau) / (exp(w^2/tau) + exp(t^2/tau)), elementwise; one half at |w| = t."""
    return torch.sigmoid((weight * weight - threshold * threshold) / tau)


def scores_of(weight: Tensor, form: str, m: int) -> Tensor:
    """Magnitudes to rank along the last axis: `[1, N]` unstructured, `[N/m, m]` n:m, `[1, out]` channel."""
    if form == "unstructured":
        return weight.abs().reshape(1, -1)
    if form == "channel":
        # Root mean square, not the norm: a channel with few inputs must not look small for that.
        return weight.flatten(1).square().mean(dim=1).sqrt().reshape(1, -1)
    return weight.abs().flatten(1).reshape(-1, m)


@dataclass(frozen=True)
class PDP:
    r"""Prune during training with a soft mask that is a closed form of the weights.

    Every forward uses m(w) w with m = sigmoid((w^2 - t^2) / tau), where t lies half-way between the
    smallest kept and the largest pruned magnitude. The gradient flows through m, so weights near the
    boundary are pushed to a side and pruned ones can return. After a dense start one global ranking
    gives each layer its share; the share then grows linearly. The last part trains under hard masks.

    Shapes: weights `[out, in, ...]`; biases and norms stay dense.

    Raises:
        ParamError: a value outside its range.

    Source: Cho, Adya, Naik, NeurIPS 2023, arXiv 2305.11203.

    Departs: tau = `softness` * t^2 per layer instead of an absolute 1e-4, which freezes the mask on
    weights larger than the paper's; the output layer keeps at least `head_keep` of its weights;
    warm-up and ramp are shares of the fit, because fits here are shorter than the paper's.

    Example:
        >>> PDP(sparsity=0.8).form
        'unstructured'
    """

    sparsity: float = param(0.9, "share of weights that end at zero, over all layers", ge=0, lt=1)
    form: str = param("unstructured", "what is pruned together", choices=("unstructured", "nm", "channel"))
    n: int = param(2, "weights kept in every group of m (form nm)", ge=1)
    m: int = param(4, "consecutive input weights in a group (form nm)", ge=2)
    softness: float = param(0.05, "temperature of the mask as a multiple of t squared", gt=0)
    warmup: float = param(0.1, "share of the fit before pruning starts", ge=0, lt=1)
    ramp: float = param(0.5, "share of the fit over which the sparsity grows", gt=0, le=1)
    settle: float = param(0.15, "last share of the fit, under hard masks", ge=0, lt=1)
    head_keep: float = param(0.1, "least share of the output layer's weights that stays", ge=0, le=1)

    def hook(self, ctx: Context) -> Hook:
        return _Soft(self, ctx)


class _Soft(Hook):
    def __init__(self, p: PDP, ctx: Context) -> None:
        self.p, self.shelf = p, ctx.shelf
        self.shares: dict[str, float] = {}
        self.masks: dict[str, Tensor] = {}

    def _grows(self, at: Moment) -> float:
        return min(1.0, max(0.0, at.progress - self.p.warmup) / self.p.ramp)

    def _allot(self, at: Moment) -> None:
        weights = dict(at.weights())
        if self.p.form == "nm":
            fits = {n for n, w in weights.items() if w.flatten(1).shape[1] % self.p.m == 0}
            self.shares = {n: 1 - self.p.n / self.p.m for n in fits}
            return
        scores = {n: scores_of(w.detach(), self.p.form, self.p.m) for n, w in weights.items()}
        last = list(scores)[-1]
        # A layer that loses everything cuts the network, so each keeps at least one part in a hundred.
        ceiling = dict.fromkeys(scores, 0.99) | {last: 0.0 if self.p.form == "channel" else 1 - self.p.head_keep}
        self.shares = global_shares(scores, self.p.sparsity, ceiling)

    def _threshold(self, weight: Tensor, share: float) -> Tensor:
        """t for every weight, `weight`'s shape or broadcastable to it; detached."""
        t = boundary(scores_of(weight.detach(), self.p.form, self.p.m), share)
        if self.p.form == "nm":
            return t.expand(-1, self.p.m).reshape(weight.shape)
        return t.reshape(())

    def _mask(self, weight: Tensor, share: float) -> Tensor:
        t = self._threshold(weight, share)
        tau = self.p.softness * (t * t).mean().clamp_min(1e-12)
        if self.p.form == "channel":
            size = scores_of(weight, self.p.form, self.p.m).flatten()
            return soft_mask(size, t, tau).view(-1, *[1] * (weight.ndim - 1))
        return soft_mask(weight, t, tau)

    @phase("mask")
    def around_forward(self, at: Moment) -> AbstractContextManager[None]:
        grown = self._grows(at)
        if self.p.sparsity == 0 or grown == 0 or self.masks:
            return swapped(at.model, {})
        if not self.shares:
            self._allot(at)

        def masking(share: float) -> Callable[[Tensor], Tensor]:
            return lambda w: w * self._mask(w, share)

        return swapped(at.model, {name: masking(share * grown) for name, share in self.shares.items() if share})

    @phase("mask")
    def stepped(self, at: Moment) -> None:
        if self.p.sparsity and not self.masks and self.shares and at.progress >= 1 - self.p.settle:
            self._harden(at)
        for name, w in at.weights():
            if name in self.masks:
                w.mul_(self.masks[name])

    def _harden(self, at: Moment) -> None:
        for name, w in at.weights():
            share = self.shares.get(name, 0.0)
            if share:
                self.masks[name] = (self._mask(w.detach(), share) >= 0.5).to(w.dtype).expand_as(w).clone()

    @torch.no_grad()
    def end(self, at: Moment) -> None:
        if self.p.sparsity and not self.masks:
            if not self.shares:
                self._allot(at)
            self._harden(at)
            for name, w in at.weights():
                if name in self.masks:
                    w.mul_(self.masks[name])
        self.shelf.put(MASKS, self.masks)
