"""Pixels of one image file, by stated rules, from bytes that nobody vouches for."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cupel.core.errors import DataError, MissingExtra
from cupel.intake.datasets.draw import stratified_choice
from cupel.intake.datasets.folders import Folder, Picture, walk
from cupel.intake.datasets.raw import DataOptions, Raw, count_of, free_bytes, gib, shown

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
_GRAY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")


@dataclass
class _Pile:
    """Decoded images and what happened on the way."""

    arrays: list[np.ndarray] = field(default_factory=list)  # [H, W] or [H, W, 3], values 0..255
    kept: list[int] = field(default_factory=list)
    broken: list[tuple[Picture, str]] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    bytes: int = 0


def read_images(path: os.PathLike[str], options: DataOptions) -> Raw:
    """A folder of class folders of images, also below train, valid (val) and test.

    Classes are numbered in the order of their names, as torchvision and Keras do. Rules for pixels: EXIF rotation is
    applied; palettes and CMYK become RGB; transparent pixels are laid on white; 16 bits a pixel are scaled to 0..255;
    of animations the first frame counts; gray images become RGB where others of the folder are in colour. An image
    that cannot be decoded is skipped and counted, at most half of them.

    Raises:
        MissingExtra: Pillow is not installed.
        DataError: no class folders, images of several sizes without `size`, or too many broken ones.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise MissingExtra("pillow", "images") from None
    folder = walk(os.fspath(path))
    notes = list(folder.notes)
    pictures = _chosen(folder, options, notes)
    pile = _decoded(pictures, options.size)
    _check(folder, pile, len(pictures), options.size)
    notes += _told(pile, len(pictures), options.size)
    x = _stacked(pile, options.channels, notes)
    return _raw(folder, [pictures[i] for i in pile.kept], x, notes)


def _chosen(folder: Folder, options: DataOptions, notes: list[str]) -> list[Picture]:
    """All pictures, or `limit` of them, chosen before any is decoded."""
    every = folder.pictures
    if not options.limit or options.limit >= len(every):
        return every
    groups = {key: i for i, key in enumerate(dict.fromkeys((p.part, p.label) for p in every))}
    codes = np.array([groups[p.part, p.label] for p in every])
    rows = np.sort(stratified_choice(codes, options.limit, options.seed))
    notes.append(
        f"{options.limit:,} of {len(every):,} images chosen, stratified by class, seed {options.seed}, "
        "before they were read"
    )
    return [every[i] for i in rows]


def _decoded(pictures: list[Picture], size: int) -> _Pile:
    pile, most = _Pile(), free_bytes()
    for i, picture in enumerate(pictures):
        try:
            with warnings.catch_warnings():
                _decode(picture.path, size, pile)
        except Exception as error:  # a decoder that is fed broken bytes may raise anything
            pile.broken.append((picture, shown(f"{type(error).__name__}: {error}", 120)))
            continue
        pile.kept += [i] if len(pile.kept) < len(pile.arrays) else []
        if 5 * pile.bytes > most:  # as read, and as float32
            raise DataError(
                f"images must fit in memory; {len(pile.kept):,} of {len(pictures):,} take {gib(5 * pile.bytes)}, "
                f"and {gib(most)} may be used. Set size or limit."
            )
    return pile


def _decode(path: str, size: int, pile: _Pile) -> None:
    """Decode one file onto the pile; one of another size than the first is only measured."""
    from PIL import Image

    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with Image.open(path, formats=_FORMATS) as image:
        turned = image.getexif().get(0x0112, 1)
        extent = image.size[::-1] if turned in (5, 6, 7, 8) else image.size
        if not size and pile.sizes and extent not in pile.sizes:
            pile.sizes[extent] += 1
            return
        if not size and len(pile.sizes) > 1:
            pile.sizes[extent] += 1
            return
        done = Counter({"turned as their EXIF data say": int(turned in range(2, 9))})
        pixels = _pixels(image, size, done)
    pile.sizes[extent] += 1
    pile.done += done
    pile.arrays.append(pixels)
    pile.bytes += pixels.nbytes


def _pixels(image: Image.Image, size: int, done: Counter[str]) -> np.ndarray:
    """`[H, W]` gray or `[H, W, 3]`, uint8, or float32 on the scale 0..255 for 16 bits."""
    from PIL import Image, ImageOps

    if getattr(image, "is_animated", False):
        done["animated: first frame used"] += 1
        image.seek(0)
    image.load()
    mode, clear = image.mode, image.has_transparency_data
    flat: Image.Image = ImageOps.exif_transpose(image)
    if mode.startswith("I") or mode == "F":
        done["of 16 bits a pixel: scaled to 0..255"] += 1
        deep = np.asarray(flat, dtype=np.float32) / 257.0
        deep = np.clip(deep, 0, 255)
        return np.asarray(Image.fromarray(deep).resize((size, size), Image.Resampling.BILINEAR)) if size else deep
    if clear:
        done["with transparency: laid on white"] += 1
        over = flat.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over)
    if mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
        done[f"stored as {'a palette' if mode[0] == 'P' else mode}: made RGB"] += 1
    flat = flat.convert("L" if mode in _GRAY else "RGB")
    if size and flat.size != (size, size):
        flat = flat.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(flat, dtype=np.uint8)


def _check(folder: Folder, pile: _Pile, total: int, size: int) -> None:
    if 2 * len(pile.broken) > total:
        first, why = pile.broken[0]
        raise DataError(
            f"at least half of the images of {folder.shown} must be readable; {len(pile.broken):,} of {total:,} are "
            f"not, the first {shown(first.name)} ({why}). Replace them."
        )
    if not size and len(pile.sizes) > 1:
        told = ", ".join(f"{n:,} of {w}x{h}" for (w, h), n in pile.sizes.most_common(4))
        raise DataError(
            f"images must all have one size; got {len(pile.sizes):,} sizes ({told}). Set size to resize them."
        )


def _told(pile: _Pile, total: int, size: int) -> list[str]:
    notes = []
    if pile.broken:
        named = "; ".join(f"{shown(p.name)} ({why})" for p, why in pile.broken[:3])
        named += f"; and {len(pile.broken) - 3:,} more" if len(pile.broken) > 3 else ""
        notes.append(f"{len(pile.broken):,} of {total:,} images could not be decoded and were skipped: {named}")
    notes += [f"{count_of(count, 'image')} {what}" for what, count in sorted(pile.done.items()) if count]
    other = sum(count for extent, count in pile.sizes.items() if extent != (size, size))
    if size and other:
        stretched = sum(count for (w, h), count in pile.sizes.items() if w != h)
        bent = f", {stretched:,} of them not square and so stretched" if stretched else ""
        notes.append(f"{count_of(other, 'image')} resized to {size}x{size} (bilinear){bent}")
    return notes


def _stacked(pile: _Pile, channels: int, notes: list[str]) -> np.ndarray:
    """`[N, C, H, W]` on the scale 0..255; `channels` other than as found are made when the range is settled."""
    colour = sum(a.ndim == 3 for a in pile.arrays)
    gray = len(pile.arrays) - colour
    if colour and gray and channels != 1:
        notes.append(f"{count_of(gray, 'gray image')} repeated over three channels, as {colour:,} are in colour")
    kind = np.float32 if any(a.dtype == np.float32 for a in pile.arrays) else np.uint8
    height, width = pile.arrays[0].shape[:2]
    x = np.empty((len(pile.arrays), 3 if colour else 1, height, width), dtype=kind)
    for i, pixels in enumerate(pile.arrays):
        x[i] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
        pile.arrays[i] = pixels[:0]  # one copy at a time
    return x


def _raw(folder: Folder, pictures: list[Picture], x: np.ndarray, notes: list[str]) -> Raw:
    classes = sorted({p.label for p in pictures})
    lost = len(folder.classes) - len(classes)
    if lost:
        notes.append(f"{count_of(lost, 'class folder')} without a readable image left out")
    if len(classes) < 2:
        raise DataError(
            f"{folder.shown} must hold two class folders or more with images; got {len(classes)}"
            f"{' (' + shown(classes[0]) + ')' if classes else ''}. Point to the folder right above the class folders."
        )
    numbers = {label: i for i, label in enumerate(classes)}
    y = np.array([numbers[p.label] for p in pictures], dtype=np.int64)
    parts = {}
    for name in dict.fromkeys(p.part for p in pictures):
        rows = np.array([p.part == name for p in pictures])
        parts[name] = (x if rows.all() else x[rows], y[rows])
    return Raw(parts, "NCHW", (0.0, 255.0), tuple(classes), True, (*notes, folder.classes_told(classes)))
