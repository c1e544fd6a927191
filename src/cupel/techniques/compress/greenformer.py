"""Technique `greenformer`: every linear and convolution layer becomes a pair of low rank."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError, nearest
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.types import still
from cupel.ops.lowrank import break_even, energy_rank, nmf_factors, root_of, snmf_factors, svd_factors

CARD = Card(
    name="greenformer",
    family="compress",
    source="S. Cahyawijaya et al., Greenformer: Factorization Toolkit for Efficient Deep Neural Networks, AAAI 2022, "
    "arXiv 2109.06762",
    tags=("factorization", "low-rank"),
    needs=("weights",),
    tiny={"rank": 0.5},
    neutral={"rank": 1.0},
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layer = Any  # nn.Linear, one of CONVOLUTIONS, or a Conv1D of transformers
Roots = list[tuple[Tensor, Tensor]]  # one pair (root, inverse) for each group


class LowRank(nn.Sequential):
    """Two layers in place of one; `weight` and `bias` read as those of the layer they stand for."""

    first: Layer
    second: Layer

    @property
    def weight(self) -> Tensor:
        groups, shape = getattr(self.first, "groups", 1), self.first.weight.shape[1:]
        a, b = self.first.weight.flatten(1).chunk(groups), self.second.weight.flatten(1).chunk(groups)
        whole: Tensor = torch.cat([second @ first for first, second in zip(a, b, strict=True)]).unflatten(1, shape)
        return whole

    @property
    def bias(self) -> Any:
        return self.second.bias


def matrix_of(layer: Layer) -> tuple[Tensor, int]:
    """The layer's weight as one matrix per group, `[groups, out / groups, in]`, and its break-even rank."""
    weight = layer.weight.detach()
    if isinstance(layer, CONVOLUTIONS):
        limit = break_even(layer.in_channels, layer.out_channels // layer.groups)
        return weight.flatten(1).unflatten(0, (layer.groups, -1)), limit
    matrix = weight if isinstance(layer, nn.Linear) else weight.T  # a Conv1D of transformers holds [in, out]
    return matrix[None], break_even(matrix.shape[1], matrix.shape[0])


def pair_like(layer: Layer, rank: int) -> LowRank:
    """A fresh pair with the shapes, stride, padding, dilation, groups and bias of `layer`."""
    place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    tail = place | {"bias": layer.bias is not None}
    if isinstance(layer, CONVOLUTIONS):
        kind, groups = type(layer), layer.groups
        shape = {n: getattr(layer, n) for n in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        first: Layer = kind(layer.in_channels, rank, groups=groups, bias=False, **shape, **place)
        second: Layer = kind(rank, layer.out_channels, 1, groups=groups, **tail)
    else:
        _, out, fan_in = matrix_of(layer)[0].shape
        first, second = nn.Linear(fan_in, rank, bias=False, **place), nn.Linear(rank, out, **tail)
    return LowRank(OrderedDict(first=first, second=second))


def factorable(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Names and layers that can become a pair.

    Subclasses are left alone: attention reads the weights of its own kind of linear layer directly.
    """
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            inside += (f"{name}.",)
        huggingface = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if (type(module) in (nn.Linear, *CONVOLUTIONS) or huggingface) and not name.startswith(inside or ("\0",)):
            yield name, module


def _named(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in parts)


@dataclass(frozen=True)
class Greenformer:
    r"""Replace each linear and convolution layer by two of low rank, from its weights or from scratch.

    A linear layer W [O, I] becomes x -> B (A x) + b with A [r, I], B [O, r]; a convolution becomes one of its own
    kernel with r channels and one of kernel 1. `svd` keeps the r largest singular values (of the outputs on training
    data, with `whiten`), `nmf` and `snmf` are non-negative and half non-negative factors, `random` starts afresh. A
    layer whose pair would not be smaller stays as it is; so does the last layer, unless `only` names it.

    Use: on wide linear layers or convolutions, before or after training; a few epochs win back most of what a low rank
    loses. Costs: an SVD a layer, once; parameters and operations fall together, latency only where layers are large.

    Shapes: as before for every layer and the network.

    Raises:
        ParamError: an unknown submodule, `nmf` on negative weights, `whiten` without `svd`.
        PlanError: `whiten` without training data.

    Source: Cahyawijaya et al., AAAI 2022, arXiv 2109.06762. `nmf`: Lee and Seung 2001. `snmf`: Ding, Li, Jordan 2010.

    Departs: rank 1.0 is a share, and only ranks above 1 are counts; the SVD is exact where the released code samples
    it; groups of a grouped convolution are factorized each on its own, which keeps the result exact at full rank; `nmf`
    refuses negative weights, which the released code lets pass; `energy` and `whiten` are additions.

    Example:
        >>> Greenformer(rank=0.25, skip=("block1",)).solver
        'svd'
    """

    rank: float = param(0.5, "rank as a share of the break-even rank in (0, 1]; above 1, the rank itself", gt=0)
    solver: str = param("svd", "how the factors begin", choices=("svd", "nmf", "snmf", "random"))
    energy: float | None = param(None, "smallest rank that keeps this share of the squared singular values", gt=0, le=1)
    whiten: bool = param(False, "lose least on the layer's outputs for training data, not on its weights (svd)")
    examples: int = param(256, "training examples that `whiten` looks at", ge=1)
    iterations: int = param(100, "rounds of nmf and snmf", ge=1)
    only: tuple[str, ...] = param((), "submodules to factorize (none: all but the last layer)")
    skip: tuple[str, ...] = param((), "submodules to leave as they are")

    def model(self, model: nn.Module, ctx: Context) -> nn.Module:
        if self.whiten and self.solver != "svd":
            raise ParamError(f"solver of greenformer must be svd with whiten; got {self.solver}. Drop one of the two.")
        chosen = self._chosen(model)
        roots = _roots(model, chosen, self.examples, ctx) if self.whiten else {}
        pairs: dict[int, nn.Module] = {}
        for name, layer in chosen.items():
            made = self._pair(name, layer, roots.get(name), ctx)
            if made is not None:
                pairs[id(layer)] = made
        if not pairs:
            return model
        if id(model) in pairs:
            return pairs[id(model)]
        # The network handed in stays as it was: the copy takes a pair wherever it would copy the layer.
        return copy.deepcopy(model, dict(pairs))

    def _chosen(self, model: nn.Module) -> dict[str, Layer]:
        layers, known = dict(factorable(model)), [n for n, _ in model.named_modules() if n]
        for part in (*self.only, *self.skip):
            if part not in known:
                raise ParamError(
                    f"only and skip of greenformer must be submodules of the network; got {part!r}."
                    f"{nearest(part, known)} Name a part such as {known[0] if known else 'none'!r}."
                )
        last = next(reversed(layers), "")
        wanted = {n: m for n, m in layers.items() if (_named(n, tuple(self.only)) if self.only else n != last)}
        return {n: m for n, m in wanted.items() if not _named(n, tuple(self.skip))}

    def _rank(self, layer: Layer, roots: Roots | None) -> int:
        """The rank of the pair; 0 when the layer stays."""
        matrices, limit = matrix_of(layer)
        groups, (out, fan_in) = len(matrices), matrices.shape[1:]
        if self.energy is not None:
            bases = [r for r, _ in roots] if roots else [None] * groups
            rank = groups * max(energy_rank(m, self.energy, b) for m, b in zip(matrices, bases, strict=True))
        else:
            rank = int(limit * self.rank) if self.rank <= 1 else int(self.rank)
            rank = -(-rank // groups) * groups
            if self.rank <= 1 and rank >= limit:
                return 0
        return rank if rank * (fan_in + out) < groups * out * fan_in else 0

    def _pair(self, name: str, layer: Layer, roots: Roots | None, ctx: Context) -> LowRank | None:
        rank = 0 if self.whiten and roots is None else self._rank(layer, roots)
        if rank == 0:
            why = (
                "never ran on the calibration data" if self.whiten and roots is None else "a pair would not be smaller"
            )
            ctx.log(kind="greenformer", layer=name, kept=why)
            return None
        with ctx.scope(f"pair/{name}"):
            made = pair_like(layer, rank).train(layer.training).requires_grad_(layer.weight.requires_grad)
        matrices, _ = matrix_of(layer)
        with torch.no_grad():
            if self.solver != "random":
                count = rank // len(matrices)
                both = [self._factors(name, m, count, roots[k] if roots else None, ctx) for k, m in enumerate(matrices)]
                made.first.weight.copy_(torch.cat([a for a, _ in both]).view_as(made.first.weight))
                made.second.weight.copy_(torch.cat([b for _, b in both]).view_as(made.second.weight))
                if layer.bias is not None:
                    made.second.bias.copy_(layer.bias)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (layer, made))
        ctx.log(kind="greenformer", layer=name, rank=rank, params_before=before, params_after=after)
        return made

    def _factors(
        self, name: str, matrix: Tensor, rank: int, roots: tuple[Tensor, Tensor] | None, ctx: Context
    ) -> tuple[Tensor, Tensor]:
        if self.solver == "svd":
            return svd_factors(matrix, rank, roots)
        draw, (out, fan_in) = ctx.rng(f"factors/{name}"), matrix.shape
        second = 0.2 + torch.rand(out, rank, generator=draw, dtype=torch.float64).to(matrix.device)
        if self.solver == "snmf":
            return snmf_factors(matrix, second, self.iterations)
        if bool((matrix < 0).any()):
            raise ParamError(
                f"weights must be >= 0 for solver nmf of greenformer; got {float(matrix.min()):.3g} in {name}. "
                "Use svd or snmf, or skip the layer."
            )
        first = 0.2 + torch.rand(rank, fan_in, generator=draw, dtype=torch.float64).to(matrix.device)
        return nmf_factors(matrix, (first, second), self.iterations)


def _gather(moments: dict[str, Tensor], name: str, layer: Layer, args: tuple[Tensor, ...]) -> None:
    """Add the second moment of the layer's inputs, `[groups, in, in]`; a convolution's inputs are its patches."""
    x = args[0].detach()
    if isinstance(layer, CONVOLUTIONS):
        size = layer.weight[0].numel()
        eye = torch.eye(size, dtype=x.dtype, device=x.device).view(size, *layer.weight.shape[1:])
        seen = layer._conv_forward(x, eye.repeat(layer.groups, *[1] * (x.ndim - 1)), None)
        rows = seen.flatten(2).unflatten(1, (layer.groups, size)).permute(1, 0, 3, 2).flatten(1, 2)  # [g, N, in]
    else:
        rows = x.reshape(1, -1, x.shape[-1])
    rows = rows.double()
    moments[name] = moments.get(name, 0) + rows.transpose(1, 2) @ rows


def _roots(model: nn.Module, layers: Mapping[str, Layer], examples: int, ctx: Context) -> dict[str, Roots]:
    if ctx.train is None:
        raise PlanError("whiten of greenformer must see training data; this context has none. Apply it to a subject.")
    moments: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(still(model))
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(partial(_gather, moments, name))
            stack.callback(handle.remove)
        seen = 0
        for batch in ctx.train.train.batches(64, ctx.rng("calibrate")):
            model(batch.to(ctx.device).inputs)
            seen += len(batch)
            if seen >= examples:
                break
    return {name: [root_of(m) for m in moment] for name, moment in moments.items()}
