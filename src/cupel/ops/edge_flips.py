"""Flipping edges at one node until a classifier errs: by a linear surrogate, by the network's own gradient, at random.

Pairs are `[2, P]` node numbers; flipping a pair adds the edge where there is none and removes it where there is one.
No attack here judges itself: the network is asked on the flipped graph by whoever calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.budget import Budget
from cupel.core.context import global_seed
from cupel.core.fit import fit
from cupel.core.tasks import Classification
from cupel.ops.graphs import segment_sum
from cupel.ops.node_graph import NodeGraph, listening, rewired
from cupel.ops.threats import margin

Allowed = Callable[[Tensor], Tensor]  # pairs [2, P] -> bool [P]: which of them are worth a flip
CHI2 = 0.004  # largest likelihood ratio of degrees that goes unnoticed (Nettack, section 4.1)


def flipped(edges: Tensor, pairs: Tensor, nodes: int) -> Tensor:
    """Edges `[2, E]` after flipping `pairs`, the smaller node first, in ascending order.

    >>> flipped(torch.tensor([[0, 0], [1, 2]]), torch.tensor([[2, 2], [0, 1]]), 3).tolist()
    [[0, 1], [1, 2]]
    """
    both = torch.cat((edges, pairs.sort(0).values), dim=1)
    code, count = (both[0] * nodes + both[1]).unique(return_counts=True)
    code = code[count % 2 == 1]
    return torch.stack((code // nodes, code % nodes))


def neighbours(edges: Tensor, node: int, nodes: int) -> Tensor:
    """`[N]` bool."""
    near = torch.zeros(nodes, dtype=torch.bool, device=edges.device)
    near[edges[1][edges[0] == node]] = True
    near[edges[0][edges[1] == node]] = True
    return near


def degrees(edges: Tensor, nodes: int) -> Tensor:
    return torch.bincount(edges.flatten(), minlength=nodes)


def linear_rows(edges: Tensor, h: Tensor, target: int) -> Tensor:
    """Row `target` of S^2 H after the flip of (target, u), for every u at once; for u = target the present row.

    S = D^-1/2 (A + I) D^-1/2. Only degrees of the two ends change, so the sums over neighbours need a correction and no
    new product.

    Shapes: edges `[2, E]`, h `[N, K]` -> `[N, K]`.

    Source: D. Zuegner, A. Akbarnejad, S. Guennemann, KDD 2018, arXiv 1805.07984, theorem 5.1, derived anew.
    """
    nodes, t = len(h), target
    into, source = edges.flatten(), edges.flip(0).flatten()
    near = neighbours(edges, t, nodes)
    d = (degrees(edges, nodes) + 1).to(h)
    sign = torch.where(near, -1.0, 1.0).to(h)
    sign[t] = 0.0
    own, other = (d[t] + sign)[:, None], (d + sign)[:, None]  # [N, 1] degrees of target and u after the flip
    g = h * d.rsqrt()[:, None]
    own_g, other_g = h[t] * own.rsqrt(), h * other.rsqrt()  # [N, K] g of target and u after the flip
    total = segment_sum(g[source], into, nodes) + g  # [N, K] sums over a node and its neighbours
    share = near.to(h) / d
    removed = near[:, None].to(h)
    added = 1 - removed
    added[t] = 0.0
    around = share @ total - removed * total / d[:, None]  # neighbours that stay, as they were
    weight = share.sum() - removed[:, 0] * share  # [N]
    common = segment_sum(share[source], into, nodes)[:, None]  # paths target - k - u
    around = around + weight[:, None] * (own_g - g[t]) + common * (other_g - g)
    self_sum = total[t] + own_g - g[t] + added * other_g - removed * g
    new = total + other_g - g + own_g
    return (around + self_sum / own + added * new / other) * own.rsqrt()


def unnoticed(edges: Tensor, first: Tensor, target: int) -> Tensor:
    """`[N]` bool: after the flip of (target, u) the degrees still follow the power law of those in `first` `[N]`.

    Likelihood ratio -2 l(both) + 2 (l(one) + l(other)) < 0.004, with l(D) = n log a + n a log 2 - (a + 1) sum log d and
    a = 1 + n / sum log(d / 1.5), over degrees of 2 and more.

    Source: Zuegner et al. 2018, section 4.1, equations 6 to 10.
    """
    nodes = len(first)
    near, now = neighbours(edges, target, nodes), degrees(edges, nodes)
    sign = torch.where(near, -1, 1)

    def parts(d: Tensor) -> tuple[Tensor, Tensor]:
        use = d >= 2
        return use.double(), torch.where(use, d.clamp_min(1).double().log(), 0.0)

    def likelihood(n: Tensor, logs: Tensor) -> Tensor:
        a = 1 + n / (logs - n * math.log(1.5)).clamp_min(1e-12)
        return n * a.log() + n * a * math.log(2) - (a + 1) * logs

    n, logs = (part.sum() for part in parts(now))
    for end, moved in ((now, now + sign), (now[target].expand(nodes), now[target] + sign)):
        before, after = parts(end), parts(moved)
        n, logs = n - before[0] + after[0], logs - before[1] + after[1]
    n0, logs0 = (part.sum() for part in parts(first))
    ratio = -2 * likelihood(n + n0, logs + logs0) + 2 * (likelihood(n, logs) + likelihood(n0, logs0))
    return ratio < CHI2


def surrogate(graph: NodeGraph, ids: Tensor, y: Tensor, classes: int, seed: int = 0) -> Tensor:
    """H = X W `[N, K]` of the linear network S^2 X W, W learned from the labels `y` of the nodes `ids` alone.

    S is the graph as it stands, its lens included. Nothing is asked of the network under attack.

    Source: Zuegner et al. 2018, section 4.
    """
    with torch.no_grad():
        x = graph.features()
        far = graph(graph(x))[ids].cpu()
    with global_seed(seed):
        layer = nn.Linear(graph.width, classes, bias=False)
    budget = Budget(epochs=100, batch_size=max(1, len(ids)), optimizer="adam", lr=1e-2, weight_decay=5e-4)
    fit(layer, (far, y.cpu()), Classification(classes), budget=budget, seed=seed)
    with torch.no_grad():
        h: Tensor = x @ layer.weight.to(x).T
    return h


@dataclass(frozen=True)
class Wiring:
    """What an adversary may do around one node.

    Args:
        edges: as they are, `[2, E]`.
        budget: flips.
        allowed: which pairs are worth one; all if none is given.
        stealthy: keep the degrees' power law, and every node's last edge.
    """

    edges: Tensor
    nodes: int
    budget: int
    allowed: Allowed | None = None
    stealthy: bool = True

    def worth(self, target: int) -> Tensor:
        """`[N]` bool: the ends u whose pair with `target` is worth a flip, before any."""
        u = torch.arange(self.nodes, device=self.edges.device)
        fine = u != target
        if self.allowed is None:
            return fine
        return fine & self.allowed(torch.stack((u, torch.full_like(u, target))).sort(0).values)

    def noticed(self, edges: Tensor, target: int) -> Tensor:
        """`[N]` bool: the ends u whose pair with `target` may not be flipped next."""
        if not self.stealthy:
            return torch.zeros(self.nodes, dtype=torch.bool, device=edges.device)
        near, now = neighbours(edges, target, self.nodes), degrees(edges, self.nodes)
        last = near & ((now <= 1) | (now[target] <= 1))
        return last | ~unnoticed(edges, degrees(self.edges, self.nodes), target)


def by_surrogate(wiring: Wiring, h: Tensor, target: int, label: int) -> Tensor:
    """Flips at `target` `[2, P]` that lower the surrogate's margin the most, one after the other.

    Source: Zuegner et al. 2018, algorithm 1, structure attack on the target itself.

    Departs: a step that would not lower the margin ends the attack.
    """
    edges, taken = wiring.edges, wiring.edges.new_zeros(0)
    y, worth = edges.new_full((len(h),), label), wiring.worth(target)
    while len(taken) < wiring.budget:
        gap = margin(linear_rows(edges, h, target), y)
        now = float(gap[target])
        gap[~worth | wiring.noticed(edges, target)] = torch.inf
        best = int(gap.argmin())
        if not float(gap[best]) < now:
            break
        worth[best] = False
        taken = torch.cat((taken, edges.new_tensor([best])))
        edges = flipped(edges, edges.new_tensor([[target], [best]]), wiring.nodes)
    return torch.stack((torch.full_like(taken, target), taken))


def slopes(heard: list[tuple[Tensor, Tensor]], loss: Tensor) -> tuple[Tensor, Tensor]:
    """G and X, `[N, C]` each, with d loss / d a_ij = G_i X_j + G_j X_i for every pair, edge or not.

    Every use of the adjacency is a product A x that was noted, so the sum over these is the whole derivative; whatever
    the network does with degrees or with low rank is in it.
    """
    grads = torch.autograd.grad(loss, [nudge for _, nudge in heard], allow_unused=True, materialize_grads=True)
    return torch.cat(grads, dim=1), torch.cat([x for x, _ in heard], dim=1)


def by_gradient(model: nn.Module, graph: NodeGraph, wiring: Wiring, target: int, label: int) -> Tensor:
    """Flips at `target` `[2, P]` by the steepest slope of the network's own margin, until it errs or all are spent.

    Source: H. Dai et al., Adversarial Attack on Graph Structured Data, ICML 2018, arXiv 1806.02371: GradArgmax.
    """
    edges, taken = wiring.edges, wiring.edges.new_zeros(0)
    here, y, worth = edges.new_tensor([target]), edges.new_tensor([label]), wiring.worth(target)
    while len(taken) < wiring.budget:
        with torch.enable_grad(), rewired(graph, edges), listening(graph) as heard:
            gap = margin(model(here), y)
            if float(gap.detach()) < 0:
                break
            g, x = slopes(heard, gap.sum())
        change = (x @ g[target] + g @ x[target]) * torch.where(neighbours(edges, target, wiring.nodes), -1.0, 1.0)
        change[~worth | wiring.noticed(edges, target)] = torch.inf
        best = int(change.argmin())
        if not float(change[best]) < 0:
            break
        worth[best] = False
        taken = torch.cat((taken, here.new_tensor([best])))
        edges = flipped(edges, here.new_tensor([[target], [best]]), wiring.nodes)
    return torch.stack((torch.full_like(taken, target), taken))


def at_random(wiring: Wiring, target: int, draw: torch.Generator) -> Tensor:
    """As many flips at `target` as the budget has, at random ends."""
    ends = torch.randperm(wiring.nodes, generator=draw)
    ends = ends[ends != target][: wiring.budget]
    return torch.stack((torch.full_like(ends, target), ends)).to(wiring.edges.device)
