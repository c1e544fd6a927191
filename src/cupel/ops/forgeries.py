"""A detector of forgeries, those that it catches, and their codes in a generator: what attacks on it start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.types import Bounds, still
from cupel.ops.latent import LatentNet, Layered
from cupel.ops.latent_walks import inverted

REAL, FAKE = 0, 1
PARTS = ("coarse", "middle", "fine")


@dataclass(frozen=True)
class Attacked:
    """Images that were moved `[N, C, H, W]`, and what the detector says to them: `[N]` bool, real or not."""

    images: Tensor
    real: Tensor


@dataclass(frozen=True)
class Scene:
    """A detector, its forgeries that it catches, their codes and reconstructions, and the way from codes to images."""

    model: nn.Module
    count: int  # forgeries in all
    fakes: Tensor  # those that the detector catches
    codes: Tensor  # [N, 1, latent]
    inverted: Tensor
    make: Callable[[Tensor], Tensor]
    net: LatentNet
    real: Tensor  # real test images
    bounds: Bounds

    def says_real(self, images: Tensor, judge: nn.Module | None = None) -> Tensor:
        """After rounding to 8 bits, as an image file would."""
        low, span = self.bounds.low, self.bounds.high - self.bounds.low
        seen: Tensor = low + ((images - low) / span * 255).round().clamp(0, 255) / 255 * span
        judge = judge or self.model
        with still(judge), torch.no_grad():
            real: Tensor = judge(seen).argmax(1) == REAL
        return real

    def free(self, kind: str) -> Tensor:
        """Which entries of a code the attack `kind` may move, `[latent]`: all for `latent`."""
        parts = self.net.decoder.parts if isinstance(self.net.decoder, Layered) else ()
        free = torch.zeros(self.codes.shape[-1], device=self.codes.device)
        free[dict(zip(PARTS, parts, strict=False)).get(kind, slice(None))] = 1
        return free


def flat(images: Tensor, bounds: Bounds) -> Tensor:
    """As an autoencoder takes them: `[N, ...]` -> `[N, 1, D]` in [0, 1]."""
    found: Tensor = ((images.flatten(1) - bounds.low) / (bounds.high - bounds.low))[:, None]
    return found


def scene_of(model: nn.Module, net: LatentNet, bounds: Bounds, fakes: Tensor, real: Tensor) -> Scene:
    """Invert those of the forgeries that the detector catches."""

    def make(code: Tensor) -> Tensor:
        return net.decode(code).view(-1, *fakes.shape[1:]) * (bounds.high - bounds.low) + bounds.low

    with still(model), torch.no_grad():
        caught = model(fakes).argmax(1) == FAKE
        codes = inverted(net.encode(flat(fakes[caught], bounds)), fakes[caught], make)
        return Scene(model, len(fakes), fakes[caught], codes, make(codes), make, net, real, bounds)


def transferred(scene: Scene, attack: Attacked, witnesses: list[nn.Module]) -> Tensor:
    """Whether each witness calls real what won against the detector: only forgeries that it knew before, inverted too.

    Shapes: all votes of all witnesses, `[V]` bool.
    """
    won, votes = attack.real & ~scene.says_real(scene.inverted), []
    for judge in witnesses:
        blind = scene.says_real(scene.fakes, judge) | scene.says_real(scene.inverted, judge)
        votes.append(scene.says_real(attack.images, judge)[won & ~blind])
    return torch.cat(votes)
