"""Tokens of a vision transformer: which matter, which say the same, and how to go on with fewer of them.

The class token stands at position 0. It is never dropped and never merged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-12


class Match(NamedTuple):
    """A bipartite matching of tokens at even positions (set a) with tokens at odd positions (set b).

    Args:
        stay: a-tokens that keep to themselves, in order, `[B, ceil(T/2) - drop]`; positions within set a.
        source: a-tokens that go, `[B, drop]`; positions within set a.
        into: the b-token that each of them joins, `[B, drop]`; positions within set b.
    """

    stay: Tensor
    source: Tensor
    into: Tensor


def most_dropped(tokens: int) -> int:
    """How many of `tokens` can go at once: half of those beside the class token.

    >>> most_dropped(17), most_dropped(18)
    (8, 8)
    """
    return (tokens - 1) // 2


def significance(attention: Tensor, values: Tensor) -> Tensor:
    """S_j = (sum over heads of A[class token, j]) * ||v_j||, scaled to a sum of one over the other tokens.

    The norm runs over the values of all heads together.

    Shapes: attention `[B, H, T, T]`, values `[B, G, T, d]` -> `[B, T - 1]`.
    """
    weight = attention[:, :, 0, 1:].sum(1) * values[:, :, 1:].square().sum((1, 3)).sqrt()
    return weight / weight.sum(1, keepdim=True).clamp_min(TINY)


def picked(tokens: Tensor, positions: Tensor) -> Tensor:
    """Tokens at `positions`, image by image: `[B, T, C]`, `[B, K]` -> `[B, K, C]`."""
    return tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[-1]))


def most_significant(scores: Tensor, drop: int) -> Tensor:
    """Positions that stay when the `drop` least significant tokens go, in their order, the class token first.

    Shapes: scores `[B, T - 1]` -> `[B, T - drop]`.
    """
    best = scores.topk(scores.shape[1] - drop, dim=1).indices.sort(1).values + 1
    return torch.cat([torch.zeros_like(best[:, :1]), best], 1)


def matched(keys: Tensor, drop: int) -> Match:
    """Each a-token finds the most similar b-token; the `drop` most similar pairs are joined (Bolya et al. 2023).

    Similarity is the cosine of keys averaged over heads.

    Shapes: keys `[B, G, T, d]`.
    """
    metric = F.normalize(keys.mean(1), dim=-1)
    best, into = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)  # [B, ceil(T/2)]
    best = torch.cat([torch.full_like(best[:, :1], -torch.inf), best[:, 1:]], 1)  # the class token comes last
    order = best.topk(best.shape[1], dim=1).indices
    source, stay = order[:, :drop], order[:, drop:].sort(1).values
    return Match(stay, source, into.gather(1, source))


def merged(tokens: Tensor, sizes: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """Tokens joined as `match` says: means weighted by size; sizes add up. First the a-tokens that stay, then all b.

    Shapes: tokens `[B, T, C]`, sizes `[B, T, 1]` -> `[B, T - drop, C]`, `[B, T - drop, 1]`.
    """
    held = torch.cat([tokens * sizes, sizes], -1)
    moved = picked(held[:, ::2], match.source)
    b = held[:, 1::2].scatter_add(1, match.into[..., None].expand_as(moved), moved)
    held = torch.cat([picked(held[:, ::2], match.stay), b], 1)
    return held[..., :-1] / held[..., -1:], held[..., -1:]
