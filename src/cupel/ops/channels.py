"""Which channels of a network must go together, read off its traced graph.

Every channel of every tensor carries a label; operations that need equal channels join labels, and what may never go
carries the label zero. Channels whose labels were joined are one group: entries of weights that make it, which are
zero together and then add nothing to the output (a zero-invariant group), and entries of later weights that read it.

Source: T. Chen et al., OTOv2, ICLR 2023, arXiv 2303.06862, section 3.1; G. Fang et al., DepGraph, CVPR 2023,
arXiv 2301.12900. Here the unit is the single channel and not the layer, so that concatenation, flattening and
channels that meet through several paths need no offsets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cupel.ops.labels import Labels


@dataclass(frozen=True)
class Side:
    """One axis of a weight, and the group each of its entries belongs to.

    Args:
        name: of the parameter or buffer.
        dim: the axis.
        groups: `[n]` int64, -1 where an entry always stays.
        makes: whether these entries make the channel, and are zeroed with it; otherwise they read it.
    """

    name: str
    dim: int
    groups: Tensor
    makes: bool


@dataclass(frozen=True)
class Split:
    """A place where the forward folds an axis into several.

    Args:
        module: path of the module that does it.
        groups: `[*sizes, n]` int64, the new axes first.
    """

    module: str
    groups: Tensor


@dataclass(frozen=True)
class Structure:
    """The groups of a network: `count` of them, numbered in forward order."""

    count: int
    sides: tuple[Side, ...]
    splits: tuple[Split, ...] = ()
    norms: tuple[str, ...] = ()  # layer norms over an axis with groups

    def makers(self) -> tuple[Side, ...]:
        """The axes whose entries make channels."""
        return tuple(s for s in self.sides if s.makes)


def structure_of(model: nn.Module, inputs: Any) -> Structure:
    """The groups of `model`, whose forward is traced on `inputs` (two examples or more) in evaluation mode.

    Inputs and outputs of the network stay whole. So do channels that meet an operation without a rule, or whose
    Python holds their number in a place that cannot be renewed.

    Raises:
        ValueError: the forward cannot be traced.
    """
    from cupel.ops.channel_rules import follow

    labels = Labels()
    modes = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one fused call would hide every product in it
    try:
        model.eval()
        with torch.no_grad():
            program = torch.export.export(model, (inputs,), strict=False)
    except Exception as error:  # a forward can defeat the tracer in any way
        raise ValueError(
            f"a network must be traceable for its channels to be cut; torch.export stopped: {str(error)[:200]}. "
            "Prune it without structure."
        ) from None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    follow(program.graph, names, labels, model)
    return _numbered(labels, _one_name(model))


def traced_on(model: nn.Module, data: Any, device: torch.device) -> tuple[Structure, Any]:
    """The groups of `model` and the two training inputs it was traced on.

    Args:
        data: whose `train` is a data set.

    Raises:
        ValueError: there are no data, or the forward cannot be traced.
    """
    if data is None:
        raise ValueError("there must be data to trace the network on; there are none. Run it in a recipe.")
    inputs = next(iter(data.train.batches(2))).to(device).inputs
    return structure_of(model, inputs), inputs


def _one_name(model: nn.Module) -> Mapping[str, str]:
    """Every name of a parameter or buffer -> the first name it has."""
    first: dict[int, str] = {}
    found = {}
    for kind in (model.named_parameters, model.named_buffers):
        for name, value in kind(remove_duplicate=False):
            found[name] = first.setdefault(id(value), name)
    return found


def _numbered(labels: Labels, names: Mapping[str, str]) -> Structure:
    for name, axes in list(labels.held.items()):  # a weight with several names is one
        for dim, own in axes.items():
            if names.get(name, name) != name:
                labels.join(own, labels.held.setdefault(names[name], {}).setdefault(dim, labels.fresh(len(own))))
                labels.makes |= {(names[name], dim)} if (name, dim) in labels.makes else set()
    made = {labels.root(i) for name, dim in labels.makes for i in labels.held[name][dim].tolist()} - {0}
    number = {root: i for i, root in enumerate(sorted(made))}

    def groups(own: Tensor) -> Tensor:
        return torch.tensor([number.get(labels.root(i), -1) for i in own.flatten().tolist()]).reshape(own.shape)

    sides = tuple(
        Side(name, dim, ids, (name, dim) in labels.makes)
        for name, axes in labels.held.items()
        for dim, own in axes.items()
        if names.get(name, name) == name and bool((ids := groups(own)).ge(0).any())
    )
    splits = tuple(Split(path, groups(own)) for path, own in labels.splits)
    return Structure(len(number), sides, splits, tuple(sorted(labels.norms)))


def axes_of(structure: Structure) -> list[Tensor]:
    """Groups that lie on the same axes of the same weights, and so compete: their numbers, `[n]` each."""
    where: list[list[int]] = [[] for _ in range(structure.count)]
    for s, side in enumerate(structure.sides):
        for g in side.groups.unique().tolist():
            if g >= 0:
                where[g].append(s)
    found: dict[tuple[int, ...], list[int]] = {}
    for g, sides in enumerate(where):
        found.setdefault(tuple(sides), []).append(g)
    return [torch.tensor(members) for members in found.values()]


def totals(structure: Structure, values: Mapping[str, Tensor]) -> Tensor:
    """Sums `[count]` over the entries that make each group, of tensors named and shaped like the weights."""
    like = next(iter(values.values()))
    found = like.new_zeros(structure.count)
    for side in structure.makers():
        if side.name in values:
            rows = values[side.name].movedim(side.dim, 0).reshape(len(side.groups), -1).sum(1)
            ids = side.groups.to(rows.device)
            found.index_add_(0, ids[ids >= 0], rows[ids >= 0])
    return found


def spread_over(structure: Structure, value: Tensor, side: Side, like: Tensor, other: float = 1.0) -> Tensor:
    """Values `[count]` by group, laid along an axis of a weight so that they broadcast; `other` where none is."""
    ids = side.groups.to(value.device)
    laid = torch.where(ids >= 0, value[ids.clamp_min(0)], torch.full_like(value[:1], other))
    return laid.reshape([-1 if d == side.dim else 1 for d in range(like.ndim)])


def choose(structure: Structure, scores: Tensor, count: int, least: int = 1) -> Tensor:
    """Which groups go: the `count` of smallest score, as bool `[structure.count]`; every axis keeps `least` entries.

    Fewer go where that limit binds.
    """
    left = [len(side.groups) for side in structure.sides]
    where: list[list[tuple[int, int]]] = [[] for _ in range(structure.count)]
    for s, side in enumerate(structure.sides):
        ids, counts = side.groups[side.groups >= 0].unique(return_counts=True)
        for g, n in zip(ids.tolist(), counts.tolist(), strict=True):
            where[g].append((s, n))
    gone = torch.zeros(structure.count, dtype=torch.bool)
    for g in scores.argsort(stable=True).tolist():
        if int(gone.sum()) >= count:
            break
        if all(left[s] - n >= least for s, n in where[g]):
            gone[g] = True
            for s, n in where[g]:
                left[s] -= n
    return gone
