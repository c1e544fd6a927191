"""Technique `y-channel`: a small network before the classifier that cleans the light of an image, not its colour."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.fit import Named, run_fit
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.core.spread import ALONE
from cupel.core.types import Batch, Bounds, Budget, Examples, TrainView, still
from cupel.nets.res_up import ResUpNet
from cupel.ops.attacks import fgsm, pgd
from cupel.ops.luma import light, luma
from cupel.ops.masking import has_gradients
from cupel.ops.threats import Attack, WholeThreat
from cupel.ops.watch import entering

CARD = Card(
    name="y-channel",
    family="robust",
    source="C. Pestana, N. Akhtar, W. Liu, D. Glance, A. Mian, Adversarial Perturbations Prevail in the Y-Channel of "
    "the YCbCr Color Space, 2020, arXiv 2003.00883; as Adversarial Attacks and Defense on Deep Learning Classification "
    "Models using YCbCr Color Images, IJCNN 2021",
    tags=("robustness", "defence", "purification", "evasion", "grey-box", "images", "colour", "post hoc"),
    needs=("gradients", "classes", "images", "bounded"),
    removes=("blocks", "batchnorm", "attention"),
    tiny={"width": 4, "depth": 1, "epochs": 1, "steps": 2, "examples": 48},
    neutral={"epochs": 0},
)


class ImageFilter(nn.Module):
    """Images without what the network takes for noise: in the luma of RGB images, or in all channels.

    Shapes: `[B, C, H, W]` -> `[B, C, H, W]`, C = 3 where luma alone is cleaned.
    """

    def __init__(self, noise: nn.Module, luma_only: bool, bounds: Bounds) -> None:
        super().__init__()
        self.noise, self.luma_only = noise, luma_only
        self.low, self.span = bounds.low, bounds.high - bounds.low

    def forward(self, x: Tensor) -> Tensor:
        seen = (x - self.low) / self.span
        seen = light(seen) if self.luma_only else seen
        # Chroma that stays moves all three channels with luma. The clean part itself is clipped to the range first.
        change = (seen - self.noise(seen)).clamp(0, 1) - seen
        cleaned: Tensor = (x + self.span * change).clamp(self.low, self.low + self.span)
        return cleaned


class Filtered(nn.Module):
    """A classifier that sees what a filter leaves: `net(filter(x))`, differentiable through both."""

    def __init__(self, filter: nn.Module, net: nn.Module) -> None:
        super().__init__()
        self.filter, self.net = filter, net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.filter(x))
        return out


@dataclass(frozen=True)
class YChannel:
    r"""Put a trained ResUpNet before the frozen classifier that takes adversarial noise out of the luma.

    Y = 0.299 R + 0.587 G + 0.114 B, Y^ = clip(Y' - r(Y'), 0, 1), and the classifier gets the image of luma Y^ with the
    chroma that came, which is x + (Y^ - Y') in every channel. Most of an adversarial change lies along Y, so chroma
    may pass. r is trained on pairs of an attacked and a clean image, a third of them not attacked, a third moved by
    FGSM and a third by PGD on the bare classifier, at a quarter, a half or all of `eps`:

        loss = mean |Y^ - Y| / eps + weight * ||phi(x^) - phi(x)||^2 / mean ||phi(x)||^2

    with phi what enters the last linear layer of the classifier. Images of one channel are their own luma.

    Use: when the classifier cannot be trained again and attackers do not know of the filter. It is no defence against
    those who do: the gradient through filter and classifier fools both, as its claim's first number shows. Use
    `adversarial-training` against them. The filter learns slowly on photographs: a few hundred updates leave it near
    the identity there, where they are enough on digits.

    Costs: the filter's own forward at inference and its weights; (`steps` + 1) / 3 + 2 forwards and backwards of the
    classifier an example in training; some clean accuracy.

    Shapes: inputs `[B, 1, H, W]` or `[B, 3, H, W]` floats within the workload's bounds, any H and W; logits `[B, K]`.

    Raises:
        PlanError: no training images, no bounds, other numbers of channels, no input gradients, or outputs that are no
            scores of classes.

    Source: Pestana, Akhtar, Liu, Glance, Mian, arXiv 2003.00883, 2020; IJCNN 2021.

    Departs: we know only the abstract of the network, so blocks, loss and schedule are ours. The encoder is trained
    along from nothing and reads Y once, not three times; its first convolution keeps the full size. Attacks in
    training move away from the predicted class and use all their steps. Where the new luma takes a channel out of the
    range, the image is clipped.

    Example:
        >>> YChannel(eps=0.01).channels
        'luma'
    """

    channels: str = param("luma", "what is cleaned: luma alone, or all channels", choices=("luma", "all"))
    width: int = param(16, "channels of the filter at full size, doubled where sides are halved", ge=1, le=512)
    depth: int = param(2, "how often the filter halves the sides", ge=1, le=6)
    epochs: int = param(10, "passes of its training; 0 leaves the network as it is", ge=0)
    eps: float = param(0.03, "largest distance (linf) of the attacks in training, in input units", gt=0)
    steps: int = param(5, "gradient steps of PGD in training", ge=1)
    weight: float = param(0.1, "of the distance of the classifier's features", ge=0)
    lr: float = param(2e-3, "learning rate of Adam, falling to zero along a cosine", gt=0)
    examples: int = param(0, "training images, drawn (0: all)", ge=0)

    @phase("wrap")
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        if not self.epochs:
            return model
        bounds, data = self._checked(model, ctx)
        count = data.inputs.shape[1]
        luma_only = self.channels == "luma" and count == 3
        with ctx.scope("filter"):
            noise = ResUpNet(1 if luma_only else count, self.width, self.depth)
        made = ImageFilter(noise, luma_only, bounds)
        budget = Budget(epochs=self.epochs, batch_size=64, optimizer="adam", lr=self.lr, schedule="cosine")
        with still(model):
            pairs = Named("pairs", _Pairs(self, model, bounds), ctx.child("pairs"))
            task = Restoration(model, self, bounds)
            # Processes that share the fit around this one each train the same filter, with the same draws.
            run_fit(made, TrainView(data, data), task, budget, [pairs], ctx.child("fit", world=ALONE))
        return Filtered(made, model).eval()

    def _checked(self, model: nn.Module, ctx: Context) -> tuple[Bounds, Examples]:
        """The range, and the images as inputs and targets of the filter."""
        data = ctx.train.train if ctx.train is not None else None
        if ctx.bounds is None or not isinstance(data, Examples) or not len(data):
            raise PlanError(
                "y-channel must have training images and know their range; it has not. Run it in a recipe, with "
                "`apply`, or in fit(..., bounds=Bounds(0.0, 1.0))."
            )
        x = data.inputs
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4 or x.shape[1] not in (1, 3):
            raise PlanError(
                f"inputs for y-channel must be float images [B, 1, H, W] or [B, 3, H, W]; got "
                f"{tuple(getattr(x, 'shape', ()))}. Use it on images."
            )
        if not has_gradients(model, x[:1].to(ctx.device)):
            raise PlanError("y-channel must have input gradients; this network has none. Convert to int8 afterwards.")
        if self.examples and self.examples < len(data):
            data = data.take(torch.randperm(len(data), generator=ctx.rng("examples"))[: self.examples])
        return ctx.bounds, Examples(data.inputs, data.inputs, data.index)


class _Pairs:
    """The technique inside the filter's fit: moves the inputs of a batch, whose targets stay clean."""

    def __init__(self, p: YChannel, net: nn.Module, bounds: Bounds) -> None:
        self.p, self.net, self.bounds = p, net, bounds

    def hook(self, ctx: Context) -> Hook:
        return _Attacked(self.p, self.net, self.bounds, ctx.rng("attack"))


class _Attacked(Hook):
    def __init__(self, p: YChannel, net: nn.Module, bounds: Bounds, draw: torch.Generator) -> None:
        self.p, self.net, self.bounds, self.draw = p, net, bounds, draw

    @phase("attack")
    def batch(self, batch: Batch, at: Moment) -> Batch:
        """A third clean, a third by FGSM, a third by PGD; batches come shuffled."""
        p, third = self.p, len(batch) // 3
        x = batch.inputs.clone()
        with torch.no_grad():
            labels = self.net(x).argmax(1)
        attacks: tuple[Attack, ...] = (fgsm, pgd)
        for k, attack in enumerate(attacks):
            size = p.eps / 2 ** int(torch.randint(3, (), generator=self.draw))
            threat = WholeThreat("linf", size, self.bounds, p.steps)
            part = slice(k * third, (k + 1) * third)
            x[part] = attack(self.net, x[part], labels[part], threat, self.draw)
        return replace(batch, inputs=x)


@dataclass(frozen=True)
class Restoration:
    """Bring an image back: outputs and targets are images `[B, C, H, W]`; `net` is frozen."""

    net: nn.Module
    p: YChannel
    bounds: Bounds

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        seen, clean = (luma(v) if self.p.channels == "luma" else v for v in (out, batch.targets))
        found = (seen - clean).abs().flatten(1).mean(1) / self.p.eps
        if self.p.weight:
            here = features(self.net, out)
            with torch.no_grad():
                there = features(self.net, batch.targets)
            apart = (here - there).square().sum(1) / there.square().sum(1).mean().clamp_min(1e-12)
            found = found + self.p.weight * apart
        return found

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        return self.losses(out, batch).mean()

    def predict(self, out: Tensor) -> Tensor:
        return out

    def scores(self, out: Tensor) -> Tensor:
        return out


def features(net: nn.Module, x: Tensor) -> Tensor:
    """What enters the last linear layer of `net`, or its outputs if it has none: `[B, ...]` -> `[B, D]`."""
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1:]
    seen: list[Tensor] = []
    with entering({str(k): m for k, m in enumerate(last)}, lambda _, entered: seen.append(entered)):
        out: Tensor = net(x)
    return (seen[-1] if seen else out).reshape(len(x), -1)
