"""Calls of torch's functions with random sizes that fit: what a test suite would do, for rules to be inferred from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Make = Callable[[Callable[[int, int], int]], tuple[tuple[Any, ...], dict[str, Any]]]


def t(*shape: int) -> Tensor:
    return torch.ones(shape)


def _conv(rank: int, grouped: bool = False) -> Make:
    def make(n: Callable[[int, int], int]) -> Any:
        k, s, p = n(1, 3), n(1, 3), n(0, 2)
        c, o = n(1, 5), n(1, 5)
        x, w = t(n(1, 3), c, *(n(4, 9) for _ in range(rank))), t(o, c, *[k] * rank)
        return (x, w), {"stride": s, "padding": p} | ({"dilation": 1 + (k < 3)} if grouped else {})

    return make


def _pool(rank: int) -> Make:
    def make(n: Callable[[int, int], int]) -> Any:
        k = n(2, 4)
        x = t(n(1, 3), n(1, 4), *(n(4, 9) for _ in range(rank)))
        return (x,), {"kernel_size": k, "stride": n(1, 3), "padding": n(0, k // 2)}

    return make


def _same(count: int, rank: int, **kwargs: Any) -> Make:
    def make(n: Callable[[int, int], int]) -> Any:
        shape = [n(1, 7) for _ in range(rank)]
        return tuple(t(*shape) for _ in range(count)), dict(kwargs)

    return make


def _matrix(n: Callable[[int, int], int]) -> Any:
    a, b, c = n(1, 7), n(1, 7), n(1, 7)
    return (t(a, b), t(b, c)), {}


def _batched(n: Callable[[int, int], int]) -> Any:
    a, b, c, d = n(1, 4), n(1, 7), n(1, 7), n(1, 7)
    return (t(d, a, b), t(d, b, c)), {}


def _narrow(n: Callable[[int, int], int]) -> Any:
    size = n(3, 9)
    begin = n(0, size - 2)
    return (t(n(1, 5), size),), {"dim": 1, "start": begin, "length": n(1, size - begin)}


def _fold(n: Callable[[int, int], int]) -> Any:
    k, h, w = n(1, 3), n(3, 6), n(3, 6)
    blocks = (h - k + 1) * (w - k + 1)
    return (t(n(1, 3), n(1, 3) * k * k, blocks),), {"output_size": (h, w), "kernel_size": (k, k)}


def _linear(n: Callable[[int, int], int]) -> Any:
    i, o = n(1, 7), n(1, 7)
    return (t(n(1, 5), i), t(o, i), t(o)), {}


def _cat(rank: int, dim: int) -> Make:
    def make(n: Callable[[int, int], int]) -> Any:
        shape = [n(1, 6) for _ in range(rank)]
        other = [n(1, 6) if d == dim else s for d, s in enumerate(shape)]
        return ([t(*shape), t(*other)],), {"dim": dim}

    return make


def _cat_list(rank: int, dim: int) -> Make:
    def make(n: Callable[[int, int], int]) -> Any:
        (tensors,), _ = _cat(rank, dim)(n)
        return (tensors,), {}

    return make


def _baddbmm(n: Callable[[int, int], int]) -> Any:
    a, b, c, d = (n(1, 5) for _ in range(4))
    return (t(a, b, d), t(a, b, c), t(a, c, d)), {}


def _addmm(n: Callable[[int, int], int]) -> Any:
    a, b, c = (n(1, 6) for _ in range(3))
    return (t(a, c), t(a, b), t(b, c)), {}


def _shuffle(n: Callable[[int, int], int]) -> Any:
    r = n(1, 3)
    return (t(n(1, 3), n(1, 3) * r * r, n(1, 5), n(1, 5)), r), {}


def _unshuffle(n: Callable[[int, int], int]) -> Any:
    r = n(1, 3)
    return (t(n(1, 3), n(1, 4), n(1, 3) * r, n(1, 3) * r), r), {}


def _of(*ranges: tuple[int, int], **numbers: Any) -> Make:
    """One tensor with sizes in ranges; numbers: a range each, or a constant."""

    def make(n: Callable[[int, int], int]) -> Any:
        kwargs = {
            k: n(*v) if isinstance(v, tuple) and len(v) == 2 and k not in ("dims", "size") else v
            for k, v in numbers.items()
        }
        return (t(*(n(*r) for r in ranges)),), kwargs

    return make


A, B = (1, 7), (4, 9)
CALLS: Mapping[str, tuple[Callable[..., Any], Make]] = {
    "conv1d": (F.conv1d, _conv(1)), "conv2d": (F.conv2d, _conv(2)), "max_pool1d": (F.max_pool1d, _pool(1)),
    "avg_pool1d": (F.avg_pool1d, _pool(1)), "max_pool2d": (F.max_pool2d, _pool(2)),
    "avg_pool2d": (F.avg_pool2d, _pool(2)), "lp_pool1d": (F.lp_pool1d, _of((1, 4), (4, 9), norm_type=2.0, kernel_size=(1, 4))),  # noqa: E501
    "linear": (F.linear, _linear), "mm": (torch.mm, _matrix), "bmm": (torch.bmm, _batched),
    "addmm": (torch.addmm, _addmm), "baddbmm": (torch.baddbmm, _baddbmm), "outer": (torch.outer, _same(2, 1)),
    "kron": (torch.kron, lambda n: ((t(n(1, 5), n(1, 5)), t(n(1, 5), n(1, 5))), {})),
    "dot": (torch.dot, _same(2, 1)), "mv": (torch.mv, lambda n: ((lambda a, b: (t(a, b), t(b)))(n(1, 7), n(1, 7)), {})),
    "cdist": (torch.cdist, lambda n: ((lambda a, b, c: (t(a, c), t(b, c)))(n(1, 7), n(1, 7), n(1, 7)), {})),
    "cross": (torch.cross, lambda n: ((lambda a: (t(a, 3), t(a, 3)))(n(1, 7)), {"dim": 1})),
    "cat": (torch.cat, _cat(2, 1)), "hstack": (torch.hstack, _cat_list(2, 1)),
    "vstack": (torch.vstack, _cat_list(2, 0)),
    "stack": (torch.stack, lambda n: ((lambda a, b: ([t(a, b), t(a, b)],))(n(1, 6), n(1, 6)), {"dim": 1})),
    "narrow": (torch.narrow, _narrow), "fold": (F.fold, _fold),
    "unfold": (F.unfold, _of((1, 3), (1, 3), B, B, kernel_size=(1, 3), stride=(1, 2), padding=(0, 1))),
    "pad1": (F.pad, lambda n: ((t(n(1, 5), n(1, 6)), [n(0, 3), n(0, 3)]), {})),
    "pad2": (F.pad, lambda n: ((t(n(1, 5), n(2, 6), n(2, 6)), [n(0, 3), n(0, 3), n(0, 3), n(0, 3)]), {})),
    "pad_reflect": (F.pad, lambda n: ((t(n(1, 3), n(4, 8)), [n(0, 3), n(0, 3)]), {"mode": "reflect"})),
    "interpolate": (F.interpolate, _of((1, 3), (1, 3), (2, 6), (2, 6), size=(2, 6))),
    "adaptive_avg_pool1d": (F.adaptive_avg_pool1d, _of((1, 4), (1, 4), (2, 9), output_size=(1, 6))),
    "adaptive_max_pool2d": (F.adaptive_max_pool2d, _of((1, 3), (1, 3), (2, 9), (2, 9), output_size=(1, 6))),
    "pixel_shuffle": (F.pixel_shuffle, _shuffle), "pixel_unshuffle": (F.pixel_unshuffle, _unshuffle),
    "channel_shuffle": (F.channel_shuffle, lambda n: ((lambda g: (t(n(1, 3), g * n(1, 3), 2, 2), g))(n(1, 4)), {})),
    "local_response_norm": (F.local_response_norm, _of((1, 3), (1, 6), (1, 6), size=3)),
    "glu": (F.glu, lambda n: ((t(n(1, 6), 2 * n(1, 5)),), {"dim": 1})),
    "layer_norm": (F.layer_norm, lambda n: ((lambda d: (t(n(1, 5), d), [d]))(n(2, 7)), {})),
    "batch_norm": (F.batch_norm, lambda n: ((lambda c: (t(n(1, 4), c, n(1, 5)), t(c), t(c)))(n(1, 6)), {})),
    "prelu": (F.prelu, lambda n: ((lambda c: (t(n(1, 4), c, n(1, 5)), t(c)))(n(2, 6)), {})),
    "bilinear": (F.bilinear, lambda n: ((lambda b, i, j, o: (t(b, i), t(b, j), t(o, i, j)))(n(1, 4), n(1, 5), n(1, 5), n(1, 5)), {})),  # noqa: E501
    "cosine_similarity": (F.cosine_similarity, _same(2, 2)), "pairwise_distance": (F.pairwise_distance, _same(2, 2)),
    "softmin": (F.softmin, _of(A, A, dim=1)), "log_softmax": (F.log_softmax, _of(A, A, dim=1)),
    "normalize": (F.normalize, _of(A, A)), "addcmul": (torch.addcmul, _same(3, 2)), "lerp": (torch.lerp, _same(3, 2)),
    "atan2": (torch.atan2, _same(2, 2)), "hypot": (torch.hypot, _same(2, 2)), "fmod": (torch.fmod, _same(2, 2)),
    "copysign": (torch.copysign, _same(2, 2)), "tril": (torch.tril, _of(A, A, diagonal=(0, 3))),
    "triu": (torch.triu, _of(A, A, diagonal=(0, 3))), "diag_embed": (torch.diag_embed, _of(A, A)),
    "diagonal": (torch.diagonal, _of(A, A, offset=0)), "diff": (torch.diff, _of(A, (3, 9), n=(1, 2), dim=1)),
    "rot90": (torch.rot90, _of(A, A)), "fliplr": (torch.fliplr, _of(A, A)), "movedim": (torch.movedim, lambda n: ((t(n(1, 5), n(1, 5), n(1, 5)),), {"source": 0, "destination": 2})),  # noqa: E501
    "repeat_interleave": (torch.repeat_interleave, _of(A, A, repeats=(1, 4), dim=1)),
    "tile": (torch.tile, lambda n: ((t(n(1, 5), n(1, 5)), (n(1, 3), n(1, 3))), {})),
    "broadcast_to": (torch.broadcast_to, lambda n: ((lambda a, b: (t(1, b), (a, b)))(n(1, 6), n(2, 6)), {})),
    "unflatten": (torch.unflatten, lambda n: ((lambda a, b: (t(n(1, 4), a * b), 1, (a, b)))(n(1, 4), n(1, 4)), {})),
    "reshape2": (torch.reshape, lambda n: ((lambda a, b, c: (t(a * b, c), (a, b * c)))(n(1, 4), n(1, 4), n(1, 4)), {})),
    "logsumexp": (torch.logsumexp, _of(A, A, dim=1)), "cumprod": (torch.cumprod, _of(A, A, dim=1)),
    "var": (torch.var, _of(A, (2, 7), dim=1)), "amin": (torch.amin, _of(A, A, dim=1)), "sinc": (torch.sinc, _of(A, A)),
    "erf": (torch.erf, _of(A, A)), "expm1": (torch.expm1, _of(A, A)), "log1p": (torch.log1p, _of(A, A)),
    "trunc": (torch.trunc, _of(A, A)), "softplus": (F.softplus, _of(A, A)), "mish": (F.mish, _of(A, A)),
    "hardswish": (F.hardswish, _of(A, A)), "selu": (F.selu, _of(A, A)), "elu": (F.elu, _of(A, A)),
    "tanhshrink": (F.tanhshrink, _of(A, A)), "logaddexp": (torch.logaddexp, _same(2, 2)),
    "unsqueeze3": (torch.unsqueeze, _of(A, A, dim=1)), "index_pool": (F.max_pool2d, _of((1, 3), (1, 3), B, B, kernel_size=(1, 4))),  # noqa: E501
}  # fmt: skip


def draw_call(name: str, draw: Random) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """One random call of a name that fits, with its arguments."""
    function, make = CALLS[name]
    args, kwargs = make(draw.randint)
    return function, args, kwargs


def run_seeds(draw: Random, each: int = 5) -> int:
    """Every call `each` times with random sizes; how many ran."""
    ran = 0
    for name in CALLS:
        for _ in range(each):
            function, args, kwargs = draw_call(name, draw)
            function(*args, **kwargs)
            ran += 1
    return ran


def functions() -> dict[str, Callable[..., Any]]:
    """The functions that are called, each once, by name."""
    return {getattr(function, "__name__", name): function for name, (function, _) in CALLS.items()}
