"""Photos of clothes, 28x28 pixels, grey."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.found import Found
from cupel.data.idx import idx_found

# Sizes and checksums: tensorflow/datasets, url_checksums/fashion_mnist.txt; the same on copies whose git blobs are the
# publisher's.
SET = DataSet(
    name="fashion-mnist",
    title="photos of clothes, 28x28 pixels, grey",
    kind="images",
    licence="MIT (Zalando SE)",
    source="H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST, arXiv:1708.07747, 2017",
    folder="fashion-mnist",
    examples=70000,
    classes=10,
    files=(
        File(
            path="fashion-mnist/train-images-idx3-ubyte.gz",
            urls=(
                "https://storage.googleapis.com/tensorflow/tf-keras-datasets/train-images-idx3-ubyte.gz",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/train-images-idx3-ubyte.gz",
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-images-idx3-ubyte.gz",
            ),
            bytes=26421880,
            sha256="3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        File(
            path="fashion-mnist/train-labels-idx1-ubyte.gz",
            urls=(
                "https://storage.googleapis.com/tensorflow/tf-keras-datasets/train-labels-idx1-ubyte.gz",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/train-labels-idx1-ubyte.gz",
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-labels-idx1-ubyte.gz",
            ),
            bytes=29515,
            sha256="a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        File(
            path="fashion-mnist/t10k-images-idx3-ubyte.gz",
            urls=(
                "https://storage.googleapis.com/tensorflow/tf-keras-datasets/t10k-images-idx3-ubyte.gz",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/t10k-images-idx3-ubyte.gz",
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-images-idx3-ubyte.gz",
            ),
            bytes=4422102,
            sha256="346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        File(
            path="fashion-mnist/t10k-labels-idx1-ubyte.gz",
            urls=(
                "https://storage.googleapis.com/tensorflow/tf-keras-datasets/t10k-labels-idx1-ubyte.gz",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/t10k-labels-idx1-ubyte.gz",
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-labels-idx1-ubyte.gz",
            ),
            bytes=5148,
            sha256="67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
)
_CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Images `[60000, 1, 28, 28]` for training and 10,000 for testing, in [0, 1]."""
    return idx_found("fashion-mnist", _CLASSES, data_dir)
