"""Claim of `digits-mlp`: the workload reaches the accuracy that the literature reports on these images."""

from __future__ import annotations

from dataclasses import replace

import torch
from sklearn.neighbors import KNeighborsClassifier

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="digits-mlp",
    statement="A 300-100 network reaches the literature's 0.97 within a point in its default budget; "
    "with shuffled training labels it stays at chance, so nothing leaks from the test split",
    paper="SVM 0.97 (scikit-learn's digit example), k-NN 0.98 (UCI documentation of the set)",
    bounds={"accuracy": ">= 0.96", "accuracy_other_splits": ">= 0.96", "accuracy_shuffled_labels": "<= 0.2"},
)


def right(subject: Subject, split: str) -> float:
    return float((subject.outputs(split).argmax(-1) == getattr(subject.data, split).targets).double().mean())


def measure(seed: int, quick: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, data_seed in (("", 0), ("_other_splits", seed + 1)):
        subject = build(DigitsMlp(data_seed=data_seed), Context(seed=seed))
        trained = subject.with_model(fit(subject.model, subject.data, subject.task, budget=subject.budget, seed=seed))
        for split in ("train", "valid", "test"):
            found[f"accuracy{name}" if split == "test" else f"{split}_accuracy{name}"] = right(trained, split)
        train, test = subject.data.train, subject.data.test
        peer = KNeighborsClassifier(1).fit(train.inputs.flatten(1), train.targets)
        found[f"nearest_neighbour{name}"] = float(peer.score(test.inputs.flatten(1), test.targets))

    subject = build(DigitsMlp(), Context(seed=seed))
    order = torch.randperm(len(subject.data.train), generator=seeded(seed, "shuffle"))
    shuffled = replace(subject.data, train=subject.data.train.having(targets=subject.data.train.targets[order]))
    model = fit(subject.model, shuffled, subject.task, budget=subject.budget, seed=seed)
    found["accuracy_shuffled_labels"] = right(subject.with_model(model), "test")
    found["params"] = float(sum(p.numel() for p in model.parameters()))
    return found
