"""Reading the data that a user points at: one function, whatever the kind."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from cupel.core.errors import DataError, MissingData, ParamError, nearest
from cupel.core.types import Examples
from cupel.data.found import Found
from cupel.intake.datasets.draw import copies_told, divide, split_found, spread_rows
from cupel.intake.datasets.own import PLACE
from cupel.intake.datasets.raw import DataOptions, Raw, must_fit, shown
from cupel.intake.datasets.settle import counts_told, settle

FORMS = (
    "a folder of class folders of images, an .npz, .csv, .csv.gz or .parquet file, the name of a data set "
    "(`cupel data list`), or package.module:name"
)
_CONVERT = {
    ".npy": "Store x and y together with numpy.savez.",
    ".pkl": "Pickles run code when they are opened; store arrays with numpy.savez.",
    ".pt": "Store arrays with numpy.savez.",
}
_ENDINGS = (".npz", ".csv", ".csv.gz", ".parquet")


def runs_code(source: str) -> bool:
    """True if reading `source` imports the user's Python: to be announced before `read_data` is called."""
    return bool(PLACE.fullmatch(source)) and not os.path.lexists(source)


def read_data(source: str, options: DataOptions = DataOptions()) -> Found:
    """The examples that `source` names, and a sentence for everything that was inferred or skipped.

    Args:
        source: a folder of class folders of images, a .npz, .csv, .csv.gz or .parquet file, the name of a data set,
            or `package.module:name`.
        options: what the user declares about it.

    Returns:
        float32 examples with class numbers; one set under `all`, or the source's own splits.

    Raises:
        DataError: the data are broken, or are not what they must be.
        MissingData: nothing is there.
        ParamError: an option that means nothing here.
        MissingExtra: the kind of file needs a package that is not installed.
    """
    options.check()
    raw = _read(str(source), options)
    if isinstance(raw, Found):
        _sound(raw, source)
    found = settle(raw, options) if isinstance(raw, Raw) else _limited(raw, options)
    found = _resized(found, options)
    _sound(found, source)
    return found


def _read(source: str, options: DataOptions) -> Raw | Found:
    """Choose the reader; it is imported here, so that nobody loads what they do not use."""
    if "\0" in source or not source:
        raise DataError(f"data must be {FORMS}; got {shown(source)}. Name one.")
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # `~name` of a user that this machine does not have
        path = Path(source)
    if _is_there(path):
        raw = _read_path(path, options)
        if source not in _set_names():
            return raw
        return replace(raw, notes=(f"{path} read, though a data set has that name too", *raw.notes))
    if PLACE.fullmatch(source):
        _only(options, source, ("target",))
        from cupel.intake.datasets.own import read_own

        own = read_own(source)
        if isinstance(own, Found):
            _only(options, source, ("layout", "low", "high"))
        return own
    if source.lower().endswith(_ENDINGS) or source.startswith((".", "/", "~")):
        raise MissingData(f"{shown(source, 200)} must exist; there is no such file.{_siblings(path)} Check the path.")
    return _named(source, options)


def _is_there(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # a name that is too long for the system, for one
        return False


def _siblings(path: Path) -> str:
    try:
        return nearest(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return ""


def _read_path(path: Path, options: DataOptions) -> Raw:
    name = path.name.lower()
    if path.is_dir():
        _only(options, str(path), ("target", "layout"))
        from cupel.intake.datasets.images import read_images

        return read_images(path, options)
    if name.endswith(".npz"):
        from cupel.intake.datasets.arrays import read_npz

        return read_npz(path, options)
    if name.endswith((".csv", ".csv.gz", ".parquet")):
        _only(options, str(path), ("layout", "size", "channels"))
        from cupel.intake.datasets.tables import read_table

        return read_table(path, options)
    todo = _CONVERT.get(path.suffix.lower(), "Convert the file.")
    raise DataError(f"data must be {FORMS}; got {shown(path, 200)}. {todo}")


def _set_names() -> set[str]:
    from cupel.data import sets

    return {name.partition("/")[0] for name in sets.names()}


def _named(source: str, options: DataOptions) -> Found:
    from cupel.data import sets

    known = sets.names()
    if source.partition("/")[0] not in _set_names():
        raise MissingData(
            f"data must be {FORMS}; got {shown(source, 200)}, which is none of these."
            f"{nearest(source, known)} Data sets: {', '.join(known)}."
        )
    _only(options, source, ("target", "layout", "low", "high"))
    return sets.read(source)


def _only(options: DataOptions, source: str, refused: tuple[str, ...]) -> None:
    """An option that would be ignored is an error."""
    default = DataOptions()
    for name in refused:
        if getattr(options, name) != getattr(default, name):
            raise ParamError(
                f"{name} must be left out for {shown(source, 200)}; got {getattr(options, name)!r}, which has no "
                "meaning for this kind of data. Remove it."
            )


def _limited(found: Found, options: DataOptions) -> Found:
    """What comes ready-made, with at most `limit` examples."""
    notes = list(found.notes)
    keep = {name: torch.ones(len(part), dtype=torch.bool).numpy() for name, part in found.parts.items()}
    numbers = {name: part.targets.numpy() for name, part in found.parts.items()}
    rows = spread_rows(numbers, keep, options.limit, options.seed, notes)
    parts = {
        name: part if len(rows[name]) == len(part) else part.take(torch.from_numpy(rows[name]))
        for name, part in found.parts.items()
    }
    notes += [*counts_told(parts, found.classes), *copies_told(parts)]
    return Found(parts, found.classes, found.kind, found.bounds, tuple(notes))


def _resized(found: Found, options: DataOptions) -> Found:
    """Images with the size and the channels asked for."""
    size, channels = options.size, options.channels
    if not size and not channels:
        return found
    if found.kind != "images":
        raise ParamError(f"size and channels must be left out for {found.kind}; got {size}, {channels}. Remove them.")
    first = next(iter(found.parts.values())).inputs
    have, height, width = first.shape[1:]
    notes = list(found.notes)
    if size and (height, width) != (size, size):
        total = sum(len(part) for part in found.parts.values())
        must_fit(4 * total * have * size * size, "the resized images", "Choose a smaller size, or set limit.")
        notes.append(f"images of {height}x{width} resized to {size}x{size} (bilinear)")
    if channels and have != channels:
        if have not in (1, 3):
            raise ParamError(f"channels must be left out for images of {have} channels; got {channels}. Remove it.")
        notes.append("gray images repeated over three channels" if have == 1 else "colours made gray (ITU-R 601)")
    parts = {name: part.having(inputs=_shaped(part.inputs, size, channels)) for name, part in found.parts.items()}
    return Found(parts, found.classes, found.kind, found.bounds, tuple(notes))


def _shaped(x: torch.Tensor, size: int, channels: int) -> torch.Tensor:
    if channels == 1 and x.shape[1] == 3:
        x = (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if size and tuple(x.shape[2:]) != (size, size):
        blocks = [
            torch.nn.functional.interpolate(block, (size, size), mode="bilinear", antialias=True, align_corners=False)
            for block in x.split(256)
        ]
        x = torch.cat(blocks)
    return x.expand(-1, 3, -1, -1).contiguous() if channels == 3 and x.shape[1] == 1 else x


def _sound(found: Found, source: str) -> None:
    """What every user of `Found` relies on; only data that the user's own code made can fail here.

    Raises:
        DataError: naming what does not hold.
    """
    for name, part in found.parts.items():
        rule = _broken_promise(found, part)
        if rule:
            raise DataError(f"part {name} of {shown(source, 200)} must hold {rule}; it does not. Correct the source.")
    seen = [part.index for part in found.parts.values()]
    index = torch.cat(seen) if seen else torch.zeros(0)
    if not len(index) or len(torch.unique(index)) < len(index):
        raise DataError(f"{shown(source, 200)} must give every example its own index; it does not. Number them anew.")


def _broken_promise(found: Found, part: Examples) -> str:
    """The first promise of `Found` that `part` does not keep, or an empty string."""
    axes = {"images": 4, "series": 3, "features": 2}.get(found.kind, 0)
    if not isinstance(part, Examples) or len(part) == 0:
        return "Examples, at least one"
    x, y = part.inputs, part.targets
    if x.dtype != torch.float32 or x.ndim != axes:
        return f"float32 inputs of {axes} axes, as {found.kind} have"
    if not torch.isfinite(x).all():
        return "finite inputs"
    if y.dtype != torch.int64 or y.ndim != 1:
        return "int64 class numbers [N]"
    if int(y.min()) < 0 or int(y.max()) >= len(found.classes):
        return "class numbers from 0 to K-1"
    low, high = (found.bounds.low, found.bounds.high) if found.bounds else (-torch.inf, torch.inf)
    if x.numel() and (float(x.min()) < low - 1e-6 or float(x.max()) > high + 1e-6):
        return "inputs within their bounds"
    return ""


__all__ = ["DataOptions", "divide", "read_data", "runs_code", "split_found"]
