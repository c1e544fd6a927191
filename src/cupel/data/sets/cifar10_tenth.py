"""A tenth of CIFAR-10, decoded from JPEG."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.found import Found
from cupel.data.local import local

SET = DataSet(
    name="cifar10-tenth",
    title="a tenth of CIFAR-10, decoded from JPEG (about 30 dB)",
    kind="images",
    licence="none stated; the publisher of CIFAR-10 asks for a citation",
    source="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, University of Toronto 2009",
    folder="cifar10",
    examples=12000,
    classes=10,
    files=(
        File(
            path="cifar10/cifar10_train_1000pc.npz",
            urls=(),
            bytes=28882143,
            sha256="34a2dd0d3354198c3be5562b2c3f77b226416cd756871d322fa106362dd19508",
        ),
        File(
            path="cifar10/cifar10_test_200pc.npz",
            urls=(),
            bytes=5784023,
            sha256="23fddc68b0e845b60e75788bab05907b51b7da525bb7f59b41fe288e95fe791c",
        ),
    ),
    remark="Nobody publishes these files: they are the first 1,000 and 200 images of each class, as arrays.",
)
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Images `[10000, 3, 32, 32]` for training and 2,000 for testing, in [0, 1].

    The index of a training image is its position in the original 50,000.
    """
    import numpy as np
    import torch

    from cupel.core.errors import MissingData
    from cupel.core.types import Bounds, Examples
    from cupel.data.cifar import TRAIN_TOTAL

    parts = {}
    for part, file in zip(("train", "test"), SET.files, strict=True):
        path = local(file.path, data_dir=data_dir)
        try:
            with np.load(path, allow_pickle=False) as held:
                images, labels = held["images"], held["labels"]
                index = held["orig_index"] if part == "train" else np.arange(len(labels)) + TRAIN_TOTAL
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise MissingData(
                f"{path} must be an .npz of images and labels; got {error}. Put it there again."
            ) from None
        x = torch.from_numpy(images).float().div(255)
        parts[part] = Examples(x, torch.from_numpy(labels).long(), torch.from_numpy(index).long())
    notes = ("pixel values 0..255 divided by 255", "a tenth of the training images, decoded from JPEG")
    return Found(parts, _CLASSES, "images", Bounds(), notes)
