"""Claim of `fusion-attack`: a patch in the camera's view alone breaks a detector that also has a LiDAR."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cupel.core.steps import FitStep
from cupel.core.types import still
from cupel.ops.sensitivity import mass_inside
from cupel.probes.robust.fusion_attack import FusionAttack
from cupel.runner.bench import prepare
from cupel.runner.claims import Claim
from cupel.workloads.robust.fused_scenes import FusedScenes

CLAIM = Claim(
    method="fusion-attack",
    statement="In scenes of digits that a camera and a LiDAR see, early fusion finds at least as much as either sensor "
    "alone (mAP, held-out scenes); one 12x12 patch on free ground, in the camera's view alone, cuts its mAP by at least "
    "30% of its value where noise of the same area costs under 8%; the LiDAR-only twin loses nothing; late fusion "
    "(scores averaged) loses less than early fusion. The design of the victim, coarse layers that carry the whole scene "
    "to every cell, was chosen on other scenes and another network for this effect; without them a patch cut 7 to 15% "
    "there (control: neighbours)",
    paper="nuScenes, six fusion models: mAP 0.824 -> 0.353 by the scene-oriented patch, the target's score 0.728 -> "
    "0.156 by the object-oriented one; camera-only attacks on all",
    quick_seeds=1,
    bounds={
        "early_map_drop": ">= 0.3",
        "early_random_drop": "< 0.08",
        "fusion_gain_over_camera": ">= 0",
        "fusion_gain_over_lidar": ">= 0",
        "lidar_twin_map_drop": "<= 0",
        "late_gain": "> 0",
    },
    seeds=(0, 1, 2),
    explains="One bound is missed, by a point: the patch cuts 0.29 of the mAP on scenes that had no part in the choice of "
    "the victim (0.31, 0.31, 0.25), 0.38 on those that had: the choice flattered by that much. Three of the five held "
    "bounds are within chance: fusion is ahead of the camera alone by 0.016 (-0.09 to 0.12), late fusion loses less by "
    "0.04 (-0.18 to 0.26), noise costs 0.063 (0.02 to 0.11). A detector without coarse layers loses 0.23 (0.19 to 0.29), "
    "not 0.07 to 0.15 as in the trials. The camera alone loses 0.41; the object patch brings its object's score from 0.52 "
    "to 0.13, where noise brings it to 0.31.",
)
NETS: dict[str, dict[str, Any]] = {
    "early": {},
    "late": {"fusion": "late"},
    "neighbours": {"pyramid": False},  # early fusion in which no cell hears of the whole scene
    "camera_twin": {"sensors": "camera"},
    "lidar_twin": {"sensors": "lidar"},
}
TOLD = (
    "map_patch", "map_clean", "map_random", "map_drop", "random_drop", "map_looks", "map_sensor_dark", "map_others_dark",
)  # fmt: skip


def measure(seed: int, quick: bool) -> dict[str, float]:
    probe = FusionAttack(steps=30, map_steps=20, map_scenes=4, examples=60) if quick else FusionAttack()
    patches: dict[str, Tensor] = {}
    found: dict[str, float] = {}
    for name, design in NETS.items():
        # Other scenes and first weights than those the design was chosen on.
        workload = FusedScenes(data_seed=seed + 1, **({"examples": 400} if quick else {}), **design)
        subject, ctx = prepare(workload, [FitStep({"epochs": 1} if quick else {})], seed + 1)
        with still(subject.model):
            stage = probe.staged(subject, ctx.child("probe-fusion-attack"))
            if "twin" not in name:  # each is attacked by someone who knows it
                patches[name] = probe.scene_patch(stage)
            if name == "early":
                some, maps = probe.maps(stage)
                inside = mass_inside(maps, some.boxes, some.there)
                aimed = probe.aimed(stage, probe.object_patch(stage))
                found["early_object_share"] = float(inside.mean())
                found |= {f"early_{key}": reading.value for key, reading in aimed.items()}
            counted = probe.counted(stage, patches.get(name, patches["early"]))
            told = TOLD if name in patches else ("map_clean", "map_drop")
            found |= {f"{name}_{key}": counted[key].value for key in told}
            if name == "late":
                found["late_map_drop_by_the_patch_for_early"] = probe.counted(stage, patches["early"])["map_drop"].value
    drop = found.pop("early_map_drop")
    return {
        "early_map_drop": drop,
        "fusion_gain_over_camera": found["early_map_clean"] - found["camera_twin_map_clean"],
        "fusion_gain_over_lidar": found["early_map_clean"] - found["lidar_twin_map_clean"],
        "late_gain": drop - found["late_map_drop"],
        **found,
    }
