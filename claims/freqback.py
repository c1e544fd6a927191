"""Claim of `freqback`: a trigger at the frequencies the model hears is obeyed more than one at those it does not."""

from __future__ import annotations

from scipy.stats import spearmanr

from cupel.core.context import Context
from cupel.core.scorecard import Readings
from cupel.core.steps import FitStep
from cupel.core.types import Subject
from cupel.probes.integrity.freqback import FreqBack, heatmap
from cupel.runner.bench import prepare
from cupel.runner.claims import Claim
from cupel.workloads.series.ucr_cnn import UcrCnn

CLAIM = Claim(
    method="freqback",
    statement="On ItalyPowerDemand (60/40, 10% poison, length 0.2) the trigger made by the heatmap is obeyed by 90% of "
    "series of other classes, by 0.10 more than the same descent on the three least sensitive bins, costs at most 3 "
    "points of accuracy, and is no adversarial perturbation of the clean model",
    paper="8 data sets x 5 models: attack success above 90%, accuracy loss below 3 points, ahead of static, noise and "
    "generated triggers",
    bounds={
        "success_freqback": ">= 0.90",
        "gain_over_least": ">= 0.10",
        "clean_cost_freqback": "<= 0.03",
        "control_freqback": "<= 0.20",
        "heatmap_top_share": ">= 0.15",
        "heatmap_seed_rank_correlation": ">= 0.5",
    },
    explains="Each victim is trained anew by the whole recipe, not fine-tuned for a few epochs, and then learns every "
    "trigger of length 0.2 about equally well: least bins 0.87, freqback 0.83, noise 0.83, pulse 0.81. At length 0.1 "
    "the heatmap pays: 0.58 against 0.37 for the least bins. Descent on the clean model also makes the trigger "
    "resemble the target class (control 0.17 against 0.02 without descent): the victim gains less from a backdoor.",
)

TRIGGERS = {
    "freqback": FreqBack(rounds=2),
    "least": FreqBack(trigger="least", rounds=2),
    "static": FreqBack(trigger="static", rounds=1),
    "noise": FreqBack(trigger="noise", rounds=1),
    "undescended": FreqBack(steps=0, rounds=1),  # the heatmap's spectrum with random phases, never optimised
    "freqback_half": FreqBack(rounds=2, budget=0.1),
    "least_half": FreqBack(trigger="least", rounds=2, budget=0.1),
}


def correlation(subject: Subject, ctx: Context, seed: int) -> float:
    """Spearman's rank correlation of the heatmaps of two networks from different seeds."""
    data = subject.data.train
    maps = [heatmap(s, data.inputs, data.targets, 0.3) for s in (subject, ctx.fork(seed=seed + 1000))]
    return float(spearmanr(*(m.flatten().numpy() for m in maps)).statistic)


def measure(seed: int, quick: bool) -> dict[str, float]:
    workload = UcrCnn(resplit=True, width=16)
    subject, ctx = prepare(workload, [FitStep({"epochs": 8})], seed=seed)
    names = ("freqback", "least", "noise") if quick else tuple(TRIGGERS)
    results: dict[str, Readings] = {name: TRIGGERS[name].measure(subject, ctx.child(name)) for name in names}
    found: dict[str, float] = {}
    for name, r in results.items():
        found[f"success_{name}"] = r["attack_success"].value
        found[f"control_{name}"] = r["control_success"].value
        found[f"gain_{name}"] = r["backdoor_gain"].value
        found[f"clean_cost_{name}"] = r["clean_cost"].value
    right = subject.outputs().argmax(1) == subject.data.test.targets
    return found | {
        "gain_over_least": found["success_freqback"] - found["success_least"],
        "heatmap_top_share": results["freqback"]["heatmap_top_share"].value,
        "heatmap_seed_rank_correlation": correlation(subject, ctx, seed),
        "accuracy": float(right.double().mean()),
    }
