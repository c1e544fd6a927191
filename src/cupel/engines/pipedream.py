"""Engine `pipedream`: train a chain of layers as a pipeline of workers that each keep several versions of weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from cupel.core.context import Context, derive
from cupel.core.errors import CupelError, PlanError
from cupel.core.params import check, param
from cupel.core.protocols import Card
from cupel.core.types import Batch, Budget, Dataset, Task
from cupel.ops.layer_costs import LayerCost
from cupel.ops.partition import Level, Plan, Stage, partition, stash_bytes
from cupel.ops.schedule import Simulated, simulate
from cupel.ops.stage_runs import End, Place, in_processes, in_turns
from cupel.ops.stage_worker import Post

CARD = Card(
    name="pipedream",
    family="train",
    source="A. Harlap, D. Narayanan, A. Phanishayee, V. Seshadri, N. Devanur, G. Ganger, P. Gibbons, PipeDream: Fast "
    "and Efficient Pipeline Parallel DNN Training, arXiv 1806.03377, 2018, sections 3.2 to 3.4",
    tags=("parallel", "pipeline", "staleness", "partitioning"),
    needs=("weights", "gradients"),
    tiny={"versions": "stash"},
)


@dataclass(frozen=True)
class PipelineJob:
    """A training job for a pipeline.

    Args:
        layers: called one after the other, each from one tensor to one tensor; not changed.
        data, task, budget: as for `core.fit`; the task's loss may not look at the inputs.
        stages: which layers on how many workers each; their first and last must meet.
        processes: one process a worker, on this machine; otherwise all workers take turns in this process, which
            gives the same numbers. A script that asks for processes must guard its own start with
            `if __name__ == "__main__":`.
    """

    layers: Sequence[nn.Module]
    data: Dataset
    task: Task
    budget: Budget
    stages: tuple[Stage, ...]
    processes: bool = False


@dataclass(frozen=True)
class ClusterJob:
    """A job to be planned and timed on a cluster that is only described.

    Args:
        costs: of the layers for one mini-batch (`ops.layer_costs.profile_layers` measures them).
        levels: of the cluster, innermost first.
        memory: bytes of each worker.
        batches: mini-batches to simulate.
    """

    costs: tuple[LayerCost, ...]
    levels: tuple[Level, ...]
    memory: float = float("inf")
    batches: int = 64


@dataclass(frozen=True)
class Trace:
    """What a pipeline did.

    Args:
        model: the trained layers, in evaluation mode.
        losses: of every mini-batch, in order of admission.
        sent_bytes: between workers, by kind: activations, gradients, weights.
        versions: most versions of its weights that a worker of each stage held at once.
        delays: updates between a mini-batch's forward and the update with its gradient, by stage, at most.
        seconds: wall time.
    """

    model: nn.Sequential
    losses: tuple[float, ...]
    sent_bytes: dict[str, int]
    versions: tuple[int, ...]
    delays: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """The planned stages on the described cluster, beside data parallelism and the same stages without a pipeline.

    `chosen` is the faster of the plan and data parallelism. The plan counts transfers as overlapped, but only so many
    mini-batches are in flight: where activations are large, the simulation can show that it does not pay.
    """

    plan: Plan
    pipeline: Simulated
    data_parallel: Simulated
    unpipelined: Simulated
    chosen: tuple[Stage, ...]


@dataclass(frozen=True)
class PipeDream:
    r"""Keep several mini-batches in flight through stages of layers, each seen by the weights its backward will use.

    Every worker alternates one forward and one backward. With n stages of one worker, stage s has made t - (n - s)
    updates when mini-batch t comes by and t when its gradient is applied. `stash` keeps the weights of the forward
    for the backward: w(t+1) = w(t) - lr grad f(w_1(t-n+1), ..., w_n(t)). `vertical` lets all stages use the version
    that was current when t entered: grad f(w_1(t-n+1), ..., w_n(t-n+1)). `latest` keeps no versions: the backward
    meets weights its forward did not use. `predict` stashes w - d lr v instead, where the update rule's direction v
    says the weights will be in d updates, the delay of the stage. Replicas of a stage average their gradients.

    Use: when a chain of layers does not fit one worker, or its gradients are too large to average; plan with a
    `ClusterJob` first. On one machine with one fast device, plain training is faster.

    Costs: memory for as many versions of the weights as mini-batches are in flight; gradients that are late.

    Shapes: each layer takes `[B, ...]` and gives `[B, ...]`.

    Raises:
        PlanError: stages that do not cover the layers.
        CupelError: a worker process failed, or the loss is not finite.

    Source: Harlap et al., arXiv 1806.03377; prediction: L. Guan et al., XGrad, arXiv 2305.18240, equation 4.

    Departs: a replicated stage's time is compute plus averaging, as in the released partitioner (the paper takes the
    longer of the two), and a worker's memory includes the weights in use; one replica averages for its stage, which
    moves as many bytes as a ring does; a worker holds its versions as leaves of autograd graphs, so activations are
    stashed, never recomputed. This is the one place outside the core that differentiates a training loss: a stage's
    backward is an own event between two messages, and no loop over whole mini-batches contains it. One stage gives
    the bits of `core.fit`.

    Example:
        >>> PipeDream(versions="predict")
        PipeDream(versions='predict')
    """

    versions: str = param(
        "stash", "which weights a mini-batch sees", choices=("stash", "vertical", "latest", "predict")
    )

    def run(self, job: PipelineJob | ClusterJob, ctx: Context) -> Trace | Forecast:
        """Train a `PipelineJob`, or plan and time a `ClusterJob`."""
        check(self)
        return forecast(job) if isinstance(job, ClusterJob) else self._train(job, ctx)

    def _train(self, job: PipelineJob, ctx: Context) -> Trace:
        ends = [0, *(s.last for s in job.stages)]
        if [s.first for s in job.stages] != ends[:-1] or ends[-1] != len(job.layers):
            raise PlanError(
                f"stages must cover layers 0 to {len(job.layers)} without a gap; got "
                f"{[(s.first, s.last) for s in job.stages]}. Let each stage start where the one before it ends."
            )
        began = time.perf_counter()
        parts = [nn.Sequential(*copy.deepcopy(list(job.layers[s.first : s.last]))) for s in job.stages]
        replicas = tuple(s.replicas for s in job.stages)
        # A shuffled epoch can have one batch less: a last batch of one joins the batch before it.
        steps, planned = (
            job.budget.epochs * sum(1 for _ in job.data.batches(job.budget.batch_size, draw))
            for draw in (ctx.rng("count"), None)
        )
        seed = derive(ctx.seed, *ctx.path, "pipeline")
        posts = {
            (k, r): Post(k, r, replicas, steps, planned, self.versions, seed)
            for k, m in enumerate(replicas)
            for r in range(m)
        }
        run = in_processes if job.processes else in_turns
        losses, ends_of = run(posts, parts, job.task, job.budget, _stream(job, ctx))
        if any(loss != loss for loss in losses):
            raise CupelError(
                f"the loss must stay finite; it is NaN. Lower lr (now {job.budget.lr:g}) or cut fewer stages."
            )
        return _trace(job, parts, losses, ends_of, time.perf_counter() - began)


def forecast(job: ClusterJob) -> Forecast:
    """Plan the stages of a cluster job and simulate them and their two rivals."""
    plan = partition(job.costs, job.levels, job.memory)
    workers = 1
    for level in job.levels:
        workers *= level.count
    whole = (Stage(0, len(job.costs), workers),)
    piped, shared = (simulate(job.costs, stages, job.levels, job.batches) for stages in (plan.stages, whole))
    alone = simulate(job.costs, plan.stages, job.levels, job.batches, pipelined=False)
    fits = stash_bytes(job.costs, 0, workers) <= job.memory
    chosen = whole if fits and shared.throughput > piped.throughput else plan.stages
    return Forecast(plan, piped, shared, alone, chosen)


def _stream(job: PipelineJob, ctx: Context) -> Iterator[Batch]:
    """Mini-batches in the order `core.fit` would take them."""
    draw = ctx.rng("order")
    for _ in range(job.budget.epochs):
        yield from job.data.batches(job.budget.batch_size, draw)


def _trace(
    job: PipelineJob, parts: Sequence[nn.Sequential], losses: list[float], ends: dict[Place, End], seconds: float
) -> Trace:
    for k, part in enumerate(parts):
        part.load_state_dict(ends[k, 0].state)
    stages = range(len(parts))
    return Trace(
        nn.Sequential(*(layer for part in parts for layer in part)).eval(),
        tuple(losses),
        {kind: sum(e.sent[kind] for e in ends.values()) for kind in ("activations", "gradients", "weights")},
        tuple(max(e.peak for (k, _), e in ends.items() if k == s) for s in stages),
        tuple(max(e.delay for (k, _), e in ends.items() if k == s) for s in stages),
        seconds,
    )
