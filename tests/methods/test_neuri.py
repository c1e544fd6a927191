"""`neuri`: rules equal to what is known of a function, conditions that refuse what torch refuses, graphs that run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from torch import fx
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.engines.neuri import HybridJob, InduceJob, NeuRI
from cupel.ops.call_mutation import Samples, augmented, results
from cupel.ops.call_records import Instance, recording
from cupel.ops.differential import Target
from cupel.ops.expressions import Bank, in_solver, size_of, values_of
from cupel.ops.fuzzing import FuzzJob, case_of
from cupel.ops.graph_growth import Growth
from cupel.ops.hybrid_growth import grown_hybrid
from cupel.ops.induction import row_by_row
from cupel.ops.operator_specs import operators
from cupel.ops.preconditions import conditions
from cupel.ops.rule_inference import infer, matrix, size_tree
from cupel.ops.tensor_graph import shapes_hold
from cupel.testing.planted import optimised

z3 = pytest.importorskip("z3")
torch.set_num_threads(1)
CTX = Context(seed=2)
t = torch.ones


def instance_of(function: object, *calls: tuple[tuple, dict]) -> Instance:
    with recording({function.__name__: function}) as recorder:
        for args, kwargs in calls:
            function(*args, **kwargs)
    (found,) = recorder.instances()
    return found


def test_recording_tells_symbols_constants_and_layouts_apart() -> None:
    with recording({"narrow": torch.narrow, "cat": torch.cat}) as recorder:
        torch.narrow(t(4, 5), dim=1, start=1, length=3)
        torch.narrow(t(2, 9), dim=1, start=0, length=2)
        torch.narrow(t(2, 9), dim=0, start=0, length=2)  # an axis is no symbol: another instance
        torch.cat([t(2, 3), t(2, 4)], dim=1)
        torch.exp(t(3))  # not watched
    first, second, third = recorder.instances()
    assert first.symbols == ("a0_0", "a0_1", "start", "length") and first.rows == ((4, 5, 1, 3), (2, 9, 0, 2))
    assert second.rows == ((2, 9, 0, 2),) and third.rows == ((2, 3, 2, 4),)
    assert third.tried((3, 3, 3, 5)) == (3, 8) and third.tried((3, 3, 2, 5)) is None
    assert first.tried((4, 5, 3, 3)) is None and first.tried((0, 5, 0, 1)) is None


def test_mutation_finds_calls_that_work_and_calls_that_do_not() -> None:
    instance = instance_of(torch.mm, ((t(2, 3), t(3, 4)), {}))
    samples = augmented(instance, Random(0))
    assert len(samples.passed) > 30 and len(samples.failed) > 30
    assert all(r[1] == r[2] and s == (r[0], r[3]) for r, s in samples.passed.items())
    assert all(r[1] != r[2] or min(r) < 1 for r in samples.failed)


def test_a_process_that_dies_is_a_refusal_of_the_one_call() -> None:
    import os

    def fragile(x: torch.Tensor, n: int) -> torch.Tensor:
        if n == 3:
            os.abort()
        return torch.relu(x)

    with recording({"relu": torch.relu}) as recorder:
        torch.relu(t(2))
    (found,) = recorder.instances()
    shaky = Instance(**{**vars(found), "function": lambda x: fragile(x, len(x))})
    assert results(shaky, [(2,), (3,), (4,)], 10) == [(2,), None, (4,)]


@pytest.mark.parametrize(
    "wanted",
    [
        lambda h, k, s, p: (h + 2 * p - k) // s + 1,
        lambda h, k, s, p: h * k,
        lambda h, k, s, p: (h - k) // s,
        lambda h, k, s, p: h + p + s,
        lambda h, k, s, p: max(h, k),
        lambda h, k, s, p: h + 2 * p - s * (k - 1) - 1,
    ],
)
def test_sizes_are_found_and_hold_on_values_that_were_not_seen(wanted: object) -> None:
    draw = Random(1)
    row = lambda low: (draw.randint(low + 9, low + 30), draw.randint(1, 5), draw.randint(1, 3), draw.randint(0, 3))  # noqa: E731
    rows, fresh = [row(0) for _ in range(60)], [row(20) for _ in range(60)]
    tree = size_tree(matrix(rows), np.array([wanted(*r) for r in rows]), 3)
    assert tree is not None
    assert values_of(tree, matrix(fresh)).tolist() == [wanted(*r) for r in fresh]
    symbols = [z3.Int(n) for n in "hksp"]
    value, conditions_ = in_solver(tree, symbols, z3)
    for r in fresh[:3]:
        solver = z3.Solver()
        solver.add(*(s == v for s, v in zip(symbols, r, strict=True)), *conditions_, value != wanted(*r))
        assert solver.check() == z3.unsat


def test_a_division_asks_for_a_positive_divisor() -> None:
    x, y = z3.Ints("x y")
    for operation in ("//", "%"):
        value, asked = in_solver((operation, ("s", 0), ("s", 1)), [x, y], z3)
        solver = z3.Solver()
        solver.add(*asked, value == 1, y <= 0)
        assert solver.check() == z3.unsat
        assert in_solver((operation, ("s", 0), ("s", 1)), [7, 0], z3)[1] == [False]


def test_bank_holds_every_function_of_two_leaves_once() -> None:
    rows = matrix([(a, b) for a in range(1, 6) for b in range(1, 6)])
    bank = Bank(rows, (0, 1), constants=())
    bank.deepen()
    brute = set()
    for f, (i, j) in itertools.product(
        (np.add, np.subtract, np.multiply, np.floor_divide, np.mod, np.minimum, np.maximum),
        itertools.product((0, 1), (0, 1)),
    ):
        brute.add(f(rows[:, i], rows[:, j]).tobytes())
    assert set(bank.known) == brute | {rows[:, 0].tobytes(), rows[:, 1].tobytes()}
    assert [size_of(tree) for tree in bank.trees] == sorted(size_of(tree) for tree in bank.trees)


def test_conditions_hold_on_all_that_worked_and_refuse_what_failed() -> None:
    every = list(itertools.product(range(1, 6), range(6), range(1, 6)))  # size, begin, length
    good, bad = [r for r in every if r[1] + r[2] <= r[0]], [r for r in every if r[1] + r[2] > r[0]]
    found = conditions(matrix(good), matrix(bad))
    assert len(found) == 1 and found[0][1] == ">= 0"
    tree = found[0][0]
    assert (values_of(tree, matrix(good)) >= 0).all() and (values_of(tree, matrix(bad)) < 0).all()
    assert conditions(matrix(good), matrix(bad)[:0]) == ()  # nothing was refused: nothing is asked


def test_no_rule_for_what_is_no_function_of_the_symbols() -> None:
    draw = Random(0)
    samples = Samples({(k, k + 1): (draw.randint(1, 99),) for k in range(1, 30)})
    assert infer(samples, 2) is None


@pytest.fixture(scope="module")
def learned() -> object:
    def script() -> None:
        draw = Random(4)
        n = draw.randint
        for _ in range(5):
            a, b, c, k = n(2, 6), n(2, 6), n(2, 6), n(1, 3)
            torch.mm(t(a, b), t(b, c))
            F.avg_pool1d(t(a, b, n(5, 9)), k, stride=n(1, 3), padding=n(0, k // 2))
            torch.hypot(t(a, b), t(a, b))
            torch.narrow(t(a, 9), dim=1, start=n(0, 4), length=n(1, 5))

    watched = {"mm": torch.mm, "avg_pool1d": F.avg_pool1d, "hypot": torch.hypot, "narrow": torch.narrow}
    return NeuRI().run(InduceJob(watched, script), CTX)


def test_rules_of_known_functions_are_right_on_unseen_calls(learned) -> None:
    rules = {r.instance.name: r.rule for r in learned.rules}
    assert set(rules) == {"mm", "avg_pool1d", "hypot", "narrow"}
    draw, n = Random(9), Random(9).randint
    for _ in range(60):
        size, k, s = n(1, 20), n(1, 6), n(1, 4)
        p = n(0, 4)
        row = (n(1, 4), n(1, 4), size, k, s, p)
        fits = 2 * p <= k and size + 2 * p >= k
        assert bool(rules["avg_pool1d"].holds(matrix([row]))[0]) == fits
        if fits:
            assert rules["avg_pool1d"].shape(row) == F.avg_pool1d(t(*row[:3]), k, s, p).shape
        a, b, c, d = (draw.randint(2, 4) for _ in range(4))
        assert bool(rules["mm"].holds(matrix([(a, b, c, d)]))[0]) == (b == c)
        assert bool(rules["hypot"].holds(matrix([(a, b, c, d)]))[0]) == ((a, b) == (c, d))


def test_hybrid_graphs_use_all_three_kinds_and_run(learned) -> None:
    used = set()
    for seed in range(5):
        graph = grown_hybrid(learned.pools, Growth(nodes=6), seed)
        assert shapes_hold(graph)
        used |= {"!" if "!" in c.op else "~" if "~" in c.op else "hand" for c in graph.calls}
    assert used == {"!", "~", "hand"}
    trace = NeuRI(nodes=6).run(HybridJob(FuzzJob((), graphs=4), learned.pools), CTX)
    assert trace.valid == 4 and any("~" in name for name in trace.calls)


def test_networks_of_rows_use_functions_that_work_row_by_row(learned) -> None:
    safe = {r.instance.name: row_by_row(r.instance) for r in learned.rules}
    assert safe == {"mm": True, "avg_pool1d": True, "hypot": False, "narrow": True}
    pools, used = replace(learned.pools, recorded=(), written=(operators()["relu"],)), set()
    for seed in range(5):
        graph = grown_hybrid(pools, Growth(nodes=4, rows=True), seed)
        net, inputs, _ = case_of(graph, seed, 5)
        used |= set(graph.own)
        with torch.no_grad():
            torch.testing.assert_close(net(*inputs), torch.cat([net(x) for x in inputs[0].split(1)]))
    assert used and not any(name.startswith("hypot") for name in used)


def test_bugs_in_a_function_that_nobody_specified_are_found(learned) -> None:
    def negated(net: fx.GraphModule, inputs: object) -> fx.GraphModule:
        for node in list(net.graph.nodes):
            if node.target is torch.mm:
                with net.graph.inserting_after(node):
                    other = net.graph.call_function(torch.neg, (node,))
                node.replace_all_uses_with(other, delete_user_cb=lambda user, other=other: user is not other)
        net.recompile()
        return net

    targets = (Target("mm", "tolerance", negated), Target("right", "tolerance", lambda net, x: optimised(net)))
    pools = learned.pools.__class__(learned.pools.recorded, learned.pools.inferred, ())
    trace = NeuRI(nodes=5).run(HybridJob(FuzzJob(targets, graphs=12, apart=False), pools), CTX)
    assert {f.target for f in trace.findings} == {"mm"}
    assert all(len(f.graph.calls) == 1 for f in trace.findings)


def test_same_seed_same_rules() -> None:
    job = InduceJob({"outer": torch.outer}, lambda: torch.outer(t(2), t(5)))
    texts = [str(NeuRI().run(job, CTX).rules[0]) for _ in range(2)]
    assert texts[0] == texts[1] == "outer(f1, f1) = [a0_0, a1_0] if always"


def test_variants_hold_numbers_at_zero_and_below_and_end_after_enough_that_worked() -> None:
    instance = instance_of(torch.narrow, ((t(6, 4), 0, 1, 2), {}))
    base = instance.rows[0]
    samples = augmented(instance, Random(0))
    alone: dict[int, set[int]] = {}
    for row in (*samples.passed, *samples.failed):
        apart = [k for k, (a, b) in enumerate(zip(row, base, strict=True)) if a != b]
        if len(apart) == 1:
            alone.setdefault(apart[0], set()).add(row[apart[0]])
    assert sum({0, -2} <= values for values in alone.values()) == 2  # start and length, not the sizes
    few = augmented(instance, Random(0), passes=3)
    assert len(few.passed) == 3 and few.failed


def test_recorded_calls_are_put_behind_tensors_and_before_them(learned) -> None:
    one = next(r for r in learned.pools.recorded if len(r.inputs) == 2)
    square = replace(one, inputs=(replace(one.output, shape=(3, 3)),) * 2, output=replace(one.output, shape=(3, 3)))
    pools = replace(learned.pools, recorded=(square,), inferred=(), written=())
    calls = [c for seed in range(6) for c in grown_hybrid(pools, Growth(nodes=3), seed).calls]
    assert {c.output > max(c.inputs) for c in calls} == {True, False}  # tensors are numbered as they come
