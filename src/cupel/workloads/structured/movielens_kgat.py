"""Workload `movielens-kgat`: films recommended from ratings and a graph of facts about the films."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.context import Context, seeded
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.types import Batch, Budget, Splits, Subject
from cupel.data.interactions import PairsThenFacts, Rankings, split_per_user
from cupel.data.movielens import MovieLens, movielens
from cupel.nets.kgat import Facts, KGATNet

CARD = Card(
    name="movielens-kgat",
    family="structured",
    source="X. Wang, X. He, Y. Cao, M. Liu, T.-S. Chua, KGAT: Knowledge Graph Attention Network for Recommendation, "
    "KDD 2019, arXiv 1905.07854, equations 1 to 13",
    tags=("recommendation", "graph", "knowledge-graph", "attention", "id"),
    gives=("weights", "gradients", "members", "graph", "ranking"),
    expects="not published for this split; on Amazon-book, Last-FM and Yelp2018 the paper reports Recall@20 0.149, "
    "0.087 and 0.071, 5 to 9 percent above the best baseline",
    tiny={"users": 40, "items": 150, "dim": 8, "layers": (8,), "graph": "attributes"},
)


@dataclass(frozen=True)
class PairRanking:
    """The first of two must score above the second; rankings of all items are judged by softmax.

    Args:
        l2: weight of half the squared norms of the vectors that a pair uses.
    """

    l2: float = 1e-2

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        """Pairs and facts: `out` `[B, 3]` -> softplus(second - first) + l2 * norms, `[B]`.

        Rankings: `out` `[B, I]` -> mean over the relevant items of -log softmax over the unseen ones, `[B]`.
        """
        if "seen" not in batch.inputs:
            return F.softplus(out[:, 1] - out[:, 0]).add(out[:, 2], alpha=self.l2)
        wanted: Tensor = batch.targets & ~batch.inputs["seen"]
        log_share = out.masked_fill(batch.inputs["seen"], -torch.inf).log_softmax(1)
        return -log_share.where(wanted, 0.0).sum(1) / wanted.sum(1).clamp_min(1)

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        return self.losses(out, batch).mean()

    def predict(self, out: Tensor) -> Tensor:
        """The best item of every row."""
        return out.argmax(-1)

    def scores(self, out: Tensor) -> Tensor:
        return out


Fact = tuple[object, str, object]  # nodes are ("user", 3), ("item", 7) or any other name


def attribute_facts(tables: MovieLens) -> list[Fact]:
    """Genre, decade and release year of every film, occupation of every user."""
    found: list[Fact] = []
    for number, film in enumerate(tables.items):
        found += [(("item", number), "genre", ("genre", name)) for name in film["class"].split()]
        if len(film["release_year"]) == 4:  # two films have no year
            found.append((("item", number), "decade", ("decade", film["release_year"][:3])))
            found.append((("item", number), "year", ("year", film["release_year"])))
    return found + [
        (("user", number), "occupation", ("occupation", person["occupation"]))
        for number, person in enumerate(tables.users)
    ]


def freebase_facts(tables: MovieLens, core: int) -> list[Fact]:
    """Freebase triples, films named as items; entities with fewer than `core` facts are left out, again and again.

    A relation that is another one turned round is left out: the graph holds every relation both ways.
    """
    film = {name: ("item", number) for number, name in tables.entity.items()}
    pairs: dict[str, set[tuple[str, str]]] = {}
    for head, relation, tail in tables.facts:
        pairs.setdefault(relation, set()).add((head, tail))
    kept: list[str] = []
    for relation in sorted(pairs):
        turned = {(tail, head) for head, tail in pairs[relation]}
        if not any(pairs[other] == turned for other in kept):
            kept.append(relation)
    facts = [(h, r, t) for r in kept for h, t in sorted(pairs[r])]
    while True:
        count: dict[str, int] = {}
        for h, _, t in facts:
            count[h], count[t] = count.get(h, 0) + 1, count.get(t, 0) + 1
        ok = {name for name, times in count.items() if times >= core or name in film}
        dense = [(h, r, t) for h, r, t in facts if h in ok and t in ok]
        if len(dense) == len(facts):
            return [(film.get(h, h), r, film.get(t, t)) for h, r, t in dense]
        facts = dense


def graph_of(user: Tensor, item: Tensor, facts: list[Fact], users: int, items: int) -> Facts:
    """Interactions and facts as one graph, every relation also turned round; facts of absent nodes are dropped."""
    number: dict[object, int] = {("user", u): u for u in range(users)}
    number |= {("item", i): users + i for i in range(items)}

    def known(name: object) -> bool:
        return name in number or not (isinstance(name, tuple) and name[0] in ("user", "item"))

    facts = [fact for fact in facts if known(fact[0]) and known(fact[2])]
    names = sorted({relation for _, relation, _ in facts})
    edges = {(u, 0, users + i) for u, i in zip(user.tolist(), item.tolist(), strict=True)}
    for head, relation, tail in facts:
        edges.add(
            (number.setdefault(head, len(number)), 1 + names.index(relation), number.setdefault(tail, len(number)))
        )
    half = 1 + len(names)
    both = torch.tensor(sorted(edges | {(t, r + half, h) for h, r, t in edges}))
    return Facts(users, items, len(number) - users - items, 2 * half, *both.T.contiguous())


@dataclass(frozen=True)
class MovielensKGAT:
    r"""Rank the films a person will like, from liked films and a graph of facts, with attention over relations.

    Propagation: e' = LeakyReLU(W1 (e + n)) + LeakyReLU(W2 (e * n)), n = sum over (h, r, t) of a(h, r, t) e_t, where
    a is the softmax over the facts of h of (W_r e_t) . tanh(W_r e_h + e_r). The layers' vectors side by side give a
    score by inner product. An epoch trains pairs, mean softplus(s- - s+), then facts by TransR, mean
    softplus(g - g'), with g = |W_r e_h + e_r - W_r e_t|^2; a is found anew once an epoch, without gradients.
    `attention=False` (equal weights), `kge=False` (no facts trained), both with `layers=()` (matrix factorisation)
    are its peers at an equal budget.

    Shapes: training inputs are dicts of `[B]` (see `PairsThenFacts`), outputs `[B, 3]`; ranking inputs are `user`
    `[B]` and `seen` `[B, I]`, outputs the scores `[B, I]`, targets the relevant items `[B, I]`.

    Raises:
        MissingData: the folder `movielens100k` is not on this machine.

    Source: Wang, He, Cao, Liu, Chua, KDD 2019, arXiv 1905.07854. Data: MovieLens-100K; positives are ratings of 4 or
    5; of each user's, 20% test, 8% valid.

    Departs: one Adam serves both losses where the authors keep two, so the moments of the node vectors mix; pairs are
    visited once an epoch in random order, not drawn by user; in evaluation the attention always follows the present
    weights (the authors' is as old as the epoch); no warm start from matrix factorisation; `l2` and the budget were
    chosen on the validation part (the authors' 1e-5 overfits 40,000 ratings within 20 epochs).

    Example:
        >>> MovielensKGAT(layers=(), attention=False, kge=False).dim
        32
    """

    dim: int = param(32, "length of a node's own vector", ge=1)
    layers: tuple[int, ...] = param((32, 16), "lengths of the vectors after each propagation; none: factorisation")
    attention: bool = param(True, "weigh edges by attention instead of equally")
    kge: bool = param(True, "train the facts as a second phase of every epoch")
    graph: str = param("freebase", "which facts", choices=("freebase", "attributes"))
    core: int = param(10, "fewest facts of an entity that stays (freebase)", ge=1)
    dropout: float = param(0.1, "share of message values dropped", ge=0, lt=1)
    l2: float = param(1e-2, "weight of the vectors' squared norms", ge=0)
    users: int = param(0, "most users (0: all)", ge=0)
    items: int = param(0, "most items (0: all)", ge=0)
    data_seed: int = param(0, "which cut into train, valid and test", ge=0)

    def build(self, ctx: Context) -> Subject:
        tables = movielens()
        users = min(self.users or len(tables.users), len(tables.users))
        items = min(self.items or len(tables.items), len(tables.items))
        liked = (tables.rating >= 4) & (tables.user < users) & (tables.item < items)
        user, item = tables.user[liked], tables.item[liked]
        parts = split_per_user(user, (0.08, 0.2), seeded(self.data_seed, "movielens"))
        kept, checked, held = parts
        facts = attribute_facts(tables) if self.graph == "attributes" else freebase_facts(tables, self.core)
        graph = graph_of(user[kept], item[kept], facts, users, items)
        ends = (graph.head, graph.relation, graph.tail) if self.kge else (graph.head[:0],) * 3
        train = PairsThenFacts(user[kept], item[kept], items, *ends, graph.nodes)
        known, base = torch.cat((kept, checked)), len(train) + len(graph.head)
        splits = Splits(
            train,
            Rankings(user[checked], item[checked], user[kept], item[kept], users, items, base),
            Rankings(user[held], item[held], user[known], item[known], users, items, base + users),
        )
        with ctx.scope("init"):
            net = KGATNet(graph, self.dim, self.layers, self.dropout, self.attention)
        budget = Budget(epochs=40, batch_size=2048, optimizer="adam", lr=1e-2, schedule="linear")
        return Subject(net, splits, PairRanking(self.l2), budget=budget)
