"""The folder tree of Tiny-ImageNet: JPEG images of 200 classes named by WordNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cupel.core.errors import MissingData, MissingExtra
from cupel.core.types import Bounds, Examples
from cupel.data.found import Found


def read_tiny_imagenet(folder: Path) -> Found:
    """Training and validation images of the tree `folder`.

    The labels of the official test images were never published; the official validation images are the test part.

    Shapes: images `[N, 3, 64, 64]` in [0, 1].

    Raises:
        MissingData: a file of the tree is missing, or is no image of that size.
        MissingExtra: Pillow is not installed.
    """
    ids = [line.strip() for line in _text(folder / "wnids.txt") if line.strip()]
    number = {wnid: k for k, wnid in enumerate(ids)}
    words = dict(line.split("\t", 1) for line in _text(folder / "words.txt") if "\t" in line)
    train = [(p, number[w]) for w in ids for p in sorted((folder / "train" / w / "images").glob("*.JPEG"))]
    held = []
    for line in _text(folder / "val" / "val_annotations.txt"):
        name, wnid, *_ = (*line.split("\t"), "", "")
        if name and wnid not in number:
            raise MissingData(
                f"{folder}/val/val_annotations.txt must name classes of wnids.txt; got {wnid!r}. Fetch the set again."
            )
        if name:
            held.append((folder / "val" / "images" / name, number[wnid]))
    parts, start = {}, 0
    for part, rows in (("train", train), ("test", held)):
        if not rows:
            raise MissingData(f"{folder} must hold {part} images; got none. Fetch the set again.")
        index = torch.arange(len(rows)) + start
        parts[part] = Examples(_images([p for p, _ in rows]), torch.tensor([k for _, k in rows]), index)
        start += len(rows)
    notes = (
        "pixel values 0..255 divided by 255",
        "the official validation images serve as test part: the labels of the test images were never published",
    )
    return Found(parts, tuple(words.get(w, w).strip() for w in ids), "images", Bounds(), notes)


def _text(path: Path) -> list[str]:
    if not path.is_file():
        raise MissingData(f"{path} must be there; got none. Fetch the set again: `cupel data fetch tiny-imagenet`.")
    return path.read_text(encoding="utf-8").splitlines()


def _images(paths: list[Path]) -> Tensor:
    """Decoded images `[N, 3, 64, 64]`, scaled to [0, 1] in place: a second copy would not fit beside the first."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("Pillow", "images") from None
    made = torch.empty(len(paths), 3, 64, 64)
    for row, path in enumerate(paths):
        try:
            with Image.open(path, formats=("JPEG", "PNG")) as image:
                if image.size != (64, 64):
                    raise MissingData(f"{path} must be 64x64 pixels; got {image.size}. Fetch the set again.")
                pixels = np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise MissingData(f"{path} must be a whole JPEG image; got {error}. Fetch the set again.") from None
        made[row] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return made.div_(255)
