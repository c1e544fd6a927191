"""Claim of `bluff`: an attack leaves the original class's channels, and the channels it changes most are its cause."""

from __future__ import annotations

from dataclasses import replace

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.probes.robust.bluff import Bluff
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="bluff",
    statement="On a digits CNN of 16, 32 and 32 channels, over the pairs 3 to 5, 8 to 1 and 0 to 6 under targeted PGD: "
    "in the last convolution the strongest quarter of the channels shares less with the original class at eps = 0.3 than at 0.1, "
    "and no less with the target class; resetting the 15% most changed channels of a layer to their benign mean maps undoes "
    "at least 15 points more of the successful attacks at eps = 0.2 than resetting as many random channels, averaged over pairs and "
    "layers, and loses less than 3 points of the benign inputs",
    paper="Das et al. 2020 report case studies on InceptionV1 and no numbers; the causal check is ours",
    bounds={
        "recovery_gap": ">= 0.15",
        "shared_with_original_falls": "> 0",
        "shared_with_target_rises": ">= 0",
        "benign_lost": "< 0.03",
    },
)
PAIRS = ((3, 5), (8, 1), (0, 6))


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(DigitsCnn(), Context(seed=seed))
    model = fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=8), seed=seed)
    rows: list[dict[str, float]] = []
    for original, target in PAIRS:
        probe = Bluff(eps=0.3, original=original, target=target)
        found = probe.measure(subject.with_model(model), Context(seed=seed))
        curves = found.figures["channels_shared"]["series"]
        first, second = (
            [share for _, share in curves[name]] for name in ("with the original class", "with the target class")
        )
        row = {
            "attacks_undone": found["recovered"].value,
            "undone_random": found["recovered_random"].value,
            "recovery_gap": found["recovered"].value - found["recovered_random"].value,
            "shared_with_original_falls": first[0] - first[-1],
            "shared_with_target_rises": second[-1] - second[0],
            "benign_lost": found["reset_loss"].value,
            "exploited": found["exploited"].value,
        }
        row |= {
            f"success_{eps:g}": hit
            for eps, hit in zip(
                found.figures["pathways"]["strengths"], found.figures["pathways"]["success"], strict=True
            )
        }
        row |= {f"shared_original_{k}": value for k, value in zip((1, 2, 3), first, strict=True)}
        row |= {f"shared_target_{k}": value for k, value in zip((1, 2, 3), second, strict=True)}
        layers = found.figures["channels_reset"]
        row |= {f"gap_{r['layer'].split('.')[0]}": r["attacks_undone"] - r["undone_by_random_channels"] for r in layers}
        rows.append(row)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
