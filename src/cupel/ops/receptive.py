"""Which part of a map a part of a later map is computed from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

Pair = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """A rectangle of a map: rows `top` to `bottom`, columns `left` to `right`, the ends left out."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def area(self) -> int:
        return self.height * self.width

    def __or__(self, other: Box) -> Box:
        """The smallest box that holds both."""
        return Box(
            min(self.top, other.top),
            max(self.bottom, other.bottom),
            min(self.left, other.left),
            max(self.right, other.right),
        )


@dataclass(frozen=True)
class Window:
    """How a layer slides over a map; all pairs are (rows, columns).

    Args:
        kernel: positions on each axis.
        stride, dilation: steps between outputs, and between positions of the kernel.
        pad: rows above and columns left of the map that the kernel may reach into.
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    pad: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def reach(self) -> Pair:
        """Rows and columns under the kernel, gaps included."""
        (a, b), (d, e) = self.kernel, self.dilation
        return d * (a - 1) + 1, e * (b - 1) + 1

    def under(self, box: Box, size: Pair) -> Box:
        """The part of an input map of `size` that the outputs in `box` read; what lies outside the map is padding.

        >>> Window((3, 3), (2, 2), (1, 1)).under(Box(0, 2, 5, 7), (14, 14))
        Box(top=0, bottom=4, left=9, right=14)
        """
        top, bottom = _span(box.top, box.bottom, self.stride[0], self.pad[0], self.reach[0], size[0])
        left, right = _span(box.left, box.right, self.stride[1], self.pad[1], self.reach[1], size[1])
        return Box(top, bottom, left, right)


def _span(low: int, high: int, stride: int, pad: int, reach: int, size: int) -> Pair:
    first = max(0, low * stride - pad)
    last = min(size, (high - 1) * stride - pad + reach)
    return min(first, size), max(last, min(first, size))


def tiles(size: Pair, count: int) -> list[Box]:
    """`count` x `count` boxes that cover a map of `size` without overlap, sides equal up to one; none is empty."""
    rows, cols = ([side * k // count for k in range(count + 1)] for side in size)
    found = [Box(*row, *col) for row in pairwise(rows) for col in pairwise(cols)]
    return [box for box in found if box.area]


def field_of(windows: Iterable[Window]) -> Pair:
    """Rows and columns of the input that one output of a chain of layers sees, where no border cuts it off.

    >>> field_of([Window((3, 3), (2, 2)), Window((3, 3))])
    (7, 7)
    """
    seen, jump = [1, 1], [1, 1]
    for window in windows:
        for axis in (0, 1):
            seen[axis] += (window.reach[axis] - 1) * jump[axis]
            jump[axis] *= window.stride[axis]
    return seen[0], seen[1]
