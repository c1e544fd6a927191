"""Sound files: plain PCM `.wav`, read with the standard library, and trees of them."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cupel.core.errors import MissingData


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """Samples `[C, T]` float32 in [-1, 1) and the sampling rate of a PCM file of 8, 16 or 32 bits.

    Raises:
        MissingData: it is no such file, or is cut short.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate, count = (
                file.getsampwidth(),
                file.getnchannels(),
                file.getframerate(),
                file.getnframes(),
            )
            raw = file.readframes(count)
    except (wave.Error, EOFError) as error:
        raise MissingData(
            f"{path} must be an uncompressed PCM .wav file; got {error or 'one that ends early'}. "
            "Convert it: ffmpeg -i IN -c:a pcm_s16le OUT.wav"
        ) from None
    kinds: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}
    if width not in kinds:
        raise MissingData(
            f"{path} must hold samples of 8, 16 or 32 bits; got {8 * width}. "
            "Convert it: ffmpeg -i IN -c:a pcm_s16le OUT.wav"
        )
    if len(raw) != count * channels * width:
        raise MissingData(f"{path} must hold {count} frames; got {len(raw) // (channels * width)}. Fetch it again.")
    values = np.frombuffer(raw, kinds[width]).astype(np.float32)
    half = np.float32(2 ** (8 * width - 1))
    values = (values - half) / half if width == 1 else values / half
    return values.reshape(-1, channels).T, rate


def fixed(recordings: Sequence[np.ndarray], steps: int) -> Tensor:
    """Recordings `[T_i]` as `[N, 1, steps]`: longer ones cut at the end, shorter ones followed by silence."""
    made = torch.zeros(len(recordings), 1, steps)
    for row, samples in enumerate(recordings):
        kept = torch.from_numpy(np.ascontiguousarray(samples[:steps]))
        made[row, 0, : len(kept)] = kept
    return made


def mono(paths: Sequence[Path], rate: int, steps: int) -> tuple[Tensor, int]:
    """Files of one channel as `[N, 1, steps]`, and how many were cut.

    Raises:
        MissingData: a file is broken, or has another rate or more channels.
    """
    made, cut = torch.zeros(len(paths), 1, steps), 0
    for row, path in enumerate(paths):
        samples, has = read_wav(path)
        if has != rate or len(samples) != 1:
            raise MissingData(
                f"{path} must have one channel of {rate} Hz; got {len(samples)} of {has} Hz. Fetch it again."
            )
        kept = torch.from_numpy(samples[0, :steps].copy())
        made[row, 0, : len(kept)] = kept
        cut += samples.shape[1] > steps
    return made, cut
