"""Workload `ucr-cnn`: a data set of the UCR time series archive and a fully convolutional network."""

from __future__ import annotations

from dataclasses import dataclass

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Budget, Subject
from cupel.data.splits import first_of
from cupel.data.ucr import ucr
from cupel.nets.series import SeriesNet

CARD = Card(
    name="ucr-cnn",
    family="series",
    source="Z. Wang, W. Yan, T. Oates, Time Series Classification from Scratch with Deep Neural Networks: A Strong "
    "Baseline, IJCNN 2017, arXiv 1611.06455 (the network FCN); data: H. A. Dau et al., The UCR Time Series Archive, "
    "IEEE/CAA Journal of Automatica Sinica 6(6), 2019, arXiv 1810.07758",
    tags=("time series", "small"),
    gives=("weights", "gradients", "members", "classes", "series", "batchnorm", "blocks"),
    expects="0.961 test accuracy on ItalyPowerDemand's own split: FCN, mean of 10 runs (Fawaz et al. 2019, "
    "arXiv 1809.04356, table of the UCR archive)",
    tiny={"width": 4, "examples": 96},
)


def epochs_for(count: int, updates: int, batch_size: int) -> int:
    """Epochs that give about `updates` steps on `count` series: small data sets need many short epochs."""
    return max(1, -(-updates // max(1, -(-count // batch_size))))


@dataclass(frozen=True)
class UcrCnn:
    """Classify the series of one UCR data set with a three-block 1-D convolutional network.

    Shapes: inputs `[B, C, T]`, each channel of each series with mean 0 and spread 1; targets `[B]`;
    logits `[B, classes]`.

    Raises:
        MissingData: `ucr/<dataset>.npz` is not on this machine, or has no test part and `resplit` is off.
        ParamError: `resplit` on a data set with a class of fewer than 6 series.

    Source: Wang, Yan, Oates, IJCNN 2017, arXiv 1611.06455.

    Departs: kernels of 7, 5, 3 instead of 8, 5, 3, so that blocks keep the length without lopsided
    padding; `width` filters instead of 128; a fixed number of updates instead of 2,000 epochs; a sixth
    of the training series validates.

    Example:
        >>> UcrCnn(dataset="GunPoint").width
        32
    """

    dataset: str = param("ItalyPowerDemand", "name of the data set, as in the archive")
    resplit: bool = param(False, "pool the archive's two parts and draw 60/40 anew")
    width: int = param(32, "filters of the first and last block; the middle one has twice as many", ge=1, le=512)
    examples: int = param(0, "most examples of each split (0: all)", ge=0)
    data_seed: int = param(0, "which draw of training, validation (and test) series", ge=0)

    def build(self, ctx: Context) -> Subject:
        whole = ucr(self.dataset, self.resplit, self.data_seed)
        classes = 1 + max(int(part.targets.max()) for part in (whole.train, whole.valid, whole.test))
        splits = first_of(whole, self.examples)
        with ctx.scope("init"):
            net = SeriesNet(channels=splits.train.inputs.shape[1], classes=classes, width=self.width)
        epochs = epochs_for(len(splits.train), updates=500, batch_size=16)
        return Subject(
            net,
            splits,
            Classification(classes),
            Anatomy(blocks=("block1", "block2", "block3"), head="head"),
            Budget(epochs=epochs, batch_size=16, optimizer="adam", lr=3e-3, schedule="cosine"),
        )
