"""What a reader of data found: examples, class names, and everything it had to infer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cupel.core.types import Bounds, Examples


@dataclass(frozen=True)
class Found:
    """Data read from files.

    Args:
        parts: `{"all": ...}` where the source is one set, or its own splits under `train`, `valid`, `test`.
            Inputs are float32, images `[N, C, H, W]`, series `[N, C, T]`, features `[N, F]`; targets are int64
            `[N]` in 0..K-1; index is unique over all parts.
        classes: names in the order of the labels, K of them.
        kind: what one input is.
        bounds: the range that inputs live in after scaling; `None` where they have none.
        notes: one sentence for each thing inferred or skipped ("pixel values 0..255 divided by 255").
    """

    parts: Mapping[str, Examples]
    classes: tuple[str, ...]
    kind: Literal["images", "series", "features"]
    bounds: Bounds | None
    notes: tuple[str, ...] = ()
