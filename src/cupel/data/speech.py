"""Recordings of single words: the trees of the Free Spoken Digit Dataset and of Speech Commands."""

from __future__ import annotations

import re
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cupel.core.errors import MissingData
from cupel.core.types import Bounds, Examples
from cupel.data.found import Found
from cupel.data.wav import fixed, mono

FSDD_RATE, COMMANDS_RATE = 8000, 16000
_TAKE = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")
_SOUND = Bounds(-1.0, 1.0)


def read_fsdd(folder: Path, count: int = 0) -> Found:
    """The tree of the Free Spoken Digit Dataset: `recordings/DIGIT_SPEAKER_TAKE.wav`.

    Takes 0 to 4 of every digit and speaker are the official test part.

    Args:
        count: how many recordings there must be; 0 for any number.

    Shapes: series `[N, 1, 8000]`, the first second at 8 kHz, silence behind the shorter ones.

    Raises:
        MissingData: recordings are missing or broken.
    """
    named = [(m, p) for p in sorted((folder / "recordings").glob("*.wav")) if (m := _TAKE.fullmatch(p.name))]
    if not named or (count and len(named) != count):
        raise MissingData(
            f"{folder}/recordings must hold {count or 'some'} files DIGIT_SPEAKER_TAKE.wav; got {len(named)}. "
            "Run `cupel data fetch fsdd --again`."
        )
    sound, cut = mono([p for _, p in named], FSDD_RATE, FSDD_RATE)
    labels = torch.tensor([int(m[1]) for m, _ in named])
    return _digits(sound, labels, torch.tensor([int(m[3]) < 5 for m, _ in named]), cut)


def read_fsdd_arrays(path: Path) -> Found:
    """Recordings in one `.npz`: `samples` int16, `offsets` `[N + 1]`, `labels` `[N]`, `takes` `[N]`.

    Raises:
        MissingData: the file is broken, or its arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            samples, offsets, labels, takes = (file[k] for k in ("samples", "offsets", "labels", "takes"))
        ends = offsets.astype(np.int64)
        if samples.dtype != np.int16 or len(labels) != len(takes) or len(ends) != len(labels) + 1:
            raise ValueError(f"{len(ends)} offsets, {len(labels)} labels, {len(takes)} takes")
        if (
            ends[0] < 0
            or ends[-1] > len(samples)
            or (np.diff(ends) <= 0).any()
            or not 0 <= labels.min() <= labels.max() < 10
        ):
            raise ValueError("offsets that do not rise within the samples, or labels that are no digits")
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise MissingData(
            f"{path} must be an .npz with samples, offsets, labels and takes; got {error}. Put it there again."
        ) from None
    cuts = [samples[a:b].astype(np.float32) / 32768 for a, b in pairwise(ends)]
    cut = sum(len(c) > FSDD_RATE for c in cuts)
    held = torch.from_numpy(takes.astype(np.int64)) < 5
    return _digits(fixed(cuts, FSDD_RATE), torch.from_numpy(labels.astype(np.int64)), held, cut)


def _digits(sound: Tensor, labels: Tensor, held: Tensor, cut: int) -> Found:
    every = Examples(sound, labels, torch.arange(len(labels)))
    notes = (
        "samples divided by 32768",
        f"the first second at 8 kHz: {cut} longer recordings are cut, shorter ones end in silence",
        "takes 0 to 4 of every digit and speaker are the test part",
    )
    parts = {"train": every.take(~held), "test": every.take(held)}
    if not len(parts["train"]) or not len(parts["test"]):
        parts = {"all": every}
    return Found(parts, tuple(str(k) for k in range(10)), "series", _SOUND, notes)


def read_commands(folder: Path) -> Found:
    """The tree of Speech Commands: a folder for each word, `validation_list.txt` and `testing_list.txt`.

    Shapes: series `[N, 1, 16000]`, one second at 16 kHz, silence behind the shorter ones.

    Raises:
        MissingData: a list or a recording is missing or broken.
    """
    lists = {}
    for part, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        if not (folder / name).is_file():
            raise MissingData(f"{folder} must hold {name}; got none. Run `cupel data fetch speech-commands --again`.")
        lists[part] = set((folder / name).read_text(encoding="utf-8").split())
    words = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))
    files: dict[str, list[tuple[Path, int]]] = {"train": [], "valid": [], "test": []}
    for k, word in enumerate(words):
        for path in sorted((folder / word).glob("*.wav")):
            name = f"{word}/{path.name}"
            part = "test" if name in lists["test"] else "valid" if name in lists["valid"] else "train"
            files[part].append((path, k))
    for part, named in lists.items():
        if len(named) != len(files[part]) or not files["train"]:
            raise MissingData(
                f"{folder} must hold the {len(named)} recordings of its {part} list and others; got "
                f"{len(files[part])}. Run `cupel data fetch speech-commands --again`."
            )
    parts, start, cut = {}, 0, 0
    for part, rows in files.items():
        if not rows:
            continue
        sound, longer = mono([p for p, _ in rows], COMMANDS_RATE, COMMANDS_RATE)
        parts[part] = Examples(sound, torch.tensor([k for _, k in rows]), torch.arange(len(rows)) + start)
        start, cut = start + len(rows), cut + longer
    notes = (
        "samples divided by 32768",
        f"one second at 16 kHz: {cut} longer recordings are cut, shorter ones end in silence",
    )
    return Found(parts, tuple(words), "series", _SOUND, notes)
