"""The handwritten digits that scikit-learn carries: 1,797 real 8x8 images of ten classes."""

from __future__ import annotations

from functools import lru_cache

import torch

from cupel.core.types import Splits
from cupel.data.splits import stratified


@lru_cache(maxsize=4)
def digits(data_seed: int = 0) -> Splits:
    """Images `[N, 1, 8, 8]` in [0, 1]; 1,077 train, 180 valid, 540 test, stratified.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (test part).
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)
    return stratified(x, torch.from_numpy(labels).long(), valid=0.1, test=0.3, data_seed=data_seed)
