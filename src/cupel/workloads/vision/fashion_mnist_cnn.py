"""Workload `fashion-mnist-cnn`: pictures of clothes and a small convolutional network."""

from __future__ import annotations

from dataclasses import dataclass

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Bounds, Budget, Subject
from cupel.data.idx import idx_images
from cupel.data.splits import first_of
from cupel.nets.poolnet import PoolNet

CARD = Card(
    name="fashion-mnist-cnn",
    family="vision",
    source="H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
    "Algorithms, 2017, arXiv 1708.07747",
    tags=("image", "medium"),
    gives=("weights", "gradients", "members", "classes", "images", "bounded", "blocks", "batchnorm"),
    expects="0.89 test accuracy on 10,000 training images; on all 60,000 two- and three-layer CNNs reach 0.91 to 0.93 "
    "(benchmark list of Xiao et al. 2017)",
    tiny={"width": 4, "train_examples": 96, "examples": 64},
)


@dataclass(frozen=True)
class FashionMnistCnn:
    """Classify 28x28 pictures of ten kinds of clothing with a three-block convolutional network.

    Shapes: inputs `[B, 1, 28, 28]` in [0, 1], targets `[B]` in 0..9, logits `[B, 10]`.

    Raises:
        MissingData: the four IDX files are not in `fashion-mnist/` of the data folder.

    Source: Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747.

    Departs: 10,000 of the 60,000 training images by default, because a fit on one core then takes under a minute;
    `train_examples=0` takes all but the 2,000 that validate.

    Example:
        >>> FashionMnistCnn().train_examples
        10000
    """

    width: int = param(16, "channels of the first block", ge=1, le=512)
    train_examples: int = param(10000, "training images, stratified (0: 58,000, all that validation leaves)", ge=0)
    examples: int = param(0, "most examples of each split (0: all)", ge=0)
    data_seed: int = param(0, "which training and validation images", ge=0)

    def build(self, ctx: Context) -> Subject:
        with ctx.scope("init"):
            net = PoolNet(channels=1, side=28, classes=10, width=self.width)
        return Subject(
            net,
            first_of(idx_images("fashion-mnist", self.train_examples, 2000, self.data_seed), self.examples),
            Classification(10),
            Anatomy(blocks=("block1", "block2", "block3"), head="head"),
            Budget(epochs=5, batch_size=64, optimizer="adam", lr=3e-3, schedule="cosine"),
            Bounds(0.0, 1.0),
        )
