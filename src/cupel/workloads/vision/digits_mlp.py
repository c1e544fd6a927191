"""Workload `digits-mlp`: real handwritten digits and a fully connected network."""

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
from cupel.nets.mlp import Mlp

CARD = Card(
    name="digits-mlp",
    family="vision",
    source="E. Alpaydin, C. Kaynak, Cascading Classifiers, Kybernetika 34(4), 1998 (data: UCI optical digits); "
    "hidden sizes: LeNet-300-100 of Y. LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998",
    tags=("image", "small", "dense"),
    gives=("weights", "gradients", "members", "classes", "images", "bounded", "blocks"),
    expects="0.97 test accuracy: scikit-learn's digit example (SVM, half of these images) reports 0.97; "
    "k-NN reaches 0.98 (UCI documentation of the set)",
    tiny={"hidden": (16, 8), "examples": 96},
)


@dataclass(frozen=True)
class DigitsMlp:
    """Classify 8x8 images of handwritten digits with a fully connected network.

    Each block is relu(W x + b); the head is W x + b.

    Shapes: inputs `[B, 1, 8, 8]` in [0, 1] (flattened inside), targets `[B]` in 0..9, logits `[B, 10]`.

    Raises:
        ParamError: a hidden size below one.

    Source: Alpaydin and Kaynak 1998, as bundled with scikit-learn.

    Example:
        >>> from cupel.core.context import Context
        >>> subject = DigitsMlp().build(Context())
        >>> subject.anatomy.blocks, sum(p.numel() for p in subject.model.parameters())
        (('block1', 'block2'), 50610)
    """

    hidden: tuple[int, ...] = param((300, 100), "sizes of the hidden layers, first to last; none: a linear classifier")
    examples: int = param(0, "most examples of each split (0: all)", ge=0)
    data_seed: int = param(0, "which split of the 1,797 images", ge=0)

    def build(self, ctx: Context) -> Subject:
        if min(self.hidden, default=1) < 1:
            raise ParamError(f"hidden of digits-mlp must be sizes >= 1; got {list(self.hidden)}. Remove the small one.")
        with ctx.scope("init"):
            net = Mlp(features=64, hidden=tuple(self.hidden), classes=10)
        return Subject(
            net,
            first_of(digits(self.data_seed), self.examples),
            Classification(10),
            Anatomy(blocks=net.blocks, head="head"),
            Budget(epochs=30, batch_size=64, optimizer="adam", lr=2e-3, schedule="cosine"),
            Bounds(0.0, 1.0),
        )
