"""Technique `subnetwork-inference`: honest confidences from a posterior over the few weights that know least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.slots import phase
from cupel.core.types import Batch, Dataset, still
from cupel.ops.jacobians import Numbering, parameter_jacobians
from cupel.ops.laplace import (
    class_roots,
    function_covariance,
    ggn,
    ggn_diagonal,
    log_evidence,
    precision_factor,
    predictive,
)

CARD = Card(
    name="subnetwork-inference",
    family="robust",
    source="E. Daxberger, E. Nalisnick, J. Allingham, J. Antoran, J. M. Hernandez-Lobato, Bayesian Deep Learning via "
    "Subnetwork Inference, ICML 2021, arXiv 2010.14689",
    tags=("uncertainty", "calibration", "laplace", "bayesian", "post hoc", "shift"),
    needs=("weights", "gradients", "classes"),
    removes=("weights", "blocks", "batchnorm", "attention"),
    tiny={"size": 40, "examples": 48},
)
NO_WEIGHT = "a network for subnetwork-inference must have a trained weight to choose; it has none. Leave it out."
GRID = tuple(10 ** (k / 4) for k in range(-16, 17))  # prior precisions that are tried
MOST = 20_000  # weights in a full covariance: 3.2 GB in double precision
VALID_BYTES = 2**29  # of Jacobians on the validation split, which is used as far as they reach


class Linearised(nn.Module):
    """A network with a Gaussian posterior over some of its weights, predicting as its linearisation does.

    Args:
        chosen: rising numbers of weights `[S]` within `numbering`.
        factor: of the posterior precision, `[S, S]` or `[S]`.
        noise: draws `[T, K]` for sampled predictions; empty for the probit formula.
    """

    chosen: Tensor
    factor: Tensor
    noise: Tensor

    def __init__(self, net: nn.Module, numbering: Numbering, chosen: Tensor, factor: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.net, self.numbering = net, numbering
        self.register_buffer("chosen", chosen.to(torch.int32))
        self.register_buffer("factor", factor)
        self.register_buffer("noise", noise)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            raise PlanError(
                "a network of subnetwork-inference must be in evaluation mode, for its posterior belongs to the "
                "weights it has; it is in training mode. Train first, and apply subnetwork-inference last."
            )
        draws = self.noise if len(self.noise) else None
        chunks = parameter_jacobians(self.net, inputs, self.numbering, self.chosen.long())
        made = [predictive(f, function_covariance(j, self.factor), draws) for f, j in chunks]
        out: Tensor = torch.cat(made) if made else self.net(inputs)
        return out


@dataclass(frozen=True)
class SubnetworkInference:
    r"""Put a full-covariance posterior on the weights of largest marginal variance and predict with its mean.

    1. h_d = sum_n (J_n^T Lambda_n J_n)_dd over the training data with Lambda = diag(p) - p p^T; the marginal variance
       of weight d is 1 / (h_d + lambda), so the S weights of smallest h_d are the subnetwork.
    2. P = sum_n J_nS^T Lambda_n J_nS + lambda I over them, with its Cholesky factor.
    3. V(x) = J_S(x) P^-1 J_S(x)^T, and scores f(x) / sqrt(1 + pi/8 diag V(x)), or the mean softmax over samples of
       N(f(x), V(x)): the network is linearised, never run with sampled weights.
    lambda is the smallest of 33 values whose log loss on the validation split is within `leeway` of the best, or the
    one of the largest evidence.

    Use: when confidences must fall where inputs leave the training data, on a trained network that cannot be trained
    again. For small errors of calibration on clean data a temperature is enough.

    Costs: K backward passes an example at inference, S^2 / 2 numbers beside the weights, no training; two passes over
    the training data with Jacobians, S^3 / 3 operations for every lambda tried.

    Shapes: inputs `[B, ...]`, logits `[B, K]` -> scores `[B, K]`.

    Raises:
        PlanError: no training or validation data, outputs that are no scores of classes, too large a subnetwork,
            or the network trained on afterwards.

    Source: Daxberger, Nalisnick, Allingham, Antoran, Hernandez-Lobato, ICML 2021, arXiv 2010.14689, sections 3 to 5.

    Departs: weights with h_d = 0 (of dead units, and of inputs that are zero in all training data) have the largest
    variance of all and would fill the subnetwork; they are left out unless `silent`. So are weights of matrices that
    are exactly zero, which pruning has taken. The diagonal is exact on networks of every size, where the paper takes
    SWAG's for large ones. lambda by validation is the widest prior within `leeway` of the best log loss, which is
    nearly flat in lambda on clean data.

    Example:
        >>> SubnetworkInference(size=200).choice
        'variance'
    """

    size: int = param(600, "weights in the subnetwork (S); fewer where there are no more", ge=1)
    choice: str = param(
        "variance", "which weights: of largest variance, drawn, or a set", choices=("variance", "random", "last", "all")
    )
    silent: bool = param(False, "also take weights without any gradient on the training data")
    covariance: str = param("full", "of the posterior over the chosen weights", choices=("full", "diagonal"))
    precision: float | None = param(None, "of the prior (lambda); found if not given", gt=0)
    tune: str = param("validation", "what finds the precision", choices=("validation", "evidence"))
    leeway: float = param(0.005, "log loss on the validation split given away for a wider prior", ge=0, unit="nats")
    samples: int = param(0, "logits drawn for a prediction; 0: the probit formula", ge=0)
    examples: int = param(0, "training examples for the curvature, scaled up to all (0: all)", ge=0)

    @phase("wrap")
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        if ctx.train is None or not len(ctx.train.train) or not len(ctx.train.valid):
            raise PlanError(
                "subnetwork-inference must have training and validation data; it has not. Run it in a recipe or with "
                "`apply`."
            )
        numbering = Numbering.of(model)
        with still(model), torch.no_grad():
            return _Maker(self, model, numbering, ctx, _batches(ctx.train.train, self.examples, ctx)).made().eval()


@dataclass
class _Maker:
    """One network on its way to a posterior."""

    p: SubnetworkInference
    model: nn.Module
    numbering: Numbering
    ctx: Context
    batches: Sequence[Batch]

    def __post_init__(self) -> None:
        assert self.ctx.train is not None
        self.scale = len(self.ctx.train.train) / sum(len(b) for b in self.batches)

    def made(self) -> Linearised:
        out = self.model(self.batches[0].inputs)
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] < 2:
            raise PlanError(
                "outputs for subnetwork-inference must be one score for each class, [B, K]; they are not. Use it where "
                "inputs are classified."
            )
        if not self.numbering.total:
            raise PlanError(NO_WEIGHT)
        chosen, loss = self.chosen()
        curvature = self.curvature(chosen)
        noise = torch.randn(self.p.samples, out.shape[1], generator=self.ctx.rng("samples"), dtype=out.dtype)
        noise = noise.to(out.device)
        precision = self.p.precision or self.found(chosen, curvature, noise, -loss)
        self.ctx.log(kind="note", text=f"{len(chosen)} weights with a posterior, prior precision {precision:.4g}")
        factor = precision_factor(curvature, precision).to(out.dtype)
        return Linearised(self.model, self.numbering, chosen, factor, noise)

    def chunks(self, data: Iterator[Batch] | Sequence[Batch], chosen: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data:
            yield from parameter_jacobians(self.model, batch.inputs, self.numbering, chosen)

    def chosen(self) -> tuple[Tensor, float]:
        """Rising numbers of the subnetwork's weights, and the log loss summed over the training data."""
        device = self.batches[0].targets.device
        diagonal = torch.zeros(self.numbering.total, dtype=torch.float64, device=device)
        loss = sum(float(F.cross_entropy(self.model(b.inputs), b.targets, reduction="sum")) for b in self.batches)
        for logits, jacobian in self.chunks(self.batches, None):
            diagonal += ggn_diagonal(jacobian, class_roots(logits))
        own = dict(self.model.named_parameters())
        pruned = self.numbering.flat({n: (own[n] == 0) & (own[n].ndim > 1) for n in self.numbering.shapes})
        able = ~pruned & (diagonal > (-1 if self.p.silent else 0))
        if self.p.choice == "last":
            able &= self.last()
        rows = able.nonzero().flatten()
        if not len(rows):
            raise PlanError(NO_WEIGHT)
        if self.p.choice == "variance":
            rows = rows[diagonal[rows].argsort(stable=True)][: self.p.size]
        elif self.p.choice == "random":
            rows = rows[torch.randperm(len(rows), generator=self.ctx.rng("subnetwork")).to(device)][: self.p.size]
        if len(rows) > MOST and self.p.covariance == "full":
            raise PlanError(f"a full covariance must have at most {MOST} weights; got {len(rows)}. Lower size.")
        return rows.sort().values, loss * self.scale

    def last(self) -> Tensor:
        """Which numbers belong to the last linear layer, `[D]` bool."""
        name = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)][-1:]
        within = {n: any(n.startswith(f"{layer}.") for layer in name) for n in self.numbering.shapes}
        own = dict(self.model.named_parameters())
        return self.numbering.flat({n: torch.full_like(own[n], yes, dtype=torch.bool) for n, yes in within.items()})

    def curvature(self, chosen: Tensor) -> Tensor:
        """The Gauss-Newton matrix of the subnetwork `[S, S]`, or its diagonal `[S]`."""
        summed = ggn if self.p.covariance == "full" else ggn_diagonal
        parts = (summed(j, class_roots(f)) for f, j in self.chunks(self.batches, chosen))
        total = next(parts)
        for part in parts:
            total += part
        return total * self.scale

    def found(self, chosen: Tensor, curvature: Tensor, noise: Tensor, fit: float) -> float:
        """The prior precision that `tune` asks for."""
        if self.p.tune == "evidence":
            own = dict(self.model.named_parameters())
            weights = self.numbering.flat({n: own[n] for n in self.numbering.shapes})[chosen]
            scores = {v: log_evidence(fit, weights, precision_factor(curvature, v), v) for v in GRID}
            return max(scores, key=lambda v: scores[v])
        assert self.ctx.train is not None
        data = [b.to(curvature.device) for b in self.ctx.train.valid.batches(500)]
        outputs, seen = [], []
        for logits, jacobian in self.chunks(data, chosen):
            outputs.append(logits)
            seen.append(jacobian)
            if sum(j.numel() * j.element_size() for j in seen) > VALID_BYTES:
                break
        logits = torch.cat(outputs)
        targets = torch.cat([b.targets for b in data])[: len(logits)]
        losses = {}
        for value in GRID:
            factor = precision_factor(curvature, value).to(logits.dtype)
            covariance = torch.cat([function_covariance(j, factor) for j in seen])
            out = predictive(logits, covariance, noise if len(noise) else None)
            losses[value] = float(F.cross_entropy(out, targets))
        most = min(losses.values()) + self.p.leeway
        return min(v for v in GRID if losses[v] <= most)


def _batches(data: Dataset, examples: int, ctx: Context) -> list[Batch]:
    """Training batches on the device: all of them, or one of `examples` drawn ones."""
    if examples and examples < len(data):
        return [next(iter(data.batches(examples, ctx.rng("curvature")))).to(ctx.device)]
    return [b.to(ctx.device) for b in data.batches(500)]
