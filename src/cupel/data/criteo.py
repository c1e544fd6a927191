"""The columns of Criteo's click data: a label, 13 numbers, 26 hashed categories."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from cupel.core.errors import MissingData
from cupel.core.types import Examples
from cupel.data.found import Found

NUMBERS = tuple(f"I{k}" for k in range(1, 14))
CATEGORIES = tuple(f"C{k}" for k in range(1, 27))


def read_criteo(path: Path) -> Found:
    """A comma-separated file with the header `label, I1..I13, C1..C26`.

    Shapes: features `[N, 39]`: the numbers (0 where missing), then the categories as codes from 1 up in alphabetical
    order (0 where missing).

    Raises:
        MissingData: the file has other columns, or holds something that is neither.
    """
    try:
        with path.open(encoding="utf-8", newline="") as text:
            table = list(csv.DictReader(text, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise MissingData(f"{path} must be a comma-separated text; got {error}. Fetch it again.") from None
    if not table or set(table[0]) != {"label", *NUMBERS, *CATEGORIES}:
        got = ", ".join(str(k) for k in list(table[0])[:5]) + ", ..." if table else "no rows"
        raise MissingData(f"{path} must have the columns label, I1..I13, C1..C26; got {got}. Fetch it again.")
    rows, labels = [], []
    codes = {c: {v: k for k, v in enumerate(sorted({r[c] or "" for r in table} - {""}), 1)} for c in CATEGORIES}
    for at, row in enumerate(table, 2):
        try:
            if None in row or None in row.values():
                raise ValueError("a row with more or fewer columns than the header")
            labels.append(("0", "1").index(row["label"]))
            rows.append(
                [float(row[n] or 0) for n in NUMBERS] + [float(codes[c][row[c]] if row[c] else 0) for c in CATEGORIES]
            )
        except (ValueError, TypeError) as error:
            raise MissingData(
                f"line {at} of {path} must hold a label 0 or 1 and 13 numbers; got {error}. Fetch it again."
            ) from None
    notes = (
        "missing numbers are 0",
        "categories are codes from 1 up in alphabetical order, 0 where missing: their distances mean nothing",
    )
    examples = Examples(torch.tensor(rows), torch.tensor(labels), torch.arange(len(rows)))
    return Found({"all": examples}, ("not clicked", "clicked"), "features", None, notes)
