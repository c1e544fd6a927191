"""Handwritten digits, part of scikit-learn."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet
from cupel.data.found import Found

SET = DataSet(
    name="digits",
    title="handwritten digits, 8x8 pixels",
    kind="images",
    licence="CC BY 4.0 (UCI Machine Learning Repository)",
    source="E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998, test part",
    folder="",
    examples=1797,
    classes=10,
    remark="Comes with scikit-learn.",
)


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Images `[1797, 1, 8, 8]` in [0, 1], one set without a split of its own."""
    import torch
    from sklearn.datasets import load_digits

    from cupel.core.types import Bounds, Examples

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)
    examples = Examples(x, torch.from_numpy(labels).long(), torch.arange(len(labels)))
    names = tuple(str(k) for k in range(10))
    return Found({"all": examples}, names, "images", Bounds(), ("pixel values 0..16 divided by 16",))
