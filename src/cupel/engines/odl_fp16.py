"""Engine `odl-fp16`: training steps in 16-bit floating point as a cluster of small cores takes them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.params import check, param
from cupel.core.protocols import Card
from cupel.core.types import Batch, Task
from cupel.ops.accelerator import device
from cupel.ops.cluster import Memory, StepTime, memory_of, step_time
from cupel.ops.half import FORMS, on_grid
from cupel.ops.half_training import Numerics, emulated, updated
from cupel.ops.lowered import training_steps
from cupel.ops.products import Product

CARD = Card(
    name="odl-fp16",
    family="compress",
    source="D. Nadalini, M. Rusci, L. Benini, F. Conti, Reduced Precision Floating-Point Optimization for Deep Neural "
    "Network On-Device Learning on MicroControllers, Future Generation Computer Systems 149, 2023, arXiv 2305.19167",
    tags=("accelerator", "fp16", "on-device learning", "microcontroller", "loss scaling"),
    needs=("weights", "gradients"),
    tiny={"sums": "narrow"},
)
MOST_SCALE = 2.0**15  # the loss scale is itself a number in half precision


@dataclass(frozen=True)
class StepJob:
    """Training steps to be taken.

    Args:
        model: not changed; parameters that need no gradients stay frozen.
        batches: one step each, in this order.
        task: its loss is differentiated.
        lr: of plain SGD.
    """

    model: nn.Module
    batches: Sequence[Batch]
    task: Task
    lr: float = 0.01


@dataclass(frozen=True)
class ShapeJob:
    """A training step to be timed: the products of one forward (`ops.ledger`), and layers that are not trained."""

    products: tuple[tuple[str, Product], ...]
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepTrace:
    """What the steps did.

    Args:
        model: after them, in evaluation mode.
        losses: of every step, before its update.
        scales: of the loss, by step.
        skipped: steps whose gradients overflowed, without an update.
        underflowed: share of gradients of weights and activations that became zero only by rounding.
        unmoved: share of weights with a gradient that their update did not change.
        saved_bytes: kept by the last forward for its backward.
    """

    model: nn.Module
    losses: tuple[float, ...]
    scales: tuple[float, ...]
    skipped: int
    underflowed: float
    unmoved: float
    saved_bytes: int


@dataclass(frozen=True)
class Forecast:
    """Cycles of every product of a training step, and of the whole."""

    steps: tuple[StepTime, ...]
    memory: Memory
    hertz: float

    @property
    def cycles(self) -> int:
        return sum(s.cycles for s in self.steps)

    @property
    def milliseconds(self) -> float:
        return 1e3 * self.cycles / self.hertz

    @property
    def macs_per_cycle(self) -> float:
        return sum(s.macs for s in self.steps) / self.cycles


@dataclass
class _Tally:
    """What a run counts as it goes."""

    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    skipped: int = 0
    unmoved: int = 0
    pushed: int = 0


@dataclass(frozen=True)
class OdlFp16:
    r"""Train in 16-bit floating point with every layer as matrix products, and count the cycles of a small cluster.

    Y = W im2col(X), dW = dY im2col(X)^T, dX = W' im2col(dY), W' the turned kernels with inputs and outputs exchanged.
    Operands, activations, gradients and weights are 16-bit numbers; an instruction multiplies two pairs. `narrow` sums
    keep one 16-bit sum for even and one for odd places, each product joining with one rounding; `wide` ones are
    float32. SGD is w <- round(w - lr g). With `dynamic` scaling the loss is multiplied by s, which starts at 1 and
    doubles with every step until a gradient overflows; that step is left out and s halved, as at each later overflow.
    A product takes, on each core, MACs/2 (1 + 1/u + 1/v) instructions for tiles of u x v outputs, with their ends;
    the slowest core, the shared units and the transfers decide, and unfolding and transposing come on top.

    Use: to know what 16-bit training does to a network, and where its time goes on a microcontroller. To train for
    use on a GPU take `precision: bf16-mixed` in a fit instead.

    Costs: weights, gradients and saved activations take two bytes; the emulation takes about four nanoseconds a
    multiply-add with narrow sums, and little more than float32 with wide ones.

    Shapes: as the model; convolutions `[B, C, H, W]` without dilation, linear layers `[..., in]`.

    Raises:
        PlanError: nothing to train.
        ValueError: a convolution with dilation.

    Source: Nadalini et al., arXiv 2305.19167; the sums' order follows the released kernels' instructions.

    Departs: a step is an engine job of its own, given its batches; there is no loop over data. A mini-batch is one
    product, so sums of weight gradients run over all its examples. Wide sums run in torch's order unless `ordered`;
    results differ in the last bits of float32, before rounding to 16. The learning rate over the loss scale stays in
    float32. Softmax and loss, pooling and norms round once a call. The cycles leave out activations, norms and
    pooling, as the multiply-adds do; behind a stride, the zeros between gradients are unfolded and multiplied, and
    do not count as multiply-adds.

    Example:
        >>> job = ShapeJob((("conv", Product(16, 144, 1024, 1, 9, 16384, 16384, 2304)),))
        >>> half, full = (OdlFp16(form=f).run(job, Context()) for f in ("fp16", "fp32"))
        >>> full.memory.total / half.memory.total, 1 < full.cycles / half.cycles < 2
        (2.0, True)
    """

    form: str = param("fp16", "format of everything that is stored", choices=("fp16", "bf16", "fp32"))
    sums: str = param("wide", "format of sums: float32, or that of the operands", choices=("wide", "narrow"))
    ordered: bool = param(False, "wide sums in the order of the SIMD instructions, too")
    scaling: str = param("none", "scaling of the loss", choices=("none", "dynamic"))
    device: str = param("pulp-cluster", "description of the cluster in `ops/devices`")

    def run(self, job: StepJob | ShapeJob, ctx: Context) -> StepTrace | Forecast:
        """Take the steps of a `StepJob`, or time a `ShapeJob`."""
        check(self)
        return self._time(job) if isinstance(job, ShapeJob) else self._train(job, ctx)

    def _time(self, job: ShapeJob) -> Forecast:
        form, on, forward = FORMS[self.form], device(self.device), dict(job.products)
        steps = training_steps(job.products, job.frozen)
        times = tuple(step_time(step, forward[step.name], form, on) for step in steps)
        return Forecast(times, memory_of(steps, form), on.hertz)

    def _train(self, job: StepJob, ctx: Context) -> StepTrace:
        form, model = FORMS[self.form], copy.deepcopy(job.model)
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not params:
            raise PlanError("a network must have a parameter to train; all of it is frozen. Free a layer.")
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(on_grid(p, form))
        how, tally, scale, growing = Numerics(form, self.sums == "wide", self.ordered), _Tally(), 1.0, True
        model.train()
        with ctx.scope("fit"):
            for batch in job.batches:
                how.saved_bytes = 0
                grads = _gradients(model, batch, job.task, list(params.values()), scale, how, tally)
                finite = all(bool(g.isfinite().all()) for g in grads)
                if finite:
                    _step(params.values(), grads, job.lr / scale, how, tally)
                tally.skipped += not finite
                if self.scaling == "dynamic":
                    growing &= finite
                    scale = min(2 * scale, MOST_SCALE) if growing else scale if finite else max(scale / 2, 1.0)
        return _trace(model, how, tally)


def _gradients(
    model: nn.Module, batch: Batch, task: Task, params: list[Tensor], scale: float, how: Numerics, tally: _Tally
) -> list[Tensor]:
    """Of one mini-batch's loss times `scale`, in the format."""
    with emulated(how):
        loss = task.loss(model(batch.inputs if how.form == FORMS["fp32"] else on_grid(batch.inputs, how.form)), batch)
    # The loss itself is not multiplied: it could overflow where its gradients do not.
    found = torch.autograd.grad(loss, params, torch.full_like(loss, scale))
    tally.losses.append(float(loss.detach()))
    tally.scales.append(scale)
    return [on_grid(g, how.form) for g in found]


@torch.no_grad()
def _step(params: Iterable[Tensor], grads: list[Tensor], rate: float, how: Numerics, tally: _Tally) -> None:
    """SGD in the format, with the count of weights that it does not move."""
    for p, grad in zip(params, grads, strict=True):
        after = updated(p, grad, rate, how.form)
        tally.pushed += int((grad != 0).sum())
        tally.unmoved += int(((grad != 0) & (after == p)).sum())
        p.copy_(after)


def _trace(model: nn.Module, how: Numerics, tally: _Tally) -> StepTrace:
    return StepTrace(
        model.eval(),
        tuple(tally.losses),
        tuple(tally.scales),
        tally.skipped,
        how.underflowed / max(how.gradients, 1),
        tally.unmoved / max(tally.pushed, 1),
        how.saved_bytes,
    )
