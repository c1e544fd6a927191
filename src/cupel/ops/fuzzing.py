"""Random networks against implementations: the loop, what it counts, and its findings."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

import torch
from torch import Tensor, fx

from cupel.ops.differential import Target, Verdict, judged, steady
from cupel.ops.finite_inputs import finite_inputs
from cupel.ops.isolated import attempted
from cupel.ops.minimising import minimised
from cupel.ops.tensor_graph import Call, Graph, Type, drawn, module_of, recorded_types

Grow = Callable[[int, bool], Graph]  # seed, whether a network of rows is wanted
PER_TARGET = 12  # findings of a target that are minimised; later ones are only counted


@dataclass(frozen=True)
class FuzzJob:
    """What is tested, and for how long.

    Args:
        targets: implementations, each against the network itself.
        graphs: how many networks at most.
        seconds: after how long to stop.
        per_graph: targets that one network is given to, drawn at random; all with 0.
        apart: every judgement in a process of its own, so that crashes of the process and endless loops are told.
        first: number of the first network: a later job goes on where an earlier one ended.
        warm: with `apart`, every target is run here once before, so that what it loads is there in each process.
    """

    targets: tuple[Target, ...]
    graphs: int = 100
    seconds: float = math.inf
    per_graph: int = 0
    apart: bool = True
    first: int = 0
    warm: bool = True


@dataclass(frozen=True)
class Finding:
    """A network on which a target is wrong.

    Args:
        kind: `crash`, `inconsistency` or `timeout`.
        graph: as small as it became; `module_of(graph, seed=seed)` and `start_of(graph, seed)` rebuild the case.
        calls: of the graph before it was cut down.
        times: how often the same was found.
    """

    target: str
    kind: str
    detail: str
    graph: Graph
    seed: int
    calls: int
    times: int = 1

    def __str__(self) -> str:
        head = f"{self.target}: {self.kind}, {self.times} time(s), seed {self.seed}\n  {self.detail}\n"
        return head + "\n".join(f"    {line}" for line in str(self.graph).splitlines())


@dataclass(frozen=True)
class FuzzTrace:
    """What a run did.

    Args:
        graphs: networks that were made.
        valid: of them, those that run in torch with the types that were foretold.
        finite: of these, those with inputs on which all results are finite.
        calls: how often every operator was called in valid networks.
        pairs: how many ordered pairs of operators met, the result of one read by the other.
        judged: target -> verdict -> how often; `unsteady` networks were not judged.
        refusals: target -> the beginning of what it said -> how often.
        findings: each defect once.
        faults: networks that were not valid, and why, the first ten.
        seconds: wall time.
    """

    graphs: int
    valid: int
    finite: int
    calls: dict[str, int]
    pairs: int
    judged: dict[str, dict[str, int]]
    refusals: dict[str, dict[str, int]]
    findings: tuple[Finding, ...]
    faults: tuple[str, ...]
    seconds: float


@dataclass
class _Tally:
    graphs: int = 0
    valid: int = 0
    finite: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    pairs: set[tuple[str, str]] = field(default_factory=set)
    judged: dict[str, Counter[str]] = field(default_factory=dict)
    refusals: dict[str, Counter[str]] = field(default_factory=dict)
    findings: dict[tuple[object, ...], Finding] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def start_of(graph: Graph, seed: int) -> tuple[Tensor, ...]:
    """The random inputs a search begins with; those of a value do not depend on the other values."""
    return tuple(drawn(graph.types[v], torch.Generator().manual_seed(seed * 31 + v)) for v in graph.inputs)


def case_of(graph: Graph, seed: int, forwards: int) -> tuple[fx.GraphModule, tuple[Tensor, ...], bool]:
    """A network with inputs on which its results are finite, if they are found."""
    net = module_of(graph, seed=seed)
    found = finite_inputs(net, start_of(graph, seed), torch.Generator().manual_seed(seed * 31 - 1), forwards)
    return net, found.inputs, found.finite


def fuzz(job: FuzzJob, grow: Grow, seeds: Callable[[int], int], forwards: int = 60) -> FuzzTrace:
    """Make networks with `grow` and give them to the targets of the job."""
    began, tally = time.monotonic(), _Tally()
    if job.apart and job.warm:
        _warm(job.targets)
    kinds = sorted({target.rows for target in job.targets}, reverse=True) or [False]
    for number in range(job.first, job.first + job.graphs):
        if time.monotonic() - began >= job.seconds:
            break
        seed = seeds(number)
        graph = grow(seed, kinds[number % len(kinds)])
        tally.graphs += 1
        if not _valid(graph, seed, tally):
            continue
        net, inputs, finite = case_of(graph, seed, forwards)
        tally.finite += finite
        if finite:
            _judge(job, graph, seed, net, inputs, tally, forwards)
    return FuzzTrace(
        tally.graphs, tally.valid, tally.finite, dict(tally.calls.most_common()), len(tally.pairs),
        {name: dict(counts) for name, counts in tally.judged.items()},
        {name: dict(counts) for name, counts in tally.refusals.items()}, tuple(tally.findings.values()),
        tuple(tally.faults[:10]), time.monotonic() - began,
    )  # fmt: skip


def _warm(targets: tuple[Target, ...]) -> None:
    """Let every target load what it needs here, once, and not in each process again."""
    graph = Graph({0: Type((2, 3)), 1: Type((2, 3))}, (0,), (), (Call("tanh", (0,), {}, 1),), rows=True)
    for target in targets:
        attempted(partial(judged, target, module_of(graph), start_of(graph, 0), False))


def _valid(graph: Graph, seed: int, tally: _Tally) -> bool:
    """Whether the network runs and gives the types that were foretold."""
    try:
        found = recorded_types(module_of(graph, seed=seed), graph, start_of(graph, seed))
        wrong = [v for v, t in found.items() if t != graph.types[v]]
        fault = f"v{wrong[0]} is {found[wrong[0]]}, not {graph.types[wrong[0]]}" if wrong else ""
    except Exception as error:  # whatever torch says of a network that is not valid
        fault = f"{type(error).__name__}: {str(error)[:200]}"
    if fault:
        tally.faults.append(f"seed {seed}: {fault}\n{graph}")
        return False
    tally.valid += 1
    made = {call.output: call.op for call in graph.calls}
    tally.calls.update(made.values())
    tally.pairs |= {(made[v], call.op) for call in graph.calls for v in call.inputs if v in made}
    return True


def _judge(
    job: FuzzJob, graph: Graph, seed: int, net: fx.GraphModule, inputs: tuple[Tensor, ...], tally: _Tally, forwards: int
) -> None:
    fitting = [t for t in job.targets if graph.rows or not t.rows]
    if job.per_graph and len(fitting) > job.per_graph:
        fitting = Random(seed).sample(fitting, job.per_graph)
    levels = {level: steady(net, inputs, level) for level in {t.level for t in fitting}}
    for target in fitting:
        counts = tally.judged.setdefault(target.name, Counter())
        if not levels[target.level]:
            counts["unsteady"] += 1
            continue
        verdict = judged(target, net, inputs, job.apart)
        counts[verdict.kind] += 1
        if verdict.kind == "refused":
            tally.refusals.setdefault(target.name, Counter())[verdict.detail[:120]] += 1
        if verdict.bad:
            _note(job, target, graph, seed, verdict, tally, forwards)


def _note(
    job: FuzzJob, target: Target, graph: Graph, seed: int, verdict: Verdict, tally: _Tally, forwards: int
) -> None:
    """Cut the network down and keep it, unless the same was found before."""
    said = (target.name, verdict.kind, re.sub(r"[\d.e+-]+", "#", verdict.detail)[:60])
    many = sum(f.target == target.name for f in tally.findings.values()) >= PER_TARGET
    if said in tally.findings and (verdict.kind != "inconsistency" or many):
        tally.findings[said] = replace(tally.findings[said], times=tally.findings[said].times + 1)
        return

    last = [verdict]

    def fails(smaller: Graph) -> bool:
        net, inputs, finite = case_of(smaller, seed, forwards)
        if not finite or not steady(net, inputs, target.level):
            return False
        again = judged(replace(target, plainer=None), net, inputs, job.apart)
        if again.like(verdict):
            last[0] = again
        return again.like(verdict)

    small = minimised(graph, fails, 20 if verdict.kind == "timeout" else 150)
    key = said if verdict.kind != "inconsistency" else (target.name, tuple(sorted({c.op for c in small.calls})))
    if key in tally.findings:
        tally.findings[key] = replace(tally.findings[key], times=tally.findings[key].times + 1)
    else:
        where = verdict.detail[verdict.detail.rfind(" (") :] if target.plainer else ""
        tally.findings[key] = Finding(target.name, verdict.kind, last[0].detail + where, small, seed, len(graph.calls))
