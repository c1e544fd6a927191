"""A shared encoder of token numbers with one linear head a task."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

OTHER = -1e4  # logit of another task's class: its probability is exactly zero at any sensible temperature


class MeanPool(nn.Module):
    """Mean of the vectors at places that are not padding: `[B, T, D]`, `[B, T]` -> `[B, D]`."""

    def forward(self, vectors: Tensor, tokens: Tensor) -> Tensor:
        there = tokens.ne(0).unsqueeze(2).to(vectors.dtype)  # [B, T, 1]
        return (vectors * there).sum(1) / there.sum(1).clamp(min=1.0)


class TaskHeads(nn.Module):
    """A linear head for each task; a row keeps the logits of its own task's classes, the others are `OTHER`.

    The row's task number travels as the last feature, so that rows may be dropped, repeated or mixed freely.

    Shapes: `[B, H + 1]` -> `[B, K]`, the tasks' classes side by side.
    """

    own: Tensor  # [tasks, K], which classes are a task's

    def __init__(self, features: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.tasks = nn.ModuleList(nn.Linear(features, count) for count in classes)
        own = torch.zeros(len(classes), sum(classes), dtype=torch.bool)
        for row, (start, count) in enumerate(zip(accumulate([0, *classes]), classes, strict=False)):
            own[row, start : start + count] = True
        self.register_buffer("own", own)

    def forward(self, z: Tensor) -> Tensor:
        h, task = z[:, :-1], z[:, -1].long()
        logits = torch.cat([head(h) for head in self.tasks], dim=1)
        return logits.masked_fill(~self.own[task], OTHER)


class MultiTaskText(nn.Module):
    """Mean of token vectors, one hidden layer, both shared; then the head of the row's task.

    Shapes: int64 `[B, 1 + T]`, the task's number and T token numbers, 0 for padding -> logits `[B, sum of classes]`.
    """

    def __init__(self, vocabulary: int, dim: int, hidden: int, classes: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.pool = MeanPool()
        self.hidden = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
        self.drop = nn.Dropout(dropout)
        self.head = TaskHeads(hidden, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """First vectors are small, so that words that were hardly ever seen hardly speak."""
        self.embed.reset_parameters()
        with torch.no_grad():
            self.embed.weight.div_(self.embed.embedding_dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, 1 + T]
        task, tokens = x[:, :1], x[:, 1:]
        h = self.drop(self.hidden(self.pool(self.embed(tokens), tokens)))  # [B, H]
        logits: Tensor = self.head(torch.cat([h, task.to(h.dtype)], dim=1))
        return logits
