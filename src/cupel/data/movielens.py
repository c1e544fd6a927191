"""MovieLens-100K: ratings, films, people, and the Freebase facts about the films."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from cupel.core.errors import MissingData
from cupel.data.local import local

_DATED = re.compile(r"(.+) \((\d{4})\)")  # the year may be followed by more, such as (V)


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
    """The rows of a gzipped CSV file with a header line.

    Raises:
        MissingData: the file is missing or broken.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as text:
            return list(csv.DictReader(text))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise MissingData(f"{path} must be a gzipped CSV file; got {error}. Put it there again.") from None


@lru_cache(maxsize=1)
def movielens() -> MovieLens:
    """MovieLens-100K with its knowledge graph: 943 users, 1,682 films, 100,000 ratings, 91,631 facts.

    Source: F. M. Harper, J. A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015; facts: W. X. Zhao et al.,
    KB4Rec, Data Intelligence 1(2), 2019. Research use only (GroupLens terms).

    Raises:
        MissingData: the files are not on this machine, or have no facts.
    """
    return either_movielens(facts=True)


def either_movielens(data_dir: Path | None = None, facts: bool = False) -> MovieLens:
    """The set in whichever of its two formats is here.

    Args:
        data_dir: where to look first.
        facts: refuse a copy without the knowledge graph.

    Raises:
        MissingData: it is not on this machine, is broken, or lacks the facts that are asked for.
    """
    path = local("movielens100k", "movielens-100k/ml-100k", data_dir=data_dir)
    found = read_movielens(path) if path.name == "movielens100k" else read_ml100k(path)
    if facts and not found.facts:
        raise MissingData(
            f"{path.parent} must hold ml-100k.kg and ml-100k.link beside {path.name}; got no facts. "
            "Run `cupel data fetch movielens-100k`."
        )
    return found


def read_movielens(folder: Path) -> MovieLens:
    """The five files of `folder`: inter, user, item, kg and link, each `.csv.gz`.

    Raises:
        MissingData: a file is missing or broken, or a rating names nobody.
    """
    users, items = rows(folder / "user.csv.gz"), rows(folder / "item.csv.gz")
    with _named(folder):
        return _numbered(
            users,
            items,
            rows(folder / "inter.csv.gz"),
            tuple((r["head_id"], r["relation_id"], r["tail_id"]) for r in rows(folder / "kg.csv.gz")),
            {r["item_id"]: r["entity_id"] for r in rows(folder / "link.csv.gz")},
        )


def read_ml100k(folder: Path) -> MovieLens:
    """The folder `ml-100k` of the archive from GroupLens: u.data, u.user, u.item and u.genre.

    The facts come from `ml-100k.kg` and `ml-100k.link` beside it, where they are; otherwise there are none.

    Raises:
        MissingData: a file is missing or broken, or a rating names nobody.
    """
    genres = [name for name, _ in _table(folder / "u.genre", "|", ("name", "number"))]
    heads = ("user_id", "age", "gender", "occupation", "zip_code")
    users = [dict(zip(heads, row, strict=True)) for row in _table(folder / "u.user", "|", heads)]
    items = []
    for number, title, date, _, _, *marks in _table(folder / "u.item", "|", ("",) * (5 + len(genres))):
        dated = _DATED.match(title)
        items.append(
            {
                "item_id": number,
                "movie_title": dated[1] if dated else title,
                "release_year": dated[2] if dated else date[-4:],
                "class": " ".join(g for g, mark in zip(genres, marks, strict=True) if mark == "1"),
            }
        )
    rated = ("user_id", "item_id", "rating", "timestamp")
    ratings = [dict(zip(rated, row, strict=True)) for row in _table(folder / "u.data", "\t", rated)]
    facts, link = folder.parent / "ml-100k.kg", folder.parent / "ml-100k.link"
    there = facts.is_file() and link.is_file()
    with _named(folder):
        return _numbered(
            users,
            items,
            ratings,
            tuple((h, r, t) for h, r, t in _table(facts, "\t", ("head", "relation", "tail"))[1:]) if there else (),
            {row[0]: row[1] for row in _table(link, "\t", ("item", "entity"))[1:]} if there else {},
        )


def _table(path: Path, mark: str, columns: tuple[str, ...]) -> list[list[str]]:
    """The rows of a text file without quoting; the archive is in Latin-1."""
    if not path.is_file():
        raise MissingData(f"{path} must be there; got none. Run `cupel data fetch movielens-100k --again`.")
    found = [line.split(mark) for line in path.read_text(encoding="latin-1").split("\n") if line.strip()]
    wrong = next((at for at, row in enumerate(found) if len(row) != len(columns)), None)
    if wrong is not None or not found:
        got = f"{len(found[wrong])} in row {wrong + 1}" if wrong is not None else "no rows"
        raise MissingData(
            f"{path} must have {len(columns)} columns; got {got}. Run `cupel data fetch movielens-100k --again`."
        )
    return found


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn a name that is nowhere, or a number that is none, into an error about the folder."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise MissingData(
            f"the tables of {folder} must name the same users and films, in numbers; got {error}. Put them there again."
        ) from None


def _numbered(
    users: list[dict[str, str]],
    items: list[dict[str, str]],
    ratings: list[dict[str, str]],
    facts: tuple[tuple[str, str, str], ...],
    entity: dict[str, str],
) -> MovieLens:
    user_of = {row["user_id"]: number for number, row in enumerate(users)}
    item_of = {row["item_id"]: number for number, row in enumerate(items)}
    return MovieLens(
        torch.tensor([user_of[r["user_id"]] for r in ratings]),
        torch.tensor([item_of[r["item_id"]] for r in ratings]),
        torch.tensor([float(r["rating"]) for r in ratings]),
        torch.tensor([int(float(r["timestamp"])) for r in ratings]),
        tuple(users),
        tuple(items),
        facts,
        {item_of[i]: e for i, e in entity.items() if i in item_of},
    )
