"""Activation pathways: how strongly channels act, and how strongly each drives those of later layers.

Source: N. Das et al., Bluff, IEEE VIS 2020, arXiv 2009.02608. Layers, labels and sums are those of `ops.channel_flow`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cupel.ops.channel_flow import Flow, Layer, Skip, replay

GROUPS = ("original only", "target only", "both", "attack only")
_ROOM = 30_000_000  # numbers that one batch of depthwise maps may hold


def scores_of(model: nn.Module, flow: Flow, x: Tensor, batch: int = 64) -> list[Tensor]:
    """a_c = max over positions of channel c, for every image: `[N, C]` for each layer."""
    found: list[list[Tensor]] = [[] for _ in flow.layers]

    def look(layer: Layer, into: list[Tensor]) -> Callable[[Any, Tensor], None]:
        def seen(args: Any, out: Tensor) -> None:
            into.append(_highest(out.reshape(-1, len(layer.channels)), layer.channels, layer.count))

        return seen

    for part in x.split(batch):
        seen = {layer.seen: look(layer, into) for layer, into in zip(flow.layers, found, strict=True)}
        replay(model, part, flow, seen)
    return [torch.cat(parts) for parts in found]


def _highest(values: Tensor, group: Tensor, count: int) -> Tensor:
    """The largest of the values of every group: `[B, P]`, `[P]` -> `[B, count]`."""
    group = group.to(values.device)
    low = values.new_full((len(values), count), -torch.inf)
    return low.scatter_reduce(1, group.expand(len(values), -1), values, "amax")


def strongest(scores: Tensor, k: int) -> Tensor:
    """`[C]` bool: the k largest; of equals the first.

    >>> strongest(torch.tensor([1.0, 3.0, 2.0]), 2).tolist()
    [False, True, True]
    """
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.cpu().argsort(descending=True, stable=True)[:k]] = True
    return chosen


def overlap(a: Tensor, b: Tensor) -> float:
    """Jaccard index of two sets `[C]` bool; 1 for two empty ones."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0


def group_of(original: bool, target: bool) -> str:
    """Where a channel belongs that is among the strongest of the original class, the target class, both or neither."""
    return GROUPS[2 if original and target else 0 if original else 1 if target else 3]


def shifted(attacked: Tensor, benign: Tensor, m: int) -> Tensor:
    """`[C]`: 1 for the m channels that the attack raises most, -1 for the m it lowers most, 0 for the others.

    >>> shifted(torch.tensor([5.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 2.0]), 2).tolist()
    [1, -1, 0]
    """
    change = (attacked - benign).cpu()
    up = strongest(change, m) & (change > 0)
    down = strongest(-change, m) & (change < 0)
    return up.long() - down.long()


@dataclass(frozen=True)
class Edges:
    """Connections `source[e] -> into[e]` between labels, `[E]`, and their influence on every image, `[N, E]`."""

    source: Tensor
    into: Tensor
    influence: Tensor


def influence_of(model: nn.Module, flow: Flow, x: Tensor, kept: Tensor) -> Edges:
    """I_ij = max over positions of conv(A_i, K_ji), for every pair of kept channels that a layer or a sum joins.

    A_i is channel i of what the layer reads, K_ji its slice of the kernel. A matrix product after a flattening is a
    convolution as large as the map, so its sum runs over all features of channel i. A map that a sum adds beside a
    layer's own counts as an identity kernel.

    Args:
        kept: `[all labels]` bool.
    """
    joined = [_joins(layer, kept) for layer in flow.layers] + [_beside(skip, kept) for skip in flow.skips]
    found: list[list[Tensor]] = [[] for _ in joined]
    makers: list[Layer | Skip] = [*flow.layers, *flow.skips]

    def look(at: int) -> Callable[[Any, Tensor], None]:
        pairs, make = joined[at], makers[at]

        def seen(args: Any, out: Tensor) -> None:
            rows = out.shape[0]
            if isinstance(make, Skip):
                value = make.scale * args[make.operand].expand(out.shape).reshape(rows, -1)[:, pairs.entries]
                found[at].append(_highest(value, pairs.number, len(pairs.source)))
            elif len(args) > 6:
                found[at].append(_convolved(args, pairs))
            else:
                found[at].append(_multiplied(args, make, pairs, size))

        return seen

    # Two makers can be one call only if a call were a layer and a sum at once, which none is; sums have two operands.
    calls: dict[int, list[Callable[[Any, Tensor], None]]] = {}
    for at, make in enumerate(makers):
        if len(joined[at].source):
            calls.setdefault(make.call, []).append(look(at))
    size = 0
    for part in x.split(16):
        size = len(part)
        replay(model, part, flow, {n: _all(tells) for n, tells in calls.items()})
    return _together(joined, found)


def _all(tells: Sequence[Callable[[Any, Tensor], None]]) -> Callable[[Any, Tensor], None]:
    def seen(args: Any, out: Tensor) -> None:
        for tell in tells:
            tell(args, out)

    return seen


@dataclass(frozen=True)
class _Pairs:
    """Pairs of kept labels, and where they are: inputs `entries` and rows `targets`, numbered for `_highest`."""

    source: Tensor
    into: Tensor
    entries: Tensor
    number: Tensor
    targets: Tensor


def _joins(layer: Layer, kept: Tensor) -> _Pairs:
    """All kept channels that a layer reads, with all kept channels that it makes."""
    entries = ((layer.reads >= 0) & kept[layer.reads.clamp_min(0)]).nonzero().flatten()
    source, number = layer.reads[entries].unique(return_inverse=True)
    targets = kept[layer.first : layer.first + layer.count].nonzero().flatten()
    into = (targets + layer.first).expand(len(source), -1)
    return _Pairs(source[:, None].expand_as(into).flatten(), into.flatten(), entries, number, targets)


def _beside(skip: Skip, kept: Tensor) -> _Pairs:
    """The kept pairs of an operand of a sum."""
    here = (skip.source >= 0) & kept[skip.source.clamp_min(0)] & kept[skip.into.clamp_min(0)]
    entries = here.nonzero().flatten()
    pairs, number = torch.stack([skip.source[entries], skip.into[entries]]).unique(dim=1, return_inverse=True)
    return _Pairs(pairs[0], pairs[1], entries, number, entries[:0])


def _convolved(args: Any, pairs: _Pairs) -> Tensor:
    """`[B, E]` of a convolution: every kept input channel with every kept kernel slice, then the spatial maximum."""
    x, weight, _, stride, pad, gaps, turned, more, groups = args[:9]
    sources, targets = len(pairs.entries), pairs.targets
    inner = weight.shape[0 if turned else 1] if groups == 1 or not turned else x.shape[1] // groups
    outer = (weight.shape[1] * groups if turned else weight.shape[0]) // groups
    kernels = x.new_zeros(sources, len(targets), *weight.shape[2:])
    for row, entry in enumerate(pairs.entries.tolist()):
        own = targets // outer == entry // inner  # other groups of channels do not read this one
        slices = weight[entry, targets[own] % outer] if turned else weight[targets[own], entry % inner]
        kernels[row, own] = slices
    if not turned:
        kernels = kernels.flatten(0, 1)[:, None]  # [I J, 1, k, k]: a depthwise convolution with J outputs each
    part = max(1, _ROOM // max(1, sources * len(targets) * x[0, 0].numel()))
    found = []
    for some in x[:, pairs.entries].split(part):
        out = torch.convolution(some, kernels, None, stride, pad, gaps, turned, more, sources)
        found.append(out.flatten(2).amax(2))
    by_entry = torch.cat(found).view(len(x), sources, len(targets))
    count = len(pairs.source) // max(1, len(targets))
    if count == sources:
        return by_entry[:, pairs.number.argsort()].flatten(1)
    low = by_entry.new_full((len(x), count, len(targets)), -torch.inf)  # one channel read twice: the stronger way
    return low.scatter_reduce(
        1, pairs.number.to(x.device)[None, :, None].expand_as(by_entry), by_entry, "amax"
    ).flatten(1)


def _multiplied(args: Any, layer: Layer, pairs: _Pairs, size: int) -> Tensor:
    """`[B, E]` of a matrix product: sums over the features of a channel, the maximum over tokens."""
    left, right = args[1:3] if args[0].ndim == 1 or len(args) > 2 else args[:2]
    x = left.reshape(size, -1, left.shape[-1])[:, :, pairs.entries]  # [B, T, features of kept channels]
    weight = right[pairs.entries][:, pairs.targets]  # [features, J]
    count = len(pairs.source) // max(1, len(pairs.targets))
    each = x.new_zeros(*x.shape[:2], count, len(pairs.targets))
    each.index_add_(2, pairs.number.to(x.device), x[..., None] * weight)
    most: Tensor = each.amax(1)
    return most.flatten(1)


def _together(joined: Sequence[_Pairs], found: Sequence[Sequence[Tensor]]) -> Edges:
    """One list of edges; where a pair is joined twice, the stronger way counts."""
    used = [at for at, parts in enumerate(found) if parts]
    if not used:
        none = torch.zeros(0, dtype=torch.long)
        return Edges(none, none, torch.zeros(0, 0))
    if len({sum(len(part) for part in found[at]) for at in used}) > 1:
        raise ValueError("layers must see each input once in a forward; some see others. Measure the network inside.")
    ends = torch.stack([torch.cat([joined[at].source for at in used]), torch.cat([joined[at].into for at in used])])
    values = torch.cat([torch.cat(list(found[at])) for at in used], dim=1).cpu()
    pairs, number = ends.unique(dim=1, return_inverse=True)
    return Edges(pairs[0], pairs[1], _highest(values, number, pairs.shape[1]))


def strongest_into(edges: Edges, weight: Tensor, width: int) -> Tensor:
    """`[E]` bool: of the edges that arrive at each channel, the `width` of largest `weight` `[E]`."""
    chosen = torch.zeros(len(weight), dtype=torch.bool)
    taken: dict[int, int] = {}
    for e in weight.argsort(descending=True, stable=True).tolist():
        into = int(edges.into[e])
        if taken.get(into, 0) < width:
            taken[into] = taken.get(into, 0) + 1
            chosen[e] = True
    return chosen


def pathway(edges: Edges, weight: Tensor, start: int, width: int) -> Tensor:
    """`[E]` bool: from channel `start` of the last layer back along the strongest edges to the first.

    Args:
        weight: influence of every edge, `[E]`, such as its median over images.
        width: how many edges are followed back from every channel that is reached; those of negative influence never.
    """
    follow = strongest_into(edges, weight, width) & (weight > 0)
    found: Tensor = torch.zeros(len(weight), dtype=torch.bool)
    reached = {start}
    for label in sorted(edges.into.unique().tolist(), reverse=True):  # labels grow with the layers
        if label in reached:
            back = follow & (edges.into == label)
            found |= back
            reached |= set(edges.source[back].tolist())
    return found


def maps_of(model: nn.Module, flow: Flow, x: Tensor, batch: int = 64) -> list[Tensor]:
    """What `scores_of` takes the maximum of: `[N, P]` for each layer."""
    found: list[list[Tensor]] = [[] for _ in flow.layers]

    def look(layer: Layer, into: list[Tensor]) -> Callable[[Any, Tensor], None]:
        return lambda args, out: into.append(out.reshape(-1, len(layer.channels)).clone())

    for part in x.split(batch):
        seen = {layer.seen: look(layer, into) for layer, into in zip(flow.layers, found, strict=True)}
        replay(model, part, flow, seen)
    return [torch.cat(parts) for parts in found]


def with_reset(
    model: nn.Module, flow: Flow, x: Tensor, layer: Layer, chosen: Tensor, to: Tensor, batch: int = 64
) -> Tensor:
    """Outputs `[N, K]` on `x` when the `chosen` channels `[C]` bool of a layer are replaced by maps `to` `[N, P]`."""
    here = chosen[layer.channels].to(x.device)
    found = []
    for part, maps in zip(x.split(batch), to.split(batch), strict=True):

        def put(args: Any, out: Tensor, maps: Tensor = maps) -> None:
            out.copy_(torch.where(here, maps, out.reshape(maps.shape)).reshape(out.shape))

        found.append(replay(model, part, flow, {layer.seen: put}))
    return torch.cat(found)


@dataclass(frozen=True)
class Cause:
    """What resetting channels of one layer did.

    Args:
        channels: how many were reset.
        back: `[N]` bool: which inputs read as the original class again, the most changed channels reset.
        back_random: the same for every random choice, `[draws, N]`.
        held: `[N]` bool: which benign inputs still read as it, the most changed channels reset.
    """

    channels: int
    back: Tensor
    back_random: Tensor
    held: Tensor


def cause_of(
    model: nn.Module,
    flow: Flow,
    layer: int,
    benign: Tensor,
    attacked: Tensor,
    label: int,
    choices: Sequence[Tensor],
) -> Cause:
    """Reset channels of a layer to their benign means, in the attacked and the benign inputs.

    Row n of `attacked` is what became of row n of `benign`; the mean map put into it leaves benign row n out.

    Args:
        label: the original class.
        choices: `[C]` bool each: the channels under test first, then the random ones.
    """
    here = flow.layers[layer]
    maps = maps_of(model, Flow((here,), (), flow.calls), benign)[0]
    means = (maps.sum(0) - maps) / max(1, len(maps) - 1)

    def reads(x: Tensor, chosen: Tensor) -> Tensor:
        return (with_reset(model, flow, x, here, chosen, means).argmax(1) == label).cpu()

    back = [reads(attacked, chosen) for chosen in choices]
    return Cause(int(choices[0].sum()), back[0], torch.stack(back[1:]), reads(benign, choices[0]))
