"""What products of activations, as in attention, do to the labels of channels (see `ops.channels`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cupel.ops.labels import Flow, Held, laid

if TYPE_CHECKING:
    from cupel.ops.channel_rules import Follower


def softmax(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x = f.flow(args[0])
    if args[1] % len(shape) in x.tracked():
        return f.fixed(args, shape)
    return Flow(shape, x.labels, False)


def matmul(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    a, b = f.flow(args[0]), f.flow(args[1])
    if isinstance(args[1], Held) or min(len(a.shape), len(b.shape)) < 2:
        return f.fixed(args, shape)
    if any(d < len(x.shape) - 2 for x in (a, b) for d in x.tracked()):
        return _by_head(f, [a, b], shape, a.zero or b.zero)
    for x, dim in ((a, -1), (a, -2), (b, -2)):  # what the sum runs over, and what a scale may depend on
        if dim % len(x.shape) in x.tracked():
            f.labels.fix(x.labels)
    return laid(shape, -1, f.labels.along(b, -1), b.zero)


def attention(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    q, k, v = (f.flow(a) for a in args[:3])
    if len(args) > 3 and any(isinstance(a, (Flow, Held)) for a in args[3:]):
        return f.fixed(args, shape)
    if any(d < len(x.shape) - 2 for x in (q, k, v) for d in x.tracked()):
        return _by_head(f, [q, k, v], shape, v.zero)
    f.labels.freeze([q, k])
    return laid(shape, -1, f.labels.along(v, -1), v.zero)


def _by_head(f: Follower, factors: Sequence[Flow], shape: tuple[int, ...], zero: bool) -> Flow:
    """Products of matrices side by side: one goes as a whole, from every factor."""
    whole = [f.labels.collapse(f.labels.collapse(x, len(x.shape) - 1), len(x.shape) - 2) for x in factors]
    first = whole[0]
    if any(x.labels is None or x.tracked() != first.tracked() or len(x.shape) != len(shape) for x in whole):
        return f.fixed(factors, shape)
    for x in whole[1:]:
        assert first.labels is not None and x.labels is not None
        f.labels.join(first.labels, x.labels)
    return Flow(shape, first.labels, zero)
