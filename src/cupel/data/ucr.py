"""Time series of the UCR archive, from one `.npz` file for each data set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cupel.core.errors import MissingData, ParamError
from cupel.core.types import Examples, Splits
from cupel.data.local import local
from cupel.data.splits import stratified


def z_normalised(x: Tensor) -> Tensor:
    """Each channel of each series with mean 0 and standard deviation 1: `[N, C, T]`; constant ones become 0."""
    spread = x.std(dim=2, keepdim=True, unbiased=False)
    flat = spread <= 1e-6 * x.abs().amax(dim=2, keepdim=True).clamp_min(1e-30)
    return (x - x.mean(dim=2, keepdim=True)).where(~flat, 0) / spread.where(~flat, 1)


def read_ucr(name: str) -> tuple[Tensor, Tensor, int]:
    """All series of data set `name`, training part first.

    Reads `ucr/<name>.npz` with `X_train`, `X_test` `[N, C, T]` (or `[N, T]`) and `y_train`, `y_test` `[N]`.

    Returns:
        Series `[N, C, T]` float32, class numbers `[N]` from 0 up, and the size of the training part.

    Raises:
        MissingData: the file is not on this machine, or holds gaps.
    """
    with np.load(local(f"ucr/{name}.npz"), allow_pickle=False) as file:
        x = np.concatenate([file["X_train"], file["X_test"]]).astype(np.float32)
        labels = np.concatenate([file["y_train"], file["y_test"]])
        count = len(file["y_train"])
    if not np.isfinite(x).all():
        raise MissingData(
            f"the series of ucr/{name}.npz must be complete; some hold gaps. Fill them, or choose another."
        )
    _, y = np.unique(labels, return_inverse=True)
    series = torch.from_numpy(x)
    return (series if series.ndim == 3 else series.unsqueeze(1)), torch.from_numpy(y.astype(np.int64)), count


def ucr(name: str, resplit: bool = False, data_seed: int = 0) -> Splits:
    """Train, validation and test series of a UCR data set, z-normalised one by one.

    Args:
        name: such as `ItalyPowerDemand`.
        resplit: pool both parts of the archive and draw 60% for training (a sixth of it validates) and
            40% for testing, stratified; otherwise the archive's own test part stays and a sixth of its
            training part validates.
        data_seed: of the draw.

    Raises:
        MissingData: the file is missing, or has no test part and is not re-split.
        ParamError: a class is too small to be re-split.
    """
    raw, y, count = read_ucr(name)
    x = z_normalised(raw)
    if resplit:
        smallest = int(torch.bincount(y).min())
        if smallest < 6:
            raise ParamError(
                f"each class must have 6 series or more to be re-split; the smallest of {name} has {smallest}. "
                "Keep the archive's own split with resplit=False."
            )
        return stratified(x, y, valid=0.1, test=0.4, data_seed=data_seed)
    if count == len(y):
        raise MissingData(f"ucr/{name}.npz must have a test part; it has none. Set resplit to draw one.")
    kept = _train_and_valid(y[:count].numpy(), data_seed)
    parts = (*(torch.from_numpy(np.sort(r)) for r in kept), torch.arange(count, len(y)))
    return Splits(*(Examples(x[r], y[r], r) for r in parts))


def _train_and_valid(labels: np.ndarray, data_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of five sixths and one sixth of the training part, stratified where classes are large enough."""
    from sklearn.model_selection import train_test_split

    held = max(len(np.unique(labels)), round(len(labels) / 6))
    even = labels if np.bincount(labels).min() >= 2 else None
    kept, checked = train_test_split(np.arange(len(labels)), test_size=held, random_state=data_seed, stratify=even)
    return kept, checked
