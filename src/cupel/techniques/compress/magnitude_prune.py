"""Technique `magnitude-prune`: zero the smallest weights, at once or along a cubic ramp."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import ParamError
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import MASKS
from cupel.core.slots import phase
from cupel.ops.masks import even_shares, global_shares, keep_largest, layer_ceilings, zero_where
from cupel.ops.swap import swapped

CARD = Card(
    name="magnitude-prune",
    family="compress",
    source="M. Zhu, S. Gupta, To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression, "
    "2017, arXiv 1710.01878, equation 1; one-shot: S. Han et al., NeurIPS 2015, arXiv 1506.02626",
    tags=("pruning", "sparsity", "baseline"),
    needs=("weights", "gradients"),
    writes=("masks",),
    tiny={"sparsity": 0.5},
    neutral={"sparsity": 0.0},
)


def cubic_ramp(sparsity: float, done: float) -> float:
    """Sparsity after a share `done` of the ramp: s (1 - (1 - done)^3), fast first and slow at the end.

    >>> cubic_ramp(1.0, 0.0), cubic_ramp(1.0, 0.5), cubic_ramp(1.0, 1.0)
    (0.0, 0.875, 1.0)
    """
    return sparsity * (1 - (1 - min(1.0, max(0.0, done))) ** 3)


def straight_through(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight * mask` in the forward, the identity in the backward: masked weights go on learning."""
    return weight + (weight * mask - weight).detach()


@dataclass(frozen=True)
class MagnitudePrune:
    r"""Zero the smallest weights during training, all at once or a growing share of them.

    After a share `start` of the fit the sparsity rises as s_f (1 - (1 - u)^3), u going from 0 to 1 over
    `ramp` of the fit; `ramp=0` prunes once. Pruned weights stay zero from then on; with `regrow` they are
    masked in the forward only, go on learning through it, and may come back until the fit ends.

    Use: first, and as the baseline of every other pruner; with `regrow` it is hard to beat.

    Costs: one selection a step in training; afterwards zeros that shrink the file, and no time.

    Shapes: weights `[out, in, ...]`; biases and norms stay dense.

    Raises:
        ParamError: a value outside its range, or `allot` after `start`.

    Source: Zhu and Gupta 2017, arXiv 1710.01878, equation 1 with s_i = 0. One-shot: Han, Pool, Tran,
    Dally, NeurIPS 2015. `regrow`: the straight-through estimate of Bengio et al. 2013, arXiv 1308.3432.

    Departs: the schedule is in shares of the fit and moves at every step, where the paper updates every
    100 to 1000 steps; without `regrow` pruned weights are zeroed, where the paper hides their last value;
    the output layer keeps `head_keep` of its weights, and a ranking over all layers is the default.

    Example:
        >>> MagnitudePrune(sparsity=0.8, start=0.0, ramp=0.0).scope
        'global'
    """

    sparsity: float = param(0.9, "share of weights that end at zero, over all layers", ge=0, lt=1)
    start: float = param(0.1, "share of the fit before pruning starts", ge=0, le=1)
    ramp: float = param(0.5, "share of the fit over which the sparsity grows (0: at once)", ge=0, le=1)
    scope: str = param("global", "one ranking over all layers, or one share for each", choices=("global", "layer"))
    head_keep: float = param(0.1, "least share of the output layer's weights that stays", ge=0, le=1)
    regrow: bool = param(False, "masked weights go on learning and may come back")
    allot: float | None = param(None, "share of the fit after which the layers' shares are fixed (none: start)", ge=0)

    def hook(self, ctx: Context) -> Hook:
        if self.allot is not None and self.allot > self.start:
            raise ParamError(
                f"allot of magnitude-prune must be at most start, {self.start:g}; got {self.allot:g}. "
                "Lower allot, or leave it out."
            )
        return _Prune(self, ctx)


class _Prune(Hook):
    def __init__(self, p: MagnitudePrune, ctx: Context) -> None:
        self.p, self.shelf = p, ctx.shelf
        self.shares: dict[str, float] = {}  # layer -> share that ends at zero
        self.masks: dict[str, Tensor] = {}
        self.done = -1.0

    @torch.no_grad()
    def start(self, at: Moment) -> None:
        self._prune(at, at.progress)

    @phase("mask")
    def around_forward(self, at: Moment) -> AbstractContextManager[None]:
        def hiding(mask: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda w: straight_through(w, mask)

        shown = self.masks if self.p.regrow else {}
        return swapped(at.model, {name: hiding(mask) for name, mask in shown.items()})

    @phase("mask")
    def stepped(self, at: Moment) -> None:
        self._prune(at, at.progress)

    @torch.no_grad()
    def end(self, at: Moment) -> None:
        self._prune(at, self.p.start + self.p.ramp)  # what the ramp did not reach is cut here
        for name, w in at.weights():
            if name in self.masks:
                zero_where(w, self.masks[name])
        self.shelf.put(MASKS, self.masks)

    def _prune(self, at: Moment, progress: float) -> None:
        p = self.p
        if not self.shares and progress >= (p.start if p.allot is None else p.allot):
            self._fix_shares(at)
        if progress < p.start:
            return
        done = 1.0 if p.ramp == 0 else min(1.0, (progress - p.start) / p.ramp)
        renew, self.done = p.regrow or done > self.done, max(done, self.done)
        for name, w in at.weights():
            share = cubic_ramp(self.shares.get(name, 0.0), self.done)
            if renew and share:
                self.masks[name] = keep_largest(w, 1 - share)
            if name in self.masks and not p.regrow:
                zero_where(w, self.masks[name])

    def _fix_shares(self, at: Moment) -> None:
        scores = {name: w.detach().abs() for name, w in at.weights()}
        sizes = {name: s.numel() for name, s in scores.items()}
        ceiling = layer_ceilings(sizes, self.p.head_keep)
        if self.p.scope == "layer":
            self.shares = even_shares(sizes, self.p.sparsity, ceiling)
        else:
            self.shares = global_shares(scores, self.p.sparsity, ceiling)
