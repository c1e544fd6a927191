"""Leaving a network early: the gates' view of a prediction, exit probabilities, and cuts of a running batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AtExit = Callable[[int, Tensor], "Tensor | None"]  # (exit, block output) -> rows that go on, None for all


class _AllOut(Exception):
    """Every row has left; what follows need not run."""


def gate_features(logits: Tensor) -> Tensor:
    """Largest probability, entropy, gap of the two largest, and entropy of the squared, renormalised probabilities.

    Shapes: `[..., K]` -> `[..., 4]`.
    """
    p = logits.softmax(-1)
    top = p.topk(min(2, p.shape[-1]), dim=-1).values
    sharp = (2 * logits).softmax(-1)  # p^2 / sum p^2
    plain, sharper = torch.special.entr(p).sum(-1), torch.special.entr(sharp).sum(-1)
    return torch.stack([top[..., 0], plain, top[..., 0] - top[..., -1], sharper], dim=-1)


def exit_probabilities(g: Tensor) -> Tensor:
    """P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)), and what is left for the last: `[B, L - 1]` -> `[B, L]`.

    >>> exit_probabilities(torch.tensor([[0.25, 0.5, 0.5]]))
    tensor([[0.2500, 0.5000, 0.2500, 0.0000]])
    """
    reached = torch.cat([torch.zeros_like(g[:, :1]), g.cumsum(1).clamp(max=1), torch.ones_like(g[:, :1])], dim=1)
    return reached.diff(dim=1)


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Of every exit: `[B, L, K]`, `[B]` -> `[B, L]`."""
    return F.cross_entropy(logits.transpose(1, 2), targets[:, None].expand(-1, logits.shape[1]), reduction="none")


def leaves(g: Tensor, reached: Tensor) -> Tensor:
    """Whether the conditional probability of leaving here, min(g, 1 - reached) / (1 - reached), is at least one half.

    `reached` is the sum of the gates before. All `[B]`.
    """
    return 2 * g >= 1 - reached


def spread(blocks: Sequence[str], most: int) -> tuple[str, ...]:
    """Blocks to leave after: all but the last, or the `most` of them that cut the row into parts as equal as can be.

    >>> spread(["a", "b", "c", "d", "e", "f"], 2), spread(["a", "b", "c"], 5), spread(["a", "b", "c"], 0)
    (('b', 'd'), ('a', 'b'), ('a', 'b'))
    """
    if not 0 < most < len(blocks) - 1:
        return tuple(blocks[:-1])
    return tuple(blocks[round((k + 1) * len(blocks) / (most + 1)) - 1] for k in range(most))


def pooled(out: Tensor, pool: int, tokens: bool) -> Tensor:
    """Features of a block's output, one row an input.

    Shapes: maps `[B, C, H, W]` -> `[B, C pool^2]`; series `[B, C, T]` -> `[B, C pool]`; with `tokens`, `[B, T, D]` ->
    `[B, D]`; vectors `[B, D]` stay.
    """
    if out.ndim == 4:
        return F.adaptive_avg_pool2d(out, pool).flatten(1)
    if out.ndim == 3:
        return out.mean(1) if tokens else F.adaptive_avg_pool1d(out, pool).flatten(1)
    return out.flatten(1)


@contextmanager
def cut_at(model: nn.Module, names: Sequence[str], at_exit: AtExit) -> Iterator[None]:
    """Inside, the output of module `names[l]` keeps only the rows that `at_exit(l, output)` returns.

    Later modules then see a smaller batch and really do less. All hooks are gone afterwards, also after an
    error.
    """

    def hook(exit_number: int) -> Callable[[nn.Module, object, Tensor], Tensor | None]:
        def act(module: nn.Module, args: object, out: Tensor) -> Tensor | None:
            rows = at_exit(exit_number, out)
            return None if rows is None else out[rows]

        return act

    handles = [model.get_submodule(name).register_forward_hook(hook(k)) for k, name in enumerate(names)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class EarlyExit(nn.Module):
    """A network with exits. The batch shrinks at each of them: a row that leaves costs nothing further on.

    Args:
        backbone: kept as it is.
        names: modules of it after whose outputs rows may leave, in forward order.
        pool, tokens: how an output becomes features, see `pooled`.

    Exit l needs a head `[B, d_l] -> [B, K]` in `heads` and a gate `[B, 4] -> [B, 1]` in `gates`.

    Shapes: inputs of the backbone -> logits `[B, K]` of the exit that each row takes.
    """

    costs: Tensor  # [L] multiply-adds up to each exit, heads and gates counted, as shares of the plain backbone

    def __init__(self, backbone: nn.Module, names: Sequence[str], pool: int, tokens: bool) -> None:
        super().__init__()
        self.backbone, self.names, self.pool, self.tokens = backbone, tuple(names), pool, tokens
        self.heads, self.gates = nn.ModuleList(), nn.ModuleList()
        self.register_buffer("costs", torch.ones(len(self.names) + 1))

    def forward(self, x: Any) -> Tensor:
        return self.exits(x)[0]

    def exits(self, x: Any) -> tuple[Tensor, Tensor]:
        """Logits `[B, K]`, and the exit each row took, `[B]`: 0 is the first, L - 1 the backbone's own head."""
        rows = reached = torch.empty(0)  # who is still inside, and the sum of the gates each has passed
        left: list[tuple[int, Tensor, Tensor]] = []

        def leave(number: int, out: Tensor) -> Tensor | None:
            nonlocal rows, reached
            if number == 0:
                rows, reached = torch.arange(len(out), device=out.device), out.new_zeros(len(out))
            logits = self.heads[number](pooled(out, self.pool, self.tokens))
            g = torch.sigmoid(self.gates[number](gate_features(logits.detach()))).flatten()
            go = leaves(g, reached)
            count, reached = int(go.sum()), reached + g
            if count == 0:
                return None
            if count == len(go):
                left.append((number, rows, logits))
                raise _AllOut
            left.append((number, rows[go], logits[go]))
            stay = ~go
            rows, reached = rows[stay], reached[stay]
            return stay

        with cut_at(self.backbone, self.names, leave), suppress(_AllOut):
            out = self.backbone(x)
            left.append((len(self.names), rows, out))
        if len(left) == 1:  # all by the same exit, as one input always is
            number, rows, logits = left[0]
            return logits, torch.full_like(rows, number)
        order = torch.cat([r for _, r, _ in left]).argsort()
        taken = torch.cat([torch.full_like(r, number) for number, r, _ in left])
        return torch.cat([logits for _, _, logits in left])[order], taken[order]

    def tapped(self, x: Any) -> list[Tensor]:
        """Every exit's features `[B, d_l]`, then the backbone's logits `[B, K]`; nobody leaves."""
        found: list[Tensor] = []

        def note(number: int, out: Tensor) -> None:
            found.append(pooled(out, self.pool, self.tokens))

        with cut_at(self.backbone, self.names, note):
            out = self.backbone(x)
        return [*found, out]

    def mean_cost(self, taken: Tensor) -> float:
        """Multiply-adds an input, as a share of the plain backbone's, given the exits taken `[B]`."""
        return float(self.costs[taken].double().mean())
