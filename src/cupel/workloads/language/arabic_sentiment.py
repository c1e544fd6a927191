"""Workload `arabic-sentiment`: Arabic tweets that are negative, neutral or positive, told by their words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.shelf import LEXICON, Shelf
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Budget, Examples, Splits, Subject
from cupel.data.sets import load
from cupel.data.tweets import CLASSES, Told, numbered, told_tweets
from cupel.nets.text import BiLSTM, SubwordLinear, TextCNN, parts_of_words
from cupel.ops.lexicon import Lexicon

CARD = Card(
    name="arabic-sentiment",
    family="language",
    source="data: I. Abu Farha, W. Magdy, From Arabic Sentiment Analysis to Sarcasm Detection: The ArSarcasm Dataset, "
    "OSACT 2020; networks: Y. Kim, Convolutional Neural Networks for Sentence Classification, EMNLP 2014, arXiv "
    "1408.5882; A. Graves, J. Schmidhuber, Framewise phoneme classification with bidirectional LSTM, Neural Networks "
    "18, 2005; P. Bojanowski et al., Enriching Word Vectors with Subword Information, TACL 2017, arXiv 1607.04606",
    tags=("text", "arabic", "sentiment", "tweets", "textcnn", "lstm", "subword", "small"),
    gives=("weights", "gradients", "members", "classes", "words"),
    writes=("lexicon",),
    expects="not published for this split without pre-trained vectors; the largest class is 0.51 of the test part",
    tiny={"dim": 8, "hidden": 8, "words": 12, "vocabulary": 512, "examples": 64, "dropout": 0.0},
)


@dataclass(frozen=True)
class ArabicSentiment:
    r"""Tell the sentiment of Arabic tweets from their words.

    textcnn: h = max over places of relu(W_w * e + b_w) for windows of 2, 3 and 4 words; bilstm: h = max over words of
    the states of both directions; subword: h = mean of the vectors of the words and of their three- and four-letter
    parts. Logits: W h + b. Words are cut as they stand, with their clitics; vowel signs are left out and the forms of
    alef are one letter; names, links and numbers each stand as one sign.

    Use: for methods on text in another script than Latin, and for attacks that swap words. Not for the best accuracy:
    there are no pre-trained vectors.

    Costs: some 0.7 million weights, nearly all of them in the embedding; a fit takes 10 to 30 s on one core.

    Shapes: inputs int64 `[B, words]`, 0 for padding, 1 for a word that is not in the vocabulary; targets `[B]`;
    logits `[B, 3]`.

    Raises:
        MissingData: the tweets are not on this machine, or broken.

    Source: Abu Farha and Magdy 2020 for the data and their test part; Kim 2014; Graves and Schmidhuber 2005;
    Bojanowski et al. 2017.

    Departs: 10% of the training part validate, and a tweet that also stands in a later part is left out of the
    earlier one; vectors start at random; no L2 limit on the head (Kim); a recurrent network reads the padding too.
    The subword network knows parts of words in the vocabulary alone.

    Example:
        >>> ArabicSentiment(network="bilstm").words
        32
    """

    network: str = param("textcnn", "which classifier", choices=("textcnn", "bilstm", "subword"))
    words: int = param(32, "most words of a tweet", ge=4, le=128)
    vocabulary: int = param(12000, "most frequent words of the training part that have a vector", ge=16, le=1048576)
    dim: int = param(64, "length of a word's vector", ge=1, le=1024)
    hidden: int = param(64, "filters of each width, or units of each direction", ge=1, le=1024)
    dropout: float = param(0.5, "share of features dropped in training", ge=0, lt=1)
    examples: int = param(0, "most tweets of each part (0: all)", ge=0)
    data_seed: int = param(0, "which tweets validate", ge=0)

    def build(self, ctx: Context) -> Subject:
        told = told_tweets(load("arsarcasm"), self.words, self.examples, self.data_seed)
        numbers = numbered((t.words for t in told["train"]), self.vocabulary)
        texts = {t.index: t.words for part in told.values() for t in part}
        lexicon = Lexicon(numbers, texts, self.words, unknown=1)
        with ctx.scope("init"):
            net = self._network(numbers)
        shelf = Shelf(maker="arabic-sentiment")
        shelf.put(LEXICON, lexicon)
        return Subject(
            net,
            Splits(**{part: _examples(own, lexicon) for part, own in told.items()}),
            Classification(len(CLASSES)),
            Anatomy(head="head"),
            Budget(epochs=4, batch_size=64, optimizer="adam", lr=3e-3, schedule="cosine"),
            shelf=shelf,
        )

    def _network(self, numbers: Mapping[str, int]) -> nn.Module:
        size, classes = self.vocabulary, len(CLASSES)
        if self.network == "bilstm":
            return BiLSTM(size, self.dim, self.hidden, classes, self.dropout)
        if self.network == "subword":
            return SubwordLinear(parts_of_words(numbers, 4 * size), size, 4 * size, self.dim, classes)
        return TextCNN(size, self.dim, self.hidden, classes, self.dropout)


def _examples(told: tuple[Told, ...], lexicon: Lexicon) -> Examples:
    inputs = lexicon.render([t.words for t in told], torch.zeros(len(told), 0))
    labels, index = (torch.tensor([getattr(t, name) for t in told]) for name in ("label", "index"))
    return Examples(inputs, labels, index)
