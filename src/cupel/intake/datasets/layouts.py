"""Which axis of a stored array is what."""

from __future__ import annotations

from typing import Literal

import numpy as np

from cupel.core.errors import DataError

Kind = Literal["images", "series", "features"]
KINDS: dict[str, Kind] = {"NCHW": "images", "NHWC": "images", "NHW": "images", "NF": "features", "NCT": "series"}
_AXES = {"NCHW": (4,), "NHWC": (4,), "NHW": (3,), "NF": (1, 2, 3, 4), "NCT": (2, 3)}
_COLOURS = (1, 3)  # numbers of channels that images usually have


def decide(shape: tuple[int, ...], dtype: np.dtype, unit: bool, declared: str) -> tuple[str, str]:
    """The layout of inputs `[N, ...]`, and the sentence that says how it was found.

    Rules, in this order:
        four axes: the one of axes 1 and 3 that is 1 or 3 long holds the channels; if both are, axis 1 (torch's
        order); if neither is, the shorter one when it is shorter than all other axes; else refused.
        three axes: images `[N, H, W]` if stored as uint8 or bool, or if square, 8 or more wide and within [-1, 1]
        or whole numbers below 256; else series `[N, C, T]`.
        two axes, or one: features.

    Args:
        unit: values lie within [-1, 1], or are whole numbers in 0..255.
        declared: an explicit layout, or `auto`.

    Raises:
        DataError: the axes do not fit what is declared, or cannot be told apart.
    """
    sizes = list(shape)
    if declared != "auto":
        if len(shape) not in _AXES[declared]:
            wanted = " or ".join(str(n) for n in _AXES[declared])
            raise DataError(f"layout {declared} must have {wanted} axes; got {sizes}. Declare another layout.")
        return declared, f"inputs {sizes} laid out as {declared}, as declared"
    if len(shape) == 4:
        return _four(shape, sizes)
    if len(shape) == 3:
        return _three(shape, sizes, dtype, unit)
    if len(shape) in (1, 2):
        return "NF", f"inputs {sizes} read as features, one row for each example (series need layout NCT)"
    raise DataError(
        f"inputs must be images [N, C, H, W], series [N, C, T] or features [N, F]; got {sizes}. "
        "Store them with 2 to 4 axes, examples first."
    )


def _four(shape: tuple[int, ...], sizes: list[int]) -> tuple[str, str]:
    first, last = shape[1] in _COLOURS, shape[3] in _COLOURS
    if first and last:
        return "NCHW", (
            f"inputs {sizes} may be NCHW or NHWC, as axes 1 and 3 could both be channels; "
            f"read as NCHW ({shape[1]} channels); set layout to NHWC if that is wrong"
        )
    if first or last:
        name, channels = ("NCHW", shape[1]) if first else ("NHWC", shape[3])
        axis = 1 if first else 3
        return name, f"inputs {sizes} read as {name}, as axis {axis} is {channels} long"
    if shape[1] < min(shape[2], shape[3]) or shape[3] < min(shape[1], shape[2]):
        name = "NCHW" if shape[1] < shape[3] else "NHWC"
        return name, f"inputs {sizes} read as {name}, as its channel axis is the shortest; set layout if that is wrong"
    raise DataError(
        f"inputs with four axes must show which one holds the channels (1 or 3 long, or the shortest); got {sizes}. "
        "Set layout to NCHW or NHWC."
    )


def _three(shape: tuple[int, ...], sizes: list[int], dtype: np.dtype, unit: bool) -> tuple[str, str]:
    square = shape[1] == shape[2] >= 8 and unit
    if dtype == np.uint8 or dtype == np.bool_ or square:
        why = "square and in the range of pixels" if square else f"stored as {dtype}"
        return "NHW", f"inputs {sizes} read as gray images NHW, as they are {why}; set layout to NCT if they are series"
    return "NCT", (
        f"inputs {sizes} read as series of {shape[1]} channels and {shape[2]} steps (NCT); "
        "set layout to NHW if they are images"
    )


def arrange(x: np.ndarray, layout: str) -> np.ndarray:
    """Stored inputs as `[N, C, H, W]`, `[N, C, T]` or `[N, F]`; a view where that is possible."""
    if layout == "NHWC":
        return x.transpose(0, 3, 1, 2)
    if layout == "NHW" or (layout == "NCT" and x.ndim == 2):
        return x[:, None]
    if layout == "NF":
        return x.reshape(len(x), -1)
    return x
