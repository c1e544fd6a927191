"""Tables with a column of labels: which columns are numbers, which are a few words, and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from cupel.core.errors import DataError, nearest
from cupel.intake.datasets.csvfile import open_csv
from cupel.intake.datasets.parquet import open_parquet
from cupel.intake.datasets.raw import DataOptions, Raw, count_of, listed, must_fit, shown

MOST_LEVELS = 64  # distinct words of a column that becomes one-hot
_GAPS = frozenset({"", "na", "n/a", "nan", "null", "?"})
_LABEL_GAPS = _GAPS - {"?"}
_SPLITS = ("split", "subset", "partition")  # names of a column that says which part a row belongs to
_PART = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
_TARGETS = ("target", "label", "class", "y")

Block = tuple[int, list[Sequence[str] | np.ndarray]]


class Table(Protocol):
    """What CSV and Parquet have in common."""

    @property
    def path(self) -> Path: ...
    @property
    def header(self) -> tuple[str, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def blocks(self, text: str) -> Iterator[Block]: ...


@dataclass
class Column:
    """What one pass over the file tells about a column."""

    name: str
    number: bool = True
    words: set[str] = field(default_factory=set)  # at most MOST_LEVELS + 1 of them
    missing: int = 0
    text: str = ""  # the first cell that is no number, and its place

    @property
    def width(self) -> int:
        return 1 if self.number else len(self.words)

    def see(self, cells: Sequence[str] | np.ndarray, line: int) -> None:
        if isinstance(cells, np.ndarray):
            self.missing += int(np.isnan(cells).sum())
            return
        values = _numbers(cells) if self.number else None
        if values is None:
            counts = Counter(cells)
            self.missing += sum(n for c, n in counts.items() if _is_gap(c))
        else:
            self.missing += int(np.isnan(values).sum())
        if len(self.words) <= MOST_LEVELS:
            fresh = {c.strip() for c in (cells if values is not None else counts) if not _is_gap(c)} - self.words
            self.words.update(sorted(fresh)[: MOST_LEVELS + 1])
        if self.number and values is None:
            self.number = False
            at, cell = next((i, c) for i, c in enumerate(cells) if _numbers([c]) is None)
            self.text = f"{shown(cell, 30)} near line {line + at}"


def _is_gap(cell: str) -> bool:
    return cell.strip().lower() in _GAPS


def read_table(path: Path, options: DataOptions) -> Raw:
    """Features `[N, F]` float32 and labels of a CSV, CSV.gz or Parquet file.

    Numbers stay; a column of at most 64 distinct words, and at most half as many as rows, becomes one-hot, its words
    in sorted order; truth values are words. Empty cells, NA, N/A, NaN, null and ? are missing: their rows are dropped
    later, and counted here by column. A column `split` of train, valid and test gives the splits.

    Raises:
        DataError: the file is broken, the target is unknown, or a column is neither numbers nor a few words.
        MissingExtra: Parquet without pyarrow.
        MissingData: there is no such file.
    """
    table: Table = open_parquet(path) if path.suffix.lower() == ".parquet" else open_csv(path)
    notes = list(table.notes)
    target = _target(table, options.target, notes)
    columns, rows = _scanned(table, target)
    split = next((c for c in columns if c.name.lower() in _SPLITS and _splits(c)), None)
    used = _used(table, [c for c in columns if c is not split], rows, target, notes)
    must_fit(8 * rows * sum(c.width for c in used), f"the table {path}", "Remove columns, or store fewer rows.")
    x, y, part = _filled(table, used, rows, target, split.name if split else "")
    notes += _counters(used, x)
    if split is None:
        return Raw({"all": (x, y)}, layout="NF", notes=tuple(notes))
    notes.append(f"column {split.name!r} says which split each row belongs to; it is no feature")
    names = [name for name in ("train", "valid", "test") if (part == name).any()]
    return Raw({name: (x[part == name], y[part == name]) for name in names}, layout="NF", notes=tuple(notes))


def _splits(column: Column) -> bool:
    """True if its words are names of splits, train among them, and every row has one."""
    words = {word.lower() for word in column.words}
    return not column.missing and words <= set(_PART) and "train" in words and len(words) > 1


def _numbers(cells: Sequence[str]) -> np.ndarray | None:
    """float64 with NaN for what is missing; None if a cell is no number."""
    try:
        return np.array(cells, dtype=np.float64)
    except ValueError:
        pass
    try:
        return np.array(["nan" if _is_gap(c) else c for c in cells], dtype=np.float64)
    except ValueError:
        return None


def _target(table: Table, wanted: str, notes: list[str]) -> str:
    if wanted and wanted in table.header:
        return wanted
    if wanted:
        raise DataError(
            f"target must be a column of {table.path}; got {wanted!r}.{nearest(wanted, table.header)} "
            f"It has {listed(table.header, 12)}. Name one of them."
        )
    likely = [name for name in table.header if name.lower() in _TARGETS]
    if len(likely) != 1:
        raise DataError(
            f"target must name the column of {table.path} that holds the labels; none was given, and "
            f"{'no' if not likely else 'more than one'} column is called {', '.join(_TARGETS)}. "
            f"It has {listed(table.header, 12)}. Name one of them."
        )
    notes.append(f"column {likely[0]!r} taken as the labels, by its name")
    return likely[0]


def _scanned(table: Table, target: str) -> tuple[list[Column], int]:
    columns, rows = [Column(name) for name in table.header], 0
    for line, block in table.blocks(target):
        rows += len(block[0])
        for column, cells in zip(columns, block, strict=True):
            if column.name != target:
                column.see(cells, line)
    if not rows:
        raise DataError(f"{table.path} must hold rows below its column names; it holds none. Check the file.")
    return columns, rows


def _used(table: Table, columns: list[Column], rows: int, target: str, notes: list[str]) -> list[Column]:
    """The columns that become features, after refusing what cannot; says what was done with each kind."""
    nameless = sum(not c.name for c in columns)
    if nameless:
        notes.append(f"{count_of(nameless, 'column')} without a name left out (a saved row number, usually)")
    used = [c for c in columns if c.name and c.name != target]
    if not used:
        raise DataError(f"{table.path} must have a column beside target {target!r}; it has none. Add features.")
    empty = [c for c in used if 2 * c.missing > rows]
    if empty:
        told = ", ".join(f"{shown(c.name)} lacks {c.missing:,}" for c in empty[:5])
        raise DataError(
            f"a column of {table.path} must be filled in at least half of the {rows:,} rows; {told}. "
            "Remove or fill such columns."
        )
    most = min(MOST_LEVELS, max(2, rows // 2))  # a word for every row is a key, not a property
    wordy = [c for c in used if not c.number and len(c.words) > most]
    if wordy:
        told = ", ".join(f"{shown(c.name)} (such as {c.text})" for c in wordy[:5])
        more = f" and {len(wordy) - 5} more" if len(wordy) > 5 else ""
        raise DataError(
            f"a column of {table.path} must hold numbers, or at most {most} distinct words; {told}{more} "
            "do not. Remove such columns, or encode them as numbers."
        )
    for c in used:
        if not c.number:
            notes.append(f"column {shown(c.name)} one-hot encoded: {listed(sorted(c.words), 20)}")
    gaps = [f"{shown(c.name)} {c.missing:,}" for c in used if c.missing]
    if gaps:
        more = f" and {len(gaps) - 8} more columns" if len(gaps) > 8 else ""
        notes.append(f"missing values by column, their rows are dropped: {', '.join(gaps[:8])}{more}")
    texts = [*table.header, *(w for c in used if not c.number for w in c.words)]
    formulas = sum(len(word) > 1 and word[0] in "=+-@" for word in texts)
    if formulas:
        notes.append(f"{count_of(formulas, 'text')} begin as spreadsheet formulas do (=, +, -, @); read as plain text")
    return used


def _filled(
    table: Table, used: list[Column], rows: int, target: str, split: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The second pass: `[N, F]` float32, labels `[N]` ("" where missing), and splits `[N]`."""
    x = np.empty((rows, sum(c.width for c in used)), dtype=np.float32)
    y, part = np.empty(rows, dtype=object), np.full(rows, "all", dtype=object)
    place = {name: i for i, name in enumerate(table.header)}
    at = 0
    for _, block in table.blocks(target):
        span = slice(at, at + len(block[0]))
        at = span.stop
        if at > rows:
            break
        labels = [str(c).strip() for c in block[place[target]]]
        y[span] = ["" if c.lower() in _LABEL_GAPS else c for c in labels]
        if split:
            part[span] = [_PART.get(c.strip().lower(), "train") for c in block[place[split]]]
        left = 0
        for column in used:
            x[span, left : left + column.width] = _encoded(column, block[place[column.name]])
            left += column.width
    if at != rows:
        raise DataError(f"{table.path} must stay as it is while it is read; its length changed. Read it again.")
    return x, y, part


def _encoded(column: Column, cells: Sequence[str] | np.ndarray) -> np.ndarray:
    """`[rows, width]`: numbers, or one-hot words; NaN where missing."""
    with np.errstate(over="ignore"):
        if isinstance(cells, np.ndarray):
            return cells.astype(np.float32)[:, None]
        if column.number:
            values = _numbers(cells)
            if values is not None:
                return values.astype(np.float32)[:, None]
    words = {word: i for i, word in enumerate(sorted(column.words))}
    codes = np.array([words.get(c.strip(), -1) for c in cells], dtype=np.int64)
    hot = np.eye(len(words), dtype=np.float32)[codes]
    hot[codes < 0] = np.nan
    return hot


def _counters(used: list[Column], x: np.ndarray) -> list[str]:
    """Columns that only count the rows: kept, and said, as they leak the labels of a sorted file."""
    notes, left = [], 0
    for column in used:
        with np.errstate(invalid="ignore"):
            steps = np.diff(x[:, left])
        if column.number and 2 < len(x) < 2**24 and (steps == 1).all():
            notes.append(
                f"column {shown(column.name)} only counts the rows: kept as a feature; remove it if it is a key"
            )
        left += column.width
    return notes
