"""Parquet files, in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupel.core.errors import DataError, MissingExtra
from cupel.intake.datasets.raw import listed, must_fit, regular_file, shown

_BLOCK = 8192  # rows


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file whose schema has been read."""

    path: Path
    header: tuple[str, ...]
    delimiter: str
    notes: tuple[str, ...]

    def blocks(self, text: str) -> Iterator[tuple[int, list[Sequence[str] | np.ndarray]]]:
        """Columns of up to 8,192 rows: numbers as float64 with NaN for what is missing, the rest and `text` as text.

        Raises:
            DataError: the file is broken further on.
        """
        import pyarrow as pa

        file, at = _open(self.path), 1
        try:
            for batch in file.iter_batches(batch_size=_BLOCK):
                if len(batch):
                    yield at, [_column(c, n == text) for c, n in zip(batch.columns, self.header, strict=True)]
                at += len(batch)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise DataError(f"{self.path} must be a whole Parquet file; {_first(error)}. Copy it again.") from None
        finally:
            file.close()


def open_parquet(path: Path) -> ParquetFile:
    """Look at the schema: columns must be numbers, truth values or text.

    Raises:
        MissingExtra: pyarrow is not installed.
        DataError: the file is broken, too large, or holds columns of another kind.
        MissingData: there is no such file.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingExtra("pyarrow", "tables") from None
    regular_file(path)
    file = _open(path)
    try:
        schema = file.schema_arrow
        header = tuple(schema.names)
        rows = file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} must be a Parquet file; {_first(error)}. Copy it again.") from None
    finally:
        file.close()
    if len(set(header)) < len(header):
        raise DataError(f"each column of {path} must have its own name; {listed(header, 5)} repeat. Rename them.")
    if rows < 0:
        raise DataError(f"{path} must hold rows; its footer says {rows}. Copy it again.")
    must_fit(rows * max(1, len(header)) * 8, f"the table {path}", "Store fewer rows or columns.")
    odd = [name for name, kind in zip(header, schema.types, strict=True) if not _plain(kind)]
    if odd:
        kinds = {name: str(schema.field(name).type) for name in odd[:1]}
        raise DataError(
            f"columns of {path} must hold numbers, truth values or text; {listed(odd, 5)} do not "
            f"({next(iter(kinds.values()))[:60]}). Remove or convert them."
        )
    return ParquetFile(path, header, ",", ())


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} must be a Parquet file; {_first(error)}. Write it again with pandas.") from None


def _plain(kind: Any) -> bool:
    import pyarrow.types as t

    if t.is_dictionary(kind):
        return _plain(kind.value_type)
    tests = (t.is_integer, t.is_floating, t.is_boolean, t.is_string, t.is_large_string, t.is_decimal, t.is_null)
    return any(test(kind) for test in tests)


def _column(column: Any, text: bool) -> Sequence[str] | np.ndarray:
    import pyarrow as pa
    import pyarrow.types as t

    if not text and (t.is_integer(column.type) or t.is_floating(column.type)):
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)
    return [_cell(v) for v in column.to_pylist()]


def _cell(value: object) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _first(error: BaseException) -> str:
    return shown(str(error).splitlines()[0] if str(error) else type(error).__name__, 160)
