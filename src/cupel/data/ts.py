"""The `.ts` text format of the UCR and UEA archives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cupel.core.errors import MissingData


@dataclass(frozen=True)
class Series:
    """What a `.ts` file holds.

    Args:
        series: one array `[C, T_i]` float32 for each row; gaps are NaN.
        labels: of every row, as written.
        classes: in the order of the header.
    """

    series: tuple[np.ndarray, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]


def read_ts(path: Path) -> Series:
    """The series of a `.ts` file with class labels and without time stamps.

    Layout: `#` comments; `@` header lines up to `@data`; then one row a series: channels parted by `:`, values by
    `,`, a gap written `?`, the label last.

    Raises:
        MissingData: it is not such a file; names the line.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()  # comments may be in any encoding
    header, start = _header(path, lines)
    classes = header.get("classlabel", "").split()
    if not classes or classes[0].lower() != "true" or len(classes) < 2:
        raise MissingData(
            f"{path} must name its classes in @classLabel; got {' '.join(classes) or 'none'}. Choose one."
        )
    if header.get("timestamps", "false").lower() == "true":
        raise MissingData(f"{path} must hold values without time stamps; got @timeStamps true. Choose another set.")
    rows, labels = [], []
    for at, line in enumerate(lines[start:], start + 1):
        if not line.strip() or line.startswith("#"):
            continue
        *channels, label = line.strip().split(":")
        if not channels or label.strip() not in classes[1:]:
            raise MissingData(
                f"line {at} of {path} must end in one of the classes {', '.join(classes[1:6])}...; got {label[:40]!r}. "
                "Fetch it again."
            )
        rows.append(_row(path, at, channels, header))
        labels.append(label.strip())
    if not rows or len({len(r) for r in rows}) != 1:
        raise MissingData(
            f"{path} must hold series of one number of channels; got {sorted({len(r) for r in rows}) or 'no series'}. "
            "Fetch it again."
        )
    return Series(tuple(rows), tuple(labels), tuple(classes[1:]))


def _header(path: Path, lines: list[str]) -> tuple[dict[str, str], int]:
    """Lower-case header keys with their values, and the number of lines up to `@data`."""
    header: dict[str, str] = {}
    for at, line in enumerate(lines):
        word = line.strip()
        if word.lower() == "@data":
            return header, at + 1
        if word.startswith("@"):
            key, _, value = word[1:].partition(" ")
            header[key.lower()] = value.strip()
        elif word and not word.startswith("#"):
            break
    raise MissingData(f"{path} must have @ lines and then @data; got neither. Give a .ts file, or fetch it again.")


def _row(path: Path, at: int, channels: list[str], header: dict[str, str]) -> np.ndarray:
    try:
        read = [[float("nan" if v.strip() == "?" else v) for v in c.split(",")] for c in channels]
    except ValueError as error:
        raise MissingData(f"line {at} of {path} must hold numbers and ?; got {error}. Fetch it again.") from None
    wanted = header.get("serieslength", "")
    same = header.get("equallength", "").lower() == "true" and wanted.isdigit()
    lengths = {len(c) for c in read}
    if len(lengths) != 1 or (same and lengths != {int(wanted)}):
        raise MissingData(
            f"line {at} of {path} must have {wanted if same else 'one number of'} values in each channel; "
            f"got {sorted(lengths)}. Fetch it again."
        )
    return np.asarray(read, dtype=np.float32)
