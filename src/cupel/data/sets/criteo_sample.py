"""A sample of advertisements that were clicked or not."""

from __future__ import annotations

from pathlib import Path

from cupel.data.criteo import read_criteo
from cupel.data.dataset import DataSet, File
from cupel.data.found import Found
from cupel.data.local import local

# Size and sha256: computed on the file of shenweichen/DeepCTR at tag v0.9.3 (git blob 74d1f6ab).
SET = DataSet(
    name="criteo-sample",
    title="200 advertisements, clicked or not: 13 numbers and 26 categories each",
    kind="features",
    licence="the sample: Apache-2.0 (shenweichen/DeepCTR); the original data: Criteo's terms, non-commercial research",
    source="Criteo, Display Advertising Challenge, Kaggle 2014; sample of W. Shen, DeepCTR",
    folder="ctr-samples",
    examples=200,
    classes=2,
    files=(
        File(
            path="ctr-samples/criteo_sample.csv",
            urls=("https://raw.githubusercontent.com/shenweichen/DeepCTR/v0.9.3/examples/criteo_sample.txt",),
            bytes=52518,
            sha256="08b84f12a22438fb534e989a5e4fa245726b2bda001983556bc2aea2f094f724",
        ),
    ),
)


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Features `[200, 39]`, one set without a split of its own."""
    return read_criteo(local("ctr-samples/criteo_sample.csv", data_dir=data_dir))
