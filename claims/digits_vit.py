"""Claim of `digits-vit`: the workload's network reaches the accuracy its card states."""

from __future__ import annotations

import torch
from sklearn.neighbors import KNeighborsClassifier

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_vit import DigitsVit

CLAIM = Claim(
    method="digits-vit",
    statement="Trained as the workload says, the transformer labels 0.97 of the test digits rightly, within a point",
    paper="0.98 by k-nearest neighbours on this set (Alpaydin and Kaynak 1998); none for a transformer of this size",
    bounds={"accuracy": ">= 0.96"},
    seeds=(10, 11, 12),  # not those that the budget was chosen on
    quick_seeds=1,
)


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(DigitsVit(), Context(seed=seed))
    train, test = subject.data.train, subject.data.test
    model = fit(subject.model, subject.data, subject.task, budget=subject.budget, seed=seed)
    done = subject.with_model(model)
    found = {
        f"{part}accuracy": float((done.outputs(split).argmax(1) == data.targets).double().mean())
        for part, split, data in (("", "test", test), ("train_", "train", train))
    }
    neighbour = KNeighborsClassifier(1).fit(train.inputs.flatten(1).numpy(), train.targets.numpy())
    guess = torch.from_numpy(neighbour.predict(test.inputs.flatten(1).numpy()))
    return found | {"nearest_neighbour_accuracy": float((guess == test.targets).double().mean())}
