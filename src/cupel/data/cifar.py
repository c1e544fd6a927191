"""A tenth of CIFAR-10: 10,000 training and 2,000 test images, decoded from JPEG."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cupel.core.types import Examples, Splits
from cupel.data.local import local

TRAIN_TOTAL = 50_000  # images of the original training part, in whose order `orig_index` counts


@lru_cache(maxsize=2)
def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as held:
        return {key: held[key] for key in held.files}


def cifar10(train: int, valid: int, data_seed: int) -> Splits:
    """Images `[N, 3, 32, 32]` in [0, 1], labels `[N]`, stratified by class.

    Args:
        train, valid: rows of the 10,000; `train` 0 takes all that `valid` leaves.
        data_seed: which rows.

    The index of a training image is its position in the original 50,000, so that human labels made for those
    (CIFAR-N) can be looked up; test images count on from there.
    """
    from sklearn.model_selection import train_test_split

    held, seen = (_arrays(local(f"cifar10/cifar10_{part}.npz")) for part in ("train_1000pc", "test_200pc"))
    labels = held["labels"]
    rest, checked = train_test_split(np.arange(len(labels)), test_size=valid, random_state=data_seed, stratify=labels)
    if train and train < len(rest):
        rest, _ = train_test_split(rest, train_size=train, random_state=data_seed, stratify=labels[rest])
    index = torch.arange(len(seen["labels"])) + TRAIN_TOTAL
    return Splits(
        _part(held, np.sort(rest)),
        _part(held, np.sort(checked)),
        Examples(_scaled(seen["images"]), _tensor(seen["labels"]), index),
    )


def _part(held: dict[str, np.ndarray], rows: np.ndarray) -> Examples:
    return Examples(_scaled(held["images"][rows]), _tensor(held["labels"][rows]), _tensor(held["orig_index"][rows]))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).long()


def _scaled(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).float().div(255)
