"""`label-smoothing` against torch's own loss."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.types import Batch
from cupel.techniques.train.label_smoothing import LabelSmoothing


def test_equals_torch() -> None:
    g = torch.Generator().manual_seed(0)
    out, y = torch.randn(20, 7, generator=g), torch.randint(7, (20,), generator=g)
    batch = Batch(out, y, y)
    for doubt in (0.0, 0.1, 0.6):
        hook = LabelSmoothing(doubt).hook(Context())
        found = hook.loss(F.cross_entropy(out, y), out, batch, None)  # type: ignore[attr-defined]
        assert torch.allclose(found, F.cross_entropy(out, y, label_smoothing=doubt))
