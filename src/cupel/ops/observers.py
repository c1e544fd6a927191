"""An observer for torch's quantisation whose scales are powers of two, so that rescaling is a shift."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.ao.quantization.observer import UniformQuantizationObserverBase

FRACTIONS = range(-12, 25)  # bits behind the point that are tried


class PowerOfTwoObserver(UniformQuantizationObserverBase):
    """Scale 2^-f with the f of the least squared error over all it has seen; zero is a level.

    Values that are never negative use all levels from zero; others have it in the middle.
    """

    errors: Tensor
    lowest: Tensor

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = torch.finfo(torch.float32).eps,
    ) -> None:
        super().__init__(dtype, qscheme, reduce_range, quant_min, quant_max, eps=eps)
        self.register_buffer("errors", torch.zeros(2, len(FRACTIONS), dtype=torch.float64))  # without, with signs
        self.register_buffer("lowest", torch.tensor(0.0))

    def span(self, signed: bool) -> tuple[int, int, int]:
        """Zero point, and the least and largest code, counted from it."""
        low, high = int(self.quant_min), int(self.quant_max)
        if self.dtype == torch.qint8:
            return 0, max(low, -high), high
        zero = (low + high + 1) // 2 if signed else low
        return zero, low - zero, high - zero

    def forward(self, x: Tensor) -> Tensor:
        seen = x.detach().double().flatten()
        self.lowest.copy_(torch.minimum(self.lowest, seen.min().to(self.lowest) if len(seen) else self.lowest))
        for signed in (False, True):
            _, low, high = self.span(signed)
            for k, f in enumerate(FRACTIONS):
                held = (seen * 2.0**f).round().clamp(low, high) / 2.0**f
                self.errors[int(signed), k] += (held - seen).square().sum()
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        signed = bool(self.lowest < 0)
        best = FRACTIONS[int(self.errors[int(signed)].argmin())]
        zero, _, _ = self.span(signed)
        return torch.tensor([2.0**-best], dtype=torch.float32), torch.tensor([zero], dtype=torch.int64)
