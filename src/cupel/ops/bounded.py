"""Activations that let no value past a bound: learned and fading, cut to zero, or clamped."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.errors import PlanError
from cupel.core.types import still
from cupel.ops.watch import entering

KINDS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU)  # nothing large and negative leaves these


def faded(z: Tensor, bound: Tensor, slope: float) -> Tensor:
    """z - z * sigmoid(slope * (z - bound)): about z below the bound, half of it there, about 0 above.

    What a fault made infinite or NaN becomes 0 too.

    >>> faded(torch.tensor([1.0, 2.0, 9e30, torch.inf]), torch.tensor(2.0), 20.0).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    gate = torch.sigmoid(slope * (bound - z))  # = 1 - sigmoid(slope * (z - bound)), without cancellation
    return torch.where(gate > 0, z * gate, 0)


def zeroed(z: Tensor, bound: Tensor) -> Tensor:
    """z up to the bound, 0 beyond it.

    >>> zeroed(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2.0)).tolist()
    [1.0, 2.0, 0.0]
    """
    return torch.where(z <= bound, z, 0)


def clamped(z: Tensor, bound: Tensor) -> Tensor:
    """z up to the bound, the bound beyond it.

    >>> clamped(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2.0)).tolist()
    [1.0, 2.0, 2.0]
    """
    return torch.minimum(z, bound)


def bound_shape(shape: Sequence[int], per: str) -> tuple[int, ...]:
    """Shape of the bounds for activations of `shape`, first the batch: one for a neuron, channel or layer.

    >>> [bound_shape((32, 4, 8, 8), per) for per in ("neuron", "channel", "layer")]
    [(4, 8, 8), (4, 1, 1), ()]
    """
    if per == "layer":
        return ()
    kept = tuple(shape[1:])
    return kept if per == "neuron" else (*kept[:1], *[1] * (len(kept) - 1))


def largest(z: Tensor, per: str) -> Tensor:
    """The largest value of every neuron, channel or layer over a batch, in `bound_shape`."""
    if per == "layer":
        return z.amax()
    top = z.amax(0)
    return top if per == "neuron" or top.ndim < 2 else top.flatten(1).amax(1).view(bound_shape(z.shape, per))


class Bounded(nn.Module):
    """An activation and its bounds: one tensor for every shape that it is called with.

    `beyond` is what becomes of values past the bound: `fade`, `zero` or `clamp`.
    """

    def __init__(
        self, inner: nn.Module, bounds: Sequence[Tensor], per: str = "neuron", beyond: str = "fade", slope: float = 20.0
    ) -> None:
        super().__init__()
        self.inner, self.per, self.beyond, self.slope = inner, per, beyond, slope
        self.bounds = nn.ParameterList([nn.Parameter(b.detach().clone()) for b in bounds])

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.inner(x)
        wanted = bound_shape(z.shape, self.per)
        for own in self.bounds:
            if tuple(own.shape) == wanted:
                bound = own.to(z.dtype)
                return faded(z, bound, self.slope) if self.beyond == "fade" else self._cut(z, bound)
        raise PlanError(
            f"activations of this network must have a shape their bounds were made for, "
            f"{' or '.join(str(tuple(b.shape)) for b in self.bounds)}; got {wanted}. Keep the size of the inputs, or "
            "bound it per channel or layer."
        )

    def _cut(self, z: Tensor, bound: Tensor) -> Tensor:
        return zeroed(z, bound) if self.beyond == "zero" else clamped(z, bound)

    def extra_repr(self) -> str:
        return f"per={self.per!r}, beyond={self.beyond!r}, slope={self.slope:g}"


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """The activation modules that can be bounded and are not yet, by name."""
    done = {id(m) for b in model.modules() if isinstance(b, Bounded) for m in b.modules()}
    return {n: m for n, m in model.named_modules() if type(m) in KINDS and id(m) not in done}


def maxima(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: Iterable[Any], per: str
) -> dict[str, list[Tensor]]:
    """The largest outputs of every module over all `inputs`, by name; those that are never called are left out.

    Calls of one shape share their maxima; each further shape has its own.
    """
    tops: dict[str, dict[tuple[int, ...], Tensor]] = {}

    def seen(name: str, x: Tensor) -> None:
        top = largest(modules[name].forward(x.clone()), per)  # forward: no hook; clone: some work in place
        own = tops.setdefault(name, {})
        own[tuple(top.shape)] = torch.maximum(own.get(tuple(top.shape), top), top)

    with still(model), torch.no_grad(), entering(modules, seen):
        for x in inputs:
            model(x)
    return {name: list(tops[name].values()) for name in modules if name in tops}


def bounded_copy(
    model: nn.Module, bounds: Mapping[str, Sequence[Tensor]], per: str, beyond: str, slope: float = 20.0
) -> nn.Module:
    """A copy of `model` in which the activations named in `bounds` are bounded; `model` stays as it was."""
    made: dict[int, Any] = {}
    for name, own in bounds.items():
        inner = model.get_submodule(name)
        made[id(inner)] = Bounded(copy.deepcopy(inner), own, per, beyond, slope).train(inner.training)
    # The copy takes a bounded one wherever it would copy the activation.
    return made[id(model)] if id(model) in made else copy.deepcopy(model, made)


def bounds_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """All bounds of the activations in `model`."""
    for module in model.modules():
        if isinstance(module, Bounded):
            yield from module.bounds
