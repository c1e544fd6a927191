"""Technique `jacobian-ensembles`: several networks with small input Jacobians, averaged, against universal shifts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.fit import Named, run_fit
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.core.types import Batch, Subject
from cupel.ops.redraw import redraw

CARD = Card(
    name="jacobian-ensembles",
    family="robust",
    source="K. T. Co, D. Martinez-Rego, Z. Hau, E. C. Lupu, Jacobian Ensembles Improve Robustness Trade-offs to "
    "Adversarial Attacks, 2022, arXiv 2204.08726; J. Hoffman, D. A. Roberts, S. Yaida, Robust Learning with Jacobian "
    "Regularization, 2019, arXiv 1908.02729",
    tags=("robustness", "ensemble", "jacobian", "double backward", "universal perturbation"),
    needs=("weights", "gradients", "classes", "bounded"),
    tiny={"members": 2, "epochs": 1},
    neutral={"members": 0},
)


def projected_jacobian(out: Tensor, inputs: Tensor, directions: Tensor) -> Tensor:
    """C ||d(v . z) / dx||^2 of every row: its mean over v on the unit sphere is ||J||_F^2.

    Args:
        out: logits z `[B, C]`, computed from `inputs`.
        inputs: `[B, ...]`, requiring a gradient.
        directions: v `[B, C]`, unit length.

    Returns:
        `[B]`, differentiable once more.

    Source: Hoffman, Roberts, Yaida 2019, arXiv 1908.02729, equation 9 and algorithm 1.
    """
    (slope,) = torch.autograd.grad((out * directions).sum(), inputs, create_graph=True)
    squares: Tensor = slope.reshape(len(slope), -1).square().sum(1)
    return out.shape[1] * squares


def on_sphere(like: Tensor, draw: torch.Generator) -> Tensor:
    """A uniform direction for every row of `like` `[B, C]`."""
    v = torch.randn(like.shape, generator=draw)
    found: Tensor = (v / v.norm(dim=1, keepdim=True).clamp_min(1e-12)).to(like)
    return found


class Ensemble(nn.Module):
    """log of the mean of the members' softmaxes: `[B, ...]` -> `[B, C]`, differentiable through every member.

    >>> Ensemble([nn.Identity(), nn.Identity()])(torch.zeros(1, 2)).exp()
    tensor([[0.5000, 0.5000]])
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        said = torch.stack([member(x).log_softmax(-1) for member in self.members])  # [N, B, C]
        return said.logsumexp(0) - torch.log(torch.tensor(float(len(said)), dtype=said.dtype, device=said.device))


@dataclass(frozen=True)
class JacobianEnsembles:
    r"""Train `members` networks with a penalty on their input Jacobians, and answer with the mean of their softmaxes.

    Each member minimises CE(z(x), y) + (weight / 2) ||dz/dx||_F^2 with ||J||_F^2 ~ C ||d(v . z)/dx||^2 for one
    direction v, uniform on the unit sphere of R^C, an example and step. The network that remains says
    log mean_n softmax(z_n(x)): attacks that follow its gradient follow all members. A shift d that all inputs share
    moves the logits by about J_i d, so its effect is bounded by the stacked Jacobians, which the penalty keeps small;
    what is left of it differs from member to member.

    Use: against universal shifts (one sticker, one filter for all inputs), at a smaller cost in accuracy than the
    penalty alone has. Against attacks on each input `adversarial-training` does far more.

    Costs: `members` fits, each step about three times a plain one for the second backward; `members` times the bytes
    and the time at inference.

    Shapes: inputs `[B, ...]` floats; logits `[B, C]`; the result's outputs are logarithms of probabilities.

    Raises:
        ParamError: a value outside its range.

    Source: Co, Martinez-Rego, Hau, Lupu 2022, arXiv 2204.08726; penalty: Hoffman, Roberts, Yaida 2019, arXiv
    1908.02729.

    Departs: none that we know of in the method; the paper's text leaves open how the Jacobian is estimated, and its
    penalty's reference is followed. Members start from fresh first weights also where the network was trained before;
    what no layer's `reset_parameters` draws anew (a class token, positions) they begin with in common.

    Example:
        >>> JacobianEnsembles(weight=0.05).members
        3
    """

    members: int = param(3, "networks in the ensemble; 0 leaves the network as it is", ge=0, le=64)
    weight: float = param(0.01, "of the penalty on the Jacobian; 0: a plain ensemble", ge=0)
    epochs: int = param(0, "of every member (0: the workload's)", ge=0)

    def procedure(self, subject: Subject, ctx: Context) -> nn.Module:
        if not self.members:
            return subject.model
        budget = replace(subject.budget, epochs=self.epochs or subject.budget.epochs)
        made = []
        for k in range(self.members):
            own = ctx.child(f"member-{k}")
            penalty = Named("jacobian", _Flat(self.weight), own.child("jacobian"))
            net = fresh_like(subject.model, own)
            made.append(run_fit(net, subject.data.view(), subject.task, budget, [penalty], own))
        return Ensemble(made)


def fresh_like(model: nn.Module, ctx: Context) -> nn.Module:
    """A copy of `model` with first weights of its own."""
    net = copy.deepcopy(model)
    with ctx.scope("init"):
        redraw(net)
    return net


@dataclass(frozen=True)
class _Flat:
    """The penalty in a fit."""

    weight: float

    def hook(self, ctx: Context) -> Hook:
        return _Penalty(self.weight, ctx)


class _Penalty(Hook):
    def __init__(self, weight: float, ctx: Context) -> None:
        self.weight, self.draw = weight, ctx.rng("directions")

    @phase("attack")
    def batch(self, batch: Batch, at: Moment) -> Batch:
        return replace(batch, inputs=batch.inputs.detach().requires_grad_(True)) if self.weight else batch

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        if not self.weight:
            return loss
        directions = at.draw(out, lambda like: on_sphere(like, self.draw))
        return loss + self.weight / 2 * projected_jacobian(out, batch.inputs, directions).mean()
