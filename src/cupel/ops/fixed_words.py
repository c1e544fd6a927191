"""Fixed-point formats layer by layer: how few bits lose nothing, when to decide again, and what they cost.

A format is a word length and a fraction length: integers of `word` signed bits over 2^fraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cupel.ops.ledger import ledger_of
from cupel.ops.quantize import fixed_point

STRATEGIES = ("min", "mean", "max")
LONGEST = 32  # bits of the float that fixed-point words stand in for
LEAST_FRACTION = 4  # where the search for a shorter fraction ends


@dataclass
class LayerWords:
    """Where one layer stands in a fit that decides on its format."""

    word: int
    fraction: int
    resolution: int
    lookback: int
    count: int = 0  # gradients since the last decision
    total: Tensor | None = None  # their sum, each at unit length
    zeros: Tensor | float = 0.0  # share of zeros among the weights of the last forward
    share: Tensor | float = 0.0  # of float32's work, summed over the steps
    work: float = 0.0  # operations spent on deciding
    decisions: int = 0


def information_loss(weight: Tensor, held: Tensor, resolution: int) -> float:
    """KL(hist(weight) || hist(held)) in nats, over `resolution` equal bins from the least to the greatest weight.

    Half a count in every bin keeps it finite; values of `held` outside count in the outer bins.
    """
    w = weight.detach()
    low, high = float(w.min()), float(w.max())
    if low == high:
        return 0.0 if bool((held == w).all()) else math.inf
    counts = [torch.histc(x, resolution, low, high).double() + 0.5 for x in (w, held.detach().clamp(low, high))]
    p, q = (c / c.sum() for c in counts)
    return float((p * (p / q).log()).sum())


def smallest(low: int, high: int, fits: Callable[[int], bool]) -> tuple[int, int]:
    """The least number of [low, high] that fits, where all above one that fits do, and how many were tried.

    `high` itself is never tried: it is the answer where nothing below it fits.

    >>> smallest(0, 10, lambda n: n >= 7)
    (7, 4)
    """
    tries = 0
    while low < high:
        middle = (low + high) // 2
        tries += 1
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high, tries


def push_down(
    weight: Tensor, form: tuple[int, int], resolution: int, tolerance: float, draw: torch.Generator
) -> tuple[int, int, int]:
    """Shortest fraction, then shortest word for it, that lose nothing at `resolution`; and how many were tried."""
    word, fraction = form

    def keeps(w: int, f: int) -> bool:
        return information_loss(weight, fixed_point(weight.detach(), w, f, draw), resolution) <= tolerance

    fraction, first = smallest(min(LEAST_FRACTION, fraction), fraction, lambda f: keeps(word, f))
    word, second = smallest(2, word, lambda w: keeps(w, fraction))
    return word, fraction, first + second


def diversity(total: Tensor, count: int) -> float:
    """sum |g_k| / |sum g_k| of `count` gradients of length one with sum `total`: 1 if all agree, sqrt(n) if none do."""
    length = float(total.norm())
    return count / length if length else math.inf


def push_up(spread: float, form: tuple[int, int], strategy: str, buffer: int) -> tuple[int, int]:
    """The format with room for what comes: the more gradients disagree, the less they need (see `AdaPT`)."""
    word, fraction = form
    step, d = 1, math.log(spread) - 1 if 0 < spread < math.inf else 0.0
    if d > 0:
        first = max(math.ceil(min(1 / d**2, LONGEST)), 1)
        second = max(min(math.ceil(LONGEST * d**2), LONGEST) - fraction, 0)
        step = {"min": min(first, second), "mean": math.ceil((first + second) / 2), "max": max(first, second)}[strategy]
    fraction = min(fraction + step, LONGEST - buffer)
    return min(max(fraction + buffer, max(word, fraction) + 1), LONGEST), fraction


def next_lookback(lookback: int, spread: float, limits: tuple[int, int], momentum: float) -> int:
    """How many gradients the next decision rests on: fewer the more they disagree, moved by a share `momentum`."""
    low, high = limits
    wanted = math.ceil(min(max(high / spread, low), high)) if spread else high
    return math.ceil(wanted * momentum + lookback * (1 - momentum))


def next_strategy(strategy: str, window: list[float], loss: float) -> str:
    """A bolder one of min, mean, max where the loss is no better than it was on average; else the most careful."""
    if not window or abs(math.fsum(window) / len(window)) > abs(loss):
        return "min"
    return STRATEGIES[min(STRATEGIES.index(strategy) + 1, 2)]


def work_share(word: int, zeros: Tensor | float) -> Tensor | float:
    """Work of a product with weights of `word` bits, a share `zeros` of them zero, as a share of float32's."""
    return word / LONGEST * (1 - zeros)


def decision_work(size: int, tries: int, resolution: int) -> float:
    """Operations on float32 that one step of the decisions costs a layer of `size` weights.

    Length, scaling and sum of a gradient take 3 a weight at every step. Each format tried takes 5 (scale, noise, floor,
    back, bin) and 3 a bin; the weight itself is binned once.
    """
    return 3.0 * size + tries * (5.0 * size + 3.0 * resolution) + (size if tries else 0)


def relative_cost(macs: Mapping[str, float], shares: Mapping[str, float], extra: float = 0.0) -> float:
    """Modelled work against float32: (sum macs_l share_l + extra) / sum macs_l; layers without a share count whole.

    For training give mean shares over the steps, and as `extra` the operations of the decisions a step, divided by
    forward and backward of the batch: they run as many products of the same size each.
    """
    return (sum(m * shares.get(name, 1.0) for name, m in macs.items()) + extra) / max(sum(macs.values()), 1)


def relative_size(words: Mapping[str, int], values: Mapping[str, Tensor]) -> float:
    """Modelled size against float32: sum word_l nonzero_l / (32 sum size_l)."""
    bits = sum(words[name] * int(v.count_nonzero()) for name, v in values.items())
    return bits / (LONGEST * sum(v.numel() for v in values.values()))


class _Called(nn.Module):
    """A network under whatever a fit has open around its forwards."""

    def __init__(self, at: Any) -> None:
        super().__init__()
        self.net, self.at = at.model, (at,)

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.at[0].output_of(batch)
        return out


def macs_by_layer(at: Any) -> dict[str, float]:
    """Multiply-adds of one example by module, in a running fit (`at` is its moment)."""
    with at.evaluating():
        found = ledger_of(_Called(at), at.batch).macs()
    return {name.removeprefix("net."): n / len(at.batch) for name, n in found.items() if n}
