"""Technique `otov2`: train groups of channels to exact zero that can be cut out without changing the function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError, refusing
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.ops.channels import Structure, choose, spread_over, totals, traced_on
from cupel.ops.cutting import cut_or_refuse, zeroed_groups

CARD = Card(
    name="otov2",
    family="compress",
    source="T. Chen, L. Liang, T. Ding, Z. Zhu, I. Zharkov, OTOv2: Automatic, Generic, User-Friendly, ICLR 2023, "
    "arXiv 2303.06862, algorithms 2 and 3",
    tags=("pruning", "structured", "channels", "optimiser"),
    needs=("weights", "gradients", "blocks"),
    tiny={"sparsity": 0.3, "start": 0.1},
    neutral={"sparsity": 0.0},
)
TINY = 1e-12


def redundancy(dot: Tensor, norm: Tensor, grad_norm: Tensor, size: Tensor) -> Tensor:
    """Score of each group, higher where it matters less: half angle, half smallness, each over its largest value.

    The angle is that between -x and -grad: a group whose gradient step shrinks it anyway costs little. All `[groups]`;
    `size` is the number of entries.
    """
    angle = dot / (norm * grad_norm + TINY)
    small = 1 / (norm / size + 1e-6)
    return 0.5 * angle / angle.abs().amax().clamp_min(TINY) + 0.5 * small / small.amax()


def pull(dot: Tensor, norm: Tensor, grad_norm: Tensor, base: float, most: float) -> Tensor:
    """The penalty of each group: `base`, and more where the gradient step would make the group grow.

    There twice the least that still shrinks it, up to `most` times `base`, and never so much that the step no longer
    goes down: from `upper` on, the middle between the two limits.
    """
    grows = dot < 0
    against = (-dot).clamp_min(TINY)
    lower = against / norm.clamp_min(TINY)
    upper = grad_norm.square() * norm / against
    stronger = (2 * lower).clamp(base, base * most)
    stronger = torch.where(stronger >= upper, (lower + upper) / 2, stronger)
    return torch.where(grows, stronger, torch.full_like(dot, base))


@dataclass(frozen=True)
class OTOv2:
    r"""Train once: a chosen share of channel groups ends at exact zero, and the network is cut to what is left.

    Groups are the channels that must go together through the whole traced network, with their biases and norms (zero
    invariant: all entries zero means no contribution). At `start` the most redundant are chosen once. Each of them is
    then pulled to zero beside the update rule, x' = x^ - lr lambda x / |x|, and set to zero when x' leaves the half
    space of x, <x', x> < `half_space` |x|^2; it stays zero. When the share is reached, the pull ends. The sealed
    network has the channels cut out and the same outputs.

    Use: when latency and size must really fall on any hardware and the network is trained anyway; for a share of at
    most about 0.7 of the channels. To keep the most accuracy at a given number of weights, prune without structure.

    Costs: one copy of the weights and about a tenth more time a step in training; nothing afterwards. Weights and
    operations fall roughly with the square of the channels kept.

    Shapes: any network that torch.export can trace on a batch of two; inputs and outputs keep theirs.

    Raises:
        PlanError: the forward cannot be traced, holds its sizes as plain numbers, has no group that can go, or there
            are no data to trace it on.

    Source: Chen et al., ICLR 2023, arXiv 2303.06862.

    Departs: with `penalty` 0, lambda follows from the step budget, renewed every epoch: what brings twice the median
    norm of the groups left to zero by `stop`. A fixed lambda, the paper's, does nothing in short fits, and a note says
    so when sum(lr lambda) is short. Gradients of one batch choose the groups. Whole attention heads are one group, and
    a layer norm over an axis that was cut keeps its divisor (`NarrowLayerNorm`), so that transformers stay exact too.

    Example:
        >>> OTOv2(sparsity=0.7).half_space
        0.95
    """

    sparsity: float = param(0.5, "share of groups of channels that are cut", ge=0, lt=1)
    start: float = param(0.15, "share of the fit before groups are chosen", ge=0, lt=1)
    stop: float = param(0.6, "share of the fit by which they shall be zero (with penalty 0)", gt=0, le=1)
    penalty: float = param(0.0, "lambda of the pull; 0: from the step budget", ge=0)
    most: float = param(10.0, "largest multiple of lambda for groups that grow", ge=1)
    half_space: float = param(0.95, "share of its norm below which a step sets a group to zero", ge=0, lt=1)

    def hook(self, ctx: Context) -> Hook:
        return _Pull(self, ctx)

    @phase("shrink")
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        if self.sparsity == 0:
            return model
        structure, inputs = traced(model, ctx)
        gone = choose(structure, (~zeroed_groups(model, structure)).float(), structure.count)
        gone &= zeroed_groups(model, structure)
        with refusing():
            cut_or_refuse(model, inputs, structure, gone)
        share = float(gone.float().mean())
        ctx.log(kind="note", text=f"{int(gone.sum())} of {structure.count} groups of channels ({share:.0%}) are cut")
        return model


def traced(model: nn.Module, ctx: Context) -> tuple[Structure, object]:
    """The groups of `model`, and the inputs it was traced on."""
    with refusing():
        structure, inputs = traced_on(model, ctx.train, ctx.device)
    if not structure.count:
        raise PlanError(
            "a network for otov2 must have channels between its inputs and its outputs; none of this one's can go. "
            "Prune it without structure."
        )
    return structure, inputs


class _Pull(Hook):
    def __init__(self, p: OTOv2, ctx: Context) -> None:
        self.p, self.ctx = p, ctx
        self.before: dict[str, Tensor] = {}  # weights as the last step left them
        self.grads_seen: dict[str, Tensor] = {}
        self.chosen = self.zero = torch.zeros(0, dtype=torch.bool)
        self.weight, self.spent = p.penalty, 0.0  # lambda, and the sum of lr * lambda so far

    def start(self, at: Moment) -> None:
        if self.p.sparsity == 0:
            return
        self.structure, _ = traced(at.model, self.ctx)
        self.sizes = totals(self.structure, {n: torch.ones_like(p) for n, p in self._makers(at).items()})
        self.zero = torch.zeros(self.structure.count, dtype=torch.bool)
        self._remember(at)

    def epoch(self, at: Moment) -> None:
        if len(self.chosen):
            self._budget(at)
            share = float(self.zero.float().mean())
            self.ctx.log(kind="otov2", sparsity=share, penalty=self.weight)

    @phase("mask")
    def grads(self, grads: Mapping[str, Tensor], at: Moment) -> dict[str, Tensor]:
        kept = dict(grads)
        if not len(self.zero):
            return kept
        self.grads_seen = {n: g for n, g in kept.items() if n in self.before}
        if bool(self.zero.any()):
            for side in self.structure.makers():
                if side.name in kept:
                    g = kept[side.name]
                    kept[side.name] = g * spread_over(self.structure, (~self.zero).to(g), side, g)
        return kept

    @phase("project")
    def stepped(self, at: Moment) -> None:
        if not len(self.zero):
            return
        if not len(self.chosen) and at.progress >= self.p.start:
            self._choose(at)
        enough = int(self.zero.sum()) >= round(self.p.sparsity * self.structure.count)
        if len(self.chosen) and not enough:
            self._shrink(at)
        self._hold(at)
        self._remember(at)

    def end(self, at: Moment) -> None:
        wanted, reached = round(self.p.sparsity * len(self.zero)), int(self.zero.sum())
        if reached < wanted:
            self.ctx.log(
                kind="note",
                text=f"{reached} of {wanted} groups of channels reached zero: sum(lr * lambda) was {self.spent:.2g}, "
                f"and the groups left are {self._median(at):.2g} long. Train longer, or raise penalty",
            )

    def _choose(self, at: Moment) -> None:
        dot, norm, grad_norm = self._products()
        score = redundancy(dot, norm, grad_norm, self.sizes)
        most = round(min(self.p.sparsity + 0.05, 0.999) * self.structure.count)
        self.chosen = choose(self.structure, -score.cpu(), most)
        self._budget(at)

    def _shrink(self, at: Moment) -> None:
        """The pull, and the projection onto the half space, of all chosen groups at once."""
        dot, norm, grad_norm = self._products()
        strength = pull(dot, norm, grad_norm, self.weight, self.p.most)
        pulled = (self.chosen & ~self.zero).to(norm.device)
        share = torch.where(pulled, at.lr * strength / norm.clamp_min(TINY), torch.zeros_like(norm))
        now = self._makers(at)
        for side in self.structure.makers():
            if side.name in now:
                p, x = now[side.name], self.before[side.name]
                p.sub_(spread_over(self.structure, share, side, p, 0.0) * x)
        inner = totals(self.structure, {n: p * self.before[n] for n, p in now.items()})
        self.zero |= (pulled & (inner < self.p.half_space * norm.square())).cpu()
        self.spent += at.lr * self.weight

    def _hold(self, at: Moment) -> None:
        if bool(self.zero.any()):
            now = self._makers(at)
            for side in self.structure.makers():
                if side.name in now:
                    p = now[side.name]
                    p.mul_(spread_over(self.structure, (~self.zero).to(p), side, p))

    def _makers(self, at: Moment) -> dict[str, Tensor]:
        state = {n: p.detach() for n, p in at.model.named_parameters() if p.requires_grad}
        return {side.name: state[side.name] for side in self.structure.makers() if side.name in state}

    def _remember(self, at: Moment) -> None:
        self.before = {n: p.clone() for n, p in self._makers(at).items()}

    def _products(self) -> tuple[Tensor, Tensor, Tensor]:
        """<x, grad>, |x| and |grad| of every group."""
        seen = {n: self.grads_seen.get(n, torch.zeros_like(x)) for n, x in self.before.items()}
        dot = totals(self.structure, {n: x * seen[n] for n, x in self.before.items()})
        norm = totals(self.structure, {n: x.square() for n, x in self.before.items()}).sqrt()
        return dot, norm, totals(self.structure, {n: g.square() for n, g in seen.items()}).sqrt()

    def _median(self, at: Moment) -> float:
        left = self.chosen & ~self.zero if len(self.chosen) else ~self.zero
        norm = totals(self.structure, {n: p.square() for n, p in self._makers(at).items()}).sqrt().cpu()
        return float(norm[left].median()) if bool(left.any()) else 0.0

    def _budget(self, at: Moment) -> None:
        """Lambda from the steps left until `stop`."""
        if not self.p.penalty:
            steps = max(self.p.stop - at.progress, 0.05) * at.steps
            self.weight = 2 * self._median(at) / (steps * at.lr) if at.lr else 0.0
