"""Workload `cifar10-resnet20`: small photographs of ten kinds and the residual network made for them."""

from __future__ import annotations

from dataclasses import dataclass

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Bounds, Budget, Subject
from cupel.data.cifar import cifar10
from cupel.data.splits import first_of
from cupel.nets.resnet import ResNet

CARD = Card(
    name="cifar10-resnet20",
    family="vision",
    source="K. He, X. Zhang, S. Ren, J. Sun, Deep Residual Learning for Image Recognition, CVPR 2016, arXiv "
    "1512.03385, section 4.2; data: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009 (data)",
    tags=("image", "medium", "residual"),
    gives=("weights", "gradients", "members", "classes", "images", "bounded", "blocks", "batchnorm"),
    expects="no published figure is known to us for these 10,000 JPEG-decoded images without augmentation; the paper's "
    "0.9125 (He et al. 2016, table 6) is for 45,000 images, crops, flips and 64,000 updates",
    tiny={"width": 2, "train_examples": 96, "examples": 64},
)


@dataclass(frozen=True)
class Cifar10Resnet20:
    """Classify 32x32 photographs of ten kinds of things with ResNet-20.

    Shapes: inputs `[B, 3, 32, 32]` in [0, 1], targets `[B]` in 0..9, logits `[B, 10]`.

    Raises:
        MissingData: the two files of the subset are not in `cifar10/` of the data folder.

    Source: He, Zhang, Ren, Sun, CVPR 2016, arXiv 1512.03385, section 4.2; data: Krizhevsky 2009.

    Departs: a fifth of the training images and no augmentation; SGD as in the paper, but 10 epochs of a cosine decay,
    which take some ten minutes on one core. `width=8` is four times cheaper.

    Example:
        >>> Cifar10Resnet20().width
        16
    """

    width: int = param(16, "channels of the first stage (the paper: 16)", ge=1, le=256)
    train_examples: int = param(0, "training images, stratified (0: 9,000, all that validation leaves)", ge=0)
    examples: int = param(0, "most examples of each split (0: all)", ge=0)
    data_seed: int = param(0, "which training and validation images", ge=0)

    def build(self, ctx: Context) -> Subject:
        with ctx.scope("init"):
            net = ResNet(channels=3, classes=10, width=self.width, n=3)
        return Subject(
            net,
            first_of(cifar10(self.train_examples, 1000, self.data_seed), self.examples),
            Classification(10),
            Anatomy(blocks=tuple(f"stage{s}.{i}" for s in (1, 2, 3) for i in range(3)), head="head"),
            Budget(epochs=10, batch_size=64, optimizer="sgd", lr=0.1, weight_decay=1e-4, schedule="cosine"),
            Bounds(0.0, 1.0),
        )
