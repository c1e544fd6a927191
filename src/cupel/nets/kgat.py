"""A graph network over users, items and facts that scores pairs of users and items and judges facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.ops.graphs import Layout, layout, propagate, segment_softmax


@dataclass(frozen=True)
class Facts:
    """A graph of facts (head, relation, tail): users come first, then items, then other entities.

    Args:
        users, items, others: how many nodes of each kind.
        relations: how many relations, inverses counted.
        head, relation, tail: of every fact, `[E]` int64, in ascending order of head; no fact twice.
    """

    users: int
    items: int
    others: int
    relations: int
    head: Tensor
    relation: Tensor
    tail: Tensor

    @property
    def nodes(self) -> int:
        return self.users + self.items + self.others


def by_relation(x: Tensor, relation: Tensor, matrices: Tensor) -> Tensor:
    """Every row through the matrix of its relation: x `[B, M, d]`, matrices `[R, d, k]` -> `[B, M, k]`.

    Rows that come in ascending order of relation `[B]` are not copied.
    """
    if bool((relation[1:] >= relation[:-1]).all()):
        parts = x.split(torch.bincount(relation, minlength=len(matrices)).tolist())
        return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])
    order = relation.argsort(stable=True)
    return by_relation(x[order], relation[order], matrices)[order.argsort()]


class BiInteraction(nn.Module):
    """LeakyReLU(W1 (e + n)) + LeakyReLU(W2 (e * n)) with message dropout: `[N, d]`, `[N, d]` -> `[N, k]`."""

    def __init__(self, fan_in: int, fan_out: int, dropout: float) -> None:
        super().__init__()
        self.sum, self.product = nn.Linear(fan_in, fan_out), nn.Linear(fan_in, fan_out)
        for part in (self.sum, self.product):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, own: Tensor, near: Tensor) -> Tensor:
        mixed = F.leaky_relu(self.sum(own + near), 0.2) + F.leaky_relu(self.product(own * near), 0.2)
        out: Tensor = self.dropout(mixed)
        return out


class KGATNet(nn.Module):
    """Knowledge graph attention network; without layers it is matrix factorisation.

    It is called with one dict of tensors and answers by what is in it:
    `user`, `positive`, `negative` -> `[B, 3]`: score of the positive, of the negative, half the squared norms;
    `head`, `relation`, `tail`, `corrupt` -> `[B, 3]`: minus the TransR energy of the true fact, of the corrupted
    one, half the squared norms; `user` alone -> scores of all items, `[B, items]`.

    The attention of the edges is a constant of the recommendation loss. In training it is the one found at the
    epoch's first batch (`opens`); in evaluation it is computed afresh from the weights as they stand, so that
    outputs depend on the weights alone and asking for them changes nothing.
    """

    edge_head: Tensor
    edge_source: Tensor
    edge_kind: Tensor
    edge_by_kind: Tensor
    edge_weight: Tensor
    stale: Tensor

    def __init__(self, facts: Facts, dim: int, layers: tuple[int, ...], dropout: float, attention: bool) -> None:
        super().__init__()
        self.users, self.items, self.nodes, self.attention = facts.users, facts.items, facts.nodes, attention
        self.user = nn.Embedding(facts.users, dim)
        self.entity = nn.Embedding(facts.items + facts.others, dim)
        self.relation = nn.Embedding(facts.relations, dim)
        for table in (self.user, self.entity, self.relation):
            nn.init.xavier_uniform_(table.weight)
        self.transfer_weight = nn.Parameter(torch.empty(facts.relations, dim, dim))
        for matrix in self.transfer_weight:
            nn.init.xavier_uniform_(matrix.data)
        self.layers = nn.ModuleList(BiInteraction(a, b, dropout) for a, b in zip((dim, *layers), layers, strict=False))
        self._lay_out(facts)

    def _lay_out(self, facts: Facts) -> None:
        edges = layout(facts.head, facts.tail, facts.nodes, facts.nodes)
        named = {"head": facts.head, "kind": facts.relation, "by_kind": facts.relation.argsort(stable=True)}
        for name, part in {**named, **edges._asdict()}.items():
            self.register_buffer(f"edge_{name}", part, persistent=False)
        # Before the first attention every relation of a node shares one unit of weight among its edges.
        group = facts.head * facts.relations + facts.relation if self.attention else facts.head
        _, place, count = group.unique(return_inverse=True, return_counts=True)
        self.register_buffer("edge_weight", 1.0 / count[place])
        self.register_buffer("stale", torch.tensor(False))

    def nodes_table(self) -> Tensor:
        """Vectors of all nodes before propagation, `[N, d]`."""
        return torch.cat((self.user.weight, self.entity.weight))

    @torch.no_grad()
    def attend(self) -> Tensor:
        """Attention of every edge, `[E]`; over the edges of one head it sums to one.

        pi(h, r, t) = (e_t W_r) . tanh(e_h W_r + e_r), then a softmax over all edges of h.
        """
        table, rows = self.nodes_table(), self.edge_by_kind
        kind = self.edge_kind[rows]
        ends = torch.stack((table[self.edge_head[rows]], table[self.edge_source[rows]]), dim=1)  # [E, 2, d]
        head, tail = by_relation(ends, kind, self.transfer_weight).unbind(1)
        scores = torch.empty_like(self.edge_weight)
        scores[rows] = (tail * torch.tanh(head + self.relation.weight[kind])).sum(1)
        return segment_softmax(scores, self.edge_head, self.nodes)

    def vectors(self, weight: Tensor) -> Tensor:
        """Final vectors of all nodes under edge weights `[E]`: all layers side by side, `[N, d + ...]`."""
        own = self.nodes_table()
        edges = Layout(*(getattr(self, f"edge_{name}") for name in Layout._fields))
        found = [own]
        for layer in self.layers:
            own = layer(own, propagate(own, weight, edges))
            found.append(F.normalize(own, dim=1))
        return torch.cat(found, dim=1)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.training:
            self._keep_time(inputs)
        if "head" in inputs:
            return self._judge(inputs)
        fresh = self.attention and not self.training and len(self.layers) > 0
        table = self.vectors(self.attend() if fresh else self.edge_weight)
        if "positive" not in inputs:
            return table[inputs["user"]] @ table[self.users : self.users + self.items].T
        user, one, other = (
            table[rows] for rows in (inputs["user"], inputs["positive"] + self.users, inputs["negative"] + self.users)
        )
        half = 0.5 * (user.square().sum(1) + one.square().sum(1) + other.square().sum(1))
        return torch.stack(((user * one).sum(1), (user * other).sum(1), half), dim=1)

    def _judge(self, inputs: Mapping[str, Tensor]) -> Tensor:
        table = self.nodes_table()
        ends = torch.stack([table[inputs[name]] for name in ("head", "tail", "corrupt")], dim=1)  # [B, 3, d]
        head, tail, wrong = by_relation(ends, inputs["relation"], self.transfer_weight).unbind(1)
        link = self.relation.weight[inputs["relation"]]
        half = 0.5 * torch.stack((head, tail, wrong, link)).square().sum((0, 2))
        return torch.stack((-(head + link - tail).square().sum(1), -(head + link - wrong).square().sum(1), half), dim=1)

    def _keep_time(self, inputs: Mapping[str, Tensor]) -> None:
        """Attention is refreshed once an epoch: by its first batch, if any other batch came since the last time.

        A second call with the first batch (a technique may make one) finds nothing stale.
        """
        if not self.attention:
            return
        if "opens" in inputs and bool(inputs["opens"].any()):
            if bool(self.stale):
                self.edge_weight.copy_(self.attend())
                self.stale.fill_(False)
        else:
            self.stale.fill_(True)
