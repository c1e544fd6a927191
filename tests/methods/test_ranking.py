"""`ranking`: scikit-learn and slow loops, ties by all orders, and a table whose readings are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.steps import build
from cupel.core.tasks import Classification
from cupel.core.types import Splits, Subject
from cupel.data.interactions import PairsThenFacts, Rankings
from cupel.ops.ranking import best_gain, expected_top, ndcg_at, recall_at
from cupel.probes.quality.ranking import Ranking, quarters, rarest
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


def cases(users: int = 40, items: int = 60, levels: int = 0):
    draw = torch.Generator().manual_seed(levels)
    scores = (
        torch.randn(users, items, generator=draw)
        if not levels
        else torch.randint(levels, (users, items), generator=draw).float()
    )
    seen = torch.rand(users, items, generator=draw) < 0.3
    relevant = (torch.rand(users, items, generator=draw) < 0.15) & ~seen
    relevant[:, 0], seen[:, 0] = True, False
    return scores, relevant, seen


@pytest.mark.parametrize("levels", [0, 4])
@pytest.mark.parametrize("k", [1, 5, 20, 100])
def test_ndcg_equals_sklearn_on_the_unseen_items(k, levels):
    scores, relevant, seen = cases(levels=levels)
    want = [
        ndcg_score(relevant[u, ~seen[u]].numpy()[None], scores[u, ~seen[u]].double().numpy()[None], k=k)
        for u in range(len(scores))
    ]
    assert np.allclose(ndcg_at(scores, relevant, seen, k).numpy(), want, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_recall_equals_a_slow_loop(k):
    scores, relevant, seen = cases()
    for u, found in enumerate(recall_at(scores, relevant, seen, k).tolist()):
        order = sorted((i for i in range(60) if not seen[u, i]), key=lambda i: -float(scores[u, i]))[:k]
        assert found == pytest.approx(sum(bool(relevant[u, i]) for i in order) / int(relevant[u].sum()))


def test_ties_are_the_mean_over_all_orders():
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, 9.0]])
    seen = torch.tensor([[False] * 5 + [True]])
    for k in (1, 2, 3, 4, 5, 9):
        hits, gains = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        orders = [(0, *middle, 4) for middle in itertools.permutations((1, 2, 3))]
        for order in orders:
            for place, item in enumerate(order[:k], start=1):
                hits[item] += 1 / len(orders)
                gains[item] += 1 / math.log2(1 + place) / len(orders)
        found = expected_top(scores, seen, k)
        assert torch.allclose(found[0][0], hits) and torch.allclose(found[1][0], gains)


def test_limits():
    scores, relevant, seen = cases()
    perfect = relevant.float()
    assert torch.allclose(ndcg_at(perfect, relevant, seen, 20), torch.ones(40, dtype=torch.float64))
    flat = recall_at(torch.zeros(40, 60), relevant, seen, 20)
    assert torch.allclose(flat, (20 / (~seen).sum(1)).double())  # chance, whatever the order of storing
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    turned = recall_at(scores[:, shuffled], relevant[:, shuffled], seen[:, shuffled], 20)
    assert torch.equal(recall_at(scores, relevant, seen, 20), turned)
    assert torch.equal(recall_at(scores.exp(), relevant, seen, 20), turned)
    lost = scores.clone()
    lost[:, 0] = torch.nan
    lowest = scores.clone()
    lowest[:, 0] = -1e30
    assert torch.equal(recall_at(lost, relevant, seen, 20), recall_at(lowest, relevant, seen, 20))
    endless = scores.masked_fill(scores > 1, torch.inf)
    assert torch.isfinite(ndcg_at(endless, relevant, seen, 20)).all()
    assert bool(recall_at(scores[:1], torch.zeros(1, 60, dtype=torch.bool), seen[:1], 5).isnan())
    assert best_gain(torch.tensor([0, 1, 2, 9]), 2).tolist() == pytest.approx(
        [0, 1, 1 + 1 / math.log2(3), 1 + 1 / math.log2(3)]
    )
    assert quarters(torch.tensor([5, 0, 9, 0, 3, 1, 7, 8])).tolist() == [2, 0, 3, 0, 1, 1, 2, 3]


class Table(nn.Module):
    """Scores looked up by user."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.scores[inputs["user"]]


def subject_of(scores: Tensor, held: list[tuple[int, int]], known: list[tuple[int, int]]) -> Subject:
    users, items = scores.shape
    pairs, seen = torch.tensor(held).T, torch.tensor(known).T
    test = Rankings(pairs[0], pairs[1], seen[0], seen[1], users, items, 100)
    none = torch.zeros(0, dtype=torch.long)
    train = PairsThenFacts(seen[0], seen[1], items, none, none, none, 0)
    return Subject(Table(scores), Splits(train, test, test), Classification(items), gives=frozenset({"ranking"}))


def test_probe_reads_a_known_table():
    items = 80
    scores = torch.arange(items, 0, -1.0).repeat(3, 1)  # everyone ranks item 0 first, item 79 last
    known = [(u, i) for u in range(3) for i in range(4)] + [(0, i) for i in range(4, 70)]
    held = [(0, 75), (1, 4), (1, 79), (1, 30), (2, 5)]  # user 0 has seen 70: only 70..79 are left
    found = Ranking(tail=0.25).measure(subject_of(scores, held, known), Context())
    recall = [1.0, 1 / 3, 1.0]
    ndcg = [1 / math.log2(7), 1 / (1 + 1 / math.log2(3) + 0.5), 1 / math.log2(3)]
    assert found["recall_at_20"].value == pytest.approx(np.mean(recall))
    assert found["ndcg_at_20"].value == pytest.approx(np.mean(ndcg))
    assert found["tail_recall_at_20"].value == pytest.approx(np.mean([1.0, 0.0]))  # items 70..79, known to nobody
    assert found.figures["tail_items"] == 10
    # Others' first twenty are 4 to 23; user 0's are the ten left.
    assert found["coverage_at_20"].value == pytest.approx(30 / 80)
    assert found.figures["users_by_quarter"] == [3, 1, 0, 0]  # quarter 0: 70 to 79 and, by number, 4 to 13
    assert found["recall_at_20"].count == 3
    assert 0 <= found["recall_at_20"].low <= found["recall_at_20"].value <= found["recall_at_20"].high <= 1


def test_the_tail_keeps_equals_together():
    known = torch.tensor([3, 0, 1, 1, 0, 5, 1, 9])
    for share, want in ((0.25, [1, 4]), (0.5, [1, 4]), (0.625, [1, 2, 3, 4, 6]), (0.01, [1, 4]), (1.0, list(range(8)))):
        assert rarest(known, share).nonzero().flatten().tolist() == want


def test_users_without_held_out_items_are_left_out_and_seen_ones_are_never_relevant():
    scores = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    scores[2, 7] = 2.0
    known, held = [(0, 1), (1, 2), (2, 3)], [(0, 5), (2, 7)]
    found = Ranking().measure(subject_of(scores, held, known), Context())
    again = Ranking().measure(subject_of(scores, [*held, (2, 3)], known), Context())
    assert found["recall_at_20"].count == 2
    assert dict(found) == dict(again)


def test_an_empty_tail_says_that_nothing_is_known():
    scores = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    known = [(u, i) for u in range(2) for i in range(20)]
    found = Ranking(tail=0.25).measure(
        subject_of(scores, [(0, 30)], [(0, 30 + k) for k in range(1, 10)] + known), Context()
    )
    assert found["tail_recall_at_20"].count == 1
    popular = subject_of(scores, [(1, 5), (0, 21)], [(0, i) for i in range(20)] + [(1, 21)])
    tail = Ranking(tail=0.25).measure(popular, Context())["tail_recall_at_20"]
    assert (tail.value, tail.low, tail.high, tail.count) == (0.0, 0.0, 1.0, 0)


def test_refuses_what_it_cannot_rank():
    digits = build(DigitsCnn(width=4, examples=32), Context())
    with pytest.raises(NotApplicable, match="`seen`"):
        Ranking().measure(digits, Context())
    made = subject_of(torch.rand(2, 40), [(0, 1)], [(0, 2)])
    narrow = made.with_model(Table(torch.rand(2, 10)))
    with pytest.raises(NotApplicable, match=r"\(1, 40\); got \(1, 10\)"):
        Ranking().measure(narrow, Context())
