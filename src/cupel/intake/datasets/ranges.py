"""The range of stored values: inferred or declared, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cupel.core.errors import DataError
from cupel.core.types import Bounds

_CHUNK = 2**22  # values looked at together: scanning needs little memory beside the data
_TOP = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Span:
    """What the finite rows of an array hold: lowest and highest value, all whole or not; and which rows are finite."""

    low: float
    high: float
    whole: bool
    finite: np.ndarray  # [N] bool

    @property
    def pixels(self) -> bool:
        """Within [-1, 1], or whole numbers in 0..255."""
        return self.low >= -1 and (self.high <= 1 or (self.whole and self.low >= 0 and self.high <= 255))

    def joined(self, other: Span) -> Span:
        return Span(min(self.low, other.low), max(self.high, other.high), self.whole and other.whole, self.finite)


def _chunks(x: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    step = max(1, _CHUNK // max(1, x[:1].size))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        yield rows, x[rows].reshape(len(x[rows]), -1)


def span_of(x: np.ndarray) -> Span:
    """Look at every value once. A value that float32 cannot hold counts as infinite."""
    low, high, whole = np.inf, -np.inf, True
    finite = np.ones(len(x), dtype=bool)
    for rows, part in _chunks(x):
        if x.dtype.kind == "f":
            good = np.isfinite(part)
            if x.dtype.itemsize > 4:
                good &= np.abs(part) <= _TOP
            finite[rows] = good.all(1)
            part = part[finite[rows]]
            whole = whole and bool((part == np.floor(part)).all())
        if part.size:
            low, high = min(low, float(part.min())), max(high, float(part.max()))
    return Span(low, high, whole, finite)


@dataclass(frozen=True)
class Scale:
    """How stored values become inputs: `(x - low) / (high - low)` where `mapped`, else unchanged."""

    low: float = 0.0
    high: float = 1.0
    mapped: bool = False
    bounds: Bounds | None = None

    def apply(self, x: np.ndarray) -> np.ndarray:
        """float32, in one new array that is contiguous."""
        y = np.array(x, dtype=np.float32, order="C")
        if self.mapped:
            y -= np.float32(self.low)
            y /= np.float32(self.high - self.low)
        if self.bounds:
            np.clip(y, np.float32(self.bounds.low), np.float32(self.bounds.high), out=y)  # rounding to float32
        return y


def declared_scale(kind: str, span: Span, low: float, high: float, parts: list[np.ndarray]) -> tuple[Scale, str]:
    """The scale of values that must lie in `low..high`.

    Whole numbers of images become [0, 1]; fractions, and features and series, stay as they are within their bounds.

    Raises:
        DataError: values lie outside; says how many and how far.
    """
    if span.low < low or span.high > high:
        beyond = sum(int(((p < low) | (p > high)).sum()) for x in parts for _, p in _chunks(x))
        total = sum(x.size for x in parts)
        far = max(low - span.low, span.high - high)
        raise DataError(
            f"values must lie in {low:g}..{high:g} as declared; {beyond:,} of {total:,} do not, "
            f"the farthest by {far:g} (they span {span.low:g}..{span.high:g}). Correct low and high, or the data."
        )
    if kind == "images" and span.whole and (low, high) not in ((0.0, 1.0), (-1.0, 1.0)):
        said = f"pixel values {low:g}..{high:g}, as declared, are whole numbers and were mapped to [0, 1]"
        return Scale(low, high, True, Bounds(0.0, 1.0)), said
    kept = f"values kept as they are within {low:g}..{high:g}, as declared"
    if kind == "images" and (low, high) not in ((0.0, 1.0), (-1.0, 1.0)):
        kept += f"; perturbations count in these units, of which the range holds {high - low:g}"
    return Scale(bounds=Bounds(low, high)), kept


def inferred_scale(kind: str, span: Span, dtype: np.dtype) -> tuple[Scale, list[str]]:
    """The scale of values whose range nobody declared.

    Images: [0, 1] and [-1, 1] stay; uint8, and whole numbers in 0..255 that reach 128, are divided by 255;
    anything else is refused. Features and series stay and have no bounds.

    Raises:
        DataError: the range of an image cannot be told.
    """
    told = f"{span.low:g}..{span.high:g}"
    if kind != "images":
        return Scale(), [f"{kind} kept as stored, values {told}; no bounds, as none are declared"]
    if span.low >= 0 and span.high <= 1:
        notes = [f"pixel values {told} stored as {dtype} taken as [0, 1]"]
        if span.high < 0.1:
            notes.append(f"the brightest pixel is {span.high:g}: were the values divided by 255 twice?")
        return Scale(bounds=Bounds(0.0, 1.0)), notes
    if span.low >= -1 and span.high <= 1:
        return Scale(bounds=Bounds(-1.0, 1.0)), [f"pixel values {told} taken as [-1, 1] and kept"]
    if dtype == np.uint8 or (span.whole and span.low >= 0 and 128 <= span.high <= 255):
        notes = [f"pixel values 0..255 stored as {dtype} divided by 255"]
        if span.high < 128:
            notes.append(f"the largest pixel value is {span.high:g} of 255: declare high if that is the full scale")
        return Scale(0.0, 255.0, True, Bounds(0.0, 1.0)), notes
    raise DataError(
        f"pixel values must be uint8, or lie in [0, 1] or [-1, 1], to be understood; got {told} stored as {dtype}. "
        "Declare their range with low and high."
    )
