"""Technique `cuda-unlearnable`: blur every class of training images with a secret kernel of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import ParamError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.shelf import FILTERS
from cupel.core.types import Bounds, TrainView

CARD = Card(
    name="cuda-unlearnable",
    family="integrity",
    source="V. S. Sadasivan, M. Soltanolkotabi, S. Feizi, CUDA: Convolution-based Unlearnable Datasets, "
    "CVPR 2023, arXiv 2303.04278, section 3 and Algorithm 1",
    tags=("poisoning", "availability", "unlearnable", "data-protection"),
    needs=("images", "classes", "bounded"),
    writes=("filters",),
    tiny={"rate": 0.5},
    neutral={"rate": 0.0},
)


def class_kernels(classes: int, size: int, blur: float, draw: torch.Generator) -> Tensor:
    """One secret kernel a class, entries uniform in [0, blur) and one entry at random set to 1: `[K, size, size]`."""
    kernels = blur * torch.rand(classes, size * size, generator=draw)
    spot = torch.randint(size * size, (classes, 1), generator=draw)
    return kernels.scatter(1, spot, 1.0).view(classes, size, size)


def filtered(images: Tensor, kernels: Tensor) -> Tensor:
    """Every image under its own kernel, scaled back to a maximum of one and to 8-bit levels.

    x' = conv(x, k) with zero padding and the same k for all channels; x' / max x', clipped to [0, 1] and
    rounded to multiples of 1/255.

    Shapes: images `[N, C, H, W]` in [0, 1], kernels `[N, s, s]` -> `[N, C, H, W]`.
    """
    count, channels, height, width = images.shape
    size = kernels.shape[-1]
    weight = kernels.to(images.dtype).repeat_interleave(channels, 0).unsqueeze(1)  # [N * C, 1, s, s]
    flat = images.reshape(1, count * channels, height, width)
    made = F.conv2d(flat, weight, padding=size // 2, groups=count * channels).view_as(images)
    peak = made.flatten(1).amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return (made / peak).clamp(0, 1).mul(255).round().div(255)


@dataclass(frozen=True)
class CudaUnlearnable:
    r"""Make images worthless for training others' networks by a class-wise secret convolution.

    x' = (x * k_y) / max(x * k_y), with k_y drawn once per class from a key. The kernel predicts the label
    perfectly and is easier to learn than content, so a network trained on x' reads kernels and fails on
    clean images. No model is needed. The run's seed is the key; the kernels go on the shelf. Only
    training images are changed, never those for validation or test. The copies are 8-bit images.

    Use: to see what a trained model can still learn from data that its owner made unlearnable, or to protect images
    that are published. Not against training that adds blur or adversarial examples.

    Costs: one convolution an image, once; the model that learns from them is the one that pays.

    Shapes: training inputs `[N, C, H, W]` within the workload's bounds, unchanged in shape and dtype.

    Raises:
        ParamError: an even `size`, or images without two spatial axes.

    Source: Sadasivan, Soltanolkotabi, Feizi, CVPR 2023, arXiv 2303.04278.

    Departs: inputs in other bounds than [0, 1] are mapped there and back.

    Example:
        >>> CudaUnlearnable(rate=0.5).size
        3
    """

    rate: float = param(1.0, "share of the training images that is protected", ge=0, le=1)
    blur: float = param(0.3, "largest of the small kernel entries (0.06 suits size 9)", ge=0, le=1)
    size: int = param(3, "kernel width; odd", ge=1, le=31, unit="pixels")

    def data(self, data: TrainView, ctx: Context) -> TrainView:
        if self.size % 2 == 0:
            raise ParamError(f"size must be odd; got {self.size}. Set it to {self.size + 1}.")
        train = data.train
        if train.inputs.ndim != 4:
            raise ParamError(
                f"training inputs must be images [N, C, H, W]; got shape {list(train.inputs.shape)}. "
                "Use a workload of images."
            )
        classes = int(train.targets.max()) + 1
        kernels = class_kernels(classes, self.size, self.blur, ctx.rng("kernels"))
        ctx.shelf.put(FILTERS, kernels)
        chosen = torch.randperm(len(train), generator=ctx.rng("pick"))[: round(self.rate * len(train))]
        if not len(chosen):
            return data
        bounds = ctx.bounds or Bounds()
        span = bounds.high - bounds.low
        inputs = train.inputs.clone()
        unit = (inputs[chosen] - bounds.low) / span
        made = filtered(unit, kernels[train.targets[chosen]])
        inputs[chosen] = made * span + bounds.low
        return data.with_train(train.having(inputs=inputs))
