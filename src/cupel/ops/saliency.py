"""Explanation maps that can be differentiated again, and how alike two maps are.

A map has one value for each pixel: inputs `[N, C, *space]` have maps `[N, *space]`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (model, inputs [N, C, *space], classes [N], again) -> logits [N, K], maps [N, *space]
Interpreter = Callable[[nn.Module, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def gradient_maps(model: nn.Module, x: Tensor, classes: Tensor, again: bool = False) -> tuple[Tensor, Tensor]:
    """Logits, and for every pixel the sum over channels of |d z_c / d x|, scaled to [0, 1].

    Args:
        classes: the class `[N]` that is explained; -1 stands for the largest logit.
        again: keep the graph, so that the maps can be differentiated by `x` themselves.

    Source: Simonyan, Vedaldi and Zisserman, ICLR workshop 2014, arXiv 1312.6034, section 3.
    """
    with torch.enable_grad():
        here = x if x.requires_grad else x.detach().requires_grad_(True)
        logits = model(here)
        (slope,) = torch.autograd.grad(_chosen(logits, classes).sum(), here, create_graph=again)
    return logits, scaled(slope.abs().sum(1))


def activation_maps(
    model: nn.Module, x: Tensor, classes: Tensor, again: bool = False, *, block: str
) -> tuple[Tensor, Tensor]:
    """Logits, and class activation maps: relu(sum_k dz_c/dA_k * A_k) at every place, in [0, 1].

    Where only pooling and one linear layer follow the block, the sum over places is z_c without its bias: as the class
    activation map of Zhou et al. behind global pooling, and the same map there. Maps are enlarged to the input's size
    by bilinear interpolation.

    Args:
        block: name of the submodule whose output `[N, K, *space]` holds the feature maps A.
        again: see `gradient_maps`.

    Raises:
        ValueError: the block's output has no places.

    Source: Zhou et al., CVPR 2016, arXiv 1512.04150, equation 2; for other heads Draelos and Carin, arXiv 2011.08891,
    HiResCAM.
    """
    seen: list[Tensor] = []
    handle = model.get_submodule(block).register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        with torch.enable_grad():
            here = x if x.requires_grad else x.detach().requires_grad_(True)
            logits = model(here)
            if not seen or not isinstance(seen[-1], Tensor) or seen[-1].ndim != x.ndim:
                raise ValueError(f"{block} must give feature maps [N, K, *space]; it does not. Name another block.")
            (slope,) = torch.autograd.grad(_chosen(logits, classes).sum(), seen[-1], create_graph=again)
    finally:
        handle.remove()
    maps = (slope * seen[-1]).sum(1, keepdim=True).relu()  # [N, 1, *space]
    if maps.shape[2:] != x.shape[2:]:
        maps = F.interpolate(maps, x.shape[2:], mode="bilinear" if x.ndim == 4 else "linear", align_corners=False)
    return logits, scaled(maps[:, 0])


def _chosen(logits: Tensor, classes: Tensor) -> Tensor:
    named = torch.where(classes < 0, logits.detach().argmax(1), classes)
    return logits.gather(1, named[:, None]).squeeze(1)


def scaled(maps: Tensor) -> Tensor:
    """Every map moved and scaled to [0, 1]; one that is flat becomes 0.

    >>> scaled(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]))
    tensor([[[0.0000, 1.0000],
             [0.5000, 0.5000]]])
    """
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return ((flat - low) / (high - low).clamp_min(1e-12)).view(maps.shape)


def smoothed(model: nn.Module, beta: float = 10.0) -> nn.Module:
    """A copy with softplus(beta x) / beta for every ReLU module: gradient maps then have gradients of their own."""
    soft = copy.deepcopy(model)
    for module in list(soft.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus(beta))
    return soft


def top_overlap(a: Tensor, b: Tensor, share: float = 0.25) -> Tensor:
    """Intersection over union of the pixels with the largest `share` of values, `[N]`; ties go in order of place.

    >>> top_overlap(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[1.0, 4, 2, 3]]), 0.5)
    tensor([0.3333])
    """
    count = max(1, round(share * a.shape[1:].numel()))
    first, second = (_top(maps.flatten(1), count) for maps in (a, b))
    both: Tensor = (first & second).sum(1) / (first | second).sum(1)
    return both


def _top(flat: Tensor, count: int) -> Tensor:
    order = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of two maps, `[N]`; 0 where one is flat."""
    one, other = (m.flatten(1) - m.flatten(1).mean(1, keepdim=True) for m in (a, b))
    found: Tensor = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1)).clamp_min(1e-12)
    return found
