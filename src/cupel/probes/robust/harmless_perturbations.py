"""Probe `harmless-perturbations`: input changes of any size that a network cannot see, and what they are for."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Readings, exact, share
from cupel.core.types import Subject, still
from cupel.ops.attacks import pgd
from cupel.ops.labelled import evenly, labelled_inputs
from cupel.ops.null_space import Spectrum, first_linear, matrix_of, spectrum
from cupel.ops.threats import Threat, attacked

CARD = Card(
    name="harmless-perturbations",
    family="robust",
    source="L. Chen, S. Li, B. Huang, F. Yang, Z. Li, J. Li, Y. Luo, Contrasting Adversarial Perturbations: The Space "
    "of Harmless Perturbations, 2024, arXiv 2402.02095",
    tags=("adversarial", "null space", "invariance", "identification"),
    needs=("classes", "gradients", "bounded"),
    readings=(
        "harmless_dimensions", "harmless_share", "output_change", "harmless_accuracy", "random_accuracy",
        "least_seen_accuracy", "most_seen_accuracy", "pgd_harmless_energy", "pgd_linf_accuracy", "pgd_without_harmless",
    ),
    tiny={"examples": 24, "steps": 3},
)  # fmt: skip


def drawn_harmless(seen: Spectrum, shape: torch.Size, size: float, draw: torch.Generator) -> Tensor:
    """Random changes in the harmless space with largest entry `size`, in double; zeros where there is no such space."""
    part = seen.harmless(torch.randn(shape, generator=draw, dtype=torch.float64))
    top = part.flatten(1).abs().amax(1).clamp_min(1e-300)
    scaled: Tensor = part * (size / top).view(-1, *[1] * (part.ndim - 1))
    return scaled if len(seen.hidden) else torch.zeros_like(part)


def along(directions: Tensor, shape: torch.Size, norm: float, draw: torch.Generator) -> Tensor:
    """Random changes of l2 norm `norm` in the span of orthonormal rows `[k, d]`."""
    weights = torch.randn(shape[0], len(directions), generator=draw, dtype=torch.float64)
    found: Tensor = (norm * (weights / weights.norm(dim=1, keepdim=True)) @ directions).view(shape)
    return found


def agreement(model: nn.Module, x: Tensor, delta: Tensor) -> float:
    """Share of inputs whose predicted class the change leaves as it was: 1 for the network that owns the space."""
    with still(model), torch.no_grad():
        return float((model(x).argmax(1) == model(x + delta).argmax(1)).double().mean())


def blind_spot(model: nn.Module, x: Tensor) -> Spectrum:
    """Which input directions the network's first linear layer sees.

    Raises:
        NotApplicable: the inputs do not go through one linear layer before anything else.
    """
    with still(model):
        found = first_linear(model, x[:1])
    if found is None:
        raise NotApplicable(
            "harmless-perturbations must find one linear or convolution layer that alone meets the inputs; it does "
            "not. Use it on networks that begin with one."
        )
    return spectrum(matrix_of(*found))


@dataclass(frozen=True)
class HarmlessPerturbations:
    r"""Solve for the changes of the input that the first layer maps to zero, and test what the network makes of them.

    z = A x + b with A `[m, d]` over whole inputs, a convolution as its matrix; rows of V^T of A = U S V^T with
    s_i <= max(m, d) eps s_1 span the harmless space, of dimension d - rank(A). `output_change` is the largest change of
    any output, in double precision, under such a change with largest entry `size`; `harmless_accuracy` the accuracy
    under it, `random_accuracy` that under normal noise of the same norms. `least_seen_accuracy` and
    `most_seen_accuracy` are under changes of l2 norm `norm` along the ten directions of smallest and largest singular
    value. Of a PGD perturbation, `pgd_harmless_energy` is the share of its square that is harmless, and
    `pgd_without_harmless` the accuracy under what is left of it, next to `pgd_linf_accuracy` under all of it.

    Use: to see what compression took from or gave to the first layer, to hide inputs, or to tell models apart
    (`agreement`). Networks whose first layer widens the input have no such space, only directions they hardly see.

    Costs: one singular value decomposition of the first layer, d^3 operations, and one attack.

    Shapes: inputs `[N, ...]` floats with d values each, logits `[N, K]`.

    Raises:
        NotApplicable: inputs have no bounds, or do not go through one linear layer before anything else.

    Source: Chen et al., arXiv 2402.02095, the linear and convolutional layers and the decomposition.

    Departs: the larger space of the layers behind (a cone for each input and activation pattern) is not searched; the
    space of the first layer lies inside it. Changes are not clipped to the inputs' range, which would leave the space.
    What is left of a PGD perturbation is judged as it is, in the same ball in l2 but not always in linf.

    Example:
        >>> HarmlessPerturbations(size=50.0).norm
        2.0
    """

    size: float = param(5.0, "largest entry of a harmless change, in input units", gt=0)
    norm: float = param(2.0, "l2 norm of changes along seen directions, in input units", gt=0)
    eps: float = param(0.1, "linf radius of the PGD attack, in input units", gt=0)
    steps: int = param(20, "steps of the PGD attack", ge=1)
    restarts: int = param(3, "random starts of the PGD attack", ge=1)
    examples: int = param(200, "test inputs (0: all)", ge=0)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        if subject.bounds is None:
            raise NotApplicable("harmless-perturbations must know the inputs' range; there is none. Set its bounds.")
        x, y = labelled_inputs(subject, "harmless-perturbations")
        rows = evenly(len(y), self.examples)
        x, y = x[rows].to(ctx.device), y[rows].to(ctx.device)
        seen = blind_spot(subject.model, x)
        threat = Threat("linf", self.eps, subject.bounds, self.steps, restarts=self.restarts)
        with still(subject.model) as model, ctx.scope("attack"):
            outcome = attacked(pgd, model, x, y, threat, ctx.rng("pgd"))
        moved = (outcome.x - x).double()
        quiet = seen.harmless(moved.cpu()).to(x.device)
        energy = float(quiet.square().sum() / moved.square().sum().clamp_min(1e-300))
        changes = self._changes(seen, x.shape, ctx)
        # Double precision, which some devices lack, is the CPU's.
        with still(copy.deepcopy(subject.model).cpu().double()) as exactly, torch.no_grad():
            there = x.cpu().double()
            plain = exactly(there)
            seen_as = {n: exactly(there + d.cpu()) for n, d in changes.items()}
            left = exactly(there + (moved - quiet).cpu())
        y = y.cpu()
        n, d = len(y), len(seen.values)
        hits = {name: share(int((out.argmax(1) == y).sum()), n) for name, out in seen_as.items()}
        least = float(seen.values[seen.rank - 1]) if seen.rank else 0.0
        return Readings.of(
            notes=(
                f"{n} inputs; pgd: linf ball of radius {self.eps:g}, {self.steps} steps, {self.restarts} restarts",
                f"the first layer sees {seen.rank} of {d} directions, the least of them {least:.2g} times its length",
            ),
            figures={"singular_values": [float(v) for v in seen.values[:1000]]},
            harmless_dimensions=exact(d - seen.rank, "dimensions"),
            harmless_share=exact((d - seen.rank) / d, "share"),
            output_change=exact(float((seen_as["harmless_accuracy"] - plain).abs().max()), "1", "lower"),
            pgd_harmless_energy=exact(energy, "share"),
            pgd_linf_accuracy=share(int((~outcome.fooled).sum()), n),
            pgd_without_harmless=share(int((left.argmax(1) == y).sum()), n),
            **hits,
        )

    def _changes(self, seen: Spectrum, shape: torch.Size, ctx: Context) -> dict[str, Tensor]:
        """Changes of the inputs, by the reading that tells the accuracy under them."""
        delta = drawn_harmless(seen, shape, self.size, ctx.rng("harmless"))
        noise = torch.randn(shape, generator=ctx.rng("noise"), dtype=torch.float64)
        length = delta.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
        return {
            "harmless_accuracy": delta,
            "random_accuracy": noise * length.view(-1, *[1] * (len(shape) - 1)),
            "least_seen_accuracy": along(seen.directions[-10:], shape, self.norm, ctx.rng("along")),
            "most_seen_accuracy": along(seen.directions[:10], shape, self.norm, ctx.rng("along")),
        }
