"""Sums, softmax and products over the edges of a graph, grouped by the node they arrive at."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def segment_sum(values: Tensor, into: Tensor, nodes: int) -> Tensor:
    """Sum of `values` `[E, ...]` over the edges of every node: `into` `[E]` -> `[nodes, ...]`.

    >>> segment_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 3).tolist()
    [1.0, 0.0, 6.0]
    """
    return values.new_zeros(nodes, *values.shape[1:]).index_add(0, into, values)


def segment_softmax(scores: Tensor, into: Tensor, nodes: int) -> Tensor:
    """Softmax of `scores` `[E]` over the edges that arrive at the same node; differentiable.

    >>> segment_softmax(torch.zeros(3), torch.tensor([0, 2, 2]), 3).tolist()
    [1.0, 0.5, 0.5]
    """
    top = scores.detach().new_full((nodes,), -torch.inf).scatter_reduce(0, into, scores.detach(), "amax")
    weight = (scores - top[into]).exp()
    return weight / segment_sum(weight, into, nodes)[into]


class Layout(NamedTuple):
    """The edges of a sparse matrix in the two orders that a product and its gradient walk through.

    Made once for a fixed graph; the weights of the edges may change at every call.

    Args:
        source: column of every edge, edges ordered by row, `[E]`.
        start: position of the first edge of every row, `[rows]`.
        order: the edges ordered by column, as positions in the first order, `[E]`.
        undo: the first order as positions in the second, `[E]`.
        back_source: row of every edge in the second order, `[E]`.
        back_start: position of the first edge of every column in the second order, `[columns]`.
    """

    source: Tensor
    start: Tensor
    order: Tensor
    undo: Tensor
    back_source: Tensor
    back_start: Tensor

    def turned(self) -> Layout:
        """The layout of the transposed matrix; its weights are those of this one at `order`."""
        return Layout(self.back_source, self.back_start, self.undo, self.order, self.source, self.start)


def layout(into: Tensor, source: Tensor, rows: int, columns: int) -> Layout:
    """The layout of edges `source[e] -> into[e]`, both `[E]`, with `into` in ascending order.

    Raises:
        ValueError: `into` is not sorted; the weights would land on other edges.
    """
    if len(into) > 1 and bool((into[1:] < into[:-1]).any()):
        raise ValueError("into must be in ascending order; got an unsorted one. Sort the edges by `into` first.")
    order = source.argsort(stable=True)
    undo = torch.empty_like(order)
    undo[order] = torch.arange(len(order), device=order.device)
    return Layout(source, _starts(into, rows), order, undo, into[order], _starts(source, columns))


def _starts(index: Tensor, count: int) -> Tensor:
    return torch.bincount(index, minlength=count).cumsum(0).roll(1).index_fill(0, index.new_zeros(1), 0)


def propagate(x: Tensor, weight: Tensor, edges: Layout) -> Tensor:
    """The sparse product A x: every row receives the weighted sum over its edges.

    Gradients flow to `x` alone; `weight` is a constant. (Where it must learn, use `segment_sum` of
    `weight * x[source]`, which stores a vector for every edge and is some thirty times slower.)

    Shapes: x `[columns, D]`, weight `[E]` in the order of `edges` -> `[rows, D]`.
    """
    out: Tensor = _Product.apply(x, weight, edges)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, edges: Layout) -> Tensor:
        ctx.weight, ctx.edges = weight, edges
        return F.embedding_bag(edges.source, x, edges.start, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        edges: Layout = ctx.edges
        return propagate(grads[0].contiguous(), ctx.weight[edges.order], edges.turned()), None, None
