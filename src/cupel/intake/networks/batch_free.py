"""Making a program that was exported for one batch size run on any, and proving that it does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cupel.core.errors import CupelError
from cupel.core.types import still
from cupel.intake.networks.lifted import Batch, Lifted, Plan, Step, Value, marks_in
from cupel.intake.networks.trying import FAILURES, HOW, agrees, once, sample_input, tried

# Where each function takes a list of sizes, or the one size that may be the batch.
_RESHAPING = {"view.default": 1, "reshape.default": 1, "_unsafe_view.default": 1, "expand.default": 1,
              "unflatten.int": 2}  # fmt: skip
_MAKING = {"zeros.default": 0, "ones.default": 0, "full.default": 0, "new_zeros.default": 1, "new_ones.default": 1,
           "new_full.default": 1, "new_empty.default": 1, "arange.default": 0, "arange.start": 1, "repeat.default": 1,
           "broadcast_to.default": 1}  # fmt: skip
_FLAT = {"flatten.using_ints", "squeeze.dim", "squeeze.dims", "unsqueeze.default"}
_TRIES = 64
Sizes = tuple[int, ...]
Key = tuple[Any, ...]  # a list of sizes in its surroundings: layers that look alike are freed alike


def free(model: Lifted, shape: Sequence[int], dtype: torch.dtype) -> tuple[Lifted, int]:
    """`model`, exported for `shape`, made to run on batches of any size; and how many sizes were literal.

    Literal batch sizes (and multiples of them) in the sizes that reshaping and allocating functions take become
    the size of the batch at hand. Which ones they are is read off two runs side by side, at the exported batch
    and at one row more; the results are then compared row by row with the program's own.

    Raises:
        CupelError: it cannot be made free; says how to export it.
    """
    rows = shape[0]
    inputs = sample_input(shape, dtype, rows + 1)
    failed = "rows of a batch influence each other"
    with still(model), torch.no_grad():
        wanted = [tried(model, inputs[:rows]), tried(model, inputs[1:])]
        todo: list[dict[Key, int]] = [{}]
        for _ in range(_TRIES):
            if not todo:
                break
            pair = _Pair(model, inputs, rows, todo.pop())
            try:
                plan = pair.freed()
                made = _with_plan(model, plan)
                if _agrees(made, inputs, wanted, rows):
                    return made, sum(a != b for a, b in zip(plan.steps, model._plan.steps, strict=True))
            except FAILURES as error:
                failed = (str(error).splitlines() or [type(error).__name__])[0][:160]
            todo += pair.others()
    raise CupelError(
        f"a program must run on any batch; it was exported for {rows} and no other works ({failed}). {HOW}"
    )


def _agrees(model: Lifted, inputs: Tensor, wanted: Sequence[Tensor], rows: int) -> bool:
    """At the exported batch, at one row more, at twice as many rows, and at one row alone."""
    most = once(model, inputs)
    double = once(model, torch.cat([inputs[:rows], inputs[1:]]))
    return (
        most.shape[0] == rows + 1
        and agrees(once(model, inputs[:rows]), wanted[0])
        and agrees(most[:rows], wanted[0])
        and agrees(most[1:], wanted[1])
        and agrees(double, torch.cat(list(wanted)))
        and agrees(once(model, inputs[:1]), wanted[0][:1])
    )


def _with_plan(model: Lifted, plan: Plan) -> Lifted:
    """The modules and tensors of `model` under another plan."""
    made = Lifted(plan)
    made._modules, made._parameters, made._buffers = model._modules, model._parameters, model._buffers
    made._non_persistent_buffers_set = model._non_persistent_buffers_set
    made.training = model.training
    return made


def _places(sizes: Sequence[Any], rows: int) -> list[int]:
    """Positions that may hold the batch: sizes equal to it, then multiples of it."""
    equal = [i for i, n in enumerate(sizes) if type(n) is int and n == rows]
    return equal + [i for i, n in enumerate(sizes) if type(n) is int and n > rows and n % rows == 0]


class _Pair:
    """Two runs of one plan side by side, at `rows` and at `rows + 1`, and what their shapes tell."""

    def __init__(self, model: Lifted, inputs: Tensor, rows: int, guess: Mapping[Key, int]) -> None:
        self.model, self.rows, self.guess = model, rows, guess
        self.chosen: dict[Key, tuple[int, Sequence[int]]] = {}  # place taken, and all that were possible
        self.inputs = (inputs[:rows].clone(), inputs.clone())
        self.values: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        for values, x in zip(self.values, self.inputs, strict=True):
            values[model._plan.input] = x
        # Where a dimension holds several values of each row: how many of them lie next to each other.
        self.inner: dict[str, int] = {model._plan.input: 1}

    def freed(self) -> Plan:
        """The plan with its batch sizes free."""
        plan, steps = self.model._plan, []
        for step in plan.steps:
            changed = self._changed(step)
            for one, values, x in zip((step, changed), self.values, self.inputs, strict=True):
                self.model.run(one, values, x)
            self._follow(step)
            steps.append(changed)
        return Plan(plan.input, plan.output, tuple(steps), plan.fresh)

    def _shapes(self, value: Any) -> tuple[Sizes, Sizes]:
        if isinstance(value, Value):
            return tuple(self.values[0][value.name].shape), tuple(self.values[1][value.name].shape)
        shape = tuple(self.model._read(value, {}, self.inputs[0]).shape)
        return shape, shape

    def _grown(self, value: Any) -> int | None:
        """The dimension that differs between the runs."""
        if isinstance(value, Value) and not isinstance(self.values[0].get(value.name), Tensor):
            return None
        old, new = self._shapes(value)
        return next((d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b), None)

    def _stride(self, value: Any, dim: int) -> int:
        """Distance in memory order of neighbouring rows of the batch."""
        return math.prod(self._shapes(value)[0][dim + 1 :]) * self.inner.get(getattr(value, "name", ""), 1)

    def _follow(self, step: Step) -> None:
        """Note how the batch lies in what the step made."""
        sources = [m for m in marks_in((step.args, step.kwargs)) if isinstance(m, Value) and m.name in self.inner]
        for name in (step.out,) if isinstance(step.out, str) else step.out:
            dim = self._grown(Value(name)) if name is not None else None
            if name is None or dim is None:
                continue
            shape = self._shapes(Value(name))[0]
            if shape[dim] == self.rows:
                self.inner[name] = 1
            elif sources and _op(step) in _FLAT | _RESHAPING.keys() and (at := self._grown(sources[0])) is not None:
                self.inner[name] = max(1, self._stride(sources[0], at) // math.prod(shape[dim + 1 :]))
            else:
                alike = [
                    m for m in sources if (at := self._grown(m)) is not None and self._shapes(m)[0][at] == shape[dim]
                ]
                self.inner[name] = self.inner[alike[0].name] if alike else max(1, shape[dim] // self.rows)

    def others(self) -> list[dict[Key, int]]:
        """What to try when these choices fail: the last choice differently comes last."""
        found, before = [], dict[Key, int]()
        for key, (taken, places) in self.chosen.items():
            if key not in self.guess:
                found += [before | {key: place} for place in reversed(places) if place != taken]
            before[key] = taken
        return found

    def _changed(self, step: Step) -> Step:
        op = _op(step)
        spot = (_RESHAPING | _MAKING).get(op, -1)
        if spot < 0 or len(step.args) <= spot:
            return step
        sizes = step.args[spot]
        listed = sizes if isinstance(sizes, tuple) else (sizes,)
        found = _places(listed, self.rows) if op in _MAKING else self._reshaped(step, listed)
        places = [p for p in found if type(listed[p]) is int and listed[p] > 0 and listed[p] % self.rows == 0]
        if not places:
            return step
        key = (op if op in _RESHAPING else "", listed, () if op in _MAKING else self._shapes(step.args[0]))
        place = self.guess.get(key, places[0])
        self.chosen.setdefault(key, (place, places))
        freed = tuple(Batch(n // self.rows) if i == place else n for i, n in enumerate(listed))
        args = (*step.args[:spot], freed if isinstance(sizes, tuple) else freed[0], *step.args[spot + 1 :])
        return replace(step, args=args)

    def _reshaped(self, step: Step, sizes: Sequence[Any]) -> list[int]:
        """Positions of the sizes given to the first argument where its batch may lie, the likeliest first."""
        source, op = step.args[0], _op(step)
        old, dim = self._shapes(source)[0], self._grown(source)
        if op == "expand.default":
            more = len(sizes) - len(old)
            spread = [i for i in _places(sizes, self.rows) if i < more or old[i - more] == 1]
            return spread if dim is None else [dim + more]
        if dim is None or (op == "unflatten.int" and step.args[1] % len(old) != dim):
            return []
        begin = dim if op == "unflatten.int" else 0
        whole = (*old[:begin], *sizes, *old[dim + 1 :]) if op == "unflatten.int" else tuple(sizes)
        if any(type(n) is not int for n in whole):
            return []
        known = math.prod(n for n in whole if n != -1)
        filled = [math.prod(old) // max(known, 1) if n == -1 else n for n in whole]
        return [d - begin for d in _around(filled, self._stride(source, dim), self.rows) if 0 <= d - begin < len(sizes)]


def _around(shape: Sequence[int], stride: int, rows: int) -> list[int]:
    """Dimensions of `shape` in which the index that moves by `stride` in memory lies.

    A batch of one moves nothing, so it may stand alone, lead a dimension, or end one.
    """
    below = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    inside = [d for d, n in enumerate(shape) if below[d] <= stride < below[d] * n]
    if rows > 1:
        return inside
    alone = [d for d, n in enumerate(shape) if n == 1 and below[d] == stride]
    leads = [d for d, n in enumerate(shape) if n > 1 and below[d] * n == stride]
    return [*alone, *leads, *inside]


def _op(step: Step) -> str:
    return "" if step.module else step.target.removeprefix("torch.ops.aten.")
