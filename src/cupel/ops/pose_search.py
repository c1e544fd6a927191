"""Ways to find a pose in which an object is taken for another, by pictures alone; every picture is counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cupel.core.descend import descend
from cupel.ops.cma_es import CmaEs
from cupel.ops.poses import Space, as_poses, carried, renewed
from cupel.ops.render import Camera

# Poses [M, 6] of tasks [M] -> loss of the wanted class [M], and whether the wanted class is what is seen [M].
Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Wrong = Callable[[Tensor, Tensor], Tensor]  # the same, but whether anything else than the own class is seen [M]


class Trail:
    """What searches of `count` tasks have asked, within `budget` pictures each.

    `first` `[count]` is the number of the first picture that succeeded, 0 for none; `spent` `[count]` how many were
    taken; `best` `[count, 6]` and `least` `[count]` the pose of the smallest loss and that loss.
    """

    def __init__(self, judge: Judge, count: int, budget: int) -> None:
        self.judge, self.budget = judge, budget
        self.first, self.spent = torch.zeros(2, count, dtype=torch.long)
        self.best, self.least = torch.zeros(count, 6), torch.full((count,), torch.inf)

    def open(self) -> Tensor:
        """Tasks that have not succeeded and may still ask."""
        rows: Tensor = ((self.first == 0) & (self.spent < self.budget)).nonzero().flatten()
        return rows

    def ask(self, rows: Tensor, poses: Tensor) -> Tensor:
        """Losses `[r, k]` of poses `[r, k, 6]` of tasks `rows` `[r]`; pictures beyond the budget count for nothing."""
        count, k = poses.shape[:2]
        loss, hit = (t.view(count, k) for t in self.judge(poses.flatten(0, 1), rows.repeat_interleave(k)))
        number = self.spent[rows, None] + torch.arange(1, k + 1)
        hit = hit & (number <= self.budget)
        earliest = torch.where(hit, number, self.budget + 1).amin(1)
        new = (self.first[rows] == 0) & hit.any(1)
        self.first[rows[new]] = earliest[new]
        self.spent[rows] = (self.spent[rows] + k).clamp_max(self.budget)
        least, which = torch.where(number <= self.budget, loss, torch.inf).min(1)
        better = least < self.least[rows]
        self.least[rows[better]] = least[better]
        self.best[rows[better]] = poses[better, which[better]]
        return loss


def random_search(trail: Trail, space: Space, camera: Camera, draw: torch.Generator, at_once: int = 16) -> None:
    """Poses drawn evenly until one succeeds."""
    while len(rows := trail.open()):
        poses = space.drawn(len(rows) * at_once, camera, draw)
        trail.ask(rows, poses.view(len(rows), at_once, 6))


def explored(
    trail: Trail, space: Space, camera: Camera, draw: torch.Generator, depths: int, each: int
) -> tuple[Tensor, Tensor]:
    """Ask `each` random poses at `depths` values of z; the two z of the smallest losses, lower and upper, `[count]`."""
    values = torch.linspace(space.far, space.near, depths)
    count = len(trail.first)
    least = torch.full((count, depths), torch.inf)
    for k in range(depths):
        rows = trail.open()
        if len(rows):
            u = torch.rand(len(rows) * each, 6, generator=draw)
            poses = space.placed(u, values[k].expand(len(u)), camera).view(len(rows), each, 6)
            least[rows, k] = trail.ask(rows, poses).amin(1)
    two = values[least.argsort(dim=1, stable=True)[:, :2]]
    return two.amin(1), two.amax(1)


def z_search(
    trail: Trail, space: Space, camera: Camera, draw: torch.Generator, depths: int, each: int, at_once: int = 16
) -> None:
    """Random poses between the two depths that looked best (ZRS)."""
    low, high = explored(trail, space, camera, draw, depths, each)
    while len(rows := trail.open()):
        u = torch.rand(len(rows) * at_once, 6, generator=draw)
        wide = (high - low)[rows].repeat_interleave(at_once)
        poses = space.placed(u, low[rows].repeat_interleave(at_once) + wide * u[:, 2], camera)
        trail.ask(rows, poses.view(len(rows), at_once, 6))


def slope_search(
    trail: Trail,
    space: Space,
    camera: Camera,
    draw: torch.Generator,
    step: float = 0.001,
    lr: float = 0.001,
    slack: float = 0.1,
) -> None:
    """Descent from `trail.best` along central differences of the nine numbers (FD-G), 19 pictures a step.

    g_i = (loss(p + step e_i / 2) - loss(p - step e_i / 2)) / step; p <- p - lr g, the pairs back to length 1; x, y
    and z into the pyramid, whose bounds are moved at random by up to `slack`.
    """
    tasks = trail.open()
    if not len(tasks):
        return
    ends = torch.cat([torch.eye(9), -torch.eye(9)]) * (step / 2)

    def shown(nine: Tensor) -> Tensor:
        return space.within(as_poses(nine), camera)

    def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            around = torch.cat([here[:, None], here[:, None] + ends], 1)  # [r, 19, 9]
            losses = trail.ask(tasks[rows], shown(around.flatten(0, 1)).view(len(rows), 19, 6))
            grad = (losses[:, 1:10] - losses[:, 10:]) / step
            done = ~torch.isin(tasks[rows], trail.open())
        return (here * grad).sum(1), done  # a plane of that slope

    def move(nine: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        return nine - lr * grad

    def project(nine: Tensor, rows: Tensor) -> Tensor:
        bump = (torch.rand(len(rows), generator=draw) * 2 - 1) * slack
        held = space.within(as_poses(renewed(nine)), camera, bump)
        return carried(held)

    descend(carried(trail.best[tasks]), objective, trail.budget, move, project)


def evolution_search(
    trail: Trail, space: Space, camera: Camera, draw: torch.Generator, sigma: float = 1.0, population: int = 18
) -> None:
    """CMA-ES on the nine numbers from `trail.best`; points outside the pyramid are shown at its edge."""
    search = CmaEs(carried(trail.best), sigma, population)
    while len(rows := trail.open()):
        points = search.ask(rows, draw)
        poses = space.within(as_poses(points.flatten(0, 1).float()), camera).view(len(rows), population, 6)
        search.tell(rows, points, trail.ask(rows, poses))


def least_changes(wrong: Wrong, poses: Tensor, space: Space, camera: Camera, steps: int, halvings: int = 4) -> Tensor:
    """How far each of the six numbers can be moved alone until the class is missed: `[N, 6]`, infinite for never.

    Both directions are walked in `steps` even steps over `space.spans`; the first miss is closed in on by halving.
    Places outside the space are not asked.
    """
    count, spans = len(poses), space.spans(poses, camera)
    share = torch.arange(1, steps + 1) / steps
    side = torch.tensor([1.0, -1.0])
    offsets = spans[:, :, None, None] * side[:, None] * share  # [N, 6, 2, steps]
    unit = torch.eye(6)[None, :, None]  # which number is moved

    def missed(moves: Tensor) -> Tensor:
        """Whether the class is missed after moves `[N, 6, K]`."""
        there = (poses[:, None, None] + unit * moves[..., None]).flatten(0, 2)
        rows = torch.arange(count).repeat_interleave(6 * moves.shape[2])
        told = torch.zeros(len(there), dtype=torch.bool)
        inside = space.holds(there, camera).nonzero().flatten()
        told[inside] = wrong(there[inside], rows[inside])
        return told.view(moves.shape)

    first = missed(offsets.flatten(2)).view(offsets.shape)
    place = torch.where(first.any(3), first.int().argmax(3), steps)  # [N, 6, 2]
    high, low = (place + 1) / steps, place / steps
    for _ in range(halvings):
        middle = (low + high) / 2
        bad = missed(spans[:, :, None] * side * middle)
        low, high = torch.where(bad, low, middle), torch.where(bad, middle, high)
    far = torch.where(place < steps, spans[:, :, None] * high, torch.inf)
    return far.amin(2)
