"""Cycles of matrix products in few bits: on lanes of small multipliers that are recomposed, and on a SIMD core."""

from __future__ import annotations

from math import ceil

from cupel.ops.accelerator import Device, Estimate
from cupel.ops.products import Product

FP16 = "fp16"
Widths = tuple[int, int] | str  # bits of activations and of weights, or FP16


def macs_per_cycle(widths: Widths, on: Device) -> int:
    """Multiply-adds of one lane: its digit multipliers over the digit products of one, 1 in half precision."""
    if isinstance(widths, str):
        return 1  # 11-bit significands fill an array of 16 bits
    return max(1, int(on["digits"]) // (ceil(widths[0] / 2) * ceil(widths[1] / 2)))


def traffic_bytes(p: Product, widths: Widths, on: Device) -> int:
    """Bytes moved: everything once, and one factor again for every half buffer that the other one fills."""
    bits = (16, 16) if isinstance(widths, str) else widths
    weights, entering, leaving = (
        ceil(n * b / 8) for n, b in ((p.weights, bits[1]), (p.inputs, bits[0]), (p.outputs, bits[0]))
    )
    half = on["buffer_bytes"] / 2
    again = min(weights + entering * ceil(weights / half), entering + weights * ceil(entering / half))
    return max(again, weights + entering) + leaving


def processor_time(p: Product, widths: Widths, on: Device) -> tuple[Estimate, str, float]:
    """Cycles on the precision-scalable lanes, what bounds them, and the share of the multipliers that work."""
    lanes, outputs, fill = int(on["lanes"]), p.groups * p.rows, int(on["fill_cycles"])
    deep = ceil(p.depth / macs_per_cycle(widths, on))
    turns = min(  # outputs on the lanes, or positions: the lanes fill anew for every set of weights
        (ceil(outputs / lanes) * p.cols * deep, ceil(outputs / lanes)),
        (outputs * ceil(p.cols / lanes) * deep, outputs),
        key=lambda pair: pair[0] + fill * pair[1],
    )
    moved = traffic_bytes(p, widths, on)
    issued = ceil(turns[0] / on["vector_cycles"]) + ceil(moved / on["vector_bytes"])
    limits = {
        "multipliers": turns[0] + fill * turns[1],
        "memory": ceil(moved / on["bytes_per_cycle"]),
        "instructions": issued,
    }
    bound = max(limits, key=lambda name: limits[name])
    cycles = int(limits[bound] + on["setup_cycles"])
    pair = on["digits"] if isinstance(widths, str) else ceil(widths[0] / 2) * ceil(widths[1] / 2)
    joules = p.macs * pair * on["joules_per_digit"] + moved * on["joules_per_byte"]
    used = p.macs * pair / (cycles * lanes * on["digits"])
    return Estimate(cycles, joules, moved, int(on["buffer_bytes"]), p.macs), bound, used


def simd_time(p: Product, widths: Widths, on: Device) -> Estimate:
    """Cycles on a core whose dot products take 2, 4, 8 or 16 bits, both factors in the wider of their widths."""
    wide = 16 if isinstance(widths, str) else next(b for b in (2, 4, 8, 16) if b >= max(widths))
    each = 1 if isinstance(widths, str) else on["word_bits"] / wide
    dots = ceil(p.depth / each)
    loads = 1 / min(p.rows, on["unroll_rows"]) + 1 / min(p.cols, on["unroll_cols"])
    per_dot = on["fp16_cycles"] if isinstance(widths, str) else 1
    share = ceil(p.groups * p.rows / on["cores"]) * p.cols
    unfolded = 2 * ceil(p.groups * p.depth * p.cols / each / on["cores"]) if p.kernel > 1 else 0
    moved = traffic_bytes(p, (wide, wide), on)
    cycles = ceil(share * (dots * (per_dot + loads) + on["output_cycles"])) + unfolded
    instructions = p.groups * p.rows * p.cols * dots * (per_dot + loads) + unfolded
    joules = instructions * on["joules_per_dot"] + moved * on["joules_per_byte"]
    return Estimate(max(cycles, ceil(moved / on["bytes_per_cycle"])), joules, moved, int(on["buffer_bytes"]), p.macs)
