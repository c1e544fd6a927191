"""Layers whose weight and bias are stored in fixed point, in as many bits a value as their word has.

A format is a word length and a fraction length: integers of `word` signed bits over 2^fraction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cupel.ops.quantize import fixed_point, pack_codes, unpack_codes


def grid(x: Tensor, word: int, fraction: int) -> Tensor:
    """`x` rounded to the nearest value of the format, without minus zeros."""
    return fixed_point(x.detach().double(), word, fraction).to(x.dtype) + 0.0


class Fixed(nn.Module):
    """A layer whose weight and bias are stored in `word` bits a value; stands before the plain kind among the bases."""

    word: int
    fraction: int

    def packed_state(self) -> dict[str, Tensor]:
        held = {k: v.detach() for k, v in {**self._parameters, **self._buffers}.items() if v is not None}
        packed = {"format": torch.tensor([self.word, self.fraction], dtype=torch.uint8)}
        for name in [n for n in ("weight", "bias") if n in held]:
            codes = (held[name].double() * 2.0**self.fraction).round() + 2.0 ** (self.word - 1)
            within = bool(((codes >= 0) & (codes < 2.0**self.word)).all())
            # While it trains, or when another technique has changed it since, it is off the grid: stored as it is.
            if within and _same(self._value(codes, held[name]), held[name]):
                packed[f"{name}_codes"] = pack_codes(codes.long(), self.word)
                del held[name]
        return held | packed

    @torch.no_grad()
    def load_packed_state(self, state: Mapping[str, Tensor]) -> None:
        left = dict(state)
        self.word, self.fraction = (int(n) for n in left.pop("format"))
        for name, value in left.items():
            own = getattr(self, name.removesuffix("_codes"))
            if name.endswith("_codes"):
                codes = unpack_codes(value, self.word, own.numel()).view(own.shape).to(own.device)
                value = self._value(codes.double(), own)
            own.copy_(value)

    def _value(self, codes: Tensor, like: Tensor) -> Tensor:
        return ((codes - 2.0 ** (self.word - 1)) / 2.0**self.fraction).to(like.dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


class FixedLinear(Fixed, nn.Linear): ...


class FixedConv1d(Fixed, nn.Conv1d): ...


class FixedConv2d(Fixed, nn.Conv2d): ...


class FixedConv3d(Fixed, nn.Conv3d): ...


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FixedLinear,
    nn.Conv1d: FixedConv1d,
    nn.Conv2d: FixedConv2d,
    nn.Conv3d: FixedConv3d,
}
PLAIN = {fixed: plain for plain, fixed in KINDS.items()}
