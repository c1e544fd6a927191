"""What the first linear layer of a network cannot see: its matrix over whole inputs, and what it maps to zero."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.ops.chains import Link, calls

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)


def first_linear(model: nn.Module, x: Tensor) -> tuple[nn.Module, tuple[int, ...]] | None:
    """The linear layer that alone meets the inputs, and the shape `[1, ...]` it gets them in; `None` if none does.

    Only layers that move no value may stand before it; `x` `[1, ...]` is one input.
    """
    found, _ = calls(model, x)
    at = x
    while True:
        users = [link for link in found if link.entered is at and not _passes(link)]
        if len(users) != 1:
            return None
        if isinstance(users[0].layer, LINEAR):
            return users[0].layer, tuple(at.shape)
        if not isinstance(users[0].layer, _RESHAPES):
            return None
        at = users[0].left


def _passes(link: Link) -> bool:
    """Whether a layer hands on the very tensor it got: dropout in evaluation mode."""
    return isinstance(link.layer, _RESHAPES) and link.left is link.entered


def matrix_of(layer: nn.Module, shape: tuple[int, ...], batch: int = 256) -> Tensor:
    """A `[m, d]` with layer(x) = A x + b for flattened inputs of `shape` `[1, ...]`, in double precision."""
    twin = copy.deepcopy(layer).double().cpu()
    width = 1
    for side in shape[1:]:
        width *= side
    with torch.no_grad():
        zero = twin(torch.zeros(shape, dtype=torch.float64)).flatten(1)
        rows = torch.eye(width, dtype=torch.float64).view(width, *shape[1:]).split(batch)
        columns = torch.cat([twin(part).flatten(1) - zero for part in rows])  # [d, m]
    return columns.T.contiguous()


@dataclass(frozen=True)
class Spectrum:
    """Input directions of a linear layer by how much of them it sees.

    Args:
        values: `[d]` singular values, falling; zero beyond the rows of the matrix.
        directions: `[d, d]`, one orthonormal direction a row, in the same order.
        rank: how many directions are seen at all.
    """

    values: Tensor
    directions: Tensor
    rank: int

    @property
    def hidden(self) -> Tensor:
        """An orthonormal basis of the harmless space, `[d - rank, d]`."""
        return self.directions[self.rank :]

    def harmless(self, delta: Tensor) -> Tensor:
        """The part of changes `[N, ...]` that the layer cannot see."""
        flat = delta.flatten(1).to(self.directions)
        return (flat @ self.hidden.T @ self.hidden).view(delta.shape)


def spectrum(matrix: Tensor) -> Spectrum:
    """The singular directions of `matrix` `[m, d]`, all d of them.

    >>> found = spectrum(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).double())
    >>> found.rank, found.values.tolist(), found.hidden.abs().tolist()
    (2, [3.0, 1.0, 0.0], [[0.0, 1.0, 0.0]])
    """
    _, some, directions = torch.linalg.svd(matrix, full_matrices=True)
    values = torch.cat([some, some.new_zeros(matrix.shape[1] - len(some))])
    floor = max(matrix.shape) * torch.finfo(matrix.dtype).eps * float(some[0]) if len(some) else 0.0
    return Spectrum(values, directions, int((some > floor).sum()))
