"""Arrays that a probe shows as pictures: 8 bits a value, base64, so that a page of them stays small."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from cupel.report.words import spoken

_SIGNED = ("map", "attribution", "gradient", "change", "trigger", "saliency")
_MOST = 64 * 64  # values in a plane; more than that is thinned out


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def depth(value: Any) -> int | None:
    """How many list levels a rectangular array of numbers (or nulls) has; None where it is not one.

    >>> depth([[1, 2], [3, None]]), depth([[1, 2], [3]]), depth(["a"]), depth(2.0)
    (2, None, None, 0)
    """
    if value is None or is_number(value):
        return 0
    if not isinstance(value, list) or not value:
        return None
    below = {depth(v) for v in value}
    even = len({len(v) for v in value if isinstance(v, list)}) <= 1
    return below.pop() + 1 if len(below) == 1 and even and None not in below else None  # type: ignore[operator]


def is_picture(value: Any) -> bool:
    """`[C, H, W]` or `[H, W]` with more than a few lines, or a series `[C, T]` or `[T]` of some length."""
    levels = depth(value)
    if levels == 3:
        return len(value[0]) > 1 and len(value[0][0]) > 1
    if levels == 2:
        return len(value[0]) > 3
    return levels == 1 and len(value) > 7


def picture(key: str, value: Any, span: tuple[float, float]) -> dict[str, Any]:
    """One picture for the page: pixels for an image, lines for a series."""
    levels = depth(value)
    if levels == 1 or (levels == 2 and (len(value) < 4 or len(value[0]) > 8 * len(value))):
        rows = [value] if levels == 1 else value
        return {"name": spoken(key), "lines": [[None if v is None else float(f"{v:.4g}") for v in row] for row in rows]}
    planes = [value] if levels == 2 else value
    if len(planes) not in (1, 3):
        planes = [[[_mean(vs) for vs in zip(*lines, strict=True)] for lines in zip(*planes, strict=True)]]
    step = 1
    while len(planes[0]) * len(planes[0][0]) > _MOST * step * step:
        step += 1
    planes = [[line[::step] for line in plane[::step]] for plane in planes]
    signed = any(word in key for word in _SIGNED)
    low, high = _even(planes) if signed else span
    return {
        "name": spoken(key), "width": len(planes[0][0]), "height": len(planes[0]), "channels": len(planes),
        "signed": signed, "low": float(f"{low:.4g}"), "high": float(f"{high:.4g}"), "bytes": _packed(planes, low, high),
    }  # fmt: skip


def span_of(items: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """One grey scale for all pictures that are compared: 0 to 1 where it holds them."""
    shown = [x for i in items for k, x in i.items() if is_picture(x) and not any(w in k for w in _SIGNED)]
    seen = [v for x in shown for v in flat(x)]
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def flat(value: Any) -> list[float]:
    """All numbers of a nested list."""
    if isinstance(value, list):
        return [v for part in value for v in flat(part)]
    return [float(value)] if is_number(value) else []


def _mean(values: Sequence[float | None]) -> float:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else 0.0


def _even(planes: Any) -> tuple[float, float]:
    most = max((abs(v) for v in flat(planes)), default=0.0) or 1.0
    return -most, most


def _packed(planes: Any, low: float, high: float) -> str:
    """`[C, H, W]` as bytes, channel last, as a canvas wants them."""
    scale = 255 / ((high - low) or 1.0)
    values = (v for lines in zip(*planes, strict=True) for pixel in zip(*lines, strict=True) for v in pixel)
    return base64.b64encode(bytes(max(0, min(255, round(((v or 0.0) - low) * scale))) for v in values)).decode()
