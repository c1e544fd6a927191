"""CSV text, plain or gzipped, in blocks of rows, with bounds on every line and on the whole."""

from __future__ import annotations

import codecs
import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from cupel.core.errors import DataError
from cupel.intake.datasets.raw import gib, listed, regular_file

MOST_TEXT = 2 * 2**30  # bytes of text, unpacked
MOST_LINE = 2**20
_BLOCK = 8192  # rows
_DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class CsvFile:
    """A CSV file whose first line has been read."""

    path: Path
    header: tuple[str, ...]
    delimiter: str
    notes: tuple[str, ...]

    def blocks(self, text: str) -> Iterator[tuple[int, list[Sequence[str] | np.ndarray]]]:
        """Columns of up to 8,192 rows, as text, with the line on which they begin. Blank lines are left out.

        Raises:
            DataError: rows of another length than the header; counted over the whole file, the first one named.
        """
        rows: list[list[str]] = []
        start, ragged, first = 0, 0, ""
        with _opened(self.path) as stream:
            reader = _reader(self.path, stream, self.delimiter)
            next(reader)
            for line, row in reader:
                if len(row) != len(self.header):
                    ragged += 1
                    first = first or f"line {line} ({len(row)} cells)"
                    continue
                start = start if rows else line
                rows.append(row)
                if len(rows) == _BLOCK:
                    yield start, list(zip(*rows, strict=True))
                    rows = []
        if ragged:
            raise DataError(
                f"every row of {self.path} must have {len(self.header)} cells, as its first line has; {ragged:,} do "
                f"not, the first on {first}. Correct those lines; cells that hold {self.delimiter!r} need quotes."
            )
        if rows:
            yield start, list(zip(*rows, strict=True))


def open_csv(path: Path) -> CsvFile:
    """Look at the first line: the delimiter is the one of `, ; tab |` that it holds most of.

    Raises:
        DataError: the file is no UTF-8 text, its first line names no columns, or names one twice.
        MissingData: there is no such file.
    """
    regular_file(path)
    with _opened(path) as stream:
        line = next(_lines(path, stream), "")
    delimiter = max(_DELIMITERS, key=line.count)
    with _opened(path) as stream:
        found = next(_reader(path, stream, delimiter), None)
    if found is None:
        raise DataError(f"{path} must hold a line of column names and rows below it; it is empty. Check the file.")
    header = tuple(cell.strip() for cell in found[1])
    notes = [] if delimiter == "," else [f"columns are divided by {delimiter!r}, of which the first line holds most"]
    with _opened(path) as stream:
        if stream.read(3) == codecs.BOM_UTF8:
            notes.append("the byte order mark at the start of the file was left out")
    twice = (
        sorted({name for name in header if name and header.count(name) > 1}) if len(set(header)) < len(header) else []
    )
    if twice:
        raise DataError(f"each column of {path} must have its own name; {listed(twice, 5)} stand twice. Rename them.")
    if len(header) > 1 and all(_number(name) for name in header):
        raise DataError(
            f"the first line of {path} must name the columns; it holds only numbers ({listed(header, 4)}). "
            "Put a line of names above."
        )
    return CsvFile(path, header, delimiter, tuple(notes))


def _number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _opened(path: Path) -> IO[bytes]:
    try:
        return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise DataError(f"{path} must be readable; got: {error.strerror}. Check its permissions.") from None


def _lines(path: Path, stream: IO[bytes]) -> Iterator[str]:
    """Decoded lines, each and all bounded."""
    total = count = 0
    while True:
        count += 1
        try:
            raw = stream.readline(MOST_LINE + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path} must be a whole file; reading line {count} failed: {error}. Copy it again."
            ) from None
        if not raw:
            return
        total += len(raw)
        if len(raw) > MOST_LINE:
            raise DataError(f"a line of {path} must be under {gib(MOST_LINE)}; line {count} is longer. Is it a table?")
        if total > MOST_TEXT:
            raise DataError(f"{path} must hold under {gib(MOST_TEXT)} of text; it holds more. Store it as Parquet.")
        if count == 1:
            if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"{path} must be UTF-8 text; it is UTF-16. Save it as UTF-8.")
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if b"\0" in raw:
            raise DataError(f"{path} must be a table in text; line {count} holds a zero byte. Is it a binary file?")
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} must be UTF-8 text; byte {error.start} of line {count} is {raw[error.start]:#04x}. "
                "Save it as UTF-8."
            ) from None


def _reader(path: Path, stream: IO[bytes], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line on which each ends; blank ones left out."""
    reader = csv.reader(_lines(path, stream), delimiter=delimiter)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "new-line" in str(error):
                why, todo = "a carriage return stands inside it", "Save the file with LF or CRLF at the ends of lines."
            else:
                why, todo = str(error), "A quote that is never closed is the usual cause: correct it."
            raise DataError(f"line {reader.line_num} of {path} must be CSV; {why}. {todo}") from None
        if row and not (len(row) == 1 and not row[0].strip()):
            yield reader.line_num, row
