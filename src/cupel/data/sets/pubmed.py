"""Citations between 19,717 papers on diabetes."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.planetoid import Citations, citations

# No address: the publisher (github.com/kimiyoung/planetoid) offers Python pickles, which cupel never opens.
SET = DataSet(
    name="pubmed",
    title="citations between 19,717 papers on diabetes",
    kind="graph",
    licence="MIT for the processed files (kimiyoung/planetoid); the original data (LINQS) state none",
    source="Z. Yang, W. Cohen, R. Salakhutdinov, Revisiting Semi-Supervised Learning with Graph Embeddings, ICML 2016",
    folder="planetoid",
    examples=19717,
    classes=3,
    files=(File(path="planetoid/pubmed.npz", urls=()),),
    also=(("planetoid/pubmed_structure.npz",),),
    remark="It is published as Python pickles only, which run code when they are opened; cupel reads the same graph as "
    "plain arrays in an .npz (see cupel.data.planetoid for its layout). "
    "planetoid/pubmed_structure.npz counts too, but holds the words of 1,060 papers only: see `described`.",
)


def read(member: str = "", data_dir: Path | None = None) -> Citations:
    """The graph with the public split."""
    return citations("planetoid/pubmed.npz", "planetoid/pubmed_structure.npz", data_dir=data_dir)
