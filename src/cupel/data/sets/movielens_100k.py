"""Ratings of films, and facts about the films."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.movielens import MovieLens, either_movielens

# The archive: size and sha256 from tensorflow/datasets, url_checksums/movielens.txt. The facts: computed on the files
# of RUCAIBox/RecBole at the commit in their address.
SET = DataSet(
    name="movielens-100k",
    title="100,000 ratings of 1,682 films by 943 people, with 91,631 facts about the films",
    kind="interactions",
    licence="GroupLens terms: research only, no redistribution; facts: KB4Rec, Freebase (CC BY)",
    source="F. M. Harper, J. A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015",
    folder="movielens-100k",
    examples=100000,
    classes=0,
    files=(
        File(
            path="movielens-100k/ml-100k.zip",
            urls=("https://files.grouplens.org/datasets/movielens/ml-100k.zip",),
            bytes=4924029,
            sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
            unpacks="movielens-100k/ml-100k",
            unpacked_bytes=60000000,
        ),
        File(
            path="movielens-100k/ml-100k.kg",
            urls=(
                "https://raw.githubusercontent.com/RUCAIBox/RecBole/7b02be5ec80a88310f2d04a27a82adfcbb5dc211/"
                "recbole/dataset_example/ml-100k/ml-100k.kg",
            ),
            bytes=3515608,
            sha256="200a0636fa07c218119a42e5bac7aa3e26e3665a6f919c1b22909bd412b14779",
        ),
        File(
            path="movielens-100k/ml-100k.link",
            urls=(
                "https://raw.githubusercontent.com/RUCAIBox/RecBole/7b02be5ec80a88310f2d04a27a82adfcbb5dc211/"
                "recbole/dataset_example/ml-100k/ml-100k.link",
            ),
            bytes=21507,
            sha256="524dca2c3d62619688ab99b3ec53ea2acb9b64d38eafec3e02bdd0dc6bb7d948",
        ),
    ),
    also=(
        (
            "movielens100k/inter.csv.gz",
            "movielens100k/user.csv.gz",
            "movielens100k/item.csv.gz",
            "movielens100k/kg.csv.gz",
            "movielens100k/link.csv.gz",
        ),
    ),
)


def read(member: str = "", data_dir: Path | None = None) -> MovieLens:
    """Ratings, people, films and facts."""
    return either_movielens(data_dir)
