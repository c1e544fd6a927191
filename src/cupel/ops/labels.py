"""Labels of channels that can be joined, and the tensors that carry them through a graph (see `ops.channels`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Flow:
    """A tensor on its way.

    Args:
        shape: of the tensor.
        labels: of its entries, as many axes; an axis is full, or 1 where nothing on it can be cut. `None`: nothing can.
        zero: whether entries are zero when what makes them is.
    """

    shape: tuple[int, ...]
    labels: Tensor | None = None
    zero: bool = True

    def tracked(self) -> list[int]:
        """Axes that carry labels."""
        return [] if self.labels is None else [d for d, n in enumerate(self.labels.shape) if n > 1]


@dataclass(frozen=True)
class Held:
    """A parameter or buffer, by its name."""

    name: str
    shape: tuple[int, ...]


@dataclass
class Labels:
    """Labels that can be joined, and the axes of weights that carry them."""

    parent: list[int] = field(default_factory=lambda: [0])
    held: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    makes: set[tuple[str, int]] = field(default_factory=set)
    splits: list[tuple[str, Tensor]] = field(default_factory=list)
    norms: set[str] = field(default_factory=set)

    def fresh(self, count: int) -> Tensor:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def join(self, one: Tensor, other: Tensor) -> None:
        """Entry by entry; the smaller label stands for both, so zero swallows what it meets."""
        for a, b in set(zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)):
            low, high = sorted((self.root(a), self.root(b)))
            self.parent[high] = low

    def fix(self, labels: Tensor | None) -> None:
        """These may never go."""
        if labels is not None:
            self.join(labels, torch.zeros_like(labels))

    def of(self, held: Held, dim: int, makes: bool = False) -> Tensor:
        """Labels `[n]` of an axis of a weight."""
        if makes:
            self.makes.add((held.name, dim))
        return self.held.setdefault(held.name, {}).setdefault(dim, self.fresh(held.shape[dim]))

    def tie(self, held: Held | None, dim: int, labels: Tensor | None, makes: bool = False) -> None:
        """The axis of a weight carries `labels`; it always stays where they are `None`."""
        if held is None:
            return
        own = self.of(held, dim, makes)
        if labels is None:
            self.fix(own)
        else:
            self.join(own, labels)

    def freeze(self, values: Iterable[Any]) -> None:
        """Nothing of these can go: an operation takes them that has no rule."""
        for value in values:
            if isinstance(value, Flow):
                self.fix(value.labels)
            elif isinstance(value, Held):
                for dim in range(len(value.shape)):
                    self.fix(self.of(value, dim))
            elif isinstance(value, (list, tuple)):
                self.freeze(value)

    def collapse(self, flow: Flow, dim: int) -> Flow:
        """The same tensor with one label for all entries along `dim`."""
        labels = flow.labels
        if labels is None or labels.shape[dim] == 1:
            return flow
        first = labels.narrow(dim, 0, 1)
        self.join(labels, first.expand_as(labels))
        return Flow(flow.shape, first, flow.zero)

    def along(self, flow: Flow, dim: int) -> Tensor | None:
        """Labels `[n]` on one axis; those on other axes are joined into it, or may not go."""
        dim %= len(flow.shape)
        if dim not in flow.tracked():
            self.fix(flow.labels)
            return None
        for other in flow.tracked():
            if other != dim:
                flow = self.collapse(flow, other)
        assert flow.labels is not None
        return flow.labels.flatten()


def laid(shape: tuple[int, ...], dim: int, own: Tensor | None, zero: bool = True) -> Flow:
    """A tensor with labels on one axis."""
    if own is None or len(own) == 1:
        return Flow(shape, None if own is None else own.reshape([1] * len(shape)), zero)
    return Flow(shape, own.reshape([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]), zero)


def aligned(labels: Tensor | None, ndim: int) -> Tensor | None:
    """Labels of a tensor that is broadcast to `ndim` axes."""
    return None if labels is None else labels.reshape([1] * (ndim - labels.ndim) + list(labels.shape))
