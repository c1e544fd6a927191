"""What a network makes of many poses, and how that is shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.ops.poses import NAMES

BINS = 12  # parts of a full turn


@dataclass(frozen=True)
class Survey:
    """Classes `[N]`, poses `[N, 6]`, pictures `[N, 1, S, S]`, and the network's probabilities `[N, K]`."""

    kinds: Tensor
    poses: Tensor
    pictures: Tensor
    scores: Tensor

    @property
    def read_as(self) -> Tensor:
        return self.scores.argmax(1)

    @property
    def failing(self) -> Tensor:
        return self.read_as != self.kinds


def seen_by(model: nn.Module, device: torch.device, pictures: Tensor) -> Tensor:
    """Outputs `[N, K]` on the CPU, a few hundred pictures at a time; the model must be in evaluation mode."""
    with torch.no_grad():
        return torch.cat([model(part.to(device)).cpu() for part in pictures.split(500)])


def failing_by_angle(survey: Survey) -> dict[str, list[list[float]]]:
    """For yaw, pitch and roll: the middle of each part of the turn in degrees, and the share that fails there."""
    edges = torch.linspace(-180, 180, BINS + 1)
    angles, fail = survey.poses[:, 3:].rad2deg(), survey.failing
    lines = {}
    for k, name in enumerate(NAMES[3:]):
        part = torch.bucketize(angles[:, k].contiguous(), edges[1:-1])
        lines[name] = [
            [float(edges[b] + 180 / BINS), float(fail[part == b].double().mean())]
            for b in range(BINS)
            if bool((part == b).any())
        ]
    return lines


def figures_of(survey: Survey) -> dict[str, object]:
    """Failures by angle, what is read for what, and the six surest failures if pictures are small."""
    classes, fail = survey.scores.shape[1], survey.failing
    counts = torch.zeros(classes, classes, dtype=torch.long)
    counts.index_put_((survey.kinds, survey.read_as), torch.ones_like(survey.kinds), accumulate=True)
    surest = torch.where(fail, survey.scores.amax(1), 0).argsort(descending=True)[: min(6, int(fail.sum()))]
    shown: list[dict[str, object]] = [
        {
            "class": int(survey.kinds[r]),
            "read_as": int(survey.read_as[r]),
            "probability": round(float(survey.scores[r].amax()), 4),
            "picture": [[round(v, 3) for v in line] for line in survey.pictures[r, 0].tolist()],
        }
        for r in surest.tolist()
    ]
    lines = {"x": "degrees", "y": "failing share", "series": failing_by_angle(survey), "share": True}
    return {
        "failing_by_angle": lines,
        "confusion": counts.tolist(),
        "strange_poses": shown if survey.pictures[0].numel() <= 4096 else [],
    }
