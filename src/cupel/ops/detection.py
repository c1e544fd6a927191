"""Finding boxes on a grid of cells: the task, overlap, suppression, and mean average precision.

Boxes are (left, top, right, bottom) in shares of the scene. A network answers `[N, 5 + K, G, G]`: for each cell one
logit that an object's centre lies there, four numbers of its box, and one logit a class. Targets are `[N, M, 5]`:
class and box of every object; class -1 fills the rows of scenes that hold fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.types import Batch

BOX = 5  # numbers of a cell before its classes: one for the object, four for the box


def boxes_of(out: Tensor) -> Tensor:
    """The box of every cell: `[N, 5 + K, G, G]` -> `[N, G * G, 4]`.

    Centre = (cell + sigmoid(t)) / G, so it never leaves its cell; edges = sigmoid(t).
    """
    grid = out.shape[-1]
    t = out[:, 1:BOX].flatten(2).transpose(1, 2).sigmoid()  # [N, G * G, 4]
    cells = torch.arange(grid * grid, device=out.device)
    corner = torch.stack([cells % grid, cells // grid], 1)
    middle, half = (corner + t[..., :2]) / grid, t[..., 2:] / 2
    return torch.cat([middle - half, middle + half], -1)


def confidences(out: Tensor) -> Tensor:
    """P(object in the cell) * P(class): `[N, 5 + K, G, G]` -> `[N, G * G, K]`."""
    flat = out.flatten(2).transpose(1, 2)
    sure: Tensor = flat[..., :1].sigmoid() * flat[..., BOX:].softmax(-1)
    return sure


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all pairs: `[..., A, 4]`, `[..., B, 4]` -> `[..., A, B]`.

    >>> overlap(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
    tensor([[0.3333]])
    """
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    sizes = [(x[..., 2:] - x[..., :2]).clamp_min(0).prod(-1) for x in (a, b)]
    ratio: Tensor = shared / (sizes[0][..., :, None] + sizes[1][..., None, :] - shared).clamp_min(1e-12)
    return ratio


def cell_of(targets: Tensor, grid: int) -> Tensor:
    """Which cell holds the centre of every object: `[N, M, 5]` -> `[N, M]`."""
    middle = (targets[..., 1:3] + targets[..., 3:5]) / 2
    at = (middle * grid).long().clamp(0, grid - 1)
    return at[..., 1] * grid + at[..., 0]


def object_scores(out: Tensor, targets: Tensor) -> Tensor:
    """How surely each true object is found and named: the confidence of its cell in its class, `[N, M]`."""
    grid, classes = out.shape[-1], targets[..., 0].long().clamp_min(0)
    own = confidences(out).gather(1, cell_of(targets, grid)[..., None].expand(-1, -1, out.shape[1] - BOX))
    return own.gather(2, classes[..., None]).squeeze(2)


@dataclass(frozen=True)
class Detection:
    """Find the objects of a scene and name them.

    Loss of a scene: cross-entropy of every cell's object logit, and for each object cross-entropy of the class and
    the absolute error of centre and edges, in cells, at the cell of its centre.

    Args:
        classes: of objects.
        box_weight: of the error of boxes.
        least: confidence below which a cell finds nothing.
        apart: overlap from which the surer of two finds of one class suppresses the other.
    """

    classes: int
    box_weight: float = 1.0
    least: float = 0.05
    apart: float = 0.5

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        grid, targets = out.shape[-1], batch.targets
        there, cell = targets[..., 0] >= 0, cell_of(targets, grid)  # [N, M]
        held = torch.zeros(len(out), grid * grid, device=out.device, dtype=out.dtype)
        held = held.scatter_add(1, cell, there.to(out.dtype)).clamp_max(1.0)
        objects = F.binary_cross_entropy_with_logits(out[:, 0].flatten(1), held, reduction="none").sum(1)
        own = out.flatten(2).gather(2, cell[:, None].expand(-1, out.shape[1], -1))  # [N, 5 + K, M]
        names = F.cross_entropy(own[:, BOX:], targets[..., 0].long().clamp_min(0), reduction="none")
        boxes = boxes_of(out).gather(1, cell[..., None].expand(-1, -1, 4))
        wrong = grid * (_centred(boxes) - _centred(targets[..., 1:])).abs().sum(-1)
        found: Tensor = objects + (there * (names + self.box_weight * wrong)).sum(1)
        return found

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        return self.losses(out, batch).mean()

    def predict(self, out: Tensor) -> Tensor:
        """Finds of every scene, `[N, G * G, 6]`: confidence (0: none), class, box; the surest first."""
        sure, name = confidences(out).max(-1)
        rows = torch.cat([sure[..., None], name[..., None].to(out.dtype), boxes_of(out)], -1)
        return suppressed(rows, self.least, self.apart)

    def scores(self, out: Tensor) -> Tensor:
        """Confidence of every cell in its likeliest class, `[N, G * G]`."""
        return confidences(out).amax(-1)


def _centred(boxes: Tensor) -> Tensor:
    """Centre and edges of boxes, `[..., 4]`."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def suppressed(rows: Tensor, least: float, apart: float) -> Tensor:
    """Finds `[N, D, 6]` sorted by confidence; those below `least`, or that overlap a surer one of their class, at 0."""
    order = rows[..., 0].argsort(dim=1, descending=True, stable=True)
    rows = rows.gather(1, order[..., None].expand_as(rows))
    keep = rows[..., 0] >= least  # [N, D]
    twins = (overlap(rows[..., 2:], rows[..., 2:]) > apart) & (rows[..., 1, None] == rows[..., None, :, 1])
    for k in range(1, rows.shape[1]):
        keep[:, k] &= ~(twins[:, k, :k] & keep[:, :k]).any(1)
    return torch.cat([(rows[..., :1] * keep[..., None]), rows[..., 1:]], -1)


def matched(found: Tensor, truth: Tensor, least_overlap: float = 0.5) -> Tensor:
    """Which finds are right, `[N, D, 6]`, `[N, M, 5]` -> `[N, D]` bool.

    The surest find comes first and takes the object of its class that it overlaps most, among those that nobody took.
    Finds must be sorted by confidence, as `Detection.predict` gives them.
    """
    same = (found[..., 1, None] == truth[:, None, :, 0]) & (truth[:, None, :, 0] >= 0)
    near = torch.where(same, overlap(found[..., 2:], truth[..., 1:]), -1.0)  # [N, D, M]
    free = torch.ones(truth.shape[:2], dtype=torch.bool, device=truth.device)
    hits = torch.zeros(found.shape[:2], dtype=torch.bool, device=found.device)
    for k in range(found.shape[1]):
        best, which = torch.where(free, near[:, k], -1.0).max(1)
        hits[:, k] = (best >= least_overlap) & (found[:, k, 0] > 0)
        free &= ~F.one_hot(which, truth.shape[1]).bool() | ~hits[:, k, None]
    return hits


def average_precision(hits: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    """Area under the best precision at each recall, of finds sorted by confidence.

    Args:
        hits: `[D]` bool.
        weights: `[R, D]` how often each find counts, in R countings.
        count: `[R]` objects that there were to find, more than 0.

    Returns:
        `[R]`.

    Source: Everingham et al., The Pascal Visual Object Classes Challenge: A Retrospective, IJCV 111, 2015.
    """
    right = (weights * hits).cumsum(1)
    precision = right / weights.cumsum(1).clamp_min(1e-12)
    best = precision.flip(1).cummax(1).values.flip(1)  # at this recall or a higher one
    area: Tensor = (best * weights * hits).sum(1) / count
    return area


@dataclass(frozen=True)
class MeanPrecision:
    """Mean over classes of the average precision, with a 95% interval over scenes.

    Args:
        value: on all scenes.
        low, high: quantiles of the same over scenes drawn with replacement.
    """

    value: float
    low: float
    high: float


def mean_precision(
    found: Tensor, truth: Tensor, draw: torch.Generator, least_overlap: float = 0.5, rounds: int = 200
) -> MeanPrecision:
    """Mean average precision of finds `[N, D, 6]` for objects `[N, M, 5]`, over the classes that occur.

    Source: Everingham et al. 2015 for the measure; Efron 1979 for the interval.
    """
    found, truth = found.detach().double().cpu(), truth.double().cpu()
    scenes, hits = len(found), matched(found, truth, least_overlap)
    drawn = torch.randint(scenes, (rounds, scenes), generator=draw)
    once = torch.ones(1 + rounds, scenes, dtype=torch.float64)
    times = torch.cat([once[:1], torch.zeros_like(once[1:]).scatter_add(1, drawn, once[1:])])  # [1 + rounds, N]
    where = (found[..., 0] > 0).nonzero()  # [finds, 2]
    where = where[found[where[:, 0], where[:, 1], 0].argsort(descending=True, stable=True)]
    name, hit = found[where[:, 0], where[:, 1], 1], hits[where[:, 0], where[:, 1]]
    sums, classes = torch.zeros(1 + rounds).double(), torch.zeros(1 + rounds).double()
    for k in truth[..., 0][truth[..., 0] >= 0].unique():
        count = times @ (truth[..., 0] == k).sum(1).double()
        own = name == k
        there = count > 0  # a class may be absent from scenes drawn with replacement
        sums += average_precision(hit[own], times[:, where[own, 0]], count.clamp_min(1.0)) * there
        classes += there
    means = sums / classes.clamp_min(1.0)
    low, high = means[1:].quantile(torch.tensor([0.025, 0.975]).double()).tolist() if rounds else (means[0], means[0])
    value = float(means[0])
    return MeanPrecision(value, min(value, float(low)), max(value, float(high)))
