"""Claim of `caa`: a searched sequence of attacks against single attackers, random sequences and a union of attacks."""

from __future__ import annotations

from dataclasses import replace

import torch

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject, still
from cupel.ops.attackers import GRADIENT, SKIP, Space, read, singles
from cupel.ops.composite import Composite, Link
from cupel.ops.folding import folded
from cupel.ops.labelled import evenly
from cupel.ops.threats import Threat
from cupel.probes.robust.caa import CAA, DAMAGE, Arena
from cupel.runner.claims import Claim
from cupel.techniques.robust.adversarial_training import AdversarialTraining
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="caa",
    statement="On a digits network trained on PGD at linf 0.2 a sequence searched on the validation split by 12 policies "
    "over 8 generations leaves no more inputs right than the best single attacker of as many gradients, 2 points less "
    "than random sequences of as many attackers, and no more than 2 points more than the union of three attacks at "
    "three times its gradients; carried over to a TRADES network it is within 2 points of the best single attacker there",
    paper="breaks 11 defences better than 10 top attackers, about 6 times faster than AutoAttack; policies transfer",
    bounds={
        "over_best_single": "<= 0",
        "under_random_policies": ">= 0.02",
        "over_union": "<= 0.02",
        "gradients_share_of_union": "<= 0.3333",
        "transferred_over_best_single": "<= 0.02",
    },
    seeds=(0, 1, 2),
    quick_seeds=1,
    explains="Only the first bound is missed, by a quarter of a point: the policy leaves 0.274, the best single "
    "attacker of its budget 0.272, all attackers together 0.270. That rival is the best of 15, chosen on the "
    "very test inputs, and policies found have one or two links: on this network auto-step PGD on the margin "
    "alone does what any chain does, with 0.09 of the union's gradients. The first generation holds every "
    "gradient attacker alone, which was added after a search from random genes had left 0.37 where a single "
    "one left 0.32.",
)
RANDOM = 8  # random policies


def arena_of(subject: Subject, examples: int) -> Arena:
    assert subject.bounds is not None
    rows = evenly(len(subject.data.test), examples)
    x, y = subject.data.test.inputs[rows], subject.data.test.targets[rows]
    return Arena(subject.model, folded(subject.model, x[:16]), x, y, Threat("linf", 0.2, subject.bounds))


def random_policies(length: int, steps: int, seed: int) -> list[tuple[Link, ...]]:
    """Sequences of `length` attackers, strengths and steps drawn from the pool of the search, without skips."""
    space, draw = Space((*GRADIENT, *DAMAGE, SKIP), length, steps), seeded(seed, "random policies")
    sizes = [(count - 1, levels, more) for count, levels, more in space.sizes]
    return [
        space.links_of(tuple(tuple(int(torch.randint(n, (), generator=draw)) for n in block) for block in sizes))
        for _ in range(RANDOM)
    ]


def measure(seed: int, quick: bool) -> dict[str, float]:
    nets: dict[str, Subject] = {}
    for method, epochs in (("pgd", 3 if quick else 15), ("trades", 2 if quick else 10)):
        made = build(DigitsMlp(), Context(seed=seed))
        training = AdversarialTraining(eps=0.2, steps=5, stride=0.4, method=method)
        budget = replace(made.budget, epochs=epochs)
        net = fit(made.model, made.data, made.task, techniques=[training], budget=budget, bounds=made.bounds, seed=seed)
        nets[method] = made.with_model(net)
    examples = 60 if quick else 270
    probe = CAA(eps=0.2, examples=examples, search_examples=40 if quick else 0, generations=1 if quick else 8)
    probe = replace(probe, restarts=2) if quick else probe
    readings = probe.measure(nets["pgd"], Context(seed=seed))
    found = {name: r.value for name, r in readings.items()}
    policy = read(readings.figures["policy"])
    with still(nets["pgd"].model):
        arena = arena_of(nets["pgd"], examples)
        drawn = [
            arena.run(Composite(links), seeded(seed, "random", k)).robust
            for k, links in enumerate(random_policies(len(policy), probe.steps, seed))
        ]
    with still(nets["trades"].model):
        arena = arena_of(nets["trades"], examples)
        carried = arena.run(Composite(policy), seeded(seed, "carried"))
        rivals = singles(Composite(policy).gradients, probe.restarts)
        best = min(arena.run(attack, seeded(seed, name)).robust for name, attack in rivals.items())
    return {
        "robust_accuracy": found["robust_accuracy"],
        "over_best_single": found["chain_accuracy"] - found["single_accuracy"],
        "under_random_policies": sum(drawn) / len(drawn) - found["chain_accuracy"],
        "over_union": found["chain_accuracy"] - found["union_accuracy"],
        "gradients_share_of_union": found["chain_most"] / found["union_most"],
        "transferred_over_best_single": carried.robust - best,
        "spent_share_of_union": found["chain_gradients"] / found["union_gradients"],
        "spent_over_best_single": found["chain_gradients"] / max(found["single_gradients"], 1e-9),
        "best_random_policy": min(drawn),
        "transferred_accuracy": carried.robust,
        "trades_clean_accuracy": float(carried.clean.double().mean()),
        "apart_over_chain": found["apart_accuracy"] - found["chain_accuracy"],
        "search_gap": found["chain_accuracy"] - found["search_accuracy"],
        **found,
    }
