"""The fuzzers on cupel itself: every way in which it turns a network into another one, and its tools' ways.

    python benchmarks/fuzz.py [--minutes 60] [--seed 0] [--nodes 10] [--targets NAME ...] [--out FILE]

First infers rules from recorded calls, then makes random valid networks until the time is over, in rounds: those of
`nnsmith`, of layers and of all operators, and those of `neuri`, with operators by the inferred rules. Prints every
finding with the smallest network that still shows it, and what was judged. Exit code 1 if anything was found in cupel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from cupel.core.context import Context
from cupel.engines.neuri import HybridJob, InduceJob, NeuRI
from cupel.engines.nnsmith import NNSmith
from cupel.ops.compilers import compilers
from cupel.ops.fuzzing import Finding, FuzzJob, FuzzTrace
from cupel.testing.fuzz_targets import cupels
from cupel.testing.seed_calls import functions, run_seeds

ROUND = 10  # networks
LAYERS = (
    "conv1d", "conv2d", "conv_transpose2d", "linear", "batch_norm1d", "batch_norm2d", "layer_norm", "group_norm",
    "max_pool2d", "avg_pool2d", "adaptive_pool2d", "upsample", "pixel_shuffle", "relu_layer", "relu6_layer",
    "gelu_layer", "silu_layer", "dropout", "identity", "relu", "sigmoid", "add", "mul", "cat", "flatten", "reshape",
    "permute", "narrow", "pad", "mean", "softmax", "matmul", "maximum", "clamp", "unsqueeze",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--per-graph", type=int, default=8, help="targets each network is given to; 0 for all")
    parser.add_argument("--targets", nargs="*", default=[], help="beginnings of names; all without")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    own, (others, absent) = cupels(), compilers()
    targets = tuple(t for t in (*own, *others) if not args.targets or t.name.startswith(tuple(args.targets)))
    for name, why in absent.items():
        print(f"absent: {name}: {why}")
    print(f"{len(targets)} targets: {', '.join(t.name for t in targets)}\n", flush=True)
    told: dict[str, Any] = {"seed": args.seed, "minutes": args.minutes, "absent": absent, "rounds": 0}
    traces: list[FuzzTrace] = []
    seen: dict[tuple[str, str, str], Finding] = {}
    learned = NeuRI().run(InduceJob(functions(), partial(run_seeds, Random(args.seed))), Context(seed=args.seed))
    print(
        f"{len(learned.rules)} rules from {len(learned.instances)} instances in {learned.seconds:.0f} s\n", flush=True
    )
    engines = (NNSmith(nodes=args.nodes, only=LAYERS), NNSmith(nodes=args.nodes), NeuRI(nodes=args.nodes))
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        engine = engines[len(traces) % len(engines)]
        job = FuzzJob(targets, ROUND, end - time.monotonic(), args.per_graph, True, len(traces) * ROUND, not traces)
        trace = engine.run(HybridJob(job, learned.pools) if isinstance(engine, NeuRI) else job, Context(seed=args.seed))
        traces.append(trace)
        for finding in trace.findings:
            key = (finding.target, finding.kind, " ".join(sorted({c.op for c in finding.graph.calls})))
            if key in seen:
                seen[key] = replace(seen[key], times=seen[key].times + finding.times)
            else:
                seen[key] = finding
                print(f"{finding}\n", flush=True)
    for name, counts in judged(traces).items():
        print(f"{name:28} " + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    for name, counts in reasons(traces).items():
        print(f"refused by {name}: " + "; ".join(f"{n} x {why}" for why, n in counts[:4]))
    made = [sum(getattr(t, field) for t in traces) for field in ("graphs", "valid", "finite")]
    print(f"{made[0]} networks, {made[1]} valid, {made[2]} with finite results; {len(seen)} findings")
    faults = [fault for t in traces for fault in t.faults]
    print("\n".join(["", *faults[:5]]))
    if args.out:
        told |= {"graphs": made[0], "valid": made[1], "finite": made[2], "judged": judged(traces), "faults": faults}
        told["refusals"] = {name: dict(counts) for name, counts in reasons(traces).items()}
        told["findings"] = [plain(f) for f in seen.values()]
        args.out.write_text(json.dumps(told, indent=1), encoding="utf-8")
    names = {t.name for t in own}
    return int(any(f.target in names for f in seen.values()))


def judged(traces: list[FuzzTrace]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for trace in traces:
        for name, counts in trace.judged.items():
            for kind, n in counts.items():
                found.setdefault(name, {})[kind] = found.get(name, {}).get(kind, 0) + n
    return found


def reasons(traces: list[FuzzTrace]) -> dict[str, list[tuple[str, int]]]:
    """Target -> what it said when it refused, the most frequent first."""
    found: dict[str, Counter[str]] = {}
    for trace in traces:
        for name, counts in trace.refusals.items():
            found.setdefault(name, Counter()).update(counts)
    return {name: counts.most_common() for name, counts in found.items()}


def plain(finding: Finding) -> dict[str, Any]:
    return {
        "target": finding.target, "kind": finding.kind, "detail": finding.detail, "times": finding.times,
        "seed": finding.seed, "calls": finding.calls, "graph": str(finding.graph).splitlines(),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
