"""Technique `pdp`: parameter-free differentiable pruning with a soft mask made of the weights alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError, refusing
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import MASKS
from cupel.core.slots import phase
from cupel.ops.channels import Side, axes_of, spread_over, traced_on
from cupel.ops.cutting import cut_or_refuse, zero_groups, zeroed_groups
from cupel.ops.masks import (
    boundary,
    even_shares,
    global_shares,
    keep_count,
    largest,
    layer_ceilings,
    zero_where,
)
from cupel.ops.soft_masks import group_masks, group_squares, ranked, soft_mask, spread
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


@dataclass(frozen=True)
class PDP:
    r"""Prune during training with a soft mask that is a closed form of the weights.

    Every forward uses m(w) w with m = sigmoid((w^2 - t^2) / tau), where t lies half-way between the
    smallest kept and the largest pruned magnitude. The gradient m + 2 w^2/tau m (1 - m) flows through m,
    so weights near the boundary are pushed to a side and pruned ones can return. After a dense start one
    global ranking gives each layer its share; the share then grows linearly. The last part trains under
    hard masks.

    Use: for the most accuracy at a number of weights (unstructured), for sparse kernels (nm), for a network that is
    really narrower and faster (channel). Masks alone make nothing faster.
    Costs: a selection over every weight matrix a step; stored zeros take little, form channel has none.

    Shapes: weights `[out, in, ...]`; but for form channel biases and norms stay dense.

    Raises:
        ParamError: a value outside its range, `n` above `m`, or warmup, ramp and settle above 1 in all.
        PlanError: form channel on a network whose channels cannot be traced or cut.

    Source: Cho, Adya, Naik, NeurIPS 2023, arXiv 2305.11203.

    Departs: tau = `softness` * t^2 per layer instead of an absolute 1e-4, which freezes the mask on
    weights larger than the paper's; the output layer keeps at least `head_keep` of its weights;
    warm-up and ramp are shares of the fit, because fits here are shorter than the paper's. Form channel
    ranks the channels that meet in one axis (through residual adds, say) and drops the same share of each:
    one global ranking empties the widest layer first. Its masks cover biases and norms too, so that the
    network can be cut at the end without changing an output. Form nm leaves layers dense whose inputs are
    no multiple of m.

    Example:
        >>> PDP(sparsity=0.8).form
        'unstructured'
    """

    sparsity: float = param(0.9, "share of weights (form channel: of channels) that end at zero", ge=0, lt=1)
    form: str = param("unstructured", "what is pruned together", choices=("unstructured", "nm", "channel"))
    n: int = param(2, "weights kept in every group of m (form nm)", ge=1)
    m: int = param(4, "consecutive input weights in a group (form nm)", ge=2)
    softness: float = param(0.05, "temperature of the mask as a multiple of t squared", gt=0)
    warmup: float = param(0.1, "share of the fit before pruning starts", ge=0, lt=1)
    ramp: float = param(0.5, "share of the fit over which the sparsity grows", gt=0, le=1)
    settle: float = param(0.15, "last share of the fit, under hard masks", ge=0, lt=1)
    head_keep: float = param(0.1, "least share of the output layer's weights that stays", ge=0, le=1)

    def hook(self, ctx: Context) -> Hook:
        if self.form == "nm" and self.n > self.m:
            raise ParamError(f"n of pdp must be at most m, {self.m}; got {self.n}. Keep fewer weights in a group.")
        if self.warmup + self.ramp + self.settle > 1 + 1e-9:
            total = self.warmup + self.ramp + self.settle
            raise ParamError(f"warmup, ramp and settle of pdp must be at most 1 in all; got {total:g}. Shorten one.")
        return _Channels(self, ctx) if self.form == "channel" else _Soft(self, ctx)

    @phase("shrink")
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        if self.form != "channel" or self.sparsity == 0:
            return model
        with refusing():
            structure, inputs = traced_on(model, ctx.train, ctx.device)
            cut_or_refuse(model, inputs, structure, zeroed_groups(model, structure))
        return model


def _grown(p: PDP, at: Moment) -> float:
    return min(1.0, max(0.0, at.progress - p.warmup) / p.ramp)


class _Channels(Hook):
    """One soft mask for every group of channels, over all that makes it: kernels, biases, norms."""

    def __init__(self, p: PDP, ctx: Context) -> None:
        self.p, self.ctx = p, ctx
        self.gone = torch.zeros(0, dtype=torch.bool)  # at the end

    def start(self, at: Moment) -> None:
        if not self.p.sparsity:
            return
        with refusing():
            self.structure, _ = traced_on(at.model, self.ctx.train, self.ctx.device)
        axes = {str(i): members for i, members in enumerate(axes_of(self.structure))}
        sizes = {n: len(members) for n, members in axes.items()}
        shares = even_shares(sizes, self.p.sparsity, {n: 1 - 1 / size for n, size in sizes.items()})
        self.axes = [(members, shares[n]) for n, members in axes.items()]

    @phase("mask")
    def around_forward(self, at: Moment) -> AbstractContextManager[None]:
        grown = _grown(self.p, at)
        if self.p.sparsity == 0 or len(self.gone) or not grown:
            return swapped(at.model, {})
        squares = group_squares(self.structure, dict(at.model.named_parameters()))
        mask = group_masks(squares, [(members, share * grown) for members, share in self.axes], self.p.softness)

        def masking(side: Side) -> Callable[[Tensor], Tensor]:
            return lambda w: w * spread_over(self.structure, mask, side, w)

        # An axis at a time: a weight may make channels on two of them, and swaps nest.
        stack = ExitStack()
        for dim in sorted({side.dim for side in self.structure.makers()}):
            sides = [side for side in self.structure.makers() if side.dim == dim]
            stack.enter_context(swapped(at.model, {side.name: masking(side) for side in sides}))
        return stack

    @phase("mask")
    def stepped(self, at: Moment) -> None:
        if self.p.sparsity and at.progress >= 1 - self.p.settle:
            self._harden(at)

    @torch.no_grad()
    def end(self, at: Moment) -> None:
        if self.p.sparsity:
            self._harden(at)
        self.ctx.shelf.put(MASKS, {})  # what is cut has no mask

    def _harden(self, at: Moment) -> None:
        if not len(self.gone):
            square = group_squares(self.structure, {n: p.detach() for n, p in at.model.named_parameters()})
            kept = torch.zeros(self.structure.count, dtype=torch.bool)
            for members, share in self.axes:
                kept[members] = largest(square[members].cpu(), keep_count(len(members), 1 - share))
            self.gone = ~kept
        zero_groups(at.model, self.structure, self.gone)


class _Soft(Hook):
    def __init__(self, p: PDP, ctx: Context) -> None:
        self.p, self.ctx = p, ctx
        self.shares: dict[str, float] = {}  # layer -> share that ends at zero
        self.masks: dict[str, Tensor] = {}  # hard ones, at the end
        self.cuts: dict[str, tuple[object, Tensor, Tensor]] = {}  # layer -> made for, t^2, tau

    def epoch(self, at: Moment) -> None:
        """Tell the log how sparse the fit is, and how many weights the mask has not decided (2 to 3% is right)."""
        grown = _grown(self.p, at)
        if not self.shares or self.masks or not grown:
            return
        masks = [self._mask(n, w.detach(), s * grown, at) for n, w in at.weights() if (s := self.shares.get(n, 0.0))]
        open_ = sum(int(((m > 0.05) & (m < 0.95)).sum()) for m in masks) / max(1, sum(m.numel() for m in masks))
        self.ctx.log(kind="pdp", sparsity=self.p.sparsity * grown, undecided=open_)

    @phase("mask")
    def around_forward(self, at: Moment) -> AbstractContextManager[None]:
        if self.p.sparsity == 0 or self.masks or at.progress < self.p.warmup:
            return swapped(at.model, {})
        if not self.shares:
            self._allot(at)
        grown = _grown(self.p, at)

        def masking(name: str, share: float) -> Callable[[Tensor], Tensor]:
            return lambda w: w * self._mask(name, w, share, at)

        return swapped(at.model, {n: masking(n, s * grown) for n, s in self.shares.items() if s * grown})

    @phase("mask")
    def stepped(self, at: Moment) -> None:
        if self.p.sparsity and not self.masks and self.shares and at.progress >= 1 - self.p.settle:
            self._harden(at)
        for name, w in at.weights():
            if name in self.masks:
                zero_where(w, self.masks[name])

    @torch.no_grad()
    def end(self, at: Moment) -> None:
        if self.p.sparsity and not self.masks:
            if not self.shares:
                self._allot(at)
            self._harden(at)
            for name, w in at.weights():
                if name in self.masks:
                    zero_where(w, self.masks[name])
        self.ctx.shelf.put(MASKS, self.masks)

    def _allot(self, at: Moment) -> None:
        weights = dict(at.weights())
        if self.p.form == "nm":
            self.shares = {n: 1 - self.p.n / self.p.m for n, w in weights.items() if w.shape[1] % self.p.m == 0}
            return
        scores = {n: w.detach().abs() for n, w in weights.items()}
        ceiling = layer_ceilings({n: s.numel() for n, s in scores.items()}, self.p.head_keep)
        self.shares = global_shares(scores, self.p.sparsity, ceiling)

    def _mask(self, name: str, weight: Tensor, share: float, at: Moment) -> Tensor:
        """The soft mask of `weight`; t is found again only when the weight has changed."""
        state = (id(weight), weight._version, at.step, share)
        made = self.cuts.get(name)
        # Only a parameter lives as long as its id: what another technique swapped in is ranked every time.
        if made is None or made[0] != state or not isinstance(weight, nn.Parameter):
            t = boundary(ranked(weight, self.p.form, self.p.m), share)
            square = t * t
            tau = self.p.softness * square.mean().clamp_min(1e-12)
            self.cuts[name] = made = (state, spread(square, weight, self.p.form), tau)
        return soft_mask(weight * weight, made[1], made[2])

    def _harden(self, at: Moment) -> None:
        # By rank and not by m >= 1/2: the same set, but ties and rounding cannot change the count.
        for name, w in at.weights():
            share = self.shares.get(name, 0.0)
            if share:
                scores = ranked(w, self.p.form, self.p.m)
                kept = largest(scores, keep_count(scores.shape[-1], 1 - share)).to(w.dtype)
                self.masks[name] = spread(kept, w, self.p.form).expand_as(w).clone()
