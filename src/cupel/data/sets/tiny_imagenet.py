"""Photos of 200 kinds of things, 64x64 pixels, colour."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.found import Found
from cupel.data.local import local
from cupel.data.tiny_imagenet import read_tiny_imagenet

# The publisher states no checksum; size and md5 are those that public code compares with (Avalanche and others).
SET = DataSet(
    name="tiny-imagenet",
    title="photos of 200 kinds of things, 64x64 pixels, colour",
    kind="images",
    licence="none stated; the images are ImageNet's: non-commercial research and education",
    source="Y. Le, X. Yang, Tiny ImageNet Visual Recognition Challenge, Stanford CS 231N, 2015",
    folder="tiny-imagenet",
    examples=110000,
    classes=200,
    files=(
        File(
            path="tiny-imagenet/tiny-imagenet-200.zip",
            urls=(
                "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            ),
            bytes=248100043,
            md5="90528d7ca1a48142e341f4ef8d21d0de",
            unpacks="tiny-imagenet/tiny-imagenet-200",
            unpacked_bytes=600000000,
        ),
    ),
    extra="images",
    remark="Takes 5.4 GB of memory when it is read; the official validation images serve as test part.",
)


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Images `[100000, 3, 64, 64]` for training and 10,000 for testing, in [0, 1]."""
    return read_tiny_imagenet(local("tiny-imagenet/tiny-imagenet-200", data_dir=data_dir))
