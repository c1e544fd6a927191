"""Workload `forged-digits`: tell real handwritten digits from two kinds of forgeries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.context import Context, derive, global_seed, seeded
from cupel.core.fit import fit
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Bounds, Budget, Examples, Splits, Subject
from cupel.data.digits import digits
from cupel.data.splits import first_of
from cupel.nets.convnet import ConvNet
from cupel.ops.latent import LatentNet, Reconstruction

CARD = Card(
    name="forged-digits",
    family="robust",
    source="generated half: P. Ghosh et al., From Variational to Deterministic Autoencoders, ICLR 2020, arXiv "
    "1903.12436 (codes drawn from a density fitted afterwards); upsampled half: A. Odena, V. Dumoulin, C. Olah, "
    "Deconvolution and Checkerboard Artifacts, Distill 2016; real images: E. Alpaydin, C. Kaynak, UCI 1998",
    tags=("image", "small", "forgery", "fake detection"),
    gives=("weights", "gradients", "members", "classes", "images", "bounded", "blocks", "batchnorm", "forgeries"),
    expects="0.95 test accuracy or more: detectors of images from generators they were trained on err on few (0.98 and "
    "above for Xception on uncompressed FaceForensics++, arXiv 1901.08971)",
    tiny={"width": 4, "examples": 64, "epochs": 2},
)
LATENT, LEVELS = 8, 16  # entries of the forger's code; grey steps of the real images


@lru_cache(maxsize=8)
def forger(data_seed: int, epochs: int) -> tuple[LatentNet, Tensor, Tensor]:
    """An autoencoder of the real training images, and for each digit the mean and the root of its codes' covariance."""
    real = digits(data_seed).train
    x = real.inputs.flatten(1)[:, None]  # [N, 1, 64]
    with global_seed(derive(data_seed, "forger")):
        net = LatentNet(64, 128, LATENT, dropout=0.0)
    data = Examples(x, torch.zeros(len(x), 1, dtype=torch.long), real.index)
    budget = Budget(epochs=epochs, batch_size=64, optimizer="adam", lr=2e-3, schedule="cosine")
    fit(net, data, Reconstruction(LATENT), budget=budget, seed=derive(data_seed, "forger fit"))
    with torch.no_grad():
        codes = net.encode(x)[:, 0]
    own = [codes[real.targets == k] for k in range(10)]
    roots = [torch.linalg.cholesky(c.T.cov() + 1e-4 * torch.eye(LATENT)) for c in own]
    return net, torch.stack([c.mean(0) for c in own]), torch.stack(roots)


def generated(net: LatentNet, means: Tensor, roots: Tensor, digit: Tensor, draw: torch.Generator) -> Tensor:
    """Images decoded from codes N(mean, covariance) of each digit: `[N]` -> `[N, 1, 8, 8]`."""
    noise = torch.randn(len(digit), LATENT, generator=draw)
    z = means[digit] + torch.einsum("nij,nj->ni", roots[digit], noise)
    with torch.no_grad():
        return net.decode(z[:, None]).view(-1, 1, 8, 8)


def upsampled(x: Tensor) -> Tensor:
    """Half the resolution and back by repeating pixels."""
    return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="nearest")


def with_forgeries(real: Examples, data_seed: int, epochs: int, part: str, first: int) -> Examples:
    """Real images (class 0) and as many forgeries (class 1), half of each kind, shuffled.

    Forgeries are rounded to the grey steps of the real images: otherwise any value between two steps would betray them.
    """
    draw = seeded(data_seed, "forgeries", part)
    order = torch.randperm(len(real), generator=draw)
    made, copied = order[: len(real) // 2], order[len(real) // 2 :]
    fakes = torch.cat([generated(*forger(data_seed, epochs), real.targets[made], draw), upsampled(real.inputs[copied])])
    inputs = torch.cat([real.inputs, (fakes * LEVELS).round() / LEVELS])
    targets = torch.cat([torch.zeros(len(real)), torch.ones(len(fakes))]).long()
    index = torch.cat([real.index, first + torch.arange(len(fakes))])
    return Examples(inputs, targets, index).take(torch.randperm(len(inputs), generator=draw))


@dataclass(frozen=True)
class ForgedDigits:
    """Detect forged images of handwritten digits with a three-block convolutional network.

    Class 0 are real images, class 1 forgeries of two kinds in equal numbers: samples of a generator that was
    trained on the real training images (an autoencoder whose codes are drawn from one Gaussian a digit), and
    images of half the resolution blown up by repeating pixels. Training, validation and test forgeries are made
    apart: no upsampled image has its original in another split.

    Shapes: inputs `[B, 1, 8, 8]` in [0, 1], targets `[B]` in 0..1, logits `[B, 2]`.

    Source: Ghosh et al. 2020 for the generator; Odena et al. 2016 for the artefact; Alpaydin and Kaynak 1998
    for the real images.

    Departs: a plain autoencoder and its codes' Gaussians in place of an image-sized generator, so that building
    takes seconds; the real images are those of `digits-cnn`.

    Example:
        >>> subject = ForgedDigits(width=4, examples=20, epochs=1).build(Context())
        >>> subject.data.train.targets.bincount().tolist()
        [20, 20]
    """

    width: int = param(16, "channels of the first block", ge=1, le=512)
    examples: int = param(0, "most real images of each split (0: all)", ge=0)
    epochs: int = param(40, "passes in which the generator is trained", ge=1)
    data_seed: int = param(0, "which split of the 1,797 images, and which forgeries", ge=0)

    def build(self, ctx: Context) -> Subject:
        with ctx.scope("init"):
            net = ConvNet(channels=1, classes=2, width=self.width)
        real, first, parts = first_of(digits(self.data_seed), self.examples), 1797, []
        for part in ("train", "valid", "test"):
            own = getattr(real, part)
            parts.append(with_forgeries(own, self.data_seed, self.epochs, part, first))
            first += len(own)
        return Subject(
            net,
            Splits(*parts),
            Classification(2),
            Anatomy(blocks=("block1", "block2", "block3"), head="head"),
            Budget(epochs=20, batch_size=64, optimizer="adam", lr=3e-3, schedule="cosine"),
            Bounds(0.0, 1.0),
        )
