"""The binary version of CIFAR-10 and CIFAR-100: one or two label bytes, then 3,072 pixel bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cupel.core.errors import MissingData
from cupel.core.types import Bounds, Examples
from cupel.data.found import Found

PIXELS = 3 * 32 * 32


def read_cifar(path: Path, label_bytes: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, 3, 32, 32]` uint8 and labels `[N]` int64 of one `.bin` file.

    Args:
        label_bytes: 1 for CIFAR-10, 2 for CIFAR-100 (coarse, then fine; the fine one counts).
        classes: labels lie in 0..classes-1.

    Raises:
        MissingData: the file does not consist of whole records, or a label is out of range.
    """
    raw = np.fromfile(path, dtype=np.uint8)
    record = label_bytes + PIXELS
    if len(raw) == 0 or len(raw) % record:
        raise MissingData(
            f"{path} must consist of records of {record} bytes; got {len(raw)} bytes. "
            "Fetch it again: `cupel data fetch NAME --again`."
        )
    rows = raw.reshape(-1, record)
    labels = rows[:, label_bytes - 1].astype(np.int64)
    if labels.max() >= classes:
        raise MissingData(
            f"{path} must hold labels below {classes}; got {labels.max()}. Give the other of CIFAR-10 and CIFAR-100, "
            "or fetch it again."
        )
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32), labels


def cifar_found(folder: Path, train: Sequence[str], test: str, label_bytes: int, names: Path) -> Found:
    """Both parts of an unpacked binary archive; class names are the lines of `names`.

    Raises:
        MissingData: a file is missing or broken.
    """
    for name in (*train, test, names.name):
        if not (folder / name).is_file():
            raise MissingData(f"{folder} must hold {name}; got none. Fetch it again: `cupel data fetch NAME --again`.")
    classes = tuple(line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip())
    parts, start = {}, 0
    for part, files in (("train", train), ("test", (test,))):
        read = [read_cifar(folder / f, label_bytes, len(classes)) for f in files]
        images, labels = (np.concatenate(piece) for piece in zip(*read, strict=True))
        index = torch.arange(len(labels)) + start
        parts[part] = Examples(torch.from_numpy(images).float().div(255), torch.from_numpy(labels), index)
        start += len(labels)
    return Found(parts, classes, "images", Bounds(), ("pixel values 0..255 divided by 255",))
