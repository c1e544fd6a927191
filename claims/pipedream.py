"""Claim of `pipedream`: plans are optimal, pipelines pay, stashed gradients are right, prediction repairs staleness."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Examples
from cupel.data.digits import digits
from cupel.engines.pipedream import ClusterJob, PipeDream, PipelineJob
from cupel.ops.layer_costs import LayerCost
from cupel.ops.partition import Level, Stage, partition
from cupel.ops.schedule import simulate
from cupel.runner.claims import Claim

CLAIM = Claim(
    method="pipedream",
    statement="The partitioner equals brute force; on the paper's first cluster, simulated, four stages of VGG-16 run "
    "three times as fast as the same stages one batch at a time, the plan for VGG-16 sends at most a tenth of data "
    "parallelism's bytes, and for ResNet-50 data parallelism itself is chosen; a stashed gradient is autograd's at the "
    "mixed versions and one without stashing is not; weight prediction wins back most of what staleness costs with "
    "momentum",
    paper="up to 95% less communication than data parallelism, up to 5 times faster to a given accuracy (5 networks)",
    bounds={
        "partition_gap": "<= 1e-9",
        "speed_up_over_unpipelined": ">= 3",
        "vgg_bytes_share": "<= 0.1",
        "resnet_chosen_stages": "<= 1",
        "stash_gradient_gap": "<= 1e-6",
        "latest_gradient_gap": ">= 1e-4",
        "repaired_share": ">= 0.8",
        "repaired_over_synchronous": "<= 1.5",
    },
    quick_seeds=1,
    explains="Only the bytes of VGG-16 miss, 10.7 against 10 percent, and no plan with seven workers in the first stage "
    "sends less: half of it is the averaging of the convolutions' gradients among the seven, half the activations at "
    "the cut. The partitioner minimises time, not bytes; the paper's 95 percent is the best case of its networks. "
    "Also seen: the partitioner alone would cut ResNet-50 into five stages, because it counts transfers as overlapped; "
    "with eight mini-batches in flight they are not, and the simulation shows 0.58 of data parallelism's throughput.",
)


def brute(layers: Sequence[LayerCost], machines: int, bandwidth: float) -> float:
    """Least bottleneck over every cut and every spread of at most `machines`."""
    best = math.inf
    for count in range(1, len(layers) + 1):
        for cuts in itertools.combinations(range(1, len(layers)), count - 1):
            ends = (0, *cuts, len(layers))
            for copies in itertools.product(range(1, machines - count + 2), repeat=count):
                if sum(copies) > machines:
                    continue
                worst = 0.0
                for a, b, m in zip(ends, ends[1:], copies, strict=False):
                    weights = sum(c.weight_bytes for c in layers[a:b])
                    worst = max(
                        worst, (sum(c.seconds for c in layers[a:b]) + 4 * (m - 1) * weights / (bandwidth * m)) / m
                    )
                    if a:
                        worst = max(worst, 2 * layers[a - 1].output_bytes / (bandwidth * m))
                best = min(best, worst)
    return best


def partition_gap(seed: int, trials: int, most: int) -> float:
    """Largest relative distance between the partitioner and brute force on random profiles."""
    draw, worst = random.Random(seed), 0.0
    for _ in range(trials):
        layers = [
            LayerCost(draw.uniform(0.1, 2), draw.uniform(0, 2), draw.choice([0.1, 1, 5]) * draw.random())
            for _ in range(draw.randint(1, most))
        ]
        machines = draw.randint(1, 4)
        want = brute(layers, machines, 1.0)
        worst = max(worst, abs(partition(layers, [Level(machines, 1.0)]).seconds - want) / want)
    return worst


BATCH = 64  # images of a mini-batch
CLUSTERS = {  # of the paper: operations a second that training reaches on one worker, bytes a second of its link
    "": (5e12, 25e9 / 8),  # A: eight machines of one Titan X, 25 Gbit/s
    "_faster_workers": (1e13, 10e9 / 8),  # B: eight machines of one V100, 10 Gbit/s
}


def conv(side: int, fan_in: int, fan_out: int, kernel: int, pooled: int = 0) -> LayerCost:
    """A convolution with output `side` x `side`, time in operations; `pooled` is the side after a pool behind it."""
    macs = side * side * fan_in * fan_out * kernel * kernel
    out = (pooled or side) ** 2 * fan_out
    return LayerCost(6.0 * macs * BATCH, 4.0 * out * BATCH, 4.0 * fan_in * fan_out * kernel * kernel)


def vgg16() -> list[LayerCost]:
    """Simonyan and Zisserman 2015, configuration D: 138 million weights."""
    blocks = ((224, 3, 64, 2), (112, 64, 128, 2), (56, 128, 256, 3), (28, 256, 512, 3), (14, 512, 512, 3))
    layers = []
    for side, fan_in, width, count in blocks:
        for k in range(count):
            layers.append(conv(side, fan_in if k == 0 else width, width, 3, side // 2 if k == count - 1 else 0))
    return [*layers, *(conv(1, a, b, 1) for a, b in ((25088, 4096), (4096, 4096), (4096, 1000)))]


def resnet50() -> list[LayerCost]:
    """He et al. 2016: 25 million weights; a block is one layer, since a cut inside it would also send the shortcut."""
    layers = [conv(112, 3, 64, 7, 56)]
    fan_in = 64
    for side, width, count in ((56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3)):
        for k in range(count):
            parts = [conv(side, fan_in, width, 1), conv(side, width, width, 3), conv(side, width, 4 * width, 1)]
            parts += [conv(side, fan_in, 4 * width, 1)] if k == 0 else []
            out = 4.0 * side * side * 4 * width * BATCH
            layers.append(LayerCost(sum(p.seconds for p in parts), out, sum(p.weight_bytes for p in parts)))
            fan_in = 4 * width
    return [*layers, conv(1, 2048, 1000, 1)]


def on_cluster(tag: str) -> dict[str, float]:
    """Plans for eight machines, and four equal stages of VGG-16 on four."""
    speed, link = CLUSTERS[tag]
    told = {}
    for name, layers in (("vgg", vgg16()), ("resnet", resnet50())):
        costs = tuple(LayerCost(c.seconds / speed, c.output_bytes, c.weight_bytes) for c in layers)
        found = PipeDream().run(ClusterJob(costs, (Level(8, link),)), Context())
        told[f"{name}_planned_stages{tag}"] = float(len(found.plan.stages))
        told[f"{name}_chosen_stages{tag}"] = float(len(found.chosen))
        told[f"{name}_bytes_share{tag}"] = found.pipeline.sent_bytes / found.data_parallel.sent_bytes
        told[f"{name}_speed_up_over_data_parallel{tag}"] = found.pipeline.throughput / found.data_parallel.throughput
        if name == "vgg":
            stages = four_stages(costs, link)
            piped, alone = (simulate(costs, stages, (Level(4, link),), 64, way) for way in (True, False))
            told[f"speed_up_over_unpipelined{tag}"] = piped.throughput / alone.throughput
    return told


def four_stages(costs: Sequence[LayerCost], link: float) -> list[Stage]:
    """One machine a stage, cut where the slowest stage or transfer is fastest."""

    def slowest(cuts: tuple[int, ...]) -> float:
        ends = (0, *cuts, len(costs))
        times = [math.fsum(c.seconds for c in costs[a:b]) for a, b in itertools.pairwise(ends)]
        return max(times + [2 * costs[b - 1].output_bytes / link for b in cuts])

    cuts = min(itertools.combinations(range(1, len(costs)), 3), key=slowest)
    return [Stage(a, b) for a, b in itertools.pairwise((0, *cuts, len(costs)))]


FOUR = tuple(Stage(k, k + 1) for k in range(4))


def mlp(seed: int) -> list[nn.Module]:
    with Context(seed=seed).scope("init"):
        first = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU())
        return [first, *(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2)), nn.Linear(64, 10)]


def gradient_gap(versions: str, seed: int) -> float:
    """Largest distance between the pipeline's weights after seven updates and w - lr grad f at the mixed versions."""
    data, lr = digits(0).train, 0.5
    data = Examples(data.inputs[:112], data.targets[:112], data.index[:112])
    budget = Budget(epochs=1, batch_size=16, optimizer="sgd", lr=lr, momentum=0.0)
    # Two layers a stage: with one, the gradient of its weights never meets the weights themselves.
    stages = (Stage(0, 2), Stage(2, 4))
    ctx = Context(seed=seed, path=("fit",))
    trace = PipeDream(versions).run(PipelineJob(mlp(seed), data, Classification(10), budget, stages), ctx)
    parts = [nn.Sequential(*mlp(seed)[:2]), nn.Sequential(*mlp(seed)[2:])]
    history = [[dict(part.named_parameters())] for part in parts]
    for t, batch in enumerate(data.batches(16, ctx.rng("order"))):
        used = [
            {n: p.detach().clone().requires_grad_() for n, p in h[max(0, t - 1 + k)].items()}
            for k, h in enumerate(history)
        ]
        out = functional_call(parts[1], used[1], (functional_call(parts[0], used[0], (batch.inputs,)),))
        grads = iter(torch.autograd.grad(Classification(10).loss(out, batch), [p for u in used for p in u.values()]))
        for h in history:
            h.append({name: p.detach() - lr * next(grads) for name, p in h[-1].items()})
    want = [p for h in history for p in h[-1].values()]
    return max(float((a - b).abs().max().detach()) for a, b in zip(want, trace.model.parameters(), strict=True))


def final_loss(layers: nn.Module, data: Examples) -> float:
    with torch.no_grad():
        return float(Classification(10).loss(layers(data.inputs), data.whole()))


def convergence(seed: int, quick: bool) -> dict[str, float]:
    """Training loss of a four-layer network on four stages, lr 0.02, momentum 0.9; and lr 0.2 without momentum.

    36 epochs bring synchronous training to the sheet's 0.04.
    """
    rounds = [("", 0.02, 0.9, ("stash", "predict") if quick else ("stash", "latest", "vertical", "predict"))]
    rounds += [] if quick else [("_no_momentum", 0.2, 0.0, ("stash", "latest"))]
    data, task, told = digits(0).train, Classification(10), dict[str, float]()
    for tag, lr, momentum, ways in rounds:
        budget = Budget(epochs=36, batch_size=64, optimizer="sgd", lr=lr, momentum=momentum)
        net = fit(nn.Sequential(*mlp(seed)), data, task, budget=budget, seed=seed)
        told[f"synchronous_loss{tag}"] = final_loss(net, data)
        for versions in ways:
            job = PipelineJob(mlp(seed), data, task, budget, FOUR)
            trace = PipeDream(versions).run(job, Context(seed=seed, path=("fit",)))
            told[f"{versions}_loss{tag}"] = final_loss(trace.model, data)
    return told


def measure(seed: int, quick: bool) -> dict[str, float]:
    found = on_cluster("") | on_cluster("_faster_workers") | convergence(seed, quick)
    found["partition_gap"] = partition_gap(seed, 5 if quick else 15, 6 if quick else 8)
    found["stash_gradient_gap"] = gradient_gap("stash", seed)
    found["latest_gradient_gap"] = gradient_gap("latest", seed)
    stale = found["stash_loss"] - found["synchronous_loss"]
    found["repaired_share"] = (found["stash_loss"] - found["predict_loss"]) / stale
    found["repaired_over_synchronous"] = found["predict_loss"] / found["synchronous_loss"]
    return found
