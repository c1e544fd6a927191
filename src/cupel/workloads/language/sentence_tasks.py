"""Workload `sentence-tasks`: six sets of labelled sentences under one shared encoder with a head for each."""

from __future__ import annotations

from dataclasses import dataclass

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.shelf import LEXICON, Shelf
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Budget, Subject
from cupel.data.sentences import SETS, lexicon, sentences
from cupel.nets.multi_task import MultiTaskText

CARD = Card(
    name="sentence-tasks",
    family="language",
    source="data: R. Socher et al. 2013 (SST-2), X. Li and D. Roth 2002 (TREC), B. Pang and L. Lee 2004 and 2005 "
    "(Subj, MR), M. Hu and B. Liu 2004 (CR), J. Wiebe et al. 2005 (MPQA), as in Y. Kim, Convolutional Neural Networks "
    "for Sentence Classification, EMNLP 2014, arXiv 1408.5882; network: A. Joulin et al., Bag of Tricks for Efficient "
    "Text Classification, 2016, arXiv 1607.01759",
    tags=("text", "multi-task", "bag of words", "small"),
    gives=("weights", "gradients", "members", "classes", "words"),
    writes=("lexicon",),
    expects="test accuracy without pre-trained vectors: SST-2 0.827 (with phrase labels), TREC 0.912, Subj 0.896, "
    "MR 0.761, CR 0.798, MPQA 0.834 (CNN-rand, Kim 2014, Table 2)",
    tiny={"tasks": ("trec", "cr"), "examples": 48, "words": 12, "vocabulary": 512, "dim": 8, "hidden": 8},
)


@dataclass(frozen=True)
class SentenceTasks:
    r"""Classify sentences of several tasks with one shared encoder and a linear head for each task.

    h = relu(W mean_i E[t_i] + b) over the words and pairs of neighbouring words t_i that are among the `vocabulary`
    most frequent of the training part; logits of task k: W_k h + b_k. The classes of all tasks stand side by side;
    those of other tasks have the logit -10,000, hence the probability 0, so losses and probes treat every row by
    itself. A training batch holds rows of one task; the batches of all tasks are shuffled together in every epoch.

    Use: for methods that share one network between tasks, and to see methods made for images on text. Not for the
    best accuracy on any of these sets: there are no pre-trained vectors, and word order counts within pairs only.

    Costs: 0.5 million weights, nearly all of them in the embedding; reading and a fit take some 3 s each on one core.

    Shapes: inputs int64 `[B, 2 words]`: the task's number, then token numbers, 0 for padding; targets `[B]`, counted
    on from task to task; logits `[B, K]`, K the classes of all tasks.

    Raises:
        MissingData: a file is not on this machine, or broken.
        ParamError: an unknown or repeated task.

    Source: Kim 2014 for the sets, Joulin et al. 2016 for the network without its hidden layer.

    Departs: pairs have vectors of their own where Joulin et al. hash them. SST-2 has whole sentences only, where the
    literature adds labelled phrases to the training part; MR, Subj, CR and MPQA have one fixed split (70, 10, 20 in
    100) instead of tenfold cross-validation; a sentence of two tasks is in the same part of both (SST-2 is made of
    MR). With Adam, the heads that a batch does not use still move a little by their momentum.

    Example:
        >>> SentenceTasks(tasks=("cr",)).classes
        ('cr/negative', 'cr/positive')
    """

    tasks: tuple[str, ...] = param(("sst2", "trec", "subj", "mr", "cr", "mpqa"), "sets that are tasks, in this order")
    words: int = param(40, "most words of a sentence", ge=2, le=128)
    vocabulary: int = param(32768, "most frequent words and pairs that have a vector", ge=16, le=1048576)
    dim: int = param(16, "length of a word's vector", ge=1, le=1024)
    hidden: int = param(32, "units of the shared hidden layer", ge=1, le=4096)
    dropout: float = param(0.2, "share of hidden units dropped in training", ge=0, lt=1)
    examples: int = param(0, "most rows of each task in each split (0: all)", ge=0)
    data_seed: int = param(0, "which rows validate and test where a set does not say so", ge=0)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the logits."""
        return tuple(f"{name}/{label}" for name in self.tasks for label in SETS[name])

    def build(self, ctx: Context) -> Subject:
        names = tuple(self.tasks)
        chosen = (names, self.words, self.vocabulary, self.examples, self.data_seed)
        data, shelf = sentences(*chosen), Shelf(maker="sentence-tasks")
        shelf.put(LEXICON, lexicon(*chosen))
        with ctx.scope("init"):
            net = MultiTaskText(self.vocabulary, self.dim, self.hidden, [len(SETS[n]) for n in names], self.dropout)
        return Subject(
            net,
            data,
            Classification(len(self.classes)),
            Anatomy(head="head"),
            Budget(epochs=3, batch_size=128, optimizer="adam", lr=1e-2, schedule="cosine"),
            shelf=shelf,
        )
