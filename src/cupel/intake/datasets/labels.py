"""Labels as people store them, made into class numbers 0..K-1."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from cupel.core.errors import DataError
from cupel.intake.datasets.raw import count_of, listed, shown

MOST_CLASSES = 100_000
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,14}")
_EXACT = 2**53  # whole numbers below this are exact as float64
_GONE = -1  # the number of a missing label while rows are sorted out


def settle_labels(
    parts: Mapping[str, np.ndarray], names: tuple[str, ...] = ()
) -> tuple[dict[str, np.ndarray], tuple[str, ...], list[str]]:
    """Class numbers for every part, from labels of any usual kind.

    Rules: one-hot rows become the place of their 1; whole numbers 0..K-1 stay; other whole numbers, few distinct
    fractions and text are numbered in sorted order (text that is all whole numbers sorts as numbers).

    Args:
        parts: labels `[N]`, `[N, 1]` or `[N, K]` (one-hot) by part.
        names: class names by stored label, if the source has them.

    Returns:
        int64 numbers `[N]` by part with -1 where a label is missing; names of the classes; notes.

    Raises:
        DataError: labels are no classes (multi-label rows, measurements, identifiers), or fewer than two classes.
    """
    notes: list[str] = []
    flat = {name: _one_column(y, name, notes) for name, y in parts.items()}
    try:
        every = _as_numbers(np.concatenate(list(flat.values())), notes)
    except (TypeError, ValueError):
        kinds = ", ".join(f"{name}: {y.dtype}" for name, y in flat.items())
        raise DataError(f"labels must be of one kind in all parts; got {kinds}. Store class numbers.") from None
    gone = _missing(every)
    distinct, codes = np.unique(every[~gone], return_inverse=True)
    _check_classes(distinct, len(codes))
    if distinct.dtype.kind == "f" and (distinct == np.floor(distinct)).all() and (np.abs(distinct) < _EXACT).all():
        distinct = distinct.astype(np.int64)
        notes.append("labels stored as fractions are whole numbers and are read as such")
    classes = _named(distinct, names, notes)
    numbers = np.full(len(every), _GONE, dtype=np.int64)
    numbers[~gone] = codes
    edges = np.cumsum([len(y) for y in flat.values()])[:-1]
    return dict(zip(flat, np.split(numbers, edges), strict=True)), classes, notes


def _one_column(y: np.ndarray, part: str, notes: list[str]) -> np.ndarray:
    """Labels `[N]` from `[N]`, `[N, 1]`, or one-hot `[N, K]`."""
    if y.dtype.kind not in "biufUSO":
        raise DataError(f"labels must be numbers or text; got an array of {y.dtype}. Store class numbers.")
    if y.ndim == 2 and y.shape[1] == 1:
        notes.append(f"labels of {part} stored as [N, 1] read as [N]")
        return y[:, 0]
    if y.ndim == 1:
        return y
    if y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "biuf":
        ones, zeros = y == 1, y == 0
        bad = int((~((ones.sum(1) == 1) & (ones | zeros).all(1))).sum())
        if not bad:
            notes.append(f"one-hot labels of {part} [N, {y.shape[1]}] read as the place of their 1")
            places: np.ndarray = ones.argmax(1)
            return places
        raise DataError(
            f"labels of two axes must be one-hot (a single 1 in each row); {bad:,} of {len(y):,} rows are not. "
            "cupel judges one class for each input: store class numbers."
        )
    raise DataError(f"labels must be [N], [N, 1] or one-hot [N, K]; got shape {list(y.shape)}. Store class numbers.")


def _as_numbers(y: np.ndarray, notes: list[str]) -> np.ndarray:
    """Numbers where labels are numbers, whether stored as numbers or as text; else text."""
    if y.dtype.kind == "S":
        y = np.array([word.decode("utf-8", "backslashreplace") for word in y.tolist()], dtype=object)
    if y.dtype.kind not in "UO":
        return y
    words = np.array(["" if word is None else str(word).strip() for word in y.tolist()], dtype=object)
    distinct = set(words.tolist()) - {""}
    if not distinct or not all(_WHOLE.fullmatch(word) for word in distinct):
        return words  # "007" and "7" are different names
    notes.append("labels stored as text are whole numbers and are sorted as numbers")
    if "" in words:
        return np.array([float(word or "nan") for word in words.tolist()])
    return np.array([int(word) for word in words.tolist()], dtype=np.int64)


def _missing(y: np.ndarray) -> np.ndarray:
    """Where a label is missing, `[N]` bool."""
    gone: np.ndarray = np.zeros(len(y), dtype=bool)
    if y.dtype == object:
        gone = y == ""
    elif y.dtype.kind == "f":
        gone = ~np.isfinite(y)
    return gone


def _check_classes(distinct: np.ndarray, rows: int) -> None:
    count = len(distinct)
    fractions = distinct.dtype.kind == "f" and bool((distinct != np.floor(distinct)).any())
    if count > MOST_CLASSES:
        raise DataError(
            f"labels must name at most {MOST_CLASSES:,} classes; got {count:,} distinct values in {rows:,} rows. "
            "Is this column an identifier or a measurement?"
        )
    if (fractions and count > max(2, min(100, rows // 10))) or (count > 1000 and count > rows // 2):
        raise DataError(
            f"labels must be classes with examples each; got {count:,} distinct values in {rows:,} rows. "
            "cupel judges classifiers: name a column of classes, or sort the values into bins."
        )
    if count < 2:
        got = f"only {shown(_word(distinct.tolist()[0]))}" if count else "none"
        raise DataError(f"labels must hold two classes or more; got {got}. Point to data with several classes.")


def _named(distinct: np.ndarray, names: tuple[str, ...], notes: list[str]) -> tuple[str, ...]:
    """Names of the classes, and a note of how they are numbered."""
    count = len(distinct)
    classes = tuple(_word(value) for value in distinct.tolist())
    if distinct.dtype.kind in "biu":
        low, high = int(distinct[0]), int(distinct[-1])
        if names and low >= 0 and high < len(names):
            classes = tuple(names[int(value)] for value in distinct.tolist())
            notes.append("class names of the source used, by label number")
        elif names:
            notes.append(f"{len(names):,} class names of the source left out: labels go from {low} to {high}")
        if low == 0 and high == count - 1:
            notes.append(f"labels are {count:,} classes numbered 0 to {count - 1}: {listed(classes)}")
            return classes
        gaps = "" if high - low == count - 1 else f", of which {high - low + 1 - count:,} numbers between never occur"
        notes.append(f"labels {low} to {high}{gaps} mapped to 0 to {count - 1} in order; classes: {listed(classes)}")
        return classes
    kind = "text" if distinct.dtype == object else "fraction"
    notes.append(f"{kind} labels numbered 0 to {count - 1} in sorted order: {listed(classes)}")
    formulas = sum(name[:1] in ("=", "+", "-", "@") and len(name) > 1 for name in classes) if kind == "text" else 0
    if formulas:
        notes.append(f"{count_of(formulas, 'class name')} begin as spreadsheet formulas do (=, +, -, @); kept as text")
    return classes


def _word(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)
