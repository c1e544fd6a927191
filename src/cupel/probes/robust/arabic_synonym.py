"""Probe `arabic-synonym`: does the answer survive when words are swapped for others that fit their place?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cupel.core.context import Context, derive
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Readings, exact, mean_of, share
from cupel.core.shelf import LEXICON
from cupel.core.types import Examples, Subject
from cupel.ops.labelled import judged_classes
from cupel.ops.lexicon import Lexicon, Words
from cupel.ops.word_attack import Attacked, Language, Study, attacked, swappable, texts_of, with_found
from cupel.ops.word_swaps import Victim

CARD = Card(
    name="arabic-synonym",
    family="robust",
    source="N. Alshahrani, S. Alshahrani, E. Wali, J. Matthews, Arabic Synonym BERT-based Adversarial Examples for "
    "Text Classification, EACL 2024 Student Research Workshop, arXiv 2402.03477",
    tags=("evasion", "adversarial", "text", "arabic", "black box", "scores", "untargeted", "words", "language model"),
    needs=("classes", "words"),
    reads=("lexicon",),
    forks=2,
    readings=(
        "defended_accuracy",
        "attacked_accuracy",
        "clean_accuracy",
        "control_accuracy",
        "attack_success",
        "transfer_accuracy",
        "defended_clean_accuracy",
        "queries",
        "similarity",
    ),
    tiny={"examples": 6, "learn": 6, "epochs": 1, "dim": 8, "fillers": 4, "corpus": 32},
)


@dataclass(frozen=True)
class ArabicSynonym:
    r"""Swap the words that matter most for others that a language model puts in their place, until the class changes.

    Importance of word w: s_w = p(text) - p(text without w), p the probability of the class given; words whose removal
    changes the class come first. At a place, the `fillers` likeliest words of a masked language model that have the
    same form and leave the text alike (cosine of LSA points at least `similarity`) are tried in turn. Of `max_words`
    places, each keeps the word that lowers p the most when none changes the class. Words of every script are told by
    their letters, so the attack runs on any language; word forms are known for Arabic and English.

    `attacked_accuracy`: share of texts classified rightly before and after; `control_accuracy`: the same for random
    words at random places that pass the same filters, with as many tries. `transfer_accuracy`: of a network from
    another seed on the texts found. `defended_accuracy`: of a network that also learned the texts that succeeded on
    `learn` training texts, attacked anew. `queries`: of the model for a text, on average, the ranking included.

    Raises:
        NotApplicable: no test text has 30 to 300 letters and a word to swap; training data in another form.

    Source: Alshahrani et al. 2024, section 3 and the released code.

    Departs: the language model is trained here on the training texts (AraBERT v2 there); word forms by clitics and
    affixes for a tagger; LSA for multilingual sentence vectors; the commonest words stand for stop words. A place
    without a candidate is passed over; repeated words are allowed. More words than one are this library's own.

    Example:
        >>> ArabicSynonym(max_words=3).similarity
        0.8
    """

    max_words: int = param(1, "most words swapped in a text (1: as in the paper)", ge=1)
    fillers: int = param(50, "words the language model proposes for a place", ge=1)
    similarity: float = param(0.8, "smallest cosine between the text before and after", ge=-1, le=1)
    examples: int = param(300, "test texts that are attacked (0: all)", ge=0)
    learn: int = param(2000, "training texts that are attacked for the defence (0: all)", ge=0)
    stop: int = param(50, "commonest words that are neither swapped nor put in", ge=0)
    epochs: int = param(4, "passes of the language model over the corpus", ge=1)
    dim: int = param(128, "width of the language model; a multiple of 4", ge=4)
    corpus: int = param(8000, "most training texts that the language model reads (0: all)", ge=0)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        lexicon = ctx.shelf.get(LEXICON) if LEXICON in ctx.shelf else None
        train = subject.data.train
        judged_classes(subject, "arabic-synonym")
        if not isinstance(lexicon, Lexicon) or not isinstance(train, Examples):
            raise NotApplicable("arabic-synonym must have texts as training examples; got others. Use it on texts.")
        known = [text for text in texts_of(train, lexicon) if text]
        language = self.study.language(known, derive(ctx.seed, *ctx.path), ctx.rng("meanings"))
        rows, texts = swappable(subject.data.test, lexicon, language.content, self.examples, "arabic-synonym")
        labels, leads = subject.data.test.targets[rows], subject.data.test.inputs[rows, : lexicon.lead]

        def victim(of: Subject) -> Victim:
            return Victim(of.model, subject.task, lexicon, leads, ctx.device)

        main = attacked(victim(subject), texts, labels, language)
        control = attacked(victim(subject), texts, labels, language, ctx.rng("control"))
        learned, found = self.lessons(subject, lexicon, language, ctx)
        twin = ctx.fork(seed=ctx.seed + 1)
        crossed = ~victim(twin).errs([c.now for c in main.courses], labels)
        defended = ctx.fork(data=lambda view: with_found(view, learned, found, lexicon))
        again = attacked(victim(defended), texts, labels, language)
        return self._readings(main, control, again, crossed, len(found), language, labels)

    @property
    def study(self) -> Study:
        return Study(self.max_words, self.fillers, self.similarity, self.stop, self.epochs, self.dim, self.corpus)

    def lessons(
        self, subject: Subject, lexicon: Lexicon, language: Language, ctx: Context, control: bool = False
    ) -> tuple[Tensor, list[Words]]:
        """Rows of the training part whose attacked text fools the model, and these texts."""
        train: Examples = subject.data.train
        rows, texts = swappable(train, lexicon, language.content, self.learn, "arabic-synonym")
        victim = Victim(subject.model, subject.task, lexicon, train.inputs[rows, : lexicon.lead], ctx.device)
        done = attacked(victim, texts, train.targets[rows], language, ctx.rng("lessons") if control else None)
        won = (done.right & ~done.stands).nonzero().flatten()
        return rows[won], [done.courses[k].now for k in won.tolist()]

    def _readings(
        self,
        main: Attacked,
        control: Attacked,
        again: Attacked,
        crossed: Tensor,
        lessons: int,
        language: Language,
        labels: Tensor,
    ) -> Readings:
        n, right = len(main.courses), int(main.right.sum())
        won = (main.right & ~main.stands).nonzero().flatten().tolist()
        alike = [language.likeness.cosine(main.courses[k].before, main.courses[k].now) for k in won]
        swaps = "one word" if self.max_words == 1 else f"up to {self.max_words} words"
        notes = [
            f"{n} texts, {right} of them right before; {swaps} swapped, {self.fillers} fillers a place, one run",
            f"the defended network learned {lessons} more texts",
        ]
        if int(control.stands.sum()) < int(main.stands.sum()):
            notes.append("random swaps fool more texts than the attack: its number is too good")
        shown = [
            {
                "before": " ".join(main.courses[k].before),
                "after": " ".join(main.courses[k].now),
                "label": int(labels[k]),
            }
            for k in won[:6]
        ]
        return Readings.of(
            notes,
            {"swapped": shown},
            defended_accuracy=share(int(again.stands.sum()), n),
            attacked_accuracy=share(int(main.stands.sum()), n),
            clean_accuracy=share(right, n),
            control_accuracy=share(int(control.stands.sum()), n),
            attack_success=share(len(won), right, "lower") if right else exact(0.0, "share", "lower"),
            transfer_accuracy=share(int(crossed.sum()), n),
            defended_clean_accuracy=share(int(again.right.sum()), n),
            queries=mean_of([float(q) for q in main.queries], "queries", "higher"),
            similarity=mean_of(alike, "1") if alike else exact(1.0, "1"),
        )
