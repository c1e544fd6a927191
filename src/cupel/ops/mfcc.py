"""Mel-frequency cepstral coefficients of short sounds: what a small recogniser of words listens to."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def mel(hertz: float) -> float:
    """The pitch scale of O'Shaughnessy (1987): 1127 ln(1 + f / 700).

    >>> round(mel(1000.0))
    1000
    """
    return 1127.0 * math.log1p(hertz / 700.0)


@lru_cache(maxsize=8)
def mel_filters(rate: int, length: int, mels: int, low: float, high: float) -> Tensor:
    """Weights of `mels` triangles over the bins of a Fourier transform of `length`: `[length / 2 + 1, mels]` float64.

    The corners are evenly spaced in mel from `low` to `high` hertz, and so are the slopes between them, as in the
    front end of TensorFlow's speech commands.

    Raises:
        ValueError: a triangle without a bin, or frequencies that the rate cannot carry.
    """
    if not 0 <= low < high <= rate / 2:
        raise ValueError(f"0 <= low < high <= {rate / 2:g} hertz must hold; got {low:g} and {high:g}. Lower `high`.")
    bins = torch.arange(length // 2 + 1, dtype=torch.float64) * rate / length
    place = 1127.0 * torch.log1p(bins / 700.0)[:, None]
    edge = torch.linspace(mel(low), mel(high), mels + 2, dtype=torch.float64)
    left, middle, right = edge[:-2], edge[1:-1], edge[2:]
    weights = torch.minimum((place - left) / (middle - left), (right - place) / (right - middle)).clamp_min(0.0)
    if not bool((weights.sum(0) > 0).all()):
        raise ValueError(f"every one of {mels} triangles must cover a bin of {rate / length:g} hertz. Use fewer mels.")
    return weights


def cosines(mels: int, coefficients: int) -> Tensor:
    """The first columns of the discrete cosine transform II: sqrt(2 / M) cos(pi k (m + 1/2) / M), `[M, K]` float64."""
    m = torch.arange(mels, dtype=torch.float64)[:, None] + 0.5
    k = torch.arange(coefficients, dtype=torch.float64)[None]
    return math.sqrt(2.0 / mels) * torch.cos(math.pi * k * m / mels)


def frames_in(samples: int, window: int, stride: int) -> int:
    """Whole windows that fit into `samples`.

    >>> frames_in(16000, 640, 320), frames_in(8000, 320, 320)
    (49, 25)
    """
    return 1 + (samples - window) // stride if samples >= window else 0


def mfcc(
    sound: Tensor,
    rate: int,
    *,
    window: int,
    stride: int,
    mels: int = 40,
    coefficients: int = 10,
    band: tuple[float, float] = (20.0, 4000.0),
    floor: float = 1e-12,
) -> Tensor:
    """Cepstral coefficients of every window: `[..., T]` -> `[..., frames, coefficients]`.

    Each window is weighted with a periodic Hann curve, filled up with zeros to a power of two and transformed; the
    magnitudes (not the powers) are summed under `mels` triangles; the logarithms go through a cosine transform.

    Args:
        sound: samples, at `rate` a second.
        window, stride: in samples.
        band: hertz that the triangles span.
        floor: least sum under a triangle, before the logarithm.

    Raises:
        ValueError: a sound shorter than the window, or a band that the rate cannot carry.
    """
    if sound.shape[-1] < window:
        raise ValueError(f"a sound must have {window} samples or more; got {sound.shape[-1]}. Fill it with zeros.")
    length = 1 << (window - 1).bit_length()
    pieces = sound.unfold(-1, window, stride) * torch.hann_window(window, dtype=sound.dtype, device=sound.device)
    spectrum = torch.fft.rfft(pieces, n=length).abs()  # [..., frames, length / 2 + 1]
    sums = spectrum @ mel_filters(rate, length, mels, *band).to(spectrum)
    made: Tensor = sums.clamp_min(floor).log() @ cosines(mels, coefficients).to(spectrum)
    return made
