"""IDX files, the format of MNIST and its followers, read without pickle."""

from __future__ import annotations

import gzip
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cupel.core.errors import MissingData
from cupel.core.types import Examples, Splits
from cupel.data.local import local

_KINDS = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file, gzipped when its name ends in `.gz`.

    Layout: two zero bytes, a type byte, the number of axes; the axes' lengths as big-endian int32; the values.

    Raises:
        MissingData: the file is not IDX, or is cut short.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    kind = _KINDS.get(raw[2]) if len(raw) >= 4 and raw[:2] == b"\0\0" else None
    if kind is None:
        raise MissingData(f"{path} must be an IDX file; its first bytes are {raw[:4]!r}. Fetch it again.")
    start = 4 + 4 * raw[3]
    shape = np.frombuffer(raw[4:start], ">i4").tolist()
    wanted = math.prod(shape) * np.dtype(kind).itemsize
    if len(shape) != raw[3] or len(raw) - start != wanted:
        raise MissingData(f"{path} must hold {shape} values in {wanted} bytes; got {len(raw) - start}. Fetch it again.")
    values = np.frombuffer(raw, kind, offset=start).reshape(shape)
    return values.astype(values.dtype.newbyteorder("="))


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
