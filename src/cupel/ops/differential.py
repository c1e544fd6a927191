"""Two implementations of one network on the same inputs: whether they part, and how.

Source: J. Liu et al., NNSmith, ASPLOS 2023, arXiv 2207.13066, section 4 (oracles, and what is compared).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from cupel.ops.isolated import attempted, isolated

LEVELS = {"exact": (0.0, 0.0), "tolerance": (1e-3, 1e-4), "loose": (0.25, 0.1), "form": (float("inf"), float("inf"))}
Run = Callable[..., Any]


@dataclass(frozen=True)
class Target:
    """A second implementation, and what it promises.

    Args:
        name: for reports.
        level: `exact` (the same bits), `tolerance` (rounding of other orders of sums), `loose` (few bits), `form`
            (shapes, types and finite values alone).
        make: network and inputs -> a callable on the same inputs; both may be changed, they are copies.
        rows: it takes networks of one input whose first axis is the batch, with one output `[B, K]`.
        refusals: names of errors that say plainly that it does not take a network.
        prepare: changes the network before both run (zeroed channels, a rank it can be cut to).
        plainer: the same without optimisation, to tell which part is at fault.
        seconds: most for one network.
    """

    name: str
    level: str
    make: Callable[[fx.GraphModule, tuple[Tensor, ...]], Run]
    rows: bool = False
    refusals: tuple[str, ...] = ()
    prepare: Callable[[fx.GraphModule, tuple[Tensor, ...]], None] | None = None
    plainer: Callable[[fx.GraphModule, tuple[Tensor, ...]], Run] | None = None
    seconds: float = 20.0


@dataclass(frozen=True)
class Verdict:
    """`same`, `inconsistency`, `crash`, `timeout` or `refused`; `gap` is the largest difference over the allowed."""

    kind: str
    detail: str = ""
    gap: float = 0.0

    @property
    def bad(self) -> bool:
        return self.kind in ("inconsistency", "crash", "timeout")

    def like(self, other: Verdict) -> bool:
        """Whether both tell of the same defect: kind, and the beginning of what was said."""
        return self.kind == other.kind and (self.kind != "crash" or self.detail[:40] == other.detail[:40])


def tensors_of(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(o for o in out)


def gap_of(wanted: Sequence[Tensor], found: Sequence[Tensor], level: str) -> tuple[float, str]:
    """Largest difference as a multiple of what the level allows, and in words; at most 1 is equal.

    Shapes and types must be equal, NaN equals NaN. With `exact`, anything but the same values is infinitely far. The
    absolute part of a tolerance is a share of the tensor's largest entry, or of 1.
    """
    if len(wanted) != len(found):
        return float("inf"), f"{len(found)} outputs in place of {len(wanted)}"
    worst, words = 0.0, ""
    for k, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf"), f"output {k} is {b.dtype} {list(b.shape)} in place of {a.dtype} {list(a.shape)}"
        alike = (a == b) | (a.isnan() & b.isnan())
        if bool(alike.all()):
            continue
        if level == "exact":
            return float("inf"), f"output {k} differs in {int((~alike).sum())} of {a.numel()} values"
        relative, absolute = LEVELS[level]
        if level == "form":
            if bool(b.isfinite().all()):
                continue
            return float("inf"), f"output {k} has {int((~b.isfinite()).sum())} values that are not finite"
        a, b = a.double(), b.double()
        scale = a[a.isfinite()].abs().amax().clamp_min(1.0) if bool(a.isfinite().any()) else torch.ones(()).double()
        ratio = (a - b).abs() / (absolute * scale + relative * a.abs())
        ratio = ratio.masked_fill(alike, 0.0).nan_to_num(nan=float("inf"))
        if float(ratio.max()) > worst:
            worst, at = float(ratio.max()), int(ratio.argmax())
            words = f"output {k} is {b.flatten()[at]:.6g} in place of {a.flatten()[at]:.6g}"
    return worst, words


def judged(target: Target, net: fx.GraphModule, inputs: tuple[Tensor, ...], apart: bool = True) -> Verdict:
    """What the target does with a network, against the network itself in evaluation mode.

    Args:
        apart: in a process of its own, so that a crash of the process or an endless loop is told as well.
    """

    def work() -> Verdict:
        return _compared(target, net, inputs)

    outcome = isolated(work, target.seconds) if apart else attempted(work)
    if outcome.kind == "returned":
        found: Verdict = outcome.value
    elif outcome.kind == "raised":
        refused = outcome.error in target.refusals
        found = Verdict("refused" if refused else "crash", outcome.value)
    else:
        found = Verdict("timeout" if outcome.kind == "timeout" else "crash", outcome.value)
    return _attributed(target, net, inputs, found, apart)


def _compared(target: Target, net: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Verdict:
    if target.prepare is not None:
        net = copy.deepcopy(net)
        target.prepare(net, inputs)
    with torch.no_grad():
        wanted = [t.clone() for t in tensors_of(net(*(x.clone() for x in inputs)))]
    run = target.make(copy.deepcopy(net), tuple(x.clone() for x in inputs))
    with torch.no_grad():
        found = tensors_of(run(*(x.clone() for x in inputs)))
    gap, words = gap_of(wanted, found, target.level)
    return Verdict("inconsistency", words, gap) if not gap <= 1 else Verdict("same", "", gap)


def _attributed(
    target: Target, net: fx.GraphModule, inputs: tuple[Tensor, ...], found: Verdict, apart: bool
) -> Verdict:
    """A fault that is gone without optimisation lies in the optimisation."""
    if target.plainer is None or not found.bad:
        return found
    again = judged(replace(target, make=target.plainer, plainer=None), net, inputs, apart)
    where = "also without optimisation" if again.bad else "only with optimisation"
    return replace(found, detail=f"{found.detail} ({where})")


def steady(net: fx.GraphModule, inputs: tuple[Tensor, ...], level: str) -> bool:
    """Whether rounding alone stays within what the level allows: in double precision, and with inputs moved a little.

    A network that is not steady says nothing about the implementation: a comparison may fall the other way.
    """
    if level in ("exact", "form"):
        return True
    allowed = 0.1 if level == "tolerance" else 1.0
    moved = tuple(x * (1 + 1e-6) if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        one = tensors_of(net(*inputs))
        two = tensors_of(net(*moved))
        if gap_of(one, two, level)[0] > allowed:
            return False
        try:
            fine = copy.deepcopy(net).double()
            three = tensors_of(fine(*(x.double() if x.is_floating_point() else x for x in inputs)))
        except RuntimeError:  # a graph that mixes types by intent has no double form
            return True
    return gap_of(one, [t.to(a.dtype) for a, t in zip(one, three, strict=True)], level)[0] <= allowed
