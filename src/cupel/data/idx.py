"""IDX files, the format of MNIST and its followers, read without pickle."""

from __future__ import annotations

import gzip
import math
import zlib
from functools import lru_cache
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cupel.core.errors import MissingData
from cupel.core.types import Bounds, Examples, Splits
from cupel.data.found import Found
from cupel.data.local import local

_KINDS = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_AGAIN = "Fetch it again: `cupel data fetch NAME --again`."


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file, gzipped when its name ends in `.gz`.

    Layout: two zero bytes, a type byte, the number of axes; the axes' lengths as big-endian int32; the values.
    Never reads more than the header announces, so a small file cannot swell without end.

    Raises:
        MissingData: the file is not IDX, is cut short, or holds more than its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            kind = _KINDS.get(head[2]) if len(head) == 4 and head[:2] == b"\0\0" else None
            if kind is None:
                raise MissingData(f"{path} must be an IDX file; got a file that begins with {head!r}. {_AGAIN}")
            shape = np.frombuffer(file.read(4 * head[3]), ">i4").tolist()
            wanted = math.prod(shape) * np.dtype(kind).itemsize
            if len(shape) != head[3] or any(n < 0 for n in shape):
                raise MissingData(f"{path} must give the lengths of {head[3]} axes; got {shape}. {_AGAIN}")
            raw = _at_most(file, wanted + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MissingData(f"{path} must be a whole gzip file; got a broken one: {error}. {_AGAIN}") from None
    if len(raw) != wanted:
        more = "more" if len(raw) > wanted else len(raw)
        raise MissingData(f"{path} must hold {shape} values in {wanted} bytes; got {more}. {_AGAIN}")
    values = np.frombuffer(raw, kind).reshape(shape)
    return values.astype(values.dtype.newbyteorder("="))


def _at_most(file: BufferedIOBase, count: int) -> bytes:
    """Up to `count` bytes, taken in pieces: a header may announce more memory than there is."""
    pieces = []
    while count > 0 and (piece := file.read(min(count, 1 << 24))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def idx_found(folder: str, classes: tuple[str, ...], data_dir: Path | None = None) -> Found:
    """Both parts of a set in MNIST's layout, whole.

    Raises:
        MissingData: a file is missing or broken, or images and labels do not belong together.
    """
    paths = [local(f"{folder}/{name}-ubyte.gz", data_dir=data_dir) for name in _NAMES]
    parts, start = {}, 0
    for part, at in (("train", 0), ("test", 2)):
        images, labels = read_idx(paths[at]), read_idx(paths[at + 1])
        if images.ndim != 3 or labels.shape != images.shape[:1] or labels.size == 0 or labels.max() >= len(classes):
            raise MissingData(
                f"{paths[at]} and {paths[at + 1].name} must hold images and one label below {len(classes)} for each; "
                f"got shapes {images.shape} and {labels.shape}. {_AGAIN}"
            )
        index = torch.arange(len(labels)) + start
        parts[part] = Examples(_scaled(images), torch.from_numpy(labels).long(), index)
        start += len(labels)
    return Found(parts, classes, "images", Bounds(), ("pixel values 0..255 divided by 255",))


_NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_cached = lru_cache(maxsize=8)(read_idx)


def idx_images(folder: str, train: int, valid: int, data_seed: int) -> Splits:
    """The images of a folder in MNIST's layout: `train` and `valid` rows of its training part, its whole test part.

    Args:
        folder: such as `fashion-mnist`, below the data folder.
        train, valid: rows of the 60,000, stratified by class; `train` 0 takes all that `valid` leaves.
        data_seed: which rows.

    Shapes: images `[N, 1, 28, 28]` in [0, 1], labels `[N]`. Index: the row, plus the size of the training part for
    test images.
    """
    from sklearn.model_selection import train_test_split

    images, labels, test_images, test_labels = (_cached(local(f"{folder}/{name}-ubyte.gz")) for name in _NAMES)
    train = min(train or len(labels), len(labels) - valid)
    rows = np.arange(len(labels))
    rest, checked = train_test_split(rows, test_size=valid, random_state=data_seed, stratify=labels)
    if train < len(rest):
        rest, _ = train_test_split(rest, train_size=train, random_state=data_seed, stratify=labels[rest])
    kept, checked = np.sort(rest), np.sort(checked)
    parts = [(images[r], labels[r], torch.from_numpy(r)) for r in (kept, checked)]
    parts.append((test_images, test_labels, torch.arange(len(test_labels)) + len(labels)))
    return Splits(*(Examples(_scaled(x), torch.from_numpy(y).long(), i) for x, y, i in parts))


def _scaled(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).float().div(255).unsqueeze(1)
