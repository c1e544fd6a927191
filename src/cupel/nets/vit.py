"""A small vision transformer whose attention can be watched and replaced part by part."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with its own query, key, value and output layers.

    The attention map passes through `normalise`, a submodule, so that a forward hook there sees it
    (`[B, heads, T, T]`, rows add up to one) and another module can take its place.

    Args:
        bias: added to the scores before they are normalised; broadcasts against `[B, heads, T, T]`.
        seen: filled, where it is given, with what was computed on the way: the `map`, the `keys` and the `values`.

    Shapes: `[B, T, width]` -> `[B, T, width]`; `heads` must divide `width`; keys and values `[B, heads, T, d]`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.normalise = nn.Softmax(dim=-1)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """`[B, T, heads * d]` -> `[B, heads, T, d]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor | None = None, seen: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        found = self.normalise(scores if bias is None else scores + bias)
        if seen is not None:
            seen.update(map=found, keys=k, values=v)
        mixed = found @ v  # [B, heads, T, d]
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention, then x + two-layer network of twice the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, width]
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer with a class token (position 0) and learned positions.

    Args:
        channels, side: of the square input images.
        classes: outputs.
        patch: side of a patch; divides `side`.
        width: features of a token.
        depth: blocks.
        heads: attention heads; divides `width`.

    Shapes: `[B, channels, side, side]` -> logits `[B, classes]`; T = 1 + (side / patch)^2 tokens inside.
    """

    def __init__(self, channels: int, side: int, classes: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(torch.empty(1, 1 + (side // patch) ** 2, width))
        # Positions must stand out from the start: a fit of a few hundred updates cannot grow them from 0.02.
        nn.init.trunc_normal_(self.place, std=0.5)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, S, S]
        tokens = self.embed(x).flatten(2).transpose(1, 2)  # [B, T - 1, width]
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.place
        return self.head(self.norm(self.blocks(tokens))[:, 0])
