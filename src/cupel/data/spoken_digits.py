"""Spoken English digits with their speakers and takes, split so that no speaker, or no take, is on both sides."""

from __future__ import annotations

import re
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cupel.core.errors import MissingData
from cupel.data.local import local
from cupel.data.wav import fixed, read_wav

RATE = 8000
TEST_TAKES = 5  # takes 0 to 4 of every digit and speaker are the set's own test part
VALID_TAKES = 3  # as many more of every digit and speaker validate
TREE, ARRAYS = "fsdd/free-spoken-digit-dataset-1.0.10", "fsdd/fsdd_takes00-24.npz"
_NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")


@dataclass(frozen=True)
class Recordings:
    """Shapes: sound `[N, 8000]` in [-1, 1), its loud part from sample 0; length, labels, speakers, takes `[N]`.

    `names` are those of the speakers, in alphabetical order.
    """

    sound: Tensor
    length: Tensor
    labels: Tensor
    speakers: Tensor
    takes: Tensor
    names: tuple[str, ...]


def recordings() -> Recordings:
    """All recordings on this machine, of the whole set or of its first half, whichever is found first.

    Raises:
        MissingData: there are none, or the files are broken.
    """
    return _read(local(TREE, ARRAYS))


@lru_cache(maxsize=2)
def _read(path: Path) -> Recordings:
    pieces, labels, speakers, takes = _tree(path) if path.is_dir() else _arrays(path)
    names = tuple(sorted(set(speakers)))
    return Recordings(
        fixed(pieces, RATE)[:, 0],
        torch.tensor([min(len(p), RATE) for p in pieces]),
        torch.tensor(labels),
        torch.tensor([names.index(s) for s in speakers]),
        torch.tensor(takes),
        names,
    )


_Parts = tuple[list[np.ndarray], list[int], list[str], list[int]]


def _tree(folder: Path) -> _Parts:
    named = [(m, p) for p in sorted((folder / "recordings").glob("*.wav")) if (m := _NAME.fullmatch(p.name))]
    if not named:
        raise MissingData(
            f"{folder}/recordings must hold files DIGIT_SPEAKER_TAKE.wav; got none. "
            "Run `cupel data fetch fsdd --again`."
        )
    pieces = []
    for _, path in named:
        samples, rate = read_wav(path)
        if rate != RATE or len(samples) != 1:
            raise MissingData(
                f"{path} must have one channel of {RATE} Hz; got {len(samples)} of {rate} Hz. Fetch it again."
            )
        pieces.append(samples[0])
    return pieces, [int(m[1]) for m, _ in named], [m[2] for m, _ in named], [int(m[3]) for m, _ in named]


def _arrays(path: Path) -> _Parts:
    try:
        with np.load(path, allow_pickle=False) as file:
            samples, ends = file["samples"], file["offsets"].astype(np.int64)
            labels, speakers, takes = (file[k].tolist() for k in ("labels", "speakers", "takes"))
        if not len(labels) == len(speakers) == len(takes) == len(ends) - 1 or ends[-1] > len(samples):
            raise ValueError(f"{len(ends)} offsets, {len(labels)} labels, {len(speakers)} speakers, {len(takes)} takes")
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise MissingData(
            f"{path} must be an .npz with samples, offsets, labels, speakers and takes; got {error}. "
            "Put it there again."
        ) from None
    pieces = [samples[a:b].astype(np.float32) / 32768 for a, b in pairwise(ends)]
    return pieces, [int(k) for k in labels], [str(s) for s in speakers], [int(t) for t in takes]


def parts(held: Recordings, by: str, data_seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the training, validation and test parts.

    Args:
        by: `take`: takes 0 to 4 of every digit and speaker test, and three others, which `data_seed` chooses, validate;
            `speaker`: one speaker tests, the next one validates, the others train, and `data_seed` chooses which.

    Raises:
        MissingData: too few speakers or takes for such a split.
    """
    count = len(held.names)
    if by == "speaker":
        if count < 3:
            raise MissingData(
                f"a split by speaker must have 3 speakers; got {count}. Split by take, or add recordings."
            )
        test = held.speakers == data_seed % count
        valid = held.speakers == (data_seed + 1) % count
    else:
        test = held.takes < TEST_TAKES
        others = held.takes[~test].unique()
        if len(others) <= VALID_TAKES:
            raise MissingData(
                f"a split by take must have more than {TEST_TAKES + VALID_TAKES} takes; got {len(others)} behind "
                f"the first {TEST_TAKES}. Split by speaker, or add recordings."
            )
        first = data_seed % (len(others) - VALID_TAKES + 1)
        valid = torch.isin(held.takes, others[first : first + VALID_TAKES])
    rows = torch.arange(len(held.labels))
    return rows[~test & ~valid], rows[valid & ~test], rows[test]
