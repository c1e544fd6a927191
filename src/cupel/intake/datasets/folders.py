"""Which image files a folder holds, by part and class; links are not followed, and what is passed over is counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from cupel.core.errors import DataError
from cupel.intake.datasets.raw import count_of, listed, shown

MOST_CLASSES = 20_000
MOST_FILES = 5_000_000
_DEPTH = 8  # of folders inside a class folder
_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_ORDER = ("train", "valid", "test")
_PARTS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Picture:
    """One file: `path` as the system knows it, `name` below the root as people may read it."""

    path: str
    name: str
    part: str
    label: str


@dataclass(frozen=True)
class Folder:
    shown: str
    pictures: list[Picture]
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    def classes_told(self, classes: list[str]) -> str:
        return f"{len(classes):,} classes numbered in the order of their folders' names: {listed(classes)}"


def readable(name: str) -> str:
    r"""A file name as text: bytes that are not UTF-8 as \xNN, so that it can be written to any file.

    >>> readable("caf\udce9")
    'caf\\xe9'
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def walk(root: str) -> Folder:
    """Find the images below `root`.

    Raises:
        DataError: no class folders, too many of them, or class folders mixed with split folders.
    """
    passed: Counter[str] = Counter()
    told = shown(readable(root), 200)
    tops = _folders(root, passed)
    if not tops:
        loose = passed["images outside a class folder"]
        got = f"{count_of(loose, 'image')} and no folder" if loose else "no folder"
        raise DataError(
            f"{told} must hold a folder of images for each class; got {got}{_passed(passed)}. "
            "Sort the images into folders, or name a file."
        )
    splits = _splits(root, tops, told)
    pictures: list[Picture] = []
    found: set[str] = set()
    for name in splits or [""]:
        top = os.path.join(root, name) if name else root
        labels = _folders(top, passed) if name else tops
        found.update(readable(label) for label in labels)
        for label in labels:
            pictures += _pictures(root, top, label, _PARTS[name.lower()] if name else "all", passed)
            if len(pictures) > MOST_FILES:
                raise DataError(f"{told} must hold at most {MOST_FILES:,} images; it holds more. Divide it.")
    if not pictures:
        raise DataError(
            f"{told} must hold images (PNG, JPEG, BMP, GIF, WebP) in its class folders; got none"
            f"{_passed(passed)}. Check the path."
        )
    parts = [p for p in _ORDER if p in {picture.part for picture in pictures}]
    notes = [f"splits of the folder kept: {', '.join(parts)}"] if splits else []
    notes += [f"{count_of(n, what[0], what[1])} {what[2]}" for what, n in sorted(_worded(passed)) if n]
    return Folder(told, pictures, tuple(sorted(found)), tuple(notes))


def _splits(root: str, tops: list[str], told: str) -> list[str]:
    """The folders in `root` that are splits instead of classes, training first; refuses a mixture."""
    splits = [name for name in tops if name.lower() in _PARTS and _nested(os.path.join(root, name))]
    if len(tops) > 1 and not splits and all(name.lower() in _PARTS for name in tops):
        raise DataError(
            f"the splits {listed(tops)} of {told} must hold a folder for each class; they hold images themselves. "
            "Sort them into class folders."
        )
    if splits and len(splits) < len(tops):
        rest = [readable(n) for n in tops if n not in splits]
        raise DataError(
            f"the folders of {told} must all be splits or all be classes; {listed(splits)} hold folders "
            f"themselves, beside {listed(rest, 5)}. Move one kind elsewhere."
        )
    twice = [p for p, n in Counter(_PARTS[name.lower()] for name in splits).items() if n > 1]
    if twice:
        raise DataError(f"{told} must hold each split once; {listed(twice)} stands under two names. Join the folders.")
    return sorted(splits, key=lambda name: _ORDER.index(_PARTS[name.lower()]))


def _worded(passed: Counter[str]) -> list[tuple[tuple[str, str, str], int]]:
    words = {
        "links": ("symbolic link", "symbolic links", "not followed"),
        "hidden": ("hidden entry", "hidden entries", "skipped"),
        "images outside a class folder": ("image", "images", "outside a class folder skipped"),
        "others": ("file", "files", "of other kinds than PNG, JPEG, BMP, GIF and WebP skipped"),
        "special": ("pipe, socket or device", "pipes, sockets or devices", "skipped"),
        "deep": ("folder", "folders", f"more than {_DEPTH} levels deep skipped"),
        "closed": ("folder", "folders", "skipped, as permission is denied"),
    }
    return [(words[kind], count) for kind, count in passed.items()]


def _passed(passed: Counter[str]) -> str:
    told = [f"{count_of(n, what[0], what[1])} {what[2]}" for what, n in sorted(_worded(passed)) if n]
    return f" ({'; '.join(told)})" if told else ""


def _entries(path: str, passed: Counter[str]) -> Iterator[os.DirEntry[str]]:
    """Plain files and folders; the rest is counted."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_symlink():
                    passed["links"] += 1
                elif entry.name.startswith(".") or entry.name in ("__MACOSX", "Thumbs.db"):
                    passed["hidden"] += 1
                elif entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False):
                    yield entry
                else:
                    passed["special"] += 1
    except OSError:
        passed["closed"] += 1


def _folders(path: str, passed: Counter[str]) -> list[str]:
    """Names of the folders in `path`, sorted."""
    names = []
    for entry in _entries(path, passed):
        if not entry.is_dir(follow_symlinks=False):
            passed["images outside a class folder" if entry.name.lower().endswith(_ENDINGS) else "others"] += 1
            continue
        names.append(entry.name)
        if len(names) > MOST_CLASSES:
            raise DataError(
                f"{shown(readable(path), 200)} must hold at most {MOST_CLASSES:,} class folders; it holds more. "
                "Are these folders of examples instead of classes?"
            )
    return sorted(names)


def _nested(path: str) -> bool:
    """True if `path` holds folders and no images: a split, not a class."""
    kinds = {entry.is_dir(follow_symlinks=False): entry for entry in _entries(path, Counter())}
    return True in kinds and not any(
        entry.name.lower().endswith(_ENDINGS) for entry in _entries(path, Counter()) if not entry.is_dir()
    )


def _pictures(root: str, top: str, label: str, part: str, passed: Counter[str]) -> list[Picture]:
    """The images of one class, also in folders inside it, sorted by path."""
    found: list[Picture] = []
    waiting = [(os.path.join(top, label), 0)]
    while waiting:
        path, depth = waiting.pop()
        for entry in _entries(path, passed):
            if entry.is_dir(follow_symlinks=False):
                if depth < _DEPTH:
                    waiting.append((entry.path, depth + 1))
                else:
                    passed["deep"] += 1
            elif not entry.name.lower().endswith(_ENDINGS):
                passed["others"] += 1
            else:
                found.append(Picture(entry.path, readable(os.path.relpath(entry.path, root)), part, readable(label)))
    return sorted(found, key=lambda picture: picture.name)
