"""Light and colour of RGB images: the full-range BT.601 axes, and attacks that may move only one of the two.

Images are `[N, 3, ...]` (red, green, blue) in [0, 1]; with one channel, the image is its own luma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cupel.ops.threats import Attack, Model, Tally, Threat

RED, GREEN, BLUE = 0.299, 0.587, 0.114  # what each adds to the light that is seen; together 1
SPANS = ("luma", "chroma")


def luma(x: Tensor) -> Tensor:
    """Y = 0.299 R + 0.587 G + 0.114 B: `[N, 3, ...]` or `[N, 1, ...]` -> `[N, 1, ...]`.

    >>> luma(torch.ones(1, 3, 1, 1)).item()
    1.0
    """
    return x if x.shape[1] == 1 else light(x)


def light(x: Tensor) -> Tensor:
    """Y of RGB images, without a look at their shape, so that networks with it can be traced."""
    return RED * x[:, 0:1] + GREEN * x[:, 1:2] + BLUE * x[:, 2:3]


def to_ycbcr(x: Tensor) -> Tensor:
    """Y, Cb = (B - Y) / 1.772 + 1/2 and Cr = (R - Y) / 1.402 + 1/2, `[N, 3, ...]`, each in [0, 1].

    Source: ITU-R BT.601 with the full range, as in JPEG files (ITU-T T.871).
    """
    y = luma(x)
    return torch.cat([y, (x[:, 2:3] - y) / (2 - 2 * BLUE) + 0.5, (x[:, 0:1] - y) / (2 - 2 * RED) + 0.5], dim=1)


def from_ycbcr(x: Tensor) -> Tensor:
    """The way back: R = Y + 1.402 (Cr - 1/2), B = Y + 1.772 (Cb - 1/2), and G from Y."""
    y = x[:, 0:1]
    blue, red = y + (2 - 2 * BLUE) * (x[:, 1:2] - 0.5), y + (2 - 2 * RED) * (x[:, 2:3] - 0.5)
    return torch.cat([red, (y - RED * red - BLUE * blue) / GREEN, blue], dim=1)


def with_luma(x: Tensor, y: Tensor) -> Tensor:
    """`x` with luma `y` `[N, 1, ...]` and its own chroma: all channels move by y - Y(x), so y = Y(x) changes no bit."""
    return x + (y - luma(x))


def energies(delta: Tensor) -> Tensor:
    """Squared lengths of a change of RGB images along Y, Cb and Cr: `[N, 3, ...]` -> `[N, 3]`, in double precision."""
    axes = to_ycbcr(delta.double()) - to_ycbcr(torch.zeros_like(delta[:1]).double())
    return axes.square().flatten(2).sum(2)


def luma_share(delta: Tensor) -> float:
    """e_Y / (e_Y + e_Cb + e_Cr), summed over all images; 0 where nothing moved.

    >>> round(luma_share(torch.ones(2, 3, 4, 4)), 6)
    1.0
    """
    along = energies(delta).sum(0)
    return float(along[0] / along.sum().clamp_min(1e-300))


def confined(delta: Tensor, span: str) -> Tensor:
    """A change `[N, 3, ...]` brought where only luma, or only chroma, moves; idempotent and linear.

    luma: the mean of the channels in all three. chroma: red and blue are kept, and green undoes their luma,
    G = -(0.299 R + 0.114 B) / 0.587. Its transpose carries gradients: a signed step along it is the steepest
    one in an L-infinity ball, since |G| <= 0.704 never binds.

    >>> luma(confined(torch.rand(1, 3, 2, 2), "chroma")).abs().max() < 1e-6
    tensor(True)
    """
    if span == "luma":
        return delta.mean(1, keepdim=True).expand_as(delta)
    red, blue = delta[:, 0:1], delta[:, 2:3]
    return torch.cat([red, -(RED * red + BLUE * blue) / GREEN, blue], dim=1)


@dataclass(frozen=True)
class SpanThreat(Threat):
    """A threat of norm `linf` that may move luma alone (chroma stays as it is), or chroma alone.

    Args:
        whole: the threat that it is a part of, which says when its goal is met.
    """

    span: str = "luma"
    whole: Threat = Threat()

    def reached(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.whole.reached(logits, y)

    def admit(self, x: Tensor, centre: Tensor) -> Tensor:
        """`x` in the ball, the box and the span; where the box binds, a pixel's whole change is shortened."""
        delta = confined(confined(x - centre, self.span).clamp(-self.eps, self.eps), self.span)
        room = torch.where(delta > 0, self.bounds.high - centre, centre - self.bounds.low)
        share = (room / delta.abs().clamp_min(1e-12)).amin(1, keepdim=True).clamp_max(1.0)
        return (centre + share * delta).clamp(self.bounds.low, self.bounds.high)


def within(attack: Attack, span: str) -> Attack:
    """`attack` in a threat that may move only `span` of an RGB image: the same runner, the same steps.

    For `luma`, one FGSM step is x + eps sign(sum over channels of dL/dx), equal in all channels.

    Raises:
        ValueError: a span that is no such, another norm than `linf`, or inputs that are no RGB images.
    """
    if span not in SPANS:
        raise ValueError(f"a span must be one of {', '.join(SPANS)}; got {span!r}. Use one of them.")

    def run(
        model: Model, x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator, *, tally: Tally | None = None
    ) -> Tensor:
        if threat.norm != "linf" or x.ndim < 3 or x.shape[1] != 3:
            raise ValueError(
                f"an attack on {span} alone must get RGB images [N, 3, ...] and norm linf; got {threat.norm} and "
                f"{list(x.shape)}. Use the attack itself, or colour images."
            )

        def seen(here: Tensor) -> Tensor:
            free = confined(here, span)
            return model(here.detach() + (free - free.detach()))  # the gradient alone is confined

        told = {f.name: getattr(threat, f.name) for f in fields(Threat)}
        return attack(seen, x, y, SpanThreat(**told, span=span, whole=threat), draw, tally=tally)

    return run


def null_share(weights: Sequence[float] = (RED, GREEN, BLUE)) -> float:
    """The luma share of independent random signs in R, G and B, about 0.35: each axis gets its row's squared length.

    >>> round(null_share(), 2)
    0.35
    """
    r, g, b = weights
    y = r * r + g * g + b * b
    cb = (r * r + g * g + (1 - b) ** 2) / (2 - 2 * b) ** 2
    cr = ((1 - r) ** 2 + g * g + b * b) / (2 - 2 * r) ** 2
    return y / (y + cb + cr)
