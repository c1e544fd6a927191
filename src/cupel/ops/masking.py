"""Signs that a network hides its gradients instead of resisting: robust numbers of such a network are too good.

Source: Athalye, Carlini and Wagner, ICML 2018, arXiv 1802.00420, section 3.1; rescaled logits: Carlini and
Wagner, IEEE S&P 2017, arXiv 1608.04644, section VI (defensive distillation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.ops.attacks import Loss, cross_entropy
from cupel.ops.threats import Model

TOLERATED = 0.05  # share of inputs by which attacks on an honest network may differ, or an unbounded one may fail
ZERO = 1e-10  # a gradient smaller than this everywhere moves nothing


@dataclass(frozen=True)
class Sign:
    """One sign of masking: whether it shows, and what was seen."""

    shows: bool
    words: str


def beats(weaker: Tensor, stronger: Tensor) -> bool:
    """Whether an attack that should be the weaker fools clearly more inputs than the stronger: `[N]` bool each.

    Clearly: by more than `TOLERATED` of the inputs, and beyond chance in McNemar's paired test at 5%.

    >>> beats(torch.ones(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool))
    True
    """
    more, fewer = int((weaker & ~stronger).sum()), int((stronger & ~weaker).sum())
    return more - fewer > max(TOLERATED * len(weaker), 1.96 * math.sqrt(more + fewer))


def zero_gradients(model: Model, x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> Tensor:
    """`[N]` bool: inputs at which every entry of the loss's input gradient is below `ZERO`."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(model(leaf), y).sum(), leaf)
    return grad.flatten(1).abs().amax(dim=1) < ZERO


def has_gradients(model: Model, x: Tensor) -> bool:
    """Whether the model's outputs can be differentiated by its inputs at all (int8 kernels cannot)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        try:
            (grad,) = torch.autograd.grad(model(leaf).sum(), leaf, allow_unused=True)
        except (RuntimeError, NotImplementedError):  # nothing to differentiate, or a kernel without a backward
            return False
    return grad is not None


def signs_of(
    zero: Tensor, one_step: Tensor, many_steps: Tensor, black_box: Tensor, unbounded: Tensor, rescaled: Tensor
) -> list[Sign]:
    """Weigh the five signs from what attacks did to the same `[N]` inputs (True: zero gradient, or fooled)."""

    def robust(fooled: Tensor) -> str:
        return f"{1 - float(fooled.double().mean()):.2f}"

    share, left = float(zero.double().mean()), 1 - float(unbounded.double().mean())
    many = robust(many_steps)
    return [
        Sign(share > 2 * TOLERATED, f"the loss has no gradient at {share:.0%} of the inputs"),
        Sign(beats(one_step, many_steps), f"one step ({robust(one_step)} robust) beats many steps ({many})"),
        Sign(beats(black_box, many_steps), f"scores alone ({robust(black_box)} robust) beat gradients ({many})"),
        Sign(left > TOLERATED, f"steps without a bound leave {left:.0%} of the inputs right"),
        Sign(beats(rescaled, many_steps), f"steps on rescaled logits ({robust(rescaled)} robust) beat others ({many})"),
    ]
