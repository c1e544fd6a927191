"""Engine `riscv-precision-scalable`: integers of 2 to 16 bits and half precision on one array of small multipliers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.params import check, param
from cupel.core.protocols import Card
from cupel.ops.accelerator import Estimate, device
from cupel.ops.integer_layers import IntLayer, codes_of, pooled, product_of, sums_of
from cupel.ops.lowered import training_steps
from cupel.ops.multipliers import WIDTHS, fp16_dot
from cupel.ops.precisions import FP16, Widths, macs_per_cycle, processor_time, simd_time
from cupel.ops.products import Product

CARD = Card(
    name="riscv-precision-scalable",
    family="compress",
    source="L. Huang, C. Fang, Q. Li, J. Lin, Z. Wang, A Precision-Scalable RISC-V DNN Processor with On-Device "
    "Learning Capability at the Extreme Edge, ASP-DAC 2024, arXiv 2309.08186",
    tags=("accelerator", "quantization", "mixed precision", "fp16", "risc-v", "energy"),
    tiny={"digit": 4},
)


@dataclass(frozen=True)
class IntegerJob:
    """Layers in integers, and the unsigned codes `[B, C, H, W]` that enter the first."""

    layers: tuple[IntLayer, ...]
    codes: Tensor


@dataclass(frozen=True)
class HalfJob:
    """A product of half-precision matrices given as bit patterns: a `[M, K]`, b `[K, N]`."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class ShapeJob:
    """Products to be timed.

    Args:
        products: with the names of their layers.
        widths: of every layer, or of the named ones with `""` for all others.
        training: forward and both gradients of all of them instead of the forward alone.
    """

    products: tuple[tuple[str, Product], ...]
    widths: Widths | Mapping[str, Widths]
    training: bool = False


@dataclass(frozen=True)
class LayerTime:
    """What one product costs.

    Args:
        name, kind: of the layer; `FW`, `WG` or `IG`.
        widths: it was computed in.
        product: its sizes.
        estimate: of the device.
        rival: of the SIMD core.
        bound: what it waits for: `multipliers`, `memory` or `instructions`.
        used: share of the digit multipliers that work, over the whole time.
        intensity: multiply-adds a byte moved; with `estimate` a point of the roofline.
    """

    name: str
    kind: str
    widths: Widths
    product: Product
    estimate: Estimate
    rival: Estimate
    bound: str
    used: float
    intensity: float


@dataclass(frozen=True)
class Forecast:
    """All products of a job, and their totals; `ridge` is the intensity at which memory stops to be the limit."""

    layers: tuple[LayerTime, ...]
    estimate: Estimate
    rival: Estimate
    ridge: Mapping[Widths, float]

    @property
    def speed_up(self) -> float:
        """Over the rival, at equal clocks."""
        return self.rival.cycles / self.estimate.cycles


@dataclass(frozen=True)
class IntegerTrace:
    """The 32-bit sums and the codes that leave every layer, and the time of what was computed."""

    sums: tuple[Tensor, ...]
    codes: tuple[Tensor, ...]
    forecast: Forecast


@dataclass(frozen=True)
class RiscvPrecisionScalable:
    r"""Recompose one array of small multipliers for every precision, and count the cycles of a network in each.

    a and b are cut into digits of d bits, the top one signed: a b = sum_ij a_i b_j 2^(d (i + j)). A dot product first
    adds digit products of equal weight over its whole depth, shifts each sum once, and keeps 32 bits; then
    y = clip((acc mult + 2^(s-1)) >> s). Half-precision significands (11 bits) meet in the same array; exponents add,
    and the sum is aligned, normalised and rounded to nearest, ties to even.
    A lane of 64 two-bit multipliers makes floor(64 / (ceil(w_a / 2) ceil(w_b / 2))) multiply-adds a cycle on
    neighbouring depths of one output, so cycles = max(ceil(outputs / lanes) positions ceil(depth / per lane),
    bytes / bandwidth, instructions) + setup: what does not fill the lanes or the depth is lost.

    Use: to see what mixed widths of a quantised network are worth in time and energy, and to have its integers
    computed as the hardware would. For a measured latency of this machine use a latency probe.

    Costs: nothing in training; emulation takes a digit product each where the hardware takes a part of a cycle
    (about a nanosecond a multiply-add at 8 bits), and stored weights take their width in bits.

    Shapes: codes `[B, C, H, W]`, unsigned; weights signed; patterns `[M, K]`, `[K, N]`.

    Raises:
        PlanError: a width that the array does not have.
        ValueError: codes that their bits do not hold.

    Source: Huang et al., ASP-DAC 2024, arXiv 2309.08186; the rival Garofalo et al., XpulpNN, arXiv 2011.14325.

    Departs: neither code nor figures of the processor are public, so its structure is reconstructed and the figures
    in `ops/devices` are assumed; a multiply-add in half precision rounds once. Activations are unsigned, and widths
    in between (6 x 4 bits) use what fits of the array. A layer's outputs go to the lanes, or its positions, whichever
    leaves fewer lanes idle. The rival gets the pairs of 16 bits that its instruction set has; it unfolds
    its inputs, which the processor's loads do on the way.

    Example:
        >>> job = ShapeJob((("conv", Product(64, 576, 256, 1, 9, 16384, 16384, 36864)),), (4, 4))
        >>> RiscvPrecisionScalable().run(job, Context()).layers[0].bound
        'multipliers'
    """

    digit: int = param(2, "bits of the small multipliers that the emulation uses", ge=1, le=8, unit="bits")
    accumulate: str = param("fp32", "sums of half-precision products", choices=("fp32", "fp16"))
    flush: bool = param(False, "read and write subnormal numbers of half precision as zeros")
    device: str = param("precision-scalable-riscv", "description of the processor in `ops/devices`")
    rival: str = param("xpulpnn", "description of the SIMD core in `ops/devices`")

    def run(self, job: IntegerJob | HalfJob | ShapeJob, ctx: Context) -> IntegerTrace | Forecast | Tensor:
        """Compute an `IntegerJob` or a `HalfJob` (its sums, `[M, N]` float32), or time a `ShapeJob`."""
        check(self)
        if isinstance(job, HalfJob):
            return fp16_dot(job.a, job.b, self.accumulate == "fp32", self.digit, self.flush)
        return self._compute(job) if isinstance(job, IntegerJob) else self._time(job)

    def _compute(self, job: IntegerJob) -> IntegerTrace:
        codes, sums, left, shapes = job.codes, [], [], []
        for layer in job.layers:
            _refuse(layer.bits, layer.name)
            shapes.append((layer.name, product_of(layer, pooled(layer, codes))))
            sums.append(sums_of(layer, codes, self.digit))
            codes = codes_of(layer, sums[-1])
            left.append(codes)
        widths = {layer.name: layer.bits for layer in job.layers}
        return IntegerTrace(tuple(sums), tuple(left), self._time(ShapeJob(tuple(shapes), widths)))

    def _time(self, job: ShapeJob) -> Forecast:
        on, rival, found = device(self.device), device(self.rival), []
        steps = training_steps(job.products) if job.training else training_steps(job.products)[: len(job.products)]
        for step in steps:
            widths = (
                job.widths if not isinstance(job.widths, Mapping) else job.widths.get(step.name, job.widths.get(""))
            )
            if widths is None:
                raise PlanError(f"widths must name every layer; {step.name} has none. Add it, or '' for all others.")
            _refuse(widths, step.name)
            estimate, bound, used = processor_time(step.product, widths, on)
            other = simd_time(step.product, widths, rival)
            density = estimate.macs / max(estimate.traffic_bytes, 1)
            found.append(LayerTime(step.name, step.kind, widths, step.product, estimate, other, bound, used, density))
        peak = {t.widths: on["lanes"] * macs_per_cycle(t.widths, on) / on["bytes_per_cycle"] for t in found}
        return Forecast(tuple(found), _total(t.estimate for t in found), _total(t.rival for t in found), peak)


def _total(estimates: Iterable[Estimate]) -> Estimate:
    return sum(estimates, Estimate())


def _refuse(widths: Widths, name: str) -> None:
    if widths != FP16 and not (isinstance(widths, tuple) and set(widths) <= set(WIDTHS)):
        raise PlanError(
            f"widths must be two even numbers from 2 to 16, or {FP16!r}; {name} has {widths!r}. Round them up."
        )
