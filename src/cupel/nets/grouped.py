"""Attention in which groups of query heads share keys and values."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from cupel.nets.vit import Attention
from cupel.ops.grouped import even_sizes, grouped_mix, grouped_scores, like


class GroupedAttention(Attention):
    """Self-attention with H query heads on G heads of keys and values.

    Group g serves the next `sizes[g]` query heads; sizes are a part of the network's state.

    Args:
        whole: multi-head attention whose query, output and normalising layers are copied.
        k, v: layers for keys and values, `width` -> `groups * d`.
        groups: heads of keys and values; divides the query heads.

    Attributes:
        steer: gives new sizes for the keys of a forward in training; a fit sets it and takes it away again.
        noise: how much of a Gaussian like a head's output is taken from it in training; set in the same way.

    Shapes: `[B, T, width]` -> `[B, T, width]`; keys and values `[B, G, T, d]`.
    """

    steer: Callable[[Tensor], tuple[int, ...]] | None
    noise: float

    def __init__(self, whole: Attention, k: nn.Linear, v: nn.Linear, groups: int) -> None:
        nn.Module.__init__(self)
        self.heads, self.groups, self.sizes = whole.heads, groups, even_sizes(whole.heads, groups)
        self.q, self.k, self.v = deepcopy(whole.q), k, v
        self.normalise, self.out = deepcopy(whole.normalise), deepcopy(whole.out)
        self.steer, self.noise = None, 0.0
        self.train(whole.training)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.sizes, device=self.q.weight.device)

    def set_extra_state(self, state: Tensor) -> None:
        sizes = tuple(int(n) for n in state)
        if len(sizes) != self.groups or sum(sizes) != self.heads or min(sizes) < 0:
            raise RuntimeError(f"sizes of {self.groups} groups must add up to {self.heads} heads; got {sizes}")
        self.sizes = sizes

    def shared(self, x: Tensor) -> Tensor:
        """`[B, T, groups * d]` -> `[B, groups, T, d]`."""
        heads: Tensor = x.unflatten(-1, (self.groups, -1))
        return heads.transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor | None = None, seen: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.split(self.q(x)), self.shared(self.k(x)), self.shared(self.v(x))
        if self.training and self.steer is not None:
            self.sizes = self.steer(k.detach())
        scores = grouped_scores(q, k, self.sizes) * q.shape[-1] ** -0.5
        found = self.normalise(scores if bias is None else scores + bias)  # [B, H, T, T]
        if seen is not None:
            seen.update(map=found, keys=k, values=v)
        mixed = grouped_mix(found, v, self.sizes)  # [B, H, T, d]
        if self.training and self.noise:
            mixed = mixed - self.noise * like(mixed, torch.randn_like(mixed))
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out
