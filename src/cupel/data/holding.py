"""What of a data set is on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cupel.data.dataset import DataSet
from cupel.data.local import places


@dataclass(frozen=True)
class Holding:
    """What of a set is on this machine.

    Args:
        state: `here`, `part` or `absent`.
        folder: the folder that holds it, or the part of it.
        missing: files that are not here.
    """

    state: str
    folder: Path | None
    missing: tuple[str, ...] = ()


def holding(entry: DataSet, data_dir: Path | None = None) -> Holding:
    """What of a set is here, in any of the places (a file may lie in another place than its neighbour)."""
    if entry.members:
        held = [holding(entry.of(member), data_dir) for member in entry.members]
        missing = tuple(m for m, h in zip(entry.members, held, strict=True) if h.state != "here")
        folder = next((h.folder for h in held if h.folder), None)
        return Holding("absent" if len(missing) == len(held) else "part" if missing else "here", folder, missing)
    if not entry.files and not entry.also:
        return Holding("here", _package(entry))
    wanted = tuple(f.wanted for f in entry.files)
    groups = tuple(group for group in (wanted, *entry.also) if group)
    where = places(data_dir)
    for look in (*([place] for place in where), where):  # whole in one place first, then put together from several
        for group in groups:
            found = [_first(look, name) for name in group]
            if (one := found[0]) is not None and None not in found:
                return Holding("here", one if one.is_dir() and len(group) == 1 else _top(one, group[0], entry))
    some = [(p, n) for n in wanted if (p := _first(where, n)) is not None]
    missing = tuple(n for n in wanted if _first(where, n) is None)
    return Holding("part" if some else "absent", _top(*some[0], entry) if some else None, missing)


def _first(where: list[Path], name: str) -> Path | None:
    return next((place / name for place in where if (place / name).exists()), None)


def _top(path: Path, name: str, entry: DataSet) -> Path:
    """The set's folder in the place where `name` was found at `path`."""
    place = path.parents[len(Path(name).parts) - 1]
    return place / Path(name).parts[0] if len(Path(name).parts) > 1 else place / entry.folder


def _package(entry: DataSet) -> Path | None:
    """Where scikit-learn keeps its own data; found without importing it."""
    from importlib.util import find_spec

    spec = find_spec("sklearn")
    roots = spec.submodule_search_locations if spec else None
    return Path(next(iter(roots))) / "datasets" / "data" if roots else None
