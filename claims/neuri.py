"""Claim of `neuri`: inferred shapes and conditions hold on unseen calls; hybrid networks use more operators."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from random import Random

from cupel.core.context import Context, derive
from cupel.engines.neuri import InduceJob, InduceTrace, NeuRI
from cupel.ops.call_mutation import fresh_rows, results
from cupel.ops.call_records import Instance, recording
from cupel.ops.fuzzing import start_of
from cupel.ops.graph_growth import Growth, grown
from cupel.ops.hybrid_growth import grown_hybrid
from cupel.ops.rule_inference import Rule, matrix
from cupel.ops.tensor_graph import Graph, module_of, recorded_types
from cupel.runner.claims import Claim
from cupel.testing.seed_calls import CALLS, draw_call, functions, run_seeds

CLAIM = Claim(
    method="neuri",
    statement="From five recorded calls each of some eighty functions of torch, at depth 3: the shape rule is right "
    "(on 99% of 200 unseen valid calls) for at least 70% of instances; conditions tell unseen valid from invalid calls "
    "with 90% accuracy, 25 points above calling all valid; in equal time hybrid networks use 1.5 times as many "
    "operators, and pairs of them, as networks from rules by hand, and at least 90% of them are valid",
    paper="15 to 24 percent more branches of PyTorch and TensorFlow than the best earlier fuzzer; 100 new bugs",
    bounds={
        "right_shape_share": ">= 0.7",
        "condition_accuracy": ">= 0.9",
        "condition_gain": ">= 0.25",
        "operators_ratio": ">= 1.5",
        "pairs_ratio": ">= 1.5",
        "valid_share_hybrid": ">= 0.9",
    },
    seeds=(0, 1, 2),
    quick_seeds=1,
    explains="Validity, 0.83: on seed 0, of 60 hybrid networks 15 were not valid, 9 of them through the rule of one "
    "instance of max_pool2d (0.91 of unseen calls, above the 0.8 at which a rule is kept); the other six through rules "
    "that fit the small sizes they were learned on. Pairs, 0.45: a hybrid network joins as many calls as one by hand "
    "(9.4 against 9.6 of ten), but in equal time there are 90 against 193; why one takes longer was not measured.",
)


def unseen(names: list[str], seed: int, each: int) -> dict[str, Instance]:
    """Instances by key, with the rows of valid calls that were drawn anew."""
    draw = Random(derive(seed, "unseen"))
    with recording(functions()) as recorder:
        for name in names:
            for _ in range(each):
                function, args, kwargs = draw_call(name, draw)
                function(*args, **kwargs)
    return {i.key: i for i in recorder.instances()}


def right_shape(rule: Rule, instance: Instance, rows: list[tuple[int, ...]]) -> float:
    """Share of valid calls whose shape the rule tells, its conditions apart."""
    wanted = [instance.tried(row) for row in rows]
    known = [(row, shape) for row, shape in zip(rows, wanted, strict=True) if shape is not None]
    return sum(rule.shape(row) == shape for row, shape in known) / max(1, len(known))


def judged(learned: InduceTrace, valid: dict[str, Instance], seed: int) -> dict[str, float]:
    rules = {r.instance.key: r.rule for r in learned.rules}
    right, accuracy, alone, checked, asked = 0, 0.0, 0.0, 0, 0
    for instance in learned.instances:
        rows = (
            [row for row in valid[instance.key].rows if row not in instance.rows][:200] if instance.key in valid else []
        )
        if not rows:
            continue
        checked += 1
        rule = rules.get(instance.key)
        right += rule is not None and right_shape(rule, instance, rows) >= 0.99
        others = fresh_rows(rows, instance, Random(derive(seed, instance.key)), 120)
        bad = [row for row, shape in zip(others, results(instance, others), strict=True) if shape is None]
        good = rows[: len(bad)]
        if rule is None or len(bad) < 10:
            continue
        bad = bad[: len(good)]
        asked += 1
        told = [bool(rule.holds(matrix([row]))[0]) for row in (*good, *bad)]
        accuracy += (sum(told[: len(good)]) + sum(not x for x in told[len(good) :])) / len(told)
        alone += len(good) / len(told)
    return {
        "right_shape_share": right / checked,
        "condition_accuracy": accuracy / asked,
        "condition_gain": (accuracy - alone) / asked,
        "rules_share": len(rules) / len(learned.instances),
        "instances": float(len(learned.instances)),
        "instances_with_conditions_judged": float(asked),
    }


def variety(grow: Callable[[int], Graph], seed: int, seconds: float) -> dict[str, float]:
    """Operators and pairs of operators in valid networks within a processor time."""
    names, pairs, valid, graphs, end = set[str](), set[tuple[str, str]](), 0, 0, time.process_time() + seconds
    while time.process_time() < end:
        graph = grow(derive(seed, "variety", graphs) % (1 << 31))
        graphs += 1
        try:
            found = recorded_types(module_of(graph, seed=graphs), graph, start_of(graph, graphs))
        except Exception:  # whatever torch says of a network that is not valid
            continue
        if any(t != graph.types[v] for v, t in found.items()):
            continue
        valid += 1
        made = {c.output: c.op.partition("~")[0].partition("!")[0] for c in graph.calls}
        names |= set(made.values())
        pairs |= {
            (made[v], c.op.partition("~")[0].partition("!")[0]) for c in graph.calls for v in c.inputs if v in made
        }
    return {
        "operators": float(len(names)),
        "pairs": float(len(pairs)),
        "valid": valid / graphs,
        "graphs": float(graphs),
    }


def measure(seed: int, quick: bool) -> dict[str, float]:
    job = InduceJob(functions(), partial(run_seeds, Random(derive(seed, "script")), 5))
    began = time.process_time()
    learned = NeuRI(depth=2 if quick else 3).run(job, Context(seed=seed))
    assert isinstance(learned, InduceTrace)
    seconds = time.process_time() - began
    found = judged(learned, unseen(list(CALLS), seed, 40 if quick else 220), seed)
    budget = 1.5 if quick else 6.0
    hybrid = variety(lambda s: grown_hybrid(learned.pools, Growth(nodes=10), s), seed, budget)
    hand = variety(lambda s: grown(Growth(nodes=10), s), seed, budget)
    return found | {
        "operators_ratio": hybrid["operators"] / hand["operators"],
        "pairs_ratio": hybrid["pairs"] / hand["pairs"],
        "valid_share_hybrid": hybrid["valid"],
        "valid_share_by_hand": hand["valid"],
        "operators_hybrid": hybrid["operators"],
        "operators_by_hand": hand["operators"],
        "graphs_hybrid": hybrid["graphs"],
        "graphs_by_hand": hand["graphs"],
        "seconds_of_inference": seconds,
    }
