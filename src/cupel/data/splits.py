"""Seeded, stratified splits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cupel.core.types import Examples, Splits


def stratified(inputs: Tensor, targets: Tensor, valid: float, test: float, data_seed: int) -> Splits:
    """Split examples by class into train, valid and test.

    Args:
        inputs, targets: `[N, ...]`, `[N]` class numbers.
        valid, test: shares of all examples, in (0, 1).
        data_seed: the data never follow the run's seed.
    """
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(targets))
    labels = targets.numpy()
    rest, held = train_test_split(rows, test_size=test, random_state=data_seed, stratify=labels)
    kept, checked = train_test_split(rest, test_size=valid / (1 - test), random_state=data_seed, stratify=labels[rest])
    parts = (torch.from_numpy(np.sort(r)) for r in (kept, checked, held))
    return Splits(*(Examples(inputs[r], targets[r], r) for r in parts))


def first_of(splits: Splits, examples: int) -> Splits:
    """At most `examples` rows of every split (0 keeps all)."""
    if not examples:
        return splits
    return Splits(*(s.take(torch.arange(min(examples, len(s)))) for s in (splits.train, splits.valid, splits.test)))
