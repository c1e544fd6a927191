"""Probe `accuracy`: the share of test inputs that the model labels rightly."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cupel.core.context import Context
from cupel.core.protocols import Card
from cupel.core.scorecard import Readings, share
from cupel.core.types import Subject
from cupel.ops.labelled import judged_classes

CARD = Card(
    name="accuracy",
    family="quality",
    source="R. A. Fisher's share of right answers; interval: E. B. Wilson, Probable Inference, JASA 22, 1927",
    tags=("quality",),
    needs=("classes",),
    readings=("accuracy", "worst_class_accuracy"),
    ordered={"accuracy": "trained"},
)


@dataclass(frozen=True)
class Accuracy:
    """Share of test inputs labelled rightly, over all classes and in the worst one.

    Source: Wilson 1927 for the interval.

    Example:
        >>> Accuracy()
        Accuracy()
    """

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        out, targets = judged_classes(subject, "accuracy")
        guess = subject.task.predict(out)
        right = guess == targets
        classes = out.shape[-1]
        table = torch.zeros(classes, classes, dtype=torch.long)
        table.index_put_((targets, guess), torch.ones_like(targets), accumulate=True)  # [truth, guess]
        seen = table.sum(1) > 0
        rate = table.diag()[seen] / table.sum(1)[seen]
        worst = seen.nonzero().flatten()[rate.argmin()]
        return Readings.of(
            accuracy=share(int(right.sum()), len(right)),
            worst_class_accuracy=share(int(table[worst, worst]), int(table[worst].sum())),
            figures={"confusion": table.tolist()},
        )
