"""Named data sets: one file each, found by its name; there is no list to edit.

`sets/fashion_mnist.py` is the set `fashion-mnist`. It holds a literal `SET = DataSet(...)`, read from the source
text, and `read(member, data_dir)`, imported only when the data are read. `read` returns what the kind of the set
says: `Found` for images, series and features; for a graph `data.planetoid.Citations`; for interactions
`data.movielens.MovieLens`; for texts `data.tweets.Tweets`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cupel.core.errors import ParamError, nearest
from cupel.data.dataset import DataSet, entry_in

if TYPE_CHECKING:
    from cupel.data.found import Found

HERE = Path(__file__).parent


def entries() -> list[DataSet]:
    """All sets, by name. Imports none of them."""
    found = [entry_in(path) for path in HERE.glob("*.py") if not path.stem.startswith("_")]
    return sorted(found, key=lambda entry: entry.name)


def names() -> list[str]:
    """What users may type; a collection stands as `ucr/NAME`."""
    return [f"{e.name}/NAME" if e.members else e.name for e in entries()]


def find(name: str) -> DataSet:
    """The entry of a set, or of a collection's member (`ucr/GunPoint`).

    Raises:
        ParamError: no set has that name; says which ones come near.
    """
    stem, _, member = name.partition("/")
    known = {e.name: e for e in entries()}
    if stem not in known:
        raise ParamError(
            f"a data set must be one of {', '.join(names())}; got {name!r}.{nearest(stem, known)} "
            "`cupel data list` shows them all."
        )
    entry = known[stem]
    if not entry.members and member:
        raise ParamError(f"data set {stem} must be named without a part; got {name!r}. Write {stem}.")
    if not entry.members:
        return entry
    if member not in entry.members:
        raise ParamError(
            f"{stem} must be followed by one of its {len(entry.members)} sets, as in {stem}/{entry.members[0]}; "
            f"got {name!r}.{nearest(member, entry.members)} `cupel data list {stem}` shows them all."
        )
    return entry.of(member)


def load(name: str, data_dir: Path | None = None) -> Any:
    """Whatever the set holds: `Found`, `Citations`, `MovieLens` or `Tweets`, as its kind says.

    Args:
        name: such as `fashion-mnist` or `ucr/GunPoint`.
        data_dir: where to look first.

    Raises:
        ParamError: an unknown name.
        MissingData: the files are not on this machine, or are broken; says how to get them.
    """
    entry = find(name)
    stem, _, member = entry.name.partition("/")
    module = importlib.import_module(f"cupel.data.sets.{stem.replace('-', '_')}")
    return module.read(member, data_dir)


def read(name: str, data_dir: Path | None = None) -> Found:
    """A set of examples: images, series or features.

    Args:
        name: such as `fashion-mnist` or `ucr/GunPoint`.
        data_dir: where to look first.

    Raises:
        ParamError: an unknown name, or a set that is a graph or holds interactions or texts.
        MissingData: the files are not on this machine, or are broken; says how to get them.
    """
    entry = find(name)
    if entry.kind in ("graph", "interactions", "texts"):
        raise ParamError(
            f"a data set for this must hold images, series or features; got {name!r}, which is of kind {entry.kind}. "
            "Read it with cupel.data.sets.load, or choose another: `cupel data list`."
        )
    found: Found = load(name, data_dir)
    return found
