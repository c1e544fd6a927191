"""What each layer of a sequential network costs: time, bytes of output, bytes of weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer for one mini-batch on one worker.

    Args:
        seconds: forward and backward together.
        output_bytes: of its activations, which travel if the network is cut behind it.
        weight_bytes: of its parameters.
    """

    seconds: float
    output_bytes: float
    weight_bytes: float


def profile_layers(layers: Sequence[nn.Module], inputs: Tensor, repeats: int = 5) -> tuple[LayerCost, ...]:
    """Measure every layer on `inputs` `[B, ...]`: the median over `repeats` of forward plus backward.

    Parameters and modes stay as they are; running statistics of batch norm move with each forward in training mode.
    """
    found, x = [], inputs.detach()
    for layer in layers:
        times = []
        for _ in range(repeats):
            leaf = x.detach().requires_grad_(x.is_floating_point())
            wanted = [t for t in (leaf, *layer.parameters()) if t.requires_grad]
            began = time.perf_counter()
            with torch.enable_grad():
                out: Tensor = layer(leaf)
                if wanted and out.requires_grad:
                    torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)
            times.append(time.perf_counter() - began)
        x = out.detach()
        weights = sum(p.numel() * p.element_size() for p in layer.parameters())
        found.append(LayerCost(median(times), x.numel() * x.element_size(), weights))
    return tuple(found)
