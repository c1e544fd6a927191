"""Workload `digits-vit`: real handwritten digits and a small vision transformer."""

from __future__ import annotations

from dataclasses import dataclass

from cupel.core.context import Context
from cupel.core.errors import ParamError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Bounds, Budget, Subject
from cupel.data.digits import digits
from cupel.data.splits import first_of
from cupel.nets.vit import ViT

CARD = Card(
    name="digits-vit",
    family="vision",
    source="A. Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv 2010.11929 (network); "
    "E. Alpaydin, C. Kaynak, Cascading Classifiers, Kybernetika 34(4), 1998 (data)",
    tags=("image", "small", "transformer"),
    gives=("weights", "gradients", "members", "classes", "images", "bounded", "blocks", "attention"),
    expects="0.97 test accuracy: k-NN reaches 0.98 on this set (Alpaydin and Kaynak 1998); no figure of a transformer "
    "on 1,077 images is known to us, and one without convolutional priors is expected a point below",
    tiny={"width": 8, "depth": 2, "heads": 2, "examples": 96},
)


@dataclass(frozen=True)
class DigitsVit:
    """Classify 8x8 images of handwritten digits with a small vision transformer.

    Shapes: inputs `[B, 1, 8, 8]` in [0, 1], targets `[B]` in 0..9, logits `[B, 10]`; 1 + (8 / patch)^2 tokens, the
    class token first.

    Raises:
        ParamError: `heads` does not divide `width`, or `patch` does not divide 8.

    Source: Dosovitskiy et al., ICLR 2021, arXiv 2010.11929; Alpaydin and Kaynak 1998, as bundled with scikit-learn.

    Departs: two times the width in the hidden layer of a block, not four; no dropout, no pre-training; positions start
    at a standard deviation of 0.5, not 0.02, which cost about two points of accuracy at this width and length of fit.

    Example:
        >>> subject = DigitsVit(width=16, heads=2, depth=1).build(Context())
        >>> subject.anatomy.attention, subject.model.place.shape[1]
        (('blocks.0.attention',), 17)
    """

    depth: int = param(3, "transformer blocks", ge=1, le=64)
    width: int = param(48, "features of a token", ge=1, le=1024)
    heads: int = param(4, "attention heads; must divide width", ge=1)
    patch: int = param(2, "side of a patch in pixels: 1, 2, 4 or 8", ge=1, le=8)
    examples: int = param(0, "most examples of each split (0: all)", ge=0)
    data_seed: int = param(0, "which split of the 1,797 images", ge=0)

    def build(self, ctx: Context) -> Subject:
        if self.width % self.heads:
            raise ParamError(
                f"heads of digits-vit must divide width {self.width}; got {self.heads}. Give a divisor of width."
            )
        if 8 % self.patch:
            raise ParamError(f"patch of digits-vit must divide 8; got {self.patch}. Give 1, 2, 4 or 8.")
        with ctx.scope("init"):
            net = ViT(1, 8, 10, self.patch, self.width, self.depth, self.heads)
        names = tuple(f"blocks.{i}" for i in range(self.depth))
        return Subject(
            net,
            first_of(digits(self.data_seed), self.examples),
            Classification(10),
            Anatomy(blocks=names, head="head", attention=tuple(f"{name}.attention" for name in names)),
            Budget(epochs=30, batch_size=64, optimizer="adamw", lr=2e-3, weight_decay=0.3, schedule="cosine"),
            Bounds(0.0, 1.0),
        )
