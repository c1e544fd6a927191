"""`cupel.fit` against the same loop written bare, Lightning Fabric and Accelerate: one process, alternating.

    python benchmarks/fit.py [--rounds 10] [--workload digits-cnn cifar10-resnet20]

Prints the median ratio of each to the bare loop and its range over rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from cupel.core.catalogue import find
from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Budget, Examples, Subject

Trainer = Callable[[nn.Module, Examples, Budget], None]


def bare(model: nn.Module, data: Examples, budget: Budget) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=budget.lr)
    model.train()
    for _ in range(budget.epochs):
        order = torch.randperm(len(data))
        for low in range(0, len(data), budget.batch_size):
            rows = order[low : low + budget.batch_size]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.inputs[rows]), data.targets[rows])
            loss.backward()
            optimizer.step()


def with_fabric(model: nn.Module, data: Examples, budget: Budget) -> None:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    net, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=budget.lr))
    net.train()
    for _ in range(budget.epochs):
        order = torch.randperm(len(data))
        for low in range(0, len(data), budget.batch_size):
            rows = order[low : low + budget.batch_size]
            optimizer.zero_grad()
            loss = F.cross_entropy(net(data.inputs[rows]), data.targets[rows])
            fabric.backward(loss)
            optimizer.step()


def with_accelerate(model: nn.Module, data: Examples, budget: Budget) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=budget.lr))
    net.train()
    for _ in range(budget.epochs):
        order = torch.randperm(len(data))
        for low in range(0, len(data), budget.batch_size):
            rows = order[low : low + budget.batch_size]
            optimizer.zero_grad()
            loss = F.cross_entropy(net(data.inputs[rows]), data.targets[rows])
            accelerator.backward(loss)
            optimizer.step()


def trainers(subject: Subject) -> dict[str, Trainer]:
    def ours(model: nn.Module, data: Examples, budget: Budget) -> None:
        fit(model, data, subject.task, budget=budget)

    found: dict[str, Trainer] = {"bare": bare, "cupel": ours}
    for name, module, trainer in (
        ("fabric", "lightning_fabric", with_fabric),
        ("accelerate", "accelerate", with_accelerate),
    ):
        try:
            __import__(module)
        except ImportError:
            print(f"{name}: not installed, left out")
            continue
        found[name] = trainer
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workload", nargs="+", default=["digits-cnn", "cifar10-resnet20"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.workload:
        subject = build(find("workload", name).load()(), Context())
        small = name != "digits-cnn"
        data = subject.data.train.take(torch.arange(640)) if small else subject.data.train
        budget = replace(
            subject.budget, epochs=1 if small else 8, optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="constant"
        )
        runs = trainers(subject)
        times: dict[str, list[float]] = {k: [] for k in runs}
        for n in range(chosen.rounds + 1):
            # The order turns every round, so that no one always runs on a warm or a tired machine.
            names = list(runs)[n % len(runs) :] + list(runs)[: n % len(runs)]
            for k in names:
                model = copy.deepcopy(subject.model)
                began = time.perf_counter()
                runs[k](model, data, budget)
                if n:  # the first round warms up
                    times[k].append(time.perf_counter() - began)
        print(f"{name}: bare loop {statistics.median(times['bare']):.3f} s (median of {chosen.rounds})")
        for k in runs:
            ratios = [a / b for a, b in zip(times[k], times["bare"], strict=True)]
            print(f"  {k:<11} {statistics.median(ratios):.3f} of bare  [{min(ratios):.3f}, {max(ratios):.3f}]")


if __name__ == "__main__":
    main()
