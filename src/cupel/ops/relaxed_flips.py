"""Flipping edges anywhere in a graph so that a node classifier errs on many nodes at once.

Pairs are `[2, P]` node numbers, the smaller first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.descend import descend
from cupel.ops.edge_flips import Allowed, flipped, slopes
from cupel.ops.node_graph import NodeGraph, listening, rewired
from cupel.ops.threats import margin


def random_pairs(nodes: int, count: int, draw: torch.Generator) -> Tensor:
    """`count` different pairs `[2, count]`, the smaller node first (fewer where the graph has fewer)."""
    count = min(count, nodes * (nodes - 1) // 2)
    code = torch.zeros(0, dtype=torch.long)
    while len(code) < count:
        a, b = torch.randint(nodes, (2, 2 * count), generator=draw).sort(0).values
        code = torch.cat((code, (a * nodes + b)[a != b])).unique()
    code = code[torch.randperm(len(code), generator=draw)[:count]]
    return torch.stack((code // nodes, code % nodes))


def steepest(edges: Tensor, g: Tensor, x: Tensor, count: int, rows: int = 1024) -> Tensor:
    """The `count` pairs `[2, count]` of all whose flip lowers the loss fastest (see `slopes`), smaller node first."""
    nodes, best, where = len(g), g.new_zeros(0), torch.zeros(0, dtype=torch.long, device=g.device)
    for low in range(0, nodes, rows):
        high = min(low + rows, nodes)
        change = g[low:high] @ x.T + x[low:high] @ g.T  # [R, N]
        mine = edges[:, (edges[0] >= low) & (edges[0] < high)]
        change[mine[0] - low, mine[1]] *= -1
        late = torch.arange(nodes, device=g.device) <= torch.arange(low, high, device=g.device)[:, None]
        change = change.masked_fill(late, torch.inf).flatten()
        top = change.topk(min(count, len(change)), largest=False)
        best, where = torch.cat((best, top.values)), torch.cat((where, top.indices + low * nodes))
        keep = best.topk(min(count, len(best)), largest=False).indices
        best, where = best[keep], where[keep]
    where = where[best < 0]
    return torch.stack((where // nodes, where % nodes))


def into_budget(s: Tensor, budget: float) -> Tensor:
    """The nearest point with entries in [0, 1] and a sum of at most `budget`, `[M]`.

    Source: Xu et al. 2019, proposition 1: clip(s - mu) with mu by bisection.

    >>> into_budget(torch.tensor([2.0, 0.5, 0.3]), 1.5).tolist()
    [1.0, 0.35..., 0.15...]
    """
    if float(s.clamp(0, 1).sum()) <= budget:
        return s.clamp(0, 1)
    low, high = float(s.min()) - 1, float(s.max())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if float((s - middle).clamp(0, 1).sum()) > budget else (low, middle)
    return (s - high).clamp(0, 1)


def fooling(logits: Tensor, y: Tensor) -> Tensor:
    """Sum of tanh of the margins of log-probabilities: nodes near the boundary count, lost and safe ones hardly do.

    Source: S. Geisler et al., Robustness of Graph Neural Networks at Scale, NeurIPS 2021, arXiv 2110.14038, section 2.
    """
    return margin(logits.log_softmax(1), y).tanh().sum()


@dataclass(frozen=True)
class Relaxed:
    """A whole graph under attack by projected gradient: shares of flips of many pairs at once, then real flips.

    s <- P(s - lr / sqrt(k) g / max |g|) over a block of pairs, P onto 0 <= s <= 1 with a sum of at most the budget. The
    block holds pairs that already have a share and those of steepest slope among all; it is renewed every round. The
    shares are then drawn `draws` times, and the draw that leaves fewest nodes right is taken.

    Args:
        budget: flips in the whole graph.
        rounds, steps: renewals of the block, and moves in each.
        block: pairs in it.

    Source: K. Xu et al., Topology Attack and Defense for Graph Neural Networks, IJCAI 2019, arXiv 1906.04214, algorithm
    1; the block: Geisler et al. 2021, algorithm 1.

    Departs: the block holds the steepest pairs instead of random ones; the loss is `fooling`.
    """

    budget: int
    rounds: int = 5
    steps: int = 20
    block: int = 10_000
    draws: int = 20
    lr: float = 0.5
    allowed: Allowed | None = None

    def flips(self, model: nn.Module, graph: NodeGraph, ids: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
        """Pairs `[2, P]` of the found flips, P at most the budget."""
        edges = graph.edges
        pairs, s = edges[:, :0], graph.values[:0]
        for number in range(self.rounds):
            pairs, s = self._renewed(model, graph, ids, y, pairs, s)
            if not len(s):
                break
            sign, weight = signs(edges, pairs, graph.nodes).to(s), s.new_ones(edges.shape[1])

            def objective(
                here: Tensor, rows: Tensor, pairs: Tensor = pairs, sign: Tensor = sign, weight: Tensor = weight
            ) -> tuple[Tensor, None]:
                wired = torch.cat((edges, pairs), 1), torch.cat((weight, sign * here[0]))
                with rewired(graph, *wired):
                    return fooling(model(ids), y)[None], None

            def move(here: Tensor, grad: Tensor, rows: Tensor, k: int, before: int = number * self.steps) -> Tensor:
                size = self.lr / math.sqrt(before + k + 1)
                return here - size * grad / grad.abs().amax().clamp_min(1e-12)

            s = descend(s[None], objective, self.steps, move, lambda new, _: into_budget(new[0], self.budget)[None])[0]
        return self._drawn(model, graph, ids, y, pairs, s, draw)

    def _renewed(
        self, model: nn.Module, graph: NodeGraph, ids: Tensor, y: Tensor, pairs: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The block and its shares: what has one stays, the steepest pairs of all join with none."""
        edges, used = graph.edges, s > 0
        pairs, s = pairs[:, used], s[used]
        sign = signs(edges, pairs, graph.nodes).to(s)
        weight = torch.cat((s.new_ones(edges.shape[1]), sign * s))
        with torch.enable_grad(), rewired(graph, torch.cat((edges, pairs), 1), weight), listening(graph) as heard:
            g, x = slopes(heard, fooling(model(ids), y))
        fresh = steepest(edges, g, x, 2 * self.block)
        if self.allowed is not None:
            fresh = fresh[:, self.allowed(fresh)]
        code, known = fresh[0] * graph.nodes + fresh[1], pairs[0] * graph.nodes + pairs[1]
        fresh = fresh[:, ~torch.isin(code, known)][:, : self.block]
        return torch.cat((pairs, fresh), 1), torch.cat((s, s.new_zeros(fresh.shape[1])))

    def _drawn(
        self,
        model: nn.Module,
        graph: NodeGraph,
        ids: Tensor,
        y: Tensor,
        pairs: Tensor,
        s: Tensor,
        draw: torch.Generator,
    ) -> Tensor:
        """The best of the likeliest flips and of `draws` draws."""
        tries = [s.topk(min(self.budget, int((s > 0).sum()))).indices]
        for _ in range(self.draws):
            hit = (torch.rand(len(s), generator=draw).to(s.device) < s).nonzero().flatten()
            tries.append(hit[torch.randperm(len(hit), generator=draw).to(s.device)][: self.budget])
        found = []
        for rows in tries:
            with torch.no_grad(), rewired(graph, flipped(graph.edges, pairs[:, rows], graph.nodes)):
                out = model(ids)
            found.append((int((out.argmax(1) == y).sum()), float(fooling(out, y))))
        return pairs[:, tries[min(range(len(tries)), key=found.__getitem__)]]


def signs(edges: Tensor, pairs: Tensor, nodes: int) -> Tensor:
    """+1 for pairs without an edge, -1 for edges, `[P]`; both with the smaller node first."""
    known = torch.isin(pairs[0] * nodes + pairs[1], edges[0] * nodes + edges[1])
    return torch.where(known, -1, 1)
