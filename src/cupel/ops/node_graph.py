"""The graph of a node classifier as one part of the network, so that attacks and defences can find and change it.

A network that classifies the nodes of one graph holds a `NodeGraph` and sends its features through it. Whoever wants
to change edges asks `graph_in(model)` for it and opens `rewired`; whoever filters edges sets its `lens`. An attack that
flips edges then meets every filter that stands in the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cupel.core.errors import NotApplicable
from cupel.ops.graphs import segment_sum

Times = Callable[[Tensor], Tensor]  # x [N, D] -> A x [N, D], A the symmetric adjacency without self loops
Heard = list[tuple[Tensor, Tensor]]  # per product with A: its input, and zeros that were added to its output
DEPTH = 4  # products with A between two Rayleigh-Ritz steps


class NodeGraph(nn.Module):
    """Undirected edges and sparse features of nodes; called with `x` it returns the normalised sum over neighbours.

    D^-1/2 (A + I) D^-1/2 x, with D the row sums of A + I, never below the self loop's 1. A is the adjacency as the
    `lens` lets it be seen; without a lens that of `edges`.

    Shapes: edges `[2, E]` int64, the smaller node first, each once; features `[N, F]`; x `[N, D]` -> `[N, D]`.

    Source: T. Kipf, M. Welling, ICLR 2017, arXiv 1609.02907, equation 2 with the renormalisation of section 2.2.
    """

    edges: Tensor
    cells: Tensor
    values: Tensor

    def __init__(self, edges: Tensor, features: Tensor) -> None:
        super().__init__()
        self.nodes, self.width = features.shape
        cells = features.nonzero().T
        self.register_buffer("edges", edges.contiguous())
        self.register_buffer("cells", cells.to(torch.int32).contiguous())
        self.register_buffer("values", features[cells[0], cells[1]])
        self.lens: AlikeEdges | LowRankEdges | None = None
        self.weight: Tensor | None = None  # [E] shares of every edge while an attack relaxes the graph
        self.heard: Heard | None = None

    def features(self, values: Tensor | None = None) -> Tensor:
        """The features as a table `[N, F]`, with other `values` in the filled cells if given."""
        table = self.values.new_zeros(self.nodes, self.width)
        return table.index_put(tuple(self.cells.long()), self.values if values is None else values)

    def times(self) -> Times:
        """The product with A as the lens lets it be seen."""
        edges = self.edges
        weight = self.values.new_ones(edges.shape[1]) if self.weight is None else self.weight
        if self.lens is not None:
            weight = self.lens.weigh(edges, weight)
        into, source = edges.flatten(), edges.flip(0).flatten()
        both = torch.cat((weight, weight))[:, None]

        def product(x: Tensor) -> Tensor:
            out = segment_sum(both * x[source], into, self.nodes)
            if self.heard is None or not torch.is_grad_enabled():
                return out
            nudge = torch.zeros_like(out, requires_grad=True)
            self.heard.append((x.detach(), nudge))
            return out + nudge

        return product if self.lens is None else self.lens.seen(product)

    def forward(self, x: Tensor) -> Tensor:
        times = self.times()
        degree = (times(x.new_ones(self.nodes, 1)) + 1).clamp_min(1)
        scaled = x * degree.rsqrt()
        return (times(scaled) + scaled) * degree.rsqrt()


def graph_in(model: nn.Module, who: str) -> NodeGraph:
    """The graph that `model` holds.

    Raises:
        NotApplicable: it holds none, or more than one.
    """
    found = [part for part in model.modules() if isinstance(part, NodeGraph)]
    if len(found) != 1:
        raise NotApplicable(
            f"{who} must find one cupel.ops.node_graph.NodeGraph in the network; got {len(found)}. Let the network "
            "send its features through one."
        )
    return found[0]


@contextmanager
def rewired(graph: NodeGraph, edges: Tensor, weight: Tensor | None = None) -> Iterator[NodeGraph]:
    """Inside, `graph` has other edges `[2, E]`, with shares `[E]` if given."""
    before = graph.edges, graph.weight
    graph.edges, graph.weight = edges, weight
    try:
        yield graph
    finally:
        graph.edges, graph.weight = before


@contextmanager
def listening(graph: NodeGraph) -> Iterator[Heard]:
    """Inside, every product with A is noted: what went in, and zeros whose gradient is that of what came out."""
    heard: Heard = []
    graph.heard = heard
    try:
        yield heard
    finally:
        graph.heard = None


def packed_bits(cells: Tensor, nodes: int, width: int) -> Tensor:
    """Which of `width` words every node has, 32 to a number: cells `[2, M]` (node, word) -> `[N, ceil(width / 32)]`.

    >>> packed_bits(torch.tensor([[0, 0, 1], [0, 33, 1]]), 2, 40).tolist()
    [[1, 2], [2, 0]]
    """
    node, word = cells.long()
    count = -(-width // 32)
    bits = torch.zeros(nodes * count, dtype=torch.long, device=cells.device)
    return bits.index_add(0, node * count + word // 32, 1 << (word % 32)).view(nodes, count)


def ones_in(bits: Tensor) -> Tensor:
    """How many of the lowest 32 bits are set, element by element.

    >>> ones_in(torch.tensor([0, 7, 2**32 - 1])).tolist()
    [0, 3, 32]
    """
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24) & 0x3F


def jaccard(bits: Tensor, pairs: Tensor) -> Tensor:
    """Shared words over all words of both nodes; 0 where neither has one.

    Shapes: bits `[N, W]` as `packed_bits` makes them; pairs `[2, P]` -> `[P]`.

    >>> jaccard(packed_bits(torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 1, 2, 5, 7]]), 3, 8), torch.tensor(
    ...     [[0, 0], [1, 2]])).tolist()
    [0.5, 0.0]
    """
    one, other = bits[pairs[0]], bits[pairs[1]]
    return ones_in(one & other).sum(1) / ones_in(one | other).sum(1).clamp_min(1)


class AlikeEdges(nn.Module):
    """Lets edges be seen whose ends share enough words: Jaccard similarity of the filled cells at least `least`.

    Source: H. Wu et al., IJCAI 2019, arXiv 1903.01610, section 4.
    """

    bits: Tensor

    def __init__(self, graph: NodeGraph, least: float) -> None:
        super().__init__()
        self.least = least
        self.register_buffer("bits", packed_bits(graph.cells, graph.nodes, graph.width))

    def weigh(self, pairs: Tensor, weight: Tensor) -> Tensor:
        """`[P]` shares with those of unlikely pairs at zero."""
        return weight * (jaccard(self.bits, pairs) >= self.least)

    def seen(self, times: Times) -> Times:
        return times


class LowRankEdges(nn.Module):
    """Lets the best approximation of rank `rank` be seen: A_r = P A, P the projector on the strongest eigenvectors.

    A_r x is computed as P A x + A P x - P A P x. The value is the same, and with P held fixed the gradient is the one
    along the tangent of the matrices of that rank: what an attack feels that knows this step.

    P is found anew for every graph, from `basis` on, the directions of the graph that the lens was made for.

    Source: N. Entezari et al., All You Need Is Low (Rank), WSDM 2020, section 5.
    """

    basis: Tensor

    def __init__(self, graph: NodeGraph, rank: int, spare: int = 10) -> None:
        super().__init__()
        self.rank = rank
        width = min(rank + spare, graph.nodes)
        # Any start does; a fixed one draws no random number.
        start = torch.cos(torch.outer(torch.arange(graph.nodes) + 0.5, torch.arange(width) + 1.0) * 1.7)
        self.register_buffer("basis", torch.linalg.qr(start).Q.to(graph.values))
        self.basis.copy_(strongest(graph.times(), self.basis, rank, 1e-6, 300))

    def weigh(self, pairs: Tensor, weight: Tensor) -> Tensor:
        return weight

    def seen(self, times: Times) -> Times:
        u = strongest(times, self.basis, self.rank, 1e-5, 50)[:, : self.rank].contiguous()
        au = times(u)
        inner = u.T @ au

        def through(x: Tensor) -> Tensor:
            inside = u.T @ x
            out: Tensor = u @ (u.T @ times(x) - inner @ inside) + au @ inside
            return out

        return through


@torch.no_grad()
def strongest(times: Times, start: Tensor, rank: int, tolerance: float, most: int) -> Tensor:
    """Orthonormal directions `[N, W]`, the first `rank` of them eigenvectors of A of largest absolute eigenvalue.

    Block Krylov iteration: Rayleigh-Ritz in the span of q, A q, A^2 q ..., from q = `start` `[N, W]`, again and again
    until ||A u - lambda u|| of the first `rank` is at most `tolerance` of the largest eigenvalue, or `most` rounds are
    over.

    Source: C. Musco, C. Musco, Randomized Block Krylov Methods, NeurIPS 2015, arXiv 1504.05477, algorithm 2.
    """
    q = space = start
    for k in range(most):
        image = times(space)
        value, turn = torch.linalg.eigh(space.T @ image)
        order = value.abs().argsort(descending=True)[: q.shape[1]]
        value, turn = value[order], turn[:, order]
        q, aq = space @ turn, image @ turn
        off = (aq - q * value)[:, :rank].norm(dim=0).amax()
        if k == most - 1 or float(off) <= tolerance * max(float(value[0].abs()), 1e-12):
            break
        spans = [q, aq]
        for _ in range(DEPTH - 1):
            spans.append(times(spans[-1] / spans[-1].norm(dim=0).clamp_min(1e-12)))
        space = torch.linalg.qr(torch.cat(spans, dim=1)).Q
    return q
