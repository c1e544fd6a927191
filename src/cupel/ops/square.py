"""Square: a random search over square patches that needs the model's scores and no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from cupel.ops.projections import along
from cupel.ops.threats import Model, Tally, Threat

# Share of the patch in the image, halved after these shares of the budget (of 10,000 queries in the paper).
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def patch_share(progress: float, first: float) -> float:
    """Share of the image that a patch covers after `progress` in [0, 1] of the queries.

    >>> patch_share(0.0, 0.8), patch_share(0.03, 0.8)
    (0.8, 0.1)
    """
    halvings = sum(progress > edge for edge in HALVINGS)
    return first / (1 << halvings)


def as_images(x: Tensor) -> Tensor:
    """A view `[N, C, H, W]` of inputs: vectors `[N, D]` and series `[N, C, T]` become images one row high."""
    if x.ndim == 4:
        return x
    return x.view(len(x), 1, 1, -1) if x.ndim == 2 else x.view(len(x), x.shape[1], 1, -1)


def windows(count: int, sides: tuple[int, int], height: int, width: int, draw: torch.Generator) -> Tensor:
    """0/1 masks `[count, 1, H, W]` of random windows of `sides` (rows, columns)."""
    tall, wide = sides
    top = torch.randint(0, height - tall + 1, (count, 1, 1, 1), generator=draw)
    left = torch.randint(0, width - wide + 1, (count, 1, 1, 1), generator=draw)
    r, c = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    return ((r >= top) & (r < top + tall) & (c >= left) & (c < left + wide)).float()


def sides_of(share: float, height: int, width: int) -> tuple[int, int]:
    """Sides of a window that covers `share` of the image: a square where the image allows it."""
    area = share * height * width
    tall = max(1, min(height, round(area**0.5)))
    return tall, max(1, min(width, round(area / tall)))


def signs(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Random signs, -1.0 or 1.0."""
    return torch.randint(0, 2, shape, generator=draw).float() * 2 - 1


def bump(tall: int, wide: int) -> Tensor:
    """Mass that falls off from the middle of two halves of a window, of opposite sign: `[tall, wide]`, norm one."""

    def half(rows: int, cols: int) -> Tensor:
        r, c = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
        middle_r, middle_c = (rows - 1) / 2, (cols - 1) / 2
        ring = torch.maximum((r - middle_r).abs(), (c - middle_c).abs()).floor() + 1
        reach = max(int(ring.max()), 1)
        return sum(((ring <= k) / (reach - k + 1.0) ** 2 for k in range(1, reach + 1)), torch.zeros(rows, cols))

    split = wide // 2
    whole = torch.cat([half(tall, split), -half(tall, wide - split)], dim=1) if split else half(tall, wide)
    found: Tensor = whole / whole.norm()
    return found


def first_linf(x: Tensor, threat: Threat, draw: torch.Generator) -> Tensor:
    """Stripes of plus and minus eps, one sign per column and channel."""
    n, c, _, w = x.shape
    return threat.eps * signs((n, c, 1, w), draw).to(x).expand_as(x)


def next_linf(delta: Tensor, threat: Threat, share: float, draw: torch.Generator) -> Tensor:
    """A window of every image set to plus or minus eps, one sign per channel."""
    n, c, h, w = delta.shape
    mask = windows(n, sides_of(share, h, w), h, w, draw).to(delta)
    return delta * (1 - mask) + mask * threat.eps * signs((n, c, 1, 1), draw).to(delta)


def first_l2(x: Tensor, threat: Threat, draw: torch.Generator) -> Tensor:
    """A grid of bumps with random signs, scaled to length eps."""
    n, c, h, w = x.shape
    tall, wide = max(h // 5, 1), max(w // 5, 1)
    tile = bump(tall, wide).repeat(-(-h // tall), -(-w // wide))[:h, :w]
    cells = signs((n, c, -(-h // tall), -(-w // wide)), draw)
    grid = cells.repeat_interleave(tall, 2).repeat_interleave(wide, 3)[:, :, :h, :w]
    delta = (tile * grid).to(x)
    return delta * along(threat.eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12), delta)


def next_l2(delta: Tensor, threat: Threat, share: float, draw: torch.Generator) -> Tensor:
    """Move the mass of one window into a bump in another, keeping the length at eps."""
    n, c, h, w = delta.shape
    tall, wide = sides_of(share, h, w)
    into, away = windows(n, (tall, wide), h, w, draw).to(delta), windows(n, (tall, wide), h, w, draw).to(delta)
    either = (into + away).clamp_max(1.0)
    held = (delta * either).flatten(2).square().sum(2)  # [n, c]: mass that both windows hold
    spare = (threat.eps**2 - delta.flatten(1).square().sum(1)).clamp_min(0.0) / c
    length = (held + spare[:, None]).sqrt().view(n, c, 1, 1)
    shape = torch.zeros_like(delta)
    inside = bump(tall, wide).to(delta).flatten() * signs((n, c, 1), draw).to(delta)  # [n, c, tall * wide]
    where = into.bool().expand_as(delta)
    old = delta[where].view(n, c, -1)
    new = inside + old / old.norm(dim=2, keepdim=True).clamp_min(1e-10)
    shape[where] = (new / new.norm(dim=2, keepdim=True).clamp_min(1e-10)).flatten()
    return delta * (1 - either) + shape * length


def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    first: float = 0.8,
    tally: Tally | None = None,
) -> Tensor:
    """Random search: change one square window at a time, keep the change if the margin falls.

    The window covers a share of the image that starts at `first` and is halved on a schedule. For `linf`
    a window is set to plus or minus eps per channel; for `l2` the mass of one window moves to another.
    `threat.steps` is the query budget; an input drops out as soon as it is fooled.

    Source: Andriushchenko et al., ECCV 2020, arXiv 1912.00049, algorithms 1 to 3.

    Departs: windows may be wider than high in images that are not square; the schedule is scaled to the
    budget as in their code.
    """
    begin, change = (first_linf, next_linf) if threat.norm == "linf" else (first_l2, next_l2)
    images = as_images(x)
    best = threat.admit(images + begin(images, threat, draw), images)
    rows = torch.arange(len(x), device=x.device)
    least = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    with torch.no_grad():
        for k in range(threat.steps):
            here = images[rows]
            tried = best[rows]
            if k:
                delta = change(tried - here, threat, patch_share(k / threat.steps, first), draw)
                tried = threat.admit(here + delta, here)
            logits = model(tried.reshape(-1, *x.shape[1:]))
            if tally is not None:
                tally.queries[rows.cpu()] += 1
            value = threat.gap(logits, y[rows])
            won = value < least[rows]
            best[rows[won]], least[rows[won]] = tried[won], value[won]
            rows = rows[~threat.reached(logits, y[rows])]
            if not len(rows):
                break
    return best.reshape(x.shape)
