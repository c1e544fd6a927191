"""Names of steps within a variant; randomness hangs on them, so they depend on nothing else."""

from __future__ import annotations

from collections.abc import Sequence


def step_names(labels: Sequence[str]) -> list[str]:
    """Number the repeats.

    >>> step_names(["fit", "apply-dqa", "fit"])
    ['fit', 'apply-dqa', 'fit-2']
    """
    seen: dict[str, int] = {}
    names = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        names.append(label if seen[label] == 1 else f"{label}-{seen[label]}")
    return names
