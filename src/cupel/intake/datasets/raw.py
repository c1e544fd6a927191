"""What the readers of data share: the options, the arrays as stored, and bounds on what is read."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cupel.core.errors import DataError, MissingData, ParamError, nearest

LAYOUTS = ("auto", "NCHW", "NHWC", "NHW", "NF", "NCT")
MOST_BYTES = 16 * 2**30  # of memory that reading may take, where the machine has as much


@dataclass(frozen=True)
class DataOptions:
    """How to read what a user points at.

    Args:
        target: column of a table, or key of an npz, that holds the labels.
        layout: how stored arrays are laid out: auto, NCHW, NHWC, NHW, NF, NCT.
        low, high: declared range of the stored values; None: inferred.
        size: images are resized to `size x size` (0: as they are; they must then all be equal).
        channels: 1 (gray) or 3 (RGB) for images (0: as found).
        limit: at most so many examples, stratified and seeded (0: all).
        seed: of that choice.
    """

    target: str = ""
    layout: str = "auto"
    low: float | None = None
    high: float | None = None
    size: int = 0
    channels: int = 0
    limit: int = 0
    seed: int = 0

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ParamError: naming the option.
        """
        if self.layout not in LAYOUTS:
            raise ParamError(
                f"layout must be one of {', '.join(LAYOUTS)}; got {self.layout!r}."
                f"{nearest(str(self.layout).upper(), LAYOUTS)} Name the axes in stored order."
            )
        for name, top in (("size", 4096), ("channels", 3), ("limit", None), ("seed", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (top is not None and value > top):
                wanted = f"between 0 and {top}" if top else "0 or more"
                raise ParamError(f"{name} must be a whole number, {wanted}; got {value!r}. Leave it out, or change it.")
        if self.channels == 2:
            raise ParamError("channels must be 0, 1 or 3; got 2. Leave it out, or choose 1 (gray) or 3 (RGB).")
        if (self.low is None) != (self.high is None):
            raise ParamError(f"low and high must be given together; got {self.low} and {self.high}. Give both.")
        if self.low is None or self.high is None:
            return
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ParamError(f"low must lie below high; got {self.low} and {self.high}. Exchange them.")


@dataclass(frozen=True)
class Raw:
    """Data as stored, before layout, range and labels are settled.

    Args:
        parts: `{"all": (x, y)}` or `train`, `valid`, `test`; x `[N, ...]` numbers, y labels `[N]`, `[N, 1]` or one-hot.
        layout: known from the kind of file; `auto` where it must be found.
        known: the range of stored values, where the kind of file fixes it.
        names: class names by label number, where the source has them.
        fixed: labels are the numbers 0..K-1 of `names` already.
        notes: what the reader has to say.
    """

    parts: Mapping[str, tuple[np.ndarray, np.ndarray]]
    layout: str = "auto"
    known: tuple[float, float] | None = None
    names: tuple[str, ...] = ()
    fixed: bool = False
    notes: tuple[str, ...] = field(default=())


def regular_file(path: Path) -> int:
    """Bytes of `path`, which must be a plain file: a pipe or a device would be read for ever.

    Raises:
        MissingData: there is no such file.
        DataError: it is none, or may not be read.
    """
    try:
        told = path.stat()
    except FileNotFoundError:
        raise MissingData(f"{path} must exist; there is no such file. Check the path.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)} must be readable; got: {error}. Check the path and its permissions.") from None
    if not stat.S_ISREG(told.st_mode):
        raise DataError(f"{path} must be a plain file; it is a pipe, a device or a folder. Name a file.")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} must be readable; permission is denied. Change its permissions.")
    return told.st_size


def free_bytes() -> int:
    """Bytes of memory that reading may use: 16 GiB, or nine tenths of what is free where that is less."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return MOST_BYTES  # not Linux: the fixed limit alone
    return min(MOST_BYTES, free * 9 // 10)


def must_fit(wanted: int, what: str, todo: str) -> None:
    """Refuse before reading what would not fit in memory.

    Raises:
        DataError: with both sizes.
    """
    most = free_bytes()
    if wanted > most:
        raise DataError(f"{what} must fit in memory; it would take {gib(wanted)}, and {gib(most)} may be used. {todo}")


def gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**29 else f"{count / 2**20:,.1f} MiB"


def shown(word: Any, most: int = 60) -> str:
    """A name from the data as a sentence can show it: quoted, control characters escaped, shortened."""
    text = str(word)
    return repr(text if len(text) <= most else text[: most - 3] + "...")  # repr escapes lone surrogates too


def listed(words: Iterable[Any], most: int = 10) -> str:
    """The first few of many names."""
    every = list(words)
    rest = f" and {len(every) - most:,} more" if len(every) > most else ""
    return ", ".join(shown(w, 40) for w in every[:most]) + rest


def count_of(count: int, one: str, many: str = "") -> str:
    """`3 files`, `1 file`.

    >>> count_of(1, "class", "classes"), count_of(1200, "row")
    ('1 class', '1,200 rows')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"
