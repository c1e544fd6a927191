"""`cora-gcn`: propagation and network against dense NumPy, the cut of the data, what a part of the graph is."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cupel.core.context import Context
from cupel.core.errors import MissingData, NotApplicable
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.nets.gcn import GCN
from cupel.ops.node_graph import NodeGraph, graph_in, rewired
from cupel.workloads.structured.cora_gcn import CoraGCN, nearest

torch.set_num_threads(1)


def random_edges(nodes: int, share: float, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    table = torch.rand(nodes, nodes, generator=draw).triu(1) > 1 - share
    return table.nonzero().T


def dense(edges: torch.Tensor, nodes: int) -> np.ndarray:
    a = np.eye(nodes)
    for i, j in edges.T.tolist():
        a[i, j] = a[j, i] = 1
    d = a.sum(1)
    return a / np.sqrt(np.outer(d, d))


def words(nodes: int, width: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(nodes, width, generator=draw) < 0.3).double() * torch.rand(nodes, width, generator=draw).double()


def test_propagation_is_the_dense_normalised_adjacency():
    edges, x = random_edges(9, 0.3), torch.randn(9, 4, dtype=torch.float64)
    edges = edges[:, (edges != 4).all(0)]  # node 4 stands alone
    graph = NodeGraph(edges, words(9, 5))
    assert np.allclose(graph(x).numpy(), dense(edges, 9) @ x.numpy())
    assert torch.allclose(graph(x)[4], x[4])


def test_features_come_back_and_dropout_touches_filled_cells_only():
    table = words(7, 6)
    graph = NodeGraph(random_edges(7, 0.4), table)
    assert torch.equal(graph.features(), table)
    assert torch.equal(graph.features(graph.values * 2), table * 2)


def test_network_is_two_convolutions_in_numpy():
    edges, table = random_edges(11, 0.3), words(11, 6)
    net = GCN(edges, table, 5, 3, 0.5).double().eval()
    s, w1, w2 = dense(edges, 11), net.conv1.weight.detach().numpy().T, net.conv2.weight.detach().numpy().T
    slow = s @ np.maximum(s @ table.numpy() @ w1, 0) @ w2
    ids = torch.tensor([3, 3, 10, 0])
    assert np.allclose(net(ids).detach().numpy(), slow[ids])


def test_training_drops_features_and_hidden_units():
    net = GCN(random_edges(11, 0.3), words(11, 6).float(), 50, 3, 0.5).train()
    ids = torch.arange(11)
    assert not torch.equal(net(ids), net(ids))
    net.thin.p = 0.0
    assert not torch.equal(net(ids), net(ids))
    net.dropout.p = 0.0
    assert torch.equal(net(ids), net(ids)) and torch.equal(net(ids), net.eval()(ids))


def test_rewired_edges_act_inside_and_are_put_back_after_an_error():
    edges, other, x = random_edges(8, 0.4), random_edges(8, 0.4, 1), torch.randn(8, 2, dtype=torch.float64)
    graph = NodeGraph(edges, words(8, 3))
    with pytest.raises(KeyError), rewired(graph, other):
        assert np.allclose(graph(x).numpy(), dense(other, 8) @ x.numpy())
        raise KeyError
    assert torch.equal(graph.edges, edges) and np.allclose(graph(x).numpy(), dense(edges, 8) @ x.numpy())


def test_shares_of_edges_are_weights():
    edges, x = torch.tensor([[0, 1], [1, 2]]), torch.eye(3, dtype=torch.float64)
    graph = NodeGraph(edges, words(3, 3))
    with rewired(graph, edges, torch.tensor([0.5, 0.0], dtype=torch.float64)):
        found = graph(x).numpy()
    assert np.allclose(found, [[1 / 1.5, 0.5 / 1.5, 0], [0.5 / 1.5, 1 / 1.5, 0], [0, 0, 1]])


def test_the_graph_is_found_or_its_lack_is_told():
    graph = NodeGraph(random_edges(5, 0.5), words(5, 3))
    assert graph_in(torch.nn.Sequential(graph), "x") is graph
    with pytest.raises(NotApplicable, match="got 0"):
        graph_in(torch.nn.Linear(2, 2), "x")
    with pytest.raises(NotApplicable, match="got 2"):
        graph_in(torch.nn.ModuleList([graph, copy.deepcopy(graph)]), "x")


def test_nearest_is_breadth_first():
    chain = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [6, 7]])
    assert nearest(chain, torch.tensor([2]), 3, 8).tolist() == [1, 2, 3]
    assert nearest(chain, torch.tensor([2]), 7, 8).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert nearest(chain, torch.tensor([2]), 8, 8).tolist() == list(range(8))


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty papers of three fields that cite within their field; words say nothing of it but in the labelled ones."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pairs = [(i, j) for i in range(60) for j in range(i + 1, 60) if labels[i] == labels[j] and rng.random() < 0.3]
    filled = [[labels[i]] if i < 12 else [3 + int(rng.integers(3))] for i in range(60)]
    (tmp_path / "planetoid").mkdir()
    np.savez(
        tmp_path / "planetoid" / "cora.npz",
        edges=np.array(pairs), labels=labels, feat_data=np.ones(60), feat_indices=np.array(filled).ravel(),
        feat_indptr=np.arange(61), feat_shape=np.array([60, 6]), train_idx=np.arange(12), val_idx=np.arange(12, 24),
        test_idx=np.arange(30, 60),
    )  # fmt: skip
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))


def test_citations_tell_what_words_do_not(planted):
    subject = build(CoraGCN(hidden=8), Context(seed=0))
    assert [len(part) for part in (subject.data.train, subject.data.valid, subject.data.test)] == [12, 12, 30]
    assert torch.equal(subject.data.test.inputs, torch.arange(30, 60))
    lone = copy.deepcopy(subject.model)
    graph_in(lone, "test").edges = torch.zeros(2, 0, dtype=torch.long)
    budget, right = replace(subject.budget, epochs=40, lr=0.05), []
    for net in (subject.model, lone):
        done = subject.with_model(fit(net, subject.data, subject.task, budget=budget, seed=0))
        right.append(float((done.outputs().argmax(1) == done.data.test.targets).double().mean()))
    assert right[0] == 1.0 and right[1] < 0.6


def test_a_part_keeps_labels_words_and_edges_among_its_papers(planted):
    whole, part = (build(CoraGCN(nodes=n), Context(seed=0)) for n in (0, 25))
    big, small = graph_in(whole.model, "x"), graph_in(part.model, "x")
    assert small.nodes == 25 and bool((small.edges[0] < small.edges[1]).all())
    table = {tuple(row) for row in big.features().tolist()}
    assert all(tuple(row) in table for row in small.features().tolist())
    inputs = torch.cat([p.inputs for p in (part.data.train, part.data.valid, part.data.test)])
    assert int(inputs.max()) < 25 and len(inputs.unique()) == len(inputs)
    # Citations stay within fields, so labels that moved with their papers agree along every edge.
    label = {int(i): int(y) for p in (part.data.train, part.data.valid, part.data.test) for i, y in
             zip(p.inputs, p.targets, strict=True)}  # fmt: skip
    ends = [(label[i], label[j]) for i, j in small.edges.T.tolist() if i in label and j in label]
    assert ends and all(a == b for a, b in ends)


def test_the_network_travels(planted):
    model, ids = build(CoraGCN(), Context(seed=0)).model.eval(), torch.arange(9)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids), model(ids))


def test_the_real_graph_is_the_public_one():
    try:
        subject = build(CoraGCN(), Context(seed=0))
    except MissingData as error:
        pytest.skip(str(error))
    graph = graph_in(subject.model, "x")
    assert graph.nodes == 2708 and graph.edges.shape == (2, 5278) and graph.width == 1433
    assert [len(p) for p in (subject.data.train, subject.data.valid, subject.data.test)] == [140, 500, 1000]
    assert torch.bincount(subject.data.train.targets).tolist() == [20] * 7
    sums = graph.features().sum(1)
    assert torch.allclose(sums[sums > 0], torch.ones(int((sums > 0).sum())))
