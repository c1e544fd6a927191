"""Adversarially regularised autoencoders: codes with a known distribution, and a decoder whose gradients reach them.

Three networks: an encoder E, a decoder G and a discriminator D that sees a code beside its class. Every batch
takes three steps of Adam: E and G lower the reconstruction error; D learns to tell codes drawn from the prior
N(centre of the class, I) from codes E(x); E learns to pass for the prior. `core.fit` runs the loop: the first step
is its own, the other two belong to the hook of `Rivalry`. Without `Rivalry` the same fit trains a plain autoencoder.

G autoencoders of one shape can be trained side by side, as if each were alone: their weights lie in one tensor.

Source: Makhzani, Shlens, Jaitly, Goodfellow, Frey, Adversarial Autoencoders, 2015, arXiv 1511.05644, sections 2
and 2.3 (the class beside the code).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.protocols import Hook, Moment
from cupel.core.slots import phase
from cupel.core.types import Batch


class Stack(nn.Module):
    """`groups` linear layers side by side: `[G, B, fan_in]` -> `[G, B, fan_out]`."""

    def __init__(self, groups: int, fan_in: int, fan_out: int) -> None:
        super().__init__()
        limit = (6 / (fan_in + fan_out)) ** 0.5  # Glorot and Bengio 2010
        self.weight = nn.Parameter(torch.empty(groups, fan_in, fan_out).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.zeros(groups, 1, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.baddbmm(self.bias, x, self.weight)
        return found


def stacked(groups: int, sizes: tuple[int, ...], dropout: float = 0.0) -> nn.Sequential:
    """`groups` perceptrons of these layer sizes, ReLU and dropout between the layers."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.ReLU(), nn.Dropout(dropout)] if layers else []
        layers.append(Stack(groups, fan_in, fan_out))
    return nn.Sequential(*layers)


class Layered(nn.Module):
    """Perceptrons whose code enters in parts of about equal size, one at every layer: coarse, middle, fine.

    Shapes: `[G, B, latent]` -> `[G, B, features]`; `parts` are the slices of the code.
    """

    def __init__(self, groups: int, sizes: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        latent, layers = sizes[0], len(sizes) - 1
        edges = [round(latent * k / layers) for k in range(layers + 1)]
        self.parts = tuple(slice(low, high) for low, high in pairwise(edges))
        fans = [0, *sizes[1:-1]]
        widths = [part.stop - part.start for part in self.parts]
        pairs = zip(fans, widths, sizes[1:], strict=True)
        self.layers = nn.ModuleList(Stack(groups, fan + width, out) for fan, width, out in pairs)
        self.between = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))

    def forward(self, z: Tensor) -> Tensor:
        h: Tensor = self.layers[0](z[..., self.parts[0]])
        for layer, part in zip(self.layers[1:], self.parts[1:], strict=True):
            h = layer(torch.cat([self.between(h), z[..., part]], dim=-1))
        return h


class LatentNet(nn.Module):
    """Encoder, decoder and discriminator of `groups` autoencoders for flat inputs in [0, 1].

    Shapes: `[B, G, D]` -> codes and reconstructions beside each other, `[B, G, latent + D]`.

    Args:
        features: D.
        hidden: width of the hidden layers.
        latent: entries of a code.
        classes: what the discriminator is told beside the code; 1 tells it nothing.
        groups: G, how many autoencoders.
        dropout: in encoder and decoder.
        layered: whether the code enters the decoder at all its layers (`Layered`) or at the first alone.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        latent: int,
        classes: int = 1,
        groups: int = 1,
        dropout: float = 0.1,
        layered: bool = False,
    ) -> None:
        super().__init__()
        self.latent, self.classes, self.groups = latent, classes, groups
        self.encoder = stacked(groups, (features, hidden, hidden, latent), dropout)
        decoder = Layered if layered else stacked
        self.decoder = decoder(groups, (latent, hidden, hidden, features), dropout)
        self.discriminator = stacked(groups, (latent + classes, hidden, hidden, 1))

    def encode(self, x: Tensor) -> Tensor:  # [B, G, D] -> [B, G, latent]
        code: Tensor = self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return code

    def decode(self, z: Tensor) -> Tensor:  # [B, G, latent] -> [B, G, D]
        made: Tensor = self.decoder(z.transpose(0, 1)).transpose(0, 1).sigmoid()
        return made

    def judge(self, z: Tensor, y: Tensor) -> Tensor:
        """Logits of "drawn from the prior" for codes `[B, G, latent]` with classes `[B, G]`: `[B, G]`."""
        told = torch.cat([z, F.one_hot(y, self.classes).to(z)], dim=-1)
        logit: Tensor = self.discriminator(told.transpose(0, 1))
        return logit.transpose(0, 1).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        return torch.cat([z, self.decode(z)], dim=-1)


@dataclass(frozen=True)
class Reconstruction:
    """The task of an autoencoder: mean squared error of `out[..., latent:]` against the inputs, added over groups."""

    latent: int

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        error: Tensor = (out[..., self.latent :] - batch.inputs).square().mean(-1)  # [B] or [B, G]
        return error.flatten(1).sum(1) if error.ndim > 1 else error

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        return self.losses(out, batch).mean()

    def predict(self, out: Tensor) -> Tensor:
        return out[..., self.latent :]

    def scores(self, out: Tensor) -> Tensor:
        return out[..., self.latent :]


@dataclass(frozen=True)
class Rivalry:
    """Steps two and three of every batch, for a fit of a `LatentNet` (or any network with its four functions).

    Args:
        centres: of the prior's Gaussians, `[classes, latent]`.
        lr: of both steps.
    """

    centres: Tensor
    lr: float = 1e-3

    def hook(self, ctx: Context) -> Hook:
        return _Rivals(self, ctx.rng("prior"))


class _Rivals(Hook):
    def __init__(self, p: Rivalry, draw: torch.Generator) -> None:
        self.p, self.draw = p, draw

    def start(self, at: Moment) -> None:
        net = at.model
        self.telling = torch.optim.Adam(net.discriminator.parameters(), self.p.lr, fused=True)  # type: ignore[union-attr]
        self.passing = torch.optim.Adam(net.encoder.parameters(), self.p.lr, fused=True)  # type: ignore[union-attr]

    @phase("project")
    def stepped(self, at: Moment) -> None:
        batch, net = at.batch, at.model
        latent = self.p.centres.shape[1]
        with torch.enable_grad():
            code = at.output_of(batch)[..., :latent]
            real = prior(self.p.centres, batch.targets, self.draw)
            told, seen = net.judge(real, batch.targets), net.judge(code.detach(), batch.targets)  # type: ignore[operator]
            _step(self.telling, _verdict(told, True) + _verdict(seen, False))
            _step(self.passing, _verdict(net.judge(code, batch.targets), True))  # type: ignore[operator]


def _verdict(logits: Tensor, real: bool) -> Tensor:
    """Binary cross-entropy, the mean over the batch added over groups: `[B, G]` -> scalar."""
    return F.softplus(-logits if real else logits).flatten(1).mean(0).sum()


def _step(rule: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step on the parameters of `rule` alone; no gradient is left behind anywhere."""
    params = [p for group in rule.param_groups for p in group["params"]]
    for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
        p.grad = grad
    rule.step()
    rule.zero_grad(set_to_none=True)


def prior(centres: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
    """Codes from N(centre of the class, I): classes `[...]` -> `[..., latent]`."""
    at = centres.to(y.device)[y]
    return at + torch.randn(at.shape, generator=draw).to(at)


@torch.no_grad()
def told_apart(net: LatentNet, code: Tensor, y: Tensor, centres: Tensor, draw: torch.Generator) -> Tensor:
    """Share of codes `[N, G, latent]` and of draws from the prior that D names rightly, `[G]`: 1/2 is guessing."""
    real = net.judge(prior(centres, y, draw), y) > 0
    seen = net.judge(code, y) <= 0
    return (real.double().mean(0) + seen.double().mean(0)) / 2


def labels_of(net: LatentNet, z: Tensor) -> Tensor:
    """softmax over classes k of D(z, k), the share of each at a code: `[..., G, latent]` -> `[..., G, classes]`."""
    flat = z.reshape(-1, *z.shape[-2:])
    asked = [net.judge(flat, torch.full(flat.shape[:2], k, device=z.device)) for k in range(net.classes)]
    return torch.stack(asked, dim=-1).softmax(-1).view(*z.shape[:-1], net.classes)


def slopes(decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """|| grad_z sum of G(z)^2 ||, large where the picture changes fast: `[N, ..., latent]` -> `[N, ...]`."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(decode(leaf).square().sum(), leaf)
    found: Tensor = grad.norm(dim=-1)
    return found
