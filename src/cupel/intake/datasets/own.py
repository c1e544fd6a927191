"""Data that the user's own Python makes: `package.module:name`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cupel.core.errors import CupelError, DataError
from cupel.core.types import Examples, Splits
from cupel.data.found import Found
from cupel.intake.datasets.raw import Raw, free_bytes, gib, shown
from cupel.intake.places import imported

PLACE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_PARTS = {"train": "train", "valid": "valid", "val": "valid", "test": "test", "all": "all"}
_FORMS = "(x, y), a mapping of train, valid, test to (x, y), a torch Dataset of (x, y), Splits, Examples or Found"


def read_own(place: str) -> Raw | Found:
    """Import `place`, call it if it is a function or a class, and take what it gives.

    Accepted: `(x, y)`; `((x, y), (x, y))` for train and test; a mapping of parts; a torch Dataset with a length;
    `Splits`, `Examples`, `Found`. Importing runs the user's code, and that is the first note.

    Raises:
        DataError: importing or calling raised, or what came is none of these.
    """
    module, _, name = place.partition(":")
    value = imported(place, module, name, DataError)
    notes = [f"imported {module}, which runs its code"]
    try:
        if inspect.isclass(value) or (callable(value) and not hasattr(value, "__getitem__")):
            value = value()
            notes.append(f"called {place}()")
        if isinstance(value, Found):
            return Found(value.parts, value.classes, value.kind, value.bounds, (*notes, *value.notes))
        return Raw({part: _pair(pair, place) for part, pair in _parts(value, place).items()}, notes=tuple(notes))
    except CupelError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise DataError(
            f"{place} must give data; reading it raised {type(error).__name__}: {error}. Run it on its own first."
        ) from None


def _parts(value: Any, place: str) -> Mapping[str, Any]:
    """Every part as something that `_pair` takes."""
    if isinstance(value, Splits):
        return {"train": value.train, "valid": value.valid, "test": value.test}
    if isinstance(value, Mapping) and value:
        odd = [key for key in value if key not in _PARTS]
        if set(value) == {"x", "y"}:
            return {"all": (value["x"], value["y"])}
        if odd:
            raise DataError(f"parts of {place} must be train, valid and test; got {odd[0]!r}. Rename it.")
        if len({_PARTS[key] for key in value}) < len(value) or ("all" in value and len(value) > 1):
            raise DataError(f"{place} must give each part once; got {', '.join(value)}. Remove one.")
        return {_PARTS[key]: part for key, part in value.items()}
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_pair(part) for part in value):
        return {"train": value[0], "test": value[1]}
    return {"all": value}


def _is_pair(part: Any) -> bool:
    return isinstance(part, torch.utils.data.Dataset) or (
        isinstance(part, (tuple, list)) and len(part) == 2 and all(isinstance(p, (Tensor, np.ndarray)) for p in part)
    )


def _pair(part: Any, place: str) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(part, Examples):
        return _array(part.inputs, place), _array(part.targets, place)
    if isinstance(part, (tuple, list)) and len(part) == 2:
        return _array(part[0], place), _array(part[1], place)
    if isinstance(part, torch.utils.data.DataLoader):
        part = part.dataset
    listlike = hasattr(part, "__getitem__") and hasattr(part, "__len__")
    if listlike and not isinstance(part, (str, bytes, np.ndarray, Tensor, Mapping)):
        return _stacked((part[i] for i in range(len(part))), len(part), place)
    raise DataError(f"{place} must give {_FORMS}; got {type(part).__name__}. Return one of these.")


def _stacked(items: Iterable[Any], total: int, place: str) -> tuple[np.ndarray, np.ndarray]:
    """A data set of (x, y), read item by item into one array."""
    x: np.ndarray | None = None
    labels: list[np.ndarray] = []
    for i, item in enumerate(items):
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise DataError(f"an item of {place} must be (x, y); item {i} is {type(item).__name__}. Return pairs.")
        one = _array(item[0], place)
        if x is None:
            if total * one.nbytes > free_bytes():
                raise DataError(
                    f"{place} must fit in memory; its {total:,} items take {gib(total * one.nbytes)}. Give fewer."
                )
            x = np.empty((total, *one.shape), dtype=one.dtype)
        if one.shape != x.shape[1:] or one.dtype != x.dtype:
            raise DataError(
                f"items of {place} must be alike; item 0 is {x.dtype} {list(x.shape[1:])}, item {i} is {one.dtype} "
                f"{list(one.shape)}. Resize or pad them in the data set."
            )
        x[i] = one
        labels.append(_array(item[1], place))
    if x is None:
        raise DataError(f"{place} must hold at least one item; it holds none. Check the data set.")
    return x, np.stack(labels)


def _array(value: Any, place: str) -> np.ndarray:
    """A NumPy array of numbers or text on the CPU."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise DataError(f"tensors of {place} must be dense; got layout {value.layout}. Call to_dense first.")
        plain = value.detach().cpu()
        return plain.float().numpy() if plain.dtype == torch.bfloat16 else plain.numpy()
    array = np.asarray(value)
    if array.dtype == object:
        flat = array.reshape(-1).tolist()
        if all(isinstance(v, (str, int, float, type(None))) for v in flat):
            return np.array(["" if v is None else str(v) for v in flat], dtype=object).reshape(array.shape)
    if array.dtype.kind not in "biufSU":
        raise DataError(f"arrays of {place} must hold numbers or text; got {shown(array.dtype)}. Convert them.")
    return array
