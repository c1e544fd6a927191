"""An `.npz` with inputs and labels, in one set or with its own splits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cupel.core.errors import DataError, nearest
from cupel.intake.datasets.npz import Npz, Stored
from cupel.intake.datasets.raw import DataOptions, Raw, listed

# names of inputs and labels that belong together, lower case
_PAIRS = (
    ("x", "y"),
    ("images", "labels"),
    ("image", "label"),
    ("data", "target"),
    ("data", "labels"),
    ("data", "label"),
    ("inputs", "targets"),
    ("inputs", "labels"),
    ("features", "labels"),
    ("x", "labels"),
    ("x", "label"),
    ("x", "target"),
)
_SPLITS = {"train": ("train", "training"), "valid": ("valid", "val", "validation"), "test": ("test", "testing")}
_NAMES = ("classes", "class_names", "label_names", "target_names")


def read_npz(path: Path, options: DataOptions) -> Raw:
    """Arrays as stored.

    Keys: the label array is `target` if that is set; otherwise a known pair (x and y, images and labels, data and
    target, ...) in any case, also with train, valid/val or test before or after (`x_train`, `test_images`).

    Raises:
        DataError: the file is broken, or its keys cannot be paired.
        MissingData: there is no such file.
    """
    with Npz(path) as file:
        pairs, said = _pairs(path, file.arrays, options.target)
        names_key = next((k for k in file.arrays if k.lower() in _NAMES and len(file.arrays[k].shape) == 1), None)
        used = [key for pair in pairs.values() for key in pair]
        notes = [said] if said else []
        unused = [k for k in file.arrays if k not in used and k != names_key]
        if unused:
            notes.append(f"arrays of the file that were not used: {listed(unused)}")
        held = file.read([*used, *([names_key] if names_key and names_key not in used else [])])
    names = _class_names(held[names_key]) if names_key and names_key not in used else ()
    return Raw({name: (held[x], held[y]) for name, (x, y) in pairs.items()}, names=names, notes=tuple(notes))


def _pairs(path: Path, arrays: Mapping[str, Stored], target: str) -> tuple[dict[str, tuple[str, str]], str]:
    """Keys of inputs and labels by part, and how they were found."""
    if target:
        return _with_target(path, arrays, target)
    parts = _split_pairs({key.lower(): key for key in arrays})
    if parts:
        told = "; ".join(f"{name}: {x!r} and {y!r}" for name, (x, y) in parts.items() if name != "all")
        given = ", ".join(name for name in parts)
        if "all" in parts and len(parts) > 1:
            raise DataError(
                f"{path} must hold one set or its splits; got both: {listed(arrays)}. Remove one, or name the labels "
                "with target."
            )
        said = f"inputs {parts['all'][0]!r} and labels {parts['all'][1]!r} read" if "all" in parts else ""
        return parts, said or f"splits of the file kept ({given}): {told}"
    wide = [k for k, s in arrays.items() if len(s.shape) >= 2 and s.dtype.kind in "biuf"]
    narrow = [k for k, s in arrays.items() if len(s.shape) == 1 and s.dtype.kind in "biuSU"]
    if len(wide) == 1:
        narrow = [k for k in narrow if arrays[k].shape[0] == arrays[wide[0]].shape[0]]
        if len(narrow) == 1:
            said = f"{wide[0]!r} taken as inputs and {narrow[0]!r} as labels, as no other array of the file can be"
            return {"all": (wide[0], narrow[0])}, said
    raise DataError(
        f"{path} must show which arrays are inputs and labels (x and y, images and labels, x_train and y_train, ...); "
        f"got {_told(arrays)}. Name the labels with target."
    )


def _split_pairs(lower: dict[str, str]) -> dict[str, tuple[str, str]]:
    for x, y in _PAIRS:
        parts = {}
        if x in lower and y in lower:
            parts["all"] = (lower[x], lower[y])
        for name, words in _SPLITS.items():
            for form in (f for w in words for f in ("{}_" + w, w + "_{}", "{}" + w, w + "{}")):
                if form.format(x) in lower and form.format(y) in lower:
                    parts.setdefault(name, (lower[form.format(x)], lower[form.format(y)]))
        if parts:
            return parts
    return {}


def _with_target(path: Path, arrays: Mapping[str, Stored], target: str) -> tuple[dict[str, tuple[str, str]], str]:
    if target not in arrays:
        raise DataError(
            f"target must be an array of {path}; got {target!r}.{nearest(target, arrays)} It holds {_told(arrays)}. "
            "Name one of them."
        )
    rows = arrays[target].shape[:1]
    fit = [k for k, s in arrays.items() if k != target and s.shape[:1] == rows and s.dtype.kind in "biuf"]
    known = [k for k in fit if k.lower() in {x for x, _ in _PAIRS}]
    wide = [k for k in fit if len(arrays[k].shape) >= 2]
    chosen = known if len(known) == 1 else wide if len(wide) == 1 else fit
    if len(chosen) != 1:
        raise DataError(
            f"{path} must hold one array of inputs for target {target!r}; {len(chosen)} could be it: "
            f"{_told(arrays)}. Name the inputs x."
        )
    return {"all": (chosen[0], target)}, f"inputs {chosen[0]!r} and labels {target!r} read"


def _told(arrays: Mapping[str, Stored]) -> str:
    some = [f"{k!r:.40} {list(s.shape)} {s.dtype}" for k, s in list(arrays.items())[:8]]
    return ", ".join(some) + (f" and {len(arrays) - 8} more" if len(arrays) > 8 else "")


def _class_names(words: np.ndarray) -> tuple[str, ...]:
    if words.dtype.kind == "S":
        return tuple(word.decode("utf-8", "backslashreplace") for word in words.tolist())
    return tuple(str(word) for word in words.tolist())
