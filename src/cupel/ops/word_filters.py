"""Which word may stand in for another: content words, word forms as a stand-in for parts of speech, likeness."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cupel.ops.lexicon import Words

Admit = Callable[[Words, Words, int, Sequence[str]], list[bool]]
"""(the text as it was, as it is now, a place, candidates for it) -> which of them may stand there."""

# Clitics and affixes are told from the letters alone; a stem of two letters or more must be left.
_ARABIC_HEAD = re.compile("([وف]?(?:[بك]?ال|لل))(?=..)|([سي]|سي|[تن])(?=...)")
_ARABIC_TAIL = re.compile("(?<=..)(?:(ات)|([وي]ن|ان)|(وا)|(ة)|(ها|هم|نا|كم|ه|ك)|(ي|ى))$")
_LATIN_TAIL = re.compile(
    "(?<=..)(?:(ing)|(ed)|(ly)|(tion|ness|ment|ity)|(ous|ful|ive|able|ible|less|al|ic)|(er|or)|(est)|(?<!s)(s))$"
)


@lru_cache(maxsize=65536)
def script_of(word: str) -> str:
    """The script of a word of letters; empty for anything else and for mixtures.

    >>> script_of("سلام"), script_of("peace"), script_of("4x"), script_of("!")
    ('ARABIC', 'LATIN', '', '')
    """
    found = {unicodedata.name(c, "?").split()[0] if c.isalpha() else "" for c in word}
    return found.pop() if len(found) == 1 else ""


@lru_cache(maxsize=65536)
def form_of(word: str) -> tuple[str, str]:
    """Head and tail that stand for a word's part of speech: article with its clitics, verb prefix, number, gender.

    >>> form_of("والكتاب"), form_of("المدرسة"), form_of("يكتبون")
    (('وال', ''), ('ال', '4'), ('verb', '2'))
    >>> form_of("walking") == form_of("talking") != form_of("talks")
    True
    """
    script = script_of(word)
    if script == "ARABIC":
        head = _ARABIC_HEAD.match(word)
        first = "" if head is None else head[1] or "verb"
        tail = _ARABIC_TAIL.search(word, len(head[1]) if head is not None and head[1] else 0)
        return first, "" if tail is None else str(tail.lastindex)
    if script == "LATIN":
        ending = _LATIN_TAIL.search(word.lower())
        return "", "" if ending is None else str(ending.lastindex)
    return "", word[-2:]  # of other scripts nothing is known but how a word ends


@dataclass(frozen=True)
class Content:
    """Words that carry the content of a corpus: of its main script, two letters or more, none of the commonest.

    Args:
        counts: how often every word of the corpus that may be swapped occurs.
        common: the commonest words of the script, which stand for stop words.
    """

    script: str
    common: frozenset[str]
    counts: Mapping[str, int]

    def fillers(self, least: int) -> tuple[str, ...]:
        """Words that occur `least` times or more, in the order of the alphabet."""
        return tuple(sorted(w for w, n in self.counts.items() if n >= least))

    def places(self, text: Words) -> list[int]:
        """Places of `text` whose word may be swapped, known in the corpus or not."""
        return [k for k, w in enumerate(text) if len(w) > 1 and w not in self.common and script_of(w) == self.script]


def content_of(texts: Collection[Words], stop: int) -> Content:
    """What is content in a corpus, by its letters and counts alone; its `stop` commonest words are not.

    >>> content_of([("the", "cat", "the", "dog", "!", "!")], 1).fillers(1)
    ('cat', 'dog')
    """
    counts = Counter(w for text in texts for w in text)
    scripts: Counter[str] = Counter()
    for word, count in counts.items():
        scripts[script_of(word)] += count
    main = max(sorted(s for s in scripts if s), key=lambda s: scripts[s], default="")
    own = sorted((w for w in counts if len(w) > 1 and script_of(w) == main), key=lambda w: (-counts[w], w))
    return Content(main, frozenset(own[:stop]), {w: counts[w] for w in own[stop:]})


def same_form(before: Words, now: Words, place: int, candidates: Sequence[str]) -> list[bool]:
    """Another word of the same form as the one that stood there at first."""
    return [w not in (before[place], now[place]) and form_of(w) == form_of(before[place]) for w in candidates]


@dataclass(frozen=True)
class Meanings:
    """Texts as points: TF-IDF, projected on the leading singular directions of a corpus (latent semantic analysis).

    Args:
        number: of every word with a vector.
        vectors: idf times direction, `[V, k]`; the last row, all zeros, is for other words.
        least: smallest cosine that two texts may have to count as alike.
    """

    number: dict[str, int]
    vectors: Tensor
    least: float = 0.8

    def point(self, text: Words) -> Tensor:
        """Sum of the words' vectors, `[k]`."""
        rows = [self.number.get(w, len(self.number)) for w in text]
        return self.vectors[rows].sum(0)

    def cosine(self, before: Words, now: Words) -> float:
        """Likeness of two texts in [-1, 1]; 1 for two without a known word."""
        return float(_cosines(self.point(before), self.point(now)[None])[0])

    def __call__(self, before: Words, now: Words, place: int, candidates: Sequence[str]) -> list[bool]:
        if not candidates:
            return []
        rows = [self.number.get(w, len(self.number)) for w in (now[place], *candidates)]
        moved = self.point(now) - self.vectors[rows[0]] + self.vectors[rows[1:]]  # [C, k]
        alike: list[bool] = (_cosines(self.point(before), moved) >= self.least).tolist()
        return alike


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of `a` `[k]` with the rows of `b` `[C, k]`; 1 where both are zero."""
    size = a.norm() * b.norm(dim=1)
    return torch.where((a.norm() + b.norm(dim=1)) < 1e-6, torch.ones_like(size), (b @ a) / size.clamp_min(1e-12))


def meanings(texts: Collection[Words], rank: int, least: float, draw: torch.Generator, rounds: int = 4) -> Meanings:
    """The corpus's leading directions by subspace iteration on A^T A, A the TF-IDF table with rows of length 1.

    Source: Deerwester et al., Indexing by Latent Semantic Analysis, JASIS 41, 1990; Halko, Martinsson and Tropp, SIAM
    Review 53, 2011, algorithm 4.4.
    """
    spread = Counter(w for text in texts for w in set(text))
    number = {w: k for k, w in enumerate(sorted(w for w in spread if spread[w] > 1))}
    idf = torch.tensor([math.log(len(texts) / spread[w]) + 1 for w in number])
    table = _table(texts, number, idf)
    basis = torch.randn(len(number), min(rank, len(number)), generator=draw)
    for _ in range(rounds):
        basis = torch.linalg.qr(table.t() @ (table @ basis)).Q
    return Meanings(number, torch.cat([idf[:, None] * basis, basis.new_zeros(1, basis.shape[1])]), least)


def _table(texts: Collection[Words], number: dict[str, int], idf: Tensor) -> Tensor:
    """TF-IDF with rows of length 1 as a sparse `[N, V]`."""
    cells = [(r, number[w], c) for r, t in enumerate(texts) for w, c in Counter(t).items() if w in number]
    at = torch.tensor([cell[:2] for cell in cells], dtype=torch.long).reshape(-1, 2).T
    value = torch.tensor([float(cell[2]) for cell in cells]) * idf[at[1]]
    length = torch.zeros(len(texts)).index_add(0, at[0], value.square()).sqrt()
    shape = (len(texts), len(number))
    return torch.sparse_coo_tensor(at, value / length[at[0]], shape, check_invariants=False).coalesce()


def both(*admits: Admit) -> Admit:
    """A candidate passes when every filter lets it; later filters see only what passed before."""

    def admit(before: Words, now: Words, place: int, candidates: Sequence[str]) -> list[bool]:
        left = list(range(len(candidates)))
        for one in admits:
            says = one(before, now, place, [candidates[k] for k in left])
            left = [k for k, yes in zip(left, says, strict=True) if yes]
        return [k in set(left) for k in range(len(candidates))]

    return admit
