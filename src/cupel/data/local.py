"""Where data files are: the folder named in the command, the user's folder, then the cache of downloads."""

from __future__ import annotations

import os
from pathlib import Path

from cupel.core.errors import MissingData


def places(data_dir: Path | None = None) -> list[Path]:
    """Folders that may hold data, in the order in which they are looked through.

    Args:
        data_dir: what the user named in the command; comes first.
    """
    import platformdirs

    named = [data_dir] if data_dir else []
    if os.environ.get("CUPEL_DATA"):
        named.append(Path(os.environ["CUPEL_DATA"]))
    return [p.expanduser() for p in (*named, Path(platformdirs.user_cache_dir("cupel")) / "data")]


def located(*names: str, data_dir: Path | None = None) -> Path | None:
    """The path of the first of `names` in the first place that has one of them, or `None`."""
    return next((p / name for p in places(data_dir) for name in names if (p / name).exists()), None)


def local(*names: str, data_dir: Path | None = None) -> Path:
    """The path of a data file or folder, such as `ucr/GunPoint.npz`.

    Args:
        names: the same data in several formats; the first place that has one of them counts.
        data_dir: where to look before `$CUPEL_DATA` and the user's cache folder.

    Raises:
        MissingData: it is in none of them; says which command brings it, where one does.
    """
    if (path := located(*names, data_dir=data_dir)) is not None:
        return path
    first, *others = (str(p) for p in places(data_dir))
    hint = _bringer(names)
    bring = f"Run `cupel data fetch {hint}`, or put it there" if hint else "Put it there"
    where = " or ".join(("CUPEL_DATA" if str(p) == os.environ.get("CUPEL_DATA") else p) for p in (first, *others))
    unset = "" if os.environ.get("CUPEL_DATA") else "CUPEL_DATA or "
    formats = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    raise MissingData(
        f"data file {names[0]} must be in {unset}{where}; got none{formats}. "
        f"{bring}, or set CUPEL_DATA to the folder that holds it."
    )


def _bringer(names: tuple[str, ...]) -> str:
    """The set that a fetch of brings one of these files, or an empty string."""
    from cupel.data.sets import entries

    for entry in entries():
        for one in (entry, *(entry.of(m) for m in entry.members if any(f"/{m}" in n for n in names))):
            brought = {part for f in one.files if f.urls for part in (f.path, f.wanted)}
            if any(n == b or n.startswith(f"{b}/") for n in names for b in brought):
                return one.name
    return ""
