"""Static canonical Huffman coding of small integers to real bytes, and back.

A table is the list of code lengths; the codes follow from it: shorter before longer, equal lengths in
order of the symbol (Schwartz and Kallick 1964). So a table of K symbols is stored in K bytes.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LONGEST = 62  # a window of that many bits fits a signed 64-bit integer


def code_lengths(counts: Tensor) -> Tensor:
    """Bits of every symbol's code when symbol k occurs `counts[k]` times: `[K]` -> `[K]` uint8.

    The mean length under `counts` is the least of all prefix codes (Huffman 1952). A symbol that does
    not occur has no code (length 0); a symbol that occurs alone has one bit. Among equal counts the
    smaller symbol, and a symbol before a joined group, is taken first, so that equal counts always
    give the same table.

    >>> code_lengths(torch.tensor([8, 4, 2, 1, 0])).tolist()
    [1, 2, 3, 3, 0]
    """
    freq = [int(c) for c in counts]
    if any(c < 0 for c in freq):
        raise ValueError(f"counts must be >= 0; got {min(freq)}. Count occurrences.")
    heap: list[tuple[int, int, tuple[int, ...]]] = [(c, k, (k,)) for k, c in enumerate(freq) if c]
    heapq.heapify(heap)
    lengths = [0] * len(freq)
    if len(heap) == 1:
        lengths[heap[0][2][0]] = 1
    order = len(freq)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        joined = first[2] + second[2]
        for k in joined:
            lengths[k] += 1
        heapq.heappush(heap, (first[0] + second[0], order, joined))
        order += 1
    return torch.tensor(lengths, dtype=torch.uint8)


def mean_length(lengths: Tensor, counts: Tensor) -> float:
    """Mean bits a symbol under `counts`; 0 for no symbols."""
    total = float(counts.sum())
    return float((lengths.double() * counts.double()).sum()) / total if total else 0.0


def _book(lengths: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Symbols in order of their codes, and the codes, `[used]` each."""
    size = lengths.cpu().numpy().astype(np.int64)
    symbols = np.array(sorted(np.flatnonzero(size), key=lambda k: (size[k], k)), dtype=np.int64)
    if len(symbols) and size[symbols[-1]] > LONGEST:
        raise ValueError(f"a code must have at most {LONGEST} bits; got {size[symbols[-1]]}. Add one to all counts.")
    codes, code, before = [], 0, 0
    for k in symbols:
        code <<= int(size[k]) - before
        before = int(size[k])
        codes.append(code)
        code += 1
    if code > 1 << before:
        raise ValueError("code lengths must form a prefix code; these are too short. Take them from `code_lengths`.")
    return symbols, np.array(codes, dtype=np.int64)


def encode(symbols: Tensor, lengths: Tensor) -> bytes:
    """The codes of `symbols` `[...]`, one after the other, highest bit first; the last byte ends in zeros.

    Raises:
        ValueError: a symbol without a code.
    """
    flat = symbols.detach().cpu().flatten().numpy().astype(np.int64)
    if not len(flat):
        return b""
    size = lengths.cpu().numpy().astype(np.int64)
    if flat.min() < 0 or flat.max() >= len(size) or not size[flat].all():
        lost = sorted(set(flat.tolist()) - set(np.flatnonzero(size).tolist()))
        raise ValueError(f"every symbol must have a code; {lost[0]} has none. Give it a count when the table is made.")
    used, codes = _book(lengths)
    code = np.zeros(len(size), dtype=np.int64)
    code[used] = codes
    ends = np.cumsum(size[flat])
    which = np.repeat(np.arange(len(flat)), size[flat])  # the symbol that every bit belongs to
    shift = ends[which] - 1 - np.arange(ends[-1])  # bits of that code still to come
    return np.packbits(((code[flat][which] >> shift) & 1).astype(np.uint8)).tobytes()


def decode(data: bytes, lengths: Tensor, count: int) -> Tensor:
    """The `count` symbols that `encode` wrote into `data`, `[count]` int64.

    Raises:
        ValueError: the bytes end before the last symbol does, or hold no code of the table.
    """
    if count == 0:
        return torch.zeros(0, dtype=torch.int64)
    symbols, codes = _book(lengths)
    if not len(symbols):
        raise ValueError("a table must have a code to decode with; it has none. Pass the lengths used by `encode`.")
    size = lengths.cpu().numpy().astype(np.int64)[symbols]
    longest = int(size[-1])
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8)).astype(np.int64)
    padded = np.concatenate([bits, np.zeros(longest, dtype=np.int64)])
    window = np.zeros(len(bits), dtype=np.int64)  # the next `longest` bits from every position
    for i in range(longest):
        window = (window << 1) | padded[i : i + len(bits)]
    first = codes << (longest - size)  # left-justified codes rise with their order
    rank = np.searchsorted(first, window, side="right") - 1
    fits = window < first[rank] + (np.int64(1) << (longest - size[rank]))
    step, valid = size[rank].tolist(), fits.tolist()
    at, found = 0, np.empty(count, dtype=np.int64)
    for i in range(count):
        if at >= len(step) or not valid[at] or at + step[at] > len(step):
            raise ValueError(f"{count} symbols must be in the bytes; only {i} are. Pass all bytes and the same table.")
        found[i] = rank[at]
        at += step[at]
    return torch.from_numpy(symbols[found])
