"""Cycles of training on a cluster of cores with SIMD instructions, shared floating-point units and a small memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from cupel.ops.accelerator import Device
from cupel.ops.half import Form
from cupel.ops.lowered import Step
from cupel.ops.products import Product


@dataclass(frozen=True)
class StepTime:
    """Cycles of one matrix product of a training step.

    Args:
        step: the product.
        multiply: of the product itself.
        transform: of unfolding and transposing its factors first.
        transfer: to and from the outer memory; runs beside the other two.
        update: of the weights, behind their gradient.
        macs: multiply-adds that count: those of the forward, without the zeros between strided gradients.
    """

    step: Step
    multiply: int
    transform: int
    transfer: int
    update: int = 0
    macs: int = 0

    @property
    def cycles(self) -> int:
        return max(self.multiply + self.transform, self.transfer) + self.update


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds: weights, their gradients, saved activations, the largest unfolded input."""

    weights: int
    gradients: int
    activations: int
    unfolded: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.activations + self.unfolded


def _core(rows: int, depth: int, cols: int, pairs: int, on: Device) -> int:
    """One core on `rows` x `cols` outputs: full tiles of the unrolled loop, and what is left over in smaller ones."""

    def sides(count: int, most: int) -> list[tuple[int, int]]:
        return [(most, count // most), (count % most, 1)] if count % most else [(most, count // most)]

    loops, total = ceil(depth / pairs), 0.0
    for u, many in sides(rows, int(on["unroll_rows"])):
        for v, often in sides(cols, int(on["unroll_cols"])):
            inner = loops * (u * v + u + v)  # multiply-adds, loads of rows, loads of columns
            ends = u * v * (pairs - 1) + u * v / pairs + on["tile_cycles"]  # sums within a word, stores
            total += many * often * (inner + ends)
    return ceil(total)


def multiply_cycles(p: Product, form: Form, on: Device) -> int:
    """A matrix product split over the cores by groups, rows or columns, whichever takes least time."""
    pairs, cores = int(on["word_bytes"]) // form.bytes, int(on["cores"])
    by_rows = p.groups * _core(ceil(p.rows / cores), p.depth, p.cols, pairs, on)
    by_cols = p.groups * _core(p.rows, p.depth, ceil(p.cols / cores), pairs, on)
    by_groups = ceil(p.groups / cores) * _core(p.rows, p.depth, p.cols, pairs, on)
    instructions = p.groups * p.rows * p.cols * (ceil(p.depth / pairs) + pairs - 1)
    return max(min(by_rows, by_cols, by_groups), ceil(instructions / on["fpus"]))


def moved_values(step: Step, forward: Product, form: Form, on: Device) -> list[int]:
    """Values that each transform before the product of `step` moves.

    Unfolding repeats what enters a kernel; it is needed in every format. SIMD instructions need both factors in the
    order of the depth: unfolding then writes rows for it at no further cost, and what is not unfolded is transposed.
    """
    simd = on["word_bytes"] > form.bytes
    if step.kind == "WG":  # both factors lie along the positions already
        return [forward.groups * forward.depth * forward.cols] if forward.kernel > 1 else []
    p = step.product
    if forward.kernel > 1:
        unfolded = [p.groups * p.depth * p.cols]
        return unfolded if step.kind == "FW" else [*unfolded, p.weights]  # kernels turned and exchanged
    columns = [p.inputs] if simd and p.cols > 1 else []
    return columns + ([p.weights] if simd and step.kind == "IG" else [])


def step_time(step: Step, forward: Product, form: Form, on: Device) -> StepTime:
    """Cycles of one product of a training step; `forward` is the forward product of its layer."""
    cores, p = on["cores"], step.product
    moves = moved_values(step, forward, form, on)
    transform = sum(int(ceil(n / cores) * on["move_cycles"] + on["fork_cycles"]) for n in moves)
    numbers = p.weights + p.inputs + p.outputs
    tiles = ceil((numbers + max(moves, default=0)) * form.bytes / (on["l1_bytes"] / 2))
    transfer = ceil(numbers * form.bytes / on["dma_bytes_per_cycle"] + tiles * on["dma_setup_cycles"])
    multiply = int(multiply_cycles(p, form, on) + on["fork_cycles"])
    update = 0
    if step.kind == "WG":
        words = ceil(forward.weights / (on["word_bytes"] // form.bytes))
        update = int(ceil(words / cores) * on["update_cycles"] + on["fork_cycles"])
    return StepTime(step, multiply, transform, transfer, update, forward.macs)


def memory_of(steps: Sequence[Step], form: Form) -> Memory:
    """What is held for a training step with `steps`, in the bytes of `form`."""
    forward = {step.name: step.product for step in steps if step.kind == "FW"}
    trained = [forward[step.name] for step in steps if step.kind == "WG"]
    unfolded = [p.groups * p.depth * p.cols for p in forward.values() if p.kernel > 1]
    return Memory(
        sum(p.weights for p in forward.values()) * form.bytes,
        sum(p.weights for p in trained) * form.bytes,
        sum(p.inputs for p in trained) * form.bytes,
        max(unfolded, default=0) * form.bytes,
    )
