"""Claim of `posed-objects`: its network learns it, by shapes, and nothing leaks."""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import outputs_on
from cupel.runner.claims import Claim
from cupel.workloads.robust.posed_objects import PosedObjects

CLAIM = Claim(
    method="posed-objects",
    statement="The network tells the eight objects apart near their canonical pose with an accuracy of at least 0.95; "
    "with shuffled training labels it stays at chance, so nothing leaks from the test split; how often each grey "
    "occurs tells less than half, so shapes must be seen",
    paper="Alcorn et al. 2019 take 30 objects that Inception-v3 reads rightly in their canonical pose",
    bounds={"accuracy": ">= 0.95", "shuffled_labels": "<= 0.2", "grey_levels": "<= 0.5"},
    seeds=(0, 1, 2),
)


def greys(x: Tensor) -> Tensor:
    """Histograms of 32 grey levels, `[N, 32]`."""
    level = (x.flatten(1) * 31.999).long()
    return torch.zeros(len(x), 32).scatter_add_(1, level, torch.ones(level.shape)) / level.shape[1]


def measure(seed: int, quick: bool) -> dict[str, float]:
    shape = PosedObjects(examples=100) if quick else PosedObjects()
    found: dict[str, float] = {}
    for name in ("accuracy", "shuffled_labels"):
        subject = build(shape, Context(seed=seed))
        train, test = subject.data.train, subject.data.test
        order = torch.randperm(len(train), generator=seeded(seed, "shuffle"))
        given = train.having(targets=train.targets[order]) if name == "shuffled_labels" else train
        model = fit(subject.model, given, subject.task, budget=subject.budget, seed=seed)
        right = outputs_on(model, test).argmax(1) == test.targets
        found[name] = float(right.double().mean())
        if name == "accuracy":
            own = [float(right[test.targets == k].double().mean()) for k in range(subject.task.classes)]  # type: ignore[attr-defined]
            found["worst_object"] = min(own)
    peer = LogisticRegression(max_iter=300, C=100.0).fit(greys(train.inputs), train.targets)
    found["grey_levels"] = float(peer.score(greys(test.inputs), test.targets))
    few = slice(0, 2000)
    near = KNeighborsClassifier(1).fit(train.inputs[few].flatten(1), train.targets[few])
    found["nearest_neighbour"] = float(near.score(test.inputs.flatten(1), test.targets))
    return found
