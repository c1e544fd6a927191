"""Small classifiers of texts as word numbers, 0 for padding: convolutions, two-way recurrence, parts of words."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cupel.nets.multi_task import MeanPool


class TextCNN(nn.Module):
    """Convolutions of several widths over word vectors, each at its largest place, then a linear head.

    Shapes: int64 `[B, T]` -> logits `[B, K]`; places that hold padding alone count like any other, as in Kim 2014.
    """

    def __init__(
        self, vocabulary: int, dim: int, hidden: int, classes: int, dropout: float, widths: Sequence[int] = (2, 3, 4)
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(dim, hidden, w, padding=w - 1) for w in widths)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(hidden * len(widths), classes)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x).transpose(1, 2)  # [B, D, T]
        peaks = [self.relu(conv(z).amax(2)) for conv in self.convs]
        logits: Tensor = self.head(self.drop(torch.cat(peaks, 1)))
        return logits


class BiLSTM(nn.Module):
    """A recurrent network in both directions; its states at their largest place among the words, then a linear head.

    The width is fixed, so a row's padding, and with it its answer, is the same in every batch.

    Shapes: int64 `[B, T]` -> logits `[B, K]`.
    """

    def __init__(self, vocabulary: int, dim: int, hidden: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.lstm = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.drop(self.embed(x)))  # [B, T, 2H]
        best = states.masked_fill(x.eq(0).unsqueeze(2), -1.0).amax(1)  # a state is above -1
        logits: Tensor = self.head(self.drop(best))
        return logits


def parts_of_words(numbers: Mapping[str, int], buckets: int, most: int = 16) -> Tensor:
    """Numbers 1..buckets of the three- and four-letter parts of `<word>`, `[V, most]`, 0 for none.

    >>> (parts_of_words({"ab": 1}, 100)[1] > 0).sum().item()  # <ab, ab>, <ab>
    3
    """
    table = torch.zeros(max(numbers.values(), default=0) + 1, most, dtype=torch.long)
    for word, number in numbers.items():
        marked = f"<{word}>"
        parts = [marked[k : k + n] for n in (3, 4) for k in range(len(marked) - n + 1)][:most]
        found = [1 + zlib.crc32(part.encode()) % buckets for part in parts]
        table[number, : len(found)] = torch.tensor(found, dtype=torch.long)
    return table


class SubwordLinear(nn.Module):
    """The mean of the vectors of words and of their parts, then a linear head.

    Shapes: int64 `[B, T]` -> logits `[B, K]`.
    """

    parts: Tensor  # [V, P]

    def __init__(self, parts: Tensor, vocabulary: int, buckets: int, dim: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.pieces = nn.Embedding(buckets + 1, dim, padding_idx=0)
        self.pool = MeanPool()
        self.head = nn.Linear(dim, classes)
        table = torch.zeros(vocabulary, parts.shape[1], dtype=torch.long)
        table[: len(parts)] = parts
        self.register_buffer("parts", table)
        with torch.no_grad():
            for layer in (self.embed, self.pieces):
                layer.weight.div_(dim)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.parts[x].flatten(1)  # [B, T * P]
        vectors = torch.cat([self.embed(x), self.pieces(pieces)], 1)
        logits: Tensor = self.head(self.pool(vectors, torch.cat([x, pieces], 1)))
        return logits
