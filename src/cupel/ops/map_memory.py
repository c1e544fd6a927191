"""How many values a device must hold while it runs a program, whole map after whole map or patch by patch.

A map is held from the kernel that makes it to the last that reads it. A result is written over a map nobody needs any
more where that is safe: a depthwise convolution over its own input, channel after channel, with one channel beside it;
an addition, and a convolution with a shortcut, into the shortcut; an elementwise map over its input. Weights are not
counted: they stay in read-only memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cupel.ops.map_program import Kernel, Program
from cupel.ops.receptive import Box, tiles


@dataclass(frozen=True)
class Step:
    """One kernel in a schedule.

    Args:
        kernel: its position in the program.
        into: the map whose memory takes the result; `None` for memory of its own.
        held: values in memory while it runs, its result and its own workspace included.
        frees: maps nobody needs any more.
    """

    kernel: int
    into: int | None
    held: int
    frees: tuple[int, ...]


Boxes = Mapping[int, Box]


def whole_boxes(program: Program) -> dict[int, Box]:
    """All of every map."""
    return {m: Box(0, rows, 0, cols) for m, (_, rows, cols) in enumerate(program.shapes)}


def boxes_under(program: Program, cut: int, box: Box) -> dict[int, Box]:
    """The part of every map of the first `cut` kernels that `box` of the last one's output needs."""
    found = {program.kernels[cut - 1].writes: box}
    for kernel in reversed(program.kernels[:cut]):
        here = found.get(kernel.writes)
        for k, m in enumerate(kernel.reads):
            if here is None:
                continue
            added = kernel.onto and k == len(kernel.reads) - 1
            need = here if added else kernel.window.under(here, program.shapes[m][1:])
            found[m] = found[m] | need if m in found else need
    return found


def schedule(program: Program, span: range, boxes: Boxes, alive: Iterable[int]) -> list[Step]:
    """The kernels of `span` in order, with what each may overwrite and frees; `alive` are the maps held at the start.

    What a kernel outside `span` still reads, and the program's output, stay held.
    """
    last = program.last_use() | {program.output: len(program.kernels)}
    held, steps = {m: _size(program, m, boxes) for m in alive}, []
    for k in span:
        kernel = program.kernels[k]
        dying = [m for m in dict.fromkeys(kernel.reads) if last[m] == k]
        into = _into(program, kernel, dying, boxes)
        result = _size(program, kernel.writes, boxes)
        beside = 0 if into is not None else result
        if into is not None and kernel.kind == "conv" and not kernel.onto:
            beside = boxes[kernel.writes].area  # one channel of a depthwise convolution
        steps.append(Step(k, into, sum(held.values()) + beside, tuple(m for m in dying if m != into)))
        for m in dying:
            del held[m]
        held[kernel.writes] = result
    return steps


def _into(program: Program, kernel: Kernel, dying: Sequence[int], boxes: Boxes) -> int | None:
    if kernel.kind == "conv" and kernel.onto:
        short = kernel.reads[-1]
        return short if short in dying and short not in kernel.reads[:-1] else None
    if kernel.kind == "conv":
        source = kernel.reads[0]
        fits = boxes[kernel.writes].area <= boxes[source].area
        return source if kernel.depthwise and source in dying and fits else None
    return dying[0] if kernel.kind in ("map", "add", "reshape") and dying else None


def _size(program: Program, number: int, boxes: Boxes) -> int:
    return program.shapes[number][0] * boxes[number].area


def multiply_adds(program: Program, span: range, boxes: Boxes) -> int:
    """Multiply-adds of the convolutions and linear layers of `span`, padded borders counted."""
    count = 0
    for k in span:
        kernel = program.kernels[k]
        if kernel.weight is not None:
            count += _size(program, kernel.writes, boxes) * kernel.weight[0].numel()
    return count


@dataclass(frozen=True)
class Part:
    """Kernels that run on the same boxes, in order."""

    steps: tuple[Step, ...]
    boxes: Boxes


@dataclass(frozen=True)
class Plan:
    """A schedule of a whole program.

    Args:
        cut: kernels that run patch by patch.
        tiles: the output of the last of them, in parts.
        patches: one part a tile.
        rest: the other kernels, on whole maps.
    """

    cut: int
    tiles: tuple[Box, ...]
    patches: tuple[Part, ...]
    rest: Part


def plan(program: Program, cut: int = 0, patches: int = 1) -> Plan:
    """The first `cut` kernels on `patches` x `patches` parts of their last output, the others on whole maps."""
    boxes, last = whole_boxes(program), len(program.kernels)
    if not cut:
        return Plan(0, (), (), Part(tuple(schedule(program, range(last), boxes, {0})), boxes))
    made = program.kernels[cut - 1].writes
    rest = Part(tuple(schedule(program, range(cut, last), boxes, {made})), boxes)
    places = tuple(tiles(program.shapes[made][1:], patches))
    under = [boxes_under(program, cut, box) for box in places]
    parts = tuple(Part(tuple(schedule(program, range(cut), here, {0})), here) for here in under)
    return Plan(cut, places, parts, rest)


@dataclass(frozen=True)
class Footprint:
    """What a schedule takes, in values and multiply-adds.

    Args:
        stage: most values held while the patches run; 0 without patches.
        later: most values held while whole maps run.
        macs, plain_macs: multiply-adds of the schedule, and of every kernel once.
    """

    stage: int
    later: int
    macs: int
    plain_macs: int

    @property
    def peak(self) -> int:
        return max(self.stage, self.later)

    @property
    def overhead(self) -> float:
        """Extra multiply-adds that the halos cost, as a share."""
        return self.macs / self.plain_macs - 1

    def times(self, each: int) -> Footprint:
        """The same in bytes, at `each` bytes a value."""
        return replace(self, stage=self.stage * each, later=self.later * each)


def footprint(program: Program, made: Plan, resident: bool = False) -> Footprint:
    """Memory and work of a plan.

    Args:
        resident: whether the whole input stays in memory beside the patches; otherwise a patch's crop of it is read
            when the patch begins.
    """
    boxes, every = whole_boxes(program), range(len(program.kernels))
    later = max(s.held for s in made.rest.steps)
    plain = multiply_adds(program, every, boxes)
    if not made.cut:
        return Footprint(0, later, plain, plain)
    fixed = _size(program, program.kernels[made.cut - 1].writes, boxes) + resident * _size(program, 0, boxes)
    stage = fixed + max(s.held for part in made.patches for s in part.steps)
    macs = sum(multiply_adds(program, range(made.cut), part.boxes) for part in made.patches)
    return Footprint(stage, later, macs + multiply_adds(program, every[made.cut :], boxes), plain)


def chosen(
    program: Program, most: int, cuts: Sequence[int], limit: float = float("inf"), resident: bool = False
) -> tuple[Plan, Footprint, int]:
    """The plan that fits, with its footprint and patches a side.

    Of the plans with at most `limit` values in memory, the one with the least work, and of equal ones the least
    memory; without a limit, or where none fits, the one with the least memory, and of equal ones the least work.

    Args:
        most: patches a side are 1 to `most`.
        cuts: candidates for the number of kernels that run patch by patch; running none is always one.
    """
    found = []
    for cut, patches in [(0, 1), *((c, p) for c in cuts for p in range(2, most + 1))]:
        made = plan(program, cut, patches)
        found.append((made, footprint(program, made, resident), patches))
    fitting = [f for f in found if f[1].peak <= limit]
    if limit < float("inf") and fitting:
        return min(fitting, key=lambda f: (f[1].macs, f[1].peak))
    return min(found, key=lambda f: (f[1].peak, f[1].macs))
