"""`slo-nn`: tables against slow loops, gathered layers against masked ones, counted work, objectives that hold."""

from __future__ import annotations

import copy
import pickle
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError
from cupel.core.tasks import Classification
from cupel.core.types import Examples, TrainView
from cupel.nets.mlp import Mlp
from cupel.ops.ledger import ledger_of
from cupel.ops.node_tables import (
    Choice,
    ChosenLinear,
    NodeTables,
    buckets_of,
    centred_importance,
    chosen_in,
    costs_of,
    planes_for,
)
from cupel.ops.objectives import LatencyObjective, LatencyProfile, competing, fitted, measured_profile, monotone
from cupel.storage.networks import load_network, save_network
from cupel.techniques.compress.slo_nn import Site, SloNN, site_of

torch.set_num_threads(1)
SMALL = {"tables": 2, "bits": 3, "shares": (0.1, 0.3), "keep": 0.4}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@lru_cache
def inputs() -> Tensor:
    return draw(600, 12)


def context(x: Tensor) -> Context:
    data = Examples(x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)))
    return Context(seed=3, train=TrainView(data, data), task=Classification(5))


def plain(hidden: int = 40, classes: int = 5) -> Mlp:
    torch.manual_seed(0)
    return Mlp(12, (hidden,), classes).eval()


def made(net: nn.Module, **changes: object) -> nn.Module:
    return SloNN(**{**SMALL, **changes}).seal(copy.deepcopy(net), context(inputs())).eval()


def test_buckets_and_importance_against_slow_loops() -> None:
    x, planes, offsets = draw(7, 4), draw(6, 4, seed=1), draw(6, seed=2)
    found = buckets_of(x, planes, offsets, 2)
    for i in range(7):
        for t in range(2):
            bits = [int(float(x[i] @ planes[3 * t + j]) > float(offsets[3 * t + j])) for j in range(3)]
            assert int(found[i, t]) == bits[0] + 2 * bits[1] + 4 * bits[2]
    a, mean, out = draw(3, 5).numpy(), draw(5, seed=1).numpy(), draw(2, 5, seed=2).numpy()
    worth = centred_importance(*(torch.from_numpy(v) for v in (a, mean, out))).numpy()
    for i in range(3):
        for j in range(5):
            away = out[:, j] - out[:, j].mean()  # what a node adds to all classes alike decides nothing
            assert worth[i, j] == pytest.approx(abs(a[i, j] - mean[j]) * np.sqrt((away**2).sum()), rel=1e-5)


def test_like_inputs_fall_together() -> None:
    x = draw(400, 12)
    planes = planes_for(12, 64, 1, torch.Generator().manual_seed(0))
    near = x + 0.2 * draw(400, 12, seed=9)
    same = (buckets_of(x, planes, torch.zeros(64), 64) == buckets_of(near, planes, torch.zeros(64), 64)).double().mean()
    angle = torch.nn.functional.cosine_similarity(x, near).clamp(-1, 1).arccos().mean() / torch.pi
    assert float(same) == pytest.approx(1 - float(angle), abs=0.01)  # Charikar: P[same side] = 1 - angle / pi


@lru_cache
def slow_tables() -> tuple[nn.Module, ChosenLinear]:
    net = made(plain(), layer="block1.linear")
    return net, chosen_in(net)


@torch.no_grad()
def test_tables_hold_what_fell_into_their_buckets() -> None:
    """Lists, scores and confidence again with loops over inputs, the two halves taken as the method deals them."""
    x, net = inputs(), plain()
    _, layer = slow_tables()
    rows = x[torch.randperm(600, generator=context(x).rng("examples"))]
    a = net.block1(rows).numpy()
    w = net.head.weight.numpy()
    length = np.linalg.norm(w - w.mean(0), axis=0)
    worth = np.abs(a - a.mean(0)) * length
    buckets = layer.tables.buckets(rows).numpy()
    centred = (rows - rows.mean(0)) @ layer.tables.planes.T
    assert np.array_equal(buckets[:, 0], ((centred[:, :3] > 0).long() * torch.tensor([1, 2, 4])).sum(1).numpy())
    answer = net(rows).argmax(1).numpy()
    half = (np.arange(600) // 250) % 2
    sums = np.zeros((2, 2, 8, 40))
    seen = np.zeros((2, 2, 8))
    for i in range(600):
        for t in range(2):
            sums[half[i], t, buckets[i, t]] += worth[i]
            seen[half[i], t, buckets[i, t]] += 1
    for t in range(2):
        for b in range(8):
            scores = sums[:, t, b].sum(0) / (seen[:, t, b].sum() + 1)
            best = np.argsort(-scores)[:16]
            assert set(layer.tables.nodes[t, b].tolist()) == set(best.tolist())
            np.testing.assert_allclose(layer.tables.scores[t, b].float().numpy(), scores[best], rtol=0.01)
    agreed = np.zeros((2, 8, 2))
    for i in range(600):
        other = 1 - half[i]
        total = 1e-3 * sums[other, 0].sum(0) / seen[other, 0].sum()
        for t in range(2):
            scores = sums[other, t, buckets[i, t]] / (seen[other, t, buckets[i, t]] + 1)
            best = np.argsort(-scores)[:16]
            total[best] += torch.from_numpy(scores[best]).half().float().numpy()
        for level, k in enumerate((4, 12)):
            keep = np.isin(np.arange(40), np.argsort(-total)[:k])
            alike = int(np.argmax(w @ (a[i] * keep) + net.head.bias.numpy())) == answer[i]
            for t in range(2):
                agreed[t, buckets[i, t], level] += alike
    assert np.abs(layer.tables.agreed.numpy() - agreed).sum() <= 4  # a tie of rounded scores may fall otherwise
    assert 0 < agreed.sum() < 2 * 2 * 600
    pooled = (agreed[0, buckets[0, 0]] + agreed[1, buckets[0, 1]] + layer.tables.overall.numpy()) / (
        seen[:, 0, buckets[0, 0]].sum() + seen[:, 1, buckets[0, 1]].sum() + 1
    )
    np.testing.assert_allclose(layer.tables.confidence(torch.from_numpy(buckets[:1]))[0], pooled, atol=0.03)


def masked(net: Mlp, layer: ChosenLinear, x: Tensor, k: int) -> Tensor:
    a = net.block1(x)
    keep = torch.zeros_like(a).scatter(1, layer.tables.ranked(layer.tables.buckets(x), k), 1.0)
    out: Tensor = net.head(a * keep)
    return out


@torch.no_grad()
def test_hidden_nodes_left_out_are_zero_to_the_next_layer() -> None:
    net, x = plain(), inputs()[:50]
    small, layer = slow_tables()
    for level, k in enumerate((4, 12)):
        layer.choice.level = level
        assert torch.allclose(small(x), masked(net, layer, x, k), atol=1e-5)
    layer.choice.level = 2
    assert torch.allclose(small(x), net(x), atol=1e-5)
    layer.choice.level = None
    small = copy.deepcopy(small)
    layer = chosen_in(small)
    layer.tables.learn(layer.tables.buckets(x), draw(50, 2, seed=5) > 0)  # confidences that differ at every level
    layer.choice.accuracy = float(layer.tables.confidence(layer.tables.buckets(x)).median())
    levels = layer.levels(x)
    assert len(levels.unique()) == 3  # all sizes in one batch
    slow = torch.cat([masked(net, layer, x[i : i + 1], layer.choice.sizes[int(levels[i])]) for i in range(50)])
    assert torch.allclose(small(x), slow, atol=1e-5)
    assert torch.allclose(torch.cat([small(row[None]) for row in x]), slow, atol=1e-5)


@torch.no_grad()
def test_output_nodes_left_out_never_win() -> None:
    net, x = plain(8, 60), inputs()[:40]
    small = made(net, layer="head")
    layer = chosen_in(small)
    assert layer.last
    layer.choice.level = 0
    full, out = net(x), small(x)
    picked = layer.tables.ranked(layer.tables.buckets(net.block1(x)), 6)
    for i in range(40):
        kept = picked[i].tolist()
        least = min(float(full[i, j]) for j in kept)
        for j in range(60):
            assert float(out[i, j]) == pytest.approx(float(full[i, j]) if j in kept else least, abs=1e-5)
    layer.choice.level = 2
    assert torch.equal(small(x), full)


@torch.no_grad()
def test_work_is_what_was_chosen() -> None:
    small, layer = slow_tables()
    hashing, x = 2 * 3 * 12, inputs()[:1]
    assert layer.tables.overhead == hashing + 2 * 16
    assert costs_of(layer, 5) == [4 * 17 + hashing + 32, 12 * 17 + hashing + 32, 40 * 17]
    for level, k in enumerate((4, 12, 40)):
        layer.choice.level = level
        macs = sum(ledger_of(small, x).macs().values())
        assert macs == k * (12 + 5) + (hashing if k < 40 else 0)  # nothing of width 40 is multiplied below 40
    layer.choice.level = None


def test_levels_follow_the_objective() -> None:
    choice = Choice((1, 2, 3, 9), 0.9)
    confidence = torch.tensor([[0.95, 0.1, 0.1], [0.5, 0.9, 1.0], [0.0, 0.0, 0.0], [0.1, 0.2, 0.89]])
    assert choice.levels(confidence).tolist() == [0, 1, 3, 3]
    _, layer = slow_tables()
    x, before = inputs(), None
    for accuracy in (0.5, 0.9, 0.99, 1.0):
        layer.choice.accuracy = accuracy
        levels = layer.levels(x)
        assert before is None or bool((levels >= before).all())
        before = levels
    layer.choice.accuracy = 0.98


def test_an_input_like_no_other_takes_the_whole_layer() -> None:
    tables = NodeTables(torch.eye(2), torch.zeros(2), torch.ones(1, 4, 6), torch.ones(1, 4), 3)
    tables.learn(torch.tensor([[0], [0], [3]]), torch.tensor([[True], [False], [True]]))
    buckets = torch.tensor([[0], [3], [1]])
    third = 2 / 3
    expected = [(1 + third) / 3, (1 + third) / 2, 0.0]
    assert tables.confidence(buckets)[:, 0].tolist() == pytest.approx(expected)
    assert Choice((2, 6), 0.01).levels(tables.confidence(buckets)).tolist() == [0, 0, 1]


def test_sites_are_found_by_trying() -> None:
    x = inputs()[:3]
    assert site_of(plain(), x, "") == Site("block1.linear", "head")
    assert site_of(plain(4, 60), x, "") == Site("head", "")
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(12, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 3)).eval()
    assert site_of(normed, x, "") == Site("3", "")  # a norm between looks at columns
    for net, name in ((normed, "0"), (_Skip(), "wide"), (plain(), "absent")):
        with pytest.raises(PlanError, match="layer of slo-nn must be"):
            site_of(net.eval(), x, name)
    assert site_of(nn.Sequential(nn.Linear(12, 4), nn.Softmax(1)), x, "") is None
    softened = nn.Sequential(nn.Linear(12, 8), nn.Softmax(1), nn.Linear(8, 4))
    with pytest.raises(PlanError):  # not elementwise: each value needs the others
        site_of(softened, x, "0")
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in softened.modules())


class _Skip(nn.Module):
    """What the wide layer makes is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(12, 20), nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        a = self.wide(x)
        out: Tensor = self.back(a.relu()) + a.mean()
        return out


@torch.no_grad()
def test_networks_travel(tmp_path: Path) -> None:
    small, _ = slow_tables()
    x, out = inputs(), slow_tables()[0](inputs())
    save_network(small, tmp_path, "net", {})
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), load_network(tmp_path, "net")):
        assert torch.equal(other(x), out)
        chosen_in(other).choice.level = 0  # the reader hears of it too
        assert not torch.equal(other(x), out)


def test_bad_shares_are_refused() -> None:
    for shares in ((), (0.5, 0.2), (0.2, 0.2), (0.5, 1.0)):
        with pytest.raises(ParamError, match="rise within"):
            made(plain(), shares=shares)


PROFILE = LatencyProfile(((1.0, 2.0, 4.0), (2.0, 4.0, 8.0)), ((1.5, 3.0, 6.0), (4.0, 8.0, 16.0)))


def test_latency_is_read_off_the_profile() -> None:
    assert PROFILE.slowdowns == pytest.approx([1, 2])
    for slowdown, expected in ((0.5, 3.0), (1.0, 3.0), (1.5, 5.5), (2.0, 8.0), (3.0, 12.0)):
        assert PROFILE.expected(1, slowdown) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    values = rng.normal(size=30).tolist()
    brute = [max(min(np.mean(values[a : b + 1]) for b in range(i, 30)) for a in range(i + 1)) for i in range(30)]
    np.testing.assert_allclose(monotone(values), brute)  # the max-min formula of isotonic regression
    noisy = fitted([[1, 3, 2], [0.5, 4, 5]], [[1, 3, 2], [0.5, 4, 5]])
    assert noisy.mean == ((1, 2.5, 2.5), (1, 4, 5))


def test_the_level_falls_under_load_and_returns() -> None:
    control, load, levels = LatencyObjective(PROFILE, target=6.5, memory=0.7), 1.0, []
    for query in range(90):
        load = 3.0 if 30 <= query < 60 else 1.0
        levels.append(control.level())
        control.saw(levels[-1], load * PROFILE.mean[0][levels[-1]])
    assert levels[29] == 2 and levels[59] == 0 and levels[-1] == 2
    assert control.slowdown == pytest.approx(1 + 2 * (1 - 0.7**30) * 0.7**30)  # a geometric series up, and down
    assert 30 < levels.index(0) < 40  # a few queries are enough
    assert LatencyObjective(PROFILE, target=0.1).level() == 0


def test_profiles_are_measured_beside_real_processes() -> None:
    work = [draw(40 * (1 + 3 * i), 200) for i in range(3)]
    other = draw(200, 200)
    asked: list[int] = []

    def query(level: int) -> None:
        asked.append(level)
        work[level] @ other

    profile = measured_profile(query, 3, loads=(0, 1), repeats=4)
    assert asked == [0, 1, 2] * 8
    for table in (profile.mean, profile.tail):
        assert all(row[0] <= row[1] <= row[2] for row in table)
        assert all(b >= a for a, b in zip(*table, strict=True))
    with pytest.raises(ZeroDivisionError), competing(1):
        raise ZeroDivisionError
