"""A masked language model over whole words: trained on a corpus, it proposes words for a place in a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import derive, global_seed
from cupel.core.fit import fit
from cupel.core.types import Batch, Budget, TrainView, digest, still
from cupel.ops.lexicon import Words

PAD, OTHER, BLANK = 0, 1, 2  # padding, a word without a number, the mask
NONE = -100  # target of a blank that is not asked for


class BlankFiller(nn.Module):
    """A transformer encoder that scores words for blanks.

    Shapes: `tokens` `[B, T]`, `at` `[B, M]` (places of blanks) -> logits `[B, M, V]`.
    """

    def __init__(self, vocabulary: int, width: int, dim: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim, padding_idx=PAD)
        self.place = nn.Parameter(torch.randn(width, dim) * 0.02)
        block = nn.TransformerEncoderLayer(dim, heads, 2 * dim, 0.1, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(block, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.embed.weight, std=dim**-0.5)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        tokens, at = inputs["tokens"], inputs["at"]
        z = self.embed(tokens) * self.embed.embedding_dim**0.5 + self.place[: tokens.shape[1]]
        states = self.body(z, src_key_padding_mask=tokens.eq(PAD))  # [B, T, D]
        asked = states.gather(1, at[..., None].expand(-1, -1, states.shape[2]))  # [B, M, D]
        return F.linear(asked, self.embed.weight, self.bias)


@dataclass(frozen=True)
class Blanks:
    """Texts with about one word in seven, at most `count`, blanked anew in every pass.

    Texts of a batch are of much the same length, so little padding is computed.

    Shapes: tokens `[N, T]`; targets `[B, count]`, `NONE` where a text has fewer blanks.
    """

    tokens: Tensor
    count: int = 3

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        return digest(self.tokens)

    def batches(self, size: int, draw: torch.Generator | None = None) -> Iterator[Batch]:
        draw = torch.Generator().manual_seed(0) if draw is None else draw
        order, longest = torch.randperm(len(self), generator=draw), self.tokens.ne(PAD).sum(1)
        pools = (pool[longest[pool].argsort(stable=True)] for pool in order.split(8 * size))  # alike in length
        for rows in (part for pool in pools for part in pool.split(size)):
            tokens = self.tokens[rows, : max(int(longest[rows].max()), 1)]
            chance = torch.rand(tokens.shape, generator=draw).masked_fill(tokens <= BLANK, -1.0)
            at = chance.topk(min(self.count, tokens.shape[1]), dim=1).indices
            few = tokens.gt(BLANK).sum(1, keepdim=True).add(6) // 7
            targets = tokens.gather(1, at).masked_fill(torch.arange(at.shape[1]) >= few, NONE)
            blanked = tokens.scatter(1, at, torch.where(targets == NONE, tokens.gather(1, at), BLANK))
            yield Batch({"tokens": blanked, "at": at}, targets, rows)


@dataclass(frozen=True)
class Blanked:
    """Which word stood there: cross-entropy at the blanks."""

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        each = F.cross_entropy(out.flatten(0, 1), batch.targets.flatten(), reduction="none", ignore_index=NONE)
        return each.view_as(batch.targets).sum(1) / batch.targets.ne(NONE).sum(1).clamp_min(1)

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        wanted = batch.targets.flatten()
        total = F.cross_entropy(out.flatten(0, 1), wanted, ignore_index=NONE, reduction="sum")
        return total / wanted.ne(NONE).sum().clamp_min(1)

    def predict(self, out: Tensor) -> Tensor:
        return out.argmax(-1)

    def scores(self, out: Tensor) -> Tensor:
        return out.softmax(-1)


@dataclass(frozen=True)
class WordModel:
    """A trained filler of blanks with the numbers of its words."""

    net: BlankFiller
    numbers: Mapping[str, int]
    width: int

    def tokens(self, texts: Sequence[Words]) -> Tensor:
        return _tokens(texts, self.numbers, self.width)

    def likely(self, texts: Sequence[Words], places: Sequence[int], allowed: Collection[str], most: int) -> list[Words]:
        """The `most` likeliest of the `allowed` words for one place of every text, best first, never the one there."""
        if not texts:
            return []
        tokens = self.tokens(texts)
        at = torch.tensor(places).clamp_max(self.width - 1)[:, None]
        words = {n: w for w, n in self.numbers.items() if w in allowed}
        shut = torch.ones(len(self.net.bias), dtype=torch.bool)
        shut[list(words)] = False
        there = tokens.gather(1, at)
        logits = self.logits(tokens.scatter(1, at, BLANK), at).masked_fill(shut, -torch.inf)
        best = logits.scatter(1, there, -torch.inf).topk(min(most, len(words)), dim=1)
        rows = zip(best.indices.tolist(), best.values.isfinite().tolist(), strict=True)
        return [tuple(words[n] for n, fine in zip(row, ok, strict=True) if fine) for row, ok in rows]

    def logits(self, blanked: Tensor, at: Tensor) -> Tensor:
        """Scores of all words at one blank a text: `[N, T]`, `[N, 1]` -> `[N, V]`."""
        with still(self.net) as net, torch.no_grad():
            parts = [net({"tokens": t, "at": a})[:, 0] for t, a in zip(blanked.split(256), at.split(256), strict=True)]
        return torch.cat(parts)


def _tokens(texts: Sequence[Words], numbers: Mapping[str, int], width: int) -> Tensor:
    found = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        own = [numbers.get(w, OTHER) for w in text[:width]]
        found[row, : len(own)] = torch.tensor(own, dtype=torch.long)
    return found


def word_model(
    texts: Sequence[Words],
    least: int = 3,
    dim: int = 128,
    layers: int = 2,
    epochs: int = 4,
    batch: int = 64,
    seed: int = 0,
) -> WordModel:
    """Learn to fill blanks in `texts`; words that occur fewer than `least` times share one number.

    Source: Devlin et al., BERT, NAACL 2019, arXiv 1810.04805, section 3.1.

    Departs: words in place of word pieces; every chosen word is blanked, because blanks are all it is asked about.
    """
    counts = Counter(w for t in texts for w in t)
    known = sorted((w for w in counts if counts[w] >= least), key=lambda w: (-counts[w], w))
    numbers = {w: k for k, w in enumerate(known, start=BLANK + 1)}
    width = max((len(t) for t in texts), default=1)
    with global_seed(derive(seed, "blank-filler")):
        net = BlankFiller(len(numbers) + BLANK + 1, width, dim, layers)
    data = Blanks(_tokens(texts, numbers, width))
    budget = Budget(epochs=epochs, batch_size=batch, optimizer="adamw", lr=2e-3, weight_decay=0.01, schedule="cosine")
    fit(net, TrainView(data, data), Blanked(), budget=budget, seed=seed)
    return WordModel(net, numbers, width)
