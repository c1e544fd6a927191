"""Workload `digits-cnn`: real handwritten digits and a small convolutional network."""

from __future__ import annotations

from dataclasses import dataclass

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Bounds, Budget, Subject
from cupel.data.digits import digits
from cupel.data.splits import first_of
from cupel.nets.convnet import ConvNet

CARD = Card(
    name="digits-cnn",
    family="vision",
    source="E. Alpaydin, C. Kaynak, Cascading Classifiers, Kybernetika 34(4), 1998 (data: UCI optical digits)",
    tags=("image", "small"),
    gives=("weights", "gradients", "members", "classes", "images", "bounded", "blocks", "batchnorm"),
    expects="0.98 test accuracy: k-NN reaches 0.98 on this set (Alpaydin and Kaynak 1998); small CNNs 0.98 to 0.99",
    tiny={"width": 4, "examples": 96},
)


@dataclass(frozen=True)
class DigitsCnn:
    """Classify 8x8 images of handwritten digits with a three-block convolutional network.

    Shapes: inputs `[B, 1, 8, 8]` in [0, 1], targets `[B]` in 0..9, logits `[B, 10]`.

    Source: Alpaydin and Kaynak 1998, as bundled with scikit-learn.

    Example:
        >>> from cupel.core.context import Context
        >>> subject = DigitsCnn(width=4).build(Context())
        >>> len(subject.data.train), tuple(subject.data.train.inputs.shape[1:])
        (1077, (1, 8, 8))
    """

    width: int = param(16, "channels of the first block", ge=1, le=512)
    examples: int = param(0, "most examples of each split (0: all)", ge=0)
    data_seed: int = param(0, "which split of the 1,797 images", ge=0)

    def build(self, ctx: Context) -> Subject:
        with ctx.scope("init"):
            net = ConvNet(channels=1, classes=10, width=self.width)
        return Subject(
            net,
            first_of(digits(self.data_seed), self.examples),
            Classification(10),
            Anatomy(blocks=("block1", "block2", "block3"), head="head"),
            Budget(epochs=12, batch_size=64, optimizer="adam", lr=3e-3, schedule="cosine"),
            Bounds(0.0, 1.0),
        )
