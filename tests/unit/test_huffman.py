"""Huffman coding: optimal lengths, exact round trips, an independent coder, broken streams."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cupel.ops.huffman import code_lengths, decode, encode, mean_length

torch.set_num_threads(1)


def test_lengths_are_optimal_by_exhaustion() -> None:
    for counts in ([5, 1, 1], [10, 7, 3, 2, 1], [1, 1, 1, 1, 1], [100, 1, 1, 1, 1]):
        total = sum(counts)
        best = min(
            sum(c * n for c, n in zip(counts, lengths, strict=True))
            for lengths in itertools.product(range(1, 6), repeat=len(counts))
            if sum(2.0**-n for n in lengths) <= 1  # Kraft: a prefix code exists
        )
        made = code_lengths(torch.tensor(counts))
        assert mean_length(made, torch.tensor(counts)) * total == pytest.approx(best)


def test_mean_length_is_within_one_bit_of_the_entropy() -> None:
    draw = torch.Generator().manual_seed(0)
    for size in (2, 9, 100, 300):
        counts = (torch.rand(size, generator=draw) ** 6 * 1e4).long() + 1
        p = (counts / counts.sum()).double()
        entropy = float(-(p * p.log2()).sum())
        assert entropy <= mean_length(code_lengths(counts), counts) + 1e-9 < entropy + 1


def test_round_trip_is_exact_and_as_long_as_the_lengths() -> None:
    draw = torch.Generator().manual_seed(1)
    for size in (1, 2, 5, 8, 256):
        counts = (torch.rand(size, generator=draw) ** 4 * 1000).long()
        counts[0] += 1
        lengths = code_lengths(counts)
        symbols = torch.multinomial(counts.double(), 3000, replacement=True, generator=draw)
        data = encode(symbols, lengths)
        assert len(data) == math.ceil(int(lengths.long()[symbols].sum()) / 8)
        assert torch.equal(decode(data, lengths, 3000), symbols)
    assert encode(torch.tensor([], dtype=torch.long), lengths) == b"" and len(decode(b"", lengths, 0)) == 0


def test_very_long_codes() -> None:
    counts = [1, 1]
    while len(counts) < 60:
        counts.append(counts[-1] + counts[-2])
    lengths = code_lengths(torch.tensor(counts))
    assert int(lengths.max()) == 59
    symbols = torch.arange(60)
    assert torch.equal(decode(encode(symbols, lengths), lengths, 60), symbols)
    while len(counts) < 70:
        counts.append(counts[-1] + counts[-2])
    with pytest.raises(ValueError, match="at most 62 bits"):
        encode(symbols, code_lengths(torch.tensor(counts)))


def test_codes_are_canonical() -> None:
    # Lengths 1, 3, 2, 3 give the codes 0, 110, 10, 111.
    lengths = torch.tensor([1, 3, 2, 3], dtype=torch.uint8)
    assert encode(torch.tensor([1, 0, 2, 3]), lengths) == bytes([0b11001011, 0b10000000])


def test_equal_to_an_independent_coder() -> None:
    dahuffman = pytest.importorskip("dahuffman", reason="the independent coder dahuffman is not installed")
    draw = torch.Generator().manual_seed(2)
    counts = (torch.rand(40, generator=draw) ** 3 * 500).long() + 1
    theirs = dahuffman.HuffmanCodec.from_frequencies(dict(enumerate(counts.tolist())), eof=0)
    table = theirs.get_code_table()
    wanted = sum(int(counts[k]) * table[k][0] for k in range(40))
    assert mean_length(code_lengths(counts), counts) * float(counts.sum()) == pytest.approx(wanted)


def test_broken_streams_are_refused() -> None:
    lengths = code_lengths(torch.tensor([4, 2, 1, 1, 0]))
    symbols = torch.tensor([0, 1, 2, 3] * 10)
    data = encode(symbols, lengths)
    with pytest.raises(ValueError, match="40 symbols must be in the bytes; only"):
        decode(data[:-2], lengths, 40)
    with pytest.raises(ValueError, match="3 symbols must be in the bytes; only 2 are"):
        decode(b"\xff", lengths, 3)  # 111 111 11: the third code is cut off
    with pytest.raises(ValueError, match="every symbol must have a code; 4 has none"):
        encode(torch.tensor([0, 4]), lengths)
    with pytest.raises(ValueError, match="every symbol must have a code; 7 has none"):
        encode(torch.tensor([7]), lengths)
    with pytest.raises(ValueError, match="must be in the bytes"):
        decode(b"\xff", torch.tensor([1], dtype=torch.uint8), 1)  # its only code is 0
    with pytest.raises(ValueError, match="must form a prefix code"):
        encode(torch.tensor([0]), torch.tensor([1, 1, 1], dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be >= 0"):
        code_lengths(torch.tensor([1, -1]))
