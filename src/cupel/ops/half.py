"""Arithmetic of 16-bit floating point as SIMD cores do it: rounding, and the order in which products are added up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """A binary floating-point format with subnormals.

    Args:
        name: such as `fp16`.
        significand: bits of a normal number, the hidden one included.
        lowest: exponent of the smallest normal number.
        largest: finite value.
        bytes: of one value.
        dtype: torch's type of the same values.
    """

    name: str
    significand: int
    lowest: int
    largest: float
    bytes: int
    dtype: torch.dtype


FP16 = Form("fp16", 11, -14, 65504.0, 2, torch.float16)
BF16 = Form("bf16", 8, -126, float(torch.finfo(torch.bfloat16).max), 2, torch.bfloat16)
FP32 = Form("fp32", 24, -126, float(torch.finfo(torch.float32).max), 4, torch.float32)
FORMS = {form.name: form for form in (FP16, BF16, FP32)}
_EXPONENT = 0x7FF << 52  # bits of the exponent of a double


def on_grid(x: Tensor, form: Form) -> Tensor:
    """Float32 values rounded to the nearest of `form`, ties to even, as float32; beyond the largest: infinite.

    >>> on_grid(torch.tensor([1.0004, 2.0**-25, 1e5]), FP16).tolist()
    [1.0, 0.0, inf]
    """
    return x.float().to(form.dtype).float()


def rounded(x: Tensor, form: Form) -> Tensor:
    """Doubles rounded once to the nearest of `form`, ties to even, as doubles.

    Casting a double to half goes through float32, which rounds twice; here a constant is added that leaves no room
    for the bits below the last one of `form`.

    >>> between = 1 + 2.0**-11 + 2.0**-40  # just above the middle of two halves; in float32 it lies on the middle
    >>> rounded(torch.tensor([between], dtype=torch.float64), FP16).item() > 1, torch.tensor(between).half().item()
    (True, 1.0)
    """
    power = (x.view(torch.int64) & _EXPONENT).view(torch.float64)  # 2^e with 2^e <= |x| < 2^(e + 1)
    room = power.clamp_(2.0**form.lowest, 2.0 * form.largest).mul_(1.5 * 2.0 ** (53 - form.significand))
    found = (x + room).sub_(room)
    low, high = (found.min(), found.max()) if found.numel() else (x.new_zeros(()), x.new_zeros(()))
    if not (float(low) >= -form.largest and float(high) <= form.largest):
        found = torch.where(found.abs() > form.largest, torch.copysign(torch.full_like(x, torch.inf), x), found)
    # The detour over the constant would turn -0 and every negative value that rounds to zero into +0.
    return torch.where(found == 0, torch.copysign(found, x), found)


def simd_product(a: Tensor, b: Tensor, form: Form, wide: bool) -> Tensor:
    """a b with two products an instruction, in the order of a SIMD dot product; values of `form`, as float32.

    Narrow (`wide` false): two sums in `form`, of the products at even and at odd places; every instruction adds the
    exact product to each and rounds once (a fused multiply-add). In the end they are added, and the last product of
    an odd depth joins. Wide: one sum in float32; every instruction adds two exact products and rounds once; the end
    is rounded to `form`.

    Shapes: a `[..., M, K]`, b `[..., K, N]` -> `[..., M, N]`; the values of a and b must be those of `form`.

    >>> simd_product(torch.ones(1, 3), torch.tensor([[2048.0], [0.0], [1.0]]), FP16, wide=False).item()
    2048.0
    """
    a, b = a.double(), b.double()
    depth = a.shape[-1]
    pairs = depth // 2
    odd_product = a[..., -1:] * b[..., -1:, :] if depth % 2 else None
    if wide:
        total = torch.zeros(*a.shape[:-1], b.shape[-1])
        for k in range(0, 2 * pairs, 2):
            total = (total.double() + a[..., k : k + 1] * b[..., k : k + 1, :]
                     + a[..., k + 1 : k + 2] * b[..., k + 1 : k + 2, :]).float()  # fmt: skip
        if odd_product is not None:
            total = (total.double() + odd_product).float()
        return on_grid(total, form)
    sums = a.new_zeros(2, *a.shape[:-1], b.shape[-1])
    left = torch.stack((a[..., 0 : 2 * pairs : 2], a[..., 1 : 2 * pairs : 2]))  # [2, ..., M, pairs]
    right = torch.stack((b[..., 0 : 2 * pairs : 2, :], b[..., 1 : 2 * pairs : 2, :]))
    for k in range(pairs):
        sums = rounded(torch.addcmul(sums, left[..., k : k + 1], right[..., k : k + 1, :]), form)
    result = rounded(sums[0] + sums[1], form)
    if odd_product is not None:
        result = rounded(rounded(odd_product, form) + result, form)
    return result.float()


def quick_product(a: Tensor, b: Tensor, form: Form) -> Tensor:
    """a b with sums in float32 in torch's own order, rounded to `form` at the end."""
    return on_grid(a.float() @ b.float(), form)
