"""Slots and phases: where hooks act, and in which order they do.

The order is phase first, then the order of the list. A method names its own phase with `@phase`;
nothing here knows any method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from cupel.core.errors import ContractError, PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cupel.core.protocols import Card, Hook, Moment
    from cupel.core.types import Batch

PHASES: Mapping[str, tuple[str, ...]] = {  # a star marks a phase that at most one method may take
    "batch": ("select*", "poison", "augment", "attack"),
    "around_forward": ("mask", "quantize*", "observe"),
    "loss": ("term", "weight"),
    "grads": ("make*", "compress*", "mask", "clip"),
    "stepped": ("project", "quantize*", "mask"),
    "seal": ("bake", "shrink", "convert", "wrap"),
}
MARKS = ("start", "epoch", "end")  # slots without phases: list order

F = TypeVar("F", bound=Callable[..., Any])


def phase(name: str, *, takes: str = "mean", gives: str = "mean") -> Callable[[F], F]:
    """Name the phase of a slot method.

    Args:
        name: one of the slot's phases in `PHASES`.
        takes, gives: kind of gradients (`mean` or `per_example`), for slot `grads`.
    """

    def mark(function: F) -> F:
        function.phase, function.takes, function.gives = name, takes, gives  # type: ignore[attr-defined]
        return function

    return mark


@dataclass(frozen=True)
class SlotUse:
    """One method's use of one slot, as declared; read from the source by the plan and from objects by the fit."""

    label: str
    slot: str
    phase: str
    takes: str = "mean"
    gives: str = "mean"

    @property
    def rank(self) -> int:
        names = [p.rstrip("*") for p in PHASES[self.slot]]
        if self.phase not in names:
            raise ContractError(
                f"the phase of {self.label}'s {self.slot} must be one of {', '.join(names)}; got {self.phase!r}. "
                f'Mark the method with @phase("{names[0]}") or another of them.'
            )
        return names.index(self.phase)


def clashes(uses: Sequence[SlotUse]) -> list[str]:
    """Why these uses cannot share one fit; empty when they can."""
    found = []
    for slot, phases in PHASES.items():
        here = sorted((u for u in uses if u.slot == slot), key=lambda u: u.rank)
        for name in (p[:-1] for p in phases if p.endswith("*")):
            takers = [u.label for u in here if u.phase == name]
            if len(takers) > 1:
                found.append(
                    f"at most one technique may take {slot}/{name} in a fit; got {' and '.join(takers)}. "
                    "Keep one of them, or move the others to another fit."
                )
        kind = "mean"
        for use in here if slot == "grads" else ():
            if use.takes != kind:
                found.append(
                    f"{use.label} ({slot}/{use.phase}) must receive {use.takes} gradients; it would receive {kind} "
                    "ones. Put a technique before it that makes them, or remove it."
                )
            kind = use.gives
    return found


def refuse_sharing(devices: int, label: str, card: Card | None, uses: Sequence[SlotUse]) -> None:
    """Raise `PlanError` where a technique cannot work on a part of a batch."""
    why = card.alone if card else ""
    if any(u.slot == "grads" and (u.phase == "make" or "per_example" in (u.takes, u.gives)) for u in uses):
        why = why or "takes the gradient of every example of a batch"
    if devices > 1 and why:
        raise PlanError(f"devices must be 1 in a fit with {label}, which {why}; got {devices}. Train it on one device.")


def uses_of(hook: Hook, label: str) -> list[SlotUse]:
    """The phased slots a hook object defines."""
    found = []
    for slot in PHASES:
        method = getattr(hook, slot, None)
        if method is not None:
            name = getattr(method, "phase", "")
            found.append(SlotUse(label, slot, name, getattr(method, "takes", "mean"), getattr(method, "gives", "mean")))
    return found


class Hooks:
    """The hooks of one fit, ordered once; each slot is then a plain walk over bound methods."""

    def __init__(self, named: Sequence[tuple[str, Hook]]) -> None:
        uses = [use for label, hook in named for use in uses_of(hook, label)]
        faults = clashes(uses)
        if faults:
            raise PlanError("\n".join(faults))
        rank = {(u.label, u.slot): u.rank for u in uses}
        self._slots: dict[str, list[Any]] = {}
        for slot in (*MARKS, *PHASES):
            having = [(label, hook) for label, hook in named if hasattr(hook, slot)]
            having.sort(key=lambda pair: rank.get((pair[0], slot), 0))
            self._slots[slot] = [getattr(hook, slot) for _, hook in having]
        self.makes_gradients = any(u.slot == "grads" and u.phase == "make" for u in uses)
        self.wraps_forward = bool(self._slots["around_forward"])
        self.partners: dict[str, nn.Module] = {}
        for label, hook in named:
            for name, module in getattr(hook, "trains", dict)().items():
                self.partners[f"{label}/{name}"] = module

    def mark(self, name: str, at: Moment) -> None:
        for method in self._slots[name]:
            method(at)

    def batch(self, batch: Batch, at: Moment) -> Batch:
        for method in self._slots["batch"]:
            batch = method(batch, at)
        return batch

    def around_forward(self, at: Moment) -> ExitStack:
        stack = ExitStack()
        try:
            for method in self._slots["around_forward"]:
                stack.enter_context(method(at))
        except BaseException:
            stack.close()
            raise
        return stack

    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        for method in self._slots["loss"]:
            loss = method(loss, out, batch, at)
        return loss

    def grads(self, grads: dict[str, Tensor], at: Moment) -> dict[str, Tensor]:
        for method in self._slots["grads"]:
            grads = method(grads, at)
        return grads

    def stepped(self, at: Moment) -> None:
        if self._slots["stepped"]:
            import torch  # here, so that reading phases does not load torch

            with torch.no_grad():
                for method in self._slots["stepped"]:
                    method(at)
