"""`movielens-kgat`: reader, split, graph, attention, scores against slow loops; what an epoch holds; planted taste."""

from __future__ import annotations

import copy
import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from cupel.core.context import Context
from cupel.core.errors import MissingData
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Batch, Budget, Subject, outputs_on
from cupel.data.interactions import split_per_user, uniform_outside
from cupel.data.movielens import movielens, read_movielens
from cupel.nets.kgat import Facts, KGATNet
from cupel.ops.graphs import layout, propagate, segment_softmax, segment_sum
from cupel.ops.ranking import recall_at
from cupel.workloads.structured.movielens_kgat import (
    MovielensKGAT,
    PairRanking,
    attribute_facts,
    freebase_facts,
    graph_of,
)

torch.set_num_threads(1)
USERS, ITEMS = 24, 30


def table(path: Path, rows: list[dict[str, object]]) -> None:
    with gzip.open(path, "wt", newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users of two tastes: even ones like even films, odd ones odd films; a film's genre tells which it is.

    Films 26 to 29 are liked by nobody in training: only facts speak of them.
    """
    home = tmp_path_factory.mktemp("ml") / "movielens100k"
    home.mkdir()
    ratings = [
        {"user_id": u + 1, "item_id": i + 1, "rating": 5 if (u + i) % 2 == 0 else 2, "timestamp": 100 * u + i}
        for u in range(USERS)
        for i in range(26)
        if (3 * u + 5 * i) % 7 != 0
    ]
    table(home / "inter.csv.gz", ratings)
    table(
        home / "user.csv.gz",
        [{"user_id": u + 1, "age": 30, "gender": "F", "occupation": "artist", "zip_code": "0"} for u in range(USERS)],
    )
    films = [
        {
            "item_id": i + 1,
            "movie_title": f"film {i}",
            "release_year": "" if i == 0 else str(1980 + i % 5),
            "class": ["Drama", "War"][i % 2],
        }
        for i in range(ITEMS)
    ]
    table(home / "item.csv.gz", films)
    facts = [{"head_id": f"m.{i}", "relation_id": "film.genre", "tail_id": f"g.{i % 2}"} for i in range(ITEMS)]
    facts += [{"head_id": f["tail_id"], "relation_id": "genre.films", "tail_id": f["head_id"]} for f in facts]
    facts += [
        {"head_id": "m.0", "relation_id": "film.actor", "tail_id": "a.0"},
        {"head_id": "a.0", "relation_id": "actor.prize", "tail_id": "p.0"},
    ]
    table(home / "kg.csv.gz", facts)
    table(home / "link.csv.gz", [{"item_id": i + 1, "entity_id": f"m.{i}"} for i in range(ITEMS)])
    return home


@pytest.fixture
def subject(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUPEL_DATA", str(folder.parent))
    movielens.cache_clear()

    def make(**changes) -> Subject:
        given = {"dim": 8, "layers": (8, 4), "graph": "attributes", "dropout": 0.0, "core": 2, **changes}
        return build(MovielensKGAT(**given), Context(seed=0))

    yield make
    movielens.cache_clear()


def facts_of(model: KGATNet) -> set[tuple[int, int, int]]:
    return set(zip(model.edge_head.tolist(), model.edge_kind.tolist(), model.edge_source.tolist(), strict=True))


# --- sums over edges


def test_segment_softmax_is_a_softmax_of_each_group():
    draw = torch.Generator().manual_seed(0)
    into = torch.randint(5, (40,), generator=draw)
    scores = (torch.randn(40, generator=draw, dtype=torch.float64) * 3000).requires_grad_()
    found = segment_softmax(scores, into, 7)
    for node in range(5):
        assert torch.allclose(found[into == node], scores[into == node].softmax(0))
    assert torch.autograd.gradcheck(lambda s: segment_softmax(s, into, 7), (scores.detach() / 3000).requires_grad_())


def test_propagate_is_the_product_with_the_dense_matrix():
    draw = torch.Generator().manual_seed(0)
    into = torch.randint(6, (30,), generator=draw).sort().values  # node 6 of 7 has no edge
    source = torch.randint(9, (30,), generator=draw)  # some edges occur twice: their weights add up
    weight = torch.randn(30, generator=draw, dtype=torch.float64)
    x = torch.randn(9, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    dense = torch.zeros(7, 9, dtype=torch.float64).index_put((into, source), weight, accumulate=True)
    edges = layout(into, source, 7, 9)
    assert torch.allclose(propagate(x, weight, edges), dense @ x)
    assert torch.allclose(segment_sum(weight[:, None] * x[source], into, 7), dense @ x)
    assert torch.autograd.gradcheck(lambda v: propagate(v, weight, edges), x)
    assert torch.autograd.gradgradcheck(lambda v: propagate(v, weight, edges).square(), x)
    with pytest.raises(ValueError, match="ascending"):
        layout(into.flip(0), source, 7, 9)


# --- data


def test_reader_numbers_users_and_items_in_file_order(folder):
    tables = read_movielens(folder)
    assert (len(tables.users), len(tables.items), len(tables.facts)) == (USERS, ITEMS, 62)
    assert tables.user.max() == USERS - 1
    assert tables.items[3]["movie_title"] == "film 3"
    assert tables.entity[7] == "m.7"
    assert torch.equal(tables.time, 100 * tables.user + tables.item)
    assert torch.equal(tables.rating == 5, (tables.user + tables.item) % 2 == 0)


def test_absent_data_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    movielens.cache_clear()
    with pytest.raises(MissingData, match="movielens100k must be in CUPEL_DATA"):
        MovielensKGAT().build(Context())


def test_split_cuts_every_user_by_its_share():
    user = torch.tensor([0] * 10 + [2] * 5 + [1] * 1 + [0] * 10)
    parts = split_per_user(user, (0.1, 0.2), torch.Generator().manual_seed(0))
    assert sorted(torch.cat(parts).tolist()) == list(range(26))
    counts = [torch.bincount(user[p], minlength=3).tolist() for p in parts]
    assert counts == [[14, 1, 4], [2, 0, 0], [4, 0, 1]]  # 0.1 * 5 rounds to even: none
    emptied = split_per_user(user, (0.5, 1.0), torch.Generator().manual_seed(0))
    assert torch.bincount(user[emptied[0]], minlength=3).tolist() == [1, 1, 1]  # train keeps one of everybody
    again = split_per_user(user, (0.1, 0.2), torch.Generator().manual_seed(1))
    assert not torch.equal(parts[2], again[2])


def test_drawn_columns_avoid_what_is_taken_and_are_even():
    taken = torch.tensor([0, 1, 2, 5, 10 + 7])  # row 0: columns 0, 1, 2, 5; row 1: column 7
    row = torch.tensor([0, 1] * 3000)
    found = uniform_outside(row, 10, taken, torch.Generator().manual_seed(0))
    for r, columns in ((0, [3, 4, 6, 7, 8, 9]), (1, [0, 1, 2, 3, 4, 5, 6, 8, 9])):
        counts = torch.bincount(found[row == r], minlength=10)
        assert counts.nonzero().flatten().tolist() == columns
        assert float(counts[columns].min()) > 0.8 * 3000 / len(columns)
    assert uniform_outside(row[:0], 10, taken, torch.Generator()).shape == (0,)


def test_graph_holds_training_pairs_and_facts_both_ways_and_no_held_out_pair(subject):
    made = subject()
    edges, half = facts_of(made.model), made.model.relation.weight.shape[0] // 2
    assert half == 5  # interact, decade, genre, occupation, year
    assert edges == {(t, (r + half) % (2 * half), h) for h, r, t in edges}
    train = set(zip(made.data.train.user.tolist(), made.data.train.item.tolist(), strict=True))
    assert {(h, t - USERS) for h, r, t in edges if r == 0} == train
    for split in (made.data.valid, made.data.test):
        held = set(zip(split.user.tolist(), split.item.tolist(), strict=True))
        assert held and not held & train
    drama = {t for h, r, t in edges if r == 2 and h == USERS}
    assert {h - USERS for h, r, t in edges if r == 2 and {t} == drama} == set(range(0, ITEMS, 2))
    assert not any(h == USERS and r in (1, 4) for h, r, t in edges), "film 0 has no year"


def test_facts_of_absent_users_and_items_are_dropped(folder):
    tables = read_movielens(folder)
    small = graph_of(torch.tensor([0]), torch.tensor([1]), attribute_facts(tables), users=2, items=3)
    assert small.others == 2 + 1 + 2 + 1  # genres, decade, years of films 1 and 2, occupation
    assert int(small.head.max()) == small.nodes - 1


def test_freebase_facts_lose_turned_relations_and_rare_entities(folder):
    tables = read_movielens(folder)
    found = freebase_facts(tables, core=2)
    assert len(found) == ITEMS  # genre.films is film.genre turned; p.0 has one fact, and without it a.0 has one
    assert {relation for _, relation, _ in found} == {"film.genre"}
    assert (("item", 3), "film.genre", "g.1") in found
    assert len(freebase_facts(tables, core=1)) == ITEMS + 2


def test_an_epoch_holds_every_pair_once_then_facts(subject):
    made = subject()
    train, model = made.data.train, made.model
    batches = list(train.batches(64, torch.Generator().manual_seed(0)))
    pairs = [b for b in batches if "positive" in b.inputs]
    judged = batches[len(pairs) :]
    assert all("head" in b.inputs for b in judged)
    assert len(judged) == len(model.edge_head) // 128
    assert sorted(torch.cat([b.index for b in pairs]).tolist()) == list(range(len(train)))
    assert [bool(b.inputs["opens"].all()) for b in pairs] == [True] + [False] * (len(pairs) - 1)
    liked = set(zip(train.user.tolist(), train.item.tolist(), strict=True))
    for b in pairs:
        user, one, other = (b.inputs[k].tolist() for k in ("user", "positive", "negative"))
        assert set(zip(user, one, strict=True)) <= liked
        assert not set(zip(user, other, strict=True)) & liked
    true = facts_of(model)
    for b in judged:
        head, relation, tail, corrupt = (b.inputs[k].tolist() for k in ("head", "relation", "tail", "corrupt"))
        assert set(zip(head, relation, tail, strict=True)) <= true
        assert not set(zip(head, relation, corrupt, strict=True)) & true
        assert int(b.index.min()) >= len(train)
    shares = torch.bincount(torch.cat([b.inputs["head"] for b in judged]), minlength=USERS + ITEMS)
    degree = torch.bincount(model.edge_head)
    assert torch.corrcoef(torch.stack((shares[: len(degree)].double(), degree.double())))[0, 1] < 0.5, (
        "heads come evenly"
    )
    fixed = [list(train.batches(64)) for _ in range(2)]
    assert all(torch.equal(a.inputs[k], b.inputs[k]) for a, b in zip(*fixed, strict=True) for k in a.inputs)
    assert len(fixed[0]) == len(batches)
    assert not any("head" in b.inputs for b in subject(kge=False).data.train.batches(64))


def test_rankings_show_what_was_known_before(subject):
    made = subject()
    valid, test = (next(s.batches(500)) for s in (made.data.valid, made.data.test))
    train = set(zip(made.data.train.user.tolist(), made.data.train.item.tolist(), strict=True))
    checked = set(zip(made.data.valid.user.tolist(), made.data.valid.item.tolist(), strict=True))
    for batch, known in ((valid, train), (test, train | checked)):
        rows = batch.inputs["user"].tolist()
        assert {(rows[u], i) for u, i in batch.inputs["seen"].nonzero().tolist()} == {p for p in known if p[0] in rows}
        assert not bool((batch.targets & batch.inputs["seen"]).any())
    assert {(int(u), int(i)) for u, i in test.targets.nonzero()} == set(
        zip(made.data.test.user.tolist(), made.data.test.item.tolist(), strict=True)
    )
    index = [torch.cat([b.index for b in s.batches(50)]) for s in (made.data.train, made.data.valid, made.data.test)]
    assert not set(index[1].tolist()) & set(index[2].tolist()) and not set(index[0].tolist()) & set(index[2].tolist())


# --- network


def slow_attention(model: KGATNet) -> np.ndarray:
    """The softmax over all edges of a head, edge by edge."""
    e = torch.cat((model.user.weight, model.entity.weight)).detach().double().numpy()
    r, w = (p.detach().double().numpy() for p in (model.relation.weight, model.transfer_weight))
    head, kind, tail = (t.tolist() for t in (model.edge_head, model.edge_kind, model.edge_source))
    pi = np.array([e[t] @ w[k] @ np.tanh(e[h] @ w[k] + r[k]) for h, k, t in zip(head, kind, tail, strict=True)])
    total: dict[int, float] = {}
    for h, p in zip(head, pi, strict=True):
        total[h] = total.get(h, 0.0) + np.exp(p)
    return np.array([np.exp(p) / total[h] for h, p in zip(head, pi, strict=True)])


def slow_vectors(model: KGATNet, weight: np.ndarray) -> np.ndarray:
    e = torch.cat((model.user.weight, model.entity.weight)).detach().double().numpy()
    leaky = lambda v: np.where(v > 0, v, 0.2 * v)  # noqa: E731
    parts = [e]
    for layer in model.layers:
        near = np.zeros_like(e)
        for h, t, a in zip(model.edge_head.tolist(), model.edge_source.tolist(), weight, strict=True):
            near[h] += a * e[t]
        (w1, b1), (w2, b2) = (
            (p.weight.detach().double().numpy(), p.bias.detach().double().numpy()) for p in (layer.sum, layer.product)
        )
        e = leaky((e + near) @ w1.T + b1) + leaky((e * near) @ w2.T + b2)
        parts.append(e / np.linalg.norm(e, axis=1, keepdims=True))
    return np.concatenate(parts, axis=1)


@pytest.fixture
def moved(subject):
    """A subject whose weights, biases too, are away from their start."""
    made = subject()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=draw))
    return made


def test_attention_and_scores_equal_a_slow_network(moved):
    model = moved.model.eval()
    attention = slow_attention(model)
    assert np.allclose(model.attend().numpy(), attention, atol=1e-5)
    assert np.allclose(segment_sum(model.attend(), model.edge_head, model.nodes).numpy(), 1, atol=1e-5)
    vectors = slow_vectors(model, attention)
    batch = next(moved.data.test.batches(500))
    want = vectors[batch.inputs["user"]] @ vectors[USERS : USERS + ITEMS].T
    assert np.allclose(model(batch.inputs).detach().numpy(), want, atol=1e-4)
    pair = next(moved.data.train.batches(16))
    user, one, other = (vectors[pair.inputs[k] + s] for k, s in (("user", 0), ("positive", USERS), ("negative", USERS)))
    out = model(pair.inputs).detach().numpy()
    assert np.allclose(out[:, 0], (user * one).sum(1), atol=1e-4)
    assert np.allclose(out[:, 1], (user * other).sum(1), atol=1e-4)
    assert np.allclose(out[:, 2], 0.5 * ((user**2).sum(1) + (one**2).sum(1) + (other**2).sum(1)), atol=1e-3)


def test_facts_are_judged_by_their_energy_in_the_relations_space(moved):
    model = moved.model
    batch = list(moved.data.train.batches(64))[-1]
    e = torch.cat((model.user.weight, model.entity.weight)).detach().double().numpy()
    r, w = (p.detach().double().numpy() for p in (model.relation.weight, model.transfer_weight))
    shuffled = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    inputs = {k: v[shuffled] for k, v in batch.inputs.items()}
    out = model(inputs).detach().numpy()
    for row, (h, k, t, c) in enumerate(
        zip(*(inputs[n].tolist() for n in ("head", "relation", "tail", "corrupt")), strict=True)
    ):
        good, bad = (e[h] @ w[k] + r[k] - e[x] @ w[k] for x in (t, c))
        assert np.allclose(out[row, :2], [-(good @ good), -(bad @ bad)], rtol=1e-4, atol=1e-4)
        norms = sum((v**2).sum() for v in (e[h] @ w[k], e[t] @ w[k], e[c] @ w[k], r[k]))
        assert np.isclose(out[row, 2], norms / 2, rtol=1e-4)


def test_no_gradient_flows_through_the_attention(moved):
    model = moved.model.train()
    batch = next(moved.data.train.batches(64))
    model.stale.fill_(True)
    moved.task.loss(model(batch.inputs), batch).backward()
    assert model.relation.weight.grad is None and model.transfer_weight.grad is None
    assert float(model.entity.weight.grad.abs().sum()) > 0


def test_attention_is_found_anew_once_an_epoch(moved):
    model = moved.model.train()
    first = model.edge_weight.clone()
    degree: dict[tuple[int, int], int] = {}
    for h, k in zip(model.edge_head.tolist(), model.edge_kind.tolist(), strict=True):
        degree[h, k] = degree.get((h, k), 0) + 1
    start = [1 / degree[h, k] for h, k in zip(model.edge_head.tolist(), model.edge_kind.tolist(), strict=True)]
    assert np.allclose(first.numpy(), start)  # each relation of a node shares one unit before the first attention
    epoch = list(moved.data.train.batches(64))
    for batch in epoch:
        model(batch.inputs)
        assert torch.equal(model.edge_weight, first)
    with torch.no_grad():
        model.user.weight.mul_(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    outputs_on(model, moved.data.test)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "looking changes nothing"
    model(epoch[0].inputs)
    assert torch.equal(model.edge_weight, model.attend()) and not torch.equal(model.edge_weight, first)
    with torch.no_grad():
        model.user.weight.mul_(2)
    fresh = model.edge_weight.clone()
    model(epoch[0].inputs)  # a technique may look at the same batch twice
    assert torch.equal(model.edge_weight, fresh)
    outputs_on(model, moved.data.test)
    assert not bool(model.stale), "an evaluation is no step"
    model(epoch[-1].inputs)
    assert torch.equal(model.edge_weight, fresh)


def test_messages_are_dropped_in_training_only(subject):
    made = subject(dropout=0.5, layers=(8,))
    batch = list(made.data.train.batches(64))[1]
    with torch.random.fork_rng():
        trained = [made.model.train()(batch.inputs) for _ in range(2)]
        still = [made.model.eval()(batch.inputs) for _ in range(2)]
    assert not torch.equal(*trained)
    assert torch.equal(*still)


def test_outputs_depend_on_the_weights_alone(moved):
    other = copy.deepcopy(moved.model)
    other.edge_weight.fill_(9.0)
    batch = next(moved.data.test.batches(50))
    assert torch.equal(other.eval()(batch.inputs), moved.model.eval()(batch.inputs))


def test_peers_are_factorisation_and_equal_weights(subject):
    plain = subject(layers=(), attention=False, kge=False)
    batch = next(plain.data.test.batches(50))
    want = plain.model.user.weight[batch.inputs["user"]] @ plain.model.entity.weight[:ITEMS].T
    assert torch.equal(plain.model.eval()(batch.inputs), want)
    even = subject(attention=False).model
    count = torch.bincount(even.edge_head)
    assert torch.allclose(even.edge_weight, 1.0 / count[even.edge_head])
    before = even.edge_weight.clone()
    trained = fit(even, subject(attention=False).data, PairRanking(), budget=Budget(epochs=2), seed=0)
    assert torch.equal(before, trained.edge_weight)


def test_losses_of_pairs_facts_and_rankings():
    task = PairRanking(l2=0.1)
    out = torch.tensor([[2.0, 1.0, 3.0], [0.0, 5.0, 0.0]])
    pair = Batch({"user": torch.zeros(2)}, torch.ones(2), torch.arange(2))
    want = [np.log1p(np.exp(-1.0)) + 0.3, np.log1p(np.exp(5.0))]
    assert np.allclose(task.losses(out, pair).numpy(), want)
    assert float(task.loss(out, pair)) == pytest.approx(np.mean(want))
    scores = torch.tensor([[1.0, 2.0, 9.0, 0.5]])
    seen, wanted = torch.tensor([[False, False, True, False]]), torch.tensor([[True, True, False, False]])
    batch = Batch({"user": torch.zeros(1), "seen": seen}, wanted, torch.arange(1))
    share = np.exp([1.0, 2.0, 0.5]) / np.exp([1.0, 2.0, 0.5]).sum()
    assert float(task.losses(scores, batch)) == pytest.approx(-np.log(share[:2]).mean(), rel=1e-5)
    assert task.predict(scores).tolist() == [2]


def test_training_learns_taste_and_facts(subject):
    """Recall far above popularity, true facts below corrupted ones; without the second phase facts stay unlearnt."""
    judged = {}
    for kge in (True, False):
        made = subject(l2=1e-3, kge=kge)
        net = fit(
            made.model, made.data, made.task, budget=Budget(epochs=15, batch_size=64, optimizer="adam", lr=2e-2), seed=0
        )
        batch = list(subject().data.train.batches(64, torch.Generator().manual_seed(5)))[-1]
        out = net(batch.inputs).detach()
        judged[kge] = float((out[:, 0] > out[:, 1]).double().mean())
        asked = next(made.data.test.batches(500))
        found = recall_at(outputs_on(net, made.data.test), asked.targets, asked.inputs["seen"], 10)
        popular = recall_at(
            asked.inputs["seen"].sum(0).expand(len(found), -1).float(), asked.targets, asked.inputs["seen"], 10
        )
        assert float(found.mean()) > 0.9
        assert float(popular.mean()) < 0.75
    assert judged[True] > 0.95
    assert judged[False] < 0.8


def test_nodes_are_counted():
    facts = Facts(1, 2, 3, 2, *torch.tensor([[0, 0, 1], [1, 1, 0]]).T.contiguous())
    assert facts.nodes == 6
