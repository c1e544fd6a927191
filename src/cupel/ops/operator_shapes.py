"""Operators that move, join, cut or reduce the axes of a tensor, described for a solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from torch.nn import functional as F

from cupel.ops.operator_specs import Operator, Picks, Shape, Size, product

_SAME = ("ff", "dd", "ii", "bb")
_NUMBERS = ("ff", "dd", "ii")
_PAIRS = ("fff", "ddd", "iii")


def _axis(draw: Random, ranks: Sequence[int], leads: Sequence[int]) -> Picks | None:
    """One axis of the first input that is not the batch."""
    return {"axis": draw.randrange(leads[0], ranks[0])} if ranks[0] > leads[0] else None


def _same_axis(draw: Random, ranks: Sequence[int], leads: Sequence[int]) -> Picks | None:
    return _axis(draw, ranks, leads) if ranks[0] == ranks[1] and leads[0] == leads[1] else None


def _new_axis(draw: Random, ranks: Sequence[int], leads: Sequence[int]) -> Picks | None:
    return {"axis": draw.randint(leads[0], ranks[0])} if ranks[0] < 5 else None


def _order(draw: Random, ranks: Sequence[int], leads: Sequence[int]) -> Picks | None:
    free = list(range(leads[0], ranks[0]))
    if len(free) < 2:
        return None
    draw.shuffle(free)
    return {"order": (*range(leads[0]), *free)}


def _folding(draw: Random, ranks: Sequence[int], leads: Sequence[int]) -> Picks | None:
    """Keep the batch, and give the rest a new number of axes."""
    return {"lead": leads[0], "axes": draw.randint(1, 3)} if ranks[0] > leads[0] else None


def _with(shape: Shape, axis: int, size: Size) -> list[Size]:
    return [size if k == axis else s for k, s in enumerate(shape)]


def _reshape(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    fresh = [a[f"size{k}"] for k in range(a["axes"])]
    lead = list(shapes[0][: a["lead"]])
    return [product(fresh) == product(shapes[0][a["lead"] :])], lead + fresh


def _reduced(name: str, function: Callable[..., Any], types: tuple[str, ...], **facts: Any) -> Operator:
    return Operator(
        name,
        types,
        lambda s, a: ([], [n for k, n in enumerate(s[0]) if k != a["axis"]]),
        lambda x, a: function(x[0], dim=a["axis"]),
        pick=_axis,
        **facts,
    )


def _kept(name: str, function: Callable[..., Any], types: tuple[str, ...], **facts: Any) -> Operator:
    return Operator(
        name,
        types,
        lambda s, a: ([], list(s[0])),
        lambda x, a: function(x[0], a["axis"]),
        pick=_axis,
        **facts,
    )


def _narrowed(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    fits = [a["begin"] + a["length"] <= shapes[0][a["axis"]]]
    return fits, _with(shapes[0], a["axis"], a["length"])


def _strided(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    """x[..., begin::2, ...]."""
    size = shapes[0][a["axis"]]
    kept = size - a["begin"] + 1
    return [a["begin"] < size], _with(shapes[0], a["axis"], kept // 2 if isinstance(kept, int) else kept / 2)


def _joined(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    axis, (one, two) = a["axis"], shapes
    return [p == q for k, (p, q) in enumerate(zip(one, two, strict=True)) if k != axis], _with(
        one, axis, one[axis] + two[axis]
    )


def _stacked(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    out = list(shapes[0])
    out.insert(a["axis"], 2)
    return [p == q for p, q in zip(*shapes, strict=True)], out


def _unsqueezed(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    out = list(shapes[0])
    out.insert(a["axis"], 1)
    return [], out


def _matmul_ranks(draw: Random, ranks: Sequence[int], leads: Sequence[int]) -> Picks | None:
    least = 3 if any(leads) else 2
    return {} if ranks[0] == ranks[1] >= least and leads[0] == leads[1] else None


def _matmul(shapes: list[Shape], a: Picks) -> tuple[list[Any], list[Size]]:
    one, two = shapes
    batch = [p == q for p, q in zip(one[:-2], two[:-2], strict=True)]
    return [*batch, one[-1] == two[-2]], [*one[:-1], two[-1]]


def _slices(x: Any, a: Picks) -> Any:
    return x[(slice(None),) * a["axis"] + (slice(a["begin"], None, 2),)]


def shape_operators() -> tuple[Operator, ...]:
    """Operators that move, join, cut or reduce axes."""
    sizes = {f"size{k}": (1, 256) for k in range(3)}
    return (
        Operator("reshape", _SAME, _reshape,
                 lambda x, a: x[0].reshape([*([-1] * a["lead"]), *(a[f"size{k}"] for k in range(a["axes"]))]),
                 attributes=sizes, pick=_folding),
        Operator("flatten", _SAME, lambda s, a: ([], [*s[0][: a["axis"]], product(s[0][a["axis"] :])]),
                 lambda x, a: torch.flatten(x[0], a["axis"]), pick=_axis),
        Operator("permute", _SAME, lambda s, a: ([], [s[0][k] for k in a["order"]]),
                 lambda x, a: x[0].permute(a["order"]), pick=_order),
        Operator("unsqueeze", _SAME, _unsqueezed, lambda x, a: x[0].unsqueeze(a["axis"]), pick=_new_axis),
        Operator("squeeze", _SAME,
                 lambda s, a: ([s[0][a["axis"]] == 1], [n for k, n in enumerate(s[0]) if k != a["axis"]]),
                 lambda x, a: x[0].squeeze(a["axis"]), pick=_axis),
        Operator("narrow", _SAME, _narrowed, lambda x, a: torch.narrow(x[0], a["axis"], a["begin"], a["length"]),
                 attributes={"begin": (0, 63), "length": (1, 64)}, pick=_axis),
        Operator("stride", _SAME, _strided, lambda x, a: _slices(x[0], a), attributes={"begin": (0, 8)}, pick=_axis),
        Operator("flip", _SAME, lambda s, a: ([], list(s[0])), lambda x, a: torch.flip(x[0], (a["axis"],)), pick=_axis),
        Operator("roll", _SAME, lambda s, a: ([], list(s[0])), lambda x, a: torch.roll(x[0], a["by"], a["axis"]),
                 attributes={"by": (0, 9)}, pick=_axis),
        Operator("pad", ("ff", "dd"), lambda s, a: ([], [*s[0][:-1], s[0][-1] + a["left"] + a["right"]]),
                 lambda x, a: F.pad(x[0], (a["left"], a["right"])), attributes={"left": (0, 4), "right": (0, 4)},
                 pick=_axis),
        Operator("expand", _SAME, lambda s, a: ([s[0][a["axis"]] == 1], _with(s[0], a["axis"], a["times"])),
                 lambda x, a: x[0].expand([a["times"] if k == a["axis"] else -1 for k in range(a["rank"])]),
                 attributes={"times": (1, 16)}, pick=_expanded),
        Operator("cat", _PAIRS, _joined, lambda x, a: torch.cat(x, a["axis"]), pick=_same_axis),
        Operator("stack", _PAIRS, _stacked, lambda x, a: torch.stack(x, a["axis"]),
                 pick=lambda d, r, b: _new_axis(d, r, b) if r[0] == r[1] and b[0] == b[1] else None),
        _reduced("sum", torch.sum, _NUMBERS),
        _reduced("mean", torch.mean, ("ff", "dd")),
        _reduced("amax", torch.amax, _NUMBERS),
        _reduced("argmax", torch.argmax, ("fi", "di"), smooth=False),
        _reduced("any", torch.any, ("bb",), smooth=False),
        _kept("softmax", torch.softmax, ("ff", "dd")),
        _kept("cumsum", torch.cumsum, ("ff", "dd", "ii")),
        Operator("matmul", ("fff", "ddd"), _matmul, lambda x, a: torch.matmul(*x), pick=_matmul_ranks),
    )  # fmt: skip


def _expanded(draw: Random, ranks: Sequence[int], leads: Sequence[int]) -> Picks | None:
    found = _axis(draw, ranks, leads)
    return None if found is None else found | {"rank": ranks[0]}
