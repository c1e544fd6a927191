"""Engine `neuri`: rules of functions inferred from recorded calls, and networks made with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from cupel.core.context import Context, derive
from cupel.core.params import check, param
from cupel.core.protocols import Card
from cupel.ops.call_records import Instance, recording
from cupel.ops.fuzzing import FuzzJob, FuzzTrace, fuzz
from cupel.ops.graph_growth import Growth
from cupel.ops.hybrid_growth import Pools, Recorded, grown_hybrid
from cupel.ops.induction import Induced, induced, inferred_operator, recorded_operator
from cupel.ops.operator_specs import operators
from cupel.ops.solver import solver_module
from cupel.ops.tensor_graph import Type

CARD = Card(
    name="neuri",
    family="robust",
    source="J. Liu, J. Peng, Y. Wang, L. Zhang, NeuRI: Diversifying DNN Generation via Inductive Rule Inference, "
    "ESEC/FSE 2023, arXiv 2302.02261",
    tags=("testing", "fuzzing", "program synthesis", "differential", "solver"),
    extras=("fuzz",),
    tiny={"nodes": 3},
)


@dataclass(frozen=True)
class InduceJob:
    """Functions whose rules are wanted.

    Args:
        functions: by name; calls that they make of each other are not recorded.
        script: calls them, as a test suite would. It is run once.
    """

    functions: Mapping[str, Callable[..., Any]]
    script: Callable[[], object]


@dataclass(frozen=True)
class InduceTrace:
    """What was learned.

    Args:
        instances: ways to call the functions that were recorded, with the calls.
        rules: of those for which one was found.
        pools: what hybrid networks are made of.
        seconds: wall time.
    """

    instances: tuple[Instance, ...]
    rules: tuple[Induced, ...]
    pools: Pools
    seconds: float


@dataclass(frozen=True)
class HybridJob:
    """Networks from what was learned, against targets; see `ops.fuzzing.FuzzJob`."""

    fuzz: FuzzJob
    pools: Pools


@dataclass(frozen=True)
class NeuRI:
    r"""Infer what sizes a function takes and gives from calls that worked and calls that failed, and fuzz with it.

    Calls of one function with equal layout, ranks and types are one instance with symbols s (sizes and whole-number
    arguments). Recorded calls are changed (0, -2, swaps, +1 to +3 on one, two or more symbols) and executed: a pass
    set with result shapes, and a fail set. For each size of the result, trees over s and {1, 2} with + - * // % min
    max are enumerated by depth; of trees equal on all samples the first counts; the first that gives all passes is
    the rule. Conditions e == 0, e > 0, e >= 0 are those that hold on all passes and break on failures. Rules are
    checked on unseen calls, whose failures join the samples. A hybrid network takes each call with probability 1/3
    from recorded calls, from inferred rules and from rules by hand, forward or backward; all sizes are numbers after
    each call, so the solver places one call at a time.

    Use: to test with many functions without writing their rules; first run an `InduceJob`, then `HybridJob`s. Rules
    hold for the sizes that were tried: a wrong one shows as a network that is not valid.

    Costs: about a quarter of a second of one core for an instance, a tenth of a second for a network of ten calls.

    Shapes: networks of any inputs and outputs; networks of rows have
    functions that were seen to work row by row, and no recorded calls.

    Raises:
        MissingExtra: z3 is not installed.

    Source: Liu et al., ESEC/FSE 2023, arXiv 2302.02261, section 3.

    Departs: only `depth` levels are enumerated whole, with trees kept apart by their values on the samples and not on
    probes of a solver; two more levels along e - c, e + c, e // s, e // s + 1, and differences of two trees, found by
    looking one half up, reach pooling and convolution. Conditions are chosen greedily by how many failures they
    explain, the sizes of the result and limits that some call just meets first, so that none is implied by the others
    on the samples; the solver removes none. Where sizes of one are spread, the rule of the calls without any is taken
    if it explains the failures better. A rule that tells the truth about fewer than 0.8 of unseen calls is dropped.

    Example:
        >>> import torch
        >>> job = InduceJob({"mm": torch.mm}, lambda: [torch.mm(torch.ones(a, 3), torch.ones(3, a)) for a in (2, 4)])
        >>> print(NeuRI().run(job, Context(seed=1)).rules[0])
        mm(f2, f2) = [a0_0, a1_1] if (a1_0 - a0_1) == 0
    """

    nodes: int = param(10, "calls of a network", ge=1)
    depth: int = param(3, "levels of trees that are enumerated whole", ge=1, le=3)
    forwards: int = param(60, "most runs of a network in the search for finite inputs", ge=1)

    def run(self, job: InduceJob | HybridJob, ctx: Context) -> InduceTrace | FuzzTrace:
        """Infer rules, or make networks with them."""
        check(self)
        solver_module()
        return self._induce(job, ctx) if isinstance(job, InduceJob) else self._fuzz(job, ctx)

    def _induce(self, job: InduceJob, ctx: Context) -> InduceTrace:
        began = time.monotonic()
        with recording(job.functions) as recorder:
            job.script()
        instances = recorder.instances()
        rules = []
        for instance in instances:
            draw = Random(derive(ctx.seed, *ctx.path, instance.key))
            found = induced(instance, draw, self.depth)
            ctx.log(kind="neuri", instance=instance.key, rule="none" if found is None else str(found))
            rules += [] if found is None else [found]
        return InduceTrace(tuple(instances), tuple(rules), pools_of(instances, rules), time.monotonic() - began)

    def _fuzz(self, job: HybridJob, ctx: Context) -> FuzzTrace:
        def grow(seed: int, rows: bool) -> Any:
            # A recorded call has sizes of its own, and no batch.
            pools = replace(job.pools, recorded=()) if rows else job.pools
            return grown_hybrid(pools, Growth(self.nodes, rows=rows), seed)

        return fuzz(job.fuzz, grow, lambda n: derive(ctx.seed, *ctx.path, "hybrid", n) % (1 << 31), self.forwards)


def pools_of(instances: list[Instance], rules: list[Induced]) -> Pools:
    """Recorded calls, inferred operators and those by hand."""
    recorded = []
    for instance in instances:
        for row in instance.rows:
            shape = instance.tried(row)
            if shape is not None:
                operator = recorded_operator(instance, row, shape, len(recorded))
                pairs = zip(instance.shapes(row), instance.tensors, strict=True)
                inputs = tuple(Type(tuple(s), slot.dtype) for s, slot in pairs)
                recorded.append(Recorded(operator, inputs, Type(shape, instance.dtype)))
    inferred = tuple(inferred_operator(rule, k) for k, rule in enumerate(rules))
    return Pools(tuple(recorded), inferred, tuple(operators().values()))
