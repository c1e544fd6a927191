"""Artefacts of a run as files: arrays as npz, numbers into the scorecard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn


def save_artefacts(entries: Mapping[str, object], folder: Path, stem: str) -> dict[str, Any]:
    """Write what lies on a shelf.

    Tensors and mappings of tensors become `<key>-<stem>.npz` (no pickle inside); mappings of numbers
    become notes of the scorecard; networks stay with the recipe that makes them.

    Returns:
        `{"artefacts": names of files, "notes": {key: {name: number}}}`.
    """
    files: list[str] = []
    notes: dict[str, dict[str, float]] = {}
    for key, value in entries.items():
        if isinstance(value, nn.Module):
            continue
        arrays = {key: value} if isinstance(value, Tensor) else value
        if not isinstance(arrays, Mapping):
            continue
        if all(isinstance(v, (int, float)) for v in arrays.values()):
            notes[key] = {str(k): float(v) for k, v in arrays.items()}
        elif all(isinstance(v, Tensor) for v in arrays.values()):
            name = f"{key}-{stem}.npz"
            np.savez_compressed(folder / name, **{str(k): v.detach().cpu().numpy() for k, v in arrays.items()})
            files.append(name)
    return {"artefacts": files, "notes": notes}
