"""Spoken English digits."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.found import Found
from cupel.data.local import local
from cupel.data.speech import read_fsdd

# GitHub packs this archive on request and vouches for no checksum of it; the reader counts the recordings instead.
SET = DataSet(
    name="fsdd",
    title="3,000 spoken English digits of 6 speakers, 8 kHz",
    kind="series",
    licence="CC BY-SA 4.0",
    source="Z. Jackson et al., Free Spoken Digit Dataset v1.0.10, github.com/Jakobovski/free-spoken-digit-dataset",
    folder="fsdd",
    examples=3000,
    classes=10,
    files=(
        File(
            path="fsdd/free-spoken-digit-dataset-1.0.10.tar.gz",
            urls=("https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz",),
            unpacks="fsdd/free-spoken-digit-dataset-1.0.10",
            unpacked_bytes=100000000,
        ),
    ),
)


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Sound `[N, 1, 8000]` in [-1, 1): the first second of every recording; takes 0 to 4 are the test part."""
    return read_fsdd(local("fsdd/free-spoken-digit-dataset-1.0.10", data_dir=data_dir), SET.examples)
