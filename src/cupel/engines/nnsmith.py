"""Engine `nnsmith`: random valid networks, grown by a constraint solver, against other implementations of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cupel.core.context import Context, derive
from cupel.core.errors import PlanError, nearest
from cupel.core.params import check, param
from cupel.core.protocols import Card
from cupel.ops.fuzzing import FuzzJob, FuzzTrace, fuzz
from cupel.ops.graph_growth import Growth, grown
from cupel.ops.operator_specs import operators
from cupel.ops.solver import solver_module

CARD = Card(
    name="nnsmith",
    family="robust",
    source="J. Liu, J. Lin, F. Ruffy, C. Tan, J. Li, A. Panda, L. Zhang, NNSmith: Generating Diverse and Valid Test "
    "Cases for Deep Learning Compilers, ASPLOS 2023, arXiv 2207.13066",
    tags=("testing", "fuzzing", "compiler", "differential", "solver"),
    extras=("fuzz",),
    tiny={"nodes": 3},
)


@dataclass(frozen=True)
class NNSmith:
    r"""Grow random networks that are valid by construction, find finite inputs, and compare implementations.

    A call with input shapes s and attributes a has conditions C(s, a) and result shape T(s, a), in integers. A network
    begins as one input of unknown shape. With probability 1/2 each, a call is put behind tensors that are there, or
    before an input whose place its result takes; it stays if all conditions so far, T >= 1 and |T| <= 65536 have a
    solution. Sizes then come from random bins [2^i, 2^(i+1)). At the first call with a NaN or infinite result,
    Adam lowers a loss that says how far its inputs are from its domain, over all inputs and weights. A target's
    outputs are then compared with the network's own at the target's declared level (exact, tolerance, loose, form); a
    network that rounding alone moves further than that is not judged. What fails is cut down: calls go, are passed by
    or become inputs, and sizes are solved anew under half their sum.

    Use: against everything that turns a network into another one which shall compute the same: compilers, exporters,
    folding, cutting, storage. It says nothing of trained accuracy.

    Costs: about 50 ms to grow ten calls and milliseconds to find inputs; the targets cost what they cost.

    Shapes: networks of any inputs and outputs, or, for targets that want rows, `[B, ...]` -> `[B, K]`.

    Raises:
        MissingExtra: z3 is not installed.
        PlanError: `only` names no known operator.

    Source: Liu et al., ASPLOS 2023, arXiv 2207.13066, sections 3 and 4.

    Departs: axes, orders and which axes are spread are drawn, not solved; bins are kept by halves instead of dropped
    at random; the step of the search for inputs shrinks, which narrow domains need, and it begins anew when it is
    stuck; networks of rows have one input, since that is what cupel's techniques take; what is not steady under
    rounding is left out, where the paper relies on a wide tolerance.

    Example:
        >>> NNSmith(nodes=5).run(FuzzJob((), graphs=3), Context(seed=1)).valid
        3
    """

    nodes: int = param(10, "calls of a network", ge=1)
    batch: int = param(3, "rows of the input of a network of rows", ge=2)
    forwards: int = param(60, "most runs of a network in the search for finite inputs", ge=1)
    only: tuple[str, ...] = param((), "operators to choose from (none: all)")

    def run(self, job: FuzzJob, ctx: Context) -> FuzzTrace:
        """Networks until the job's count or time is used up, each with a seed of its own."""
        check(self)
        solver_module()
        for name in self.only:
            if name not in operators():
                raise PlanError(
                    f"only of nnsmith must name operators; got {name!r}.{nearest(name, operators())} "
                    f"There are {', '.join(sorted(operators())[:8])} and others."
                )
        growth = Growth(self.nodes, batch=self.batch, names=tuple(self.only))
        return fuzz(
            job,
            lambda seed, rows: grown(replace(growth, rows=rows), seed),
            lambda number: derive(ctx.seed, *ctx.path, "network", number) % (1 << 31),
            self.forwards,
        )
