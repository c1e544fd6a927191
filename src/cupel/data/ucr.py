"""Time series of the UCR and UEA archives, from one `.npz` file or one folder of `.ts` files for each data set."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cupel.core.errors import MissingData, ParamError
from cupel.core.types import Examples, Splits
from cupel.data.found import Found
from cupel.data.local import local
from cupel.data.splits import stratified
from cupel.data.ts import read_ts

_AGAIN = "Fetch it again: `cupel data fetch ucr/NAME --again`."


def z_normalised(x: Tensor) -> Tensor:
    """Each channel of each series with mean 0 and standard deviation 1: `[N, C, T]`; constant ones become 0."""
    spread = x.std(dim=2, keepdim=True, unbiased=False)
    flat = spread <= 1e-6 * x.abs().amax(dim=2, keepdim=True).clamp_min(1e-30)
    return (x - x.mean(dim=2, keepdim=True)).where(~flat, 0) / spread.where(~flat, 1)


@dataclass(frozen=True)
class Part:
    """Series `[N, C, T]` float32, NaN behind the end of the shorter ones; class numbers `[N]`; lengths `[N]`."""

    x: np.ndarray
    y: np.ndarray
    length: np.ndarray


def read_series(path: Path) -> tuple[dict[str, Part], tuple[str, ...]]:
    """The parts `train` and `test` and the class names of one set of the UCR or UEA archive.

    Args:
        path: a `.npz` file with `X_train`, `X_test` `[N, C, T]` (or `[N, T]`) and `y_train`, `y_test` `[N]`, perhaps
            `len_train`, `len_test` `[N]` and `classes`; or the unpacked folder with `NAME_TRAIN.ts`, `NAME_TEST.ts`.

    Raises:
        MissingData: the file is broken, or holds Python objects.
    """
    if path.is_dir():
        return _from_ts(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {key: file[key] for key in file.files}
        _, numbers = np.unique(np.concatenate([held["y_train"], held["y_test"]]), return_inverse=True)
        names = np.unique(np.concatenate([held["y_train"], held["y_test"]]))
        parts, start = {}, 0
        for part in ("train", "test"):
            x, count = held[f"X_{part}"].astype(np.float32), len(held[f"y_{part}"])
            x = x if x.ndim == 3 else x[:, None, :]
            length = held.get(f"len_{part}", np.full(len(x), x.shape[-1]))
            if not len(x) == count == len(length):
                raise ValueError(f"{len(x)} series, {count} labels and {len(length)} lengths in its part {part}")
            parts[part] = Part(x, numbers[start : start + count].astype(np.int64), length.astype(np.int64))
            start += count
        if len(held.get("classes", names)) >= len(names):  # the archive's own names stand for class numbers 0..K-1
            names = held.get("classes", names)
        return parts, tuple(str(n) for n in names)
    except (KeyError, ValueError, IndexError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        told = str(error).split(". ")[0]
        raise MissingData(
            f"{path} must be an .npz of series and labels without pickles; got {told}. {_AGAIN}"
        ) from None


def _from_ts(folder: Path) -> tuple[dict[str, Part], tuple[str, ...]]:
    found, files = {}, [p for p in sorted(folder.rglob("*.ts")) if not p.name.startswith(".")]  # macOS leaves ._ files
    for part in ("train", "test"):
        path = next((p for p in files if p.stem.lower().endswith(f"_{part}")), None)
        if path is None:
            raise MissingData(f"{folder} must hold a *_{part.upper()}.ts file; got none. {_AGAIN}")
        found[part] = read_ts(path)
    classes = _in_order(found["train"].classes)
    if _in_order(found["test"].classes) != classes or len({len(s) for f in found.values() for s in f.series}) != 1:
        raise MissingData(f"both files of {folder} must have the same classes and channels; they differ. {_AGAIN}")
    longest = max(s.shape[1] for f in found.values() for s in f.series)
    parts = {}
    for part, read in found.items():
        x = np.full((len(read.series), len(read.series[0]), longest), np.nan, dtype=np.float32)
        for row, series in enumerate(read.series):
            x[row, :, : series.shape[1]] = series
        y = np.array([classes.index(label) for label in read.labels], dtype=np.int64)
        parts[part] = Part(x, y, np.array([s.shape[1] for s in read.series]))
    return parts, classes


def _in_order(classes: tuple[str, ...]) -> tuple[str, ...]:
    """By number where all are numbers, else by letter, as the `.npz` files have them; headers have any order."""
    try:
        return tuple(sorted(classes, key=float))
    except ValueError:
        return tuple(sorted(classes))


def series_found(folder: str, name: str, data_dir: Path | None = None) -> Found:
    """Set `name` of the archive in `folder` (`ucr` or `uea`) with the archive's own parts, values as they are.

    Raises:
        MissingData: it is not on this machine, is broken, or holds gaps.
    """
    path = local(f"{folder}/{name}.npz", f"{folder}/{name}", data_dir=data_dir)
    parts, classes = read_series(path)
    made, start, notes = {}, 0, ["values as the archive has them"]
    shortest = min(int(p.length.min()) for p in parts.values() if len(p.y))
    for part, held in parts.items():
        inside = np.arange(held.x.shape[2]) < held.length[:, None, None]
        if not np.isfinite(held.x[np.broadcast_to(inside, held.x.shape)]).all():
            raise MissingData(
                f"the series of {path} must be complete; got some with gaps. Fill them, or choose another set."
            )
        if len(held.y):
            x = torch.from_numpy(np.where(inside, held.x, np.float32(0)))
            made[part] = Examples(x, torch.from_numpy(held.y), torch.arange(len(held.y)) + start)
        else:
            notes.append(f"this copy has no {part} part: its other part is all there is")
        start += len(held.y)
    longest = next(iter(parts.values())).x.shape[2]
    if shortest < longest:
        notes.append(f"series of {shortest} to {longest} steps, zeros behind the end of the shorter ones")
    if len(made) == 1:
        made = {"all": next(iter(made.values()))}
    return Found(made, classes, "series", None, tuple(notes))


def read_ucr(name: str) -> tuple[Tensor, Tensor, int]:
    """All series of data set `name`, training part first.

    Reads `ucr/<name>.npz`, or the folder `ucr/<name>` that a fetch makes.

    Returns:
        Series `[N, C, T]` float32, class numbers `[N]` from 0 up, and the size of the training part.

    Raises:
        MissingData: the files are not on this machine, are broken, or hold gaps.
    """
    path = local(f"ucr/{name}.npz", f"ucr/{name}")
    parts, _ = read_series(path)
    x = np.concatenate([p.x for p in parts.values()])
    if not np.isfinite(x).all():
        raise MissingData(
            f"the series of {path} must be complete and equally long; got gaps. Fill them, or choose another."
        )
    _, y = np.unique(np.concatenate([p.y for p in parts.values()]), return_inverse=True)
    return torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)), len(parts["train"].y)


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
