"""Probe `corruption`: how much accuracy is left under noise, blur, shift and weak contrast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, mean_of, share
from cupel.core.types import Bounds, Examples, Subject, outputs_on
from cupel.ops.corruptions import contrasted, gaussian_blur, shifted, with_noise
from cupel.ops.labelled import evenly, judged_classes

CARD = Card(
    name="corruption",
    family="robust",
    source="D. Hendrycks, T. Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and "
    "Perturbations, ICLR 2019, arXiv 1903.12261",
    tags=("robustness", "corruption", "noise", "blur", "shift", "contrast"),
    needs=("classes",),
    readings=(
        "corruption_accuracy",
        "corruption_worst",
        "noise_accuracy",
        "blur_accuracy",
        "shift_accuracy",
        "contrast_accuracy",
    ),
    ordered={"corruption_accuracy": "trained"},
)

Damage = Callable[[Tensor, float], Tensor]

IMAGE_STRENGTHS = {
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation, share of the input range
    "blur": (0.03, 0.05, 0.07, 0.09, 0.12),  # standard deviation, share of the shorter side
    "shift": (0.03, 0.06, 0.10, 0.15, 0.20),  # distance, share of the shorter side
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # what is left of the distance to the mean
}
SERIES_STRENGTHS = {
    "noise": (0.1, 0.2, 0.3, 0.45, 0.65),  # standard deviation, share of the series' own
    "blur": (0.01, 0.02, 0.04, 0.06, 0.10),  # standard deviation, share of the length
    "shift": (0.02, 0.04, 0.08, 0.12, 0.18),  # distance, share of the length
    "contrast": (1.1, 1.25, 1.5, 1.75, 2.0),  # factor on the distance to the mean, or one over it
}


def image_damages(x: Tensor, bounds: Bounds, draw: torch.Generator) -> dict[str, Damage]:
    """The four kinds for images `[N, C, H, W]`; results stay in `bounds`."""
    noise = torch.randn(x.shape, generator=draw)
    angle = 2 * torch.pi * torch.rand(len(x), generator=draw)
    way = torch.stack([angle.sin(), angle.cos()], dim=1)  # [N, 2]
    side, span = min(x.shape[2:]), bounds.high - bounds.low

    def kept(found: Tensor) -> Tensor:
        return found.clamp(bounds.low, bounds.high)

    return {
        "noise": lambda x, s: kept(with_noise(x, noise, s * span)),
        "blur": lambda x, s: kept(gaussian_blur(x, s * side)),
        "shift": lambda x, s: kept(shifted(x, s * side * way)),
        "contrast": lambda x, s: kept(contrasted(x, s)),
    }


def series_damages(x: Tensor, draw: torch.Generator) -> dict[str, Damage]:
    """The four kinds for series `[N, C, T]`."""
    noise = torch.randn(x.shape, generator=draw)
    way = torch.randint(0, 2, (2, len(x)), generator=draw) * 2.0 - 1.0
    own = x.std(dim=(1, 2), keepdim=True)
    length = x.shape[2]
    return {
        "noise": lambda x, s: with_noise(x, noise, s * own),
        "blur": lambda x, s: gaussian_blur(x, s * length),
        "shift": lambda x, s: shifted(x, s * length * way[0][:, None]),
        "contrast": lambda x, s: contrasted(x, (s ** way[1]).view(-1, 1, 1)),
    }


def damages_for(x: object, subject: Subject, draw: torch.Generator) -> dict[str, Damage]:
    """The kinds of damage that suit these inputs, by name."""
    if isinstance(x, Tensor) and x.is_floating_point():
        if x.ndim == 4 and subject.bounds is not None:
            return image_damages(x, subject.bounds, draw)
        if x.ndim == 3 and x[0].numel() > 1 and "series" in subject.gives:
            return series_damages(x, draw)
    raise NotApplicable(
        "corruption must have images [N, C, H, W] with bounds, or a workload of series [N, C, T]; got "
        f"{f'a tensor {tuple(x.shape)}' if isinstance(x, Tensor) else f'a {type(x).__name__}'}"
        f"{'' if subject.bounds else ' without bounds'}. Leave this probe out, or give the data bounds."
    )


def bounded_mean(values: Tensor) -> Reading:
    """Mean of shares in [0, 1] over inputs, its interval cut to [0, 1]."""
    r = mean_of(values.tolist(), "share", "higher")
    return Reading(r.value, "share", "higher", r.count, max(0.0, r.low or 0.0), min(1.0, r.high or 1.0))


@dataclass(frozen=True)
class Corruption:
    """Accuracy under four kinds of everyday damage at five fixed strengths each.

    `noise` and `blur` are Gaussian; `shift` moves each input its own way; `contrast` changes the distance
    to the mean. Images: strengths relative to the input range or the shorter side, contrast only falls,
    results are clipped to the bounds. Series: strengths relative to the series' spread or length,
    contrast rises for one half of them and falls for the other.
    `corruption_accuracy` is the mean over all twenty, `corruption_worst` the worst of them, and
    `noise_accuracy` and its like the means over five strengths. Every model of a run meets the same
    damaged inputs.

    Shapes: inputs `[N, C, H, W]` or `[N, C, T]`, outputs `[N, K]`.

    Raises:
        NotApplicable: inputs are neither bounded images nor series.

    Source: Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261.

    Departs: four kinds instead of fifteen, since most others need photographs; strengths relative to
    the image size, since a pixel of an 8x8 image is not a pixel of a 224x224 one; plain accuracy
    instead of errors relative to AlexNet's.

    Example:
        >>> sorted(IMAGE_STRENGTHS)
        ['blur', 'contrast', 'noise', 'shift']
    """

    examples: int = param(0, "most test inputs that are damaged, spread evenly over them (0: all)", ge=0)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        out, targets = judged_classes(subject, "corruption")
        batches = list(subject.data.test.batches(500))
        parts = [b.inputs for b in batches]
        x = torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
        if isinstance(x, Tensor):
            rows = evenly(len(targets), self.examples)
            x, out, targets = x[rows], out[rows], targets[rows]
        damages = damages_for(x, subject, ctx.rng("damage"))
        strengths = IMAGE_STRENGTHS if x.ndim == 4 else SERIES_STRENGTHS

        def right(inputs: Tensor) -> Tensor:  # [N] bool
            data = Examples(inputs, targets, torch.arange(len(targets)))
            return subject.task.predict(outputs_on(subject.model, data)) == targets

        hits = {
            kind: torch.stack([right(damage(x, s)) for s in strengths[kind]]).double()  # [5, N]
            for kind, damage in damages.items()
        }
        every = torch.cat(list(hits.values()))  # [20, N]
        worst = int(every.sum(1).argmin())
        kind, level = list(hits)[worst // 5], worst % 5 + 1
        clean = subject.task.predict(out) == targets
        return Readings.of(
            corruption_accuracy=bounded_mean(every.mean(0)),
            corruption_worst=share(int(every[worst].sum()), len(targets)),
            **{f"{name}_accuracy": bounded_mean(found.mean(0)) for name, found in hits.items()},
            notes=(f"worst of the twenty: {kind} at strength {level} of 5",),
            figures={
                "strengths": {name: list(strengths[name]) for name in hits},
                "severity": {name: found.mean(1).tolist() for name, found in hits.items()},
                "clean": float(clean.double().mean()),
            },
        )
