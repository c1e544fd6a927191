"""Networks to try attacks on: linear ones, whose nearest adversarial input has a closed form, and a small CNN."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.workloads.vision.digits_cnn import DigitsCnn


def linear(inputs: int = 12, classes: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear network and inputs that it labels rightly."""
    draw = seeded(1, "linear")
    model = nn.Linear(inputs, classes).requires_grad_(False)
    model.weight.data = torch.randn(classes, inputs, generator=draw)
    model.bias.data = torch.randn(classes, generator=draw)
    x = torch.randn(60, inputs, generator=draw)
    return model, x, model(x).argmax(1)


def nearest(model: nn.Module, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Distance of every input to the nearest class boundary: gap / dual norm of the weights' difference."""
    logits, w = model(x), model.weight
    gaps = logits.gather(1, y[:, None]) - logits  # [N, K]
    slopes = (w[y][:, None] - w[None]).norm(p=1 if norm == "linf" else 2, dim=2)  # [N, K]
    return (gaps / slopes).masked_fill(torch.nn.functional.one_hot(y, len(w)).bool(), math.inf).amin(1)


@lru_cache(maxsize=1)
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    subject = build(DigitsCnn(width=6), Context())
    model = fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=4))
    test = subject.data.test
    return model.eval().requires_grad_(False), test.inputs[:100], test.targets[:100]
