"""Photos of a hundred kinds of things, 32x32 pixels, colour."""

from __future__ import annotations

from pathlib import Path

from cupel.data.cifar_binary import cifar_found
from cupel.data.dataset import DataSet, File
from cupel.data.found import Found
from cupel.data.local import local

# The binary version: the other one is made of Python pickles, which cupel never opens. Size and sha256:
# tensorflow/datasets, url_checksums/cifar100.txt; md5: the publisher's page.
SET = DataSet(
    name="cifar100",
    title="photos of a hundred kinds of things, 32x32 pixels, colour",
    kind="images",
    licence="none stated; the publisher asks for a citation",
    source="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, University of Toronto 2009",
    folder="cifar100",
    examples=60000,
    classes=100,
    files=(
        File(
            path="cifar100/cifar-100-binary.tar.gz",
            urls=("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
            bytes=168513733,
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            unpacks="cifar100/cifar-100-binary",
            unpacked_bytes=200000000,
        ),
    ),
)


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Images `[50000, 3, 32, 32]` for training and 10,000 for testing, in [0, 1]."""
    folder = local("cifar100/cifar-100-binary", data_dir=data_dir)
    return cifar_found(folder, ("train.bin",), "test.bin", 2, folder / "fine_label_names.txt")
