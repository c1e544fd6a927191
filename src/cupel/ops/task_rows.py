"""Examples of several tasks under one network: which task each row belongs to, and batches of one task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cupel.core.errors import ContractError
from cupel.core.types import Batch, Dataset, Examples


@dataclass(frozen=True)
class TaskExamples(Examples):
    """Examples that know their task; a shuffled batch holds rows of one task only.

    Args:
        tasks: number of every row's task, `[N]` int64.
        names: of the tasks, by number.
    """

    tasks: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.tasks) != len(self.targets):
            raise ContractError(
                f"every row must have one task; got {len(self.tasks)} tasks for {len(self.targets)} rows. "
                "Build them from the same rows."
            )

    def take(self, rows: Tensor) -> TaskExamples:
        return TaskExamples(self.inputs[rows], self.targets[rows], self.index[rows], self.tasks[rows], self.names)

    def batches(self, size: int, draw: torch.Generator | None = None) -> Iterator[Batch]:
        """With a draw: batches of one task each, pooled and shuffled. Without: as many, the rows in their own order."""
        groups = [group for k in range(len(self.names)) for group in self._cut(k, size, draw)]
        if draw is None:
            edges = torch.linspace(0, len(self), max(len(groups), 1) + 1).round().long().tolist()
            chosen = [torch.arange(low, high) for low, high in pairwise(edges)]
        else:
            chosen = [groups[k] for k in torch.randperm(len(groups), generator=draw).tolist()]
        for rows in chosen:
            yield Batch(self.inputs[rows], self.targets[rows], self.index[rows])

    def _cut(self, task: int, size: int, draw: torch.Generator | None) -> list[Tensor]:
        """The rows of one task in pieces of `size`; a last piece of one joins the piece before it."""
        rows = (self.tasks == task).nonzero().flatten()
        if draw is not None:
            rows = rows[torch.randperm(len(rows), generator=draw)]
        pieces = list(rows.split(size)) if len(rows) else []
        if size > 1 and len(pieces) > 1 and len(pieces[-1]) == 1:
            last = pieces.pop()
            pieces[-1] = torch.cat([pieces[-1], last])
        return pieces


def tasks_of(data: Dataset) -> tuple[Tensor, tuple[str, ...]]:
    """Task number of every row of `data` and the tasks' names; one unnamed task where the data tell of none."""
    if isinstance(data, TaskExamples):
        return data.tasks, data.names
    return torch.zeros(len(data), dtype=torch.long), ("",)
