"""PGD-40 of cupel against foolbox, torchattacks and ART: same network, inputs, budget; one process, alternating.

    python benchmarks/evasion.py [--rounds 5] [--workload digits-cnn fashion-mnist-cnn] [--strides 0.25 0.0333]

Two networks per workload: a plain one and one trained on PGD examples of the same radius. All attacks take 40
steps of `stride` times eps from a uniform random start in the L-infinity ball, float32, one thread. The network's
parameters are frozen for everyone, and every peer runs at the batch size at which it is fastest. What an attack
returns is judged here, on the network itself. Prints the seconds (CPU time, median over rounds), how many times
as long as cupel each peer takes (median of the ratios of every round, and their range), and the robust accuracy
left, as a mean over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cupel.core.catalogue import make
from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject, still
from cupel.ops.attacks import pgd
from cupel.ops.folding import folded
from cupel.ops.threats import Threat, attacked
from cupel.techniques.robust.adversarial_training import AdversarialTraining

STEPS = 40
WORKLOADS: dict[str, dict[str, Any]] = {  # eps, how the two networks are trained, how many test inputs
    "digits-cnn": {"eps": 0.2, "epochs": 12, "inner": 7, "params": {}, "inputs": 540},
    "fashion-mnist-cnn": {"eps": 0.1, "epochs": 3, "inner": 4, "params": {"train_examples": 3000}, "inputs": 400},
}
Run = Callable[[int], Tensor]  # seed of the round -> adversarial inputs


def networks(name: str) -> tuple[Subject, dict[str, nn.Module]]:
    how, nets = WORKLOADS[name], {}
    for label, techniques in (
        ("plain", []),
        ("adversarially trained", [AdversarialTraining(eps=how["eps"], steps=how["inner"], stride=2.5 / how["inner"])]),
    ):
        subject = build(make("workload", name, how["params"]), Context())
        budget = replace(subject.budget, epochs=how["epochs"])
        nets[label] = fit(
            subject.model, subject.data, subject.task, techniques=techniques, budget=budget, bounds=subject.bounds
        )
    return subject, nets


def in_batches(attack: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, batch: int) -> Tensor:
    return torch.cat([attack(a, b) for a, b in zip(x.split(batch), y.split(batch), strict=True)])


def runs(net: nn.Module, x: Tensor, y: Tensor, eps: float, step: float) -> dict[str, Callable[[int, int], Tensor]]:
    """name -> (seed, batch size) -> adversarial inputs."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    threat = Threat("linf", eps, steps=STEPS, step=step)

    def cupel(seed: int, batch: int) -> Tensor:
        return attacked(pgd, net, x, y, threat, seeded(seed, "bench"), fast=folded(net, x[:16]), batch=batch).x

    judge = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=STEPS, random_start=True)

    def with_foolbox(seed: int, batch: int) -> Tensor:
        torch.manual_seed(seed)

        def one(a: Tensor, b: Tensor) -> Tensor:
            return theirs.run(judge, a, foolbox.criteria.Misclassification(b), epsilon=eps)

        return in_batches(one, x, y, batch)

    other = torchattacks.PGD(net, eps=eps, alpha=step, steps=STEPS, random_start=True)

    def with_torchattacks(seed: int, batch: int) -> Tensor:
        torch.manual_seed(seed)
        return in_batches(other, x, y, batch)

    classes = int(y.max()) + 1
    estimator = PyTorchClassifier(
        net, loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=classes, clip_values=(0, 1)
    )
    hot = nn.functional.one_hot(y, classes).numpy()

    def with_art(seed: int, batch: int) -> Tensor:
        np.random.seed(seed)
        torch.manual_seed(seed)
        attack = ProjectedGradientDescentPyTorch(
            estimator, eps=eps, eps_step=step, max_iter=STEPS, num_random_init=1, batch_size=batch, verbose=False
        )
        return torch.from_numpy(attack.generate(x.numpy(), hot))

    return {"cupel": cupel, "foolbox": with_foolbox, "torchattacks": with_torchattacks, "art": with_art}


def timed(run: Run, seed: int) -> tuple[float, Tensor]:
    began = time.process_time()
    moved = run(seed)
    return time.process_time() - began, moved


def compare(net: nn.Module, x: Tensor, y: Tensor, eps: float, step: float, rounds: int) -> None:
    attacks = runs(net, x, y, eps, step)
    best: dict[str, int] = {}
    for name, run in attacks.items():
        tried = {}
        for batch in (len(x), 128, 64):
            run(997, batch)  # kernels for these sizes are compiled before anything is timed
            tried[batch] = timed(lambda seed, run=run, batch=batch: run(seed, batch), 998)[0]
        best[name] = min(tried, key=lambda batch: tried[batch])
    seconds: dict[str, list[float]] = {name: [] for name in attacks}
    robust: dict[str, list[float]] = {name: [] for name in attacks}
    for number in range(rounds):
        order = list(attacks)[number % 4 :] + list(attacks)[: number % 4]
        for name in order:
            took, moved = timed(lambda seed, name=name: attacks[name](seed, best[name]), number)
            far = float((moved - x).abs().max())
            if far > eps * 1.001 or float(moved.min()) < -1e-6 or float(moved.max()) > 1 + 1e-6:
                raise SystemExit(f"{name} left the ball or the box: {far:.4f}")
            with torch.no_grad():
                robust[name].append(float((net(moved).argmax(1) == y).double().mean()))
            seconds[name].append(took)
    for name in attacks:
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["cupel"], strict=True)]
        print(
            f"  {name:<13}{statistics.median(seconds[name]):7.3f} s  {statistics.median(ratios):5.2f} x cupel "
            f"[{min(ratios):.2f}, {max(ratios):.2f}]  robust {statistics.mean(robust[name]):.4f}  batch {best[name]}"
        )
    fastest = min(
        statistics.median([b / a for a, b in zip(seconds["cupel"], seconds[name], strict=True)])
        for name in attacks
        if name != "cupel"
    )
    lowest = min(statistics.mean(robust[name]) for name in attacks if name != "cupel")
    print(f"  against the fastest: {fastest:.2f} x; robust {statistics.mean(robust['cupel']):.4f}, lowest {lowest:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--strides", nargs="+", type=float, default=[0.25, 0.0333])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.workload:
        subject, nets = networks(name)
        count, eps = WORKLOADS[name]["inputs"], WORKLOADS[name]["eps"]
        x, y = subject.data.test.inputs[:count], subject.data.test.targets[:count]
        for label, net in nets.items():
            with still(net):
                for stride in given.strides:
                    print(f"{name}, {label}, {len(x)} inputs, linf eps {eps}, {STEPS} steps of {stride:g} eps")
                    compare(net, x, y, eps, stride * eps, given.rounds)


if __name__ == "__main__":
    main()
