"""Claim of `slo-nn`: hashed rankings of nodes, savings in a wide output, and objectives held beside other work."""

from __future__ import annotations

import csv
import gzip
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Examples, Splits, Subject
from cupel.data.local import local
from cupel.ops.node_tables import Choice, ChosenLinear, NodeTables, chosen_in, costs_of
from cupel.ops.objectives import LatencyObjective, competing, measured_profile
from cupel.runner.claims import Claim
from cupel.techniques.compress.slo_nn import SloNN
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="slo-nn",
    statement="(a) With 10 % of 1,024 hidden nodes, the hashed ranking is 2 points or more above random and static ones; "
    "(b) next-word prediction over 6,000 words at a confidence of 0.99 costs a fifth of the output's multiply-adds or "
    "less, choosing counted, for at most half a point of accuracy; (c) a 1024 x 4096 layer at 10 % is really faster; "
    "(d) beside a competing process the latency objective is met at the 95th percentile, and not by the whole network",
    paper="1.3 to 56.7 times faster on average with under 0.3 % loss of accuracy, latency held under co-location",
    bounds={
        "hashed_over_random_at_10": ">= 0.02",
        "hashed_over_static_at_10": ">= 0.02",
        "output_macs_fewer": ">= 5",
        "word_accuracy_loss": "<= 0.005",
        "speedup_1024x4096": "> 1",
        "loaded_p95_over_target": "<= 1",
        "loaded_p95_over_target_whole": "> 1",
    },
    explains="Only (a) fails. With K 8 and T 8 the 1,077 training images leave about four to a bucket, too few to rank "
    "1,024 nodes: 0.893, 0.876 and 0.846 for the hashed ranking against 0.872, 0.854 and 0.874 for random nodes, which a "
    "wide layer of redundant nodes serves well; at 20 % random nodes are ahead. Ranked by its own activations a tenth "
    "would reach 0.946. Summed importance, as in the paper, instead of its mean ranks worse (0.839, 0.846, 0.809).",
    seeds=(0, 1, 2),
    quick_seeds=1,
)
CONTEXT, STEPS = 3, 8


def share(out: Tensor, targets: Tensor) -> float:
    return float((out.argmax(1) == targets).double().mean())


@torch.no_grad()
def rankings(seed: int, quick: bool) -> dict[str, float]:
    """(a): accuracy of a digits network with a tenth and a fifth of its hidden nodes, ranked in several ways."""
    subject = build(DigitsMlp(hidden=(1024,)), Context(seed=seed))
    with torch.enable_grad():
        budget = replace(subject.budget, epochs=4 if quick else 12)
        net = fit(subject.model, subject.data, subject.task, budget=budget, seed=seed)
    subject, test = subject.with_model(net), subject.data.test
    method = SloNN(layer="block1.linear", tables=8, bits=8, shares=(0.1, 0.2))
    small = apply(method, subject, seed=seed).model
    a, seen = (net.block1(net.flat(part.inputs)) for part in (test, subject.data.train))
    w = net.head.weight
    length, plain = (w - w.mean(0)).norm(dim=0), w.norm(dim=0)
    orders = {
        "random": torch.rand(a.shape, generator=seeded(seed, "order")),
        "static": ((seen - seen.mean(0)).abs().mean(0) * length).expand(a.shape),
        "own": (a - seen.mean(0)).abs() * length,  # needs every activation: what a perfect choice would reach
        "own_raw": a.abs() * plain,
    }
    found = {"digits_accuracy": share(net(test.inputs), test.targets)}
    for level, percent in enumerate((10, 20)):
        chosen_in(small).choice.level = level
        k = chosen_in(small).choice.sizes[level]
        found[f"hashed_{percent}"] = share(small(test.inputs), test.targets)
        for name, score in orders.items():
            mask = torch.zeros_like(a).scatter(1, score.topk(k, 1).indices, 1.0)
            found[f"{name}_{percent}"] = share(net.head(a * mask), test.targets)
    for rival in ("random", "static"):
        found[f"hashed_over_{rival}_at_10"] = found["hashed_10"] - found[f"{rival}_10"]
    return found


class NextWord(nn.Module):
    """The words before -> logits of all words: `[B, 3]` int64 -> `[B, words]`."""

    def __init__(self, words: int, hidden: int) -> None:
        super().__init__()
        self.words, self.flat = nn.Embedding(words, 32), nn.Flatten()
        self.hidden, self.relu, self.head = nn.Linear(32 * CONTEXT, hidden), nn.ReLU(), nn.Linear(hidden, words)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.relu(self.hidden(self.flat(self.words(x)))))
        return out


@lru_cache
def texts(words: int) -> list[Tensor]:
    """News items as word numbers, 0 for words that are not among the most frequent."""
    with gzip.open(local("ag-news/ag_news_train_lc.csv.gz"), "rt", encoding="utf-8") as file:
        rows = [row["text"].split() for row in csv.DictReader(file)]
    most = Counter(word for row in rows for word in row).most_common(words - 1)
    number = {word: i + 1 for i, (word, _) in enumerate(most)}
    return [torch.tensor([number.get(word, 0) for word in row]) for row in rows]


def windows(rows: list[Tensor], count: int, seed: int) -> Examples:
    """Runs of words and the known word that follows, `count` of them from `rows`."""
    cut = torch.cat([row.unfold(0, CONTEXT + 1, 1) for row in rows if len(row) > CONTEXT])
    cut = cut[cut[:, -1] > 0]
    cut = cut[torch.randperm(len(cut), generator=seeded(seed, "windows"))[:count]]
    return Examples(cut[:, :-1].contiguous(), cut[:, -1].contiguous(), torch.arange(len(cut)))


def speaker(seed: int, words: int, hidden: int, count: int) -> Subject:
    """A trained network for the next word; whole news items are held out."""
    items = texts(words)
    order = torch.randperm(len(items), generator=seeded(seed, "items")).tolist()
    held, rest = [items[i] for i in order[:1500]], [items[i] for i in order[1500:]]
    test, train = windows(held, 4000, seed), windows(rest, count, seed)
    with Context(seed=seed).scope("init"):
        net = NextWord(words, hidden)
    budget = Budget(epochs=1, batch_size=256, lr=4e-3, schedule="cosine")
    fit(net, train, Classification(words), budget=budget, seed=seed)
    return Subject(net, Splits(train, test, test), Classification(words))


@torch.no_grad()
def wide_output(subject: Subject, small: nn.Module) -> dict[str, float]:
    """(b): multiply-adds of the output and answers kept at a confidence of 0.99."""
    test, layer = subject.data.test, chosen_in(small)
    full = subject.outputs()
    out = torch.cat([small(b.inputs) for b in test.batches(500)])
    h = torch.cat([subject.model.relu(subject.model.hidden(subject.model.flat(subject.model.words(test.inputs))))])
    levels = layer.levels(h)
    costs = torch.tensor(costs_of(layer), dtype=torch.double)
    sizes = torch.tensor(layer.choice.sizes)
    mean_size = int(sizes[levels].double().mean())
    answer, prior = full.argmax(1), layer.tables.prior.topk(mean_size).indices
    return {
        "word_accuracy": share(full, test.targets),
        "word_accuracy_loss": share(full, test.targets) - share(out, test.targets),
        "words_agree": share(out, answer),
        "words_agree_static_of_mean_size": float(torch.isin(answer, prior).double().mean()),
        "words_by_the_one_most_frequent": float(
            (test.targets == subject.data.train.targets.mode().values).double().mean()
        ),
        "output_macs_fewer": float(
            costs[-1] / (costs[levels] + layer.tables.overhead * (levels == len(sizes) - 1)).mean()
        ),
        "mean_share_of_words": mean_size / len(layer.weight),
        "whole_layer_share": float((levels == len(sizes) - 1).double().mean()),
    }


def seconds_of(layer: nn.Module, x: Tensor, repeats: int) -> float:
    """Processor time of one call, the least of five rounds."""
    rounds = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(repeats):
            layer(x)
        rounds.append((time.process_time() - began) / repeats)
    return min(rounds)


@torch.no_grad()
def break_even(seed: int, quick: bool) -> dict[str, float]:
    """(c): a dense layer against a tenth of it, choosing included, for one query."""
    draw, found = seeded(seed, "layers"), {}
    shapes = ((64, 2048), (1024, 4096), *((256, 1 << e) for e in range(8, 15)))
    with Context(seed=seed).scope("layers"):
        for d, n in shapes[: 2 if quick else None]:
            linear, k = nn.Linear(d, n), n // 10
            x, planes = torch.randn(1, d, generator=draw), torch.randn(64, d, generator=draw)
            tables = NodeTables(planes, torch.zeros(64), torch.rand(8, 256, n, generator=draw), torch.ones(8, 256), k)
            layer = ChosenLinear(linear, tables, Choice((k, n), 0.98), last=True)
            layer.choice.level = 0
            repeats = max(20, 40_000_000 // (d * n * 4))
            found[f"speedup_{d}x{n}"] = seconds_of(linear, x, repeats) / seconds_of(layer, x, repeats)
    wins = [n for d, n in shapes if d == 256 and found.get(f"speedup_{d}x{n}", 0) > 1]
    return found | ({} if quick else {"break_even_width_of_256": float(min(wins, default=1 << 15))})


@contextmanager
def one_processor() -> Iterator[None]:
    """This process, and those it starts, on one processor: what else runs there takes its time."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@torch.no_grad()
def objective(subject: Subject, small: nn.Module, quick: bool) -> dict[str, float]:
    """(d): write news items of eight words, under a target of 1.25 times the tail of the whole network alone."""
    layer, data = chosen_in(small), subject.data.test
    asked = iter(range(10**9))
    words: list[tuple[Tensor, Tensor]] = []

    def query(level: int) -> None:
        i = next(asked) % len(data)
        x, layer.choice.level = data.inputs[i : i + 1], level
        for step in range(STEPS):
            out = small(x).argmax(1)
            if step == 0:
                words.append((out, data.targets[i : i + 1]))
            x = torch.cat([x[:, 1:], out[:, None]], 1)

    found: dict[str, float] = {}
    top = len(layer.choice.sizes) - 1
    repeats = 8 if quick else 25
    with one_processor():
        for level in range(top + 1):
            query(level)
        profile = measured_profile(query, top + 1, loads=(0, 1), repeats=repeats)
        target = 1.25 * profile.tail[0][top]
        control = LatencyObjective(profile, target)
        found |= {"target_ms": 1e3 * target, "slowdown_profiled": profile.slowdowns[1]}
        for phase, load in (("alone", 0), ("loaded", 1), ("after", 0)):
            words.clear()
            taken: dict[str, list[float]] = {"": [], "_whole": []}
            levels = []
            with competing(load) if load else nullcontext():
                for _ in range(30 if quick else 80):
                    levels.append(control.level())
                    for who, level in (("", levels[-1]), ("_whole", top)):
                        began = time.perf_counter()
                        query(level)
                        taken[who].append(time.perf_counter() - began)
                    control.saw(levels[-1], taken[""][-1])
            for who, times in taken.items():
                settled = sorted(times[15:])  # the first queries of a phase tell the monitor of the load
                found[f"{phase}_p95_over_target{who}"] = settled[int(0.95 * len(settled))] / target
                found[f"{phase}_met{who}"] = sum(t <= target for t in settled) / len(settled)
            found[f"{phase}_level"] = sum(levels[15:]) / len(levels[15:])
            hits = [float(out == wanted) for out, wanted in words]
            found[f"{phase}_accuracy"] = sum(hits[::2]) / len(hits[::2])
            found[f"{phase}_accuracy_whole"] = sum(hits[1::2]) / len(hits[1::2])
    return found


def measure(seed: int, quick: bool) -> dict[str, float]:
    found = rankings(seed, quick)
    subject = speaker(seed, 6000, 128, 20000 if quick else 120000)
    method = SloNN(accuracy=0.99, shares=(0.005, 0.01, 0.02, 0.05, 0.1), keep=0.1, tables=4, bits=8)
    found |= wide_output(subject, apply(method, subject, seed=seed).model)
    found |= break_even(seed, quick)
    # Four million weights, so that a query takes longer than a turn of the scheduler; what it learned matters less.
    subject = speaker(seed, 8000, 512, 8000)
    return found | objective(subject, apply(replace(method, examples=2000), subject, seed=seed).model, quick)
