"""Photos of ten kinds of things, 32x32 pixels, colour."""

from __future__ import annotations

from pathlib import Path

from cupel.data.cifar_binary import cifar_found
from cupel.data.dataset import DataSet, File
from cupel.data.found import Found
from cupel.data.local import local

# The binary version: the other one is made of Python pickles, which cupel never opens. Size and sha256:
# tensorflow/datasets, url_checksums/cifar10.txt; md5: the publisher's page.
SET = DataSet(
    name="cifar10",
    title="photos of ten kinds of things, 32x32 pixels, colour",
    kind="images",
    licence="none stated; the publisher asks for a citation",
    source="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, University of Toronto 2009",
    folder="cifar10",
    examples=60000,
    classes=10,
    files=(
        File(
            path="cifar10/cifar-10-binary.tar.gz",
            urls=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
            bytes=170052171,
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            unpacks="cifar10/cifar-10-batches-bin",
            unpacked_bytes=200000000,
        ),
    ),
)


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Images `[50000, 3, 32, 32]` for training and 10,000 for testing, in [0, 1]."""
    folder = local("cifar10/cifar-10-batches-bin", data_dir=data_dir)
    return cifar_found(
        folder, tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin", 1, folder / "batches.meta.txt"
    )
