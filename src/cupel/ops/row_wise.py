"""A sparse matrix packed in blocks, its row-wise product with a dense one, and the cycles of engines that compute it.

The decoupled engine is that of C. Peltekis, V. Titopoulos, C. Nicopoulos, G. Dimitrakopoulos, DeMM: A Decoupled Matrix
Multiplication Engine Supporting Relaxed Structured Sparsity, IEEE Computer Architecture Letters 2024, arXiv 2401.08179;
its rivals are a weight-stationary systolic array of as many multipliers, plain or with n of 4 values of a group. All
engines hold a tile of the dense matrix and let the rows of the sparse one pass. Cycle formulas are reconstructed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.ops.accelerator import Device, Estimate
from cupel.ops.products import Product

GROUP = 4  # neighbouring entries that a fine-grained array chooses from


@dataclass(frozen=True)
class Packed:
    """A sparse matrix as values and their places, `slots` of them in every block of every row.

    Args:
        values: `[rows, blocks, slots]`; unused slots hold zeros.
        places: column within the block, of the same shape, in [0, block).
        block: columns of a block.
        depth: columns of the matrix; the last block may be shorter.
        passes: reads of `slots / passes` places that a row takes in every block.
    """

    values: Tensor
    places: Tensor
    block: int
    depth: int
    passes: int

    @property
    def nonzeros(self) -> int:
        return int((self.values != 0).sum())

    @property
    def bytes(self) -> int:
        """What it takes to store one-byte values and places of log2(block) bits, padding included."""
        return ceil(self.values.numel() * (1 + log2(self.block) / 8))


def fullest(a: Tensor, block: int) -> int:
    """Most non-zeros in a block of a row of `a` `[rows, depth]`."""
    return int(_blocks(a != 0, block).sum(-1).max()) if a.numel() else 0


def pack(a: Tensor, ports: int, block: int) -> Packed:
    """Pack `a` `[rows, depth]` with as many slots a block as the fullest block needs, in whole passes of `ports`.

    >>> packed = pack(torch.tensor([[0, 5, 0, 7], [0, 0, 0, 0]]), ports=1, block=4)
    >>> packed.passes, packed.values[0, 0].tolist(), packed.places[0, 0].tolist()
    (2, [5, 7], [1, 3])
    """
    passes = max(1, ceil(fullest(a, block) / ports))
    slots = passes * ports
    parts = _blocks(a, block)  # [rows, blocks, block]
    places = (parts != 0).int().argsort(dim=-1, descending=True, stable=True)[..., :slots]
    values = parts.gather(-1, places)
    places = places * (values != 0)  # an unused slot reads the first row of the tile, which is always there
    spare = (0, slots - values.shape[-1])
    return Packed(F.pad(values, spare), F.pad(places, spare), block, a.shape[1], passes)


def multiply(packed: Packed, b: Tensor) -> Tensor:
    """The product with `b` `[depth, cols]` as the engine forms it: rows of `b` read by place, products, sums.

    Exact for integers, in 64 bits: `[rows, cols]`.
    """
    out = torch.zeros(len(packed.values), b.shape[1], dtype=torch.int64)
    for i in range(packed.values.shape[1]):
        held = b[i * packed.block : (i + 1) * packed.block].long()  # the tile in the memory
        for slot in range(packed.values.shape[2]):
            out += packed.values[:, i, slot, None].long() * held[packed.places[:, i, slot]]
    return out


def _blocks(a: Tensor, block: int) -> Tensor:
    """`[rows, depth]` in blocks, the last filled with zeros: `[rows, blocks, block]`."""
    rows, depth = a.shape
    return F.pad(a, (0, -depth % block)).view(rows, -1, block)


def latency(ports: int) -> int:
    """Cycles after a read: the products, a tree that adds `ports` of them, and the sum with what the row has."""
    return 2 + ceil(log2(ports))


def decoupled(product: Product, on: Device, passes: int = 1, buffered: bool = True) -> Estimate:
    """What a product costs on the decoupled engine.

    A tile holds `block` rows and `columns` columns of the dense matrix; one row of it is written in a cycle, and a
    shorter last block takes as long. A row of the sparse matrix takes `passes` cycles a tile, each with one read from
    every port. With two tiles the next one is written meanwhile, so that a tile takes the longer of both.
    """
    ports, block, columns = (int(on[name]) for name in ("ports", "block", "columns"))
    blocks, across = ceil(product.depth / block), ceil(product.cols / columns)
    tiles, compute = blocks * across, passes * product.rows
    slow = max(block, compute) if buffered else block + compute
    cycles = block + (tiles - 1) * slow + compute + latency(ports)
    slots = product.rows * blocks * ports * passes
    stored = slots * (on["value_bytes"] + log2(block) / 8)
    dense = product.depth * product.cols * on["value_bytes"] + product.rows * product.cols * on["sum_bytes"]
    memory = (1 + buffered) * block * columns * on["value_bytes"] + product.rows * columns * on["sum_bytes"]
    return Estimate(
        product.groups * cycles,
        float("nan"),
        product.groups * ceil(stored * across + dense),
        ceil(memory),
        product.groups * slots * product.cols,
    )


def systolic(product: Product, on: Device, n: int = GROUP, beats: int | None = None) -> Estimate:
    """What a product costs on a systolic array of as many multipliers, plain or with `n` of 4 values of a group.

    The array has R x C multipliers; it loads a tile of the dense matrix in R cycles, then `rows` rows pass, and the
    last sum leaves R + C - 2 cycles later. Plain (n = 4) the tile is R deep. Otherwise n array rows share the values
    of a group of four, each choosing one, so that R of them cover 4 R / n entries of the depth.

    Args:
        beats: rows that pass, summed over the tiles of one column of them (`fine_beats`); `rows` for each if none.
    """
    r = int(on["array_rows"])
    c = int(on["ports"] * on["columns"]) // r
    deep, across = ceil(product.depth / (GROUP * r // n)), ceil(product.cols / c)
    passing = deep * product.rows if beats is None else beats
    cycles = across * (passing + deep * (2 * r + c - 2))
    index = 0.0 if n == GROUP else 2 / 8
    stored = passing * r * (on["value_bytes"] + index)
    dense = product.depth * product.cols * on["value_bytes"] + product.rows * product.cols * on["sum_bytes"]
    memory = r * c * GROUP / n * on["value_bytes"] + product.rows * c * on["sum_bytes"]
    return Estimate(
        product.groups * cycles,
        float("nan"),
        product.groups * ceil(stored * across + dense),
        ceil(memory),
        product.groups * passing * r * c * across,
    )


def fine_beats(a: Tensor, n: int, array_rows: int) -> int:
    """Rows that pass a fine-grained array for `a` `[rows, depth]`, summed over its tiles along the depth.

    A row passes a tile once, or as often as the fullest of its groups of four there needs with `n` values at a time:
    all groups of a tile move together.
    """
    full = _blocks(a != 0, GROUP).sum(-1)  # [rows, groups]
    deepest = _blocks(full, array_rows // n).amax(-1)  # [rows, tiles]
    return int(((deepest + n - 1) // n).clamp_min(1).sum())
