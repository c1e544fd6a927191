"""Citations between 3,327 papers on computer science."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.planetoid import Citations, citations

# No address: the publisher (github.com/kimiyoung/planetoid) offers Python pickles, which cupel never opens.
SET = DataSet(
    name="citeseer",
    title="citations between 3,327 papers on computer science",
    kind="graph",
    licence="MIT for the processed files (kimiyoung/planetoid); the original data (LINQS) state none",
    source="Z. Yang, W. Cohen, R. Salakhutdinov, Revisiting Semi-Supervised Learning with Graph Embeddings, ICML 2016",
    folder="planetoid",
    examples=3327,
    classes=6,
    files=(File(path="planetoid/citeseer.npz", urls=()),),
    remark="It is published as Python pickles only, which run code when they are opened; cupel reads the same graph as "
    "plain arrays in an .npz (see cupel.data.planetoid for its layout). 15 nodes have neither class nor words.",
)


def read(member: str = "", data_dir: Path | None = None) -> Citations:
    """The graph with the public split."""
    return citations("planetoid/citeseer.npz", data_dir=data_dir)
