"""Naming the victim of an attack from its perturbations: a grid of victims, and a network that parses attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.protocols import Hook, Moment
from cupel.core.slots import phase
from cupel.core.types import Batch, Examples, still
from cupel.ops.masks import keep_largest
from cupel.ops.quantize import symmetric
from cupel.ops.threats import Attack, Threat, attacked

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU}


class Victim(nn.Sequential):
    """Two convolutions of one kernel size and activation, 2x2 pooled features, one linear head.

    Shapes: `[B, channels, H, W]` -> logits `[B, classes]`.
    """

    def __init__(self, kernel: int, activation: str, channels: int, classes: int, width: int = 8) -> None:
        make = ACTIVATIONS[activation]
        super().__init__(
            nn.Conv2d(channels, width, kernel, padding=kernel // 2),
            make(),
            nn.Conv2d(width, 2 * width, kernel, stride=2, padding=kernel // 2),
            make(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, classes),
        )


def conv_weights(model: nn.Module) -> list[Tensor]:
    """Weights of all convolutions."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]


def global_masks(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """0/1 masks that keep the largest 1 - `sparsity` of all weights together."""
    kept = keep_largest(torch.cat([w.detach().flatten() for w in weights]), 1.0 - sparsity)
    return [part.view_as(w) for part, w in zip(kept.split([w.numel() for w in weights]), weights, strict=True)]


@dataclass(frozen=True)
class PrunedOnce:
    """One-shot global magnitude pruning of convolutions at `start` of a fit, then training under the mask."""

    sparsity: float
    start: float = 0.3

    def hook(self, ctx: object) -> Hook:
        return _Pruning(self.sparsity, self.start)


class _Pruning(Hook):
    def __init__(self, sparsity: float, start: float) -> None:
        self.sparsity, self.after = sparsity, start
        self.masks: list[Tensor] = []

    @phase("mask")
    def stepped(self, at: Moment) -> None:
        weights = conv_weights(at.model)
        if not self.masks and at.progress >= self.after:
            self.masks = global_masks(weights, self.sparsity)
        for weight, mask in zip(weights, self.masks, strict=False):
            weight.mul_(mask)


def compressed(model: nn.Module, how: str) -> nn.Module:
    """A copy with convolutions pruned to 40% (`pruned`), or all weights in `int8` or `int4`; no training afterwards.

    `dense` copies alone. Levels are symmetric, one range for every output channel.
    """
    made = copy.deepcopy(model)
    with torch.no_grad():
        if how == "pruned":
            weights = conv_weights(made)
            for weight, mask in zip(weights, global_masks(weights, 0.6), strict=True):
                weight.mul_(mask)
        for m in made.modules() if how.startswith("int") else ():
            if isinstance(m, nn.Conv2d | nn.Linear):
                limit = m.weight.abs().flatten(1).amax(1).view(-1, *[1] * (m.weight.ndim - 1))
                m.weight.copy_(symmetric(m.weight, limit, int(how[3:])))
    return made


class Parser(nn.Module):
    """Two blocks of convolution, batch norm, ReLU and 2x2 pooling, and two linear layers: logits of all attributes.

    Shapes: `[B, C, H, W]` -> `[B, sum of sizes]`; at least 4 pixels a side.
    """

    def __init__(self, channels: int, sizes: Sequence[int], side: tuple[int, int], width: int = 32) -> None:
        super().__init__()

        def block(fan_in: int) -> list[nn.Module]:
            norm = nn.BatchNorm2d(width)
            return [nn.Conv2d(fan_in, width, 3, padding=1, bias=False), norm, nn.ReLU(), nn.MaxPool2d(2)]

        features = width * (side[0] // 4) * (side[1] // 4)
        head = [nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, sum(sizes))]
        self.net = nn.Sequential(*block(channels), *block(width), *head)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found


@dataclass(frozen=True)
class Attributes:
    """Choose one value for each attribute: outputs `[B, sum of sizes]`, targets `[B, A]`, mean cross-entropy."""

    sizes: tuple[int, ...]

    def _parts(self, out: Tensor) -> Iterator[Tensor]:
        yield from out.split(list(self.sizes), dim=-1)

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        parts = enumerate(self._parts(out))
        each = [F.cross_entropy(part, batch.targets[:, k], reduction="none") for k, part in parts]
        return torch.stack(each).mean(0)

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        return self.losses(out, batch).mean()

    def predict(self, out: Tensor) -> Tensor:
        return torch.stack([part.argmax(-1) for part in self._parts(out)], dim=-1)

    def scores(self, out: Tensor) -> Tensor:
        return torch.cat([part.softmax(-1) for part in self._parts(out)], dim=-1)


@dataclass(frozen=True)
class Traces:
    """What attacks left: perturbations over eps and moved images `[M, C, H, W]`, labels `[M, A]`, image rows `[M]`."""

    delta: Tensor
    moved: Tensor
    labels: Tensor
    image: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Traces]) -> Traces:
        return cls(*(torch.cat([getattr(p, k) for p in parts]) for k in ("delta", "moved", "labels", "image")))

    def of_images(self, chosen: Tensor) -> Traces:
        keep = torch.isin(self.image, chosen)
        return Traces(self.delta[keep], self.moved[keep], self.labels[keep], self.image[keep])

    def examples(self, raw: bool = False) -> Examples:
        return Examples(self.moved if raw else self.delta, self.labels, torch.arange(len(self.labels)))


def traces(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, threat: Threat, draw: torch.Generator, label: Sequence[int]
) -> Traces:
    """The attacked inputs that `model` read rightly before and wrongly after."""
    with still(model):
        outcome = attacked(attack, model, x, y, threat, draw)
    won = (outcome.fooled & outcome.clean).nonzero().flatten()
    labels = torch.tensor(label).expand(len(won), -1)
    moved = outcome.x[won]
    return Traces(((moved - x[won]) / threat.eps).cpu(), moved.cpu(), labels, won.cpu())
