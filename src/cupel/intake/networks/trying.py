"""Running a network that a file describes, to see whether it does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cupel.core.errors import CupelError

HOW = 'Export it with a free batch: torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})'
MOST_ROWS = 4096  # of a batch that is tried
# How calls with the wrong arguments fail.
FAILURES = (RuntimeError, IndexError, ValueError, TypeError, AttributeError, KeyError, AssertionError, ArithmeticError,
            MemoryError)  # fmt: skip


def sample_input(shape: Sequence[int], dtype: torch.dtype, rows: int) -> Tensor:
    """Inputs to try a program on, `[rows, ...]`: values in [0, 1), or zeros and ones where they are whole numbers."""
    draw = torch.Generator().manual_seed(0)
    whole = (rows, *shape[1:])
    if math.prod(whole) > 1 << 26 or rows > MOST_ROWS:
        raise CupelError(
            f"inputs of a program must be few enough to try; it declares {list(shape)}. Export it for a smaller batch."
        )
    if dtype.is_floating_point or dtype.is_complex:
        return torch.rand(whole, generator=draw, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2, whole, generator=draw).to(dtype)


def tried(model: nn.Module, x: Tensor) -> Tensor:
    """What `model` makes of a copy of `x`, one row for each.

    Raises:
        CupelError: it fails, or makes something else; a file may describe any graph.
    """
    try:
        out = once(model, x)
    except FAILURES as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise CupelError(f"a program must run on inputs of its own shape; it does not ({why}). {HOW}") from None
    if not isinstance(out, Tensor) or out.ndim == 0 or out.shape[0] != len(x):
        made = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise CupelError(f"a program must give each input its own row; it gives {made} for {len(x)}. {HOW}")
    return out


def once(model: nn.Module, x: Tensor) -> Tensor:
    """What `model` makes of a copy of `x`."""
    return model(x.clone())  # type: ignore[no-any-return]


def agrees(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of other kernels for other batch sizes; where one is no number, so is the other.

    >>> nan = torch.tensor([float("nan"), 1.0])
    >>> agrees(nan, nan), agrees(nan, nan + 1)
    (True, False)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not b.is_floating_point():
        return torch.equal(a, b)
    scale = 1 + float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()) if b.numel() else 1.0
    return bool(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * scale, equal_nan=True))
