"""Half of the spoken English digits, in one file of arrays."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.found import Found
from cupel.data.local import local
from cupel.data.speech import read_fsdd_arrays

SET = DataSet(
    name="fsdd-half",
    title="1,500 spoken English digits of 6 speakers, 8 kHz (takes 0 to 24)",
    kind="series",
    licence="CC BY-SA 4.0",
    source="Z. Jackson et al., Free Spoken Digit Dataset, github.com/Jakobovski/free-spoken-digit-dataset",
    folder="fsdd",
    examples=1500,
    classes=10,
    files=(
        File(
            path="fsdd/fsdd_takes00-24.npz",
            urls=(),
            bytes=7689157,
            sha256="5a21c42597343ed4cd3977696feed124fded33d86eef310d21de015ce47e8a50",
        ),
    ),
    remark="Nobody publishes this file: it holds takes 0 to 24 of the set `fsdd` as arrays.",
)


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Sound `[N, 1, 8000]` in [-1, 1): the first second of every recording; takes 0 to 4 are the test part."""
    return read_fsdd_arrays(local("fsdd/fsdd_takes00-24.npz", data_dir=data_dir))
