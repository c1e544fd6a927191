"""Technique `graph-purification`: the network sees the graph through a filter that forged edges should not pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable, PlanError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.ops.node_graph import AlikeEdges, LowRankEdges, graph_in

CARD = Card(
    name="graph-purification",
    family="robust",
    source="H. Wu et al., Adversarial Examples on Graph Data: Deep Insights into Attack and Defense, IJCAI 2019, arXiv "
    "1903.01610; N. Entezari, S. Al-Sayouri, A. Darvishzadeh, E. Papalexakis, All You Need Is Low (Rank): Defending "
    "Against Adversarial Attacks on Graphs, WSDM 2020",
    tags=("defence", "graphs", "evasion", "poisoning", "jaccard", "svd", "low rank", "preprocessing"),
    needs=("weights", "graph", "classes"),
    tiny={"by": "svd", "rank": 6},
    neutral={"by": "jaccard", "least": 0.0},
)


@dataclass(frozen=True)
class GraphPurification:
    r"""Train and ask a network on a graph without its unlikely edges, or on the low-rank part of it.

    jaccard: an edge (i, j) is seen if |w_i and w_j| / |w_i or w_j| >= least, w the words (non-zero features) of a node.
    svd: A is seen as A_r = sum of its `rank` strongest eigenpairs lambda u u^T; degrees are the row sums of A_r + I, at
    least 1. The filter stands in the network, before the normalisation, so it works on whatever edges it is given later
    and an attack on the network is an attack through it.

    Use: where edges may be forged and an adversary does not know of the filter. Not as a protection from one who does:
    flips that pass the filter are found as easily, see the record of its claim. jaccard needs features that tell how
    alike linked nodes are; svd costs clean accuracy.

    Costs: jaccard: a byte for every node and four words, and a comparison for every edge at every call. svd: 4 bytes x
    nodes x (rank + 10), and eigenvectors at every call, quickly found where the graph is near the one it was made for.

    Raises:
        PlanError: the network holds no `cupel.ops.node_graph.NodeGraph`, or is filtered already.

    Source: Wu et al. 2019, section 4; Entezari et al. 2020, section 5.

    Departs: eigenpairs stand for singular triples, which are the same up to sign for a symmetric matrix; degrees of A_r
    are kept at 1 or more, its entries are not clipped.

    Example:
        >>> GraphPurification(by="svd").rank
        50
    """

    by: str = param("jaccard", "which filter", choices=("jaccard", "svd"))
    least: float = param(0.01, "smallest Jaccard similarity of words at an edge that is seen (jaccard)", ge=0, le=1)
    rank: int = param(50, "eigenpairs of the adjacency that are seen (svd)", ge=1)

    def model(self, model: nn.Module, ctx: Context) -> nn.Module:
        if self.by == "jaccard" and not self.least:
            return model
        try:
            graph = graph_in(model, "graph-purification")
        except NotApplicable as error:
            raise PlanError(str(error)) from None
        if graph.lens is not None:
            raise PlanError("graph-purification must stand alone on a graph; got one with a filter. Use it once.")
        made = AlikeEdges(graph, self.least) if self.by == "jaccard" else LowRankEdges(graph, self.rank)
        graph.lens = made.to(graph.edges.device)
        return model
