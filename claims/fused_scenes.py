"""Claim of `fused-scenes`: two sensors find more than one, and nothing is found that was not learnt."""

from __future__ import annotations

from dataclasses import replace

import torch

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.ops.detection import mean_precision
from cupel.runner.claims import Claim
from cupel.workloads.robust.fused_scenes import FusedScenes

CLAIM = Claim(
    method="fused-scenes",
    statement="A detector of both sensors has a mean average precision (overlap 0.5, held-out scenes) of at least 0.6, "
    "and more than its twin that sees the camera alone, or the LiDAR alone; where the boxes of training scenes are "
    "shuffled between scenes it finds next to nothing",
    paper="not published for these scenes; on nuScenes fusion models are ahead of the models of one sensor that they "
    "are made of (0.824 mAP on the frames of arXiv 2304.14614)",
    quick_seeds=1,
    bounds={"both": ">= 0.6", "gain_over_camera": "> 0", "gain_over_lidar": "> 0", "shuffled_boxes": "<= 0.05"},
    seeds=(0, 1, 2),
)


def precision(subject: Subject, least_overlap: float = 0.5) -> float:
    found = subject.task.predict(subject.outputs())
    return mean_precision(found, subject.data.test.targets, seeded(0, "interval"), least_overlap, rounds=0).value


def measure(seed: int, quick: bool) -> dict[str, float]:
    made: dict[str, Subject] = {}
    for name in ("both", "camera", "lidar", "shuffled_boxes"):
        subject = build(
            FusedScenes(
                data_seed=seed + 1,
                sensors=name if name in ("camera", "lidar") else "both",
                examples=400 if quick else FusedScenes().examples,
            ),
            Context(seed=seed + 1),
        )
        train, epochs = subject.data.train, subject.budget.epochs
        if name == "shuffled_boxes":
            order = torch.randperm(len(train), generator=seeded(seed, "shuffle"))
            train, epochs = train.having(targets=train.targets[order]), 2
        budget = replace(subject.budget, epochs=1 if quick else epochs)
        made[name] = subject.with_model(fit(subject.model, train, subject.task, budget=budget, seed=seed))
    found = {name: precision(subject) for name, subject in made.items()}
    return {
        **found,
        "gain_over_camera": found["both"] - found["camera"],
        "gain_over_lidar": found["both"] - found["lidar"],
        **{f"{name}_at_overlap_70": precision(made[name], 0.7) for name in ("both", "camera", "lidar")},
    }
