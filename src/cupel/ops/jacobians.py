"""Derivatives of every output of every example: after chosen parameters, counted through the network, or after inputs.

Jacobians come in chunks whose memory is bounded, so that any number of examples and parameters can be summed over.
They can themselves be differentiated after the inputs where gradients are on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils._pytree import tree_leaves, tree_map

MOST_BYTES = 64 * 2**20  # of one chunk of Jacobians


@dataclass(frozen=True)
class Numbering:
    """The trained floating parameters of a network as one flat vector, in the network's own order.

    >>> numbering = Numbering.of(nn.Linear(3, 2))
    >>> numbering.total, {name: at.tolist() for name, at in numbering.parts(torch.tensor([1, 5, 7])).items()}
    (8, {'weight': [1, 5], 'bias': [1]})
    """

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module) -> Numbering:
        """Of the parameters that are trained; one that several modules share counts once."""
        named = ((name, p) for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point())
        return cls({name: tuple(p.shape) for name, p in named})

    @property
    def total(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """Name, first number and the number after the last, of every parameter."""
        low = 0
        for name, shape in self.shapes.items():
            high = low + math.prod(shape)
            yield name, low, high
            low = high

    def parts(self, chosen: Tensor) -> dict[str, Tensor]:
        """Rising numbers `[S]` -> positions within each flattened parameter that holds one of them."""
        found = {name: chosen[(chosen >= low) & (chosen < high)] - low for name, low, high in self.spans()}
        return {name: at for name, at in found.items() if at.numel()}

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """Tensors by parameter name -> `[D]`."""
        return torch.cat([values[name].reshape(-1) for name in self.shapes])


def parameter_jacobians(
    model: nn.Module, inputs: Any, numbering: Numbering, chosen: Tensor | None = None, most: int = MOST_BYTES
) -> Iterator[tuple[Tensor, Tensor]]:
    """The network's own outputs and their derivatives after numbered parameters, a chunk of examples at a time.

    Args:
        model: in evaluation mode, with outputs `[B, K]` of which each row depends on its own example alone.
        inputs: a tensor `[B, ...]` or a nest of them.
        chosen: rising numbers `[S]`; all `D` if not given.
        most: bytes that one chunk of Jacobians takes at the most (a single example may take more).

    Yields:
        Outputs `[b, K]` and Jacobians `[b, K, S]` for consecutive examples.
    """
    own = dict(model.named_parameters())
    where = numbering.parts(chosen) if chosen is not None else dict.fromkeys(numbering.shapes)
    params = {name: own[name].detach() for name in where}
    count = len(tree_leaves(inputs)[0])
    if not count:
        return
    with torch.no_grad():
        width = model(_rows(inputs, 0, 1)).shape[1]
    entry = sum(p.numel() * p.element_size() for p in params.values())
    rows = max(1, most // max(1, entry * width))
    for low in range(0, count, rows):
        part = _rows(inputs, low, low + rows)
        found = _by_name(model, params, part)  # name -> [b, K, *shape]
        flat = [found[name].reshape(*found[name].shape[:2], -1) for name in where]  # of a scalar too
        flat = [j if at is None else j[:, :, at] for j, at in zip(flat, where.values(), strict=True)]
        yield model(part), torch.cat(flat, dim=2)


def input_jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """Derivatives of outputs `[B, K]` after their own inputs `[B, ...]`: `[B, K, ...]`. See `parameter_jacobians`."""

    def single(one: Tensor) -> Tensor:
        return model(one.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]

    try:
        return vmap(jacrev(single))(x)  # type: ignore[no-any-return]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a forward that looks at values, or an operation without a batching rule
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_(True)
            out = model(leaf)
            rows = [torch.autograd.grad(k.sum(), leaf, create_graph=keep, retain_graph=True)[0] for k in out.unbind(1)]
        return torch.stack(rows, dim=1)


def _rows(inputs: Any, low: int, high: int) -> Any:
    return tree_map(lambda t: t[low:high], inputs)


def _by_name(model: nn.Module, params: dict[str, Tensor], inputs: Any) -> Mapping[str, Tensor]:
    """Jacobians `[b, K, *shape]` by parameter name."""

    def single(values: dict[str, Tensor], one: Any) -> Tensor:
        out: Tensor = functional_call(model, values, (tree_map(lambda t: t.unsqueeze(0), one),))
        return out.squeeze(0)

    try:
        return vmap(jacrev(single), in_dims=(None, 0))(params, inputs)  # type: ignore[no-any-return]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a forward that looks at values, or an operation without a batching rule
        return _one_by_one(model, params, inputs)


def _one_by_one(model: nn.Module, params: Mapping[str, Tensor], inputs: Any) -> dict[str, Tensor]:
    """The same by one backward pass for every output of every example."""
    keep, found = torch.is_grad_enabled(), []
    leaves = {name: p.requires_grad_(True) for name, p in params.items()}
    for row in range(len(tree_leaves(inputs)[0])):
        with torch.enable_grad():
            out = functional_call(model, dict(leaves), (_rows(inputs, row, row + 1),))[0]
            for k in out.unbind():
                found.append(
                    torch.autograd.grad(
                        k, list(leaves.values()), create_graph=keep, retain_graph=True, materialize_grads=True
                    )
                )
    size = len(tree_leaves(inputs)[0])
    columns = zip(leaves, zip(*found, strict=True), strict=True)
    return {name: torch.stack(rows).unflatten(0, (size, -1)) for name, rows in columns}
