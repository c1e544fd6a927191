"""Citation graphs with the public Planetoid split, from `.npz` files.

The files that Z. Yang, W. Cohen and R. Salakhutdinov published (`ind.cora.x` and its seven companions) are Python
pickles. Opening a pickle runs whatever it names, so cupel opens none, from nobody. The `.npz` layout read here holds
the same graph as plain arrays.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cupel.core.errors import MissingData
from cupel.data.local import local, located

LAYOUT = (
    "edges [E, 2], labels [N], feat_data, feat_indices, feat_indptr, feat_shape (the features as CSR), train_idx, "
    "val_idx, test_idx"
)


@dataclass(frozen=True)
class Citations:
    """A graph of papers.

    Args:
        edges: undirected, each once, `[E, 2]` int64.
        features: words of every paper, `[N, F]` float32; zeros where `described` is false.
        labels: `[N]` int64; -1 for papers without a class.
        train, valid, test: papers of the public split, int64.
        described: papers whose features are in the file, `[N]` bool.
        classes: how many.
    """

    edges: Tensor
    features: Tensor
    labels: Tensor
    train: Tensor
    valid: Tensor
    test: Tensor
    described: Tensor
    classes: int


def citations(*names: str, data_dir: Path | None = None) -> Citations:
    """The graph in the first of `names` that is here, such as `planetoid/cora.npz`.

    Raises:
        MissingData: none is here; says so too when only the original pickles are.
    """
    stem = Path(names[0]).stem
    pickles = located(f"planetoid/ind.{stem}.graph", f"planetoid/ind.{stem}.x", data_dir=data_dir)
    if pickles is not None and located(*names, data_dir=data_dir) is None:
        raise MissingData(
            f"{names[0]} must be an .npz file; got {pickles.name}, a Python pickle, which can run any code when it is "
            f"opened; cupel opens none. Convert it once where you trust it: numpy.savez with {LAYOUT}."
        )
    return read_citations(local(*names, data_dir=data_dir))


def read_citations(path: Path) -> Citations:
    """The graph in an `.npz` file.

    Keys: `edges`, `labels`, `feat_data`, `feat_indices`, `feat_indptr`, `feat_shape`, `train_idx`, `val_idx`,
    `test_idx`; and `feat_nodes` where only these nodes have features.

    Raises:
        MissingData: the file is broken or does not fit together, or holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {key: file[key] for key in file.files}
        labels, edges = held["labels"].astype(np.int64), held["edges"].astype(np.int64)
        nodes = held.get("feat_nodes", np.arange(len(labels))).astype(np.int64)
        rows = _dense(held, len(nodes))
        parts = [held[f"{part}_idx"].astype(np.int64) for part in ("train", "val", "test")]
    except (KeyError, ValueError, IndexError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        told = str(error).split(". ")[0]
        raise MissingData(
            f"{path} must be an .npz with {LAYOUT}, without pickles; got {told}. Make it again."
        ) from None
    _fits(path, edges, nodes, labels, parts)
    features = torch.zeros(len(labels), rows.shape[1])
    features[torch.from_numpy(nodes)] = torch.from_numpy(rows)
    described = torch.zeros(len(labels), dtype=torch.bool)
    described[torch.from_numpy(nodes)] = True
    train, valid, test = (torch.from_numpy(a) for a in parts)
    return Citations(
        torch.from_numpy(edges),
        features,
        torch.from_numpy(labels),
        train,
        valid,
        test,
        described,
        int(labels.max()) + 1,
    )


def _fits(path: Path, edges: np.ndarray, nodes: np.ndarray, labels: np.ndarray, parts: list[np.ndarray]) -> None:
    """Refuse what names papers that are not there, or gives one to two parts."""
    used = np.concatenate(parts)
    for what, ids in (("edges", edges), ("feat_nodes", nodes), ("split", used)):
        if ids.size and not 0 <= ids.min() <= ids.max() < len(labels):
            raise MissingData(
                f"{what} of {path} must name nodes below {len(labels)}; got {ids.min()}..{ids.max()}. Make it again."
            )
    if edges.ndim != 2 or edges.shape[1] != 2 or len(np.unique(used)) != len(used) or (labels[used] < 0).any():
        raise MissingData(
            f"{path} must hold pairs as edges and splits of labelled nodes without overlap; got edges {edges.shape}, "
            f"{len(used) - len(np.unique(used))} nodes twice, {(labels[used] < 0).sum()} without label. Make it again."
        )


def _dense(held: dict[str, np.ndarray], count: int) -> np.ndarray:
    """The CSR features as `[N, F]` float32."""
    rows, columns = (int(n) for n in held["feat_shape"])
    starts, at = held["feat_indptr"].astype(np.int64), held["feat_indices"].astype(np.int64)
    if not 0 < rows * columns < 2**31:
        raise ValueError(f"a feature table of {rows} by {columns}")
    if rows != count or len(starts) != rows + 1 or starts[0] != 0 or (np.diff(starts) < 0).any():
        raise ValueError(f"{rows} feature rows for {count} nodes, or row starts that do not rise")
    if (
        starts[-1] != len(at)
        or len(at) != len(held["feat_data"])
        or (len(at) and not 0 <= at.min() <= at.max() < columns)
    ):
        raise ValueError("features outside their columns or of unequal counts")
    dense = np.zeros((rows, columns), dtype=np.float32)
    dense[np.repeat(np.arange(rows), np.diff(starts)), at] = held["feat_data"]
    return dense
