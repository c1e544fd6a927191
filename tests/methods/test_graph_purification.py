"""`graph-purification`: similarity against sets, low rank against an SVD, its gradient, and attacks through both."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.nets.gcn import GCN
from cupel.ops.edge_flips import slopes
from cupel.ops.node_graph import AlikeEdges, LowRankEdges, NodeGraph, jaccard, listening, ones_in, packed_bits, rewired
from cupel.ops.relaxed_flips import fooling, random_pairs
from cupel.storage.blueprint import built, drawn
from cupel.techniques.robust.graph_purification import GraphPurification

torch.set_num_threads(1)


def wired(nodes: int, share: float, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(nodes, nodes, generator=draw).triu(1) > 1 - share).nonzero().T


def table(edges: Tensor, nodes: int) -> Tensor:
    a = torch.zeros(nodes, nodes, dtype=torch.float64)
    a[edges[0], edges[1]] = 1
    return a + a.T


def graph_of(nodes: int = 20, width: int = 70, seed: int = 0) -> NodeGraph:
    draw = torch.Generator().manual_seed(seed)
    words = (torch.rand(nodes, width, generator=draw, dtype=torch.float64) < 0.15).double()
    return NodeGraph(wired(nodes, 0.3, seed), words * 0.25)


def network(seed: int = 0) -> GCN:
    graph = graph_of(seed=seed)
    torch.manual_seed(seed)
    return GCN(graph.edges, graph.features(), 4, 3, 0.5).double().eval()


def low(a: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(a)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_bits_are_counted():
    numbers = torch.randint(2**32, (50,))
    assert ones_in(numbers).tolist() == [bin(n).count("1") for n in numbers.tolist()]
    assert ones_in(torch.tensor([2**32 - 1, 2**31, 0])).tolist() == [32, 1, 0]


def test_similarity_is_that_of_sets():
    graph = graph_of()
    sets = [set(row.nonzero().flatten().tolist()) for row in graph.features()]
    pairs = random_pairs(20, 99, torch.Generator().manual_seed(0))
    slow = [len(sets[i] & sets[j]) / max(1, len(sets[i] | sets[j])) for i, j in pairs.T.tolist()]
    found = jaccard(packed_bits(graph.cells, 20, 70), pairs)
    assert torch.allclose(found.double(), torch.tensor(slow, dtype=torch.float64), atol=1e-6) and max(slow) > 0.2


def test_unlikely_edges_are_not_seen_whatever_the_edges_are():
    graph, x = graph_of(), torch.randn(20, 3, dtype=torch.float64)
    graph.lens = AlikeEdges(graph, 0.1)
    for edges in (graph.edges, wired(20, 0.5, 7)):
        similar = jaccard(graph.lens.bits, edges) >= 0.1
        assert 0 < int(similar.sum()) < edges.shape[1]
        plain = NodeGraph(edges[:, similar], graph.features())
        with rewired(graph, edges):
            assert torch.allclose(graph(x), plain(x))


def test_low_rank_is_the_truncated_svd():
    graph = graph_of()
    lens = LowRankEdges(graph, 5, spare=4)
    eye = torch.eye(20, dtype=torch.float64)
    for edges in (graph.edges, wired(20, 0.4, 3)):
        with rewired(graph, edges):
            assert torch.allclose(lens.seen(graph.times())(eye), low(table(edges, 20), 5), atol=1e-3)
    graph.lens = lens
    a = low(table(graph.edges, 20), 5)
    root = (a.sum(1) + 1).clamp_min(1).rsqrt()
    x = torch.randn(20, 3, dtype=torch.float64)
    assert torch.allclose(graph(x), root[:, None] * ((a + eye) @ (root[:, None] * x)), atol=1e-3)


class Against(nn.Module):
    """A lens that turns every edge into its opposite, as entries of a low-rank adjacency can be negative."""

    def weigh(self, pairs: Tensor, weight: Tensor) -> Tensor:
        return -weight

    def seen(self, times):
        return times


def test_degrees_are_never_below_the_self_loop():
    graph, x = graph_of(), torch.randn(20, 3, dtype=torch.float64)
    graph.lens = Against()
    assert torch.allclose(graph(x), x - table(graph.edges, 20) @ x)


def test_full_rank_is_the_graph_itself():
    graph, x = graph_of(), torch.randn(20, 3, dtype=torch.float64)
    plain = graph(x)
    graph.lens = LowRankEdges(graph, 20)
    assert torch.allclose(graph(x), plain, atol=1e-5)


def test_the_gradient_through_low_rank_is_that_along_the_tangent():
    net = network()
    y = torch.arange(20) % 3
    net.graph.lens = LowRankEdges(net.graph, 6, spare=8)
    a = table(net.graph.edges, 20).requires_grad_()
    with torch.no_grad():
        value, vectors = torch.linalg.eigh(a)
        top = vectors[:, value.abs().argsort(descending=True)[:6]]
        p = top @ top.T
    seen = p @ a + a @ p - p @ a @ p
    root = (seen.sum(1) + 1).clamp_min(1).rsqrt()
    s = (seen + torch.eye(20, dtype=a.dtype)) * root[:, None] * root
    out = s @ torch.relu(s @ net.graph.features() @ net.conv1.weight.T) @ net.conv2.weight.T
    (full,) = torch.autograd.grad(fooling(out, y), a)
    with listening(net.graph) as heard:
        g, x = slopes(heard, fooling(net(torch.arange(20)), y))
    assert torch.allclose(g @ x.T + x @ g.T, full + full.T, atol=2e-4)
    assert float((full + full.T).abs().max()) > 0.02


def test_what_is_trained_learns_on_the_filtered_graph():
    for made in (GraphPurification(least=0.1), GraphPurification(by="svd", rank=4)):
        net = network()
        before = net(torch.arange(20)).detach()
        same = made.model(net, Context())
        assert same is net and not torch.allclose(net(torch.arange(20)), before, atol=1e-3)


def test_a_zero_threshold_leaves_the_network_as_it_is():
    net = network()
    assert GraphPurification(least=0.0).model(net, Context()) is net and net.graph.lens is None


@pytest.mark.parametrize("made", [GraphPurification(least=0.1), GraphPurification(by="svd", rank=4)])
def test_the_network_travels_and_is_stored(made):
    net, ids = made.model(network(), Context()), torch.arange(20)
    plain, tensors = drawn(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), built(plain, tensors)):
        with rewired(other.graph, wired(20, 0.4, 5)), rewired(net.graph, wired(20, 0.4, 5)):
            assert torch.equal(other(ids), net(ids))


def test_it_tells_why_it_cannot_stand():
    with pytest.raises(PlanError, match="NodeGraph"):
        GraphPurification().model(nn.Linear(2, 2), Context())
    net = GraphPurification().model(network(), Context())
    with pytest.raises(PlanError, match="alone"):
        replace(GraphPurification(), by="svd").model(net, Context())
