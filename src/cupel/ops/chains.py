"""The end of a network that is a plain chain of layers, and by how much each link can stretch a distance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SLOPES: dict[type[nn.Module], float] = {  # largest slope of functions that act on every value alone
    nn.ReLU: 1.0, nn.ReLU6: 1.0, nn.LeakyReLU: 1.0, nn.Tanh: 1.0, nn.Sigmoid: 0.25, nn.GELU: 1.13, nn.SiLU: 1.1,
    nn.ELU: 1.0, nn.Softplus: 1.0, nn.Hardtanh: 1.0, nn.Identity: 1.0, nn.Flatten: 1.0, nn.Unflatten: 1.0,
    nn.Dropout: 1.0,
}  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
MARGIN = 1.01  # power iteration ends a little below the largest singular value


@dataclass(frozen=True)
class Link:
    """One call of a layer: what entered `[1, ...]`, what left, and which blocks ended with it."""

    name: str
    layer: nn.Module
    entered: Tensor
    left: Tensor


def calls(model: nn.Module, x: Tensor) -> tuple[list[Link], Tensor]:
    """Every call of a layer without parts in one forward of `x` `[1, ...]`, and the network's output."""
    found: list[Link] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def called(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if isinstance(out, Tensor) and args and isinstance(args[0], Tensor):
                found.append(Link(name, layer, args[0], out))

        return called

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if not any(m.children())]
    try:
        with torch.no_grad():
            out = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found, out


def tail(model: nn.Module, x: Tensor) -> list[Link]:
    """The last calls of a forward that hand their output on to each other, first to last; the last makes the output.

    >>> [link.name for link in tail(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.zeros(1, 2))]
    ['0', '1']
    """
    found, wanted = calls(model, x)
    chain: list[Link] = []
    for link in reversed(found):
        if link.left is not wanted or stretch_of(link) is None:
            break
        chain.append(link)
        wanted = link.entered
    return chain[::-1]


def stretch_of(link: Link, steps: int = 0) -> float | None:
    """The Lipschitz constant of one layer in the l2 norm; `None` where it is not known.

    With `steps` of zero linear maps count as 1: enough to know whether a constant is known at all.
    """
    layer = link.layer
    if type(layer) in _SLOPES:
        return _SLOPES[type(layer)]
    if isinstance(layer, nn.MaxPool2d) and layer.kernel_size == layer.stride and layer.dilation == 1:
        return 1.0  # every value is looked at once
    if isinstance(layer, _NORMS) and layer.running_var is not None and not layer.training:
        gain = (layer.running_var + layer.eps).rsqrt() * (1.0 if layer.weight is None else layer.weight.detach())
        return float(gain.abs().max())
    if isinstance(layer, _LINEAR):
        return largest_singular_value(layer, link.entered, steps) if steps else 1.0
    return None


def largest_singular_value(layer: nn.Module, x: Tensor, steps: int) -> float:
    """Of the linear part of `layer` at inputs of the shape of `x` `[1, ...]`: exact for `nn.Linear`, else iterated."""
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    zero = torch.zeros_like(x)
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=draw).to(x)
    size = 0.0
    with torch.enable_grad():
        for _ in range(steps):
            v = v / v.norm().clamp_min(1e-30)
            leaf = v.detach().requires_grad_(True)
            out = layer(leaf) - layer(zero)
            size = float(out.detach().norm())
            (v,) = torch.autograd.grad(out, leaf, out.detach())
    return size * MARGIN


def stretches(chain: list[Link], steps: int = 60) -> list[float]:
    """The product of the constants of all links from each on: the l2 Lipschitz constant of what is left of the chain.

    One entry more than links; the last, after all of them, is 1.
    """
    found = [1.0]
    for link in reversed(chain):
        found.append(found[-1] * (stretch_of(link, steps) or math.inf))
    return found[::-1]
