"""Random bit flips in stored numbers: floats, integer codes, torch's quantised tensors, fixed point.

Bit 0 is the lowest of its word. In a float32 word bits 0 to 22 are the mantissa, 23 to 30 the exponent
and 31 the sign. A position in a tensor is `word * width + bit`, with words in the tensor's own order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def word_bits(x: Tensor) -> int:
    """How many bits one stored word of `x` has.

    >>> word_bits(torch.zeros(2)), word_bits(torch.zeros(2, dtype=torch.int8))
    (32, 8)
    """
    return 8 * x.element_size()


def fault_positions(bits: int, rate: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of `bits` bits flip when each does so by itself with chance `rate`, and a mark for each.

    The gaps between flips are geometric, so the cost grows with the flips and not with the bits. The marks
    are uniform in [0, 1): the flips with a mark below s are the flips at the lower rate s * `rate`, so
    that the faults of a lower rate are a part of the faults of a higher one.

    Returns:
        Positions `[F]` int64, rising, and marks `[F]` float64.
    """
    if rate <= 0 or bits == 0:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64)
    chunk = int(bits * rate + 10 * math.sqrt(bits * rate)) + 16
    found, last = [], -1
    while last < bits:
        away = 1 - torch.rand(chunk, generator=draw, dtype=torch.float64)  # in (0, 1]
        skips = (away.log() / math.log1p(-rate)).floor() if rate < 1 else torch.zeros_like(away)
        at = last + (skips.clamp_max(float(bits)).long() + 1).cumsum(0)
        found.append(at)
        last = int(at[-1])
    places = torch.cat(found)
    places = places[places < bits]
    return places, torch.rand(len(places), generator=draw, dtype=torch.float64)


def flipped(x: Tensor, positions: Tensor) -> Tensor:
    """A copy of `x` with the bits at `positions` `[F]` (distinct) turned over; twice gives `x` back.

    Floats and integers are flipped as they lie in memory; of torch's quantised tensors the integers.

    >>> flipped(torch.tensor([1.0]), torch.tensor([31])).tolist(), flipped(torch.tensor([0.5]), torch.tensor([30]))
    ([-1.0], tensor([1.7014e+38]))
    """
    if x.is_quantized:
        return _requantised(x, flipped(x.int_repr(), positions))
    width = word_bits(x)
    made = x.detach().contiguous().clone()
    words = made.view(-1).view(_WORDS[x.element_size()])  # shares memory with `made`
    at = positions.to(words.device)
    where, turn = (at // width).unique(return_inverse=True)
    # Distinct bits of one word sum to their union, and a narrower integer keeps the low bits of a wider one.
    masks = torch.zeros(len(where), dtype=torch.long, device=words.device)
    masks.index_add_(0, turn, torch.ones_like(at) << (at % width))
    words[where] ^= masks.to(words.dtype)
    return made


def _requantised(x: Tensor, ints: Tensor) -> Tensor:
    """A quantised tensor like `x` that holds other integers."""
    made: Tensor
    if x.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        made = torch._make_per_tensor_quantized_tensor(ints, x.q_scale(), x.q_zero_point())
    else:
        scales, zeros = x.q_per_channel_scales(), x.q_per_channel_zero_points()
        made = torch._make_per_channel_quantized_tensor(ints, scales, zeros, x.q_per_channel_axis())
    return made


def to_fixed(x: Tensor, fraction: int = 16) -> Tensor:
    """Q(31 - f).f codes: round(x * 2^f) in 32 signed bits, cut at the ends; int32.

    >>> to_fixed(torch.tensor([1.5, -0.25]), 2).tolist()
    [6, -1]
    """
    codes: Tensor = (x.double() * 2**fraction).round().clamp(-(2**31), 2**31 - 1).to(torch.int32)
    return codes


def from_fixed(codes: Tensor, fraction: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `to_fixed` stands for: codes / 2^f."""
    values: Tensor = (codes.double() / 2**fraction).to(dtype)
    return values


def part_of(bit: int, x: Tensor) -> str:
    """What a bit of a word of `x` stands for.

    >>> part_of(30, torch.zeros(1)), part_of(3, torch.zeros(1))
    ('exponent bit 7 of 0 to 7', 'the mantissa')
    """
    if not x.is_floating_point():
        return "the highest bit of a code" if bit == word_bits(x) - 1 else "a code"
    mantissa = round(-math.log2(torch.finfo(x.dtype).eps))
    if bit == word_bits(x) - 1:
        return "the sign"
    return "the mantissa" if bit < mantissa else f"exponent bit {bit - mantissa} of 0 to {word_bits(x) - mantissa - 2}"


def crossing(rates: Sequence[float], accuracies: Sequence[float], bar: float) -> float:
    """The first rate at which the accuracy reaches `bar` from above, linear in the logarithm of the rate.

    The lowest rate if the accuracy is there at once, the highest if it never is.

    >>> round(crossing((1e-4, 1e-2), (0.9, 0.1), 0.5), 6)
    0.001
    """
    if accuracies[0] <= bar:
        return rates[0]
    for i in range(1, len(rates)):
        if accuracies[i] <= bar:
            part = (accuracies[i - 1] - bar) / (accuracies[i - 1] - accuracies[i])
            return math.exp(math.log(rates[i - 1]) + part * math.log(rates[i] / rates[i - 1]))
    return rates[-1]
