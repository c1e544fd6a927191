"""Cut groups of channels out of a network, so that it computes what it computed with them at zero."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from cupel.ops.channel_shapes import COUNTS
from cupel.ops.channels import Split, Structure, spread_over

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class NarrowLayerNorm(nn.Module):
    """A layer norm of `full` features of which only some are left, the others being zero.

    Mean and variance are those over all `full`, so that the features left come out as they did.

    Shapes: `[..., D]` -> `[..., D]` with D at most `full`.
    """

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, eps: float, full: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.full = weight, bias, eps, full

    def forward(self, x: Tensor) -> Tensor:
        gone = self.full - x.shape[-1]
        mean = x.sum(-1, keepdim=True) / self.full
        apart = x - mean
        variance = (apart.square().sum(-1, keepdim=True) + gone * mean.square()) / self.full
        x = apart * (variance + self.eps).rsqrt()
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias

    def extra_repr(self) -> str:
        return f"full={self.full}, eps={self.eps}"


@torch.no_grad()
def zero_groups(model: nn.Module, structure: Structure, gone: Tensor) -> None:
    """Set every entry that makes the groups `gone` (bool `[count]`) to zero, in place."""
    state = dict(model.named_parameters())
    for side in structure.makers():
        if side.name in state:
            p = state[side.name]
            p.mul_(spread_over(structure, (~gone).to(p), side, p))


def zeroed_groups(model: nn.Module, structure: Structure) -> Tensor:
    """Which groups are zero in all the entries that make them, bool `[count]`."""
    state, alive = dict(model.named_parameters()), torch.zeros(structure.count, dtype=torch.bool)
    for side in structure.makers():
        rows = state[side.name].detach().movedim(side.dim, 0).reshape(len(side.groups), -1).ne(0).any(1).cpu()
        alive[side.groups[rows & (side.groups >= 0)]] = True
    return ~alive


def cut_groups(model: nn.Module, structure: Structure, gone: Tensor) -> None:
    """Take the groups `gone` (bool `[count]`) out of all weights, in place; layers keep their classes.

    Layer norms over an axis that becomes narrower are replaced by `NarrowLayerNorm`.

    Raises:
        ValueError: a layer would lose all its channels.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    made: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        index = {
            side.dim: (side.groups < 0) | ~gone[side.groups.clamp_min(0)]
            for side in structure.sides
            if side.name == name
        }
        if all(bool(keep.all()) for keep in index.values()):
            continue
        value = tensor.detach()
        for dim, keep in index.items():
            if not bool(keep.any()):
                raise ValueError(f"{name} must keep a channel; all of axis {dim} would go. Cut fewer groups.")
            value = value.index_select(dim, keep.nonzero().flatten().to(value.device))
        fresh = value.contiguous().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        made[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if is_parameter else fresh
    widths = {path: _module(model, path).normalized_shape[0] for path in structure.norms}
    _renew_counts(model, structure, gone)
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in tables:
            for leaf, present in held.items():
                if id(present) in made:
                    held[leaf] = made[id(present)]
        _resize(module)
    for path, width in widths.items():
        norm = _module(model, path)
        if norm.normalized_shape[0] != width:
            narrow = NarrowLayerNorm(norm.weight, norm.bias, norm.eps, width).train(norm.training)
            model.set_submodule(path, narrow)


def _module(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path) if path else model


def _resize(module: nn.Module) -> None:
    """The sizes that a layer of torch tells of itself, from its weight."""
    w = getattr(module, "weight", None)
    if not isinstance(w, Tensor):
        return
    if isinstance(module, _CONV):
        if module.groups > 1 and w.shape[1] == 1 and module.groups == module.in_channels:  # depthwise
            module.groups = w.shape[0] * module.groups // module.out_channels
        module.out_channels, module.in_channels = w.shape[0], w.shape[1] * module.groups
    elif isinstance(module, _TRANSPOSED):
        module.in_channels, module.out_channels = w.shape[0], w.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = w.shape
    elif isinstance(module, _NORMS):
        module.num_features = len(w)
    elif isinstance(module, nn.LayerNorm) and w.ndim == 1:
        module.normalized_shape = tuple(w.shape)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = w.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(w)


def _renew_counts(model: nn.Module, structure: Structure, gone: Tensor) -> None:
    """Numbers of heads that modules hold and fold by."""
    renewed = set()
    for split in structure.splits:
        module = _module(model, split.module)
        for old, new in _folds(split, gone):
            for name in COUNTS:
                if getattr(module, name, None) == old and (split.module, name) not in renewed:
                    setattr(module, name, new)
                    renewed.add((split.module, name))


def _folds(split: Split, gone: Tensor) -> Iterator[tuple[int, int]]:
    """Sizes of the folded axes, before and after."""
    keep = (split.groups < 0) | ~gone[split.groups.clamp_min(0)]
    for d in range(keep.ndim - 1):
        yield keep.shape[d], int(keep.movedim(d, 0).flatten(1).any(1).sum())


def cut_or_refuse(model: nn.Module, inputs: Any, structure: Structure, gone: Tensor, tolerance: float = 1e-4) -> None:
    """`cut_groups`, after a trial on a copy: its outputs on `inputs` must be those of the masked network.

    Raises:
        ValueError: they are not, or the cut network does not run.
    """
    masked, trial = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    zero_groups(masked, structure, gone)
    with torch.no_grad():
        wanted = masked(inputs)
        try:
            cut_groups(trial, structure, gone)
            found = trial(inputs)
            worst = float((found - wanted).abs().max())
        except (RuntimeError, TypeError, IndexError, AssertionError) as error:
            raise ValueError(
                f"a network must run after channels are cut; this one does not: {str(error)[:200]}. A size in its "
                "Python is a plain number. Prune it without structure."
            ) from None
    size = 1 + float(wanted.abs().max())
    if not worst <= tolerance * size:
        raise ValueError(
            f"a network must compute the same after zero channels are cut; this one differs by {worst:.2g}. "
            "Prune it without structure."
        )
    zero_groups(model, structure, gone)
    cut_groups(model, structure, gone)


def kept_share(structure: Structure, gone: Tensor, shapes: dict[str, torch.Size]) -> float:
    """Share of all entries of the weights in `shapes` that is left."""
    left = total = 0
    for name, shape in shapes.items():
        sizes = list(shape)
        for side in structure.sides:
            if side.name == name:
                sizes[side.dim] = int(((side.groups < 0) | ~gone[side.groups.clamp_min(0)]).sum())
        left, total = left + prod(sizes), total + prod(shape)
    return left / max(total, 1)
