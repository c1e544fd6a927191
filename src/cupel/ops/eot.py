"""Expectation over transformations: gradients through randomness, averaged over draws of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cupel.ops.threats import Model

Transform = Callable[[Tensor], Tensor]  # differentiable; draws for itself


def expected(model: Model, draws: int, transform: Transform | None = None) -> Model:
    """The mean log-probability of `draws` forwards of a random network, or of `transform`ed inputs.

    Its gradient is the mean of the gradients of log p over the draws, which no single draw can hide. Rows of one
    forward must draw independently, as noise layers and dropout do.

    Returns:
        `[N, ...]` -> scores `[N, K]`, random like the network; costs `draws` forwards a call.

    Source: Athalye et al., ICML 2018, arXiv 1707.07397, section 2.1.
    """

    def averaged(x: Tensor) -> Tensor:
        many = x.repeat_interleave(draws, 0)
        logits = model(many if transform is None else transform(many))
        found: Tensor = logits.log_softmax(1).view(len(x), draws, -1).mean(1)
        return found

    return averaged


@torch.no_grad()
def is_random(model: Model, x: Tensor, tries: int = 2) -> bool:
    """Whether the network answers the same inputs differently each time, beyond rounding."""
    first = model(x)
    return any(not torch.allclose(model(x), first, rtol=1e-4, atol=1e-5) for _ in range(tries))
