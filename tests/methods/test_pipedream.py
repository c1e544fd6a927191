"""`pipedream`: partition by brute force, schedule by hand, versions of the weights by a slow loop, real processes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import CupelError, ParamError, PlanError
from cupel.core.fit import fit
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Budget, Examples
from cupel.engines.pipedream import ClusterJob, Forecast, PipeDream, PipelineJob, Trace
from cupel.ops.layer_costs import LayerCost, profile_layers
from cupel.ops.partition import Level, Stage, partition, sent_bytes
from cupel.ops.schedule import link_bandwidth, order, simulate, warm_ups
from cupel.ops.stage_worker import mean_of

torch.set_num_threads(1)


def stage_seconds(part: Sequence[LayerCost], m: int, bandwidth: float) -> float:
    return (sum(c.seconds for c in part) + 4 * (m - 1) * sum(c.weight_bytes for c in part) / (bandwidth * m)) / m


def all_plans(layers: int, machines: int):
    """Every way to cut a chain and to spread at most `machines` over the parts."""
    for count in range(1, layers + 1):
        for cuts in itertools.combinations(range(1, layers), count - 1):
            ends = (0, *cuts, layers)
            for replicas in itertools.product(range(1, machines + 1), repeat=count):
                if sum(replicas) <= machines:
                    yield list(zip(ends, ends[1:], replicas, strict=False))


def brute(layers: Sequence[LayerCost], machines: int, bandwidth: float, memory: float = math.inf) -> float:
    best = math.inf
    for plan in all_plans(len(layers), machines):
        worst = 0.0
        for k, (a, b, m) in enumerate(plan):
            worst = max(worst, stage_seconds(layers[a:b], m, bandwidth))
            if k:
                worst = max(worst, 2 * layers[a - 1].output_bytes / (bandwidth * m))
            flight = math.ceil(sum(p[2] for p in plan[k + 1 :]) / m) + 1
            if flight * sum(c.output_bytes + c.weight_bytes for c in layers[a:b]) > memory:
                worst = math.inf
        best = min(best, worst)
    return best


def random_layers(draw: random.Random, most: int) -> list[LayerCost]:
    return [
        LayerCost(draw.uniform(0.1, 2), draw.uniform(0, 2), draw.choice([0.1, 1, 5]) * draw.random())
        for _ in range(draw.randint(1, most))
    ]


@pytest.mark.parametrize("limited", [False, True])
def test_partition_equals_brute_force(limited):
    draw = random.Random(int(limited))
    refused = 0
    for _ in range(20):
        layers, machines = random_layers(draw, 5), draw.randint(1, 4)
        memory = draw.uniform(2, 20) if limited else math.inf
        want = brute(layers, machines, 1.0, memory)
        if want == math.inf:
            refused += 1
            with pytest.raises(PlanError, match="must fit into"):
                partition(layers, [Level(machines, 1.0)], memory)
            continue
        plan = partition(layers, [Level(machines, 1.0)], memory)
        assert plan.seconds == pytest.approx(want, rel=1e-12)
        assert [s.first for s in plan.stages] == [0, *(s.last for s in plan.stages[:-1])]
        assert plan.stages[-1].last == len(layers)
        assert sum(s.replicas for s in plan.stages) <= machines
    assert bool(refused) == limited


def test_partition_over_two_levels_equals_nested_brute_force():
    draw = random.Random(3)
    for _ in range(8):
        layers = random_layers(draw, 4)
        best = math.inf
        for plan in all_plans(len(layers), 2):
            worst = 0.0
            for k, (a, b, m) in enumerate(plan):
                inner = brute(layers[a:b], 2, 8.0)
                weights = sum(c.weight_bytes for c in layers[a:b])
                worst = max(worst, (inner + 4 * (m - 1) * weights / (1.0 * m)) / m)
                if k:
                    worst = max(worst, 2 * layers[a - 1].output_bytes / (1.0 * m))
            best = min(best, worst)
        found = partition(layers, [Level(2, 8.0), Level(2, 1.0)])
        assert found.seconds == pytest.approx(best, rel=1e-12)
        assert sum(s.replicas for s in found.stages) <= 4


def test_replicas_of_nested_levels_multiply():
    light = [LayerCost(1.0, 1e9, 1e-9)] * 3  # activations too large to cut anywhere
    assert partition(light, [Level(2, 1.0), Level(3, 1.0)]).stages == (Stage(0, 3, 6),)


def test_a_plan_over_two_levels_is_checked_for_memory():
    layers = [LayerCost(1.0, 1.0, 1.0)] * 4
    with pytest.raises(PlanError, match="must fit into 1 bytes"):
        partition(layers, [Level(2, 1.0), Level(2, 1.0)], memory=1.0)


def test_schedule_of_four_stages_is_the_papers():
    warm = warm_ups([1, 1, 1, 1])
    rows = [" ".join(kind[0] + str(t) for kind, t in order(0, 1, w, 5)) for w in warm]
    assert rows == [
        "f0 f1 f2 f3 b0 f4 b1 b2 b3 b4",
        "f0 f1 f2 b0 f3 b1 f4 b2 b3 b4",
        "f0 f1 b0 f2 b1 f3 b2 f4 b3 b4",
        "f0 b0 f1 b1 f2 b2 f3 b3 f4 b4",
    ]
    assert list(order(1, 3, 1, 8))[:4] == [("forward", 1), ("forward", 4), ("backward", 1), ("forward", 7)]


def test_every_small_configuration_runs_to_its_end():
    for count in range(1, 5):
        for replicas in itertools.product(range(1, 4), repeat=count):
            if sum(replicas) <= 7:
                stages = [Stage(k, k + 1, m) for k, m in enumerate(replicas)]
                for batches in (1, 5, 11):
                    assert simulate([LayerCost(1, 0.1, 0.1)] * count, stages, [Level(7, 1.0)], batches).seconds > 0


@pytest.mark.parametrize("count", [2, 4, 8])
def test_balanced_stages_without_transfers_work_all_the_time(count):
    stages = [Stage(k * 8 // count, (k + 1) * 8 // count) for k in range(count)]
    level = [Level(8, 1.0)]
    piped = simulate([LayerCost(1.0, 0, 9.0)] * 8, stages, level, 64)
    alone = simulate([LayerCost(1.0, 0, 9.0)] * 8, stages, level, 64, pipelined=False)
    assert piped.throughput == pytest.approx(count / 8)
    assert alone.throughput == pytest.approx(1 / 8)
    assert piped.seconds == pytest.approx(64 * 8 / count + (count - 1) * 8 / count)  # the pipe fills once
    assert piped.sent_bytes == 0


def test_simulated_data_parallelism_and_transfers_follow_their_formulas():
    layers = [LayerCost(1.0, 2.0, 3.0)] * 4
    whole = simulate(layers, [Stage(0, 4, 4)], [Level(4, 10.0)], 64)
    assert whole.throughput == pytest.approx(1 / stage_seconds(layers, 4, 10.0))
    assert whole.sent_bytes == pytest.approx(2 * 3 / 4 * 12)
    cut = [Stage(0, 2), Stage(2, 4)]
    assert simulate(layers, cut, [Level(2, 10.0)], 8, pipelined=False).throughput == pytest.approx(1 / (4 + 2 * 2 / 10))
    assert sent_bytes(layers, cut) == 4
    assert [link_bandwidth([Level(2, 8.0), Level(2, 1.0)], 0, other) for other in (1, 2, 3)] == [8.0, 1.0, 1.0]


def test_forecast_plans_and_compares():
    job = ClusterJob((LayerCost(1.0, 0.01, 0.0), LayerCost(1.0, 0.01, 50.0)), (Level(2, 1.0),))
    found = PipeDream().run(job, Context())
    assert isinstance(found, Forecast)
    assert found.plan.stages == (Stage(0, 1), Stage(1, 2))
    # With two in flight the gradient's way back is waited for.
    assert found.pipeline.throughput == pytest.approx(1 / 1.01)
    assert found.pipeline.throughput > 1.9 * found.unpipelined.throughput
    assert found.data_parallel.throughput == pytest.approx(1 / stage_seconds(job.costs, 2, 1.0))


def test_profile_counts_bytes_and_leaves_the_layers():
    layers = [nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)]
    before = [p.clone() for layer in layers for p in layer.parameters()]
    costs = profile_layers(layers, torch.randn(16, 8), repeats=2)
    assert [c.output_bytes for c in costs] == [16 * 4 * 4, 16 * 4 * 4, 16 * 2 * 4]
    assert [c.weight_bytes for c in costs] == [36 * 4, 0, 8 * 4]
    assert all(c.seconds > 0 for c in costs)
    after = [p for layer in layers for p in layer.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))


# --- numbers of the pipeline itself


def chain(seed: int = 0) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [
            nn.Sequential(nn.Linear(6, 8), nn.Tanh()),
            nn.Sequential(nn.Linear(8, 7), nn.Tanh()),
            nn.Sequential(nn.Linear(7, 8), nn.Tanh()),
            nn.Linear(8, 3),
        ]


def examples(count: int = 64) -> Examples:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=draw)
    return Examples(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long(), torch.arange(count))


TASK = Classification(3)
BUDGET = Budget(epochs=2, batch_size=8, optimizer="sgd", lr=0.3, momentum=0.9, schedule="linear")
CTX = Context(seed=5, path=("fit",))


def piped(versions: str, cuts: Sequence[tuple[int, int, int]], processes: bool = False, **budget) -> Trace:
    stages = tuple(Stage(*c) for c in cuts)
    job = PipelineJob(chain(), examples(), TASK, Budget(**{**vars(BUDGET), **budget}), stages, processes)
    return PipeDream(versions).run(job, CTX)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("versions", ["stash", "vertical", "latest", "predict"])
def test_one_stage_gives_the_bits_of_fit(versions, optimizer):
    budget = Budget(**{**vars(BUDGET), "optimizer": optimizer, "lr": 0.02})
    net = fit(nn.Sequential(*chain()), examples(), TASK, budget=budget, seed=5)
    trace = piped(versions, [(0, 4, 1)], optimizer=optimizer, lr=0.02)
    assert same(net, trace.model)
    assert (trace.versions, trace.delays, trace.sent_bytes["activations"]) == ((1,), (0,), 0)


def slow(versions: str, cuts: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """The update formulas of the sheet, mini-batch by mini-batch, with all old weights kept in lists."""
    draw = CTX.rng("order")
    batches = [b for _ in range(BUDGET.epochs) for b in examples().batches(BUDGET.batch_size, draw)]
    parts = [nn.Sequential(*chain()[a:b]) for a, b, _ in cuts]
    warm = [math.ceil(sum(c[2] for c in cuts[k + 1 :]) / cut[2]) for k, cut in enumerate(cuts)]
    weights = [[[p.detach() for p in part.parameters()]] for part in parts]  # [stage][version][parameter]
    speed = [[[torch.zeros_like(p) for p in part.parameters()]] for part in parts]
    pending: list[list[list[Tensor]]] = [[] for _ in parts]
    for t, batch in enumerate(batches):
        used = []
        for k, (_, _, m) in enumerate(cuts):
            if versions == "vertical":
                first = cuts[0][2]
                version = max(0, t // first - warm[0]) * first // m
            else:
                version = max(0, t // m - warm[k])
            point = weights[k][version]
            if versions == "predict" and version > 0:
                total = math.ceil(len(batches) / m)
                ahead = (t // m - version) * BUDGET.lr * (1 - version / total)
                point = [p - ahead * v for p, v in zip(point, speed[k][version], strict=True)]
            used.append([p.clone().requires_grad_() for p in point])
        out = batch.inputs
        for part, point in zip(parts, used, strict=True):
            names = [name for name, _ in part.named_parameters()]
            out = torch.func.functional_call(part, dict(zip(names, point, strict=True)), (out,))
        grads = iter(torch.autograd.grad(TASK.loss(out, batch), [p for point in used for p in point]))
        for k, (_, _, m) in enumerate(cuts):
            pending[k].append([next(grads) for _ in used[k]])
            if len(pending[k]) == m or t == len(batches) - 1:
                mean = [torch.stack(g).mean(0) for g in zip(*pending[k], strict=True)]
                pending[k] = []
                done, total = len(weights[k]) - 1, math.ceil(len(batches) / m)
                lr = BUDGET.lr * (1 - done / total)
                # torch's SGD starts its momentum buffer with the first gradient, as this does.
                speed[k].append([0.9 * v + g for v, g in zip(speed[k][-1], mean, strict=True)])
                weights[k].append([p - lr * v for p, v in zip(weights[k][-1], speed[k][-1], strict=True)])
    return [p for stage in weights for p in stage[-1]]


FOUR = [(0, 1, 1), (1, 2, 1), (2, 3, 1), (3, 4, 1)]
MIXED = [(0, 1, 2), (1, 3, 3), (3, 4, 1)]


@pytest.mark.parametrize("cuts", [FOUR, MIXED])
@pytest.mark.parametrize("versions", ["stash", "vertical", "predict"])
def test_pipeline_follows_its_formula(versions, cuts):
    trace = piped(versions, cuts)
    pairs = zip(slow(versions, cuts), trace.model.parameters(), strict=True)
    gap = max(float((a - b.detach()).abs().max()) for a, b in pairs)
    assert gap <= 1e-6


def test_versions_and_delays_are_those_of_the_paper():
    trace = piped("stash", FOUR)
    assert (trace.versions, trace.delays) == ((4, 3, 2, 1), (3, 2, 1, 0))
    synced = piped("vertical", FOUR)
    assert (synced.versions, synced.delays) == ((4, 4, 4, 4), (3, 3, 3, 3))
    assert piped("predict", FOUR).delays == (3, 2, 1, 0)


@dataclass(frozen=True)
class Sum:
    """A task without curvature: the loss is the sum of outputs over the batch."""

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        return out.sum()


def test_without_stashing_the_backward_meets_newer_weights():
    draw = torch.Generator().manual_seed(2)
    layers = [nn.Linear(2, 2, bias=False) for _ in range(3)]
    for layer in layers:
        layer.weight.data = torch.randn(2, 2, generator=draw)
    data = Examples(torch.randn(6, 2, generator=draw), torch.zeros(6), torch.arange(6))
    budget = Budget(epochs=1, batch_size=2, optimizer="sgd", lr=0.1, momentum=0.0)
    job = PipelineJob(layers, data, Sum(), budget, (Stage(0, 2), Stage(2, 3)))
    rows = [b.inputs for b in data.batches(2, CTX.rng("order"))]
    lr = 0.1
    ends = {}
    for versions in ("stash", "latest"):
        first, middle, last = (layer.weight.detach().clone() for layer in layers)
        held = []
        for t in range(3):  # the first stage has passed mini-batches t and t + 1 before the gradient of t comes back
            while len(held) <= min(t + 1, 2):
                held.append((first.clone(), middle.clone()))
            old_first, old_middle = held[t]
            hidden = rows[t] @ old_first.T  # [B, 2]
            above = torch.ones(2, 2)  # the loss is a sum
            below = above @ last  # into the first stage
            last = last - lr * above.T @ (hidden @ old_middle.T)
            back = middle if versions == "latest" else old_middle
            first, middle = first - lr * (below @ back).T @ rows[t], middle - lr * below.T @ hidden
        trace = PipeDream(versions).run(job, CTX)
        for want, got in zip((first, middle, last), trace.model.parameters(), strict=True):
            assert torch.allclose(want, got, atol=1e-6), versions
        ends[versions] = trace.model[0].weight.detach()
    assert not torch.allclose(ends["stash"], ends["latest"], atol=1e-4)


def test_a_last_batch_of_one_changes_nothing():
    job = PipelineJob(chain(), examples(65), TASK, BUDGET, (Stage(0, 4),))
    net = fit(nn.Sequential(*chain()), examples(65), TASK, budget=BUDGET, seed=5)
    trace = PipeDream().run(job, CTX)
    assert same(net, trace.model)
    assert len(trace.losses) == 16


def test_real_processes_give_the_same_bits():
    cuts = [(0, 2, 2), (2, 4, 1)]
    here, there = piped("predict", cuts, epochs=1), piped("predict", cuts, processes=True, epochs=1)
    assert same(here.model, there.model)
    assert here.losses == there.losses
    assert (here.versions, here.delays, here.sent_bytes) == (there.versions, there.delays, there.sent_bytes)
    with pytest.raises(CupelError, match=r"worker \(0, 0\) failed(.|\n)*cannot be multiplied"):
        broken = [nn.Linear(5, 8), nn.Linear(8, 3)]
        job = PipelineJob(broken, examples(), TASK, BUDGET, (Stage(0, 1), Stage(1, 2)), processes=True)
        PipeDream().run(job, CTX)


def test_bytes_sent_are_those_of_the_formula():
    trace = piped("stash", [(0, 2, 2), (2, 4, 1)], epochs=1)
    batches, cut, weights = 8, 8 * 7 * 4, 4 * sum(p.numel() for layer in chain()[:2] for p in layer.parameters())
    assert trace.sent_bytes == {
        "activations": batches * cut,
        "gradients": batches * cut,
        "weights": 2 * batches // 2 * weights,
    }
    costs = [LayerCost(1, 0, 0), LayerCost(1, cut, weights), LayerCost(1, 0, 0), LayerCost(1, 0, 0)]
    assert sum(trace.sent_bytes.values()) == batches * sent_bytes(costs, [Stage(0, 2, 2), Stage(2, 4)])


def test_leaves_layers_and_generators_and_repeats_with_dropout():
    layers = [nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)), nn.Linear(8, 3)]
    before, state = [p.clone() for layer in layers for p in layer.parameters()], torch.get_rng_state()
    job = PipelineJob(layers, examples(), TASK, BUDGET, (Stage(0, 1, 2), Stage(1, 2)))
    first, second = PipeDream().run(job, CTX), PipeDream().run(job, CTX)
    assert same(first.model, second.model)
    assert not first.model.training
    equal = Examples(
        torch.ones(8, 6), torch.zeros(8, dtype=torch.long), torch.arange(8)
    )  # order cannot tell seeds apart
    alike = PipelineJob(layers, equal, TASK, BUDGET, (Stage(0, 1), Stage(1, 2)))
    seeds = [PipeDream().run(alike, Context(seed=s, path=("fit",))).losses[0] for s in (5, 5, 6)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(torch.equal(a, b) for a, b in zip(before, (p for x in layers for p in x.parameters()), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_refusals_say_what_to_do():
    with pytest.raises(PlanError, match=r"without a gap; got \[\(0, 1\), \(2, 4\)\]"):
        piped("stash", [(0, 1, 1), (2, 4, 1)])
    with pytest.raises(PlanError, match="must cover layers 0 to 4"):
        piped("stash", [(0, 3, 1)])
    with pytest.raises(CupelError, match="Lower lr"):
        piped("stash", FOUR, lr=1e30, schedule="constant")
    with pytest.raises(ParamError, match="versions"):
        piped("newest", FOUR)


def test_mean_adds_in_order_and_keeps_absent_names_absent():
    parts = [{"a": torch.tensor([1.0])}, {"a": torch.tensor([4.0])}, {"a": torch.tensor([1.0])}]
    assert mean_of(parts)["a"].tolist() == [2.0]
    assert mean_of([{}, {}]) == {}
