"""Images that truly belong to two classes, drawn between the codes of an autoencoder that knows only these two.

No classifier takes part, so what is found is not what some network is unsure of.

Source: Weiss, Garcia Gomez, Tonella 2023, arXiv 2207.10495, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.types import Budget, Examples
from cupel.ops.latent import LatentNet, Reconstruction, Rivalry, labels_of, slopes, told_apart

CENTRES = ((-3.0, 0.0), (3.0, 0.0))  # of the codes of the two classes
CORNER, SIDES, CELLS = (-1.0, -5.0), (2.0, 10.0), 50  # the field between them: one standard deviation off each
HIDDEN, DROPOUT = 128, 0.1
TOLD, LABELLED = (0.4, 0.6), 0.9  # an autoencoder is accepted inside and above these


@dataclass(frozen=True)
class Ambiguous:
    """Images `[M, D]`, the two classes of each `[M, 2]`, their shares `[M, 2]`, and how many pairs were accepted."""

    images: Tensor
    pair: Tensor
    shares: Tensor
    accepted: int


def closest_pairs(x: Tensor, y: Tensor, count: int) -> list[tuple[int, int]]:
    """The `count` pairs of classes whose mean images `[D]` lie nearest to each other; no network is asked."""
    there = y.unique().tolist()
    means = torch.stack([x[y == k].mean(0) for k in there])
    far = torch.cdist(means, means)
    pairs = [(float(far[i, j]), a, b) for i, a in enumerate(there) for j, b in enumerate(there) if a < b]
    return [(a, b) for _, a, b in sorted(pairs)[:count]]


def rows_of(y: Tensor, pairs: Sequence[tuple[int, int]], draw: torch.Generator) -> Tensor:
    """For each pair the rows of its two classes, shuffled, smaller pairs filled up by rows drawn again: `[N, G]`."""
    own = [((y == a) | (y == b)).nonzero().flatten() for a, b in pairs]
    most = max(len(rows) for rows in own)
    full = [torch.cat([r, r[torch.randint(len(r), (most - len(r),), generator=draw)]]) for r in own]
    return torch.stack([r[torch.randperm(most, generator=draw)] for r in full], dim=1)


def trained_pairs(
    x: Tensor, y: Tensor, pairs: Sequence[tuple[int, int]], epochs: int, ctx: Context
) -> tuple[LatentNet, list[float]]:
    """One autoencoder a pair, trained side by side, and for each its faults: 0 for one that is accepted.

    Shapes: x `[N, D]` in [0, 1], y `[N]`.
    """
    rows, centres = rows_of(y, pairs, ctx.rng("rows")), torch.tensor(CENTRES)
    second = torch.tensor([b for _, b in pairs])
    inputs, classes = x[rows], (y[rows] == second).long()  # [N', G, D], [N', G]
    with ctx.scope("first weights"):
        net = LatentNet(x.shape[1], HIDDEN, 2, 2, len(pairs), DROPOUT)
    budget = Budget(epochs=epochs, batch_size=64, optimizer="adam", lr=1e-3)
    examples = Examples(inputs, classes, torch.arange(len(rows)))
    seed = int(torch.randint(2**31, (1,), generator=ctx.rng("fit")))
    fit(net, examples, Reconstruction(2), techniques=[Rivalry(centres, 1e-3)], budget=budget, seed=seed)
    with torch.no_grad():
        code = net.encode(inputs)
        right = (labels_of(net, code).argmax(-1) == classes).double().mean(0)
        told = told_apart(net, code, classes, centres, ctx.rng("told"))
    excess = (TOLD[0] - told).clamp_min(0) + (told - TOLD[1]).clamp_min(0) + (LABELLED - right).clamp_min(0)
    return net, excess.tolist()


def between(net: LatentNet, group: int, limit: float, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes of autoencoder `group` where both classes are about as likely, and their shares: `[count, 2]` each.

    The field between the two Gaussians is cut into cells. A cell weighs as much as the picture changes at its
    middle, and nothing where |p_a - p_b| is above `limit`; cells are drawn by weight, points evenly within a cell.
    Points at or above the limit are drawn again. No cell at all gives no codes.
    """
    corner, side = torch.tensor(CORNER), torch.tensor(SIDES) / CELLS
    at = torch.cartesian_prod(torch.arange(CELLS), torch.arange(CELLS))

    def whole(z: Tensor) -> Tensor:  # every autoencoder is asked, one is heard
        return z[:, None].expand(-1, net.groups, -1)

    def shares(z: Tensor) -> Tensor:
        with torch.no_grad():
            return labels_of(net, whole(z))[:, group]

    middle = corner + (at + 0.5) * side
    p = shares(middle)
    steep = slopes(lambda z: net.decode(z)[:, group], whole(middle))[:, group]
    weight = torch.where((p[:, 0] - p[:, 1]).abs() <= limit, steep, torch.zeros_like(steep))
    found = middle[:0]
    for _ in range(50 if bool(weight.any()) else 0):
        cell = torch.multinomial(weight, 4 * count, replacement=True, generator=draw)
        z = corner + (at[cell] + torch.rand(len(cell), 2, generator=draw)) * side
        p = shares(z)
        found = torch.cat([found, z[(p[:, 0] - p[:, 1]).abs() < limit]])[:count]
        if len(found) == count:
            break
    return found, shares(found)


def ambiguous(
    x: Tensor,
    y: Tensor,
    pairs: Sequence[tuple[int, int]],
    count: int,
    limit: float,
    epochs: int,
    tries: int,
    ctx: Context,
) -> Ambiguous:
    """`count` images of every pair. A pair whose autoencoder is not accepted is trained again, up to `tries` times;
    then its best try is taken.

    Shapes: x `[N, D]` in [0, 1], y `[N]`.
    """
    best: dict[tuple[int, int], tuple[float, LatentNet, int]] = {}
    for turn in range(tries):
        left = [pair for pair in pairs if pair not in best or best[pair][0] > 0]
        if not left:
            break
        net, faults = trained_pairs(x, y, left, epochs, ctx.child(f"try-{turn}"))
        for group, (pair, fault) in enumerate(zip(left, faults, strict=True)):
            if pair not in best or fault < best[pair][0]:
                best[pair] = (fault, net, group)
    images, shares, of = [], [], []
    for a, b in pairs:
        _, net, group = best[a, b]
        z, p = between(net.eval(), group, limit, count, ctx.rng(f"between {a} {b}"))
        with torch.no_grad():
            images.append(net.decode(z[:, None].expand(-1, net.groups, -1))[:, group])
        shares.append(p)
        of.append(torch.tensor([[a, b]]).expand(len(z), 2))
    accepted = sum(best[pair][0] == 0 for pair in pairs)
    return Ambiguous(torch.cat(images), torch.cat(of), torch.cat(shares), accepted)
