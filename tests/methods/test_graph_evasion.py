"""`graph-evasion`: the surrogate's closed form and every attack against brute force on small graphs; what is kept."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cupel.core.context import Context, seeded
from cupel.core.errors import NotApplicable
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject, still
from cupel.nets.gcn import GCN
from cupel.ops.edge_flips import (
    Wiring,
    at_random,
    by_gradient,
    by_surrogate,
    flipped,
    linear_rows,
    neighbours,
    slopes,
    surrogate,
    unnoticed,
)
from cupel.ops.node_attack import NodeThreat, masked, siege, stands
from cupel.ops.node_graph import AlikeEdges, NodeGraph, listening, rewired
from cupel.ops.relaxed_flips import Relaxed, fooling, into_budget, random_pairs, signs, steepest
from cupel.ops.threats import margin
from cupel.probes.robust.evasion import Evasion
from cupel.probes.robust.graph_evasion import GraphEvasion

torch.set_num_threads(1)


def wired(nodes: int, share: float, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(nodes, nodes, generator=draw).triu(1) > 1 - share).nonzero().T


def table(edges: Tensor, nodes: int) -> Tensor:
    a = torch.zeros(nodes, nodes, dtype=torch.float64)
    a[edges[0], edges[1]] = 1
    return a + a.T


def spread(a: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 of a dense adjacency."""
    whole = a + torch.eye(len(a), dtype=a.dtype)
    root = whole.sum(1).rsqrt()
    return whole * root[:, None] * root


def network(nodes: int, seed: int, share: float = 0.3, classes: int = 3) -> GCN:
    torch.manual_seed(seed)
    features = (torch.rand(nodes, 6) < 0.4).double()
    return GCN(wired(nodes, share, seed), features, 4, classes, 0.5).double().eval()


def dense_logits(net: GCN, a: Tensor) -> Tensor:
    s = spread(a)
    return s @ torch.relu(s @ net.graph.features() @ net.conv1.weight.T) @ net.conv2.weight.T


# --- pairs


def test_flipping_twice_changes_nothing_and_order_of_ends_does_not_matter():
    edges = wired(9, 0.4)
    pairs = random_pairs(9, 12, seeded(0))
    once = flipped(edges, pairs, 9)
    assert torch.equal(table(once, 9) != table(edges, 9), table(pairs, 9) == 1)
    assert torch.equal(flipped(once, pairs.flip(0), 9), flipped(edges, edges[:, :0], 9))
    assert signs(edges, pairs, 9).tolist() == [-1 if table(edges, 9)[i, j] else 1 for i, j in pairs.T.tolist()]


def test_random_pairs_differ_and_every_pair_can_come():
    pairs = random_pairs(6, 99, seeded(0))
    assert sorted(map(tuple, pairs.T.tolist())) == [(i, j) for i in range(6) for j in range(i + 1, 6)]
    assert at_random(Wiring(wired(6, 0.5), 6, 4), 2, seeded(1))[1].unique().numel() == 4
    assert 2 not in at_random(Wiring(wired(6, 0.5), 6, 9), 2, seeded(1))[1]


# --- the surrogate


@pytest.mark.parametrize("seed", range(4))
def test_linear_rows_are_those_of_every_flipped_graph(seed):
    edges, h = wired(9, 0.35, seed), torch.randn(9, 3, dtype=torch.float64)
    for t in (0, 4, 8):
        found = linear_rows(edges, h, t)
        for u in range(9):
            pair = torch.tensor([[t], [u]]) if u != t else edges[:, :0]
            s = spread(table(flipped(edges, pair, 9), 9))
            assert torch.allclose(found[u], (s @ s @ h)[t]), (t, u)


def test_the_first_flip_is_the_best_of_all_and_the_second_is_best_after_it():
    count = 0
    for seed in range(5):
        edges, h = wired(6, 0.4, seed), torch.randn(6, 3, dtype=torch.float64, generator=seeded(seed))
        wiring = Wiring(edges, 6, 2, stealthy=False)
        for t in range(6):
            now, label = edges, int((spread(table(edges, 6)).matrix_power(2) @ h)[t].argmax())

            def gap(e: Tensor, t: int = t, label: int = label, h: Tensor = h) -> float:
                return float(margin((spread(table(e, 6)).matrix_power(2) @ h)[t][None], torch.tensor([label])))

            done: list[int] = []
            for u in by_surrogate(wiring, h, t, label)[1].tolist():
                tried = {v: gap(flipped(now, torch.tensor([[t], [v]]), 6)) for v in range(6) if v not in (t, *done)}
                assert math.isclose(tried[u], min(tried.values()), abs_tol=1e-9) and tried[u] < gap(now)
                now, done = flipped(now, torch.tensor([[t], [u]]), 6), [*done, u]
            count += len(done)
    assert count > 40  # of 60: here and there no flip lowers the margin


def test_the_surrogate_learns_a_linear_network_of_the_graph():
    nodes = 40
    labels = torch.arange(nodes) % 2
    edges = wired(nodes, 0.5)
    edges = edges[:, labels[edges[0]] == labels[edges[1]]]
    graph = NodeGraph(edges, torch.eye(nodes))
    h = surrogate(graph, torch.arange(10), labels[:10], 2)
    far = graph(graph(h)).argmax(1)
    assert float((far == labels).double().mean()) > 0.95
    assert torch.equal(h, surrogate(graph, torch.arange(10), labels[:10], 2))


def test_degrees_are_tested_by_their_power_law():
    edges, t = wired(14, 0.25, 3), 5
    first = torch.bincount(wired(14, 0.2, 4).flatten(), minlength=14)

    def likelihood(d: np.ndarray) -> float:
        d = d[d >= 2].astype(float)
        a = 1 + len(d) / np.log(d / 1.5).sum()
        return len(d) * math.log(a) + len(d) * a * math.log(2) - (a + 1) * np.log(d).sum()

    found, seen = unnoticed(edges, first, t), []
    for u in range(14):
        if u != t:
            d = table(flipped(edges, torch.tensor([[t], [u]]), 14), 14).sum(1).numpy()
            one = first.numpy()
            ratio = -2 * likelihood(np.concatenate([d, one])) + 2 * (likelihood(d) + likelihood(one))
            seen.append((ratio, bool(found[u])))
    assert all(ok == (ratio < 0.004) for ratio, ok in seen)
    same = unnoticed(edges, torch.bincount(edges.flatten(), minlength=14), t)
    assert bool(same.any()) and not bool(unnoticed(edges, first * 3 + 2, t).any())


def test_stealth_keeps_last_edges():
    pairs = torch.tensor([[0, 2], [1, 3]])  # degrees of 1 do not count in the power law: it sees nothing here
    assert bool(unnoticed(pairs, torch.ones(5, dtype=torch.long), 0)[1])
    barred = Wiring(pairs, 5, 3).noticed(pairs, 0)
    assert bool(barred[1]) and not bool(barred[4])
    assert not Wiring(pairs, 5, 3, stealthy=False).noticed(pairs, 0).any()


# --- the network's own gradient


@pytest.mark.parametrize("seed", range(3))
def test_slopes_are_the_derivative_by_every_pair(seed):
    net = network(8, seed)
    a = table(net.graph.edges, 8).requires_grad_()
    y, ids = torch.arange(8) % 3, torch.arange(8)
    (full,) = torch.autograd.grad(fooling(dense_logits(net, a), y), a)
    with still(net), listening(net.graph) as heard:
        g, x = slopes(heard, fooling(net(ids), y))
    found = g @ x.T + x @ g.T
    assert torch.allclose(found, full + full.T)
    best = steepest(net.graph.edges, g, x, 7, rows=3)
    change = (full + full.T) * (1 - 2 * a.detach())
    order = sorted((float(change[i, j]), i, j) for i in range(8) for j in range(i + 1, 8) if change[i, j] < 0)
    assert [tuple(p) for p in best.T.tolist()] == [(i, j) for _, i, j in order[:7]]


def test_listening_ends_and_leaves_outputs_alone():
    net, ids = network(8, 0), torch.arange(8)
    with still(net), listening(net.graph) as heard:
        inside = net(ids)
    assert len(heard) == 4 and net.graph.heard is None and torch.equal(inside, net(ids))


def test_gradient_flips_take_the_steepest_pair_and_stop_once_the_network_errs():
    fell = 0
    for seed in range(4):
        net = network(10, seed)
        with still(net):
            out = net(torch.arange(10))
            for t in range(10):
                label = int(out[t].argmax())
                found = by_gradient(net, net.graph, Wiring(net.graph.edges, 10, 5, stealthy=False), t, label)
                assert found.shape[1] <= 5 and found[1].unique().numel() == found.shape[1]
                if not found.shape[1]:
                    continue
                a = table(net.graph.edges, 10).requires_grad_()
                gap = margin(dense_logits(net, a)[t][None], torch.tensor([label]))
                (full,) = torch.autograd.grad(gap.sum(), a)
                change = ((full + full.T) * (1 - 2 * a.detach()))[t]
                change[t] = math.inf
                assert int(change.argmin()) == int(found[1, 0])
                before = [stands(net, net.graph, t, label, found[:, :k]) for k in range(found.shape[1])]
                assert all(before)
                fell += not stands(net, net.graph, t, label, found)
    assert fell >= 3


def test_pairs_that_are_not_allowed_are_left_alone():
    net = network(10, 1)
    even = Wiring(net.graph.edges, 10, 9, lambda pairs: (pairs.sum(0) % 2) == 0, stealthy=False)
    h = torch.randn(10, 3, dtype=torch.float64)
    with still(net):
        ends = torch.cat([by_gradient(net, net.graph, even, 4, int(net(torch.tensor([4])).argmax())),
                          by_surrogate(even, h, 4, 0)], 1)  # fmt: skip
    assert ends.shape[1] > 0 and bool((ends.sum(0) % 2 == 0).all())


# --- the whole graph


def test_projection_is_the_nearest_point_of_the_budget():
    draw = seeded(0)
    for _ in range(20):
        s = torch.randn(12, generator=draw, dtype=torch.float64)
        found = into_budget(s, 2.5)
        assert float(found.sum()) <= 2.5 + 1e-9 and bool(((found >= 0) & (found <= 1)).all())
        assert abs(float(found.sum()) - min(2.5, float(s.clamp(0, 1).sum()))) < 1e-6
        for _ in range(30):
            other = torch.rand(12, generator=draw, dtype=torch.float64)
            other = other * min(1.0, 2.5 / float(other.sum()))
            assert float((found - s).norm()) <= float((other - s).norm()) + 1e-9
    assert torch.equal(into_budget(torch.tensor([0.2, -1.0, 0.9]), 2.0), torch.tensor([0.2, 0.0, 0.9]))


def test_one_flip_in_the_whole_graph_is_among_the_three_best_of_all_28():
    hits = 0
    for seed in range(6):
        net, ids = network(8, seed), torch.arange(8)
        with still(net), torch.no_grad():
            y = net(ids).argmax(1)
        every = random_pairs(8, 28, seeded(0))

        def judged(pairs: Tensor, net: GCN = net, y: Tensor = y, ids: Tensor = ids) -> tuple[int, float]:
            with torch.no_grad(), rewired(net.graph, flipped(net.graph.edges, pairs, 8)):
                out = net(ids)
            return int((out.argmax(1) == y).sum()), float(fooling(out, y))

        with still(net):
            found = Relaxed(1, rounds=2, steps=15, draws=20).flips(net, net.graph, ids, y, seeded(seed))
        assert found.shape[1] <= 1
        tried = sorted(judged(every[:, k : k + 1]) for k in range(28))
        hits += judged(found) <= tried[2]
    assert hits >= 5


def test_the_budget_of_the_whole_graph_is_kept_and_more_of_it_never_helps_the_defender():
    net, ids = network(12, 2), torch.arange(12)
    with still(net), torch.no_grad():
        y = net(ids).argmax(1)
    left = []
    for budget in (0, 2, 6):
        with still(net):
            pairs = Relaxed(budget, rounds=2, steps=15).flips(net, net.graph, ids, y, seeded(0))
        assert pairs.shape[1] <= budget and pairs.unique(dim=1).shape[1] == pairs.shape[1]
        with torch.no_grad(), rewired(net.graph, flipped(net.graph.edges, pairs, 12)):
            left.append(int((net(ids).argmax(1) == y).sum()))
    assert left[0] == 12 and left[0] >= left[1] >= left[2] and left[2] < 12


# --- the probe


def bench(lens: bool = False) -> tuple[Subject, Context]:
    """Two fields that cite within themselves; the network is made to sum what neighbours say."""
    nodes = 30
    labels = torch.arange(nodes) % 2
    edges = wired(nodes, 0.35)
    edges = edges[:, labels[edges[0]] == labels[edges[1]]]
    features = torch.cat([torch.eye(2)[labels], torch.ones(nodes, 1)], 1)
    net = GCN(edges, features, 2, 2, 0.0)
    with torch.no_grad():
        net.conv1.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
        net.conv2.weight.copy_(torch.eye(2))
    if lens:
        net.graph.lens = AlikeEdges(net.graph, 0.9)
    parts = (torch.arange(0, 10), torch.arange(10, 20), torch.arange(10, 30))
    splits = Splits(*(Examples(part, labels[part], part) for part in parts))
    return Subject(net.eval(), splits, Classification(2)), Context(seed=0)


def test_without_a_budget_nothing_falls_and_with_one_the_attacks_beat_random_flips():
    subject, ctx = bench()
    idle = GraphEvasion(rate=0, extra=0, share=0).measure(subject, ctx)
    assert {idle[n].value for n in idle if n != "flips"} == {1.0} and idle["flips"].value == 0
    found = GraphEvasion(rate=1.5, extra=0, share=0.2, stealthy=False).measure(subject, ctx)
    assert max(found["surrogate"].value, found["gradient"].value) < found["random"].value - 0.3
    assert found["robust_accuracy"].value <= min(found[n].value for n in ("surrogate", "gradient", "blind", "random"))
    assert found["blind"].value == found["surrogate"].value
    assert found["global_accuracy"].value < found["global_random"].value
    degree = torch.bincount(subject.model.graph.edges.flatten(), minlength=30)[10:]
    spent = np.mean([round(1.5 * int(d)) for d in degree])
    assert math.isclose(found["flips"].value, spent, rel_tol=1e-6)


def test_a_filter_stops_who_does_not_know_it_and_the_adversary_wastes_nothing_on_it():
    subject, ctx = bench(lens=True)  # only nodes with the same words may be linked
    found = GraphEvasion(rate=1, extra=4, share=0.1, stealthy=False, targets=8).measure(subject, ctx)
    assert any("AlikeEdges" in note for note in found.notes)
    _, _, told = siege(subject, NodeThreat(1, 4, stealthy=False), 2, "test", 0, ctx.rng("random"))
    assert {"surrogate", "blind"} < set(told) and subject.model.graph.lens is not None
    lens = subject.model.graph.lens
    for name in ("surrogate", "gradient"):
        for _, pairs in told[name]:
            assert bool((lens.weigh(pairs, torch.ones(pairs.shape[1])) > 0).all())
    # A fool's flips join other fields, which the filter hides: nothing happens but what removals do.
    assert found["blind"].value >= found["surrogate"].value


def test_the_judge_asks_the_network_on_the_flipped_graph():
    subject, _ = bench()
    graph, t = subject.model.graph, 12
    near = neighbours(graph.edges, t, 30).nonzero().flatten()
    others = torch.arange(1, 30, 2)
    flips = torch.cat([torch.stack((torch.full_like(e, t), e)) for e in (near, others)], 1)
    assert stands(subject.model, graph, t, 0, flips[:, :0]) and not stands(subject.model, graph, t, 0, flips)


def test_inputs_that_are_no_nodes_are_refused():
    subject, ctx = bench()
    wrong = subject.data.train.having(inputs=subject.data.train.inputs + 25)
    far = subject.with_data(replace(subject.data, train=wrong))
    with pytest.raises(NotApplicable, match="below 30"):
        GraphEvasion().measure(far, ctx)


def test_evasion_answers_on_graphs_by_the_same_flips():
    for lens in (False, True):
        subject, ctx = bench(lens)
        own = GraphEvasion(rate=1, extra=4, share=0).measure(subject, ctx)
        told = Evasion(flips=4).measure(subject, ctx)
        assert told["robust_accuracy"] == own["robust_accuracy"] and told["clean_accuracy"] == own["clean_accuracy"]
        assert told["robust_accuracy"].value == (1.0 if lens else 0.0) and told.figures == own.figures
        assert math.isnan(told["pgd"].value) and "1 x degree + 4" in told.notes[0]
        assert Evasion(flips=4, examples=7).measure(subject, ctx)["robust_accuracy"].count == 7


def test_gradients_look_hidden_only_where_knowing_less_does_clearly_better():
    row = torch.arange(40)
    for blunt, sharp, shown in ((5, 20, True), (19, 20, False), (20, 5, False)):
        assert masked({"surrogate": row < blunt, "gradient": row < sharp}) == shown
