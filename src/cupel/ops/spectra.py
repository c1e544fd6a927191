"""Series `[N, C, T]` in the frequency domain: waves, which frequencies a loss listens to, spectra of a trigger.

A spectrum has one row for each channel and one value for each bin 0 .. T // 2: `[C, F]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]  # inputs [N, C, T] -> loss of each, [N]


def waves(length: int) -> Tensor:
    """Cosine and sine of every bin with root mean square 1, `[F, 2, T]` float64; sines of bins 0 and T / 2 are 0."""
    at = torch.arange(length, dtype=torch.float64)
    bins = torch.arange(length // 2 + 1, dtype=torch.float64)
    angle = 2 * torch.pi * bins[:, None] * at / length
    pair = torch.stack([angle.cos(), angle.sin()], dim=1)
    size = pair.square().mean(2, keepdim=True).sqrt()
    unit = pair / size.clamp_min(1e-6)
    return unit * (size > 1e-6)


def sensitivity(losses: Losses, x: Tensor, size: float) -> Tensor:
    """Mean rise of the loss when a wave of each bin is added to each channel: `[C, F]`, no gradients.

    Averaged over the cosine and the sine and their negatives, so that a rise for one sign that is a
    fall for the other does not count.

    Args:
        losses: of each series.
        x: `[N, C, T]`.
        size: root mean square of the wave, in units of the inputs.
    """
    channels, length = x.shape[1:]
    basis = waves(length).to(x)
    found = torch.zeros(channels, len(basis), dtype=x.dtype, device=x.device)
    with torch.no_grad():
        calm = losses(x).mean()
        for f, pair in enumerate(basis):
            phases = [wave * sign for wave in pair if bool(wave.any()) for sign in (size, -size)]
            for c in range(channels):
                only = torch.zeros(channels, 1, dtype=x.dtype, device=x.device)
                only[c] = 1
                found[c, f] = torch.stack([losses(x + only * wave).mean() - calm for wave in phases]).mean()
    return found


def as_shares(rises: Tensor) -> Tensor:
    """Rises below zero cut off, the rest scaled to add up to 1; equal shares if nothing rises."""
    kept = rises.clamp_min(0)
    total = kept.sum()
    return kept / total if float(total) > 0 else torch.full_like(kept, 1 / kept.numel())


def amplitude_shares(x: Tensor) -> Tensor:
    """|rfft(x)| scaled to add up to 1: `[C, T]` -> `[C, F]`."""
    size: Tensor = torch.fft.rfft(x).abs()
    return size / size.sum().clamp_min(1e-12)


def spectral_distance(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of |p - q| of two spectra that each add up to 1: 0 equal, 1 apart."""
    return (p - q).abs().sum() / 2


def only_bins(x: Tensor, keep: Tensor) -> Tensor:
    """`x` `[..., C, T]` with all bins removed but those where `keep` `[C, F]` holds."""
    kept: Tensor = torch.fft.irfft(torch.fft.rfft(x) * keep, n=x.shape[-1])
    return kept


def with_spectrum(amplitude: Tensor, length: int, draw: torch.Generator) -> Tensor:
    """A series of these amplitudes `[C, F]` and random phases: `[C, T]`."""
    phase = 2 * torch.pi * torch.rand(amplitude.shape, generator=draw).to(amplitude)
    made: Tensor = torch.fft.irfft(torch.polar(amplitude, phase), n=length)
    return made


def of_length(x: Tensor, size: float) -> Tensor:
    """`x` scaled to L2 length `size`."""
    length: Tensor = x.norm().clamp_min(1e-12)
    return x * (size / length)


def top_share(shares: Tensor, part: float = 0.1) -> float:
    """What the largest `part` of the bins (at least one) hold of a spectrum that adds up to 1."""
    count = max(1, round(part * shares.numel()))
    return float(shares.flatten().topk(count).values.sum())
