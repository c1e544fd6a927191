"""Technique `synonym-training`: learn from training texts in which a swapped word fools the network as it stands."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context, derive
from cupel.core.errors import NotApplicable, PlanError
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import LEXICON
from cupel.core.slots import phase
from cupel.core.types import Batch, Examples
from cupel.ops.lexicon import Lexicon, Words
from cupel.ops.word_attack import Language, Study, attacked, swappable, texts_of
from cupel.ops.word_filters import content_of
from cupel.ops.word_swaps import Victim

CARD = Card(
    name="synonym-training",
    family="robust",
    source="J. Y. Yoo, Y. Qi, Towards Improving Adversarial Training of NLP Models, Findings of EMNLP 2021, arXiv "
    "2109.00544, algorithm 1; attack: N. Alshahrani et al., Arabic Synonym BERT-based Adversarial Examples for Text "
    "Classification, EACL 2024 Student Research Workshop, arXiv 2402.03477, section 3",
    tags=("defence", "adversarial training", "evasion", "black-box", "text", "arabic", "words", "language model"),
    needs=("classes", "words"),
    reads=("lexicon",),
    tiny={
        "learn": 32,
        "warmup": 0,
        "max_words": 3,
        "fillers": 8,
        "similarity": -1.0,
        "stop": 5,
        "epochs": 1,
        "dim": 8,
        "corpus": 32,
    },
    neutral={"share": 0.0},
)


@dataclass(frozen=True)
class SynonymTraining:
    r"""Swap words of training texts until the network in training errs, and let it learn these texts too.

    min over w of E [(1 - share) CE(f_w(x), y) + share CE(f_w(x'), y)] over the texts x for which an x' was found, plain
    CE over the others. x' differs from x in at most `max_words` words, stays alike (cosine at least `similarity`) and
    fooled the network at the beginning of some epoch: after `warmup` clean epochs, every `every` epochs, the next
    `learn` training texts in an order drawn once are attacked. A language model that was trained on the same texts
    proposes the words; `words="random"` tries random words at random places that pass the same filters, which shows
    what the attack itself is worth. An x' stays until another is found for its text.

    Use: when writers may choose other words on purpose, such as reviewers who pass a filter. It meets the swaps that
    it was trained on, and by its claim wins a point or so; longer budgets or swapped letters need a look of their own.

    Costs: the language model once (some 10 s for 8000 tweets on one core), and some 20 forwards and 2 ms of filters
    for every attacked text; no more updates; nothing at inference.

    Shapes: inputs int64 `[B, lead + width]`, numbers of words; targets `[B]`; logits `[B, K]`.

    Raises:
        PlanError: the words or classes of the training texts are not known, or no text can be attacked.

    Source: Yoo and Qi 2021, algorithm 1; Alshahrani et al. 2024, section 3, for the attack.

    Departs: words are ranked by the fall of the probability without them, not by gradients, and are proposed by a
    language model trained here; texts of 30 to 300 letters alone are attacked. A fixed number of texts is attacked, not
    as many as it takes to fool the network on a share of them; x' takes the place of x in the batch with probability
    `share` and is kept, where the paper appends what it found and forgets it after the epoch.

    Example:
        >>> SynonymTraining(max_words=2).words
        'model'
    """

    learn: int = param(2000, "training texts that are attacked each time (0: all)", ge=0)
    share: float = param(1.0, "chance that a text gives its place to the one found for it", ge=0, le=1)
    warmup: int = param(1, "epochs on clean texts before the first attack", ge=0)
    every: int = param(1, "epochs from one attack to the next", ge=1)
    words: str = param("model", "who proposes words", choices=("model", "random"))
    max_words: int = param(1, "most words swapped in a text", ge=1)
    fillers: int = param(50, "words proposed for a place", ge=1)
    similarity: float = param(0.8, "smallest cosine between the text before and after", ge=-1, le=1)
    stop: int = param(50, "commonest words that are neither swapped nor put in", ge=0)
    epochs: int = param(2, "passes of the language model over the corpus", ge=1)
    dim: int = param(64, "width of the language model; a multiple of 4", ge=4)
    corpus: int = param(8000, "most training texts that the language model reads (0: all)", ge=0)

    def hook(self, ctx: Context) -> Hook:
        return _Lessons(self, ctx)

    @property
    def study(self) -> Study:
        passes = self.epochs if self.words == "model" else 0  # random words ask no model
        return Study(self.max_words, self.fillers, self.similarity, self.stop, passes, self.dim, self.corpus)


class _Asked(nn.Module):
    """The network under whatever the fit has open around its forwards."""

    def __init__(self, at: Moment) -> None:
        super().__init__()
        self.net, self.at = at.model, (at,)

    def forward(self, inputs: Tensor) -> Tensor:
        nobody = torch.full((len(inputs),), -1, device=inputs.device)
        return self.at[0].output_of(Batch(inputs, nobody, nobody))


def known_texts(ctx: Context) -> tuple[Examples, Lexicon]:
    """The training examples and how their words become inputs."""
    train = ctx.train.train if ctx.train else None
    lexicon = ctx.shelf.get(LEXICON) if LEXICON in ctx.shelf else None
    if not isinstance(lexicon, Lexicon) or not isinstance(train, Examples):
        raise PlanError(
            f"synonym-training must know the words of the training texts; got {'' if lexicon else 'no lexicon and '}"
            f"{type(train).__name__} to train on. Use a workload that gives words, or call fit(..., shelf=its shelf)."
        )
    if train.inputs.shape[1:] != (lexicon.lead + lexicon.width,) or train.targets.ndim != 1:
        raise PlanError(
            f"synonym-training must have inputs [N, {lexicon.lead + lexicon.width}] with one class each; got "
            f"{list(train.inputs.shape)} and targets {list(train.targets.shape)}. Give the lexicon of these texts."
        )
    return train, lexicon


def fooling(
    victim: Victim, texts: list[Words], labels: Tensor, language: Language, control: torch.Generator | None = None
) -> dict[int, Words]:
    """What became of the texts that were classified rightly and no longer are, by their number in `texts`."""
    done = attacked(victim, texts, labels, language, control)
    return {k: done.courses[k].now for k in (done.right & ~done.stands).nonzero().flatten().tolist()}


class _Lessons(Hook):
    def __init__(self, p: SynonymTraining, ctx: Context) -> None:
        self.p, self.ctx = p, ctx
        self.chance, self.control = ctx.rng("share"), ctx.rng("control")
        self.language: Language | None = None
        self.found: dict[int, Tensor] = {}  # index of an example -> inputs of the text found for it
        self.asked = 0

    def start(self, at: Moment) -> None:
        if not self.p.share:
            return
        self.train, self.lexicon = known_texts(self.ctx)
        self.corpus = [text for text in texts_of(self.train, self.lexicon) if text]
        if self.p.dim % 4:
            raise PlanError(f"dim of synonym-training must be a multiple of 4; got {self.p.dim}. Give 64 or 128.")
        try:
            content = content_of(self.corpus, self.p.stop)
            rows, _ = swappable(self.train, self.lexicon, content, 0, "synonym-training")
        except NotApplicable as error:
            raise PlanError(f"{error} Or lower stop, if the corpus is small.") from error
        self.order = rows[torch.randperm(len(rows), generator=self.ctx.rng("order"))]

    def epoch(self, at: Moment) -> None:
        since = at.epoch - self.p.warmup
        if not self.p.share or since < 0 or since % self.p.every:
            return
        began = time.perf_counter()
        if self.language is None:
            seed = derive(self.ctx.seed, *self.ctx.path)
            self.language = self.p.study.language(self.corpus, seed, self.ctx.rng("meanings"))
        learned = time.perf_counter()
        rows = self.order[: self.p.learn or None]
        self.order = self.order.roll(-len(rows))
        fresh = self._attack(rows, self.language, at)
        self.found |= fresh
        self.asked += len(rows)
        now = time.perf_counter()
        told = {"attacked": len(rows), "found": len(fresh), "kept": len(self.found)}
        self.ctx.log(kind="lessons", epoch=at.epoch + 1, **told, study=learned - began, seconds=now - learned)

    def _attack(self, rows: Tensor, language: Language, at: Moment) -> dict[int, Tensor]:
        """Inputs of the texts that fool the network now, by the index of their example."""
        leads = self.train.inputs[rows, : self.lexicon.lead].cpu()
        victim = Victim(_Asked(at), at.task, self.lexicon, leads, self.ctx.device)
        labels, texts = self.train.targets[rows].cpu(), texts_of(self.train.take(rows), self.lexicon)
        found = fooling(victim, texts, labels, language, self.control if self.p.words == "random" else None)
        inputs = self.lexicon.render(list(found.values()), leads[list(found)])
        return dict(zip(self.train.index[rows[list(found)]].tolist(), inputs, strict=True))

    @phase("attack")
    def batch(self, batch: Batch, at: Moment) -> Batch:
        if not self.found:
            return batch
        chance = at.draw(batch.index, lambda like: torch.rand(len(like), generator=self.chance))
        pairs = enumerate(zip(chance.tolist(), batch.index.tolist(), strict=True))
        taken = {row: self.found[k] for row, (c, k) in pairs if c < self.p.share and k in self.found}
        if not taken:
            return batch
        rows = torch.tensor(list(taken), device=batch.inputs.device)
        return replace(
            batch, inputs=batch.inputs.index_copy(0, rows, torch.stack(list(taken.values())).to(batch.inputs))
        )

    def end(self, at: Moment) -> None:
        if self.p.share:
            text = f"synonym-training: {self.asked} texts attacked, {len(self.found)} training texts with a lesson"
            self.ctx.log(kind="note", text=text)
