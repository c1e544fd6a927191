"""A graph convolutional network over one graph: it is asked for nodes by number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cupel.ops.node_graph import NodeGraph


class GCN(nn.Module):
    """Two graph convolutions: logits = S relu(S X W1) W2 at the nodes asked for, S the graph's normalised sum.

    Dropout falls on the features that are not zero and on the hidden units.

    Shapes: node numbers `[B]` int64 -> logits `[B, classes]`.

    Source: T. Kipf, M. Welling, Semi-Supervised Classification with Graph Convolutional Networks, ICLR 2017, arXiv
    1609.02907, equation 9.
    """

    def __init__(self, edges: Tensor, features: Tensor, hidden: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.graph = NodeGraph(edges, features)
        self.conv1 = nn.Linear(features.shape[1], hidden, bias=False)
        self.conv2 = nn.Linear(hidden, classes, bias=False)
        self.act = nn.ReLU()
        self.thin, self.dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        for layer in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, nodes: Tensor) -> Tensor:
        graph = self.graph
        table = graph.features(self.thin(graph.values))
        hidden = self.dropout(self.act(graph(self.conv1(table))))
        out: Tensor = graph(self.conv2(hidden))
        return torch.index_select(out, 0, nodes)
