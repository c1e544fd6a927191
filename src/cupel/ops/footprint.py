"""What a network needs on a microcontroller that keeps one byte a number: memory and operations of one inference."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.types import still

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Footprint:
    """Numbers that are stored, numbers of the largest pair of buffers, and operations, of one example."""

    weights: int
    buffers: int
    operations: int

    @property
    def memory_bytes(self) -> int:
        """Everything in one byte a number."""
        return self.weights + self.buffers


def footprint(model: nn.Module, sample: Tensor) -> Footprint:
    """Count as Zhang et al. (arXiv 1711.07128) do, on a real forward of `sample` `[1, ...]`.

    Batch norms are taken as folded into the layer before them, so that every output of a layer has one bias; a layer
    computes from one buffer into another, so the largest sum of a layer's inputs and outputs is kept, zeros around the
    inputs left out; a multiply-add counts two operations and a bias one. A module that calls itself `one_kernel` keeps
    all its inputs and the largest output of a layer inside it.
    """
    seen: list[tuple[int, int]] = []  # buffers, operations
    inside: list[int] = []  # outputs of layers within the kernels that are open
    depth = [0]
    padded: dict[int, int] = {}  # identity of what a padding module made -> numbers before

    def pad(m: nn.Module, args: Any, out: Tensor) -> None:
        padded[id(out)] = args[0].numel()

    def layer(m: nn.Module, args: Any, out: Tensor) -> None:
        weight: Tensor = m.weight  # type: ignore[assignment]
        # Of a linear layer without bias nothing is added; of a convolution under a norm the folded bias is.
        biased = m.bias is not None or m in folds
        macs = out.numel() * prod(weight.shape[1:])
        given = padded.pop(id(args[0]), args[0].numel())
        seen.append((0 if depth[0] else given + out.numel(), 2 * macs + (out.numel() if biased else 0)))
        if depth[0]:
            inside.append(out.numel())

    def enter(m: nn.Module, args: Any) -> None:
        depth[0] += 1

    def leave(m: nn.Module, args: Any, out: Tensor) -> None:
        depth[0] -= 1
        seen.append((args[0].numel() + max(inside, default=0), 0))
        inside.clear()

    folds = folded_layers(model)
    hooks: list[Any] = []
    for m in model.modules():
        if isinstance(m, LAYERS):
            hooks.append(m.register_forward_hook(layer))
        elif isinstance(m, _PADS):
            hooks.append(m.register_forward_hook(pad))
        elif getattr(m, "one_kernel", False):
            hooks += [m.register_forward_pre_hook(enter), m.register_forward_hook(leave)]
    try:
        with still(model), torch.no_grad():
            model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    norms = sum(p.numel() for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False))
    stored = sum(p.numel() for p in model.parameters()) - norms
    stored += sum(len(m.weight) for m in folds if m.bias is None)  # type: ignore[misc, arg-type]
    return Footprint(stored, max((b for b, _ in seen), default=0), sum(o for _, o in seen))


def folded_layers(model: nn.Module) -> set[nn.Module]:
    """Layers whose next neighbour in the order of definition is a batch norm of as many channels."""
    order = [m for m in model.modules() if not any(m.children())]
    return {
        a
        for a, b in pairwise(order)
        if isinstance(a, LAYERS) and isinstance(b, _NORMS) and len(a.weight) == b.num_features
    }
