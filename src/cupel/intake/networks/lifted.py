"""A network read from a file: a list of steps over real modules and a closed list of tensor functions.

No text of the file becomes code. A step names a submodule or a function of a closed list; anything else is
refused when the file is read, so running, copying, pickling and tracing the network run nothing but torch's own
kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from cupel.intake.networks.functions import function_of


@dataclass(frozen=True)
class Value:
    """What an earlier step made, by name. Like the other marks it is plain data, which `core.blueprint` can write."""

    name: str


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of the network, by its path."""

    path: str


@dataclass(frozen=True)
class Batch:
    """`times` times the size of the batch at hand."""

    times: int


@dataclass(frozen=True)
class Mode:
    """Whether the network is training."""


@dataclass(frozen=True)
class Rate:
    """A dropout rate: `rate` in training, 0 otherwise."""

    rate: float


@dataclass(frozen=True)
class Place:
    """The device of the input."""


MARKS = (Value, Held, Batch, Mode, Rate, Place)


@dataclass(frozen=True)
class Step:
    """One call. `target` is a submodule's path (`module`) or the name of a function; `out` names what it makes."""

    module: bool
    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    out: str | tuple[str | None, ...]
    done: tuple[str, ...] = ()  # values nobody needs afterwards


@dataclass(frozen=True)
class Plan:
    """The steps from `input` to `output`; `fresh` copies the input first, as a step writes in place."""

    input: str
    output: str
    steps: tuple[Step, ...]
    fresh: bool = False

    def freeing(self) -> Plan:
        """The same plan in which every value is dropped after its last use."""
        seen, steps = {self.output}, []
        for step in reversed(self.steps):
            made = (step.out,) if isinstance(step.out, str) else step.out
            named = {v.name for v in marks_in((step.args, step.kwargs)) if isinstance(v, Value)}
            named |= {name for name in made if name is not None}
            steps.append(replace(step, done=tuple(sorted(named - seen))))
            seen |= named
        return Plan(self.input, self.output, tuple(reversed(steps)), self.fresh)


def marks_in(value: Any) -> list[Any]:
    """The marks inside nested arguments."""
    if isinstance(value, MARKS):
        return [value]
    if isinstance(value, (tuple, list)):
        return [m for part in value for m in marks_in(part)]
    return []


class Lifted(nn.Module):
    """A network of real modules under their own names that runs a `Plan`; it takes one tensor and returns one.

    It can be trained, copied, pickled, traced by torch.fx and exported again like any other.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan

    def forward(self, x: Tensor) -> Tensor:
        plan = self._plan
        values = {plan.input: x.clone() if plan.fresh else x}
        for step in plan.steps:
            self.run(step, values, x)
            for name in step.done:
                del values[name]
        return values[plan.output]

    def run(self, step: Step, values: dict[str, Any], x: Tensor) -> None:
        """Do one step: read what it needs from `values`, and put there what it makes."""
        args = [self._read(a, values, x) for a in step.args]
        kwargs = {name: self._read(a, values, x) for name, a in step.kwargs}
        call = self.get_submodule(step.target) if step.module else function_of(step.target)
        made = call(*args, **kwargs)
        if isinstance(step.out, str):
            values[step.out] = made
        else:
            values |= {name: made[i] for i, name in enumerate(step.out) if name is not None}

    def _read(self, value: Any, values: Mapping[str, Any], x: Tensor) -> Any:
        if type(value) in (tuple, list):
            return [self._read(part, values, x) for part in value]
        if isinstance(value, Value):
            return values[value.name]
        if isinstance(value, Held):
            path, _, leaf = value.path.rpartition(".")
            return getattr(self.get_submodule(path), leaf)
        if isinstance(value, Batch):
            return x.size(0) if value.times == 1 else x.size(0) * value.times
        if isinstance(value, Place):
            return x.device
        if isinstance(value, Mode):
            return self.training
        if isinstance(value, Rate):
            return value.rate if self.training else 0.0
        return value
