"""Handwritten digits, 28x28 pixels, grey."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.found import Found
from cupel.data.idx import idx_found

# Sizes and checksums: tensorflow/datasets, url_checksums/mnist.txt.
SET = DataSet(
    name="mnist",
    title="handwritten digits, 28x28 pixels, grey",
    kind="images",
    licence="CC BY-SA 3.0 as commonly stated; the publisher's page states none",
    source="Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, 1998",
    folder="mnist",
    examples=70000,
    classes=10,
    files=(
        File(
            path="mnist/train-images-idx3-ubyte.gz",
            urls=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz",
                "https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz",
            ),
            bytes=9912422,
            sha256="440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        File(
            path="mnist/train-labels-idx1-ubyte.gz",
            urls=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/train-labels-idx1-ubyte.gz",
                "https://storage.googleapis.com/cvdf-datasets/mnist/train-labels-idx1-ubyte.gz",
            ),
            bytes=28881,
            sha256="3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        File(
            path="mnist/t10k-images-idx3-ubyte.gz",
            urls=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/t10k-images-idx3-ubyte.gz",
                "https://storage.googleapis.com/cvdf-datasets/mnist/t10k-images-idx3-ubyte.gz",
            ),
            bytes=1648877,
            sha256="8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        File(
            path="mnist/t10k-labels-idx1-ubyte.gz",
            urls=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/t10k-labels-idx1-ubyte.gz",
                "https://storage.googleapis.com/cvdf-datasets/mnist/t10k-labels-idx1-ubyte.gz",
            ),
            bytes=4542,
            sha256="f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
)
_CLASSES = tuple(str(k) for k in range(10))


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Images `[60000, 1, 28, 28]` for training and 10,000 for testing, in [0, 1]."""
    return idx_found("mnist", _CLASSES, data_dir)
