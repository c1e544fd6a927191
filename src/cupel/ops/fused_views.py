"""Scenes of several sensors, as an adversary who lies to one of them sees and changes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.scorecard import Reading, mean_of
from cupel.core.types import Bounds, Task
from cupel.ops.detection import MeanPrecision, mean_precision, object_scores
from cupel.ops.patches import on_channels, pasted


@dataclass(frozen=True)
class Scenes:
    """Scenes of one split, on the device: inputs `[N, C, H, W]` and targets `[N, M, 5]`."""

    x: Tensor
    truth: Tensor

    @property
    def there(self) -> Tensor:
        return self.truth[..., 0] >= 0

    @property
    def boxes(self) -> Tensor:
        """In pixels, `[N, M, 4]`."""
        height, width = self.x.shape[-2:]
        return self.truth[..., 1:] * self.truth.new_tensor([width, height, width, height])

    def take(self, rows: Tensor) -> Scenes:
        return Scenes(self.x[rows], self.truth[rows])


@dataclass(frozen=True)
class Stage:
    """A detector under attack through one sensor.

    Args:
        rows, others: channels of the attacked sensor, and of all others.
        seen, held: scenes that the adversary learns from, and those it is judged on.
    """

    model: nn.Module
    task: Task
    bounds: Bounds
    rows: tuple[int, ...]
    others: tuple[int, ...]
    seen: Scenes
    held: Scenes
    draw: Callable[[str], torch.Generator]  # by name, the same each time

    def out(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model(part) for part in x.split(500)])

    def precision(self, x: Tensor) -> MeanPrecision:
        """On held-out scenes; the interval's draws are the same each time."""
        return mean_precision(self.task.predict(self.out(x)), self.held.truth, self.draw("interval"))

    def target(self, x: Tensor) -> Reading:
        """How surely the first object of each held-out scene is found and named."""
        return mean_of(object_scores(self.out(x), self.held.truth)[:, 0].tolist(), "share", "higher")

    def blank(self, size: int) -> Tensor:
        return torch.zeros(len(self.rows), size, size, device=self.seen.x.device)

    def shown(self, patch: Tensor, rects: Tensor) -> Tensor:
        """Held-out scenes with the patch at its own size and brightness."""
        return pasted(self.held.x, patch.expand(len(rects), *patch.shape), rects, self.rows)

    def dark(self, rows: tuple[int, ...]) -> Tensor:
        """Held-out scenes in which some channels see nothing."""
        return on_channels(self.held.x, rows, lambda part: torch.full_like(part, self.bounds.low))
