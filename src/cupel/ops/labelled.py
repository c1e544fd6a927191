"""Test inputs with one class each: what most probes judge a classifier by, or the reason why they cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from cupel.core.errors import NotApplicable
from cupel.core.types import Dataset, Subject


def classes_of(data: Dataset, who: str, split: str = "test") -> Tensor:
    """The class of every example of a split, `[N]` int64.

    Raises:
        NotApplicable: the split is empty, or its targets are no single classes.
    """
    parts = [b.targets for b in data.batches(500)]
    if not sum(len(t) for t in parts):
        raise NotApplicable(f"{who} must have {split} examples; there are none. Give data for the {split} split.")
    if any(t.ndim != 1 or t.is_floating_point() or t.dtype == torch.bool for t in parts):
        raise NotApplicable(
            f"{who} must have {split} examples with one class each; got targets of shape {tuple(parts[0].shape)}. "
            "Use it where inputs are classified."
        )
    return torch.cat(parts).long()


def judged_classes(subject: Subject, who: str) -> tuple[Tensor, Tensor]:
    """Outputs `[N, K]` and classes `[N]` of the test split.

    Raises:
        NotApplicable: there are no test examples, no single classes, or no score for each class.
    """
    targets = classes_of(subject.data.test, who)
    out = subject.outputs("test")
    if out.ndim != 2 or len(out) != len(targets) or out.shape[1] < 2:
        raise NotApplicable(
            f"{who} must get one score per class, [{len(targets)}, K]; got outputs of shape {tuple(out.shape)}. "
            "Use it where inputs are classified."
        )
    if int(targets.max()) >= out.shape[1] or int(targets.min()) < 0:
        raise NotApplicable(
            f"{who} must have labels from 0 to {out.shape[1] - 1}, the network's outputs; got labels from "
            f"{int(targets.min())} to {int(targets.max())}. Number the classes as the network does."
        )
    return out, targets


def labelled_inputs(subject: Subject, who: str) -> tuple[Tensor, Tensor]:
    """Inputs `[N, ...]` floats, with an axis more than the batch's, and classes `[N]` of the test split.

    Raises:
        NotApplicable: inputs are no tensor of floats, or of one number each; and as `judged_classes`.
    """
    _, targets = judged_classes(subject, who)
    parts = [b.inputs for b in subject.data.test.batches(500)]
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in parts):
        raise NotApplicable(f"{who} must get inputs that are float tensors; got others. Use it where they are.")
    if any(x.ndim < 2 for x in parts):
        raise NotApplicable(f"{who} must get inputs [N, ...]; got one number for each. Give them as [N, 1].")
    return torch.cat(parts), targets


def evenly(count: int, most: int) -> Tensor:
    """At most `most` row numbers (0: all) spread evenly over `count` rows, so that all models meet the same ones.

    >>> evenly(10, 4).tolist()
    [0, 3, 6, 9]
    """
    rows: Tensor = torch.linspace(0, count - 1, min(most or count, count), dtype=torch.float64).round().long()
    apart: Tensor = rows.unique()
    return apart
