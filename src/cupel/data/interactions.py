"""Positive user-item pairs and facts as data sets: batches of pairs, of facts, and of whole rankings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import seeded
from cupel.core.types import Batch, digest


def split_per_user(user: Tensor, shares: tuple[float, float], draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `[N]` of interactions for train, valid and test, every user's cut by the same shares.

    Args:
        user: of every interaction, `[N]`.
        shares: of a user's interactions for valid and for test, rounded; train keeps at least one.
        draw: the source of the cut.
    """
    shuffled = torch.randperm(len(user), generator=draw)
    order = shuffled[user[shuffled].argsort(stable=True)]
    count = torch.bincount(user)
    place = torch.arange(len(user)) - (count.cumsum(0) - count)[user[order]]  # position within its user
    test = torch.minimum((count * shares[1]).round().long(), count - 1)[user[order]]
    rest = torch.minimum((count * shares[0]).round().long()[user[order]], count[user[order]] - 1 - test)
    where = (place >= test).long() + (place >= test + rest).long()  # 0 test, 1 valid, 2 train
    kept, checked, held = (order[where == part].sort().values for part in (2, 1, 0))
    return kept, checked, held


def uniform_outside(row: Tensor, columns: int, taken: Tensor, draw: torch.Generator, tries: int = 20) -> Tensor:
    """For every entry of `row` `[B]`, a uniform column whose pair is not among `taken`.

    A row whose pairs are nearly all taken may keep a taken one after `tries` rounds.

    Args:
        taken: `row * columns + column` of the pairs to avoid, ascending, `[N]` int64.
    """
    found = torch.randint(columns, row.shape, generator=draw)
    open_ = torch.arange(len(row))
    for _ in range(tries if len(taken) else 0):
        key = row[open_] * columns + found[open_]
        place = torch.searchsorted(taken, key).clamp_max(len(taken) - 1)
        open_ = open_[taken[place] == key]
        if not len(open_):
            break
        found[open_] = torch.randint(columns, open_.shape, generator=draw)
    return found


@dataclass(frozen=True)
class PairsThenFacts:
    """One epoch: all positive pairs with a random negative each, then facts with a corrupted tail each.

    A batch of pairs holds `user`, `positive`, `negative` and `opens` (true in the epoch's first batch); a batch of
    facts holds `head`, `relation`, `tail`, `corrupt`. All are `[B]`; so is `targets`, which is one throughout: the
    first of each two must score above the second. Without `draw` the negatives are the same at every call.

    Args:
        user, item: the positive pairs, `[P]`.
        items: how many items there are.
        head, relation, tail: facts in ascending order of head, `[E]`; empty for no second phase.
        nodes: how many nodes facts speak of.
        facts_per_pair: facts in a batch for one pair in a batch.
    """

    user: Tensor
    item: Tensor
    items: int
    head: Tensor
    relation: Tensor
    tail: Tensor
    nodes: int
    facts_per_pair: int = 2

    def __len__(self) -> int:
        return len(self.user)

    @property
    def fingerprint(self) -> str:
        return digest(self.user, self.item, self.head, self.relation, self.tail, f"{self.items} {self.nodes}")

    def batches(self, size: int, draw: torch.Generator | None = None) -> Iterator[Batch]:
        shuffled = draw is not None
        draw = draw if draw is not None else seeded(0, "pairs")
        order = torch.randperm(len(self), generator=draw) if shuffled else torch.arange(len(self))
        taken = (self.user * self.items + self.item).sort().values
        for number, rows in enumerate(order.split(size)):
            user = self.user[rows]
            inputs = {
                "user": user,
                "positive": self.item[rows],
                "negative": uniform_outside(user, self.items, taken, draw),
                "opens": torch.full_like(user, number == 0, dtype=torch.bool),
            }
            yield Batch(inputs, torch.ones(len(rows)), rows)
        yield from self._facts(size * self.facts_per_pair, draw)

    def _facts(self, size: int, draw: torch.Generator) -> Iterator[Batch]:
        """E // size batches of facts: heads at random, one of the facts of each, one tail that makes it untrue."""
        if not len(self.head):
            return
        heads, count = self.head.unique_consecutive(return_counts=True)
        first = count.cumsum(0) - count
        relations = int(self.relation.max()) + 1
        true = ((self.head * relations + self.relation) * self.nodes + self.tail).sort().values
        for _ in range(max(1, len(self.head) // size)):
            at = torch.randint(len(heads), (size,), generator=draw)
            rows = first[at] + (torch.rand(size, generator=draw, dtype=torch.float64) * count[at]).long()
            rows = rows[self.relation[rows].argsort(stable=True)]  # one matrix product a relation needs them in a row
            head, relation = self.head[rows], self.relation[rows]
            corrupt = uniform_outside(head * relations + relation, self.nodes, true, draw)
            inputs = {"head": head, "relation": relation, "tail": self.tail[rows], "corrupt": corrupt}
            yield Batch(inputs, torch.ones(size), len(self) + rows)


@dataclass(frozen=True)
class Rankings:
    """Users whose held-out items are to be ranked first among all items they have not seen.

    A batch holds `user` `[B]` and `seen` `[B, I]` bool (items out of the ranking); `targets` `[B, I]` bool marks
    the relevant items.

    Args:
        user, item: held-out pairs, `[P]`; users without one are not ranked.
        seen_user, seen_item: pairs known before, `[S]`.
        users, items: how many there are.
        index_from: identity of user 0, so that no split reuses an identity.
    """

    user: Tensor
    item: Tensor
    seen_user: Tensor
    seen_item: Tensor
    users: int
    items: int
    index_from: int

    def __len__(self) -> int:
        return len(self.user.unique())

    @property
    def fingerprint(self) -> str:
        return digest(self.user, self.item, self.seen_user, self.seen_item, f"{self.users} {self.items}")

    def batches(self, size: int, draw: torch.Generator | None = None) -> Iterator[Batch]:
        who = self.user.unique()
        relevant, seen = torch.zeros(2, self.users, self.items, dtype=torch.bool)
        relevant[self.user, self.item] = True
        seen[self.seen_user, self.seen_item] = True
        if draw is not None:
            who = who[torch.randperm(len(who), generator=draw)]
        for rows in who.split(size):
            yield Batch({"user": rows, "seen": seen[rows]}, relevant[rows], self.index_from + rows)
