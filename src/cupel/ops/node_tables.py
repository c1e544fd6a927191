"""Choosing the nodes of a wide layer for each query: hashed tables of importance, and layers that compute only those.

Source: D. Mendoza, C. Trippel, Dynamic Network Adaptation at Inference, 2022, arXiv 2204.08400; signed random
projections: M. Charikar, Similarity Estimation Techniques from Rounding Algorithms, STOC 2002.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ELEMENTS = 1 << 22  # gathered at a time, so that a large batch does not hold a copy of the layer for every row


def planes_for(width: int, tables: int, bits: int, draw: torch.Generator) -> Tensor:
    """Normals of the hashing planes, `[tables * bits, width]`."""
    return torch.randn(tables * bits, width, generator=draw)


def buckets_of(x: Tensor, planes: Tensor, offsets: Tensor, tables: int) -> Tensor:
    """The bucket of every row in every table: its bits tell on which side of each plane the row lies.

    Shapes: x `[B, d]`, planes `[T K, d]`, offsets `[T K]` -> `[B, T]` int64 in 0..2^K - 1, first plane lowest bit.
    """
    sides = (F.linear(x, planes) > offsets).view(len(x), tables, -1)
    return (sides * (1 << torch.arange(sides.shape[2], device=x.device))).sum(2)


def centred_importance(activations: Tensor, mean: Tensor, outgoing: Tensor) -> Tensor:
    """|a - mean| times the length of the outgoing weights without what they add to all outputs alike.

    Shapes: activations `[B, n]`, mean `[n]`, outgoing `[o, n]` -> `[B, n]`.
    """
    length: Tensor = (outgoing - outgoing.mean(0)).norm(dim=0)
    return (activations - mean).abs() * length


class NodeTables(nn.Module):
    """Hashed inputs -> ranked nodes, and how often so many nodes gave the whole network's answer.

    Args:
        planes, offsets: of the hash, `[T K, d]` and `[T K]`.
        sums: importance of every node over the inputs of every bucket, `[T, 2^K, n]`.
        seen: how many inputs these were, `[T, 2^K]`.
        keep: nodes listed in a bucket.
    """

    planes: Tensor
    offsets: Tensor
    nodes: Tensor  # [T, 2^K, R] the most important nodes of each bucket
    scores: Tensor  # [T, 2^K, R] their mean importance, drawn towards zero where few inputs fell
    prior: Tensor  # [n] importance over all inputs, so small that it only orders what no list names
    seen: Tensor  # [T, 2^K] inputs behind `agreed`
    agreed: Tensor  # [T, 2^K, m] of these, how many were answered alike at each level
    overall: Tensor  # [m] share answered alike among all inputs

    def __init__(self, planes: Tensor, offsets: Tensor, sums: Tensor, seen: Tensor, keep: int) -> None:
        super().__init__()
        self.tables, self.count = sums.shape[0], sums.shape[2]
        best = (sums / (seen[..., None] + 1)).topk(keep, dim=2)
        small = torch.int16 if self.count < 1 << 15 else torch.int32
        self.register_buffer("planes", planes)
        self.register_buffer("offsets", offsets)
        self.register_buffer("nodes", best.indices.to(small))
        self.register_buffer("scores", best.values.half())
        self.register_buffer("prior", 1e-3 * sums[0].sum(0) / seen[0].sum().clamp_min(1))
        self.register_buffer("seen", torch.zeros_like(seen))
        self.register_buffer("agreed", torch.zeros(*seen.shape, 0))
        self.register_buffer("overall", torch.zeros(0))

    @property
    def overhead(self) -> int:
        """Multiply-adds, or additions of scores, that choosing costs a query."""
        return self.planes.numel() + self.tables * self.nodes.shape[2]

    def buckets(self, x: Tensor) -> Tensor:
        """`[B, d]` -> `[B, T]`."""
        return buckets_of(x, self.planes, self.offsets, self.tables)

    def ranked(self, buckets: Tensor, k: int) -> Tensor:
        """The k nodes of largest score, summed over the tables: `[B, T]` -> `[B, k]`."""
        listed, worth = (self._at(table, buckets).flatten(1) for table in (self.nodes, self.scores))
        total = self.prior.expand(len(buckets), -1).scatter_add(1, listed.long(), worth.to(self.prior.dtype))
        return total.topk(k, dim=1, sorted=False).indices

    def learn(self, buckets: Tensor, alike: Tensor) -> None:
        """Fill the tables of confidence: `[N, T]` int64, and whether each level agreed, `[N, m]` bool."""
        shape = (*self.seen.shape, alike.shape[1])
        agreed, seen = alike.new_zeros(shape, dtype=torch.float), torch.zeros_like(self.seen)
        for t in range(self.tables):
            agreed[t].index_add_(0, buckets[:, t], alike.float())
            seen[t].index_add_(0, buckets[:, t], seen.new_ones(len(buckets)))
        self.seen, self.agreed, self.overall = seen, agreed, alike.float().mean(0)

    def confidence(self, buckets: Tensor) -> Tensor:
        """Share of like inputs that each level answers as the whole network does: `[B, T]` -> `[B, m]`.

        One more input that behaves like all together is added, so that a single one proves little; zero where no input
        fell into any of a query's buckets.
        """
        seen = self._at(self.seen[..., None], buckets).sum(1)
        return torch.where(seen > 0, (self._at(self.agreed, buckets).sum(1) + self.overall) / (seen + 1), 0.0)

    def _at(self, table: Tensor, buckets: Tensor) -> Tensor:
        """Entries of the buckets: `[T, 2^K, r]`, `[B, T]` -> `[B, T, r]`."""
        first = torch.arange(self.tables, device=buckets.device) * table.shape[1]
        rows = table.flatten(0, 1).index_select(0, (buckets + first).flatten())
        return rows.view(*buckets.shape, table.shape[2])


class Choice(nn.Module):
    """Which level each query takes: what is wanted, and what was chosen for the batch on its way.

    Args:
        sizes: nodes computed at each level, ascending; the last is all of them.
        accuracy: the least confidence a level must have.

    `level`, where set, is taken by all queries, whatever their confidence.
    """

    def __init__(self, sizes: tuple[int, ...], accuracy: float) -> None:
        super().__init__()
        self.sizes, self.accuracy = sizes, accuracy
        self.level: int | None = None
        self.groups: list[tuple[Tensor, Tensor | None]] = []  # (rows, their nodes; None for all)

    def levels(self, confidence: Tensor) -> Tensor:
        """The smallest level that is sure enough, else the whole layer: `[B, m]` -> `[B]`."""
        sure = torch.cat([confidence >= self.accuracy, confidence.new_ones(len(confidence), 1).bool()], dim=1)
        return sure.int().argmax(1)


class ChosenLinear(nn.Module):
    """A linear layer that computes, for each row, only nodes its tables choose.

    With `last` its output is the network's: nodes left out get the least value computed for the row. Else it hands on
    the chosen values alone, group after group in one flat tensor, to a `ReadingLinear` that shares `choice`.

    Shapes: `[B, d]` -> `[B, n]`, or `[sum of nodes chosen]`.
    """

    def __init__(self, linear: nn.Linear, tables: NodeTables, choice: Choice, last: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.tables, self.choice, self.last = tables, choice, last

    def levels(self, x: Tensor) -> Tensor:
        """The level that each row `[B, d]` takes, `[B]`."""
        if self.choice.level is not None:
            return torch.full((len(x),), self.choice.level, device=x.device)
        return self.choice.levels(self.tables.confidence(self.tables.buckets(x)))

    def _groups(self, x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Rows that take the same level, and their nodes `[b, k]`."""
        sizes, level = self.choice.sizes, self.choice.level
        everyone = torch.arange(len(x), device=x.device)
        if level is not None and sizes[level] == sizes[-1]:
            return [(everyone, None)]  # nothing to choose: no hashing either
        buckets = self.tables.buckets(x)
        if level is not None:
            return [(everyone, self.tables.ranked(buckets, sizes[level]))]
        levels, found = self.choice.levels(self.tables.confidence(buckets)), []
        for number in levels.unique().tolist():
            rows = (levels == number).nonzero().flatten()
            whole = sizes[number] == sizes[-1]
            found.append((rows, None if whole else self.tables.ranked(buckets[rows], sizes[number])))
        return found

    def forward(self, x: Tensor) -> Tensor:
        groups = self._groups(x)
        values = [self._computed(x if len(rows) == len(x) else x[rows], nodes) for rows, nodes in groups]
        if not self.last:
            self.choice.groups = groups
            return torch.cat([v.flatten() for v in values])
        if len(groups) == 1 and groups[0][1] is None:
            return values[0]
        out = x.new_empty(len(x), len(self.weight))
        for (rows, nodes), v in zip(groups, values, strict=True):
            whole = v if nodes is None else v.amin(1, keepdim=True).repeat(1, len(self.weight)).scatter(1, nodes, v)
            out = whole if len(rows) == len(x) else out.index_copy(0, rows, whole)
        return out

    def _computed(self, x: Tensor, nodes: Tensor | None) -> Tensor:
        """Values of the chosen nodes: `[b, d]`, `[b, k]` -> `[b, k]`."""
        if nodes is None:
            return F.linear(x, self.weight, self.bias)
        if len(x) == 1:
            bias = None if self.bias is None else self.bias[nodes[0]]
            return F.linear(x, self.weight.index_select(0, nodes[0]), bias)
        step = max(1, ELEMENTS // (nodes.shape[1] * x.shape[1]))
        parts = zip(x.split(step), nodes.split(step), strict=True)
        values = torch.cat([torch.bmm(self.weight[n], row[:, :, None])[:, :, 0] for row, n in parts])
        return values if self.bias is None else values + self.bias[nodes]

    def extra_repr(self) -> str:
        return f"nodes={len(self.weight)}, levels={self.choice.sizes}, last={self.last}"


class ReadingLinear(nn.Module):
    """The linear layer after a `ChosenLinear`: it reads only the columns of the nodes that were computed.

    Its weight lies transposed, `[n, o]`, so that a column is one piece of memory.

    Shapes: `[sum of nodes chosen]` -> `[B, o]`.
    """

    def __init__(self, linear: nn.Linear, choice: Choice) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t().contiguous(), linear.weight.requires_grad)
        self.bias, self.choice = linear.bias, choice

    def forward(self, flat: Tensor) -> Tensor:
        groups, self.choice.groups = self.choice.groups, []
        sizes = [len(rows) * (len(self.weight) if nodes is None else nodes.shape[1]) for rows, nodes in groups]
        parts = []
        for (rows, nodes), v in zip(groups, flat.split(sizes), strict=True):
            parts.append(self._read(v.view(len(rows), -1), nodes))
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.cat([rows for rows, _ in groups]).argsort()]

    def _read(self, values: Tensor, nodes: Tensor | None) -> Tensor:
        """`[b, k]`, `[b, k]` -> `[b, o]`."""
        if nodes is None:
            out = values @ self.weight
        elif len(values) == 1:
            out = values @ self.weight.index_select(0, nodes[0])
        else:
            step = max(1, ELEMENTS // (nodes.shape[1] * self.weight.shape[1]))
            parts = zip(values.split(step), nodes.split(step), strict=True)
            out = torch.cat([torch.bmm(v[:, None], self.weight[n])[:, 0] for v, n in parts])
        return out if self.bias is None else out + self.bias


def chosen_in(model: nn.Module) -> ChosenLinear:
    """The layer of `model` whose nodes are chosen.

    Raises:
        ValueError: it has none.
    """
    for module in model.modules():
        if isinstance(module, ChosenLinear):
            return module
    raise ValueError("a network must have a layer whose nodes are chosen; this one has none. Apply `slo-nn` to it.")


def costs_of(layer: ChosenLinear, read: int = 0) -> list[int]:
    """Multiply-adds of one query at each level, the choosing counted where there is any.

    Args:
        read: outputs of the layer that reads its nodes, 0 for a network's last layer.
    """
    width, n = layer.weight.shape[1] + read, len(layer.weight)
    return [k * width + (layer.tables.overhead if k < n else 0) for k in layer.choice.sizes]
