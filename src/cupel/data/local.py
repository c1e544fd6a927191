"""Where data files are: the user's folder first, then the cache of downloads."""

from __future__ import annotations

import os
from pathlib import Path

from cupel.core.errors import MissingData


def local(name: str) -> Path:
    """The path of data file `name`, such as `ucr/GunPoint.npz`.

    Looks into `$CUPEL_DATA`, then into the user's cache folder.

    Raises:
        MissingData: it is in neither.
    """
    import platformdirs

    places = [Path(os.environ["CUPEL_DATA"])] if os.environ.get("CUPEL_DATA") else []
    places.append(Path(platformdirs.user_cache_dir("cupel")) / "data")
    for place in places:
        if (place / name).exists():
            return place / name
    raise MissingData(
        f"data file {name} must be in CUPEL_DATA or {places[-1]}; it is in neither. "
        "Set CUPEL_DATA to the folder that holds it."
    )
