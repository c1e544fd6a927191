"""Multipliers built of small digit products: integers of 2 to 16 bits, and half precision on the same array.

Everything here is integer arithmetic; floating point enters and leaves as bit patterns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDTHS = tuple(range(2, 17, 2))


def digits(x: Tensor, bits: int, digit: int = 2, signed: bool = True) -> Tensor:
    """Two's complement `x` cut into digits of `digit` bits, lowest first; only a signed top digit can be negative.

    Shapes: `[...]` integers -> `[ceil(bits / digit), ...]`; x = sum over i of digits[i] * 2^(digit * i).

    >>> digits(torch.tensor([-3, 5]), 4).tolist()  # -3 = 1 + 4 * -1, 5 = 1 + 4 * 1
    [[1, 1], [-1, 1]]
    """
    count = -(-bits // digit)
    low = [(x >> (digit * i)) & (2**digit - 1) for i in range(count - 1)]
    top = x >> (digit * (count - 1))
    return torch.stack([*low, top if signed else top & (2**digit - 1)])


def product(
    a: Tensor, b: Tensor, bits: tuple[int, int], digit: int = 2, signed: tuple[bool, bool] = (True, True)
) -> Tensor:
    """a * b, entry by entry, as the sum of all digit products, each shifted to its place; int64."""
    left = digits(a.long(), bits[0], digit, signed[0])
    right = digits(b.long(), bits[1], digit, signed[1])
    found = torch.zeros(torch.broadcast_shapes(a.shape, b.shape), dtype=torch.int64)
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            found += (x * y) << (digit * (i + j))
    return found


def wrapped(x: Tensor, bits: int = 32) -> Tensor:
    """What a register of `bits` keeps of `x`: two's complement, carries beyond it are lost."""
    half = 1 << (bits - 1)
    return ((x + half) & ((1 << bits) - 1)) - half


def dot(
    a: Tensor, b: Tensor, bits: tuple[int, int], digit: int = 2, signed: tuple[bool, bool] = (True, True)
) -> Tensor:
    """a b with sums of 32 bits: digit products of equal weight are added over the whole depth, then shifted once.

    Shapes: a `[..., M, K]`, b `[..., K, N]` integers -> `[..., M, N]` int64 within 32 bits.

    >>> dot(torch.tensor([[3, -4]]), torch.tensor([[5], [7]]), (4, 4)).tolist()
    [[-13]]
    """
    left = digits(a.int(), bits[0], digit, signed[0])
    right = digits(b.int(), bits[1], digit, signed[1])
    equal: dict[int, Tensor] = {}
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            partial = x @ y
            equal[i + j] = equal[i + j] + partial if i + j in equal else partial
    total = torch.zeros_like(next(iter(equal.values())), dtype=torch.int64)
    for place, partial in equal.items():
        total += partial.long() << (digit * place)
    return wrapped(total)


def multiplier_of(scale: float) -> tuple[int, int]:
    """Integers (mult, shift) with mult / 2^shift next to `scale` and mult in [2^30, 2^31).

    Raises:
        ValueError: a scale that 31 bits and a shift of 1 to 62 cannot express.

    >>> multiplier_of(0.375)
    (1610612736, 32)
    """
    if not 0 < scale < 2**29:
        raise ValueError(f"scale must be in (0, 2^29); got {scale}. Look at the ranges of the layers around it.")
    shift = 30 - math.floor(math.log2(scale))
    mult = round(math.ldexp(scale, shift))
    if mult == 2**31:
        mult, shift = mult // 2, shift - 1
    if shift > 62:
        raise ValueError(f"scale must be at least 2^-32; got {scale}. Look at the ranges of the layers around it.")
    return mult, shift


def requantized(total: Tensor, mult: Tensor | int, shift: Tensor | int, zero: int, low: int, high: int) -> Tensor:
    """clip(((total * mult + 2^(shift-1)) >> shift) + zero, low, high): rounds halves up; `shift` is at least 1."""
    half = torch.ones_like(total) << (torch.as_tensor(shift) - 1)
    return (((total * mult + half) >> shift) + zero).clamp(low, high)


def fields(pattern: Tensor, flush: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sign, exponent and 11-bit significand of half-precision bit patterns: value = (-1)^s * m * 2^e, int64.

    `flush` reads subnormal numbers as zeros. Infinities and NaN must have been set aside.
    """
    p = pattern.long() & 0xFFFF
    stored, fraction = (p >> 10) & 31, p & 1023
    normal = stored > 0
    significand = torch.where(normal, fraction + 1024, torch.zeros_like(p) if flush else fraction)
    return p >> 15, torch.where(normal, stored, torch.ones_like(stored)) - 25, significand


def packed(sign: Tensor, exponent: Tensor, m: Tensor, flush: bool = False) -> Tensor:
    """The pattern of (-1)^sign * m * 2^exponent, rounded to nearest, ties to even; m in [0, 2^62)."""
    length = torch.frexp(m.double()).exponent.long()  # bits of m; one too many where the double rounds up
    length -= ((m >> (length - 1).clamp(0, 62)) == 0).long() & (m > 0).long()
    # The last bit kept has weight 2^-24 at least, and 11 bits are kept at most.
    drop = torch.maximum(length - 11, -24 - exponent)
    up, down = (-drop).clamp(0, 62), drop.clamp(0, 62)
    kept = (m << up) >> down
    rest = m - (kept << down)
    half = torch.where(down > 0, torch.ones_like(m) << (down - 1).clamp_min(0), torch.ones_like(m))
    kept += ((rest > half) | ((rest == half) & (kept & 1 == 1))).long() * (down > 0).long()
    kept = torch.where(drop > 62, torch.zeros_like(kept), kept)
    place = exponent + drop  # weight of the last kept bit
    # A carry out of the significand moves into the exponent by itself: patterns of neighbours are neighbours.
    pattern = torch.where(kept < 1024, kept, kept + ((place + 24) << 10))
    if flush:
        pattern = torch.where(pattern < 1024, torch.zeros_like(pattern), pattern)
    pattern = torch.where((pattern >= 0x7C00) | (place + 24 > 30), torch.full_like(pattern, 0x7C00), pattern)
    return (sign << 15) | torch.where(m == 0, torch.zeros_like(pattern), pattern)


def fp16_multiply_add(a: Tensor, b: Tensor, c: Tensor, digit: int = 2, flush: bool = False) -> Tensor:
    """a b + c of half-precision bit patterns with one rounding; the significands meet in the integer array.

    Shapes: three integer tensors that broadcast -> int64 patterns in [0, 65536). NaN is 0x7E00.
    """
    a, b, c = torch.broadcast_tensors(a.long() & 0xFFFF, b.long() & 0xFFFF, c.long() & 0xFFFF)
    (sa, ea, ma), (sb, eb, mb), (sc, ec, mc) = (fields(x, flush) for x in (a, b, c))
    mp, ep, sp = product(ma, mb, (12, 12), digit, (False, False)), ea + eb, sa ^ sb
    # Both summands over the smaller exponent: the product lies 34 places above c at most. More than 38 places below c
    # it is moved up to there, which is still far less than half of c's last place: rounding drops it.
    apart = ep - ec
    big_p, big_c = mp << apart.clamp(0, 38), mc << (-apart).clamp(0, 38)
    exponent = torch.where(-apart > 38, ec - 38, torch.minimum(ep, ec))
    total = torch.where(sp == 1, -big_p, big_p) + torch.where(sc == 1, -big_c, big_c)
    sign = torch.where(total == 0, sp & sc, (total < 0).long())  # x + -x is +0
    return _special(a, b, c, packed(sign, exponent, total.abs(), flush), flush)


def _special(a: Tensor, b: Tensor, c: Tensor, finite: Tensor, flush: bool) -> Tensor:
    """Infinities and NaN among the operands of a b + c."""
    size_a, size_b, size_c = a & 0x7FFF, b & 0x7FFF, c & 0x7FFF
    smallest = 1024 if flush else 1  # pattern of the smallest value that is not read as zero
    endless = (size_a == 0x7C00) | (size_b == 0x7C00)
    sign = ((a ^ b) >> 15) & 1
    no_number = (size_a > 0x7C00) | (size_b > 0x7C00) | (size_c > 0x7C00)
    no_number |= endless & ((size_a < smallest) | (size_b < smallest))
    no_number |= endless & (size_c == 0x7C00) & ((c >> 15) != sign)
    found = torch.where(size_c == 0x7C00, c, finite)
    found = torch.where(endless, (sign << 15) | 0x7C00, found)
    return torch.where(no_number, torch.full_like(found, 0x7E00), found)


def fp16_multiply(a: Tensor, b: Tensor, digit: int = 2, flush: bool = False) -> Tensor:
    """a b of half-precision bit patterns, rounded to nearest, ties to even: `[...]` int64 patterns."""
    a, b = torch.broadcast_tensors(a.long(), b.long())
    # A zero of the product's own sign changes nothing, not even the sign of a zero.
    return fp16_multiply_add(a, b, (a ^ b) & 0x8000, digit, flush)


def fp16_dot(a: Tensor, b: Tensor, wide: bool = True, digit: int = 2, flush: bool = False) -> Tensor:
    """a b of half-precision bit patterns, one product after the other; the sums as float32.

    Wide: the exact product of 22 bits joins a sum of 24 bits, rounded once. Narrow: fused multiply-adds of half
    precision. Shapes: a `[M, K]`, b `[K, N]` -> `[M, N]`.
    """
    total = torch.zeros(len(a), b.shape[1], dtype=torch.float32 if wide else torch.int64)
    for k in range(a.shape[1]):
        x, y = a[:, k : k + 1], b[k : k + 1]
        if wide:
            # The double holds the product exactly; its sum with a float32 never lies next to a tie it is not on.
            total = (total.double() + _exact(x, y, digit, flush)).float()
        else:
            total = fp16_multiply_add(x, y, total, digit, flush)
    return total if wide else values_of(total)


def _exact(a: Tensor, b: Tensor, digit: int, flush: bool) -> Tensor:
    """Products of finite half-precision patterns as doubles; the significands meet in the integer array."""
    (sa, ea, ma), (sb, eb, mb) = fields(a, flush), fields(b, flush)
    size = torch.ldexp(product(ma, mb, (12, 12), digit, (False, False)).double(), (ea + eb).double())
    endless = ((a & 0x7FFF) >= 0x7C00) | ((b & 0x7FFF) >= 0x7C00)
    return torch.where(endless, values_of(a).double() * values_of(b).double(), torch.where(sa == sb, size, -size))


def patterns_of(x: Tensor) -> Tensor:
    """The bit patterns of `x` rounded to half precision, int64 in [0, 65536)."""
    return x.half().view(torch.int16).long() & 0xFFFF


def values_of(pattern: Tensor) -> Tensor:
    """The float32 values of half-precision bit patterns.

    >>> values_of(patterns_of(torch.tensor([1.0, -0.1]))).tolist()
    [1.0, -0.0999755859375]
    """
    p = pattern.long() & 0xFFFF
    return torch.where(p >= 0x8000, p - 0x10000, p).to(torch.int16).view(torch.float16).float()
