"""`evasion` at its most thorough against AutoAttack's standard version, on six networks, in one process.

    python benchmarks/autoattack.py [--workload digits-cnn fashion-mnist-cnn] [--rounds 3] [--inputs 300] [--out FILE]

The networks: plain; trained on PGD examples; trained by TRADES; defensively distilled (teacher and student at a
temperature of 30, used at 1, so that gradients vanish); plain with weights of 4 bits; plain behind Gaussian noise on
its inputs, drawn anew for every answer. AutoAttack's four attacks come from torchattacks with the authors' budgets
(100 steps, nine targets, 5,000 queries; for the noisy network their random version, two attacks with 20 draws a
gradient). Two more columns: `evasion` as it is by default, with 100 steps; and the sequence of attacks that `caa` found
on validation inputs of the PGD-trained network, before any time is taken, carried over to all of them. All get the
same inputs, radius and network with frozen parameters, one thread; rounds alternate. Seconds are CPU time. What
AutoAttack returns is judged here like what `evasion` finds: on the network, or on the mean of 20 answers where they
are random. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.catalogue import make
from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.protocols import Hook, Moment
from cupel.core.slots import phase
from cupel.core.steps import build
from cupel.core.types import Batch, Subject, still
from cupel.ops.attackers import read
from cupel.ops.ball_ensemble import DRAWS, PER_STEP
from cupel.ops.composite import Composite
from cupel.ops.divergences import soft_target_loss
from cupel.ops.eot import expected
from cupel.ops.folding import folded
from cupel.ops.quantize import symmetric
from cupel.ops.threats import Threat, attacked
from cupel.probes.robust.caa import CAA
from cupel.probes.robust.evasion import Evasion
from cupel.techniques.robust.adversarial_training import AdversarialTraining

SETTINGS: dict[str, dict[str, Any]] = {
    "digits-cnn": {"eps": 0.1, "epochs": 12, "params": {}},
    "fashion-mnist-cnn": {"eps": 0.03, "epochs": 4, "params": {"train_examples": 6000}},
}
TEMPERATURE, NOISE = 30.0, 0.1


class AtTemperature(Hook):
    """Trains on logits / T: towards the labels, or towards a teacher's softened answers."""

    def __init__(self, teacher: nn.Module | None = None) -> None:
        self.teacher = teacher

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        if self.teacher is None:
            return at.task.loss(out / TEMPERATURE, batch)
        with torch.no_grad():
            target = self.teacher(batch.inputs)
        return soft_target_loss(target, out, TEMPERATURE) / TEMPERATURE


@dataclass(frozen=True)
class Defensive:
    """The hook above as a technique."""

    teacher: nn.Module | None = None

    def hook(self, ctx: Context) -> Hook:
        return AtTemperature(self.teacher)


class Noisy(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x + NOISE * torch.randn_like(x))
        return found


def networks(name: str) -> Iterator[tuple[str, Subject]]:
    """The six networks of a workload, trained."""
    how = SETTINGS[name]
    base = build(make("workload", name, how["params"]), Context())
    budget = replace(base.budget, epochs=how["epochs"])

    def trained(*techniques: Any) -> nn.Module:
        net = copy.deepcopy(base.model)
        return fit(net, base.data, base.task, techniques=techniques, budget=budget, bounds=base.bounds).eval()

    plain = trained()
    coarse = copy.deepcopy(plain)
    with torch.no_grad():
        for weight in (p for p in coarse.parameters() if p.ndim > 1):
            weight.copy_(symmetric(weight, weight.abs().amax(), 4))
    for label, net in (
        ("plain", plain),
        ("PGD-trained", trained(AdversarialTraining(eps=how["eps"]))),
        ("TRADES", trained(AdversarialTraining(eps=how["eps"], method="trades"))),
        ("distilled, T 30", trained(Defensive(trained(Defensive())))),
        ("4-bit weights", coarse),
        ("input noise", Noisy(plain)),
    ):
        yield label, replace(base, model=net)


def autoattack(net: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> float:
    """Robust accuracy that AutoAttack leaves."""
    import torchattacks

    noisy = isinstance(net, Noisy)
    # Built from its parts, because torchattacks' own AutoAttack takes ten steps where the authors' takes a hundred.
    if noisy:
        parts = [torchattacks.APGD(net, eps=eps, steps=100, seed=seed, loss=k, eot_iter=DRAWS) for k in ("ce", "dlr")]
    else:
        parts = [
            torchattacks.APGD(net, eps=eps, steps=100, seed=seed, loss="ce"),
            torchattacks.APGDT(net, eps=eps, steps=100, seed=seed, n_classes=10),
            torchattacks.FAB(net, eps=eps, steps=100, seed=seed, n_classes=10, multi_targeted=True),
            torchattacks.Square(net, eps=eps, n_queries=5000, seed=seed),
        ]
    attack = torchattacks.MultiAttack(parts)
    torch.manual_seed(seed)
    moved = torch.cat([attack(a, b) for a, b in zip(x.split(100), y.split(100), strict=True)])
    moved = torch.clamp(moved, x - eps, x + eps).clamp(0, 1)
    judge = expected(net, DRAWS) if noisy else net
    with torch.no_grad():
        return float((judge(moved).argmax(1) == y).double().mean())


def policy_of(subject: Subject, eps: float) -> tuple[str, ...]:
    """The sequence of attacks that `caa` finds on validation inputs."""
    found = CAA(eps=eps, examples=20, restarts=1).measure(subject, Context(seed=0))
    return tuple(found.figures["policy"])


def composite(policy: tuple[str, ...], subject: Subject, x: Tensor, y: Tensor, eps: float, seed: int) -> float:
    """Robust accuracy that a sequence of attacks leaves."""
    net, quick = subject.model, folded(subject.model, x[:16])
    if isinstance(net, Noisy):
        net, quick = expected(net, DRAWS), expected(quick, PER_STEP)
    assert subject.bounds is not None
    threat, draw = Threat("linf", eps, subject.bounds), torch.Generator().manual_seed(seed)
    return attacked(Composite(read(policy)), net, x, y, threat, draw, fast=quick).robust


def compare(
    label: str, subject: Subject, eps: float, inputs: int, rounds: int, policy: tuple[str, ...]
) -> dict[str, Any]:
    test = subject.data.test
    rows = torch.linspace(0, len(test) - 1, min(inputs, len(test))).round().long().unique()
    x, y = test.inputs[rows], test.targets[rows]
    probe = Evasion(eps=eps, steps=100, examples=inputs, thorough=True)
    found: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], float]) -> None:
        began = time.process_time()
        found.setdefault(name, []).append(run())
        found.setdefault(f"{name} s", []).append(time.process_time() - began)

    def robust(probe: Evasion, seed: int) -> float:
        return probe.measure(subject, Context(seed=seed))["robust_accuracy"].value

    with still(subject.model):
        for number in range(rounds):
            all_: list[tuple[str, Callable[[], float]]] = [
                ("cupel", lambda seed=number: robust(probe, seed)),
                ("brief", lambda seed=number: robust(replace(probe, thorough=False), seed)),
                ("caa", lambda seed=number: composite(policy, subject, x, y, eps, seed)),
                ("autoattack", lambda seed=number: autoattack(subject.model, x, y, eps, seed)),
            ]
            for name, run in all_ if number % 2 == 0 else reversed(all_):
                timed(name, run)
    row: dict[str, Any] = {"network": label, **{k: statistics.median(v) for k, v in found.items()}}
    for name in ("cupel", "brief", "caa"):
        ratios = [b / a for a, b in zip(found[f"{name} s"], found["autoattack s"], strict=True)]
        row[f"{name} ratio"], row[f"{name} range"] = statistics.median(ratios), [min(ratios), max(ratios)]
    return row | {"worst cupel": max(found["cupel"]), "best autoattack": min(found["autoattack"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inputs", type=int, default=300)
    parser.add_argument("--workload", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    everything = {}
    for name in given.workload:
        eps = SETTINGS[name]["eps"]
        print(f"\n{name}, linf eps {eps}, {given.inputs} inputs, {given.rounds} rounds\n")
        cells = ("thorough", "seconds", "default", "seconds", "caa's", "seconds", "AutoAttack", "seconds", "as fast")
        print("| network |", " | ".join(cells), "|\n|" + "---|" * (1 + len(cells)))
        rows = everything[name] = []
        found = list(networks(name))
        policy = policy_of(dict(found)["PGD-trained"], eps)
        for label, subject in found:
            row = compare(label, subject, eps, given.inputs, given.rounds, policy) | {"policy": policy}
            rows.append(row)
            each = [f"{row[k]:.3f} | {row[f'{k} s']:.1f}" for k in ("cupel", "brief", "caa", "autoattack")]
            fast = ", ".join(f"{row[f'{k} ratio']:.1f}" for k in ("cupel", "brief", "caa"))
            print(f"| {label} | {' | '.join(each)} | {fast} |", flush=True)
    if given.out:
        given.out.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
