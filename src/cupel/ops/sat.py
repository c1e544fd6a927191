"""What training costs in matrix products, and on SAT, an FPGA array whose units run dense and N:M products.

The design is that of C. Fang, W. Sun, A. Zhou, Z. Wang, Efficient N:M Sparse DNN Training Using Algorithm,
Architecture, and Dataflow Co-Design, IEEE TCAD 2023, arXiv 2309.13015; the formulas are reconstructed from its
description: every unit multiplies one value a cycle, chosen from a group of m by the index of a stored weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log2

from torch import Tensor

from cupel.ops.accelerator import Device, Estimate
from cupel.ops.products import Product

DENSE = (1, 1)


@dataclass(frozen=True)
class Passes:
    """The products of one layer in a training step.

    Args:
        forward: outputs from inputs.
        backward: gradient of the inputs from that of the outputs; `None` in the first layer, which needs none.
        update: gradient of the weights.
    """

    forward: Product
    backward: Product | None
    update: Product

    def each(self) -> dict[str, Product]:
        """The products there are, by name."""
        found = {"forward": self.forward, "backward": self.backward, "update": self.update}
        return {name: p for name, p in found.items() if p is not None}


def passes_of(product: Product, first: bool = False) -> Passes:
    """The three products of a training step from the forward one; each has its multiply-adds.

    >>> steps = passes_of(Product(rows=8, depth=4, cols=2)).each()
    >>> [(name, p.rows, p.depth, p.cols) for name, p in steps.items()]
    [('forward', 8, 4, 2), ('backward', 4, 8, 2), ('update', 8, 2, 4)]
    """
    p = product
    back = replace(p, rows=p.depth, depth=p.rows, inputs=p.outputs, outputs=p.inputs)
    values = p.inputs + p.outputs
    update = replace(p, depth=p.cols, cols=p.depth, inputs=values, outputs=p.weights, weights=0)
    return Passes(p, None if first else back, update)


def training_macs(product: Product, ff: Tensor | None, bp: Tensor | None, first: bool = False) -> dict[str, int]:
    """Multiply-adds of a layer's training step, by pass, when weights that a mask drops are not multiplied.

    Args:
        product: of the forward pass.
        ff, bp: 0/1 masks of the weight in the forward and in the backward product; `None` for a dense one.
        first: the layer whose inputs need no gradient.
    """
    masks: dict[str, Tensor | None] = {"forward": ff, "backward": bp}
    found = {}
    for name, p in passes_of(product, first).each().items():
        mask = masks.get(name)
        found[name] = p.macs if mask is None else int(mask.sum()) * p.cols
    return found


def sat(product: Product, on: Device, n: int = 1, m: int = 1, interleave: bool = True) -> Estimate:
    """What one product costs on SAT, with `n` of every `m` stored along its sums (1 of 1: dense).

    The array of R x C units keeps outputs and walks ceil(rows/R) ceil(cols/C) tiles of `beats` cycles, or keeps
    weights and walks ceil(beats/R) ceil(rows/C) tiles of `cols` cycles, at least R, in which the next tile is loaded;
    `beats` is the depth, or ceil(depth/m) n of it. The shorter is taken, plus R + C to fill and drain; a product that
    moves more bytes than the memory brings in that time waits for them.

    Args:
        interleave: neighbouring sums take turns in a unit, so that none waits for its own last addition; without it
            each beat of kept outputs takes the adder's `adder_stages`.
    """
    r, c = int(on["rows"]), int(on["columns"])
    beats = ceil(product.depth / m) * n
    stages = 1 if interleave else int(on["adder_stages"])
    keep_outputs = ceil(product.rows / r) * ceil(product.cols / c) * beats * stages
    keep_weights = ceil(beats / r) * ceil(product.rows / c) * max(product.cols, r)
    index_bits = log2(m) if n < m else 0.0
    stored = product.weights * n / m * (on["value_bytes"] + index_bits / 8)
    traffic = ceil(on["value_bytes"] * (product.inputs + product.outputs) + stored)
    busy = product.groups * min(keep_outputs, keep_weights) + r + c
    macs = product.groups * product.rows * beats * product.cols
    # Both operands of a tile twice, one at work and one on its way, and its sums.
    tile = 2 * on["value_bytes"] * (r * m / n + c) * min(beats, r) + on["sum_bytes"] * r * c
    return Estimate(
        max(busy, ceil(traffic / on["bytes_a_cycle"])),
        macs * on["mac_joules"] + traffic * on["byte_joules"],
        traffic,
        ceil(tile),
        macs,
    )


def sat_update(weights: int, on: Device, n: int = 1, m: int = 1) -> Estimate:
    """Momentum's pass over the master weights: read and written with their velocity, and stored again for both passes.

    Args:
        weights: how many.
        n, m: of the stored copies, one for each direction; 1 of 1 stores one dense copy.
    """
    copies = (n / m) * 2 * (on["value_bytes"] + log2(m) / 8) if n < m else on["value_bytes"]
    traffic = ceil(weights * (4 * on["master_bytes"] + copies))
    lanes = ceil(weights / on["update_lanes"])
    cycles = max(lanes, ceil(traffic / on["bytes_a_cycle"]))
    return Estimate(cycles, traffic * on["byte_joules"], traffic)


def sat_step(
    products: Sequence[tuple[str, Product]],
    on: Device,
    sparse: Mapping[str, tuple[int, int]] | None = None,
    passes: Sequence[str] = ("forward", "backward"),
) -> dict[str, dict[str, Estimate]]:
    """The products of a training step on SAT: layer -> pass -> estimate.

    Args:
        products: of one forward in order, as `Ledger.products` gives them; the first is the first layer.
        sparse: layer -> (n, m); other layers are dense.
        passes: which of a layer's products use its N:M weights. SR-STE has the forward alone.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for i, (layer, product) in enumerate(products):
        ratio = (sparse or {}).get(layer, DENSE)
        for name, p in passes_of(product, first=i == 0).each().items():
            n, m = ratio if name in passes else DENSE
            here = found.setdefault(layer, {})
            here[name] = here.get(name, Estimate()) + sat(p, on, n, m)
    return found
