"""MovieLens-100K: ratings, films, people, and the Freebase facts about the films."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from cupel.data.local import local


@dataclass(frozen=True)
class MovieLens:
    """The tables, with users and items numbered from zero in the order of their own files.

    Args:
        user, item: of every rating, `[N]` int64.
        rating: 1 to 5, `[N]`.
        time: of every rating, seconds since 1970, `[N]` int64.
        users: one row a user: age, gender, occupation, zip_code.
        items: one row a film: movie_title, release_year, class (genres divided by blanks).
        facts: Freebase triples (head, relation, tail) by name.
        entity: item number -> the film's Freebase name, for the films that have one.
    """

    user: Tensor
    item: Tensor
    rating: Tensor
    time: Tensor
    users: tuple[dict[str, str], ...]
    items: tuple[dict[str, str], ...]
    facts: tuple[tuple[str, str, str], ...]
    entity: dict[int, str]


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a gzipped CSV file with a header line."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


@lru_cache(maxsize=1)
def movielens() -> MovieLens:
    """MovieLens-100K with its knowledge graph: 943 users, 1,682 films, 100,000 ratings, 91,631 facts.

    Source: F. M. Harper, J. A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015; facts: W. X. Zhao et al.,
    KB4Rec, Data Intelligence 1(2), 2019. Research use only (GroupLens terms).

    Raises:
        MissingData: the folder `movielens100k` is not on this machine.
    """
    return read_movielens(local("movielens100k"))


def read_movielens(folder: Path) -> MovieLens:
    """The five files of `folder`: inter, user, item, kg and link, each `.csv.gz`."""
    users, items = rows(folder / "user.csv.gz"), rows(folder / "item.csv.gz")
    user_of = {row["user_id"]: number for number, row in enumerate(users)}
    item_of = {row["item_id"]: number for number, row in enumerate(items)}
    ratings = rows(folder / "inter.csv.gz")
    return MovieLens(
        torch.tensor([user_of[r["user_id"]] for r in ratings]),
        torch.tensor([item_of[r["item_id"]] for r in ratings]),
        torch.tensor([float(r["rating"]) for r in ratings]),
        torch.tensor([int(float(r["timestamp"])) for r in ratings]),
        tuple(users),
        tuple(items),
        tuple((r["head_id"], r["relation_id"], r["tail_id"]) for r in rows(folder / "kg.csv.gz")),
        {item_of[r["item_id"]]: r["entity_id"] for r in rows(folder / "link.csv.gz") if r["item_id"] in item_of},
    )
