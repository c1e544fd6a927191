"""A sparse tensor of few distinct values as bytes: values, Huffman-coded choices of them, Huffman-coded gaps."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from cupel.ops import huffman

MOST_VALUES = 256
_TYPES = {torch.float32: "<f4", torch.float64: "<f8", torch.float16: "<f2"}
_CODES = {4: torch.float32, 8: torch.float64, 2: torch.float16}


def gaps(places: Tensor, bits: int) -> Tensor:
    """Rising positions `[R]` as symbols in [0, 2^bits): the zeros passed over before each.

    The highest symbol, t = 2^bits - 1, passes over t zeros and reaches no entry: longer gaps begin with as many of it
    as needed.

    >>> gaps(torch.tensor([0, 3, 11]), 2).tolist()
    [0, 2, 3, 3, 1]
    """
    top = 2**bits - 1
    passed = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    many = passed // top
    ends = (many + 1).cumsum(0) - 1
    made = places.new_full((int(ends[-1]) + 1 if len(ends) else 0,), top)
    made[ends] = passed - many * top
    return made


def places_of(symbols: Tensor, bits: int) -> Tensor:
    """The positions that `gaps` made `symbols` of, int64."""
    top = 2**bits - 1
    reaches = symbols != top
    found: Tensor = (symbols.cumsum(0) + reaches.cumsum(0) - 1)[reaches]
    return found


def codable(weight: Tensor) -> bool:
    """Whether `encode` can write `weight` so that `decode` gives back every bit."""
    flat = weight.detach().flatten()
    if weight.dtype not in _TYPES or not bool(flat.isfinite().all()) or bool(torch.signbit(flat[flat == 0]).any()):
        return False
    return len(flat[flat != 0].unique()) <= MOST_VALUES and weight.ndim < 256


def _trimmed(counts: Tensor) -> Tensor:
    """Code lengths up to the last symbol that occurs."""
    lengths = huffman.code_lengths(counts)
    used = lengths.nonzero().flatten()
    return lengths[: int(used[-1]) + 1] if len(used) else lengths[:0]


def _fewest(places: Tensor) -> tuple[int, Tensor, Tensor]:
    """Bits of a gap that make the fewest bytes, with symbols and code lengths."""
    best: tuple[int, int, Tensor, Tensor] | None = None
    for bits in range(1, 9):
        symbols = gaps(places, bits)
        counts = torch.bincount(symbols, minlength=2**bits)
        lengths = _trimmed(counts)
        size = len(lengths) + int((lengths.long() * counts[: len(lengths)]).sum() + 7) // 8
        if best is None or size < best[0]:
            best = (size, bits, symbols, lengths)
    assert best is not None
    return best[1:]


def encode(weight: Tensor) -> bytes:
    """The bytes of a tensor of at most 256 distinct values other than zero.

    Layout, little endian: bytes a value, number of axes, their lengths, the bits of a gap, and the numbers of distinct
    values, of entries, of gap symbols, of code lengths of gaps and of bytes of choices; the values; the code lengths of
    choices and of gaps, one byte each; both streams.

    Raises:
        ValueError: more distinct values, or one that is not finite, or a negative zero.
    """
    if not codable(weight):
        raise ValueError(f"a coded tensor must have {MOST_VALUES} finite values at most; it has not. Share its values.")
    flat = weight.detach().cpu().flatten()
    places = flat.nonzero().flatten()
    values, chosen = flat[places].unique(return_inverse=True)
    bits, symbols, gap_lengths = _fewest(places)
    value_lengths = huffman.code_lengths(torch.bincount(chosen, minlength=len(values)))
    choices = huffman.encode(chosen, value_lengths)
    head = struct.pack(f"<BB{weight.ndim}IB", weight.element_size(), weight.ndim, *weight.shape, bits)
    head += struct.pack("<HIIHI", len(values), len(places), len(symbols), len(gap_lengths), len(choices))
    lengths = torch.cat([value_lengths, gap_lengths]).numpy().tobytes()
    raw: bytes = values.numpy().astype(_TYPES[weight.dtype]).tobytes()
    return head + raw + lengths + choices + huffman.encode(symbols, gap_lengths)


def decode(data: bytes, shape: torch.Size) -> Tensor:
    """The tensor of `shape` that `encode` wrote, equal bit for bit.

    Raises:
        ValueError: the bytes are cut short, or describe another tensor.
    """
    try:
        width, axes = data[0], data[1]
        if struct.unpack_from(f"<{axes}I", data, 2) != tuple(shape):
            raise ValueError(f"they describe another shape than {tuple(shape)}")
        at = 2 + 4 * axes
        bits, kinds, count, many, tables, size = struct.unpack_from("<BHIIHI", data, at)
        at += struct.calcsize("<BHIIHI")
        dtype, streams = _CODES[width], 8 * (len(data) - at)
        if count > streams or many > streams:  # a code has a bit at least: a header must not ask for memory in vain
            raise ValueError(f"{count} entries and {many} gaps in {len(data)} bytes")
        values = torch.from_numpy(np.frombuffer(data, _TYPES[dtype], kinds, at).astype(_TYPES[dtype][1:]))
        at += kinds * width
        lengths = torch.from_numpy(np.frombuffer(data, np.uint8, kinds + tables, at).copy())
        at += kinds + tables
        choices = huffman.decode(data[at : at + size], lengths[:kinds], count)
        places = places_of(huffman.decode(data[at + size :], lengths[kinds:], many), bits)
        if len(places) != count or (count and int(places[-1]) >= shape.numel()):
            raise ValueError(f"{len(places)} places for {count} entries")
    except (struct.error, IndexError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"coded bytes must be whole; they are not ({error}). Take another copy.") from None
    dense = torch.zeros(shape.numel(), dtype=dtype)
    dense[places] = values[choices]
    return dense.view(shape)
