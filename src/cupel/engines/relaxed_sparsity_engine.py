"""Engine `relaxed-sparsity-engine`: cycles and results of products with few non-zeros in wide blocks (DeMM)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import CupelError, ParamError, PlanError
from cupel.core.params import check, param
from cupel.core.protocols import Card
from cupel.core.types import still
from cupel.ops.accelerator import Device, Estimate, device
from cupel.ops.integer_run import on_integers, runnable
from cupel.ops.ledger import ledger_of
from cupel.ops.products import Product
from cupel.ops.row_wise import decoupled, fine_beats, multiply, pack, systolic

CARD = Card(
    name="relaxed-sparsity-engine",
    family="compress",
    source="C. Peltekis, V. Titopoulos, C. Nicopoulos, G. Dimitrakopoulos, DeMM: A Decoupled Matrix Multiplication "
    "Engine Supporting Relaxed Structured Sparsity, IEEE Computer Architecture Letters 2024, arXiv 2401.08179",
    tags=("accelerator", "sparsity", "n:m", "simulator", "cycles"),
    needs=("weights",),
    tiny={"ports": 2, "block": 16},
)
ENGINES = ("decoupled", "systolic", "fine_1_of_4", "fine_2_of_4")


@dataclass(frozen=True)
class MatrixJob:
    """One product of integers.

    Args:
        sparse: `[rows, depth]`; its zeros are not stored.
        dense: `[depth, cols]`.
    """

    sparse: Tensor
    dense: Tensor


@dataclass(frozen=True)
class NetworkJob:
    """A batch through a pruned network, its linear and convolution layers on the engine in 8-bit integers.

    Args:
        model: not changed.
        inputs: of one batch, as the model is called.
    """

    model: nn.Module
    inputs: Any


@dataclass(frozen=True)
class Layer:
    """What one product did.

    Args:
        name: of the layer; empty for matrices.
        product: its sizes.
        nonzeros: of the sparse factor.
        passes: k of the pattern: every block of a row fits into k times the ports.
        cost: on each of `ENGINES`, for the non-zeros where they are.
        utilisation: share of the decoupled engine's multiplications over all cycles that meet a non-zero.
    """

    name: str
    product: Product
    nonzeros: int
    passes: int
    cost: dict[str, Estimate]
    utilisation: float


@dataclass(frozen=True)
class Trace:
    """What a job did.

    Args:
        result: of the matrices, int64, or the network's outputs.
        layers: in the order they ran.
        left_out: layers of the network with products that the engine did not run, such as attention.
        device: the described engine.
    """

    result: Tensor
    layers: tuple[Layer, ...]
    left_out: tuple[str, ...]
    device: Device = field(repr=False)

    def cost(self, engine: str = "decoupled") -> Estimate:
        """All layers, one after the other."""
        return sum((layer.cost[engine] for layer in self.layers), Estimate())

    @property
    def utilisation(self) -> float:
        """Of the decoupled engine over all layers."""
        useful = sum(layer.nonzeros * layer.product.cols for layer in self.layers)
        return useful / (self.cost().cycles * _multipliers(self.device)) if self.layers else 0.0


def _multipliers(on: Device) -> int:
    return int(on["ports"] * on["columns"])


def simulate(a: Tensor, b: Tensor, on: Device, buffered: bool = True, name: str = "") -> tuple[Tensor, Layer]:
    """The product of two integer matrices by the engine's own order of work, and what it costs here and elsewhere.

    Raises:
        CupelError: the engine's product is not the plain one, or a sum does not fit into 32 bits.
    """
    packed = pack(a, int(on["ports"]), int(on["block"]))
    found = multiply(packed, b)
    if not torch.equal(found, (a.double() @ b.double()).long()):
        raise CupelError("the engine's product must be the plain one; it is not. Report this job.")
    if found.numel() and int(found.abs().max()) >= 2**31:
        raise CupelError(
            f"sums must fit into 32 bits; the largest is {int(found.abs().max())}. Give matrices of smaller values."
        )
    product = Product(len(a), a.shape[1], b.shape[1], 1, 1, b.numel(), found.numel(), a.numel())
    cost = {"decoupled": decoupled(product, on, packed.passes, buffered), "systolic": systolic(product, on)}
    for n in (1, 2):
        beats = fine_beats(a, n, int(on["array_rows"]))
        cost[f"fine_{n}_of_4"] = systolic(product, on, n, beats)
    useful = packed.nonzeros * product.cols
    share = useful / (cost["decoupled"].cycles * _multipliers(on))
    return found, Layer(name, product, packed.nonzeros, packed.passes, cost, share)


@dataclass(frozen=True)
class RelaxedSparsityEngine:
    r"""Multiply a matrix with N non-zeros in every block of M by a dense one, and count the cycles of doing so.

    A tile of the dense matrix, M rows of C columns, lies in a memory with one write and N read ports. Every stored
    (value, place) of a row reads its row of the tile; N products of C columns are formed at once and added to the
    row's sums. A pattern of kN:M takes k cycles a row. With two tiles, T of them take
    M + (T - 1) max(M, k rows) + k rows + 2 + ceil(log2 N) cycles. Results are those of integers, bit for bit, and
    each product is timed beside three arrays of N C multipliers: systolic dense, and fine-grained 1:4 and 2:4.

    Use: to see what a pruned network's real pattern is worth on hardware before there is any. Not for networks denser
    than half: the ports are then shared by so many passes that a dense array is as fast.

    Costs: nothing is trained. Each layer is multiplied in Python slot by slot, about a second for 10^9 products.

    Shapes: sparse `[rows, depth]`, dense `[depth, cols]`; a convolution is the product of its kernel `[out, in k k]`
    with the unfolded batch `[in k k, positions]`.

    Raises:
        ParamError: `ports` above `block`, or multipliers that do not fill the rows of the rival array.
        PlanError: matrices that are no integers or do not fit; a network without a layer to run.
        CupelError: a sum that leaves 32 bits.

    Source: Peltekis, Titopoulos, Nicopoulos, Dimitrakopoulos 2024, arXiv 2401.08179.

    Departs: cycle formulas are reconstructed from the description. k is one number a layer, from the fullest block. A
    block that the depth does not fill is written in full time. The rivals are ideal in what they load: the group
    values of a tile arrive as fast as the dense tile. No area, power or joules: no figures were at hand. Networks run
    in 8 bits with one scale a tensor, those of the activations from the batch itself.

    Example:
        >>> from cupel.core.context import Context
        >>> job = MatrixJob(torch.tensor([[0, 3], [2, 0]]), torch.tensor([[1, 2], [3, 4]]))
        >>> trace = RelaxedSparsityEngine(ports=1, block=2).run(job, Context())
        >>> trace.result.tolist(), trace.cost().cycles, trace.layers[0].passes
        ([[9, 12], [2, 4]], 6, 1)
    """

    device: str = param("demm", "description of the engine, a file in ops/devices")
    ports: int | None = param(None, "N: rows read at once (none: the description's)", ge=1)
    block: int | None = param(None, "M: rows of the tile (none: the description's)", ge=2)
    columns: int | None = param(None, "C: columns of the tile (none: the description's)", ge=1)
    buffered: bool = param(True, "a second tile is written while the first is read")

    def run(self, job: MatrixJob | NetworkJob, ctx: Context) -> Trace:
        """Multiply and count."""
        check(self)
        on = self.described()
        if isinstance(job, NetworkJob):
            return _network(job, on, self.buffered)
        a, b = job.sparse, job.dense
        if a.is_floating_point() or b.is_floating_point() or a.ndim != 2 or b.ndim != 2 or a.shape[1] != len(b):
            raise PlanError(
                f"matrices must be of integers, [rows, depth] and [depth, cols]; got {a.dtype} {tuple(a.shape)} and "
                f"{b.dtype} {tuple(b.shape)}. Quantize them, or give a NetworkJob."
            )
        result, layer = simulate(a, b, on, self.buffered)
        return Trace(result, (layer,), (), on)

    def described(self) -> Device:
        """The device with this engine's own sizes."""
        try:
            found = device(self.device)
        except ValueError as error:
            raise ParamError(str(error)) from None
        own = {k: v for k in ("ports", "block", "columns") if (v := getattr(self, k)) is not None}
        found = replace(found, figures={**found.figures, **own})
        if found["ports"] > found["block"]:
            raise ParamError(f"ports must be at most block, {found['block']:g}; got {found['ports']:g}. Lower ports.")
        if _multipliers(found) % found["array_rows"]:
            raise ParamError(
                f"ports times columns must be a multiple of {found['array_rows']:g}, the rows of the array beside the "
                f"engine; got {_multipliers(found)}. Change columns."
            )
        return found


@torch.no_grad()
def _network(job: NetworkJob, on: Device, buffered: bool) -> Trace:
    ran: list[Layer] = []

    def multiply(name: str, a: Tensor, b: Tensor) -> Tensor:
        found, layer = simulate(a, b, on, buffered, name)
        ran.append(layer)
        return found

    with still(job.model):
        products = ledger_of(job.model, job.inputs).products()
        mine = runnable(job.model)
        if not any(name in mine for name, _ in products):
            raise PlanError(
                "a network for relaxed-sparsity-engine must call a linear or convolution layer; this one calls none. "
                "Give matrices in a MatrixJob."
            )
        with on_integers(job.model, multiply):
            result: Tensor = job.model(job.inputs)
    left = tuple(dict.fromkeys(name for name, _ in products if name not in mine))
    return Trace(result, tuple(ran), left, on)
