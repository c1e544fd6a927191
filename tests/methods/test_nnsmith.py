"""`nnsmith`: graphs that run, inputs that are finite, bugs that are found and cut down, and no false alarm."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.engines.nnsmith import NNSmith
from cupel.ops.differential import Target, gap_of, judged, steady
from cupel.ops.finite_inputs import finite_inputs, sampled_inputs, violation
from cupel.ops.fuzzing import FuzzJob, case_of, start_of
from cupel.ops.graph_growth import Garden, Growth, grown
from cupel.ops.graph_resizing import smaller_sizes
from cupel.ops.isolated import isolated
from cupel.ops.minimising import minimised
from cupel.ops.operator_specs import operators
from cupel.ops.tensor_graph import Call, Graph, Type, module_of, recorded_types, shapes_hold
from cupel.testing.fuzz_targets import by_cards, trainable
from cupel.testing.planted import optimised

pytest.importorskip("z3")
torch.set_num_threads(1)
CTX = Context(seed=3)


def chain(*names: str, shape: tuple[int, ...] = (4, 5), rows: bool = False) -> Graph:
    """Unary calls one after the other."""
    types = {k: Type(shape) for k in range(len(names) + 1)}
    calls = tuple(Call(name, (k,), {}, k + 1) for k, name in enumerate(names))
    return Graph(types, (0,), (), calls, rows)


@pytest.mark.parametrize("rows", [False, True])
def test_grown_graphs_run_with_the_types_that_were_foretold(rows: bool) -> None:
    used = set()
    for seed in range(8):
        graph = grown(Growth(nodes=6, rows=rows), seed)
        assert shapes_hold(graph)
        net = module_of(graph, seed=seed)
        assert recorded_types(net, graph, start_of(graph, seed)) == {
            c.output: graph.types[c.output] for c in graph.calls
        }
        used |= {c.op for c in graph.calls}
    assert len(used) > 15


def test_a_solver_that_gives_up_at_the_end_leaves_sizes_that_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    keep, harvest = Garden._keep, Garden.harvest

    class Tired:
        """No effort is left for one more check, and what was not found cannot be asked for."""

        def check(self) -> None:
            return None

    def tire(self: Garden, bins: list) -> None:
        monkeypatch.setattr(Garden, "_keep", keep)
        keep(self, bins)
        self.solver = Tired()

    def last(self: Garden) -> Graph:
        monkeypatch.setattr(Garden, "_keep", tire)
        return harvest(self)

    monkeypatch.setattr(Garden, "harvest", last)
    for seed in range(4):
        graph = grown(Growth(nodes=6, rows=True), seed)
        assert shapes_hold(graph)
        module_of(graph, seed=seed)(*start_of(graph, seed))


def test_a_network_of_rows_gives_every_row_for_itself() -> None:
    seen = 0
    for seed in range(8):
        graph = grown(Growth(nodes=6, rows=True, batch=4), seed)
        net, inputs, finite = case_of(graph, seed, 20)
        if not finite or not graph.smooth:
            continue
        with torch.no_grad():
            whole, single = net(*inputs), torch.cat([net(row) for row in inputs[0].split(1)])
        assert whole.ndim == 2 and len(whole) == 4
        torch.testing.assert_close(whole, single, rtol=1e-3, atol=1e-3 * max(1.0, float(whole.abs().max())))
        seen += 1
    assert seen > 1


def test_same_seed_same_graph_other_seed_another() -> None:
    texts = [str(grown(Growth(nodes=6), seed)) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    state = torch.get_rng_state()
    module_of(grown(Growth(nodes=6, rows=True), 1), seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_bins_spread_sizes_beyond_the_solvers_smallest() -> None:
    sizes = [s for seed in range(8) for t in grown(Growth(nodes=3), seed).types.values() for s in t.shape]
    assert max(sizes) >= 32 and sum(s == 1 for s in sizes) < 0.8 * len(sizes)


@pytest.mark.parametrize(
    "name", ["conv2d", "max_pool2d", "avg_pool2d", "conv_transpose2d", "reshape", "stride", "matmul"]
)
def test_rules_agree_with_torch_on_random_sizes(name: str) -> None:
    """A rule's conditions and result against what torch does, on whole numbers and without the solver."""
    operator, draw = operators()[name], torch.Generator().manual_seed(len(name))
    names, fitting, refused = list(operator.attributes), 0, 0
    for _ in range(150):

        def of(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=draw))

        if name == "matmul":
            shapes = [[of(1, 2), of(1, 3), of(1, 3)] for _ in range(2)]
        else:
            shapes = [[2, of(1, 4), of(1, 7), of(1, 7)]]
        a = {n: of(operator.attributes[n][0], min(5, operator.attributes[n][1])) for n in names}
        if name == "reshape":
            a |= {"size0": shapes[0][1] * shapes[0][3], "size1": shapes[0][2] + (of(0, 3) == 0)}
        if name == "conv2d":
            a |= {"groups": of(1, 2), "per_group": of(1, 2), "out_per_group": of(1, 2)}
            shapes[0][1] = a["groups"] * a["per_group"] + (of(0, 5) == 0)
            a["out"] = a["groups"] * a["out_per_group"]
        a |= {"axis": 2} if name == "stride" else {"lead": 1, "axes": 2} if name == "reshape" else {}
        told, wanted = operator.rule(shapes, a)
        holds = all(told) and all(s >= 1 for s in wanted)
        types = {k: Type(tuple(s)) for k, s in enumerate(shapes)}
        graph = Graph(types | {9: Type(())}, tuple(types), (), (Call(name, tuple(types), a, 9),))
        try:
            found = module_of(graph)(*start_of(graph, 0))[0].shape
        except (RuntimeError, ValueError):
            found = None
        if holds:
            assert found is not None and list(found) == wanted, (shapes, a)
        else:
            refused += found is None or found.numel() == 0
        fitting += holds
    assert fitting > 3 and (refused > 5 or name in ("conv_transpose2d", "stride"))


def test_gradients_find_what_random_values_do_not() -> None:
    graph, draw = chain("asin", "log", "sqrt", shape=(2, 3)), torch.Generator().manual_seed(1)
    start = start_of(graph, 0)
    assert not sampled_inputs(module_of(graph), start, draw, 100).finite
    net = module_of(graph)
    found = finite_inputs(net, start, draw, 100)
    assert found.finite and found.forwards <= 100
    assert all(bool(t.isfinite().all()) for t in net(*found.inputs))
    assert bool((found.inputs[0] > 0.84).all()) and bool((found.inputs[0] <= 1).all())  # sin(1) = 0.84


def test_search_moves_weights_and_stops_at_what_has_no_solution() -> None:
    types = {0: Type((3,)), 1: Type((3,)), 2: Type((3,)), 3: Type((3,))}
    ones = {"ones": ((False,), (False,))}
    graph = Graph(types, (0,), (1,), (Call("sub", (0, 1), ones, 2), Call("log", (2,), {}, 3)))
    net = module_of(graph)
    before = net.w1.detach().clone()
    found = finite_inputs(net, start_of(graph, 2), torch.Generator().manual_seed(0), 60)
    assert found.finite and not torch.equal(before, net.w1)
    hopeless = chain("sigmoid", "log", "log")  # log of a number below 1 is negative
    end = finite_inputs(module_of(hopeless), start_of(hopeless, 0), torch.Generator().manual_seed(0), 25)
    assert not end.finite and end.forwards == 25


def test_running_figures_of_a_norm_have_no_slope() -> None:
    class Logged(nn.Module):
        def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return torch.log(x) + functional.batch_norm(x, mean, var).square()

    net, start = fx.symbolic_trace(Logged()), (-torch.rand(4, 2), torch.zeros(2), torch.ones(2))
    found = finite_inputs(net, start, torch.Generator().manual_seed(0), 80)
    assert found.finite and bool(net(*found.inputs).isfinite().all())
    later = fx.symbolic_trace(lambda x, mean, var: torch.log(functional.batch_norm(x, mean, var)))
    assert finite_inputs(later, start, torch.Generator().manual_seed(0), 2).forwards == 2


@pytest.mark.parametrize(
    ("function", "bad", "good"),
    [
        (torch.sqrt, [-1.0], [4.0]), (torch.log, [-1.0], [4.0]), (torch.asin, [2.0], [0.5]), (torch.exp, [99.0], [3.0]),
        (torch.div, [1.0, 0.0], [1.0, 2.0]), (torch.pow, [-2.0, 0.5], [2.0, 0.5]), (torch.pow, [9.0, 99.0], [9.0, 2.0]),
        (torch.mul, [1e30, 1e30], [1.0, 2.0]),
    ],
)  # fmt: skip
def test_violation_is_zero_in_the_domain_and_falls_towards_it(function: object, bad: list, good: list) -> None:
    leaves = [torch.tensor([v], requires_grad=True) for v in bad]
    loss = violation(function, tuple(leaves))
    assert loss is not None and float(loss.detach()) > 0
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    closer = tuple(
        x.detach() - 1e-3 * x.detach().abs().clamp_min(1) * g.sign() if g is not None else x.detach()
        for x, g in zip(leaves, grads, strict=True)
    )
    assert float(violation(function, closer)) < float(loss.detach())
    assert float(violation(function, tuple(torch.tensor([v]) for v in good))) == 0


def wrong_on_abs(net: fx.GraphModule, inputs: tuple[Tensor, ...]) -> nn.Module:
    """A rewriting that takes |x| for x."""
    for node in list(net.graph.nodes):
        if node.target is torch.abs:
            node.replace_all_uses_with(node.args[0])
            net.graph.erase_node(node)
    net.recompile()
    return net


def test_a_wrong_rewriting_is_found_and_cut_down_to_one_small_call() -> None:
    target = Target("abs", "tolerance", wrong_on_abs)
    graph = chain("tanh", "neg", "abs", "sin", "relu", shape=(4, 6))
    verdict = judged(target, module_of(graph), start_of(graph, 0), apart=False)
    assert verdict.kind == "inconsistency"

    def fails(smaller: Graph) -> bool:
        return judged(target, module_of(smaller), start_of(smaller, 0), apart=False).kind == "inconsistency"

    small = minimised(graph, fails)
    assert [c.op for c in small.calls] == ["neg", "abs"]  # inputs are positive: something must make them negative
    assert small.types[small.inputs[0]].shape == (1, 1)
    assert fails(small)


def test_sizes_shrink_only_to_what_the_calls_allow() -> None:
    types = {0: Type((2, 8, 9, 9)), 1: Type((2, 4, 4, 4))}
    a = {
        "kernel": 3,
        "stride": 2,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        "per_group": 8,
        "out": 4,
        "out_per_group": 4,
        "biased": 1,
    }
    graph = Graph(types, (0,), (), (Call("conv2d", (0,), a, 1),))
    sums = []
    for _ in range(20):
        smaller = next(smaller_sizes(graph), None)
        if smaller is None:
            break
        graph = smaller
        sums.append(sum(graph.types[0].shape) + sum(graph.calls[0].attributes.values()))
        assert shapes_hold(graph) and module_of(graph)(*start_of(graph, 0))[0].shape == graph.types[1].shape
    assert sums == sorted(set(sums), reverse=True) and graph.types[0].shape == (1, 1, 1, 1)


def test_levels_and_forms_of_disagreement() -> None:
    x = torch.tensor([1.0, float("nan"), 100.0])
    near, far = x * (1 + 1e-5), x * 1.1
    assert gap_of([x], [x.clone()], "exact")[0] == 0
    assert gap_of([x], [near], "exact")[0] == float("inf")
    assert gap_of([x], [near], "tolerance")[0] < 1 < gap_of([x], [far], "tolerance")[0]
    assert gap_of([x], [far], "loose")[0] < 1
    assert gap_of([x], [x.double()], "loose")[0] == gap_of([x], [x[:2]], "loose")[0] == float("inf")
    assert gap_of([x], [x, x], "loose")[0] == float("inf")
    assert gap_of([x], [torch.tensor([1.0, 2.0, 100.0])], "loose")[0] == float("inf")
    assert gap_of([x[:1]], [x[:1] + 50], "form")[0] == 0 < gap_of([x[:1]], [x[1:2]], "form")[0]


def test_a_network_that_rounding_moves_is_not_steady() -> None:
    assert steady(module_of(chain("tanh")), (torch.rand(3, 3),), "tolerance")
    assert not steady(module_of(chain("floor")), (torch.tensor([[2.0 - 2e-7]]),), "tolerance")


def test_crashes_endless_loops_and_dead_processes_are_told_apart() -> None:
    def raising(net: fx.GraphModule, inputs: tuple[Tensor, ...]) -> nn.Module:
        raise KeyError("lost")

    def dying(net: fx.GraphModule, inputs: tuple[Tensor, ...]) -> nn.Module:
        os.kill(os.getpid(), signal.SIGKILL)
        return net

    def endless(net: fx.GraphModule, inputs: tuple[Tensor, ...]) -> nn.Module:
        while True:
            pass

    net, x = module_of(chain("tanh")), (torch.rand(4, 5),)
    one = Target("t", "exact", raising, seconds=1)
    assert judged(one, net, x).kind == "crash" and "lost" in judged(one, net, x).detail
    assert judged(replace(one, refusals=("KeyError",)), net, x).kind == "refused"
    assert "SIGKILL" in judged(replace(one, make=dying), net, x).detail
    assert judged(replace(one, make=endless), net, x).kind == "timeout"
    assert "only with" in judged(replace(one, plainer=lambda n, x: n), net, x).detail
    assert "also without" in judged(replace(one, plainer=raising), net, x).detail
    assert isolated(lambda: 7, 5).value == 7


def test_planted_bugs_are_found_and_a_right_optimiser_is_not_blamed() -> None:
    only = ("relu", "sin", "sub", "cat")
    wanted = ("", "sub-commutes", "cat-reversed", "double-relu-eats-other")
    targets = tuple(Target(d or "right", "tolerance", lambda net, x, d=d: optimised(net, d)) for d in wanted)
    trace = NNSmith(nodes=8, only=only).run(FuzzJob(targets, graphs=10, apart=False), CTX)
    assert trace.valid == trace.graphs == trace.finite == 10
    assert {f.target for f in trace.findings} == set(wanted[1:])
    for finding in trace.findings:
        assert len(finding.graph.calls) <= 2 < finding.calls
        assert all(max(t.shape, default=1) <= 2 for t in finding.graph.types.values())
        again, inputs, finite = case_of(finding.graph, finding.seed, 60)
        assert finite
        target = next(t for t in targets if t.name == finding.target)
        assert judged(target, again, inputs, apart=False).kind == finding.kind == "inconsistency"
    assert set(trace.judged["right"]) <= {"same", "unsteady"}


def test_jobs_go_on_where_they_ended_and_stop_in_time() -> None:
    engine, job = NNSmith(nodes=3), FuzzJob((), graphs=6)
    whole = engine.run(job, CTX).calls
    parts = [engine.run(replace(job, graphs=3, first=k), CTX).calls for k in (0, 3)]
    assert whole == {n: sum(p.get(n, 0) for p in parts) for n in whole}
    assert engine.run(replace(job, graphs=10**6, seconds=0.1), CTX).graphs < 100


def test_refuses_operators_it_does_not_know() -> None:
    with pytest.raises(PlanError, match="Did you mean 'conv2d'"):
        NNSmith(only=("conv2",)).run(FuzzJob(()), CTX)


class HeldFigures(nn.Module):
    """Its weights are the running statistics of a norm, which torch does not differentiate."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.var = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var)


def test_what_cannot_be_trained_at_all_is_refused_and_no_crash() -> None:
    x = torch.randn(4, 3)
    target = next(t for t in by_cards() if t.name == "jacobian-ensembles-tiny")
    with pytest.raises(PlanError, match="passes no gradient to its weights"):
        target.make(HeldFigures().eval(), (x,))
    assert trainable(nn.Linear(3, 2), x) and not trainable(HeldFigures().eval(), x)
