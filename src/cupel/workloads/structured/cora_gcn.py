"""Workload `cora-gcn`: the field of a paper told from its words and from the papers it cites."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Budget, Examples, Splits, Subject
from cupel.data.planetoid import Citations
from cupel.data.sets import load
from cupel.nets.gcn import GCN

CARD = Card(
    name="cora-gcn",
    family="structured",
    source="T. Kipf, M. Welling, Semi-Supervised Classification with Graph Convolutional Networks, ICLR 2017, arXiv "
    "1609.02907; data: Z. Yang, W. Cohen, R. Salakhutdinov, ICML 2016, arXiv 1603.08861",
    tags=("graph", "node-classification", "gcn", "citations", "transductive", "small"),
    gives=("weights", "gradients", "members", "classes", "graph"),
    expects="0.815 test accuracy on the public split (Kipf and Welling 2017, table 2)",
    tiny={"nodes": 160, "hidden": 4, "dropout": 0.0},
)


@dataclass(frozen=True)
class CoraGCN:
    r"""Tell the field of papers from few labels, with a two-layer graph convolutional network over their citations.

    logits = S relu(S X W1) W2, S = D^-1/2 (A + I) D^-1/2; X holds the words of every paper, each row of sum 1.

    The network holds features and edges as buffers of its part `graph` (a `cupel.ops.node_graph.NodeGraph`) and is
    asked for nodes by number; examples are node numbers. What the edges are can be changed there, for a time or for
    good.

    Use: for methods on graphs and on node classifiers. The training loss sees 140 labels but all words and edges, those
    of test papers too.

    Costs: 23 thousand weights; a fit of 200 full-batch updates takes some 5 s on one core.

    Shapes: inputs `[B]` int64 node numbers, targets `[B]` in 0..6, logits `[B, 7]`.

    Raises:
        MissingData: the file `planetoid/cora.npz` is not on this machine, or broken.

    Source: Kipf and Welling 2017; the public split of Yang et al. 2016: 140 training, 500 validation, 1,000 test
    papers.

    Departs: weight decay is on both layers (the paper's on the first alone); no early stopping.

    Example:
        >>> CoraGCN(hidden=32).dropout
        0.5
    """

    hidden: int = param(16, "hidden units", ge=1, le=4096)
    dropout: float = param(0.5, "share of features and of hidden units dropped in training", ge=0, lt=1)
    nodes: int = param(0, "most papers: those nearest to the first training papers (0: all)", ge=0)

    def build(self, ctx: Context) -> Subject:
        cora: Citations = load("cora")
        total = len(cora.labels)
        kept = nearest(cora.edges, cora.train[: self.nodes // 8 + 1], min(self.nodes or total, total), total)
        place = torch.full((total,), -1)
        place[kept] = torch.arange(len(kept))
        edges = place[cora.edges.T]
        edges = edges[:, (edges >= 0).all(0)].sort(0).values
        features = cora.features[kept] / cora.features[kept].sum(1, keepdim=True).clamp_min(1)
        with ctx.scope("init"):
            net = GCN(edges, features, self.hidden, cora.classes, self.dropout)
        parts = (place[part] for part in (cora.train, cora.valid, cora.test))
        labels = cora.labels[kept]
        return Subject(
            net,
            Splits(*(Examples(part[part >= 0], labels[part[part >= 0]], part[part >= 0]) for part in parts)),
            Classification(cora.classes),
            Anatomy(head="conv2"),
            Budget(epochs=200, batch_size=256, optimizer="adam", lr=1e-2, weight_decay=5e-4),
        )


def nearest(edges: Tensor, first: Tensor, count: int, nodes: int) -> Tensor:
    """`count` nodes in ascending order, found breadth first from `first`; then any others.

    >>> nearest(torch.tensor([[0, 3], [3, 4], [1, 2]]), torch.tensor([4]), 3, 5).tolist()
    [0, 3, 4]
    """
    if count >= nodes:
        return torch.arange(nodes)
    order, seen = [first], torch.zeros(nodes, dtype=torch.bool)
    seen[first] = True
    while len(order[-1]):
        edge = torch.zeros(nodes, dtype=torch.bool)
        edge[order[-1]] = True
        reached = torch.zeros_like(seen)
        reached[edges[edge[edges[:, 0]], 1]] = True
        reached[edges[edge[edges[:, 1]], 0]] = True
        order.append((reached & ~seen).nonzero().flatten())
        seen |= reached
    found: Tensor = torch.cat([*order, (~seen).nonzero().flatten()])[:count].sort().values
    return found
