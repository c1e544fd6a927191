"""How a workload's texts become its network's inputs, so that a method can change words and ask again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Words = tuple[str, ...]


@dataclass(frozen=True)
class Lexicon:
    """Words and their numbers, and the words of every example.

    Args:
        numbers: of words (and, where `pairs`, of two neighbours joined by a blank); 0 is padding.
        texts: words of every example by its index, all parts, words without a number included.
        width: columns for words.
        unknown: number of any other word; 0 leaves it out.
        lead: columns before the words, such as the number of a task; they stay with the example.
        pairs: whether the numbers of known pairs follow those of the words.
    """

    numbers: Mapping[str, int]
    texts: Mapping[int, Words]
    width: int
    unknown: int = 0
    lead: int = 0
    pairs: bool = False

    def row(self, words: Words) -> list[int]:
        """The numbers of one text, not yet padded.

        >>> Lexicon({"so": 1, "good": 2, "so good": 3}, {}, 8, pairs=True).row(("so", "very", "good", "so", "good"))
        [1, 2, 1, 2, 3]
        """
        get = self.numbers.get
        found = [get(w, self.unknown) for w in words]
        if self.pairs:
            found += [get(f"{a} {b}", 0) for a, b in pairwise(words)]
        return [n for n in found if n][: self.width]

    def render(self, texts: Sequence[Words], leads: Tensor) -> Tensor:
        """Inputs of texts: `leads` `[N, lead]` -> int64 `[N, lead + width]`."""
        rows = [self.row(words) for words in texts]
        found = torch.zeros(len(rows), self.width, dtype=torch.long)
        for place, row in enumerate(rows):
            found[place, : len(row)] = torch.tensor(row, dtype=torch.long)
        return torch.cat([leads.to(torch.long), found], 1)
