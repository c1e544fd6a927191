"""Workload `squeezenet`: small images and a network of fire modules."""

from __future__ import annotations

from dataclasses import dataclass

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Bounds, Budget, Splits, Subject
from cupel.data.cifar import cifar10
from cupel.data.digits import digits
from cupel.data.idx import idx_images
from cupel.data.splits import first_of
from cupel.nets.squeezenet import SqueezeNet, fires

CARD = Card(
    name="squeezenet",
    family="compress",
    source="F. N. Iandola, S. Han, M. W. Moskewicz, K. Ashraf, W. J. Dally, K. Keutzer, SqueezeNet: AlexNet-level "
    "accuracy with 50x fewer parameters and <0.5MB model size, 2016, arXiv 1602.07360, sections 3 and 5",
    tags=("image", "small", "concatenation", "fully convolutional", "without norms"),
    gives=("weights", "gradients", "members", "classes", "images", "bounded", "blocks"),
    expects="no published figure is known to us for networks of this size on these images; on ImageNet the paper has "
    "0.575 with 1,248,424 parameters (AlexNet: 0.572 with 50 times as many)",
    tiny={"base_e": 8, "incr_e": 8, "stem": 8, "examples": 96},
)
POOLS = {"digits": (4,), "fashion-mnist": (3, 5), "cifar10": (3, 5)}
EPOCHS = {"digits": 30, "fashion-mnist": 6, "cifar10": 12}


@dataclass(frozen=True)
class Squeezenet:
    r"""Classify small images with a SqueezeNet: fire modules, late pooling, no fully connected layer.

    Fire i of eight, i from 0, squeezes to SR e_i channels with 1x1 filters and expands to
    e_i = base_e + incr_e floor(i / freq), of which a share pct3x3 comes from 3x3 filters and the rest from 1x1 ones,
    side by side. A 3x3 convolution stands before, a 1x1 convolution to the classes and its mean behind.
    `nets.squeezenet` also has the two networks for large images.

    Use: as a network that is small before anything is done to it, and whose concatenations test what prunes channels.
    Not where accuracy alone counts: it has no norms, so it needs more epochs than a network with them.

    Costs: 47,146 parameters by default; a fit on `digits` takes some 25 seconds on one core, on `cifar10` three
    minutes.

    Shapes: inputs `[B, C, S, S]` in [0, 1] (digits 1x8x8, fashion-mnist 1x28x28, cifar10 3x32x32), targets `[B]` in
    0..9, logits `[B, 10]`.

    Raises:
        MissingData: the images of `data` are not on this machine.

    Source: Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer 2016, arXiv 1602.07360.

    Departs: widths a quarter of the paper's and a 3x3 convolution of stride 1 first, for images of 8 to 32 pixels; two
    poolings behind fires 3 and 5, one behind fire 4 for 8 pixels; the scores of the classes pass no ReLU, which in a
    short fit leaves classes that never win; less dropout; Adam with a cosine decay, as the paper's SGD at 0.04 does not
    leave the start here; a fifth of the photographs and a sixth of the clothes.

    Example:
        >>> Squeezenet(bypass="simple").base_e
        32
    """

    data: str = param("digits", "images", choices=("digits", "fashion-mnist", "cifar10"))
    base_e: int = param(32, "expand filters of the first fire (the paper: 128)", ge=2, le=512)
    incr_e: int = param(32, "how many more after every `freq` fires (the paper: 128)", ge=0, le=512)
    freq: int = param(2, "fires of one width", ge=1, le=8)
    squeeze_ratio: float = param(0.125, "squeeze filters for an expand filter", gt=0, le=1)
    pct3x3: float = param(0.5, "share of the expand filters that are 3x3", ge=0, le=1)
    bypass: str = param(
        "none", "what is added around fires: the input where it fits, or else a 1x1 convolution of it",
        choices=("none", "simple", "complex"),
    )  # fmt: skip
    stem: int = param(24, "filters of the first convolution (the paper: 96)", ge=1, le=256)
    dropout: float = param(0.1, "share of the last features dropped in training (the paper: 0.5)", ge=0, lt=1)
    examples: int = param(0, "most examples of each split (0: all)", ge=0)
    data_seed: int = param(0, "which training and validation images", ge=0)

    def build(self, ctx: Context) -> Subject:
        splits = first_of(self.images(), self.examples)
        shapes = fires(8, self.base_e, self.incr_e, self.freq, self.squeeze_ratio, self.pct3x3)
        with ctx.scope("init"):
            channels = splits.train.inputs.shape[1]
            net = SqueezeNet(
                channels, 10, (self.stem, 3, 1), shapes, POOLS[self.data], self.bypass, self.dropout, rectified=False
            )
        lr = 2e-3 * 32 / max(32, self.base_e)  # wider fires without norms die at a rate that suits narrow ones
        return Subject(
            net,
            splits,
            Classification(10),
            Anatomy(blocks=net.blocks, head="head"),
            Budget(epochs=EPOCHS[self.data], batch_size=32, optimizer="adam", lr=lr, schedule="cosine"),
            Bounds(0.0, 1.0),
        )

    def images(self) -> Splits:
        if self.data == "digits":
            return digits(self.data_seed)
        if self.data == "cifar10":
            return cifar10(0, 1000, self.data_seed)
        return idx_images("fashion-mnist", 10000, 2000, self.data_seed)
