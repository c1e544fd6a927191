"""Uniform quantisation with straight-through gradients, the range it needs, and codes packed into bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _RoundThrough(torch.autograd.Function):
    """Rounds half to even; the gradient passes as if it had not (Bengio, Leonard, Courville, arXiv 1308.3432)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].clone()


def round_through(x: Tensor) -> Tensor:
    """The nearest integers of `x`, exactly, with the gradient of the identity.

    >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
    >>> y = round_through(x); y.sum().backward(); (y.tolist(), x.grad.tolist())
    ([0.0, 2.0], [1.0, 1.0])
    """
    rounded: Tensor = _RoundThrough.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def value_range(x: Tensor, cover: float = 1.0) -> tuple[Tensor, Tensor]:
    """The interval that holds the middle share `cover` of the values of `x`, as two scalars.

    `cover` = 1 is the minimum and the maximum; less cuts the same share of values off at both ends.
    """
    flat = x.detach().flatten()
    if cover >= 1:
        return flat.min(), flat.max()
    ranked = flat.sort().values
    cut = round((len(ranked) - 1) * (1 - cover) / 2)
    return ranked[cut], ranked[-1 - cut]


def step_size(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Distance of neighbouring levels when [low, high] is cut into 2^bits levels; never zero."""
    step = (high - low) / float(2**bits - 1)
    return step.clamp_min(torch.finfo(low.dtype).tiny)


def affine_codes(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """clip(round((x - low) / s), 0, 2^bits - 1) with s = (high - low) / (2^bits - 1), in `x`'s dtype.

    The gradient is 1/s inside [low, high] and zero outside. `low` and `high` broadcast against `x`.
    """
    return round_through((x - low) / step_size(low, high, bits)).clamp(0, 2**bits - 1)


def affine_values(codes: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """What `affine_codes` stand for: codes * s + low."""
    return codes * step_size(low, high, bits) + low


def affine(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """`x` rounded to the nearest of 2^bits levels that span [low, high], straight-through inside it.

    >>> affine(torch.tensor([-1.0, 0.4, 2.0]), torch.tensor(0.0), torch.tensor(1.0), 1).tolist()
    [0.0, 0.0, 1.0]
    """
    return affine_values(affine_codes(x, low, high, bits), low, high, bits)


def symmetric_codes(x: Tensor, limit: Tensor, bits: int) -> Tensor:
    """clip(round(x / s), -q, q) with q = 2^(bits-1) - 1 and s = limit / q: zero is a level. Needs bits >= 2."""
    top = float(2 ** (bits - 1) - 1)
    scale = (limit / top).clamp_min(torch.finfo(limit.dtype).tiny)
    return round_through(x / scale).clamp(-top, top)


def symmetric(x: Tensor, limit: Tensor, bits: int) -> Tensor:
    """`x` rounded to signed levels of equal distance in [-limit, limit], straight-through inside it.

    `limit` broadcasts against `x`: a scalar for one range, `[out, 1, ...]` for one a channel.

    >>> symmetric(torch.tensor([-3.0, 0.2, 0.6]), torch.tensor(1.0), 2).tolist()
    [-1.0, 0.0, 1.0]
    """
    top = float(2 ** (bits - 1) - 1)
    return symmetric_codes(x, limit, bits) * (limit / top).clamp_min(torch.finfo(limit.dtype).tiny)


class _SignThrough(torch.autograd.Function):
    """+1 from zero upwards, -1 below; the gradient passes where |x| is at most 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype) * 2 - 1  # `where` between two tensors takes four times as long

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        passed: Tensor = grads[0] * (x.abs() <= 1)
        return passed


def sign_through(x: Tensor) -> Tensor:
    """The signs of `x` as +1 and -1 (zero counts as +1), with the gradient of the identity inside [-1, 1].

    Source: Hubara et al., Binarized Neural Networks, NeurIPS 2016, arXiv 1602.02830, equation 4.

    >>> x = torch.tensor([-2.0, 0.0, 0.5], requires_grad=True)
    >>> y = sign_through(x); y.sum().backward(); (y.tolist(), x.grad.tolist())
    ([-1.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    """
    signs: Tensor = _SignThrough.apply(x)  # type: ignore[no-untyped-call]
    return signs


def fixed_point(x: Tensor, word: int, fraction: int, draw: torch.Generator | None = None) -> Tensor:
    """`x` in signed fixed point of `word` bits, `fraction` of them behind the point; straight-through inside its range.

    Values are integers k / 2^fraction with -2^(word-1) <= k < 2^(word-1). Rounds half to even, or up with the
    probability of the remainder when `draw` is given.

    >>> fixed_point(torch.tensor([0.30, 5.0, -5.0]), word=4, fraction=2).tolist()
    [0.25, 1.75, -2.0]
    """
    scale, top = float(2.0**fraction), float(2.0 ** (word - 1))
    scaled = x * scale
    if draw is not None:
        noise = torch.rand(x.shape, generator=draw, dtype=x.dtype, device=draw.device).to(x.device)
        # The noise shifts the floor; the gradient is that of `scaled` itself.
        scaled = scaled + ((scaled + noise).floor() - scaled).detach()
    else:
        scaled = round_through(scaled)
    held: Tensor = scaled.clamp(-top, top - 1) / scale
    return held


def power_of_two_fraction(limit: float, bits: int) -> int:
    """Bits behind the point with which `bits` signed bits just hold `limit`: the range is a power of two.

    >>> power_of_two_fraction(0.9, 8), power_of_two_fraction(1.5, 8)
    (7, 6)
    """
    return bits - 1 - math.ceil(math.log2(limit)) if limit > 0 else bits - 1


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes in [0, 2^bits) of any shape, 1 <= bits <= 32, as bytes: `[ceil(N * bits / 8)]` uint8.

    Code after code, each with its lowest bit first; the last byte is filled up with zeros.

    Raises:
        ValueError: a code outside the range.

    >>> pack_codes(torch.tensor([1, 0, 3, 2]), 2).tolist()
    [177]
    """
    flat = codes.detach().cpu().flatten().numpy()
    if len(flat) and (flat.min() < 0 or flat.max() >= 2**bits):
        raise ValueError(
            f"codes must be in [0, {2**bits}); got {flat.min()} to {flat.max()}. Clip them or use more bits."
        )
    word = _word(bits)
    octets = flat.astype(word).view(np.uint8).reshape(len(flat), word.itemsize)  # lowest byte first
    split = np.unpackbits(octets, axis=1, count=bits, bitorder="little")  # [N, bits]
    return torch.from_numpy(np.packbits(split.reshape(-1), bitorder="little"))


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes that `pack_codes` put into `packed`, `[count]`: uint8, above 8 bits int32, above 16 int64.

    Raises:
        ValueError: too few bytes.
    """
    if len(packed) * 8 < count * bits:
        raise ValueError(
            f"{count} codes of {bits} bits must have {-(-count * bits // 8)} bytes; got {len(packed)}. "
            "Pass all the bytes that `pack_codes` returned."
        )
    word = _word(bits)
    split = np.unpackbits(packed.detach().cpu().numpy(), count=count * bits, bitorder="little")
    octets = np.zeros((count, word.itemsize), np.uint8)
    octets[:, : -(-bits // 8)] = np.packbits(split.reshape(count, bits), axis=1, bitorder="little")
    codes = octets.view(word)[:, 0]
    return torch.from_numpy(codes if bits <= 8 else codes.astype(np.int32 if bits <= 16 else np.int64))


def _word(bits: int) -> np.dtype[np.unsignedinteger]:
    """The narrowest unsigned word that holds `bits` bits, its lowest byte first."""
    return np.dtype("u1" if bits <= 8 else "<u2" if bits <= 16 else "<u4")
